"""Config files: shipped ones, overrides, schema, reference, durations."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from mmrl import durations
from mmrl.config import config_differences, config_reference, config_schema, dump_config, load_config
from mmrl.errors import InputError

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_config_is_valid_and_its_header_complete(path: Path) -> None:
    config = load_config(path)
    header = path.read_text().split("\n\n")[0]
    for word in ("mmrl train configs/" + path.name, "Hardware:", "Time:", "Score:"):
        assert word in header, word
    assert load_config(path, [f"run={config.run}"]) == config


def test_dumped_config_loads_as_the_same_config(tmp_path: Path) -> None:
    config = load_config(CONFIGS / "quickstart.yaml", ["optim.lr=1e-4", "nesting.dims=[8, 4]"])
    assert config.optim.lr == 1e-4
    assert config.nesting.dims == [8, 4]
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config


def test_the_plain_baseline_differs_only_in_nesting() -> None:
    nested, plain = (load_config(CONFIGS / f"quickstart{suffix}.yaml") for suffix in ("", "_plain"))
    changed = {difference.split(":")[0] for difference in config_differences(nested, plain)}
    assert changed <= {"nesting.dims", "loss.distillation", "evaluation.dims"}


def test_machine_fields_are_not_differences() -> None:
    one = load_config(CONFIGS / "quickstart.yaml")
    other = load_config(CONFIGS / "quickstart.yaml", ["data.workers=7", "engine.zero_stage=1", "run=elsewhere"])
    assert config_differences(one, other) == []
    assert config_differences(one, load_config(CONFIGS / "quickstart.yaml", ["seed=9"])) == ["seed: 0 -> 9"]


def test_unknown_key_in_a_list_of_sections_is_named() -> None:
    sources = "data.sources=[{shards: a, repeats: 2}]"
    with pytest.raises(InputError, match=r"unknown key 'data.sources.0.repeats'. Did you mean 'repeat'"):
        load_config(CONFIGS / "quickstart.yaml", [sources])


def test_schema_has_all_sections_and_allows_no_other() -> None:
    schema = json.loads(config_schema())
    values = yaml.safe_load((CONFIGS / "quickstart.yaml").read_text())
    assert set(values) <= set(schema["properties"])
    assert schema["additionalProperties"] is False


def test_every_config_key_has_a_description() -> None:
    schema = json.loads(config_schema())
    for section in (schema, *schema["$defs"].values()):
        assert section["description"], section["title"]
        for name, field in section["properties"].items():
            assert "description" in field or "$ref" in field, (section["title"], name)


def test_config_reference_is_current() -> None:
    """Update it by: mmrl config reference > configs/REFERENCE.md"""
    assert (CONFIGS / "REFERENCE.md").read_text() == config_reference()


def test_configs_readme_lists_every_shipped_config() -> None:
    readme = (CONFIGS / "README.md").read_text()
    for path in CONFIGS.glob("*.yaml"):
        assert f"mmrl train configs/{path.name}" in readme or f"-m mmrl.cli train configs/{path.name}" in readme, path


@pytest.mark.parametrize(
    ("duration", "expected"),
    [(7, 7), ("7 steps", 7), ("2 epochs", 90), ("0.5 epochs", 23), ("1_000 samples", 8), ("1 step", 1)],
)
def test_durations_become_steps(duration: int | str, expected: int) -> None:
    assert durations.to_steps(duration, batch_size=128, batches_per_epoch=45) == expected


def test_importing_the_package_and_help_load_no_heavy_library() -> None:
    program = (
        "import sys, mmrl, mmrl.cli; from typer.main import get_command; get_command(mmrl.cli.app);"
        "print([m for m in ('torch', 'deepspeed', 'open_clip', 'numpy', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x, x, x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}]\n" for a, b in pairwise("abcdefghijklm")),
        "a: &a [*a]\n",
        "a: &a {<<: *a}\n",
        "a: " + "[" * 1500,
        f"seed: {'9' * 5000}\n",
        "run: 2020-99-99\n",
        "seed: 0x_\n",
        "run: !!python/object/apply:os.system [ls]\n",
    ],
    ids=["aliases", "endless list", "endless map", "deep", "long number", "no date", "no number", "code"],
)
def test_yaml_that_would_take_long_or_run_code_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(InputError, match=r"a\.yaml is not valid YAML: .*\.$"):
        load_config(tmp_path / "a.yaml")
