"""`mmrl index`: builds an index from embeddings, adds to it, deletes from it, compacts it.

Images and texts have an index each: the images' in INDEX, the texts' in INDEX/texts, or in INDEX if there are no
images. Only deletions change an index in place. Everything else writes a new data folder next to the current one and
then replaces the manifest atomically. Searches in progress keep the old files; a crash leaves the old index.

Shapes: N rows of the index, n rows of one batch, M captions, D dim of its vectors.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from mmrl.codecs.code_index import faiss_module
from mmrl.codecs.table import CODECS, CODES, OLD_CODES
from mmrl.data.arrow import arrow
from mmrl.errors import InputError
from mmrl.nesting import Nesting, check_dims, untrained_note
from mmrl.output.console import print_line
from mmrl.output.files import atomic_path, check_out_folder, create_folder, describe_difference, write_atomic
from mmrl.search.calibrate import QUERIES, Codes, K, write_codes
from mmrl.search.embeddings import Batches, caption_vectors, embedding_files, open_embeddings
from mmrl.search.index import (
    CAPTION_VECTORS,
    DELETED,
    INDEX_FORMAT,
    INDEX_VERSION,
    ITEMS,
    MANIFEST,
    TEXT_INDEX,
    VECTORS,
    Index,
    Kind,
    is_index,
    open_index,
)
from mmrl.version import __version__

EXACT_UP_TO = 50_000
"""`--code auto` compresses indexes of more images than this. Smaller ones are fast enough uncompressed."""
_MIN_COMPRESSED = 1000


@dataclass(frozen=True)
class _IndexSource:
    """The contents of a new index."""

    count: int
    schema: Any
    batches: Batches
    captions_MD: np.ndarray
    """Caption embeddings, to train and measure the codes with; empty if there are none."""


def write_index(
    embeddings: Path,
    out: Path,
    *,
    code: str = "auto",
    dim: int | None = None,
    candidates: int | None = None,
    force: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Builds the index OUT from the output of `mmrl embed`; returns its manifest. Texts beside images get an index of
    their own, OUT/texts.

    Args:
        code: code of the first stage, one of CODES; 'exact': no codes; 'auto': exact up to EXACT_UP_TO images, else pq.
            Texts beside images that are too few for codes are indexed exactly.
        dim: dim of the codes (default: the trained dim closest to a quarter of the full dim).
        candidates: images that the codes pass on to the ranking by full vectors (default: as many as recall 0.99 needs,
            chosen by measurement).
        force: replace an index with other settings in OUT.

    Raises:
        InputError: EMBEDDINGS is not the output of `mmrl embed`; OUT holds other files or an index with other settings;
            invalid code, dim or candidates.
    """
    files = embedding_files(embeddings)
    main, opened = next(iter(files)), {kind: open_embeddings(path, kind) for kind, path in files.items()}
    code = OLD_CODES.get(code, code)
    if code not in ("auto", "exact", *CODES):
        raise InputError(f"code: {code!r} is unknown; allowed: auto, exact, {', '.join(CODES)}.")
    if code == "exact" and candidates is not None:
        raise InputError("candidates: an exact index has none; give a code with --code, or leave out --candidates.")
    if code == "exact" and dim is not None:
        raise InputError("dim: an exact index has no codes; give a code with --code, or leave out --dim.")
    codes_of = {
        kind: _choose_codes(code, dim, candidates, metadata, count, may_be_few=kind != main)
        for kind, (metadata, count, _, _) in opened.items()
    }
    difference = _difference(out, {"items": main, "texts": len(files) == 2}, opened[main][0], codes_of[main])
    check_out_folder(out, {MANIFEST, TEXT_INDEX, *_data_folders(out)}, difference, force=force)
    console, manifest = Console(quiet=quiet), {}
    for kind, (metadata, count, batches, schema) in reversed(opened.items()):  # the images last: theirs is the main one
        folder, codes = out if kind == main else out / TEXT_INDEX, codes_of[kind]
        create_folder(folder)
        captions_MD = np.zeros((0, metadata["dim"]), np.float32)
        if codes is not None:
            print_line(console, untrained_note([codes.dim], metadata["nested_dims"]))
        if codes is not None and kind == "images":
            captions_MD = caption_vectors(embeddings, metadata, 2 * QUERIES, console)
        manifest = {
            "format": INDEX_FORMAT,
            "version": INDEX_VERSION,
            "items": kind,
            "encoder": {"model": metadata["model"], "origin_sha256": metadata["origin_sha256"]},
            "dim": metadata["dim"],
            "nested_dims": metadata["nested_dims"],
        }
        manifest = _write(folder, manifest, _IndexSource(count, schema, batches, captions_MD), codes, console)
    if len(opened) == 1:
        shutil.rmtree(out / TEXT_INDEX, ignore_errors=True)
    return manifest


