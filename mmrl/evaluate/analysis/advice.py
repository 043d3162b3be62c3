"""Which dim and codec are needed? The smallest within a budget, its confidence interval, and the memory it saves.

A budget is the permitted loss of recall compared with the full vector in fp32: `recall_drop=1%` (relative to the full
vector's recall) or `recall_drop=0.5pp` (percentage points).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from mmrl.codecs.table import build_commands
from mmrl.errors import InputError
from mmrl.evaluate.analysis.bootstrap import Bootstrap, Interval
from mmrl.evaluate.analysis.compression import Option
from mmrl.evaluate.directions import ARROWS, CROSS_MODAL, SAME_MODAL

_SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9}
_ROUNDING = 1e-9
_UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB")


@dataclass(frozen=True)
class Budget:
    """The permitted loss of recall@k in one direction."""

    drop: float = 0.01
    relative: bool = True
    k: int = 10
    direction: str = "text_to_image"

    @property
    def label(self) -> str:
        """ "1 % of R@10, text→image"."""
        return f"{100 * self.drop:g} {self.unit} of R@{self.k}, {ARROWS[self.direction]}"

    @property
    def reversed(self) -> "Budget":
        """The same budget in the other direction between images and texts."""
        return replace(self, direction=next(one for one in CROSS_MODAL if one != self.direction))

    @property
    def unit(self) -> str:
        return "%" if self.relative else "points"

    def lost(self, bootstrap: Bootstrap, options: Sequence[Option]) -> list[Interval]:
        """The loss of each option compared with the full vector in fp32, as a fraction in the budget's unit."""
        full_Q1 = full_option(options).rank_Q[:, None]
        rank_QS = torch.stack([option.rank_Q for option in options], dim=1)
        return bootstrap.differences(full_Q1 <= self.k, rank_QS <= self.k, relative=self.relative)


def parse_budget(text: str, directions: Sequence[str] = CROSS_MODAL) -> Budget:
    """Parses `recall_drop=1%[,metric=R@5][,direction=image_to_text]`. Of the allowed `directions` the last is the
    default. Raises InputError: the text is not of this form."""
    allowed = "recall_drop=1%, or recall_drop=0.5pp, with metric=R@K and direction=text_to_image after commas"
    given = {}
    for part in text.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or key not in ("recall_drop", "metric", "direction") or key in given:
            raise InputError(f"budget: {part.strip()!r} is not understood; write {allowed}.")
        given[key] = value
    if "recall_drop" not in given:
        raise InputError(f"budget: recall_drop is missing from {text!r}; write {allowed}.")
    amount = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*(%|pp)", given["recall_drop"])
    if not amount or not 0 <= float(amount[1]) <= 100:
        raise InputError(
            f"budget: recall_drop={given['recall_drop']!r} is not a number up to 100 with % or pp, e.g. 1% or 0.5pp."
        )
    metric = re.fullmatch(r"R@([1-9]\d*)", given.get("metric", "R@10"))
    if not metric:
        raise InputError(f"budget: metric={given['metric']!r} is not a recall; write e.g. metric=R@10.")
    direction = given.get("direction", directions[-1])
    if direction not in directions:
        raise InputError(f"budget: direction={direction!r} is not analysed; allowed: {', '.join(directions)}.")
    return Budget(float(amount[1]) / 100, amount[2] == "%", int(metric[1]), direction)


def parse_count(text: str) -> int:
    """Parses a number of vectors: 100M, 2.5B, 80K, 1_000_000 or 1000000. Raises InputError: it is not a number, or less
    than one."""
    match = re.fullmatch(r"(\d+(?:\.\d*)?)([KMBG]?)", text.strip().upper().replace("_", ""))
    count = round(float(match[1]) * _SUFFIXES[match[2]]) if match else 0
    if count < 1:
        raise InputError(f"vectors: {text!r} is not a number of vectors; write e.g. 100M, 2.5B or 80000.")
    return count


def format_count(count: int) -> str:
    """100_000_000 -> 100M."""
    for suffix, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size:
            return f"{count / size:.4g}{suffix}"
    return str(count)


def format_bytes(count: float) -> str:
    """A number of bytes in decimal units: 205 GB."""
    step = 0
    while count >= 999.5 and step < len(_UNITS) - 1:
        count, step = count / 1000, step + 1
    return f"{count:.3g} {_UNITS[step]}" if count < 999.5 else f"{count:,.0f} {_UNITS[step]}"


