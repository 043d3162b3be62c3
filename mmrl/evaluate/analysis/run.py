"""What is drawn from a set's embeddings beyond the plain scores: one story, each chapter in a module of its own.

    intervals      how sure each score is, by resampling the per-query results
    baselines      PCA, best and random dims, other models: the same queries, the same gallery
    compression    every dim in every precision, in one stage and in two; the front of bytes against recall
    blocks         what each block of dims adds, and from which dim on an item is found
    advice         the smallest of all that within the budget; the last three in the budget's direction, compression and
                   advice in the other, too

The cost is bounded: what ranks anew does so for so many queries that these times the gallery stay within a number of
pairs; the gallery is always whole, so that no score gets easier. The page tells where queries were drawn.

Shapes: Q queries that have an answer.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmrl.errors import InputError
from mmrl.evaluate.analysis import baselines, blocks, compression
from mmrl.evaluate.analysis.advice import Budget, advise
from mmrl.evaluate.analysis.bootstrap import LEVEL, RESAMPLES, Bootstrap
from mmrl.evaluate.analysis.task import Task
from mmrl.evaluate.ranking.ranks import KS, PerQuery, rank_both, rank_queries
from mmrl.evaluate.sets import Embedded

CHAPTERS = 5
# Pairs of query and gallery row that a chapter ranks at each dim, and the queries it has at least and at most.
_BASELINE_LIMITS = {"pairs": 1 << 28, "least": 1000, "most": 10_000}
_COMPRESSION_LIMITS = {"pairs": 1 << 26, "least": 500, "most": 4000}

Ranks = dict[int, Tensor]
"""{dim: rank_Q}"""


@dataclass
class Analysis:
    """Of one set."""

    json: dict[str, Any] = field(default_factory=dict)
    """What retrieval.json has under "analysis"."""
    tasks: dict[str, Task] = field(default_factory=dict)
    ranked: dict[str, dict[int, PerQuery]] = field(default_factory=dict)
    """{direction: {dim: per query}} of the model itself, all queries."""


@dataclass(frozen=True)
class _Sample:
    """Some queries of a direction."""

    row_q: Tensor
    task: Task
    own: Ranks
    """The ranks of the model's own prefixes."""
    bootstrap: Bootstrap


def tasks_of(embedded: Embedded) -> dict[str, Task]:
    """Text→image, then image→text."""
    image, text = (embedded.image_ND, embedded.image_group_N), (embedded.text_MD, embedded.text_group_M)
    return {
        name: Task(name, query[0], gallery[0], query[1], gallery[1])
        for name, query, gallery in (("text_to_image", text, image), ("image_to_text", image, text))
    }