def _difference(out: Path, parts: dict[str, Any], metadata: dict[str, Any], codes: Codes | None) -> str | None:
    """How the index in OUT differs from one of these embeddings with these codes; None if it does not. `parts` are its
    kind of items, and whether it has texts beside them."""
    if not is_index(out):
        return None
    index = open_index(out)
    manifest, stored_codes = index.manifest, index.manifest["codes"] or {}
    stored = {
        "items": index.kind,
        "texts": (out / TEXT_INDEX).is_dir(),
        "encoder": manifest["encoder"]["origin_sha256"],
        "dim": manifest["dim"],
    }
    stored |= {"code": stored_codes.get("code", "exact"), "dim of codes": stored_codes.get("dim")}
    now = {**parts, "encoder": metadata["origin_sha256"], "dim": metadata["dim"]}
    now |= {"code": codes.code if codes else "exact", "dim of codes": codes.dim if codes else None}
    return describe_difference("an index", stored, now)


def add_to_index(embeddings: Path, folder: Path, quiet: bool = False) -> dict[str, Any]:
    """Adds the output of `mmrl embed` to an index; returns the manifest. Images and texts with an existing key replace
    the old ones. Codes are trained and measured again.

    Raises:
        InputError: the embeddings are of another encoder, have fewer dims than the index, or lack the images or the
            texts that it has.
    """
    indexes, files = _indexes(folder), embedding_files(embeddings)
    if lacking := [kind for kind in indexes if kind not in files]:
        remedy = "run mmrl embed again with --texts" if lacking == ["texts"] else "embed images"
        raise InputError(f"embeddings: {embeddings} holds no {lacking[0]}, and {folder} does; {remedy}.")
    console = Console(quiet=quiet)
    if extra := [kind for kind in files if kind not in indexes]:
        print_line(console, f"The {extra[0]} are not added: {folder} holds none.")
    opened = {kind: open_embeddings(files[kind], kind) for kind in indexes}
    for kind, index in indexes.items():
        _check_same_encoder(embeddings, opened[kind][0], index)
    keys = {
        key for _, _, batches, _ in opened.values() for _, batch in batches() for key in batch.column("key").to_pylist()
    }
    manifest = {}
    for kind, index in reversed(indexes.items()):
        metadata, count, batches, _ = opened[kind]
        replaced = index.items.rows_of(sorted(keys))[0]
        captions_MD = np.load(index.data_folder / CAPTION_VECTORS, allow_pickle=False)
        if index.funnel is not None and kind == "images":
            new_MD = caption_vectors(embeddings, metadata, 2 * QUERIES, console)
            captions_MD = np.concatenate([captions_MD, new_MD[:, : index.dim]])
        source = _IndexSource(
            len(index.vectors_ND) - len(np.union1d(index.deleted, replaced)) + count,
            index.items.table.schema,
            partial(_old_and_new, index, replaced, batches),
            captions_MD,
        )
        manifest = _write(index.folder, index.manifest, source, _codes_of(index, source.count), console)
    return manifest


