"""The analysis of one evaluation set, in five steps.

    ranks          the ranks of every query at every dim
    intervals      confidence intervals of the scores, by resampling the items
    baselines      PCA, best dims, random dims and baseline models, on the same queries and gallery
    compression    every dim in every precision, in one stage and in two; bytes against recall; advice: the smallest
                   option within the budget. In both directions between images and texts.
    blocks         what each block of dims adds, and from which dim an item is found. In the budget's direction only.

The cost is bounded: steps that rank again use a sample of the queries, such that queries × gallery stays below a limit.
The gallery is always whole, so no score gets easier. The page says where queries were sampled.

Shapes: Q queries that have a positive, q a sample of them, S statistics.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmrl.errors import InputError
from mmrl.evaluate.analysis import baselines, blocks, compression
from mmrl.evaluate.analysis.advice import Budget, advise
from mmrl.evaluate.analysis.bootstrap import Bootstrap
from mmrl.evaluate.analysis.task import Task
from mmrl.evaluate.directions import CROSS_MODAL, modalities
from mmrl.evaluate.ranking.ranks import KS, PerQuery, rank_both, rank_queries
from mmrl.evaluate.sets import Embedded

STEPS = 5
# Limits for a step's sample of queries: pairs of query and gallery row, queries at least and at most.
_BASELINE_LIMITS = {"pairs": 1 << 28, "least": 1000, "most": 10_000}
_COMPRESSION_LIMITS = {"pairs": 1 << 26, "least": 500, "most": 4000}

Ranks = dict[int, Tensor]
"""{dim: rank_Q}"""


@dataclass
class Analysis:
    """The results for one set."""

    tasks: dict[str, Task]
    ranked: dict[str, dict[int, PerQuery]]
    """{direction: {dim: metrics of each query}} of the evaluated model, all queries."""
    json: dict[str, Any] = field(default_factory=dict)
    """The entry "analysis" of retrieval.json."""


@dataclass(frozen=True)
class _Sample:
    """Queries of one direction that have a positive."""

    row_q: Tensor
    task: Task
    ranks: Ranks
    """The ranks of the evaluated model's prefixes."""
    bootstrap: Bootstrap


def tasks_of(embedded: Embedded) -> dict[str, Task]:
    """{direction: task} of the two cross-modal directions; of one tower the direction from first to second members, and
    none if there are none."""
    rows = {"image": (embedded.image_ND, embedded.image_group_N), "text": (embedded.text_MD, embedded.text_group_M)}
    if len(embedded.sides) == 2:
        compared = {direction: [rows[one] for one in modalities(direction)] for direction in CROSS_MODAL}
    else:
        seconds = {side: (x_SD, embedded.image_group_N[row_S]) for side, (x_SD, row_S) in embedded.second.items()}
        compared = {f"{side}_to_{side}": [rows[side], gallery] for side, gallery in seconds.items()}
    return {
        direction: Task(direction, query_QD, gallery_GD, query_group_Q, gallery_group_G)
        for direction, ((query_QD, query_group_Q), (gallery_GD, gallery_group_G)) in compared.items()
    }