def analyse(
    embedded: Embedded,
    dims: Sequence[int],
    budget: Budget,
    vectors: int,
    others: Mapping[str, Embedded] | None = None,
    on_chapter: Callable[[int], None] | None = None,
) -> Analysis:
    """All chapters.

    Args:
        others: the same set embedded by other models, for `--compare`.
        on_chapter: told 1 after each of the CHAPTERS, for a progress bar.

    Raises:
        InputError: another model's set is not of the same samples; no query has an answer.
    """
    for name, other in (others or {}).items():
        if other.keys != embedded.keys or other.captions != embedded.captions:
            raise InputError(f"compare: {name} reads other samples of this set; the two cannot be paired.")
    result, seconds, dims = Analysis(tasks=tasks_of(embedded)), {}, sorted(dims)
    ks = sorted({*KS, budget.k})

    @contextmanager
    def chapter(name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        seconds[name] = round(time.perf_counter() - start, 2)
        if on_chapter:
            on_chapter(1)

    with chapter("ranks"):
        both = rank_both(embedded.image_ND, embedded.text_MD, embedded.image_group_N, embedded.text_group_M, dims)
        result.ranked = dict(zip(("image_to_text", "text_to_image"), both, strict=True))
    with chapter("intervals"):
        result.json["intervals"] = _intervals(result, ks)
    with chapter("baselines"):
        result.json |= _baselines(result, dims, ks, budget, others or {})
    with chapter("compression"):
        result.json |= _compression(result, dims, budget, vectors)
        result.json["other_direction"] = _compression(result, dims, budget.reversed, vectors)
    with chapter("blocks"):
        result.json |= _blocks(result, dims, budget)
    result.json["method"] = {"resamples": RESAMPLES, "level": LEVEL, "unit": "items"}
    result.json["seconds"] = seconds
    return result


def _hits(rank_Q: Tensor, ks: Sequence[int]) -> Tensor:
    """(Q, len(ks)) of 0 and 1."""
    return torch.stack([rank_Q <= k for k in ks], dim=1).double()


def _scores(bootstrap: Bootstrap, draws_of: Mapping[int, Sequence[Tensor]], ks: Sequence[int]) -> dict[str, Any]:
    """{dim: {"R@1": {value, low, high}, …}}, the widest dim first; several draws of ranks are averaged by query."""
    dims = sorted(draws_of, reverse=True)
    hits = [torch.stack([_hits(rank_Q, ks) for rank_Q in draws_of[dim]]).mean(0) for dim in dims]
    flat = iter(bootstrap.intervals(torch.cat(hits, dim=1)))
    return {str(dim): {f"R@{k}": next(flat).as_json() for k in ks} for dim in dims}


def _intervals(result: Analysis, ks: Sequence[int]) -> dict[str, Any]:
    """{direction: {dim: {"R@1": …}}}, over all queries."""
    scores = {}
    for name, ranked in result.ranked.items():
        query_Q = next(iter(ranked.values())).query_Q
        bootstrap = Bootstrap(result.tasks[name].query_group_Q[query_Q])
        scores[name] = _scores(bootstrap, {dim: [one.rank_Q] for dim, one in ranked.items()}, ks)
    return scores


def _sample(result: Analysis, name: str, limits: Mapping[str, int]) -> _Sample:
    """As many queries of a direction as the limits allow."""
    task, ranked = result.tasks[name], result.ranked[name]
    row_q = task.rows_within(**limits)
    place_q = torch.searchsorted(next(iter(ranked.values())).query_Q, row_q)
    own = {dim: one.rank_Q[place_q] for dim, one in ranked.items()}
    return _Sample(row_q, task.only(row_q), own, Bootstrap(task.query_group_Q[row_q]))


def _baselines(
    result: Analysis, dims: Sequence[int], ks: Sequence[int], budget: Budget, others: Mapping[str, Embedded]
) -> dict[str, Any]:
    """The scores of each baseline, and the paired difference of the model's own vectors to it, dim by dim."""
    scores: dict[str, Any] = {}
    paired: dict[str, Any] = {}
    count = 0
    for name in result.tasks:
        drawn = _sample(result, name, _BASELINE_LIMITS)
        task, own, bootstrap = drawn.task, drawn.own, drawn.bootstrap
        count = max(count, len(drawn.row_q))
        ranks = baselines.baseline_ranks(task, dims)
        for other_name, other in others.items():
            ranks |= _of_other(other_name, tasks_of(other)[name].only(drawn.row_q), dims)
        scores[name] = {method: _scores(bootstrap, draws_of, ks) for method, draws_of in ranks.items()}
        ranks["full"] = {dim: [own[max(own)]] for dim in own}
        paired[name] = {method: _leads(bootstrap, own, draws_of, budget.k) for method, draws_of in ranks.items()}
    return {"baselines": scores, "paired": paired, "baseline_queries": count}


def _leads(bootstrap: Bootstrap, own: Ranks, draws_of: Mapping[int, Sequence[Tensor]], k: int) -> dict[str, Any]:
    """By how much the model's own vectors are ahead at each dim, query by query."""
    dims = sorted(draws_of, reverse=True)
    own_QS = torch.stack([own[dim] <= k for dim in dims], dim=1).double()
    other_QS = torch.stack(
        [torch.stack([(rank_Q <= k).double() for rank_Q in draws_of[dim]]).mean(0) for dim in dims], dim=1
    )
    leads = bootstrap.differences(own_QS, other_QS)
    return {
        str(dim): {"lead": lead.as_json(), "p": bootstrap.paired_p(own_QS[:, n], other_QS[:, n])}
        for n, (dim, lead) in enumerate(zip(dims, leads, strict=True))
    }


def _of_other(name: str, other: Task, dims: Sequence[int]) -> dict[str, dict[int, list[Tensor]]]:
    """Another model's vectors, cut and by PCA, at the dims that it has."""
    able = [dim for dim in dims if dim <= other.dim]
    if not able:
        return {}
    ranked = rank_queries(other.query_QD, other.gallery_GD, other.query_group_Q, other.gallery_group_G, able)
    return {
        name: {dim: [one.rank_Q] for dim, one in ranked.items()},
        f"{name}, PCA": baselines.principal_ranks(other, able),
    }


def _compression(result: Analysis, dims: Sequence[int], budget: Budget, vectors: int) -> dict[str, Any]:
    """Every way to keep the gallery of the budget's direction, and the advice that follows from it."""
    drawn = _sample(result, budget.direction, _COMPRESSION_LIMITS)
    task, bootstrap = drawn.task, drawn.bootstrap
    options = compression.measure(task, dims, budget.k)
    full = next(o for o in options if (o.dim, o.precision, o.candidates) == (max(dims), "fp32", 0))
    rank_QS = torch.stack([option.rank_Q for option in options], dim=1)
    recalls = bootstrap.intervals((rank_QS <= budget.k).double())
    lost = budget.lost(bootstrap, full.rank_Q, rank_QS)
    fronts = set()
    for staged in (False, True):
        places = [n for n, o in enumerate(options) if bool(o.candidates) == staged]
        points = [(options[n].bytes, recalls[n].value) for n in places]
        fronts |= {places[n] for n in compression.front(points)}
    listed = [
        {
            "dim": option.dim,
            "precision": option.precision,
            "candidates": option.candidates,
            "bytes": option.bytes,
            "rerank_bytes": option.rerank_bytes,
            "recall": recalls[n].as_json(),
            "lost": lost[n].as_json(),
            "front": n in fronts,
        }
        for n, option in enumerate(options)
    ]
    return {
        "compression": {
            "direction": budget.direction,
            "metric": f"R@{budget.k}",
            "queries": len(task.query_QD),
            "all_queries": len(result.ranked[budget.direction][max(dims)].query_Q),
            "gallery": len(task.gallery_GD),
            "product_quantisation": compression.why_no_codebooks(len(task.gallery_GD)) or "measured",
            "options": listed,
        },
        "advice": advise(options, budget, bootstrap, vectors),
    }


def _blocks(result: Analysis, dims: Sequence[int], budget: Budget) -> dict[str, Any]:
    drawn = _sample(result, budget.direction, _COMPRESSION_LIMITS)
    task, bootstrap = drawn.task, drawn.bootstrap
    ranked = result.ranked[budget.direction]
    query_Q = next(iter(ranked.values())).query_Q
    whole = result.tasks[budget.direction]
    group_of_query_Q = whole.query_group_Q[query_Q]
    _, found_from = blocks.groups_found_from(group_of_query_Q, {d: p.rank_Q for d, p in ranked.items()}, budget.k)
    return {
        "blocks": blocks.rank_blocks(task, drawn.own, bootstrap, budget.k),
        "dropping": blocks.droppable(task, max(dims), bootstrap, budget.drop, budget.k),
        "found_from": {
            "items": len(found_from),
            **{str(dim): int((found_from == dim).sum()) for dim in sorted(dims)},
            "never": int((found_from == 0).sum()),
        },
    }