def _old_and_new(index: Index, replaced: np.ndarray, batches: Batches) -> Iterator[tuple[np.ndarray, Any]]:
    yield from _remaining_batches(index, replaced)
    yield from batches(index.dim)


def _indexes(folder: Path) -> dict[Kind, Index]:
    """The main index of a folder, and that of its texts if it has one beside."""
    main = open_index(folder)
    beside: dict[Kind, Index] = {}
    if (folder / TEXT_INDEX / MANIFEST).is_file():
        beside["texts"] = open_index(folder / TEXT_INDEX)
    return {main.kind: main, **beside}


def _check_same_encoder(embeddings: Path, metadata: dict[str, Any], index: Index) -> None:
    """Raises InputError unless the embeddings are of the index's encoder and have its dims."""
    folder, what = index.folder, index.kind
    origin = index.manifest["encoder"]["origin_sha256"]
    if metadata["origin_sha256"] != origin:
        raise InputError(
            f"embeddings: {embeddings} are of another encoder (weights {metadata['origin_sha256'][:12]}…) than "
            f"{folder} ({origin[:12]}…); embed these {what} with {index.manifest['encoder']['model']}."
        )
    if metadata["dim"] < index.dim:
        raise InputError(
            f"embeddings: {embeddings} has {metadata['dim']} dims and {folder} has {index.dim}; embed these {what} "
            f"with --dim {index.dim}."
        )


def delete_from_index(folder: Path, keys: Sequence[str], quiet: bool = False) -> dict[str, Any]:
    """Deletes the images with these keys, and their texts, from an index; returns the manifest. Their vectors and
    thumbnails stay in its files until `compact_index` or `add_to_index`.

    Raises:
        InputError: a key does not exist, or no image would remain.
    """
    index, *beside = _indexes(folder).values()
    rows, unknown = index.items.rows_of(keys)
    noun = index.kind.removesuffix("s")
    if unknown:
        others = f" (nor {len(unknown) - 1:,} more of the keys)" if len(unknown) > 1 else ""
        raise InputError(f"delete: {folder} has no {noun} {unknown[0]!r}{others}; nothing was deleted.")
    if len(np.union1d(index.deleted, rows)) == len(index.vectors_ND):
        raise InputError(f"delete: no {noun} would remain in {folder}; delete the folder instead.")
    for texts in beside:
        rows_of_texts = texts.items.rows_of(keys)[0]
        if len(np.union1d(texts.deleted, rows_of_texts)) == len(texts.vectors_ND):
            shutil.rmtree(texts.folder)
        elif len(rows_of_texts):
            _delete_rows(texts, rows_of_texts, quiet)
    return _delete_rows(index, rows, quiet)


def _delete_rows(index: Index, rows: np.ndarray, quiet: bool) -> dict[str, Any]:
    """Lists rows of one index as deleted; returns its manifest."""
    folder, deleted = index.folder, np.union1d(index.deleted, rows)
    with atomic_path(index.data_folder / DELETED) as partial, partial.open("wb") as file:
        np.save(file, deleted)
    manifest = {**index.manifest, "count": len(index.vectors_ND) - len(deleted)}
    _write_manifest(folder, manifest)
    count = len(deleted) - len(index.deleted)
    print_line(Console(quiet=quiet), f"{folder}: deleted {count:,} {index.kind}, {manifest['count']:,} remain")
    return manifest


def compact_index(folder: Path, quiet: bool = False) -> dict[str, Any]:
    """Rewrites an index without its deleted images; returns the manifest."""
    manifest = {}
    for index in reversed(_indexes(folder).values()):
        captions_MD = np.load(index.data_folder / CAPTION_VECTORS, allow_pickle=False)
        batches = partial(_remaining_batches, index, np.zeros(0, np.int64))
        source = _IndexSource(len(index), index.items.table.schema, batches, captions_MD)
        codes = _codes_of(index, source.count)
        manifest = _write(index.folder, index.manifest, source, codes, Console(quiet=quiet))
    return manifest


