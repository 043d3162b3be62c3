"""A run that is lengthened: what may change on resume, the learning rate and the factor on the prefixes' gradient."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from mmrl.config import dump_config, load_config
from mmrl.engine.optim import lr_factor
from mmrl.errors import InputError
from mmrl.train.trainer import train

WriteConfig = Callable[..., Path]


def test_a_longer_run_follows_the_longer_schedule_and_keeps_the_factor_at_its_end(write_config: WriteConfig) -> None:
    path = write_config(evaluation={}, train={"batch_size": 12, "duration": "8 steps"})
    console = Console(record=True, width=300)
    folder = train(load_config(path), console)
    longer = load_config(path, ["resume=auto", "train.duration=16 steps"])
    train(longer, console)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [one["step"] for one in lines] == list(range(1, 17))
    factors = [one["prefix_gradient"] for one in lines]
    assert factors == pytest.approx([0.3 * min(step / 8, 1) ** 2 for step in range(1, 17)])
    totals = [8] * 8 + [16] * 8
    expected = [1e-3 * lr_factor(longer.optim, step, total, 2, 0) for step, total in enumerate(totals)]
    assert [one["lr"] for one in lines] == pytest.approx(expected)
    shown = console.export_text()
    assert (
        "Lengthened from 8 to 16 steps: from step 8 on, the learning rate follows the schedule of 16 steps (61% of its "
        "peak; 0% by that of 8); the factor on the smaller dims' gradient stays at 0.3."
    ) in shown
    # The first duration is stored, so that the original config and a third duration find it.
    assert load_config(folder / "config.yaml").nesting.prefix_gradient.duration == "8 steps"
    train(load_config(path, ["resume=auto", "train.duration=16"]), console)
    train(load_config(path, ["resume=auto", "train.duration=17"]), console)
    assert load_config(folder / "config.yaml").nesting.prefix_gradient.duration == "8 steps"
    for overrides, says in (
        (["train.duration=4"], "is a run of 17, which can grow but not shrink to 4;"),
        (["train.duration=20", "seed=1"], r"another config \(.*seed: 0 -> 1"),
    ):
        with pytest.raises(InputError, match=says):
            train(load_config(path, ["resume=auto", *overrides]), console)


def test_a_learning_rate_changes_on_resume_when_it_is_asked_for(write_config: WriteConfig) -> None:
    path = write_config(evaluation={}, checkpoint={"every": "4 steps"}, train={"batch_size": 12, "duration": "8 steps"})
    folder = train(load_config(path, ["train.duration=4 steps"]))
    resumed = ["resume=auto", "train.duration=8 steps", "optim.lr=5e-4"]
    with pytest.raises(
        InputError, match=r"\(optim.lr: 0.001 -> 0.0005\).*, or let them change with resume_allow=\[opt"
    ):
        train(load_config(path, resumed))
    for allowed, says in (("optim.lrr", "Did you mean 'optim.lr'"), ("seed", "Allowed: optim.betas")):
        with pytest.raises(InputError, match=f"resume_allow: '{allowed}' is not a key of optim.*{says}"):
            train(load_config(path, [*resumed, f"resume_allow=[{allowed}]"]))
    console = Console(record=True, width=300)
    train(load_config(path, [*resumed, "resume_allow=[optim.lr]"]), console)
    assert "From step 4 on: optim.lr: 0.001 -> 0.0005 (resume_allow; recorded in " in console.export_text()
    assert json.loads((folder / "changes.jsonl").read_text()) == {"step": 4, "changed": ["optim.lr: 0.001 -> 0.0005"]}
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-2])
    assert last["lr"] == pytest.approx(5e-4 * lr_factor(load_config(path).optim, 6, 8, 2, 0))
    assert load_config(folder / "config.yaml").optim.lr == 5e-4


def test_a_start_that_failed_does_not_block_its_folder(write_config: WriteConfig) -> None:
    path = write_config(evaluation={}, train={"batch_size": 12, "duration": "2 steps"})
    folder = Path(load_config(path).run)
    folder.mkdir()
    (folder / ".config.yaml.1a2b3c4d.partial").write_text("seed: 1")
    (folder / ".lock").touch()
    (folder / "config.yaml").write_text(dump_config(load_config(path, ["seed=1"])))
    (folder / "metrics.jsonl").touch()
    assert train(load_config(path)) == folder
    assert load_config(folder / "config.yaml").seed == 0
