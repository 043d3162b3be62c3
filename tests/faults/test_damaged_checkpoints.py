"""Checkpoints that are all damaged, whose links were changed, or that cannot be written.

test_fuzzers.py damages their files.
"""

import re
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from helpers.checkpoints import STEPS, save, save_run, tiny_encoder, without_hashes

from mmrl.engine import checkpoint
from mmrl.engine.checkpoint import Checkpoints
from mmrl.errors import InputError, RunStopped
from mmrl.model.bundle import Bundle


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny_encoder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with three checkpoints."""
    return save_run(tmp_path_factory.mktemp("saved"))


def test_all_damaged_is_one_sentence(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "run", symlinks=True)
    for step in STEPS:
        (tmp_path / "run" / "checkpoints" / f"step-{step}" / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"^resume: no checkpoint of .*run is sound\. .*step-4.*run=FOLDER\.$"):
        Checkpoints(tmp_path / "run", 3, print).last_sound()


@pytest.mark.parametrize("link", ["missing", "dangling", "step-8"])
def test_links_that_are_damaged_or_set_back(saved: Path, tmp_path: Path, encoder: Bundle, link: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(saved, run, symlinks=True)
    last = run / "checkpoints" / "last"
    last.unlink()
    if link != "missing":
        last.symlink_to("step-99" if link == "dangling" else link)
    checkpoints = Checkpoints(run, 1, print)
    found = checkpoints.last_sound()
    assert found is not None
    assert found.name == ("step-8" if link == "step-8" else "step-12")
    if link == "step-8":  # the run goes on from there
        save(checkpoints, encoder, 10)
        checkpoints.finish()
        names = {path.name for path in (run / "checkpoints").iterdir()}
        assert names == {"best", "last", "step-8", "step-10", "step-12"}
        assert last.resolve().name == "step-10"


def test_a_run_killed_between_the_two_links_resumes_before_the_best(
    saved: Path, tmp_path: Path, encoder: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(saved, run, symlinks=True)
    link = Checkpoints._link

    def killed(self: Checkpoints, name: str, target: Path) -> None:
        if name == "last":
            sys.exit()
        link(self, name, target)

    monkeypatch.setattr(Checkpoints, "_link", killed)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    checkpoints = Checkpoints(run, 3, print)
    save(checkpoints, encoder, 16, is_best=True)
    checkpoints.close()
    found = Checkpoints(run, 3, print).last_sound()
    assert found is not None
    assert found.name == "step-12"
    assert (run / "checkpoints" / "best").resolve().name == "step-16"


def test_a_run_folder_that_is_gone_is_not_taken_for_a_checkpoint_that_was_written(
    tmp_path: Path, encoder: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object) -> None:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(Checkpoints, "_write", gone)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", gone)
    checkpoints = Checkpoints(tmp_path, 2, print)
    save(checkpoints, encoder, 4)
    with pytest.raises(RunStopped, match=r"step 4 could not be written \(.*Stale file handle\)\. There is no earlier"):
        checkpoints.finish()


def test_a_checkpoint_of_an_earlier_version_is_resumed_from(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "run", symlinks=True)
    without_hashes(tmp_path / "run" / "checkpoints" / "step-12")
    found = Checkpoints(tmp_path / "run", 3, print).last_sound()
    assert found is not None
    assert found.name == "step-12"


def test_a_checkpoint_is_written_once_there_is_space(
    tmp_path: Path, encoder: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "RETRY_S", 0.02)
    write, said, left = Checkpoints._write, list[str](), [3]

    def without_space(self: Checkpoints, partial: Path, snapshot: Any) -> None:
        if left[0]:
            left[0] -= 1
            partial.mkdir(parents=True)
            raise OSError(28, "No space left on device")
        write(self, partial, snapshot)

    monkeypatch.setattr(Checkpoints, "_write", without_space)
    checkpoints = Checkpoints(tmp_path, 2, said.append)
    save(checkpoints, encoder, 4)
    assert checkpoints._writer is not None
    checkpoints._writer.join(30)
    checkpoints.finish()
    assert re.search(
        r"step 4 could not be written \(.*No space left.*\); .* GB of disk are free\. Training goes on", said[0]
    )
    assert said[1:] == ["The checkpoint of step 4 is written now."]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["last", "step-4"]

    left[0] = 10**9  # the disk stays full: the next checkpoint replaces this one, and the end of the run says so
    save(checkpoints, encoder, 8)
    save(checkpoints, encoder, 12)
    with pytest.raises(
        RunStopped, match=r"step 12 could not be written .*step-4 is complete; run again with resume=auto\.$"
    ):
        checkpoints.finish()
