"""An index opened for search: exact at any prefix of its vectors, or in stages over compressed codes.

    INDEX/
        texts/               an index of the texts, if both images and texts are indexed
        manifest.json        format, version, the encoder's path and hash, dims, count, codes and their measured recall;
                             replaced atomically, last of all files: it names the data folder
        data-1/
            vectors.npy      float32 unit vectors (N, D), memory-mapped
            items.arrow      key, captions, group, group_name and thumbnail of each row, memory-mapped
            codes.faiss …    only in a compressed index: see `funnel.py`
            texts.npy        caption embeddings, used to train the codes and to measure their recall
            deleted.npy      deleted rows, if any

Shapes: N rows of the index, n selected rows, D dim of its vectors, d the searched dim.
"""

import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from mmrl.data.samples import group_id
from mmrl.errors import InputError, did_you_mean
from mmrl.evaluate.ranking.ranks import top_k
from mmrl.nesting import check_dims, truncate
from mmrl.output.files import parse_json, path_inside
from mmrl.search.calibrate import K
from mmrl.search.funnel import Funnel, memory_map
from mmrl.search.items import Items

INDEX_FORMAT, INDEX_VERSION = "mmrl-index", 2
TEXT_INDEX = "texts"
Kind = Literal["images", "texts"]
"""What the rows of an index are."""
MANIFEST, VECTORS, ITEMS, DELETED = "manifest.json", "vectors.npy", "items.arrow", "deleted.npy"
CAPTION_VECTORS = "texts.npy"
# Elements of the index per scan step: 64 MB of float32.
_CHUNK_ELEMENTS = 1 << 24
# Dims whose norms are kept: a client may ask for every dim, and each takes 4 bytes per row.
_CACHED_NORMS = 16
# Up to this many rows an exact scan is faster than the staged search.
_EXACT_SCAN_ROWS = 20_000


class _Codes(BaseModel):
    code: str
    dim: PositiveInt
    threshold: list[float] | None = None
    second_stage: bool = True


class _Shortlists(BaseModel):
    first: NonNegativeInt
    second: NonNegativeInt


class _Search(BaseModel):
    shortlists: _Shortlists
    recall: dict[str, float] = Field(alias=f"recall@{K}")


class _Encoder(BaseModel):
    model: str
    origin_sha256: str


class _Manifest(BaseModel):
    """What is read of an index's manifest."""

    rows: NonNegativeInt
    dim: PositiveInt
    nested_dims: list[PositiveInt]
    items: Kind = "images"
    encoder: _Encoder
    codes: _Codes | None
    search: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_search(self) -> Self:
        if self.codes:
            _Search.model_validate(self.search)
        return self


