"""The report of a training run: the curves of each dim over the steps, for retrieval and classification sets."""

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from mmrl.evaluate.report.write import write_report

RETRIEVAL = {
    dim: {"image_to_text": {"R@10": i / 10}, "text_to_image": {"R@10": i / 20}} for i, dim in ((4, "8"), (2, "4"))
}


def retrieval(gain: float) -> dict[str, Any]:
    """A set whose R@10 is (0.4 + gain, 0.2 + gain) at 8 dims and (0.2 + gain, 0.1 + gain) at 4."""
    dims = {
        dim: {way: {metric: value + gain for metric, value in scores.items()} for way, scores in ways.items()}
        for dim, ways in RETRIEVAL.items()
    }
    chance = {way: {"R@10": 0.05} for way in ("image_to_text", "text_to_image")}
    return {"dims": dims, "num_images": 5, "num_texts": 6, "num_bad": 0, "chance": chance}


def accuracy(gain: float) -> dict[str, Any]:
    """A set of accuracy 0.3 + gain at 8 dims."""
    scores = {"classification": {"top1": 0.3 + gain, "top5": 1.0, "mean_per_class": 0.25}}
    chance = {"classification": {"top1": 0.2, "top5": 1.0, "mean_per_class": 0.2}}
    return {"dims": {"8": scores}, "num_images": 7, "num_classes": 5, "num_bad": 0, "chance": chance}


def evaluation(step: int, gain: float) -> dict[str, Any]:
    return {"step": step, "samples": step, "sets": {"val": retrieval(gain), "shop": accuracy(gain)}}


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """{file name: figure} of what is written."""
    written: dict[str, Figure] = {}
    save = Figure.savefig

    def saving(figure: Figure, path: Path, **options: Any) -> None:
        written[path.name] = figure
        save(figure, path, **options)

    monkeypatch.setattr(Figure, "savefig", saving)
    return written


def lines(figure: Figure, panel: int) -> dict[str, list[tuple[float, float]]]:
    """{label: points} of a panel's curves."""
    axes = figure.axes[panel]
    return {
        str(line.get_label()): [(float(x), round(float(y), 6)) for x, y in line.get_xydata()]  # pyright: ignore
        for line in axes.lines
    }


def test_each_dim_is_a_curve_over_the_steps(tmp_path: Path, figures: dict[str, Figure]) -> None:
    plot = write_report(tmp_path, "a run", [evaluation(0, 0.0), evaluation(50, 0.1), evaluation(100, 0.2)])
    assert plot.is_file()
    assert (tmp_path / "recall_by_step.png").read_bytes().startswith(b"\x89PNG")
    figure = figures["recall_by_step.png"]
    assert [axes.get_title() for axes in figure.axes] == ["val", "shop"]
    assert lines(figure, 0) == {"8-d": [(0, 30), (50, 40), (100, 50)], "4-d": [(0, 15), (50, 25), (100, 35)]}
    assert lines(figure, 1) == {"8-d": [(0, 30), (50, 40), (100, 50)]}
    text = (tmp_path / "report.md").read_text()
    assert "![recall by step](recall_by_step.png)" in text
    assert "| 8 | 60.0 | 40.0 |" in text  # of the last evaluation
    assert "7 images, 5 classes; zero-shot accuracy in %." in text
    assert "| 8 | 50.0 | 100.0 | 25.0 |" in text
    by_dim = figures["recall_by_dim.png"]
    assert [axes.get_title() for axes in by_dim.axes] == ["val (5 images)", "shop (7 images)"]
    assert lines(by_dim, 0)["text→image R@10"] == [(4, 30), (8, 40)]
    assert lines(by_dim, 0)["image→text R@10"] == [(4, 40), (8, 60)]
    assert lines(by_dim, 1)["top1"] == [(8, 50)]


def test_one_evaluation_has_no_curve(tmp_path: Path, figures: dict[str, Figure]) -> None:
    write_report(tmp_path, "a run", [evaluation(100, 0.0)])
    assert list(figures) == ["recall_by_dim.png"]
    assert "recall_by_step" not in (tmp_path / "report.md").read_text()
