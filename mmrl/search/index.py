"""An index opened for search: exact at any prefix of its vectors, or by a funnel of smaller codes.

    INDEX/
        manifest.json        format, version, the encoder's path and hash, dims, count, codes and their measured recall;
                             written last, and by a rename: it names the folder of the rest
        data-1/
            vectors.npy      float32 (N, D), unit rows; mapped into memory, not read
            items.arrow      key, captions, group, group_name, thumbnail of each row; mapped likewise
            codes.faiss …    where the index is compressed: see `funnel.py`
            texts.npy        some captions' vectors, by which the codes are fitted and measured
            deleted.npy      rows that are gone, where any are

Shapes: N rows of the index, n of some, D the width of its vectors, d the prefix searched.
"""

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmrl.data.samples import group_number
from mmrl.errors import InputError, did_you_mean
from mmrl.nesting import check_dims, cut
from mmrl.search.calibrate import K
from mmrl.search.funnel import Funnel
from mmrl.search.items import Item, Items

FORMAT, VERSION = "mmrl-index", 2
MANIFEST, VECTORS, ITEMS, TEXTS, DELETED = "manifest.json", "vectors.npy", "items.arrow", "texts.npy", "deleted.npy"
# Numbers of the index that a scan takes at once: 64 MB of float32.
_CHUNK_ELEMENTS = 1 << 24
# So many rows, or fewer, are compared outright instead of through the funnel.
_FEW = 20_000


