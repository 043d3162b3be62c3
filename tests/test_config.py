import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mmrl import config as configs
from mmrl import durations

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_is_valid_and_headed(path: Path) -> None:
    config = configs.load(path)
    head = path.read_text().split("\n\n")[0]
    for word in ("mmrl train configs/" + path.name, "Hardware:", "Time:", "Score:"):
        assert word in head, word
    assert configs.load(path, [f"run={config.run}"]) == config


def test_a_config_survives_yaml(tmp_path: Path) -> None:
    config = configs.load(CONFIGS / "quickstart.yaml", ["optim.lr=1e-4", "nesting.dims=[8, 4]"])
    assert config.optim.lr == 1e-4
    assert config.nesting.dims == [8, 4]
    (tmp_path / "again.yaml").write_text(configs.dump(config))
    assert configs.load(tmp_path / "again.yaml") == config


def test_the_plain_twin_differs_in_its_nesting_alone() -> None:
    nested, plain = (configs.load(CONFIGS / f"quickstart{suffix}.yaml") for suffix in ("", "_plain"))
    changed = {difference.split(":")[0] for difference in configs.differences(nested, plain)}
    assert changed <= {"nesting.dims", "nesting.weights", "nesting.start", "evaluation.dims", "evaluation.best"}


def test_machine_fields_are_no_difference() -> None:
    one = configs.load(CONFIGS / "quickstart.yaml")
    other = configs.load(CONFIGS / "quickstart.yaml", ["data.workers=7", "engine.zero_stage=1", "run=elsewhere"])
    assert configs.differences(one, other) == []
    assert configs.differences(one, configs.load(CONFIGS / "quickstart.yaml", ["seed=9"])) == ["seed: 0 -> 9"]


def test_the_schema_describes_the_shipped_configs() -> None:
    schema = json.loads(configs.schema())
    values = yaml.safe_load((CONFIGS / "quickstart.yaml").read_text())
    assert set(values) <= set(schema["properties"])
    assert schema["additionalProperties"] is False


@pytest.mark.parametrize(
    ("duration", "expected"),
    [(7, 7), ("7 steps", 7), ("2 epochs", 90), ("0.5 epochs", 23), ("1_000 samples", 8), ("1 step", 1)],
)
def test_durations_become_steps(duration: int | str, expected: int) -> None:
    assert durations.steps(duration, batch_size=128, batches_per_epoch=45) == expected


def test_importing_the_package_and_asking_for_help_load_nothing_heavy() -> None:
    program = (
        "import sys, mmrl, mmrl.cli; from typer.main import get_command; get_command(mmrl.cli.app);"
        "print([m for m in ('torch', 'deepspeed', 'open_clip', 'numpy', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
