"""`mmrl index`: embeddings -> an index; and what is added to it and taken out of it later.

An index never changes in place, deletions apart: a new data folder is written beside the one in use, and the manifest's
rename puts it in force. A search that is under way keeps the old files, and a crash leaves the old index.

Shapes: N rows of the index, n of one chunk, D the width of its vectors, d the prefix of its codes.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from mmrl.data.pack.tables import arrow
from mmrl.errors import InputError
from mmrl.inference.load import load
from mmrl.nesting import check_dims, cut, nesting
from mmrl.search import items
from mmrl.search.calibrate import K, Queries, calibrate
from mmrl.search.embed import EMBEDDINGS, LONGEST_TEXT, TEXTS, identify, prepare_folder
from mmrl.search.embed import FORMAT as EMBEDDINGS_FORMAT
from mmrl.search.embed import VERSION as EMBEDDINGS_VERSION
from mmrl.search.funnel import CODES, Code, Funnel, faiss_module
from mmrl.search.index import DELETED, FORMAT, ITEMS, MANIFEST, VECTORS, VERSION, Index, open_index
from mmrl.search.index import TEXTS as SAMPLE_OF_TEXTS
from mmrl.search.table import METADATA_KEY, vectors_in
from mmrl.version import __version__

EXACT_UP_TO = 50_000
"""Pictures that are searched outright: faster than they are compressed, and nothing is lost."""
_ROWS_AT_A_TIME = 2048
# Vectors of each modality that codes are fitted to, and that recall is measured with.
_FITTED_TO, _MEASURED_WITH = 20_000, 256
_LEAST_FOR_CODES = 1000
_MANIFEST_BESIDE = f".{MANIFEST}.partial"

Chunks = Callable[..., Iterator[tuple[np.ndarray, Any]]]
"""The rows of an index to be: unit vectors (n, D) and a record batch of items.COLUMNS."""


@dataclass(frozen=True)
class _Source:
    """What an index is made of."""

    count: int
    schema: Any
    chunks: Chunks
    texts_MD: np.ndarray
    """Some captions' vectors; none where they could not be had."""


def write_index(
    embeddings: Path, out: Path, *, code: str = "auto", dim: int | None = None, quiet: bool = False
) -> dict[str, Any]:
    """Makes OUT an index of what `mmrl embed` wrote; returns its manifest.

    Args:
        code: one of CODES for the first stage, 'exact' for none, 'auto' for none below EXACT_UP_TO pictures, then pq.
        dim: the prefix that the codes are of; about a quarter of the vectors when left out.

    Raises:
        InputError: EMBEDDINGS is not such a file or folder, OUT holds something else, a code or dim that is not to be
            had.
    """
    facts, count, chunks, schema = _open_embeddings(embeddings)
    if code not in ("auto", "exact", *CODES):
        raise InputError(f"code: {code!r} is unknown; allowed: auto, exact, {', '.join(CODES)}.")
    if code == "auto":
        code = "exact" if count <= EXACT_UP_TO and dim is None else "pq"
    chosen = None if code == "exact" else _choose_codes(code, dim, facts, count)
    prepare_folder(out, {MANIFEST, _MANIFEST_BESIDE, *_data_folders(out)})
    texts_MD = np.zeros((0, facts["dim"]), np.float32)
    if chosen is not None:
        texts_MD = _texts_of(embeddings, facts, Console(quiet=quiet))
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "encoder": {"model": facts["model"], "origin_sha256": facts["origin_sha256"]},
        "dim": facts["dim"],
        "nested_dims": facts["nested_dims"],
    }
    return _write(out, manifest, _Source(count, schema, chunks, texts_MD), chosen, Console(quiet=quiet))


