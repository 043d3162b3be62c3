"""`mmrl embed`: every picture of a set -> embeddings.parquet, which an index is made of and other tools read.

    OUT/
        embeddings.parquet    key, captions, group, group_name, embedding (unit rows), embedding_DIM_PRECISION …,
                              thumbnail (WebP); see `table.picture_schema`
        texts.parquet         with --texts: key, caption, group, group_name, the same vectors; a row a caption
        img_emb/ …            with --npy: see `table.write_npy`
        bad_samples.jsonl     what was left out, one object a sample; only where something was
        .parts/               only while it is at work, or was stopped: what is done, by which the same command goes on

Shapes: N pictures, d a dim.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mmrl.data.index import BAD_SAMPLES, Problem
from mmrl.data.pack.tables import arrow
from mmrl.data.workers import Workers, usable_cores
from mmrl.errors import InputError, did_you_mean
from mmrl.images.decode import to_picture
from mmrl.inference.base import LoadedEncoder
from mmrl.inference.load import load
from mmrl.model import bundle
from mmrl.nesting import check_dims, cut
from mmrl.search import table
from mmrl.search.pictures import Pictures, open_pictures
from mmrl.search.precision import PRECISIONS, Column, Precision, columns_of, quantised
from mmrl.version import __version__

FORMAT, VERSION = "mmrl-embeddings", 2
EMBEDDINGS, TEXTS, PARTS = "embeddings.parquet", "texts.parquet", ".parts"
LONGEST_TEXT = 10_000
"""Letters of a text that are looked at: a hundred times what a tower reads, and no work to tokenise."""
_PLAN = "plan.json"
# Samples of one part: what a crash costs at most, and a row group of the file.
_LEAST_PART, _LARGEST_PART, _PARTS = 512, 8192, 200


def embed_pictures(
    model: str,
    source: str,
    out: Path,
    dims: Sequence[int] | None = None,
    batch_size: int = 64,
    *,
    precisions: Sequence[str] = ("fp32",),
    texts: bool = False,
    npy: bool = False,
    group_key: str = "group",
    workers: int = 1,
    quiet: bool = False,
) -> dict[str, Any]:
    """Writes OUT/embeddings.parquet; returns its metadata, the number of pictures and of bad samples, and the speed.

    Args:
        dims: lengths of the vectors; the encoder's own when left out.
        texts: embed the captions as well, into OUT/texts.parquet.
        group_key: what a sample's JSON calls its group.
        workers: processes at work, each with an encoder of its own.

    Raises:
        InputError: no such model or pictures, a dim that it does not have, an unknown precision, OUT holds something
            else or the parts of another embedding, no usable picture.
    """
    arrow("mmrl embed")
    if batch_size < 1 or workers < 1:
        raise InputError(f"batch-size, workers: {batch_size} and {workers}; give at least 1 of each.")
    checked = _check_precisions(precisions)
    pictures = open_pictures(source, group_key)
    name, where, digest = identify(model)
    encoder = load(where, dim=max(dims) if dims else None, towers="both" if texts else "image")
    wanted = list(dims or [encoder.dim])
    check_dims(wanted, encoder.dim, "dim")
    columns = columns_of(wanted, checked)
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "model": name,
        "origin_sha256": digest,
        "dim": encoder.dim,
        "nested_dims": list(encoder.nested_dims),
        "columns": [column.to_json() for column in columns],
        "mmrl_version": __version__,
    }
    work = _Work(where, source, group_key, columns, metadata, texts, batch_size, out / PARTS, workers)
    work.pictures, work.encoder = pictures, encoder
    ours = {EMBEDDINGS, TEXTS, BAD_SAMPLES, PARTS, "metadata"}
    ours |= {f"{kind}{column.name.removeprefix('embedding')}" for kind in ("img_emb", "text_emb") for column in columns}
    prepare_folder(out, ours)
    size = max(_LEAST_PART, min(_LARGEST_PART, len(pictures) // _PARTS))
    size = -(-size // batch_size) * batch_size
    spans = [(start, min(start + size, len(pictures))) for start in range(0, len(pictures), size)]
    _resume(out / PARTS, metadata, texts, source, pictures, size)
    console = Console(quiet=quiet)
    began = time.monotonic()
    done = _carry_out(work, spans, workers, console)
    seconds = time.monotonic() - began
    bad = [*pictures.problems, *done.bad]
    count = _assemble(out, [work.part(start) for start, _ in spans], work, bad, source, npy)
    result = {
        **metadata,
        "count": count,
        "texts": done.texts if texts else None,
        "bad": len(bad),
        "seconds": round(seconds, 3),
        "samples_per_second": round(done.fresh / seconds, 1) if done.fresh else None,
        "embeddings": str(out / EMBEDDINGS),
    }
    _show(console, out, result, bad, done.fresh)
    return result


def _check_precisions(precisions: Sequence[str]) -> list[Precision]:
    for precision in precisions:
        if precision not in PRECISIONS:
            raise InputError(f"precision: {precision!r} is unknown.{did_you_mean(precision, PRECISIONS)}")
    if not precisions or len(set(precisions)) < len(precisions):
        raise InputError(f"precision: {list(precisions)}; name at least one of {', '.join(PRECISIONS)}, each once.")
    return [precision for precision in PRECISIONS if precision in precisions]


def identify(model: str | Path) -> tuple[str, str | Path, str]:
    """Which encoder MODEL is: its name as an index keeps it, what `mmrl.load` opens, the hash of its origin.

    A run folder's best checkpoint may be another one tomorrow; the hash tells. Encoders cut from one checkpoint have
    one origin: their vectors agree, so an index of 512-d vectors takes queries from the 128-d export.

    Raises:
        InputError: there is no encoder.
    """
    if not str(model).startswith("open_clip:"):
        folder = bundle.find(model)
        return str(Path(model).absolute()), folder, _origin(folder)
    digest = hashlib.sha256()
    for name, tensor in sorted(bundle.open_model(model).state().items()):
        digest.update(name.encode())
        digest.update(tensor.float().numpy().tobytes())
    return str(model), model, digest.hexdigest()


def _origin(folder: Path) -> str:
    """As `bundle.origin`, of an exported encoder of any format."""
    try:
        return bundle.origin(json.loads((folder / bundle.MANIFEST).read_text()))
    except (ValueError, KeyError, TypeError):
        bundle.read_manifest(folder)  # tells what is wrong with it, as a rule
        raise InputError(
            f"{folder / bundle.MANIFEST} does not tell which weights it is of; export the encoder again."
        ) from None


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


def _resume(parts: Path, metadata: dict[str, Any], texts: bool, source: str, pictures: Pictures, size: int) -> None:
    """Keeps the parts of a stopped embedding where they are of this one.

    Raises:
        InputError: they are of another one.
    """
    plan = {
        **metadata,
        "source": source,
        "pictures": [len(pictures), pictures.fingerprint],
        "texts": texts,
        "part": size,
    }
    file = parts / _PLAN
    if file.is_file():
        before = json.loads(file.read_text())
        differing = next((key for key in plan if before.get(key) != plan[key]), None)
        if differing is None:
            return
        raise InputError(
            f"out: {parts.parent} holds a stopped embedding whose {differing} was {before.get(differing)}, not "
            f"{plan[differing]}; name another folder, or remove {parts} to begin anew."
        )
    shutil.rmtree(parts, ignore_errors=True)
    parts.mkdir()
    beside = parts / f"{_PLAN}.partial"
    beside.write_text(json.dumps(plan))
    beside.replace(file)


@dataclass
class _Part:
    """What a part's work comes to."""

    samples: int = 0
    texts: int = 0
    fresh: int = 0
    """Samples that this call looked at, the others having been done before."""
    bad: Sequence[Problem] = ()


