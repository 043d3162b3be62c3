"""The analysis part of `mmrl eval`: analyses each set, prints the advice and writes the report."""

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mmrl.data.index import printable
from mmrl.data.sequential import ImageReader
from mmrl.distributed import comm
from mmrl.errors import InputError
from mmrl.evaluate import sets
from mmrl.evaluate.analysis.advice import Budget, advice_lines, parse_budget, parse_count
from mmrl.evaluate.analysis.baselines import NAMES
from mmrl.evaluate.analysis.run import STEPS, Analysis, analyse, tasks_of
from mmrl.evaluate.directions import is_classification, main_directions, of_towers
from mmrl.evaluate.report.page import SetReport, render_page
from mmrl.evaluate.report.stored_ranks import write_ranks
from mmrl.evaluate.report.write import build_set_report, write_items
from mmrl.evaluate.sets import Embedded
from mmrl.inference.evaluated import EvaluatedEncoder, open_encoder
from mmrl.model.manifest import is_rotated, read_manifest
from mmrl.model.source import OpenClipModel, parse_model
from mmrl.output.console import print_line, without_secrets
from mmrl.output.files import write_atomic
from mmrl.version import __version__

_VECTORS = "1M"


class Study:
    """The analysis of one model on several sets."""

    def __init__(
        self,
        model: str,
        encoder: EvaluatedEncoder,
        dims: Sequence[int],
        budget: str | None = None,
        vectors: str | None = None,
        compare: Sequence[str] = (),
    ) -> None:
        """Parses the options and opens the baseline models, before anything is embedded. Raises InputError: a budget or
        a count that does not parse, a baseline model that does not exist or is given twice."""
        self.model, self.encoder, self.dims = model, encoder, dims
        directions = main_directions(of_towers(encoder.model.sides))
        self.budget = parse_budget(budget, directions) if budget else Budget(direction=directions[-1])
        self.vectors = parse_count(vectors or _VECTORS)
        self.others = {}
        for other in compare:
            name = _short_name(other)
            if name in self.others or name in NAMES:
                name = other
            if name in self.others:
                raise InputError(f"compare: {other} is given twice.")
            self.others[name] = open_encoder(other)
            if self.others[name].model.sides != encoder.model.sides:
                raise InputError(f"compare: {other} and {model} do not have the same towers.")
            self.others[name].model.to(comm.world().device)
        self.steps = STEPS + len(self.others)
        """The total that `analyse_set` passes to `on_step`."""
        self.reports: list[SetReport] = []
        self.analysed: dict[str, tuple[Embedded, Analysis]] = {}

    def can_analyse(self, embedded: Embedded, result: Mapping[str, Any]) -> bool:
        """Whether a set has the directions of the analysis: between images and texts or, of one tower, from the first
        to the second members."""
        tasks = tasks_of(embedded)
        return bool(tasks) and set(tasks) <= set(result["chance"])

    def analyse_set(
        self,
        name: str,
        shards: str,
        reader: ImageReader,
        embedded: Embedded,
        result: dict[str, Any],
        captions: int | None,
        on_step: Callable[[int], None],
    ) -> None:
        """Analyses a set and adds "analysis" to its entry in retrieval.json. All processes embed by the baseline
        models; rank 0 analyses."""
        others = {}
        for label, other in self.others.items():
            others[label] = sets.embed(reader, other, captions=captions)
            on_step(1)
        if not comm.world().is_rank_0:
            return
        analysis = analyse(embedded, self.dims, self.budget, self.vectors, others, on_step)
        result["analysis"] = analysis.json
        self.analysed[name] = embedded, analysis
        report = build_set_report(name, result, analysis, embedded, reader)
        self.reports.append(replace(report, shards=without_secrets(printable(shards))))

    def print_advice(self, console: Console, brief: bool) -> None:
        """Prints the advice in two lines: for the first set, or for each if not `brief`."""
        for report in self.reports[:1] if brief else self.reports:
            recommended, confirmed = advice_lines(report.analysis["advice"])
            print_line(console, f"{report.name}: {recommended}", style="bold")
            print_line(console, f"{report.name}, {confirmed}")

    def write_report(self, folder: Path, results: Mapping[str, Mapping[str, Any]]) -> Path | None:
        """Writes the report of all sets in `results`; returns the page's path, or None if no set was analysed."""
        if not self.reports:
            return None
        folder.mkdir(parents=True, exist_ok=True)
        for name, (embedded, analysis) in self.analysed.items():
            write_items(folder / f"{name}.items.jsonl", embedded, analysis, self.budget.k)
        write_ranks(folder, self.analysed)
        labelled = {name: one for name, one in results.items() if is_classification(one)}
        page = folder / "index.html"
        write_atomic(page, render_page(self.model, self.reports, labelled, self._about()))
        return page

    def _about(self) -> dict[str, str]:
        source, spec = parse_model(self.model), self.encoder.image_spec
        manifest = {} if isinstance(source, OpenClipModel) else read_manifest(source.folder)
        how = "rotated for" if is_rotated(manifest) else "trained at"
        about = {
            "Model": self.model,
            "Embedding": f"{self.encoder.dim} dims; {how} {', '.join(map(str, self.encoder.nested_dims))}",
            "Images": f"{spec.width} × {spec.height} pixels",
            "Weights": ""
            if isinstance(source, OpenClipModel)
            else f"{source.folder.resolve().name}, sha256 {manifest['weights_sha256'][:16]}…",
            "ONNX graphs": self.encoder.graphs,
            "Compared with": ", ".join(self.others),
            "Software": f"mmrl {__version__}, torch {torch.__version__}",
            "Written": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        }
        return {key: value for key, value in about.items() if value}


def _short_name(model: str) -> str:
    return Path(model).name if Path(model).exists() else model