@dataclass(frozen=True)
class Index:
    """An index opened for search. It may be used by several threads."""

    folder: Path
    manifest: dict[str, Any]
    vectors_ND: np.ndarray
    items: Items
    funnel: Funnel | None = None
    deleted: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """Rows that no search finds any more, ascending."""
    _norms: dict[int, np.ndarray] = field(default_factory=dict)

    @property
    def dim(self) -> int:
        """The width of its vectors."""
        return self.manifest["dim"]

    def __len__(self) -> int:
        """How many pictures can be found."""
        return len(self.vectors_ND) - len(self.deleted)

    def nearest(
        self, query_D: np.ndarray, dim: int, k: int, *, group: str | None = None, exact: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """The rows of the k highest cosines at the first `dim` numbers, and these; the best first, ties by row.

        A compressed index finds nearly all of them (the manifest tells how many were found at its full width), unless
        `exact`.

        Args:
            query_D: a vector of the index's width, or wider where the encoder's is.
            group: only pictures of this group.

        Raises:
            InputError: dim is not in 1 … D, there is no such group.
        """
        check_dims([dim], self.dim, "dim")
        query_d = cut(torch.from_numpy(query_D), dim).numpy()
        among = self._among(group)
        size = len(self) if among is None else int(among.sum())
        # An encoder cut shorter than the codes' prefix cannot meet them.
        if self.funnel is not None and not exact and size > _FEW and len(query_D) >= self.funnel.dim:
            rows = self._shortlist(query_D, k * len(self.vectors_ND) / size / K, among)
            if len(rows) >= k:
                return _best(rows, self._cosines(query_d, rows), k)
        if among is not None and size <= _FEW:
            rows = np.flatnonzero(among)
            return _best(rows, self._cosines(query_d, rows), k)
        scores_N = self._all_cosines(query_d)
        if among is not None:
            scores_N[~among] = -np.inf
        return _best(np.arange(len(scores_N)), scores_N, min(k, size))

    def sample(self, k: int, group: str | None = None) -> np.ndarray:
        """Some rows, the same at each call. Raises InputError as `nearest`."""
        among = self._among(group)
        rows = np.arange(len(self.vectors_ND)) if among is None else np.flatnonzero(among)
        return rows[np.random.default_rng(0).choice(len(rows), min(k, len(rows)), replace=False)]

    def _among(self, group: str | None) -> np.ndarray | None:
        """Which rows count: bool (N,); None for all."""
        if group is None and not len(self.deleted):
            return None
        among = np.ones(len(self.vectors_ND), bool)
        if group is not None:
            among = self.items.groups_N == group_number(group)
            if not among.any():
                names = [name for name, _ in self.items.named_groups]
                hint = did_you_mean(group, names) if len(names) <= 1000 else ""
                raise InputError(f"group: no picture is of the group {group[:80]!r}.{hint}")
        among[self.deleted] = False
        return among

    def _shortlist(self, query_D: np.ndarray, share: float, among: np.ndarray | None) -> np.ndarray:
        """What the funnel hands to the last stage; `share` lengthens its lists where only some rows count, or more than
        usual are asked for."""
        assert self.funnel is not None
        lists, longer = self.manifest["search"]["shortlists"], max(1.0, share)
        rows = self.funnel.first(query_D[None, : self.dim], min(int(lists["first"] * longer), len(self.vectors_ND)))[0]
        rows = rows[rows >= 0]
        if among is not None:
            rows = rows[among[rows]]
        kept = int(lists["second"] * (longer if among is None else max(1.0, share * len(self) / len(self.vectors_ND))))
        return self.funnel.second(query_D[: self.dim], rows)[:kept]

    def _cosines(self, query_d: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """With some rows: (n,)."""
        rows_nd = self.vectors_ND[rows, : len(query_d)]
        return _cosines(rows_nd, query_d, np.linalg.norm(rows_nd, axis=1))

    def _all_cosines(self, query_d: np.ndarray) -> np.ndarray:
        """With all rows, a chunk of the file at a time: (N,)."""
        dim, chunk = len(query_d), max(1, _CHUNK_ELEMENTS // self.dim)
        starts = range(0, len(self.vectors_ND), chunk)
        # As nesting.cut divides, but once an index and dim instead of once a query.
        if dim not in self._norms:
            parts = [np.linalg.norm(self.vectors_ND[start : start + chunk, :dim], axis=1) for start in starts]
            self._norms[dim] = np.concatenate(parts)
        norms_N = self._norms[dim]
        return np.concatenate([
            _cosines(self.vectors_ND[start : start + chunk, :dim], query_d, norms_N[start : start + chunk])
            for start in starts
        ])  # fmt: skip

    def take(self, rows: np.ndarray) -> list[Item]:
        """What is kept of these rows, in their order."""
        return self.items.take(rows)

    @cached_property
    def data(self) -> Path:
        """The folder of everything but the manifest."""
        return self.folder / self.manifest["data"]


def _cosines(rows_nd: np.ndarray, query_d: np.ndarray, norms_n: np.ndarray) -> np.ndarray:
    return np.asarray(rows_nd @ query_d) / norms_n.clip(min=1e-12)


def _best(rows_n: np.ndarray, scores_n: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k highest scores' rows, and these; the best first, ties by row."""
    k = min(k, len(scores_n))
    if not k:
        return rows_n[:0], scores_n[:0]
    # All that reach the k-th score, so that a tie at the end falls to the first rows on every machine.
    places = np.flatnonzero(scores_n >= np.partition(scores_n, -k)[-k])
    places = places[np.lexsort((rows_n[places], -scores_n[places]))][:k]
    return rows_n[places], scores_n[places]


def open_index(folder: Path) -> Index:
    """Opens what `build.write_index` wrote.

    Raises:
        InputError: the folder is no index, one of a version that this code does not read, or damaged.
    """
    manifest = read_manifest(folder)
    data = folder / manifest["data"]
    vectors_ND = _mapped(data / VECTORS)
    wanted = (manifest["rows"], manifest["dim"])
    if vectors_ND.shape != wanted or vectors_ND.dtype != np.float32:
        raise InputError(
            f"index: {folder} is damaged: {VECTORS} holds {vectors_ND.dtype} {vectors_ND.shape} where float32 {wanted} "
            "belongs; run mmrl index again."
        )
    items = Items(data / ITEMS)
    if len(items) != manifest["rows"]:
        raise InputError(
            f"index: {folder} is damaged: {ITEMS} holds {len(items)} rows of {manifest['rows']}; run mmrl index again."
        )
    funnel = Funnel.open(data, manifest["codes"], manifest["rows"]) if manifest["codes"] else None
    deleted = _mapped(data / DELETED) if (data / DELETED).exists() else np.zeros(0, np.int64)
    return Index(folder, manifest, vectors_ND, items, funnel, deleted)


def read_manifest(folder: Path) -> dict[str, Any]:
    """An index's manifest.

    Raises:
        InputError: the folder is no index, or one of a version that this code does not read.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"index: {folder} is no index: it has no {MANIFEST}; make one with mmrl index.") from None
    except ValueError as error:
        raise InputError(f"index: {folder / MANIFEST} is not JSON ({error}); run mmrl index again.") from None
    known = manifest.get("format") if isinstance(manifest, dict) else None
    if known != FORMAT or manifest.get("version") != VERSION:
        found = f"{known} version {manifest.get('version') if isinstance(manifest, dict) else None}"
        raise InputError(
            f"index: {folder / MANIFEST} is {found}; this mmrl reads {FORMAT} version {VERSION}. Run mmrl embed and "
            "mmrl index again."
        )
    if not isinstance(manifest.get("data"), str) or Path(manifest["data"]).name != manifest["data"]:
        raise InputError(f"index: {folder / MANIFEST} names no data folder of its own; run mmrl index again.")
    return manifest


def _mapped(path: Path) -> np.ndarray:
    try:
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))  # memmap's own indexing is slow
    except (OSError, ValueError) as error:
        raise InputError(f"index: {path} cannot be read ({error}); run mmrl index again.") from None