@dataclass(frozen=True)
class Index:
    """An index opened for search. It is thread-safe."""

    folder: Path
    manifest: dict[str, Any]
    vectors_ND: np.ndarray
    items: Items
    funnel: Funnel | None = None
    deleted: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """Deleted rows, ascending. No search returns them."""
    stamp: tuple[int, ...] = ()
    """Of the manifest's file when the index was opened: it changes with the index."""
    _norms: dict[int, np.ndarray] = field(default_factory=dict)

    @property
    def kind(self) -> Kind:
        """What its rows are. Indexes of earlier versions hold images."""
        return self.manifest.get("items", "images")

    @property
    def dim(self) -> int:
        return self.manifest["dim"]

    def __len__(self) -> int:
        """The number of rows, without deleted ones."""
        return len(self.vectors_ND) - len(self.deleted)

    def reopened(self) -> "Index":
        """This index, or what its folder holds by now. Raises InputError as `open_index`."""
        return self if _stamp(self.folder) in (self.stamp, ()) else open_index(self.folder)

    @np.errstate(over="ignore", invalid="ignore")  # of damaged vectors
    def nearest(
        self, query_D: np.ndarray, dim: int, k: int, *, group: str | None = None, exact: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """The rows of the k highest cosine similarities at `dim` and their scores, best first, ties by row.

        A compressed index returns nearly all of them (its manifest has the recall measured at the full dim), unless
        `exact`.

        Args:
            query_D: an embedding of at least `dim` dims.
            group: search only images of this group.

        Raises:
            InputError: dim is not in 1 … D, or there is no such group.
        """
        check_dims([dim], self.dim, "dim")
        query_d = truncate(torch.from_numpy(query_D), dim).numpy()
        mask_N = self._row_mask(group)
        size = len(self) if mask_N is None else int(mask_N.sum())
        # A query embedding of fewer dims than the codes cannot be compared with them.
        if self.funnel is not None and not exact and size > _EXACT_SCAN_ROWS and len(query_D) >= self.funnel.dim:
            rows = self._shortlist(query_D, k * len(self.vectors_ND) / size / K, mask_N)
            if len(rows) >= k:
                return self._nearest_of(query_d, rows, k)
        if mask_N is not None and size <= _EXACT_SCAN_ROWS:
            return self._nearest_of(query_d, np.flatnonzero(mask_N), k)
        score_N = self._all_cosines(query_d)
        if mask_N is not None:
            score_N[~mask_N] = -np.inf
        rows_1k, score_1k = top_k(score_N[None], min(k, size))
        return rows_1k[0], score_1k[0]

    def sample(self, k: int, group: str | None = None) -> np.ndarray:
        """A random sample of rows, the same on every call. Raises InputError if there is no such group."""
        mask_N = self._row_mask(group)
        rows = np.arange(len(self.vectors_ND)) if mask_N is None else np.flatnonzero(mask_N)
        return rows[np.random.default_rng(0).choice(len(rows), min(k, len(rows)), replace=False)]

    def _row_mask(self, group: str | None) -> np.ndarray | None:
        """Which rows to search: bool (N,), or None for all."""
        if group is None and not len(self.deleted):
            return None
        mask_N = np.ones(len(self.vectors_ND), bool) if group is None else self.items.groups_N == group_id(group)
        mask_N[self.deleted] = False
        if group is not None and not mask_N.any():
            names = [name for name, _ in self.named_groups]
            hint = did_you_mean(group, names) if len(names) <= 1000 else ""
            raise InputError(f"group: no image has the group {group[:80]!r}.{hint}")
        return mask_N

    def _shortlist(self, query_D: np.ndarray, factor: float, mask_N: np.ndarray | None) -> np.ndarray:
        """The rows that the stages before the last select. `factor` > 1 lengthens their shortlists, for a larger k or
        where `mask_N` excludes rows."""
        assert self.funnel is not None
        lengths, factor_1 = self.manifest["search"]["shortlists"], max(1.0, factor)
        n = min(int(lengths["first"] * factor_1), len(self.vectors_ND))
        rows = self.funnel.first(query_D[None, : self.dim], n)[0]
        rows = rows[rows >= 0]
        if mask_N is not None:
            rows = rows[mask_N[rows]]
            factor_1 = max(1.0, factor * len(self) / len(self.vectors_ND))
        return self.funnel.second(query_D[: self.dim], rows)[: int(lengths["second"] * factor_1)]

    def _nearest_of(self, query_d: np.ndarray, rows_n: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k of these rows with the highest cosine similarities, and their scores."""
        rows_nd = self.vectors_ND[rows_n, : len(query_d)]
        score_n = _cosines(rows_nd, query_d, np.linalg.norm(rows_nd, axis=1))
        order_n = np.argsort(rows_n)  # so that ties are ordered by row
        rows_n, score_n = rows_n[order_n], score_n[order_n]
        best_1k, score_1k = top_k(score_n[None], k)
        return rows_n[best_1k[0]], score_1k[0]

    def _all_cosines(self, query_d: np.ndarray) -> np.ndarray:
        """The query's cosine similarity with every row, computed in chunks: (N,)."""
        dim, chunk = len(query_d), max(1, _CHUNK_ELEMENTS // self.dim)
        starts = range(0, len(self.vectors_ND), chunk)
        # The norms of the prefixes, computed once per dim instead of once per query.
        norms_N = self._norms.get(dim)
        if norms_N is None:
            norms = [np.linalg.norm(self.vectors_ND[start : start + chunk, :dim], axis=1) for start in starts]
            self._norms[dim] = norms_N = np.concatenate(norms)
            for old in list(self._norms)[:-_CACHED_NORMS]:
                self._norms.pop(old, None)
        return np.concatenate([
            _cosines(self.vectors_ND[start : start + chunk, :dim], query_d, norms_N[start : start + chunk])
            for start in starts
        ])  # fmt: skip

    @cached_property
    def named_groups(self) -> list[tuple[str, int]]:
        """The name and number of images of each group, largest first, then by name."""
        kept = np.delete(np.arange(len(self.vectors_ND)), self.deleted)
        groups, first, counts = np.unique(self.items.groups_N[kept], return_index=True, return_counts=True)
        names = self.items.table["group_name"].take(kept[first[groups >= 0]]).to_pylist()
        named = zip((name or "" for name in names), counts[groups >= 0].tolist(), strict=True)
        return sorted(named, key=lambda group: (-group[1], group[0]))

    @cached_property
    def data_folder(self) -> Path:
        """The folder of all files except the manifest."""
        return self.folder / self.manifest["data"]


def _cosines(rows_nd: np.ndarray, query_d: np.ndarray, norms_n: np.ndarray) -> np.ndarray:
    score_n = np.asarray(rows_nd @ query_d) / norms_n.clip(min=1e-12)
    if np.isnan(score_n).any():
        raise InputError(
            "index: a score is not a number, so its vectors are damaged; run mmrl embed and mmrl index again."
        )
    return score_n


def open_index(folder: Path) -> Index:
    """Opens the index that `build.write_index` wrote. Raises InputError: the folder is not an index, has an unsupported
    version, or is damaged."""
    stamp = _stamp(folder)
    manifest = read_manifest(folder)
    data = path_inside(folder, manifest["data"])
    for path in data.glob("*"):
        path_inside(folder, f"{data.name}/{path.name}")
    vectors_ND = memory_map(data / VECTORS)
    shape = (manifest["rows"], manifest["dim"])
    if vectors_ND.shape != shape or vectors_ND.dtype != np.float32:
        raise InputError(
            f"index: {folder} is damaged: {VECTORS} holds {vectors_ND.dtype} {vectors_ND.shape}, not float32 {shape}; "
            "run mmrl index again."
        )
    items = Items(data / ITEMS)
    if len(items) != manifest["rows"]:
        raise InputError(
            f"index: {folder} is damaged: {ITEMS} holds {len(items)} rows, not {manifest['rows']}; run mmrl index "
            "again."
        )
    funnel = Funnel.open(data, manifest["codes"], manifest["rows"]) if manifest["codes"] else None
    deleted = memory_map(data / DELETED) if (data / DELETED).exists() else np.zeros(0, np.int64)
    if deleted.dtype.kind not in "iu" or deleted.ndim != 1 or not ((deleted >= 0) & (deleted < shape[0])).all():
        raise InputError(f"index: {folder} is damaged: {DELETED} holds other values than rows; run mmrl index again.")
    return Index(folder, manifest, vectors_ND, items, funnel, deleted, stamp)


def _stamp(folder: Path) -> tuple[int, ...]:
    """Of the manifest's file; empty if there is none."""
    try:
        found = (folder / MANIFEST).stat()
    except OSError:
        return ()
    return found.st_ino, found.st_mtime_ns, found.st_size


def index_of(folder: Path, kind: str | None) -> Path:
    """The folder of the index of `kind` in an index folder; None: of its images, else of its texts. Raises InputError:
    as read_manifest, or there is no such index."""
    main = read_manifest(folder).get("items", "images")
    if kind in (None, main):
        return folder
    if kind == "texts" and (folder / TEXT_INDEX / MANIFEST).is_file():
        return folder / TEXT_INDEX
    remedy = "run mmrl embed with --texts and mmrl index again" if kind == "texts" else f"allowed: {main}"
    raise InputError(f"in: {folder} holds no index of {kind}; {remedy}.")


def is_index(folder: Path) -> bool:
    """Whether the folder is an index, of any version; an encoder's folder has a manifest of another format."""
    try:
        return parse_json((folder / MANIFEST).read_text()).get("format") == INDEX_FORMAT
    except (OSError, ValueError, AttributeError):
        return False


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an index. Raises InputError: the folder is not an index, has an unsupported version, or its
    manifest is damaged."""
    try:
        manifest = parse_json((folder / MANIFEST).read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"index: {folder} is not an index: it has no {MANIFEST}; make one with mmrl index.") from None
    except ValueError as error:
        raise InputError(f"index: {folder / MANIFEST} is not JSON ({error}); run mmrl index again.") from None
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != INDEX_FORMAT or manifest.get("version") != INDEX_VERSION:
        version = manifest.get("version") if isinstance(manifest, dict) else None
        raise InputError(
            f"index: {folder / MANIFEST} is {found!s:.50} version {version!s:.50}; this mmrl reads {INDEX_FORMAT} "
            f"version {INDEX_VERSION}. Run mmrl embed and mmrl index again."
        )
    if not isinstance(manifest.get("data"), str) or not re.fullmatch(r"[\w-][\w.-]*", manifest["data"], re.ASCII):
        raise InputError(f"index: {folder / MANIFEST} names no data folder inside the index; run mmrl index again.")
    try:
        _Manifest.model_validate(manifest, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise InputError(f"index: {folder / MANIFEST}: {key}: {first['msg']}; run mmrl index again.") from None
    return manifest
