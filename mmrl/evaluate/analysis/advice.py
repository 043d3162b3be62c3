"""Which dim and precision do I need? The smallest within a budget, how sure that is, and what it saves.

A budget is how much recall may be lost against the full vector in float32, such as `recall_drop=1%` (a hundredth of
what the full vector finds) or `recall_drop=0.5pp` (percentage points).
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mmrl.errors import InputError
from mmrl.evaluate.analysis.bootstrap import Bootstrap, Interval
from mmrl.evaluate.analysis.compression import Option
from mmrl.evaluate.analysis.task import DIRECTIONS

_SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9}
# So many times the queries are worth telling of.
_MANY_TIMES = 100
_FEW_QUERIES = "Few queries make wide intervals, and so confirm longer vectors than are needed."
_UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB")


@dataclass(frozen=True)
class Budget:
    """How much may be lost, of which score."""

    drop: float = 0.01
    relative: bool = True
    k: int = 10
    direction: str = "text_to_image"

    @property
    def words(self) -> str:
        """For headings: "1 % of R@10, text→image"."""
        return f"{self.amount} of R@{self.k}, {DIRECTIONS[self.direction]}"

    @property
    def reversed(self) -> "Budget":
        """The same of the other direction."""
        return replace(self, direction=next(way for way in DIRECTIONS if way != self.direction))

    @property
    def amount(self) -> str:
        """1 %, or 0.5 points."""
        return f"{100 * self.drop:g} {self.unit}"

    @property
    def unit(self) -> str:
        """Of what is lost."""
        return "%" if self.relative else "points"

    def lost(self, bootstrap: Bootstrap, full_Q: Tensor, other_QS: Tensor) -> list[Interval]:
        """How much of the score each column of ranks loses against the full vector's, in the budget's own unit."""
        return bootstrap.differences(full_Q[:, None] <= self.k, other_QS <= self.k, relative=self.relative)


def parse_budget(text: str) -> Budget:
    """`recall_drop=1%[,metric=R@5][,direction=image_to_text]`.

    Raises:
        InputError: anything else.
    """
    allowed = "recall_drop=1%, or recall_drop=0.5pp, with metric=R@K and direction=text_to_image after commas"
    given = {}
    for part in text.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or key not in ("recall_drop", "metric", "direction") or key in given:
            raise InputError(f"budget: {part.strip()!r} is not understood; write it as {allowed}.")
        given[key] = value
    if "recall_drop" not in given:
        raise InputError(f"budget: recall_drop is missing from {text!r}; write it as {allowed}.")
    amount = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*(%|pp)", given["recall_drop"])
    if not amount or not 0 <= float(amount[1]) <= 100:
        raise InputError(f"budget: recall_drop={given['recall_drop']!r} is no share such as 1% or 0.5pp, up to 100.")
    metric = re.fullmatch(r"R@([1-9]\d*)", given.get("metric", "R@10"))
    if not metric:
        raise InputError(f"budget: metric={given['metric']!r}: only recall has a budget; write metric=R@10.")
    direction = given.get("direction", "text_to_image")
    if direction not in DIRECTIONS:
        raise InputError(f"budget: direction={direction!r}; allowed are {', '.join(DIRECTIONS)}.")
    return Budget(float(amount[1]) / 100, amount[2] == "%", int(metric[1]), direction)


def parse_count(text: str) -> int:
    """100M, 2.5B, 80K, 1_000_000 or 1000000 -> a number of vectors.

    Raises:
        InputError: anything else, or less than one.
    """
    match = re.fullmatch(r"(\d+(?:\.\d*)?)([KMBG]?)", text.strip().upper().replace("_", ""))
    count = round(float(match[1]) * _SUFFIXES[match[2]]) if match else 0
    if count < 1:
        raise InputError(f"vectors: {text!r} is no number of vectors such as 100M, 2.5B or 80000.")
    return count


def short_count(count: int) -> str:
    """100_000_000 -> 100M."""
    for suffix, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size:
            return f"{count / size:.4g}{suffix}"
    return str(count)


def size_words(count: float) -> str:
    """A number of bytes in decimal units: 204.8 GB."""
    step = 0
    while count >= 999.5 and step < len(_UNITS) - 1:
        count, step = count / 1000, step + 1
    return f"{count:.3g} {_UNITS[step]}" if count < 999.5 else f"{count:,.0f} {_UNITS[step]}"


def advise(options: Sequence[Option], budget: Budget, bootstrap: Bootstrap, vectors: int) -> dict[str, Any]:
    """What the page's headline says, as JSON.

    A dim counts only where every wider one in the same precision is within, too.

    Returns: "dim": the smallest dim in float32; "smallest": the smallest dim and precision in one search; "sure": the
        smallest of those whose whole interval is within the budget, or None; "two_stage": the least memory where the
        full vector reranks a short list, or None. Each with its bytes, recall, what is lost with its interval, and what
        `vectors` of it take. The full vector in float32 is among the options, so the first two always exist.
    """
    full_dim = max(option.dim for option in options)
    full = next(o for o in options if (o.dim, o.precision, o.candidates) == (full_dim, "fp32", 0))
    rank_QS = torch.stack([option.rank_Q for option in options], dim=1)
    judged = list(zip(options, budget.lost(bootstrap, full.rank_Q, rank_QS), strict=True))
    single = [(o, lost) for o, lost in judged if not o.candidates]

    def least(found: Sequence[tuple[Option, Interval]], within: Callable[[Interval], bool]) -> dict[str, Any] | None:
        inside = _down_to(found, within)
        if not inside:
            return None
        option, lost = min(inside, key=lambda pair: (pair[0].bytes, pair[0].candidates, pair[1].value))
        return _as_json(option, lost, full, budget, bootstrap, vectors)

    slack = 1e-9
    by_estimate: Callable[[Interval], bool] = lambda lost: lost.value <= budget.drop + slack  # noqa: E731
    surely: Callable[[Interval], bool] = lambda lost: lost.high <= budget.drop + slack  # noqa: E731
    return {
        "budget": {
            "recall_drop": budget.drop,
            "relative": budget.relative,
            "metric": f"R@{budget.k}",
            "direction": budget.direction,
        },
        "vectors": vectors,
        "queries": len(full.rank_Q),
        "items": bootstrap.items,
        "full": _as_json(full, Interval(0.0, 0.0, 0.0), full, budget, bootstrap, vectors),
        "dim": least([(o, lost) for o, lost in single if o.precision == "fp32"], by_estimate),
        "smallest": least(single, by_estimate),
        "sure": least([(o, lost) for o, lost in single if o is not full], surely),
        "two_stage": least([(o, lost) for o, lost in judged if o.candidates], by_estimate),
    }


def _down_to(
    found: Sequence[tuple[Option, Interval]], within: Callable[[Interval], bool]
) -> list[tuple[Option, Interval]]:
    """Those that are within, and so is every wider dim in the same precision: one dim's luck does not count."""
    inside, ended = [], set()
    for option, lost in sorted(found, key=lambda pair: -pair[0].dim):
        kind = (option.precision, option.candidates)
        if not within(lost):
            ended.add(kind)
        elif kind not in ended:
            inside.append((option, lost))
    return inside


