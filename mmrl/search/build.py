"""`mmrl index`: builds an index from embeddings, adds to it, deletes from it, compacts it.

Only deletions change an index in place. Everything else writes a new data folder next to the current one and then
replaces the manifest atomically. Searches in progress keep the old files; a crash leaves the old index.

Shapes: N rows of the index, n rows of one batch, M captions, D dim of its vectors.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from mmrl.codecs.code_index import faiss_module, training_rows
from mmrl.codecs.table import CODECS, CODES, OLD_CODES, Code
from mmrl.data.pack.tables import arrow
from mmrl.errors import InputError
from mmrl.nesting import Nesting, check_dims, untrained_note
from mmrl.output.console import print_line
from mmrl.output.files import atomic_path, write_atomic
from mmrl.search import items
from mmrl.search.calibrate import K, Queries, calibrate
from mmrl.search.embed import prepare_folder
from mmrl.search.embeddings import Batches, caption_vectors, open_embeddings
from mmrl.search.funnel import Funnel
from mmrl.search.index import (
    CAPTION_VECTORS,
    DELETED,
    INDEX_FORMAT,
    INDEX_VERSION,
    ITEMS,
    MANIFEST,
    VECTORS,
    Index,
    open_index,
)
from mmrl.version import __version__

EXACT_UP_TO = 50_000
"""`--code auto` compresses indexes of more images than this. Smaller ones are fast enough uncompressed."""
_QUERIES = 256
"""Per modality, that choose the shortlists, and as many that measure them."""
_MIN_COMPRESSED = 1000


@dataclass(frozen=True)
class _IndexSource:
    """The contents of a new index."""

    count: int
    schema: Any
    batches: Batches
    captions_MD: np.ndarray
    """Caption embeddings, to train and measure the codes with; empty if there are none."""


@dataclass(frozen=True)
class _Codes:
    """The codes of a compressed index."""

    code: Code
    dim: int
    candidates: int | None = None
    """Fixed length of the shortlist; None: chosen by `calibrate`, with a second stage after binary and pq."""


def write_index(
    embeddings: Path,
    out: Path,
    *,
    code: str = "auto",
    dim: int | None = None,
    candidates: int | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Builds the index OUT from the output of `mmrl embed`; returns its manifest.

    Args:
        code: code of the first stage, one of CODES; 'exact': no codes; 'auto': exact up to EXACT_UP_TO images, else pq.
        dim: dim of the codes (default: the trained dim closest to a quarter of the full dim).
        candidates: images that the codes pass on to the ranking by full vectors (default: as many as recall 0.99 needs,
            chosen by measurement).

    Raises:
        InputError: EMBEDDINGS is not the output of `mmrl embed`; OUT holds other files; invalid code, dim or
            candidates.
    """
    metadata, count, batches, schema = open_embeddings(embeddings)
    code = OLD_CODES.get(code, code)
    if code not in ("auto", "exact", *CODES):
        raise InputError(f"code: {code!r} is unknown; allowed: auto, exact, {', '.join(CODES)}.")
    if code == "auto":
        code = "exact" if count <= EXACT_UP_TO and dim is None and candidates is None else "pq"
    if code == "exact" and candidates is not None:
        raise InputError("candidates: an exact index has none; give a code with --code, or leave out --candidates.")
    if code == "exact" and dim is not None:
        raise InputError("dim: an exact index has no codes; give a code with --code, or leave out --dim.")
    codes = None if code == "exact" else _choose_codes(code, dim, candidates, metadata, count)
    prepare_folder(out, {MANIFEST, *_data_folders(out)})
    console = Console(quiet=quiet)
    captions_MD = np.zeros((0, metadata["dim"]), np.float32)
    if codes is not None:
        print_line(console, untrained_note([codes.dim], metadata["nested_dims"]))
        captions_MD = caption_vectors(embeddings, metadata, 2 * _QUERIES, console)
    manifest = {
        "format": INDEX_FORMAT,
        "version": INDEX_VERSION,
        "encoder": {"model": metadata["model"], "origin_sha256": metadata["origin_sha256"]},
        "dim": metadata["dim"],
        "nested_dims": metadata["nested_dims"],
    }
    return _write(out, manifest, _IndexSource(count, schema, batches, captions_MD), codes, console)