def _codes_of(index: Index, count: int) -> Codes | None:
    """The codes of an index when it is written anew with `count` rows; None: it is exact, or too few rows are left."""
    candidates = index.manifest["codes"].get("candidates") if index.funnel else None
    if index.funnel is None or count < max(_MIN_COMPRESSED, candidates or 0):
        return None
    return Codes(index.funnel.code, index.funnel.dim, candidates)


def _remaining_batches(index: Index, replaced: np.ndarray) -> Iterator[tuple[np.ndarray, Any]]:
    """The rows of an index that are neither deleted nor replaced."""
    pyarrow, _ = arrow("mmrl index")
    mask_N, start = np.ones(len(index.vectors_ND), bool), 0
    mask_N[index.deleted] = mask_N[replaced] = False
    for batch in index.items.table.to_batches():
        rows = slice(start, start + len(batch))
        yield index.vectors_ND[rows][mask_N[rows]], batch.filter(pyarrow.array(mask_N[rows]))
        start += len(batch)


def _choose_codes(
    code: str, dim: int | None, candidates: int | None, metadata: dict[str, Any], count: int, may_be_few: bool
) -> Codes | None:
    """Checks, before the long work, the code and dim of the first stage, and chooses what is not given; None: exact.
    With `may_be_few`, too few rows for codes are indexed exactly; else they are an error."""
    if code == "auto":
        code = "exact" if count <= EXACT_UP_TO and dim is None and candidates is None else "pq"
    if code == "exact" or (may_be_few and count < max(_MIN_COMPRESSED, candidates or 0)):
        return None
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
    return Codes(next(one for one in CODES if one == code), dim, candidates)


def _write(
    out: Path, manifest: dict[str, Any], source: _IndexSource, codes: Codes | None, console: Console
) -> dict[str, Any]:
    """Writes a new data folder, switches the manifest to it and removes the old one; returns the manifest."""
    numbers = [int(name.removeprefix("data-")) for name in _data_folders(out)]
    data = out / f"data-{max(numbers, default=0) + 1}"
    data.mkdir()
    try:
        vectors_ND = _write_rows(data, source, manifest["dim"])
        np.save(data / CAPTION_VECTORS, source.captions_MD)
        sections = {} if codes is None else write_codes(data, vectors_ND, source.captions_MD, codes)
        if sections and manifest.get("items") == "texts":  # their own vectors were the queries
            for name, values in (("search", f"recall@{K}"), ("search", "queries"), ("codes", "fitted_to")):
                sections[name][values] = {"text": sections[name][values]["image"]}
        lost = manifest.get("codes")
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
    print_line(
        console,
        f"{out}: index of {source.count:,} {manifest.get('items', 'images')}, {manifest['dim']}-d, {size:,.1f} MB",
    )
    if sections:
        print_line(console, _codes_summary(manifest))
    elif lost:
        print_line(console, f"{out}: too few are left for {lost['code']} codes, so the index is exact now")
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
    pyarrow, _ = arrow("mmrl index")
    from pyarrow import ipc

    with pyarrow.OSFile(str(data / ITEMS), "wb") as sink, ipc.new_file(sink, source.schema) as writer:
        for rows_nD, batch in source.batches():
            if len(batch):
                vectors_ND[start : start + len(batch)] = rows_nD
                writer.write_batch(batch)
                start += len(batch)
    assert start == source.count
    vectors_ND.flush()
    return vectors_ND


def _data_folders(out: Path) -> list[str]:
    if not out.is_dir():
        return []
    return [path.name for path in out.iterdir() if path.name.startswith("data-") and path.name[5:].isdigit()]


def _write_manifest(out: Path, manifest: dict[str, Any]) -> None:
    write_atomic(out / MANIFEST, json.dumps(manifest, indent=2) + "\n")