def advise(options: Sequence[Option], budget: Budget, bootstrap: Bootstrap, vectors: int) -> dict[str, Any]:
    """The smallest options within the budget, as JSON.

    A dim counts only if every larger dim of the same codec is within the budget, too.

    Returns: "dim": the smallest dim in fp32; "smallest": the smallest dim and codec in one stage; "sure": the smallest
        of those whose whole interval is within the budget, or None; "two_stage": the least memory where full vectors
        rerank a list of candidates, or None. Each with its bytes, recall, loss with interval, memory for `vectors`
        vectors, and the commands that build it. The full vector in fp32 is among the options, so the first two always
        exist.
    """
    full = full_option(options)
    losses = list(zip(options, budget.lost(bootstrap, options), strict=True))
    single = [(o, lost) for o, lost in losses if not o.candidates]

    def to_json(option: Option, lost: Interval) -> dict[str, Any]:
        recall = bootstrap.intervals((option.rank_Q <= budget.k).double()[:, None])[0]
        searched = "--second" if budget.direction in SAME_MODAL else "--texts" * (budget.direction == "image_to_text")
        return option.as_json(recall, lost) | {
            "within_budget_surely": lost.high <= budget.drop + _ROUNDING,
            "memory": option.bytes * vectors,
            "saved": (full.bytes - option.bytes) * vectors,
            "times_smaller": full.bytes / option.bytes,
            "commands": build_commands(full.dim, option.dim, option.precision, option.candidates, searched),
        }

    def smallest(measured: Sequence[tuple[Option, Interval]], bound: str = "value") -> dict[str, Any] | None:
        """The smallest option whose loss, or the upper end of its interval, is within the budget."""
        inside, ended = [], set()
        for option, lost in sorted(measured, key=lambda pair: -pair[0].dim):
            kind = (option.precision, option.candidates)
            if getattr(lost, bound) > budget.drop + _ROUNDING:
                ended.add(kind)
            elif kind not in ended:
                inside.append((option, lost))
        inside.sort(key=lambda pair: (pair[0].bytes, pair[0].candidates, pair[1].value))
        return to_json(*inside[0]) if inside else None

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
        "full": to_json(full, Interval(0.0, 0.0, 0.0)),
        "dim": smallest([(o, lost) for o, lost in single if o.precision == "fp32"]),
        "smallest": smallest(single),
        "sure": smallest([(o, lost) for o, lost in single if o is not full], "high"),
        "two_stage": smallest([(o, lost) for o, lost in losses if o.candidates]),
    }


def full_option(options: Sequence[Option]) -> Option:
    """The full vector in fp32, in one stage."""
    full_dim = max(option.dim for option in options)
    return next(o for o in options if (o.dim, o.precision, o.candidates) == (full_dim, "fp32", 0))


def advice_lines(advice: Mapping[str, Any]) -> tuple[str, str]:
    """The result of `advise` in two lines: the smallest option within the budget, and the smallest that these queries
    confirm, i.e. whose whole interval is within it."""
    chosen, sure, full, budget = advice["smallest"], advice["sure"], advice["full"], budget_of(advice)
    if not full["recall"]["value"]:
        return "no recommendation", f"the full vector finds no positive among the first {budget.k} of any query"
    if chosen["bytes"] == full["bytes"]:
        return f"the full vector, {option_name(full)}", f"no smaller dim or codec loses at most {budget.label}"
    confirmed = f"confirmed to lose at most {budget.label}"
    if sure == chosen:
        return describe(chosen, advice), f"{confirmed}, at 95 %"
    if sure is None:
        return describe(chosen, advice), f"{confirmed}: only the full vector; more queries confirm smaller ones"
    return describe(chosen, advice), f"{confirmed}: {describe(sure, advice)}"


def describe(answer: Mapping[str, Any], advice: Mapping[str, Any]) -> str:
    """ "64-d int8: 16x smaller, R@10 −0.6 % (−1.8…0.5 at 95 %, 1,465 queries)"."""
    lost, budget, queries = answer["lost"], budget_of(advice), f"{advice['queries']:,} queries"
    if advice["items"] < advice["queries"]:
        queries += f" of {advice['items']:,} items"
    change, least, most = (format_points(-lost[key]) for key in ("value", "high", "low"))
    sign = "±" if change == "0.0" else "" if change.startswith("−") else "+"
    return (
        f"{option_name(answer)}: {answer['times_smaller']:.3g}x smaller, R@{budget.k} {sign}{change} {budget.unit} "
        f"({least}…{most} at 95 %, {queries})"
    )


def option_name(option: Mapping[str, Any]) -> str:
    """64-d int8, or 64-d binary + 50 reranked."""
    staged = f" + {option['candidates']} reranked" if option["candidates"] else ""
    return f"{option['dim']}-d {option['precision']}{staged}"


def format_points(share: float) -> str:
    """A share, or a difference of shares, in % with a typographic minus; never "−0.0"."""
    return f"{round(100 * share, 1) + 0.0:.1f}".replace("-", "−")


def budget_of(advice: Mapping[str, Any]) -> Budget:
    budget = advice["budget"]
    return Budget(budget["recall_drop"], budget["relative"], int(budget["metric"][2:]), budget["direction"])