def add(embeddings: Path, folder: Path, quiet: bool = False) -> dict[str, Any]:
    """Adds what `mmrl embed` wrote to an index; a picture whose key is there replaces that one. Codes are fitted and
    measured anew. Returns the manifest.

    Raises:
        InputError: they are of another encoder or of shorter vectors than the index's.
    """
    index = open_index(folder)
    facts, count, chunks, _ = _open_embeddings(embeddings)
    kept = index.manifest["encoder"]["origin_sha256"]
    if facts["origin_sha256"] != kept:
        raise InputError(
            f"embeddings: {embeddings} are of another encoder (weights {facts['origin_sha256'][:12]}…) than {folder} "
            f"({kept[:12]}…); embed these pictures with {index.manifest['encoder']['model']}."
        )
    if facts["dim"] < index.dim:
        raise InputError(
            f"embeddings: {embeddings} has {facts['dim']} numbers a vector and {folder} {index.dim}; embed these "
            f"pictures with --dim {index.dim}."
        )
    keys = [key for _, batch in chunks() for key in batch.column("key").to_pylist()]
    replaced = index.items.rows_of(keys)[0]
    texts_MD = np.load(index.data / SAMPLE_OF_TEXTS, allow_pickle=False)
    if index.funnel is not None:
        texts_MD = np.concatenate([texts_MD, _texts_of(embeddings, facts, Console(quiet=quiet))[:, : index.dim]])

    def both() -> Iterator[tuple[np.ndarray, Any]]:
        yield from _live_chunks(index, replaced)
        yield from chunks(index.dim)

    gone = np.union1d(index.deleted, replaced)
    source = _Source(len(index.vectors_ND) - len(gone) + count, index.items.schema, both, texts_MD)
    return _write(folder, index.manifest, source, _codes_of(index), Console(quiet=quiet))


def delete(folder: Path, keys: Sequence[str], quiet: bool = False) -> dict[str, Any]:
    """Takes the pictures with these keys out of an index, at once; their vectors and thumbnails stay in its files until
    it is compacted or added to. Returns the manifest.

    Raises:
        InputError: a key that no picture has, or none would be left.
    """
    index = open_index(folder)
    rows, unknown = index.items.rows_of(keys)
    if unknown:
        raise InputError(
            f"delete: {folder} has no picture {unknown[0]!r}{_and_others(unknown)}; nothing was taken out."
        )
    deleted = np.union1d(index.deleted, rows)
    if len(deleted) == len(index.vectors_ND):
        raise InputError(f"delete: no picture would be left in {folder}; remove the folder instead.")
    beside = index.data / f".{DELETED}"
    with beside.open("wb") as file:
        np.save(file, deleted)
    beside.replace(index.data / DELETED)
    manifest = {**index.manifest, "count": len(index.vectors_ND) - len(deleted)}
    _put_in_force(folder, manifest)
    gone = len(deleted) - len(index.deleted)
    _say(Console(quiet=quiet), f"{folder}: {gone:,} pictures taken out, {manifest['count']:,} are left")
    return manifest


def compact(folder: Path, quiet: bool = False) -> dict[str, Any]:
    """Rewrites an index without what was deleted. Returns the manifest."""
    index = open_index(folder)
    texts_MD = np.load(index.data / SAMPLE_OF_TEXTS, allow_pickle=False)
    none = np.zeros(0, np.int64)
    source = _Source(len(index), index.items.schema, lambda: _live_chunks(index, none), texts_MD)
    return _write(folder, index.manifest, source, _codes_of(index), Console(quiet=quiet))


def _codes_of(index: Index) -> tuple[Code, int] | None:
    return None if index.funnel is None else (index.funnel.code, index.funnel.dim)


def _open_embeddings(embeddings: Path) -> tuple[dict[str, Any], int, Chunks, Any]:
    """The metadata that `mmrl embed` wrote, the number of rows, the rows, and the schema of the items.

    Raises:
        InputError: it did not write this, or wrote no vectors that an index can be made of.
    """
    pyarrow, parquet = arrow("mmrl index")
    path = embeddings / EMBEDDINGS if embeddings.is_dir() else embeddings
    if not path.is_file():
        raise InputError(f"embeddings: {path} does not exist; give the folder that mmrl embed wrote.")
    try:
        with parquet.ParquetFile(path) as file:
            schema, count = file.schema_arrow, file.metadata.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(
            f"embeddings: {path} is not a readable Parquet file ({error}); run mmrl embed again."
        ) from None
    missing = {"embedding", *items.COLUMNS} - set(schema.names)
    metadata = json.loads((schema.metadata or {}).get(METADATA_KEY, b"{}"))
    if missing or metadata.get("format") != EMBEDDINGS_FORMAT or metadata.get("version") != EMBEDDINGS_VERSION:
        lacks = f"it lacks column {sorted(missing)[0]!r}" if missing else "it lacks mmrl's metadata of that version"
        raise InputError(
            f"embeddings: {path} was not written by this version's mmrl embed ({EMBEDDINGS_FORMAT} version "
            f"{EMBEDDINGS_VERSION}): {lacks}."
        )
    if not count:
        raise InputError(f"embeddings: {path} has no rows.")
    if metadata["columns"][0]["precision"] not in ("fp32", "fp16"):
        raise InputError(
            f"embeddings: {path} has no vectors at fp32 or fp16, which an index ranks by; run mmrl embed again with "
            "--precision fp32 or fp16 among them."
        )

    def chunks(dim: int = metadata["dim"]) -> Iterator[tuple[np.ndarray, Any]]:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_ROWS_AT_A_TIME, columns=["embedding", *items.COLUMNS]):
                # Of length 1, also where they come at fp16 or longer.
                rows_nD = torch.from_numpy(vectors_in(batch, "embedding").astype(np.float32))
                yield cut(rows_nD, dim).numpy(), batch.select(items.COLUMNS)

    return metadata, count, chunks, pyarrow.schema([schema.field(name) for name in items.COLUMNS])


