"""`mmrl embed`: images and texts -> Parquet files, to index with `mmrl index` or to read with other tools.

    OUT/
        embeddings.parquet    key, captions, group, group_name, embedding (unit vectors), embedding_DIM_PRECISION …,
                              thumbnail (WebP); see `table.image_schema`; absent if only texts are embedded
        texts.parquet         with --texts, or of an encoder without an image tower, a row per caption: key, caption,
                              group, group_name, the same vector columns
        img_emb/ …            with --npy: see `table.write_npy`
        bad_samples.jsonl     the skipped samples, one JSON object per line; only if there are any
        .parts/               the finished chunks of an unfinished run, from which the same command resumes

Shapes: N images, D full embedding dim.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.progress import TextColumn

from mmrl.codecs.table import PRECISIONS, Precision, encode
from mmrl.data.arrow import arrow
from mmrl.data.index import BAD_SAMPLES, Problem
from mmrl.data.workers import WorkerPool, usable_cores
from mmrl.errors import InputError, did_you_mean
from mmrl.images.decode import to_pil
from mmrl.inference.base import LoadedEncoder
from mmrl.inference.evaluated import sides_of
from mmrl.inference.load import load
from mmrl.model.bundle import dims_up_to
from mmrl.nesting import check_dims, truncate, untrained_note
from mmrl.output.console import print_line
from mmrl.output.files import check_out_folder, create_folder, describe_difference, parse_json, write_atomic
from mmrl.output.progress import progress_bar
from mmrl.search import table
from mmrl.search.encoder_identity import identify_encoder
from mmrl.search.sources import Source, open_source
from mmrl.search.table import Column, columns_of
from mmrl.version import __version__

EMBEDDINGS_FORMAT, EMBEDDINGS_VERSION = "mmrl-embeddings", 2
EMBEDDINGS, TEXTS, CHUNKS = "embeddings.parquet", "texts.parquet", ".parts"
MAX_TEXT_LENGTH = 10_000
"""Characters of a query: a hundred times what a tower reads."""
_PLAN = "plan.json"
_TEXTS_OF_CHUNK, _RESULT = ".texts.parquet", ".json"
# Samples per chunk. A chunk is what a crash loses at most, and one row group of the file.
_MIN_CHUNK, _MAX_CHUNK, _CHUNK_COUNT = 512, 8192, 200


def embed_images(
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
    second: bool = False,
    workers: int = 1,
    force: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Writes OUT/embeddings.parquet and OUT/texts.parquet; returns their metadata, the counts of images, texts and bad
    samples, and the throughput.

    Args:
        dims: embedding dims (default: the encoder's full dim).
        precisions: some of PRECISIONS; one column is written per dim and precision.
        texts: also embed the captions, or the texts of a source without images, into OUT/texts.parquet. An encoder
            without an image tower always does so, and reads no images.
        group_key: the key of a sample's JSON that holds its group.
        second: embed the second members of samples (fields.second_text, fields.second_image), such as the passages that
            answer questions, in place of the first.
        workers: number of processes; each loads the encoder.
        force: replace embeddings with other settings in OUT.

    Raises:
        InputError: no such model or images; a dim or tower that the encoder lacks; an unknown precision; OUT holds
            other files or embeddings with other settings; no image or no text is usable.
    """
    arrow("mmrl embed")
    if batch_size < 1 or workers < 1:
        raise InputError(f"batch-size, workers: {batch_size} and {workers}; give at least 1 of each.")
    checked_precisions = _check_precisions(precisions)
    sides = sides_of(model)
    texts = texts or sides == ("text",)
    if texts and "text" not in sides:
        raise InputError(f"texts: {model} has no text tower; leave out --texts.")
    samples = open_source(source, group_key, sides, second)
    if not samples.has_images and "text" not in sides:
        raise InputError(f"source: {source} holds texts without images, and {model} has no text tower; give images.")
    if not samples.has_images and not texts:
        raise InputError(f"source: {source} holds texts without images; add --texts.")
    if not samples.has_images and npy:
        raise InputError("npy: clip-retrieval's layout is one of images, and there are texts only; leave out --npy.")
    name, encoder_path, digest = identify_encoder(model)
    towers = "image" if not texts else "both" if samples.has_images else "text"
    encoder = load(encoder_path, towers=towers)
    checked_dims = list(dims or [encoder.dim])
    check_dims(checked_dims, encoder.dim, "dim")
    columns = columns_of(checked_dims, checked_precisions)
    metadata = {
        "format": EMBEDDINGS_FORMAT,
        "version": EMBEDDINGS_VERSION,
        "model": name,
        "origin_sha256": digest,
        "dim": columns[0].dim,
        "nested_dims": list(dims_up_to(encoder.nested_dims, columns[0].dim)),
        "columns": [asdict(column) for column in columns],
        # Not the source itself: a URL can hold a password.
        "source_sha256": hashlib.sha256(os.fsencode(f"{source}\n{group_key}{second or ''}")).hexdigest(),
        "mmrl_version": __version__,
    }
    embedder = _ChunkEmbedder(
        encoder_path, (source, group_key, sides, second), columns, metadata, texts, towers, batch_size, out / CHUNKS,
        workers,
    )  # fmt: skip
    embedder.samples, embedder.encoder = samples, encoder
    allowed = {EMBEDDINGS, TEXTS, BAD_SAMPLES, CHUNKS, "metadata"}
    suffixes = [column.name.removeprefix("embedding") for column in columns]
    allowed |= {f"{prefix}{suffix}" for prefix in ("img_emb", "text_emb") for suffix in suffixes}
    check_out_folder(out, allowed, _difference(out, metadata, texts), force=force)
    create_folder(out)
    size = max(_MIN_CHUNK, min(_MAX_CHUNK, len(samples) // _CHUNK_COUNT))
    size = -(-size // batch_size) * batch_size
    spans = [(start, min(start + size, len(samples))) for start in range(0, len(samples), size)]
    _prepare_chunks(out / CHUNKS, metadata, texts, samples, size, force)
    console = Console(quiet=quiet)
    for note in (*samples.notes, untrained_note(checked_dims, encoder.nested_dims)):
        if note:
            print_line(console, note)
    began = time.monotonic()
    done = _embed_chunks(embedder, spans, workers, console)
    seconds = time.monotonic() - began
    bad = [*samples.problems, *done.bad]
    count = _merge_chunks(out, [embedder.chunk_path(start) for start, _ in spans], embedder, bad, source, npy)
    result = {
        **metadata,
        "count": count,
        "texts": done.texts if texts else None,
        "bad": len(bad),
        "seconds": round(seconds, 3),
        "samples_per_second": round(done.new / seconds, 1) if done.new else None,
        "embeddings": str(out / (EMBEDDINGS if samples.has_images else TEXTS)),
    }
    _print_summary(console, out, result, bad, done.new)
    return result


def _check_precisions(precisions: Sequence[str]) -> list[Precision]:
    for precision in precisions:
        if precision not in PRECISIONS:
            raise InputError(f"precision: {precision!r} is unknown.{did_you_mean(precision, PRECISIONS)}")
    if not precisions or len(set(precisions)) < len(precisions):
        raise InputError(
            f"precision: {', '.join(precisions) or 'empty'}; give one or more of {', '.join(PRECISIONS)}, each once."
        )
    return [precision for precision in PRECISIONS if precision in precisions]


def _difference(out: Path, metadata: dict[str, Any], texts: bool) -> str | None:
    """How the finished embeddings in OUT differ from those of these settings; None if they do not."""
    file = next((out / name for name in (EMBEDDINGS, TEXTS) if (out / name).is_file()), None)
    if file is None:
        return None
    pyarrow, parquet = arrow("mmrl embed")
    try:
        stored = parse_json(parquet.read_schema(file).metadata[table.METADATA_KEY])
    except (OSError, pyarrow.ArrowException, KeyError, TypeError, ValueError):
        return f"a file {file.name} of another program"
    stored, now = {**stored, "texts": (out / TEXTS).is_file()}, {**metadata, "texts": texts}
    same_source = stored.get("source_sha256") == now.pop("source_sha256")
    found = describe_difference("embeddings", stored, {**now, "mmrl_version": stored.get("mmrl_version")})
    return found if found or same_source else "embeddings of another source"


def _prepare_chunks(
    folder: Path, metadata: dict[str, Any], texts: bool, samples: Source, size: int, force: bool
) -> None:
    """Creates the folder of the chunks, or keeps it if an earlier run with the same settings left it. Raises
    InputError: it was left by a run with other settings."""
    plan = {**metadata, "pictures": [len(samples), samples.fingerprint], "texts": texts, "part": size}
    file = folder / _PLAN
    if file.is_file():
        stored = parse_json(file.read_text())
        differing = next((key for key in plan if stored.get(key) != plan[key]), None)
        if differing is None:
            return
        if not force:
            was = f"{differing} was {stored.get(differing)}, not {plan[differing]}"
            was = "source was another" if differing == "source_sha256" else was
            raise InputError(
                f"out: {folder.parent} holds an unfinished run whose {was}; choose another folder, or add --force to "
                "start over."
            )
    shutil.rmtree(folder, ignore_errors=True)
    write_atomic(file, json.dumps(plan))


@dataclass
class _ChunkResult:
    """The counts and bad samples of one chunk, or of all."""

    images: int = 0
    texts: int = 0
    new: int = 0
    """Samples processed by this run, not by an earlier one."""
    bad: Sequence[Problem] = ()


@dataclass
class _ChunkEmbedder:
    """Embeds samples start … end - 1 and writes them as one chunk. Pickled for worker processes, which open their own
    encoder."""

    encoder_path: str | Path
    source: tuple[str, str, Sequence[str], bool]
    """The arguments of open_source."""
    columns: list[Column]
    metadata: dict[str, Any]
    texts: bool
    towers: Literal["both", "image", "text"]
    batch_size: int
    folder: Path
    workers: int

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("encoder", "samples")}

    @cached_property
    def samples(self) -> Source:
        return open_source(*self.source)

    @cached_property
    def encoder(self) -> LoadedEncoder:
        torch.set_num_threads(max(1, usable_cores() // self.workers))
        return load(self.encoder_path, towers=self.towers)

    def chunk_path(self, start: int) -> Path:
        """The file of the chunk that starts at sample `start`."""
        return self.folder / f"{start:012}.parquet"

    def __call__(self, span: tuple[int, int]) -> _ChunkResult:
        rows, bad, pixels = [], [], []
        vectors = [np.zeros((0, self.encoder.dim), np.float32)]

        def encode_pixels() -> None:
            if pixels:
                vectors.append(self.encoder.encode_pixels(torch.stack(pixels), self.batch_size))
                pixels.clear()

        for read in self.samples.read(*span):
            if isinstance(read, Problem):
                bad.append(read)
                continue
            sample, image_CHW = read
            rows.append(table.image_row(sample, None if image_CHW is None else to_pil(image_CHW)))
            if image_CHW is not None:
                pixels.append(self.encoder.image_spec.pixels(image_CHW))
            if len(pixels) == self.batch_size:
                encode_pixels()
        encode_pixels()
        path, text_rows = self.chunk_path(span[0]), table.text_rows(rows) if self.texts else []
        if self.texts:
            text_ND = self.encoder.encode_texts([row["caption"] for row in text_rows], self.batch_size)
            self._write_chunk(path.with_suffix(_TEXTS_OF_CHUNK), table.text_schema, text_rows, text_ND)
        if not self.samples.has_images:
            rows = []
        self._write_chunk(path, table.image_schema, rows, np.concatenate(vectors))
        result = _ChunkResult(len(rows), len(text_rows), span[1] - span[0], bad)
        write_atomic(
            path.with_suffix(_RESULT), json.dumps(asdict(result))
        )  # last: a chunk is complete once this file exists
        return result

    def _write_chunk(
        self, path: Path, schema: Callable[..., Any], rows: Sequence[dict[str, Any]], full_ND: np.ndarray
    ) -> None:
        """Writes rows with their vectors at each column's dim and precision."""
        vectors = [
            encode(truncate(torch.from_numpy(full_ND), column.dim).numpy(), column.precision) for column in self.columns
        ]
        chunk = table.to_table(schema(self.columns, self.metadata), rows, vectors)
        arrow("mmrl embed")[1].write_table(chunk, path)


def _read_chunk_result(path: Path) -> _ChunkResult | None:
    """The result of a chunk that an earlier run completed, else None."""
    file = path.with_suffix(_RESULT)
    if not file.is_file():
        return None
    stored = parse_json(file.read_text())
    return _ChunkResult(stored["images"], stored["texts"], 0, [Problem(**problem) for problem in stored["bad"]])


def _embed_chunks(
    embedder: _ChunkEmbedder, spans: Sequence[tuple[int, int]], workers: int, console: Console
) -> _ChunkResult:
    """Embeds the chunks that no earlier run completed; returns the sum over all chunks."""
    results = {span: _read_chunk_result(embedder.chunk_path(span[0])) for span in spans}
    remaining = [span for span, result in results.items() if result is None]
    total, began = spans[-1][1] if spans else 0, time.monotonic()
    completed = total - sum(end - start for start, end in remaining)
    if completed:
        console.print(f"Resuming after {completed:,} of {total:,} samples.", highlight=False)
    with (
        WorkerPool(embedder, min(workers, max(1, len(remaining))), "mmrl.search.embed") as pool,
        progress_bar(console, TextColumn("{task.fields[speed]}")) as bar,
    ):
        task, new = bar.add_task("embedding", total=total, completed=completed, speed=""), 0
        for span, result in zip(remaining, pool.map(remaining), strict=True):
            results[span] = result
            new += result.new
            bar.update(task, completed=completed + new, speed=f"{new / (time.monotonic() - began):,.0f} samples/s")
    done = [result for result in results.values() if result is not None]
    bad = [problem for result in done for problem in result.bad]
    return _ChunkResult(sum(one.images for one in done), sum(one.texts for one in done), new, bad)


def _merge_chunks(
    out: Path, chunks: Sequence[Path], embedder: _ChunkEmbedder, bad: Sequence[Problem], source: str, npy: bool
) -> int:
    """Concatenates the chunks into the files of OUT and deletes them; returns the number of images."""
    (out / BAD_SAMPLES).unlink(missing_ok=True)
    if bad:
        (out / BAD_SAMPLES).write_text("".join(json.dumps(asdict(problem)) + "\n" for problem in bad))
    merged = {name: out / CHUNKS / name for name in (EMBEDDINGS, TEXTS)}
    columns, metadata, has_images = embedder.columns, embedder.metadata, embedder.samples.has_images
    count = table.concatenate(chunks, merged[EMBEDDINGS], table.image_schema(columns, metadata)) if has_images else 0
    if embedder.texts:
        text_chunks = [path.with_suffix(_TEXTS_OF_CHUNK) for path in chunks]
        rows = table.concatenate(text_chunks, merged[TEXTS], table.text_schema(columns, metadata))
        count = count if has_images else rows
    if not count:
        shutil.rmtree(out / CHUNKS)
        what = "image" if has_images else "text"
        raise InputError(f"source: no {what} in {source} is usable; the first is {bad[0].key}: {bad[0].reason}.")
    if npy:
        table.write_npy(out, merged[EMBEDDINGS], merged[TEXTS] if embedder.texts else None, columns)
    for name in merged:
        (out / name).unlink(missing_ok=True)
    for path in merged.values():
        if path.exists():
            path.replace(out / path.name)
    shutil.rmtree(out / CHUNKS)
    return count if has_images else 0


def _print_summary(console: Console, out: Path, result: dict[str, Any], bad: Sequence[Problem], new: int) -> None:
    size = Path(result["embeddings"]).stat().st_size / 1e6
    counts = " and ".join(
        f"{result[key]:,} {name}" for key, name in (("count", "images"), ("texts", "texts")) if result[key]
    )
    columns = ", ".join(f"{column['dim']}-d {column['precision']}" for column in result["columns"])
    lines = [f"{result['embeddings']}: {counts}, {columns}, {size:,.1f} MB"]
    if new:
        lines.append(f"{new:,} samples in {result['seconds']:,.1f} s ({result['samples_per_second']:,.0f} samples/s)")
    if bad:
        lines.append(
            f"Skipped {len(bad):,} bad samples, listed in {out / BAD_SAMPLES}; "
            f"the first is {bad[0].key}: {bad[0].reason}"
        )
    print_line(console, "\n".join(lines))
