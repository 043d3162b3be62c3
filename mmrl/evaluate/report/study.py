"""What `mmrl eval` does beyond the plain scores: it analyses each set, says the advice, and writes the report."""

import datetime
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mmrl.data.sequential import PictureReader
from mmrl.distributed import comm
from mmrl.errors import InputError
from mmrl.evaluate import sets
from mmrl.evaluate.analysis.advice import Budget, other_words, parse_budget, parse_count, words
from mmrl.evaluate.analysis.baselines import NAMES
from mmrl.evaluate.analysis.run import CHAPTERS, Analysis, analyse
from mmrl.evaluate.report import stored_ranks
from mmrl.evaluate.report import write as report
from mmrl.evaluate.report.sections import SetPart
from mmrl.evaluate.sets import Embedded
from mmrl.inference.evaluated import Evaluated, open_encoder
from mmrl.model.manifest import find, read_manifest
from mmrl.version import __version__

_VECTORS = "1M"


class Study:
    """Of one model, on several sets."""

    def __init__(
        self,
        model: str,
        encoder: Evaluated,
        dims: Sequence[int],
        budget: str | None = None,
        vectors: str | None = None,
        compare: Sequence[str] = (),
    ) -> None:
        """Reads the options and opens the other models, before long work starts.

        Raises:
            InputError: a budget or a number that is not understood, another model that is not there.
        """
        self.model, self.encoder, self.dims = model, encoder, dims
        self.budget = parse_budget(budget) if budget else Budget()
        self.vectors = parse_count(vectors or _VECTORS)
        self.others = {}
        for other in compare:
            name = _short_name(other)
            if name in self.others or name in NAMES:
                name = other
            if name in self.others:
                raise InputError(f"compare: {other} is given twice.")
            self.others[name] = open_encoder(other)
            self.others[name].model.to(comm.world().device)
        self.steps = CHAPTERS + len(self.others)
        """What `take` tells `on_step` in all."""
        self.parts: list[SetPart] = []
        self.embedded: dict[str, tuple[Embedded, Analysis]] = {}

    def take(
        self,
        name: str,
        reader: PictureReader,
        embedded: Embedded,
        result: dict[str, Any],
        captions: int | None,
        on_step: Callable[[int], None],
    ) -> None:
        """Analyses a set; its part of retrieval.json gets "analysis". All processes embed by the other models, the main
        one analyses."""
        others = {}
        for label, other in self.others.items():
            others[label] = sets.embed(reader, other.model, other.image_spec, other.tokenise, captions=captions)
            on_step(1)
        if not comm.world().is_rank_0:
            return
        analysis = analyse(embedded, self.dims, self.budget, self.vectors, others, on_step)
        result["analysis"] = analysis.json
        self.embedded[name] = embedded, analysis
        self.parts.append(report.part_of(name, result, analysis, embedded, reader))

    def say(self, console: Console) -> None:
        """The advice, set by set."""
        for part in self.parts:
            lines = words(part.analysis["advice"]).lines
            console.print(f"{part.name}, {self.budget.words} may be lost: {lines[0]}", style="bold", highlight=False)
            for line in (*lines[1:], other_words(part.analysis)):
                console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)

    def write(self, folder: Path, results: Mapping[str, Mapping[str, Any]]) -> Path | None:
        """Writes the report of all `results`, by set; returns the page's path, or None where nothing was analysed."""
        if not self.parts:
            return None
        folder.mkdir(parents=True, exist_ok=True)
        for name, (embedded, analysis) in self.embedded.items():
            report.write_items(folder / f"{name}.items.jsonl", embedded, analysis, self.budget.k)
        stored_ranks.write(folder, self.embedded)
        labelled = {name: one for name, one in results.items() if "classification" in one["chance"]}
        return report.write_page(folder, f"{self.model} at every dim", self.parts, labelled, self._about())

    def _about(self) -> dict[str, str]:
        nested = ", ".join(map(str, self.encoder.nested_dims))
        spec = self.encoder.image_spec
        about = {
            "Model": self.model,
            "Vectors": f"{self.encoder.dim} numbers; trained at {nested}",
            "Pictures": f"{spec.width} × {spec.height} pixels",
            "Weights": _weights(self.model),
            "ONNX graphs": self.encoder.graphs,
            "Compared with": ", ".join(self.others),
            "Software": f"mmrl {__version__}, torch {torch.__version__}",
            "Written": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        }
        return {key: value for key, value in about.items() if value}


def _weights(model: str) -> str:
    """The hash of what a checkpoint or an export holds."""
    if model.startswith("open_clip:"):
        return ""
    folder = find(model)
    return f"{folder.resolve().name}, sha256 {read_manifest(folder)['weights_sha256'][:16]}…"


def _short_name(model: str) -> str:
    return Path(model).name if Path(model).exists() else model
