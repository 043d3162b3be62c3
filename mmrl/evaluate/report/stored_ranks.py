"""ranks.safetensors: the ranks of every query, stored with a report so that `mmrl compare` can pair queries.

SET/DIRECTION/query        int64 (Q,)  rows of the queries that have a positive
SET/DIRECTION/item         int64 (Q,)  equal values are queries of one item
SET/DIRECTION/DIM          int32 (Q,)  rank of the best positive, from 1
metadata: {SET: a digest of its samples and captions}; runs with the same digest can be paired
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmrl.errors import InputError
from mmrl.evaluate.analysis.run import Analysis
from mmrl.evaluate.sets import Embedded
from mmrl.output.files import atomic_path

RANKS_FILE = "ranks.safetensors"


@dataclass(frozen=True)
class StoredRanks:
    """The ranks of one set and direction."""

    query_Q: Tensor
    item_Q: Tensor
    rank_of: dict[int, Tensor]


def digest(embedded: Embedded) -> str:
    """A hash of the set's keys, captions and their assignment."""
    content = json.dumps([embedded.keys, embedded.captions, embedded.image_of_text_M.tolist()])
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def write_ranks(folder: Path, sets: Mapping[str, tuple[Embedded, Analysis]]) -> None:
    """Writes FOLDER/ranks.safetensors."""
    tensors, digests = {}, {}
    for name, (embedded, analysis) in sets.items():
        digests[name] = digest(embedded)
        for direction, ranked in analysis.ranked.items():
            query_Q = next(iter(ranked.values())).query_Q
            tensors[f"{name}/{direction}/query"] = query_Q
            tensors[f"{name}/{direction}/item"] = analysis.tasks[direction].query_group_Q[query_Q]
            for dim, one in ranked.items():
                tensors[f"{name}/{direction}/{dim}"] = one.rank_Q.int()
    with atomic_path(folder / RANKS_FILE) as partial:
        save_file(tensors, partial, digests)


def read_ranks(folder: Path) -> dict[str, tuple[str, dict[str, StoredRanks]]]:
    """{set: (digest, {direction: ranks})}; empty if the file does not exist. Raises InputError: the file is damaged."""
    path = folder / RANKS_FILE
    if not path.is_file():
        return {}
    tensors: dict[tuple[str, str], dict[str, Tensor]] = defaultdict(dict)
    try:
        with safe_open(path, "pt") as file:
            result = {name: (set_digest, {}) for name, set_digest in (file.metadata() or {}).items()}
            for name in list(file.keys()):
                set_name, direction, kind = name.rsplit("/", 2)
                tensors[set_name, direction][kind] = file.get_tensor(name)
        for (set_name, direction), one in tensors.items():
            query_Q, item_Q = one.pop("query"), one.pop("item")
            rank_of = {int(dim): rank_Q.double() for dim, rank_Q in one.items()}
            result[set_name][1][direction] = StoredRanks(query_Q, item_Q, rank_of)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise InputError(f"compare: {path} cannot be read ({error}); run mmrl eval --out again.") from None
    return result