def add_to_index(embeddings: Path, folder: Path, quiet: bool = False) -> dict[str, Any]:
    """Adds the output of `mmrl embed` to an index; returns the manifest. Images with an existing key replace the old
    ones. Codes are trained and measured again.

    Raises:
        InputError: the embeddings are of another encoder, or have fewer dims than the index.
    """
    index = open_index(folder)
    metadata, count, batches, _ = open_embeddings(embeddings)
    origin = index.manifest["encoder"]["origin_sha256"]
    if metadata["origin_sha256"] != origin:
        raise InputError(
            f"embeddings: {embeddings} are of another encoder (weights {metadata['origin_sha256'][:12]}…) than "
            f"{folder} ({origin[:12]}…); embed these images with {index.manifest['encoder']['model']}."
        )
    if metadata["dim"] < index.dim:
        raise InputError(
            f"embeddings: {embeddings} has {metadata['dim']} dims and {folder} has {index.dim}; embed these images "
            f"with --dim {index.dim}."
        )
    keys = [key for _, batch in batches() for key in batch.column("key").to_pylist()]
    replaced = index.items.rows_of(keys)[0]
    captions_MD = np.load(index.data_folder / CAPTION_VECTORS, allow_pickle=False)
    if index.funnel is not None:
        new_MD = caption_vectors(embeddings, metadata, 2 * _QUERIES, Console(quiet=quiet))
        captions_MD = np.concatenate([captions_MD, new_MD[:, : index.dim]])

    def old_and_new() -> Iterator[tuple[np.ndarray, Any]]:
        yield from _remaining_batches(index, replaced)
        yield from batches(index.dim)

    removed = np.union1d(index.deleted, replaced)
    source = _IndexSource(len(index.vectors_ND) - len(removed) + count, index.items.schema, old_and_new, captions_MD)
    return _write(folder, index.manifest, source, _codes_of(index), Console(quiet=quiet))


def delete_from_index(folder: Path, keys: Sequence[str], quiet: bool = False) -> dict[str, Any]:
    """Deletes the images with these keys from an index; returns the manifest. Their vectors and thumbnails stay in its
    files until `compact_index` or `add_to_index`.

    Raises:
        InputError: a key does not exist, or no image would remain.
    """
    index = open_index(folder)
    rows, unknown = index.items.rows_of(keys)
    if unknown:
        others = f" (nor {len(unknown) - 1:,} more of the keys)" if len(unknown) > 1 else ""
        raise InputError(f"delete: {folder} has no image {unknown[0]!r}{others}; nothing was deleted.")
    deleted = np.union1d(index.deleted, rows)
    if len(deleted) == len(index.vectors_ND):
        raise InputError(f"delete: no image would remain in {folder}; delete the folder instead.")
    with atomic_path(index.data_folder / DELETED) as partial, partial.open("wb") as file:
        np.save(file, deleted)
    manifest = {**index.manifest, "count": len(index.vectors_ND) - len(deleted)}
    _write_manifest(folder, manifest)
    count = len(deleted) - len(index.deleted)
    print_line(Console(quiet=quiet), f"{folder}: deleted {count:,} images, {manifest['count']:,} remain")
    return manifest


def compact_index(folder: Path, quiet: bool = False) -> dict[str, Any]:
    """Rewrites an index without its deleted images; returns the manifest."""
    index = open_index(folder)
    captions_MD = np.load(index.data_folder / CAPTION_VECTORS, allow_pickle=False)
    none = np.zeros(0, np.int64)
    source = _IndexSource(len(index), index.items.schema, lambda: _remaining_batches(index, none), captions_MD)
    return _write(folder, index.manifest, source, _codes_of(index), Console(quiet=quiet))


def _codes_of(index: Index) -> _Codes | None:
    if index.funnel is None:
        return None
    return _Codes(index.funnel.code, index.funnel.dim, index.manifest["codes"].get("candidates"))


def _remaining_batches(index: Index, replaced: np.ndarray) -> Iterator[tuple[np.ndarray, Any]]:
    """The rows of an index that are neither deleted nor replaced."""
    pyarrow, _ = arrow("mmrl index")
    mask_N = np.ones(len(index.vectors_ND), bool)
    mask_N[index.deleted] = mask_N[replaced] = False
    for start, batch in index.items.batches():
        mask_n = mask_N[start : start + len(batch)]
        yield index.vectors_ND[start : start + len(batch)][mask_n], batch.filter(pyarrow.array(mask_n))


