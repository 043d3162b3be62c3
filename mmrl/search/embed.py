"""`mmrl embed`: every picture of a set -> embeddings.parquet, which an index is made of.

    OUT/
        embeddings.parquet    key, captions, group, embedding (unit rows), thumbnail (WebP); see `schema`
        bad_samples.jsonl     what was left out, one object a sample; only where something was

Shapes: N pictures, d the encoder's dim.
"""

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import mmrl
from mmrl.data.index import Problem
from mmrl.data.samples import BadSample, SampleReader
from mmrl.data.sources import open_reader
from mmrl.data.tables import arrow
from mmrl.decode import to_picture
from mmrl.errors import InputError
from mmrl.export.encoder import LoadedEncoder, load
from mmrl.model import bundle
from mmrl.tracking import BAD_SAMPLES

EMBEDDINGS = "embeddings.parquet"
METADATA_KEY = b"mmrl"
_THUMBNAIL_SIDE, _THUMBNAIL_QUALITY = 96, 90
_ROWS_AT_A_TIME = 2048  # rows of one Parquet row group


def embed_pictures(
    model: str,
    shards: str,
    out: Path,
    dim: int | None = None,
    batch_size: int = 64,
    quiet: bool = False,
) -> dict[str, Any]:
    """Writes OUT/embeddings.parquet; returns its metadata, the number of pictures and of bad samples.

    Raises:
        InputError: no such model or shards, a dim that it does not have, OUT holds something else, no usable picture.
    """
    pyarrow, parquet = arrow("mmrl embed")
    if batch_size < 1:
        raise InputError(f"batch-size: {batch_size} is too small; give at least 1.")
    reader = open_reader(shards)
    name, where, digest = identify(model)
    encoder = load(where, dim=dim, towers="image")
    metadata = {
        "model": name,
        "origin_sha256": digest,
        "dim": encoder.dim,
        "nested_dims": list(encoder.nested_dims),
        "mmrl_version": mmrl.__version__,
    }
    beside = out / f".{EMBEDDINGS}.partial"
    prepare_folder(out, {EMBEDDINGS, BAD_SAMPLES, beside.name})
    table_schema = schema(pyarrow, encoder.dim).with_metadata({METADATA_KEY: json.dumps(metadata)})
    bad = list(reader.problems)
    console = Console(quiet=quiet)
    columns = (TextColumn("embedding"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    count, rows = 0, _Rows()
    try:
        with (
            parquet.ParquetWriter(beside, table_schema) as writer,
            Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
        ):
            task = progress.add_task("", total=len(reader))
            for batch in _embedded(reader, encoder, batch_size, bad):
                progress.update(task, completed=batch.end)
                rows.extend(batch)
                count += len(batch.keys)
                if len(rows.keys) >= _ROWS_AT_A_TIME:
                    writer.write_table(rows.as_table(pyarrow, table_schema))
                    rows = _Rows()
            if rows.keys:
                writer.write_table(rows.as_table(pyarrow, table_schema))
        _write_bad(out, bad)
        if not count:
            raise InputError(f"shards: no picture in {shards} can be used, such as {bad[0].key}: {bad[0].reason}.")
        beside.replace(out / EMBEDDINGS)
    finally:
        beside.unlink(missing_ok=True)
    _show(console, out, count, encoder.dim, bad)
    return {**metadata, "count": count, "bad": len(bad), "embeddings": str(out / EMBEDDINGS)}


def identify(model: str | Path) -> tuple[str, str | Path, str]:
    """Which encoder MODEL is: its name as an index keeps it, what `mmrl.load` opens, the hash of its origin.

    A run folder's best checkpoint may be another one tomorrow; the hash tells. Encoders cut from one checkpoint have
    one origin: their vectors agree, so an index of 512-d vectors takes queries from the 128-d export.

    Raises:
        InputError: there is no encoder.
    """
    if not str(model).startswith("open_clip:"):
        folder = bundle.find(model)
        return str(Path(model).absolute()), folder, bundle.origin(bundle.read_manifest(folder))
    digest = hashlib.sha256()
    for name, tensor in sorted(bundle.open_model(model).state().items()):
        digest.update(name.encode())
        digest.update(tensor.float().numpy().tobytes())
    return str(model), model, digest.hexdigest()


def schema(pyarrow: Any, dim: int) -> Any:
    """The columns of embeddings.parquet. A group of -1 is none."""
    return pyarrow.schema(
        [
            ("key", pyarrow.string()),
            ("captions", pyarrow.list_(pyarrow.string())),
            ("group", pyarrow.int64()),
            ("embedding", pyarrow.list_(pyarrow.float32(), dim)),
            ("thumbnail", pyarrow.binary()),
        ]
    )


def prepare_folder(out: Path, ours: set[str]) -> None:
    """Makes OUT, or takes it over where it holds nothing but our own files of an earlier time.

    Raises:
        InputError: it is a file, holds something else, or cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"out: {out} cannot be made a folder ({error.strerror}); name another.") from None
    others = sorted(path.name for path in out.iterdir() if path.name not in ours)
    if others:
        raise InputError(f"out: {out} already holds {others[0]}; name a new or empty folder.")


@dataclass
class _Rows:
    """Some rows of the table, by column."""

    keys: list[str] = field(default_factory=list)
    captions: list[list[str]] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    embeddings: list[np.ndarray] = field(default_factory=list)
    """(n, d) each."""
    thumbnails: list[bytes] = field(default_factory=list)
    end: int = 0
    """Samples of the set that were looked at up to here, bad ones included."""

    def extend(self, other: "_Rows") -> None:
        self.keys += other.keys
        self.captions += other.captions
        self.groups += other.groups
        self.embeddings += other.embeddings
        self.thumbnails += other.thumbnails

    def as_table(self, pyarrow: Any, table_schema: Any) -> Any:
        vectors_Nd = np.concatenate(self.embeddings)
        flat = pyarrow.array(vectors_Nd.reshape(-1), pyarrow.float32())
        vectors = pyarrow.FixedSizeListArray.from_arrays(flat, vectors_Nd.shape[1])
        columns = [self.keys, self.captions, self.groups, vectors, self.thumbnails]
        arrays = [
            pyarrow.array(c, f.type) if c is not vectors else c for c, f in zip(columns, table_schema, strict=True)
        ]
        return pyarrow.Table.from_arrays(arrays, schema=table_schema)


def _embedded(reader: SampleReader, encoder: LoadedEncoder, batch_size: int, bad: list[Problem]) -> Iterator[_Rows]:
    """The set in its order, a batch at a time; what is bad is added to `bad`."""
    for start in range(0, len(reader), batch_size):
        batch = _Rows(end=min(start + batch_size, len(reader)))
        pictures = []
        for number in range(start, batch.end):
            try:
                sample, picture_CHW = reader.read_picture(number)
            except BadSample as error:
                bad.append(error.problem)
                continue
            pictures.append(encoder.image_spec.pixels(picture_CHW))
            batch.keys.append(sample.name)
            batch.captions.append(sample.captions)
            batch.groups.append(sample.group)
            batch.thumbnails.append(thumbnail(to_picture(picture_CHW)))
        if pictures:
            batch.embeddings.append(encoder.encode_pixels(torch.stack(pictures), batch_size))
        yield batch


def thumbnail(image: Image.Image) -> bytes:
    """An RGB picture -> WebP of at most 96 pixels a side."""
    small = image.copy()
    small.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=_THUMBNAIL_QUALITY)
    return buffer.getvalue()


def _write_bad(out: Path, bad: list[Problem]) -> None:
    path = out / BAD_SAMPLES
    path.unlink(missing_ok=True)
    if bad:
        path.write_text("".join(json.dumps(asdict(problem)) + "\n" for problem in bad))


def _show(console: Console, out: Path, count: int, dim: int, bad: list[Problem]) -> None:
    size = (out / EMBEDDINGS).stat().st_size / 1e6
    lines = [f"{out / EMBEDDINGS}: {count:,} pictures, {dim}-d, {size:,.1f} MB"]
    if bad:
        listed = out / BAD_SAMPLES
        lines.append(f"Left out: {len(bad):,} bad samples, listed in {listed}, such as {bad[0].key}: {bad[0].reason}")
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
