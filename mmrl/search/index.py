"""`mmrl index`: embeddings -> an index, and exact search in it at any prefix of the vectors.

    OUT/
        manifest.json     format, version, the encoder's path and hash, dim, nested dims, count; written last
        vectors.npy       float32 (N, D), unit rows; mapped into memory, not read
        items.parquet     key, captions, group, thumbnail of each row

Shapes: N pictures of the index, n of one chunk, D the width of its vectors, d the prefix searched.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

import mmrl
from mmrl.data.tables import arrow
from mmrl.errors import InputError
from mmrl.nesting import check_dims, cut
from mmrl.search.embed import EMBEDDINGS, METADATA_KEY, prepare_folder

FORMAT, VERSION = "mmrl-index", 1
MANIFEST, VECTORS, ITEMS = "manifest.json", "vectors.npy", "items.parquet"
_ITEM_COLUMNS = ["key", "captions", "group", "thumbnail"]
_ROWS_AT_A_TIME = 2048
# Numbers of the index in memory at once: 64 MB of float32.
_CHUNK_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Item:
    """What an index keeps of a picture."""

    key: str
    captions: list[str]
    group: int
    thumbnail: bytes


@dataclass(frozen=True)
class Index:
    """An index opened for search."""

    folder: Path
    manifest: dict[str, Any]
    vectors_ND: np.ndarray

    @property
    def dim(self) -> int:
        """The width of its vectors."""
        return self.manifest["dim"]

    def nearest(self, query_D: np.ndarray, dim: int, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows of the k highest cosines at the first `dim` numbers, and these; the best first, ties by row.

        Args:
            query_D: a vector of the index's width, or wider where the encoder's is.

        Raises:
            InputError: dim is not in 1 … D.
        """
        check_dims([dim], self.dim, "dim")
        query_d = cut(torch.from_numpy(query_D), dim)
        chunk = max(1, _CHUNK_ELEMENTS // self.dim)
        scores_N = np.empty(len(self.vectors_ND), np.float32)
        for start in range(0, len(scores_N), chunk):
            rows_nD = torch.from_numpy(np.array(self.vectors_ND[start : start + chunk]))
            scores_N[start : start + chunk] = (cut(rows_nD, dim) @ query_d).numpy()
        k = min(k, len(scores_N))
        # All that reach the k-th score, so that a tie at the end falls to the first rows on every machine.
        least = np.partition(scores_N, -k)[-k]
        rows = np.flatnonzero(scores_N >= least)
        best = rows[np.argsort(-scores_N[rows], kind="stable")][:k]
        return best, scores_N[best]

    def items(self, rows: np.ndarray) -> list[Item]:
        """What is kept of these rows, in their order; only their part of the file is read."""
        _, parquet = arrow("reading an index")
        with parquet.ParquetFile(self.folder / ITEMS) as file:
            sizes = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
            ends = np.cumsum(sizes)
            groups: dict[int, Any] = {}
            found = []
            for row in rows.tolist():
                number = int(np.searchsorted(ends, row, side="right"))
                if number not in groups:
                    groups[number] = file.read_row_group(number, columns=_ITEM_COLUMNS)
                place = row - int(ends[number]) + sizes[number]
                found.append(Item(**groups[number].slice(place, 1).to_pylist()[0]))
        return found


def write_index(embeddings: Path, out: Path, quiet: bool = False) -> dict[str, Any]:
    """Makes OUT an index of what `mmrl embed` wrote; returns its manifest.

    Raises:
        InputError: EMBEDDINGS is not such a file or folder, OUT holds something else.
    """
    pyarrow, parquet = arrow("mmrl index")
    path = embeddings / EMBEDDINGS if embeddings.is_dir() else embeddings
    if not path.is_file():
        raise InputError(f"embeddings: {path} does not exist; give the folder that mmrl embed wrote.")
    try:
        file = parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(
            f"embeddings: {path} is not a readable Parquet file ({error}); run mmrl embed again."
        ) from None
    with file:
        source = _source_of(file, path)
        prepare_folder(out, {MANIFEST, VECTORS, ITEMS})
        (out / MANIFEST).unlink(missing_ok=True)  # a folder without it is no index, as long as the rest is not whole
        _write_rows(pyarrow, parquet, file, out, source["dim"])
        count = file.metadata.num_rows
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "encoder": {"model": source["model"], "origin_sha256": source["origin_sha256"]},
        "dim": source["dim"],
        "nested_dims": source["nested_dims"],
        "count": count,
        "mmrl_version": mmrl.__version__,
    }
    (out / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    size = sum((out / name).stat().st_size for name in (VECTORS, ITEMS)) / 1e6
    shown = f"{out}: index of {count:,} pictures, {source['dim']}-d, {size:,.1f} MB"
    Console(quiet=quiet).print(shown, highlight=False, markup=False, soft_wrap=True)
    return manifest


def _source_of(file: Any, path: Path) -> dict[str, Any]:
    """The metadata that `mmrl embed` wrote."""
    metadata = (file.schema_arrow.metadata or {}).get(METADATA_KEY)
    missing = {"embedding", *_ITEM_COLUMNS} - set(file.schema_arrow.names)
    if metadata is None or missing:
        lacks = f"column {sorted(missing)[0]!r}" if missing else "mmrl's metadata"
        raise InputError(f"embeddings: {path} was not written by mmrl embed: it lacks {lacks}.")
    if not file.metadata.num_rows:
        raise InputError(f"embeddings: {path} has no rows.")
    return json.loads(metadata)


def _write_rows(pyarrow: Any, parquet: Any, file: Any, out: Path, dim: int) -> None:
    shape = (file.metadata.num_rows, dim)
    vectors_ND = np.lib.format.open_memmap(out / VECTORS, mode="w+", dtype=np.float32, shape=shape)
    schema = pyarrow.schema([file.schema_arrow.field(name) for name in _ITEM_COLUMNS])
    filled = 0
    with parquet.ParquetWriter(out / ITEMS, schema) as writer:
        for batch in file.iter_batches(batch_size=_ROWS_AT_A_TIME):
            vectors_ND[filled : filled + len(batch)] = batch.column("embedding").flatten().to_numpy().reshape(-1, dim)
            writer.write_batch(batch.select(_ITEM_COLUMNS))
            filled += len(batch)
    vectors_ND.flush()


def open_index(folder: Path) -> Index:
    """Opens what `write_index` wrote.

    Raises:
        InputError: the folder is no index, one of a version that this code does not read, or damaged.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"index: {folder} is no index: it has no {MANIFEST}; make one with mmrl index.") from None
    except ValueError as error:
        raise InputError(f"index: {folder / MANIFEST} is not JSON ({error}); run mmrl index again.") from None
    if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        found = f"{manifest.get('format')} version {manifest.get('version')}"
        raise InputError(f"index: {folder / MANIFEST} is {found}; this mmrl reads {FORMAT} version {VERSION}.")
    try:
        vectors_ND = np.load(folder / VECTORS, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"index: {folder / VECTORS} cannot be read ({error}); run mmrl index again.") from None
    wanted = (manifest["count"], manifest["dim"])
    if vectors_ND.shape != wanted or vectors_ND.dtype != np.float32 or not (folder / ITEMS).is_file():
        raise InputError(
            f"index: {folder} is damaged: {VECTORS} holds {vectors_ND.dtype} {vectors_ND.shape} where float32 {wanted} "
            f"belongs, or {ITEMS} is missing; run mmrl index again."
        )
    return Index(folder, manifest, vectors_ND)