def _choose_codes(code: str, dim: int | None, candidates: int | None, metadata: dict[str, Any], count: int) -> _Codes:
    """Checks, before the long work, the code and dim of the first stage, and chooses the dim if it is None."""
    full: int = metadata["dim"]
    if dim is None:
        trained = [d for d in Nesting.from_dims(metadata["nested_dims"] or [full], None, full).dims if d % 8 == 0]
        dim = min(trained or [full], key=lambda d: (abs(d - full // 4), d))
    check_dims([dim], full, "dim")
    faiss_module("a compressed index")
    unit = CODECS[code].dim_multiple
    if dim % unit:
        raise InputError(f"dim: code {code} needs a multiple of {unit}, and {dim} is not one; give another dim.")
    if count < _MIN_COMPRESSED:
        raise InputError(
            f"code: a compressed index needs at least {_MIN_COMPRESSED:,} images, and there are {count:,}; leave out "
            "--code for an exact index."
        )
    if candidates is not None and not K <= candidates <= count:
        raise InputError(
            f"candidates: {candidates:,} is out of range; allowed: {K} to {count:,}, the number of images."
        )
    return _Codes(next(one for one in CODES if one == code), dim, candidates)


def _write(
    out: Path, manifest: dict[str, Any], source: _IndexSource, codes: _Codes | None, console: Console
) -> dict[str, Any]:
    """Writes a new data folder, switches the manifest to it and removes the old one; returns the manifest."""
    numbers = [int(name.removeprefix("data-")) for name in _data_folders(out)]
    data = out / f"data-{max(numbers, default=0) + 1}"
    data.mkdir()
    try:
        vectors_ND = _write_rows(data, source, manifest["dim"])
        np.save(data / CAPTION_VECTORS, source.captions_MD)
        sections = {} if codes is None else _write_codes(data, vectors_ND, source.captions_MD, codes)
        manifest = {
            **manifest,
            "count": source.count,
            "rows": source.count,
            "data": data.name,
            "codes": sections.get("codes"),
            "search": sections.get("search", {"shortlists": None, f"recall@{K}": "exact"}),
            "mmrl_version": __version__,
        }
        _write_manifest(out, manifest)
    except BaseException:
        shutil.rmtree(data, ignore_errors=True)
        raise
    for name in _data_folders(out):
        if name != data.name:
            shutil.rmtree(out / name, ignore_errors=True)
    size = sum(path.stat().st_size for path in data.iterdir()) / 1e6
    print_line(console, f"{out}: index of {source.count:,} images, {manifest['dim']}-d, {size:,.1f} MB")
    if sections:
        print_line(console, _codes_summary(manifest))
    return manifest


def _codes_summary(manifest: dict[str, Any]) -> str:
    codes, recall = manifest["codes"], manifest["search"][f"recall@{K}"]
    by_modality = ", ".join(f"{share:.1%} for {modality} queries" for modality, share in recall.items())
    memory = codes["resident_bytes"]
    ratio = 4 * manifest["dim"] * manifest["rows"] / memory
    return (
        f"{codes['dim']}-d {codes['code']} codes: {memory / 1e6:,.1f} MB in memory, {ratio:.1f}x less than the "
        f"vectors; recall@{K} {by_modality}"
    )


def _write_rows(data: Path, source: _IndexSource, dim: int) -> np.ndarray:
    """Writes vectors.npy and items.arrow; returns the vectors, memory-mapped: (N, D)."""
    shape = (source.count, dim)
    vectors_ND = np.lib.format.open_memmap(data / VECTORS, mode="w+", dtype=np.float32, shape=shape)
    start = 0
    with items.item_writer(data / ITEMS, source.schema) as writer:
        for rows_nD, batch in source.batches():
            if len(batch):
                vectors_ND[start : start + len(batch)] = rows_nD
                writer.write_batch(batch)
                start += len(batch)
    assert start == source.count
    vectors_ND.flush()
    return vectors_ND


def _write_codes(data: Path, vectors_ND: np.ndarray, captions_MD: np.ndarray, codes: _Codes) -> dict[str, Any]:
    """Writes the codes and measures their recall; returns the manifest's sections `codes` and `search`."""
    rows = training_rows(len(vectors_ND))
    sample = np.concatenate([vectors_ND[rows], captions_MD])
    funnel = Funnel.build(data, vectors_ND, codes.code, codes.dim, sample, codes.candidates)
    rng = np.random.default_rng(1)
    image_rows = np.sort(rng.permutation(len(vectors_ND))[: 2 * _QUERIES])
    caption_rows = rng.permutation(len(captions_MD))[: 2 * _QUERIES]
    queries = Queries(
        np.concatenate([vectors_ND[image_rows], captions_MD[caption_rows]]),
        np.concatenate([image_rows, np.full(len(caption_rows), -1)]),
    )
    measured = calibrate(funnel, vectors_ND, queries, codes.candidates)
    section = {
        "code": codes.code,
        "dim": codes.dim,
        "threshold": None,
        "candidates": codes.candidates,
        "second_stage": funnel.prefix_Nd is not None,
        "resident_bytes": funnel.resident_bytes,
        "fitted_to": {"image": len(rows), "text": len(captions_MD)},
    }
    return {"codes": section, "search": measured}


def _data_folders(out: Path) -> list[str]:
    if not out.is_dir():
        return []
    return [path.name for path in out.iterdir() if path.name.startswith("data-") and path.name[5:].isdigit()]


def _write_manifest(out: Path, manifest: dict[str, Any]) -> None:
    write_atomic(out / MANIFEST, json.dumps(manifest, indent=2) + "\n")