def _live_chunks(index: Index, replaced: np.ndarray) -> Iterator[tuple[np.ndarray, Any]]:
    """The rows of an index that are neither deleted nor replaced."""
    pyarrow, _ = arrow("mmrl index")
    kept_N = np.ones(len(index.vectors_ND), bool)
    kept_N[index.deleted] = kept_N[replaced] = False
    for start, batch in index.items.batches():
        kept = kept_N[start : start + len(batch)]
        yield index.vectors_ND[start : start + len(batch)][kept], batch.filter(pyarrow.array(kept))


def _choose_codes(code: str, dim: int | None, facts: dict[str, Any], count: int) -> tuple[Code, int]:
    """The first stage's code and prefix, checked before long work."""
    full: int = facts["dim"]
    if dim is None:
        usual = [d for d in nesting(facts["nested_dims"] or [full], None, full).dims if d % 8 == 0]
        dim = min(usual or [full], key=lambda d: (abs(d - full // 4), d))
    check_dims([dim], full, "dim")
    faiss_module("a compressed index")
    unit = {"pq": 2, "binary": 8}.get(code, 1)
    if dim % unit:
        raise InputError(f"dim: code {code} packs {unit} numbers and {dim} is no multiple of that; give another.")
    if count < _LEAST_FOR_CODES:
        raise InputError(
            f"code: {count:,} pictures are too few to be compressed, at least {_LEAST_FOR_CODES:,} are needed; "
            "leave --code out, and the search is exact."
        )
    return next(one for one in CODES if one == code), dim


def _texts_of(embeddings: Path, facts: dict[str, Any], console: Console) -> np.ndarray:
    """Vectors of captions: those of texts.parquet, or some encoded now: (M, D), M at most _FITTED_TO."""
    _, parquet = arrow("mmrl index")
    path = (embeddings if embeddings.is_dir() else embeddings.parent) / TEXTS
    rng = np.random.default_rng(0)
    if path.is_file():
        with parquet.ParquetFile(path) as file:
            chosen = np.sort(rng.permutation(file.metadata.num_rows)[:_FITTED_TO])
            found, start = [], 0
            for batch in file.iter_batches(batch_size=_ROWS_AT_A_TIME, columns=["embedding"]):
                inside = chosen[(chosen >= start) & (chosen < start + len(batch))] - start
                found.append(vectors_in(batch, "embedding")[inside].astype(np.float32))
                start += len(batch)
        return np.concatenate(found)
    table = parquet.read_table(embeddings / EMBEDDINGS if embeddings.is_dir() else embeddings, columns=["captions"])
    rows = rng.permutation(len(table))
    some = table.take(rows[: 8 * _MEASURED_WITH])["captions"].to_pylist()
    captions = [captions[0][:LONGEST_TEXT] for captions in some if captions][: 2 * _MEASURED_WITH]
    try:
        name, where, digest = identify(facts["model"])
        if captions and digest == facts["origin_sha256"]:
            return load(where, dim=facts["dim"], towers="text").encode_texts(captions)
        reason = "no picture has a caption" if not captions else f"{name} is another encoder now"
    except InputError as error:
        reason = str(error)
    _say(console, f"Codes are fitted to and measured with pictures alone: {reason}")
    return np.zeros((0, facts["dim"]), np.float32)


def _write(
    out: Path, manifest: dict[str, Any], source: _Source, codes: tuple[Code, int] | None, console: Console
) -> dict[str, Any]:
    """Writes a new data folder of OUT and puts it in force."""
    numbers = [int(name.removeprefix("data-")) for name in _data_folders(out)]
    data = out / f"data-{max(numbers, default=0) + 1}"
    data.mkdir()
    try:
        vectors_ND = _write_rows(data, source, manifest["dim"])
        np.save(data / SAMPLE_OF_TEXTS, source.texts_MD)
        facts = {} if codes is None else _write_codes(data, vectors_ND, source.texts_MD, codes)
        manifest = {
            **manifest,
            "count": source.count,
            "rows": source.count,
            "data": data.name,
            "codes": facts.get("codes"),
            "search": facts.get("search", {"shortlists": None, f"recall@{K}": "exact"}),
            "mmrl_version": __version__,
        }
        _put_in_force(out, manifest)
    except BaseException:
        shutil.rmtree(data, ignore_errors=True)
        raise
    for name in _data_folders(out):
        if name != data.name:
            shutil.rmtree(out / name, ignore_errors=True)
    size = sum(path.stat().st_size for path in data.iterdir()) / 1e6
    _say(console, f"{out}: index of {source.count:,} pictures, {manifest['dim']}-d, {size:,.1f} MB")
    if facts:
        _say(console, _codes_line(manifest))
    return manifest


def _codes_line(manifest: dict[str, Any]) -> str:
    codes, recall = manifest["codes"], manifest["search"][f"recall@{K}"]
    found = " and ".join(f"{share:.1%} by {modality}" for modality, share in recall.items())
    memory = codes["resident_bytes"]
    less = 4 * manifest["dim"] * manifest["rows"] / memory
    return (
        f"{codes['code']} codes of {codes['dim']} numbers: {memory / 1e6:,.1f} MB in memory, {less:.1f} times less "
        f"than the vectors; of the {K} nearest {found} are found"
    )


def _write_rows(data: Path, source: _Source, dim: int) -> np.ndarray:
    """vectors.npy and items.arrow; returns the first, mapped: (N, D)."""
    shape = (source.count, dim)
    vectors_ND = np.lib.format.open_memmap(data / VECTORS, mode="w+", dtype=np.float32, shape=shape)
    filled = 0
    with items.writing(data / ITEMS, source.schema) as writer:
        for rows_nD, batch in source.chunks():
            if len(batch):
                vectors_ND[filled : filled + len(batch)] = rows_nD
                writer.write_batch(batch)
                filled += len(batch)
    assert filled == source.count
    vectors_ND.flush()
    return vectors_ND


def _write_codes(data: Path, vectors_ND: np.ndarray, texts_MD: np.ndarray, codes: tuple[Code, int]) -> dict[str, Any]:
    """The funnel's files; returns its parts of the manifest."""
    code, dim = codes
    rng = np.random.default_rng(0)
    rows = np.sort(rng.permutation(len(vectors_ND))[:_FITTED_TO])
    funnel = Funnel.build(data, vectors_ND, code, dim, np.concatenate([vectors_ND[rows], texts_MD]))
    own = np.sort(rng.permutation(len(vectors_ND))[: 2 * _MEASURED_WITH])
    texts = rng.permutation(len(texts_MD))[: 2 * _MEASURED_WITH]
    queries = Queries(
        np.concatenate([vectors_ND[own], texts_MD[texts]]), np.concatenate([own, np.full(len(texts), -1)])
    )
    _, measured = calibrate(funnel, vectors_ND, queries)
    facts = {
        "code": code,
        "dim": dim,
        "threshold": None if funnel.threshold_d is None else funnel.threshold_d.tolist(),
        "resident_bytes": funnel.resident_bytes,
        "fitted_to": {"image": len(rows), "text": len(texts_MD)},
    }
    return {"codes": facts, "search": measured}


def _data_folders(out: Path) -> list[str]:
    if not out.is_dir():
        return []
    return [path.name for path in out.iterdir() if path.name.startswith("data-") and path.name[5:].isdigit()]


def _put_in_force(out: Path, manifest: dict[str, Any]) -> None:
    beside = out / _MANIFEST_BESIDE
    beside.write_text(json.dumps(manifest, indent=2) + "\n")
    beside.replace(out / MANIFEST)


def _and_others(names: Sequence[str]) -> str:
    return f" (nor {len(names) - 1:,} others)" if len(names) > 1 else ""


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)