@dataclass
class _Work:
    """Samples start … end - 1 -> a part's files. It goes to worker processes, which open their own encoder."""

    where: str | Path
    source: str
    group_key: str
    columns: list[Column]
    metadata: dict[str, Any]
    texts: bool
    batch_size: int
    parts: Path
    workers: int

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("encoder", "pictures")}

    @cached_property
    def pictures(self) -> Pictures:
        return open_pictures(self.source, self.group_key)

    @cached_property
    def encoder(self) -> LoadedEncoder:
        torch.set_num_threads(max(1, usable_cores() // self.workers))
        return load(self.where, dim=self.columns[0].dim, towers="both" if self.texts else "image")

    def part(self, start: int) -> Path:
        """The file of the part that begins there; that of its texts is beside it."""
        return self.parts / f"{start:012}.parquet"

    def text_part(self, start: int) -> Path:
        return self.parts / f"{start:012}.texts.parquet"

    def __call__(self, span: tuple[int, int]) -> _Part:
        rows, bad, vectors, pixels = table.Rows(), [], [], []
        for found in self.pictures.read(*span):
            if isinstance(found, Problem):
                bad.append(found)
                continue
            sample, picture_CHW = found
            rows.add(sample, to_picture(picture_CHW))
            pixels.append(self.encoder.image_spec.pixels(picture_CHW))
            if len(pixels) == self.batch_size:
                vectors.append(self.encoder.encode_pixels(torch.stack(pixels), self.batch_size))
                pixels = []
        if pixels:
            vectors.append(self.encoder.encode_pixels(torch.stack(pixels), self.batch_size))
        texts = len(rows.text_rows()) if self.texts else 0
        if self.texts:
            captions = [caption[:LONGEST_TEXT] for some in rows.captions for caption in some]
            written = rows.as_text_table(
                table.text_schema(self.columns, self.metadata),
                self._all(self.encoder.encode_texts(captions, self.batch_size)),
            )
            _store(written, self.text_part(span[0]))
        schema = table.picture_schema(self.columns, self.metadata)
        done = _Part(len(rows.keys), texts, span[1] - span[0], bad)
        facts = {b"mmrl-part": json.dumps({**asdict(done), "bad": [asdict(problem) for problem in bad]})}
        whole_ND = np.concatenate(vectors) if vectors else np.zeros((0, self.columns[0].dim), np.float32)
        # Last, and by a rename: a part is done when this file is there.
        _store(rows.as_table(schema, self._all(whole_ND)).replace_schema_metadata(facts), self.part(span[0]))
        return done

    def _all(self, whole_ND: np.ndarray) -> list[np.ndarray]:
        """The vectors at each column's dim and precision."""
        of_dim = {column.dim: cut(torch.from_numpy(whole_ND), column.dim).numpy() for column in self.columns}
        return [quantised(of_dim[column.dim], column.precision) for column in self.columns]


def _store(written: Any, path: Path) -> None:
    beside = path.with_suffix(f".{os.getpid()}.partial")
    arrow("mmrl embed")[1].write_table(written, beside)
    beside.replace(path)


def _stored_part(path: Path) -> _Part | None:
    """What an earlier call did of this part, if it did."""
    pyarrow, parquet = arrow("mmrl embed")
    try:
        facts = json.loads(parquet.read_schema(path).metadata[b"mmrl-part"])
    except (OSError, pyarrow.ArrowException, KeyError, TypeError):
        return None
    return _Part(facts["samples"], facts["texts"], 0, [Problem(**problem) for problem in facts["bad"]])


def _carry_out(work: _Work, spans: Sequence[tuple[int, int]], workers: int, console: Console) -> _Part:
    """Does what is left; returns the sum of all parts."""
    parts = {span: _stored_part(work.part(span[0])) for span in spans}
    left = [span for span, part in parts.items() if part is None]
    total, began = spans[-1][1] if spans else 0, time.monotonic()
    already = total - sum(end - start for start, end in left)
    if already:
        console.print(f"Going on after {already:,} of {total:,} samples.", highlight=False)
    fields = (TextColumn("embedding"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"))
    with (
        Workers(work, min(workers, max(1, len(left))), "mmrl.search.embed") as pool,
        Progress(*fields, TimeRemainingColumn(), console=console, transient=True,
                 disable=not console.is_terminal) as bar,
    ):  # fmt: skip
        task, fresh = bar.add_task("", total=total, completed=already, speed=""), 0
        for span, part in zip(left, pool.map(left), strict=True):
            parts[span] = part
            fresh += part.fresh
            speed = f"{fresh / (time.monotonic() - began):,.0f} a second"
            bar.update(task, completed=already + fresh, speed=speed)
    return _sum(part for part in parts.values() if part is not None)


def _sum(parts: Iterable[_Part]) -> _Part:
    whole = _Part(bad=[])
    for part in parts:
        whole = _Part(
            whole.samples + part.samples, whole.texts + part.texts, whole.fresh + part.fresh, [*whole.bad, *part.bad]
        )
    return whole


def _assemble(out: Path, parts: Sequence[Path], work: _Work, bad: Sequence[Problem], source: str, npy: bool) -> int:
    """The parts -> OUT's files; returns the number of pictures."""
    listed = out / BAD_SAMPLES
    listed.unlink(missing_ok=True)
    if bad:
        listed.write_text("".join(json.dumps(asdict(problem)) + "\n" for problem in bad))
    done = {name: out / PARTS / name for name in (EMBEDDINGS, TEXTS)}
    count = table.join(parts, done[EMBEDDINGS], table.picture_schema(work.columns, work.metadata))
    if not count:
        shutil.rmtree(out / PARTS)
        raise InputError(f"source: no picture in {source} can be used, such as {bad[0].key}: {bad[0].reason}.")
    if work.texts:
        of_texts = [part.with_suffix(".texts.parquet") for part in parts]
        table.join(of_texts, done[TEXTS], table.text_schema(work.columns, work.metadata))
    if npy:
        table.write_npy(out, done[EMBEDDINGS], done[TEXTS] if work.texts else None, work.columns)
    (out / TEXTS).unlink(missing_ok=True)
    for path in done.values():
        if path.exists():
            path.replace(out / path.name)
    shutil.rmtree(out / PARTS)
    return count


def _show(console: Console, out: Path, result: dict[str, Any], bad: Sequence[Problem], fresh: int) -> None:
    size = (out / EMBEDDINGS).stat().st_size / 1e6
    texts = "" if result["texts"] is None else f" and {result['texts']:,} texts"
    shown = ", ".join(f"{column['dim']}-d {column['precision']}" for column in result["columns"])
    lines = [f"{out / EMBEDDINGS}: {result['count']:,} pictures{texts}, {shown}, {size:,.1f} MB"]
    if fresh:
        lines.append(f"{fresh:,} samples in {result['seconds']:,.1f} s, {result['samples_per_second']:,.0f} a second")
    if bad:
        listed = out / BAD_SAMPLES
        lines.append(f"Left out: {len(bad):,} bad samples, listed in {listed}, such as {bad[0].key}: {bad[0].reason}")
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