def _as_json(
    option: Option, lost: Interval, full: Option, budget: Budget, bootstrap: Bootstrap, vectors: int
) -> dict[str, Any]:
    recall = bootstrap.intervals((option.rank_Q <= budget.k).double()[:, None])[0]
    return {
        "dim": option.dim,
        "precision": option.precision,
        "candidates": option.candidates,
        "bytes": option.bytes,
        "rerank_bytes": option.rerank_bytes,
        "recall": recall.as_json(),
        "lost": lost.as_json(),
        "within_budget_surely": lost.high <= budget.drop + 1e-9,
        "memory": option.bytes * vectors,
        "saved": (full.bytes - option.bytes) * vectors,
        "times_smaller": full.bytes / option.bytes,
    }


def other_words(analysis: Mapping[str, Any]) -> str:
    """The advice in the other direction, in a line."""
    advice = analysis["other_direction"]["advice"]
    said = words(advice)
    return f"The other way round, {DIRECTIONS[budget_of(advice).direction]}: {said.headline} {said.evidence}"


@dataclass(frozen=True)
class Words:
    """The advice in sentences, for the screen, the page and Markdown alike."""

    headline: str
    evidence: str
    certainty: str
    saving: str
    others: list[str]
    """The other answers: confirmed ones, float32 alone, two stages."""

    @property
    def lines(self) -> list[str]:
        """All of them, the headline first."""
        return [self.headline, f"{self.evidence} {self.certainty}", self.saving, *self.others]