def analyse(
    embedded: Embedded,
    dims: Sequence[int],
    budget: Budget,
    vectors: int,
    others: Mapping[str, Embedded] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Analysis:
    """Runs all steps.

    Args:
        vectors: the number of vectors for which the advice computes memory.
        others: the same set embedded by baseline models (`--compare`).
        on_step: called with 1 after each of the STEPS, for a progress bar.

    Raises:
        InputError: a baseline model read other samples; no query has a positive.
    """
    for name, other in (others or {}).items():
        if other.keys != embedded.keys or other.captions != embedded.captions:
            raise InputError(f"compare: {name} read other samples than the evaluated model; queries cannot be paired.")
    dims, ks = sorted(dims), sorted({*KS, budget.k})
    tasks = tasks_of(embedded)
    if len(tasks) == 2:
        both = rank_both(embedded.image_ND, embedded.text_MD, embedded.image_group_N, embedded.text_group_M, dims)
        ranked = dict[str, dict[int, PerQuery]](zip(CROSS_MODAL, both, strict=True))
    else:
        ranked = {
            name: rank_queries(one.query_QD, one.gallery_GD, one.query_group_Q, one.gallery_group_G, dims)
            for name, one in tasks.items()
        }
    result = Analysis(tasks, ranked)
    for step in (
        lambda: {"intervals": _intervals(result, ks)},
        lambda: _baselines(result, dims, ks, budget, others or {}),
        lambda: _compression(result, dims, budget, vectors),
        lambda: {"other_direction": _compression(result, dims, budget.reversed, vectors)} if len(tasks) == 2 else {},
        lambda: _blocks(result, dims, budget),
    ):
        result.json |= step()
        if on_step:
            on_step(1)
    return result


def _hits(rank_Q: Tensor, ks: Sequence[int]) -> Tensor:
    """(Q, len(ks)) of 0 and 1."""
    return torch.stack([rank_Q <= k for k in ks], dim=1).double()


def _mean_hits(draws: Sequence[Tensor], ks: Sequence[int]) -> Tensor:
    """`_hits` averaged over several draws of ranks."""
    return torch.stack([_hits(rank_Q, ks) for rank_Q in draws]).mean(0)


def _scores(bootstrap: Bootstrap, draws_of: Mapping[int, Sequence[Tensor]], ks: Sequence[int]) -> dict[str, Any]:
    """{dim: {"R@1": {value, low, high}, …}}, the widest dim first. Several draws of ranks are averaged per query."""
    dims = sorted(draws_of, reverse=True)
    flat = iter(bootstrap.intervals(torch.cat([_mean_hits(draws_of[dim], ks) for dim in dims], dim=1)))
    return {str(dim): {f"R@{k}": next(flat).as_json() for k in ks} for dim in dims}


def _intervals(result: Analysis, ks: Sequence[int]) -> dict[str, Any]:
    """{direction: {dim: {"R@1": …}}}, over all queries."""
    samples = {direction: _sample(result, direction) for direction in result.tasks}
    return {
        direction: _scores(sample.bootstrap, {dim: [rank_Q] for dim, rank_Q in sample.ranks.items()}, ks)
        for direction, sample in samples.items()
    }


def _sample(result: Analysis, direction: str, limits: Mapping[str, int] | None = None) -> _Sample:
    """As many queries of a direction as the limits allow; by default all."""
    task, ranked = result.tasks[direction], result.ranked[direction]
    query_Q = next(iter(ranked.values())).query_Q
    row_q = query_Q if limits is None else task.sample_queries(**limits)
    index_q = torch.searchsorted(query_Q, row_q)
    ranks = {dim: one.rank_Q[index_q] for dim, one in ranked.items()}
    return _Sample(row_q, task.select_queries(row_q), ranks, Bootstrap(task.query_group_Q[row_q]))


def _baselines(
    result: Analysis, dims: Sequence[int], ks: Sequence[int], budget: Budget, others: Mapping[str, Embedded]
) -> dict[str, Any]:
    """The scores of each baseline, and the paired difference of the evaluated model to it, at each dim."""
    scores, paired, count = {}, {}, 0
    for direction in result.tasks:
        sample = _sample(result, direction, _BASELINE_LIMITS)
        count = max(count, len(sample.row_q))
        ranks = baselines.baseline_ranks(sample.task, dims)
        for name, other in others.items():
            ranks |= _other_model_ranks(name, tasks_of(other)[direction].select_queries(sample.row_q), dims)
        scores[direction] = {method: _scores(sample.bootstrap, draws_of, ks) for method, draws_of in ranks.items()}
        ranks["full"] = {dim: [sample.ranks[max(dims)]] for dim in sample.ranks}
        paired[direction] = {
            method: _paired_differences(sample.bootstrap, sample.ranks, draws_of, budget.k)
            for method, draws_of in ranks.items()
        }
    return {"baselines": scores, "paired": paired, "baseline_queries": count}


def _paired_differences(
    bootstrap: Bootstrap, ranks: Ranks, draws_of: Mapping[int, Sequence[Tensor]], k: int
) -> dict[str, Any]:
    """R@k of the evaluated model minus that of a baseline, at each dim, over the same queries."""
    dims = sorted(draws_of, reverse=True)
    model_QS = torch.cat([_hits(ranks[dim], [k]) for dim in dims], dim=1)
    baseline_QS = torch.cat([_mean_hits(draws_of[dim], [k]) for dim in dims], dim=1)
    differences = bootstrap.differences(model_QS, baseline_QS)
    return {
        str(dim): {"lead": difference.as_json(), "p": bootstrap.paired_p(model_QS[:, s], baseline_QS[:, s])}
        for s, (dim, difference) in enumerate(zip(dims, differences, strict=True))
    }


def _other_model_ranks(name: str, task: Task, dims: Sequence[int]) -> dict[str, dict[int, list[Tensor]]]:
    """Ranks of a baseline model's prefixes and of PCA of its full vector, at the dims that it has."""
    dims = [dim for dim in dims if dim <= task.dim]
    if not dims:
        return {}
    prefixes = {dim: [rank_Q] for dim, rank_Q in task.ranks(dims).items()}
    return {name: prefixes, f"{name}, PCA": baselines.pca_ranks(task, dims)}


def _compression(result: Analysis, dims: Sequence[int], budget: Budget, vectors: int) -> dict[str, Any]:
    """All compression options in the budget's direction, and the advice derived from them."""
    sample = _sample(result, budget.direction, _COMPRESSION_LIMITS)
    task, bootstrap = sample.task, sample.bootstrap
    options = compression.measure(task, dims, budget.k)
    missing = compression.not_measured(len(task.gallery_GD))
    recalls = bootstrap.intervals(torch.stack([option.rank_Q <= budget.k for option in options], dim=1).double())
    lost = budget.lost(bootstrap, options)
    on_front = set()
    for staged in (False, True):
        indices = [n for n, o in enumerate(options) if bool(o.candidates) == staged]
        points = [(options[n].bytes, recalls[n].value) for n in indices]
        on_front |= {indices[n] for n in compression.front(points)}
    listed = [option.as_json(recalls[n], lost[n]) | {"front": n in on_front} for n, option in enumerate(options)]
    return {
        "compression": {
            "direction": budget.direction,
            "metric": f"R@{budget.k}",
            "queries": len(task.query_QD),
            "all_queries": len(result.ranked[budget.direction][max(dims)].query_Q),
            "gallery": len(task.gallery_GD),
            "product_quantisation": missing.get("pq", "measured"),
            "not_measured": missing,
            "options": listed,
        },
        "advice": advise(options, budget, bootstrap, vectors),
    }


def _blocks(result: Analysis, dims: Sequence[int], budget: Budget) -> dict[str, Any]:
    sample = _sample(result, budget.direction, _COMPRESSION_LIMITS)
    every = _sample(result, budget.direction)
    found_from = blocks.groups_found_from(every.task.query_group_Q, every.ranks, budget.k)
    return {
        "blocks": blocks.block_scores(sample.task, sample.ranks, sample.bootstrap, budget.k),
        "dropping": blocks.droppable_dims(sample.task, max(dims), sample.bootstrap, budget.drop, budget.k),
        "found_from": {
            "items": len(found_from),
            **{str(dim): int((found_from == dim).sum()) for dim in sorted(dims)},
            "never": int((found_from == 0).sum()),
        },
    }
