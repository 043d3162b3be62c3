"""Every query's place at every dim, kept beside a report so that runs can be compared query by query.

ranks.safetensors
    SET/DIRECTION/query        int64 (Q,)  rows of the queries that have an answer
    SET/DIRECTION/item         int64 (Q,)  equal numbers are queries of one item
    SET/DIRECTION/DIM          int32 (Q,)  place of the best right answer, from 1
    metadata: {SET: a digest of its samples and captions}; sets of one digest can be paired
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmrl.errors import InputError
from mmrl.evaluate.analysis.run import Analysis
from mmrl.evaluate.sets import Embedded

FILE = "ranks.safetensors"


@dataclass(frozen=True)
class StoredRanks:
    """Of one set and direction."""

    query_Q: Tensor
    item_Q: Tensor
    rank_of: dict[int, Tensor]


def digest(embedded: Embedded) -> str:
    """Tells a set of samples and captions from another."""
    names = json.dumps([embedded.keys, embedded.captions, embedded.image_of_text_M.tolist()])
    return hashlib.blake2b(names.encode(), digest_size=16).hexdigest()


def write(folder: Path, sets: Mapping[str, tuple[Embedded, Analysis]]) -> None:
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
    save_file(tensors, folder / FILE, digests)


def read(folder: Path) -> dict[str, tuple[str, dict[str, StoredRanks]]]:
    """{set: (digest, {direction: ranks})}; empty where there is no such file.

    Raises:
        InputError: the file is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return {}
    result = {}
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            for set_name, known in (file.metadata() or {}).items():
                directions = {}
                for name in names:
                    inner = name.removeprefix(f"{set_name}/")
                    if inner == name or not inner.endswith("/query"):
                        continue
                    direction = inner.removesuffix("/query")
                    start = f"{set_name}/{direction}/"
                    dims = [
                        int(n.removeprefix(start)) for n in names if n.startswith(start) and n[len(start) :].isdigit()
                    ]
                    rank_of = {dim: file.get_tensor(f"{start}{dim}").to(torch.float64) for dim in dims}
                    directions[direction] = StoredRanks(
                        file.get_tensor(f"{start}query"), file.get_tensor(f"{start}item"), rank_of
                    )
                result[set_name] = (known, directions)
    except (SafetensorError, OSError) as error:
        raise InputError(f"compare: {path} cannot be read ({error}); run mmrl eval --out again.") from None
    return result