def words(advice: Mapping[str, Any]) -> Words:
    """What `advise` found, in sentences."""
    chosen, full, budget = advice["smallest"], advice["full"], budget_of(advice)
    metric, where, count = f"R@{budget.k}", DIRECTIONS[budget.direction], advice["vectors"]
    sure, certain = advice["sure"] or full, chosen["within_budget_surely"]
    if not full["recall"]["value"]:
        headline = f"The full vector answers no query within the first {budget.k}: there is nothing to choose by."
    elif chosen["bytes"] == full["bytes"]:
        headline = f"Nothing below all {full['dim']} numbers in fp32 keeps within the budget."
    elif certain:
        headline = f"Keep {_kept(chosen, full)}."
    else:
        least = "nothing below the full vector" if sure is full else _kept(sure, full)
        headline = f"Probably {_kept(chosen, full)} will do; these queries confirm {least}."
    evidence = (
        f"{metric}, {where}, is {_percent(chosen['recall']['value'])} instead of {_percent(full['recall']['value'])}: "
        f"{_lost(chosen['lost']['value'], budget)} lost (95 % interval {_range(chosen['lost'], budget)}) where "
        f"{budget.amount} may be."
    )
    if certain:
        certainty = f"The whole interval is within the budget, so {_asked(advice)} confirm it."
    else:
        times = queries_to_be_sure(Interval(**chosen["lost"]), budget)
        certainty = f"The interval reaches beyond the budget, so {_asked(advice)} are too few to confirm it"
        certainty += f"; if the estimate is right, about {_rounded(times):,} times as many would."
        if times > _MANY_TIMES:
            certainty = f"The estimate is so near the limit that {_asked(advice)} cannot tell on which side it lies."
    saving = (
        f"{short_count(count)} vectors take {size_words(chosen['memory'])} instead of {size_words(full['memory'])}: "
        f"{_bytes(chosen['bytes'])} each instead of {full['bytes']:,}, {chosen['times_smaller']:.3g} times less."
    )
    return Words(headline, evidence, certainty, saving, _others(advice, budget))


def _others(advice: Mapping[str, Any], budget: Budget) -> list[str]:
    chosen, sure, dim, staged = (advice[name] for name in ("smallest", "sure", "dim", "two_stage"))
    lines = []
    if sure is None:
        lines.append(f"Confirmed by these queries: nothing below the full vector in fp32. {_FEW_QUERIES}")
    elif sure != chosen:
        lines.append(f"Confirmed by these queries: {_named(sure, budget)}. {_FEW_QUERIES}")
    if dim != chosen:
        lines.append(f"If vectors stay float32: {_named(dim, budget)}.")
    if staged and staged["bytes"] < chosen["bytes"]:
        lines.append(
            f"In two stages: {_named(staged, budget)}; {staged['candidates']} candidates are reranked by full vectors "
            f"in fp16, {staged['rerank_bytes']:,} bytes each, in memory or on disk."
        )
    return lines


def _kept(answer: Mapping[str, Any], full: Mapping[str, Any]) -> str:
    """ "32 of 256 numbers as int8"."""
    share = f"all {full['dim']}" if answer["dim"] == full["dim"] else f"{answer['dim']} of {full['dim']}"
    return f"{share} numbers as {answer['precision']}"


def _named(answer: Mapping[str, Any], budget: Budget) -> str:
    code = f"{answer['dim']}-d {answer['precision']}, {_bytes(answer['bytes'])}"
    return f"{code}, {_lost(answer['lost']['value'], budget)} lost ({_range(answer['lost'], budget)})"


def _bytes(count: int) -> str:
    return f"{count:,} byte{'' if count == 1 else 's'}"


def budget_of(advice: Mapping[str, Any]) -> Budget:
    kept = advice["budget"]
    return Budget(kept["recall_drop"], kept["relative"], int(kept["metric"][2:]), kept["direction"])


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _lost(share: float, budget: Budget) -> str:
    # Never "-0.0".
    return f"{round(100 * share, 1) + 0.0:.1f}".replace("-", "−") + f" {budget.unit}"


def _range(lost: Mapping[str, float], budget: Budget) -> str:
    low, high = (round(100 * lost[end], 1) + 0.0 for end in ("low", "high"))
    return f"{low:.1f} to {high:.1f} {budget.unit}".replace("-", "−")


def _asked(advice: Mapping[str, Any]) -> str:
    """ "1,465 queries", or "961 queries of 217 items" where an item has several."""
    queries, items = advice["queries"], advice["items"]
    return f"{queries:,} queries" + (f" of {items:,} items" if items < queries else "")


def _rounded(times: float) -> float:
    """To two figures, upwards."""
    return math.ceil(times * 10) / 10 if times < 10 else math.ceil(times)


def queries_to_be_sure(lost: Interval, budget: Budget) -> float:
    """About how many times as many queries would put the whole interval within the budget, if the estimate is right;
    infinite where it lies on the limit."""
    room, half = budget.drop - lost.value, lost.high - lost.value
    return (half / room) ** 2 if room > 0 else math.inf
