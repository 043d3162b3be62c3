"""launch/README.md: its example of `mmrl plan` is what the command prints, and it lists every file of the folder."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mmrl.cli import app

REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "launch" / "README.md").read_text()


@pytest.mark.slow
def test_the_example_of_mmrl_plan_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    command = re.search(r"mmrl (plan .*)", README)
    assert command
    printed = CliRunner().invoke(app, shlex.split(command[1])).output.splitlines()
    block = re.search(r"    GB per GPU.*?Lowest stage that fits:[^\n]*", README, re.DOTALL)
    assert block
    for line in filter(None, map(str.strip, block[0].splitlines())):
        assert line in printed


def test_every_launch_script_is_listed() -> None:
    for path in (REPOSITORY / "launch").iterdir():
        assert path.name == "README.md" or f"    {path.name} " in README, path
