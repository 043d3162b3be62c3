"""tests/gpu/accept.py with tiny sizes on whatever device there is, so that it works when a GPU is at hand."""

import json
from pathlib import Path

import pytest
from gpu.accept import Sizes, accept


def tiny(model: Path, *stages: int) -> Sizes:
    return Sizes(
        str(model), step_pairs=2, loss_pairs=16, width=32, kernel_pairs=20, repeats=1, steps=6, stages=(0, *stages)
    )


def test_every_section_runs_small(tiny_model: Path) -> None:
    result = accept(tiny(tiny_model), ["kernels", "loss", "step", "waits", "trainers"])
    rows = {(row["section"], row["name"]): row for row in json.loads(json.dumps(result))["rows"]}
    assert all(row["value"] > 0 for row in rows.values())
    assert ("loss", "mmrl, 4 dims: compared with open_clip") in rows
    assert ("step", "ZeRO stage 0 compared with plain PyTorch") in rows
    of_kernels = [row for (section, _), row in rows.items() if section == "kernels"]
    assert len(of_kernels) == 12
    assert all(row["passed"] for row in of_kernels), of_kernels


@pytest.mark.slow
def test_all_stages_and_a_run_that_is_killed_and_resumed(tiny_model: Path) -> None:
    *_, of_3, resumed = accept(tiny(tiny_model, 1, 2, 3), ["step", "resume"])["rows"]
    assert of_3["name"] == "ZeRO stage 3 compared with stage 0"
    assert resumed["passed"], resumed
