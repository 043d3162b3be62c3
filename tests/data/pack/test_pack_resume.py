"""`mmrl pack` with several workers, and interrupted at any point: the same bytes as one uninterrupted worker."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import drawing, encoded
from helpers.locks import held_by_another_process
from helpers.pack_sources import end_by, files, put, write_csv
from webdataset.writer import TarWriter

from mmrl.data.pack import prepare, writer
from mmrl.data.pack.command import pack_shards
from mmrl.data.shards import expand
from mmrl.data.workers import WorkerPool
from mmrl.errors import InputError, RunStopped

OPTIONS: dict[str, Any] = {"samples_per_shard": 2, "max_side": 30, "dedup": True, "quiet": True}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten pairs of which seven can be packed, with equal keys, equal images and bad ones in between."""
    names = ["a/b", "a_b", "a_b-2", "broken", "c", "d", "again", "uncaptioned", "e", "f"]
    for number, name in enumerate(names):
        data = encoded(drawing(0 if name == "again" else number)[0])
        put(tmp_path / "in" / f"{name}.png", data[:-100] if name == "broken" else data)
        if name != "uncaptioned":
            put(tmp_path / "in" / f"{name}.txt", f"{name}, number {number}")
    return tmp_path / "in"


@pytest.fixture
def whole(folder: Path, tmp_path: Path) -> dict[str, bytes]:
    """The files of one uninterrupted worker."""
    pack_shards(folder, tmp_path / "whole", **OPTIONS)
    found = files(tmp_path / "whole")
    shards = [f"shard-00000{number}.tar{ending}" for number in range(4) for ending in ("", ".index")]
    assert sorted(found) == ["bad_samples.jsonl", *shards, "shards.json"]
    assert found["bad_samples.jsonl"].count(b"\n") == 3
    return found


# ------------------------------------------------------------------------------------------------ workers


@pytest.mark.parametrize("workers", [2, 3])
def test_the_bytes_do_not_depend_on_the_number_of_workers(
    folder: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(prepare, "CHUNK", 1)
    pack_shards(folder, tmp_path / "out", workers=workers, **OPTIONS)
    assert files(tmp_path / "out") == whole


def test_workers_take_only_a_few_items_ahead() -> None:
    items = iter(range(1000))
    with WorkerPool[int, int](abs, 2, preload="builtins") as workers:
        results = workers.map(items)
        assert [next(results) for _ in range(10)] == list(range(10))
        assert next(items) <= 10 + 3 * 2
        assert len(list(results)) == 1000 - 10 - 1


@pytest.mark.parametrize(
    ("how", "message"), [("kill", "killed by the system, most likely because memory ran out"), ("exit", "exit code 3")]
)
def test_a_worker_that_dies_is_reported_in_one_sentence(how: str, message: str) -> None:
    with WorkerPool[str, str](end_by, 2, preload="helpers.pack_sources") as workers:
        results = workers.map(["go on", "go on", how, *["go on"] * 20])
        with pytest.raises(RunStopped, match=f"died .{message}.; run the same command again with fewer --workers"):
            list(results)


# ------------------------------------------------------------------------------------------------ interruptions


def die_at(call: int, owner: Any, name: str) -> None:
    """Makes the process exit at this call of owner.name, as by SIGKILL: nothing is flushed or cleaned up."""
    real, calls = getattr(owner, name), 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os._exit(9)
        return real(*args, **kwargs)

    setattr(owner, name, counted)


def run_in_child(work: Callable[[], object]) -> int:
    """The exit code of a forked process that does the work."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


POINTS = {"between samples": (writer.PackWriter, "add"), "within a shard": (TarWriter, "write"),
          "before it is on disk": (os, "fsync"), "before progress.json": (Path, "replace"),
          "while shards move": (Path, "rename"), "during the cleanup": (Path, "unlink")}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("point", POINTS)
def test_a_pack_killed_at_any_point_resumes_to_equal_bytes(
    folder: Path, whole: dict[str, bytes], tmp_path: Path, point: str
) -> None:
    out = tmp_path / "out"
    for call in range(1, 100):

        def killed(call: int = call) -> None:
            die_at(call, *POINTS[point])
            pack_shards(folder, out, **OPTIONS)

        code = run_in_child(killed)
        assert code in (0, 9)
        if code == 9:
            if point not in ("while shards move", "during the cleanup"):
                with pytest.raises(InputError, match=r"holds no \.tar file"):
                    expand(out)
            if (out / ".partial").exists():
                pack_shards(folder, out, **OPTIONS)
        assert files(out) == whole
        shutil.rmtree(out)
        if code == 0:
            break
    else:
        pytest.fail("still killed at the 99th call")
    assert call > 2


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_pack_killed_repeatedly_finishes(folder: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    def killed() -> None:
        die_at(5, writer.PackWriter, "add")
        pack_shards(folder, tmp_path / "out", **OPTIONS)

    codes = [run_in_child(killed) for _ in range(3)]
    assert codes == [9, 9, 0]
    assert files(tmp_path / "out") == whole


def test_an_exception_keeps_the_finished_shards_and_nothing_else(
    folder: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop_at(sample: int, error: BaseException) -> None:
        real, calls = writer.PackWriter.add, iter(range(sample - 1))

        def add(self: writer.PackWriter, item: Any) -> None:
            if next(calls, None) is None:
                raise error
            real(self, item)

        monkeypatch.setattr(writer.PackWriter, "add", add)
        with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else RunStopped) as raised:
            pack_shards(folder, tmp_path / "out", **OPTIONS)
        monkeypatch.undo()
        if isinstance(error, OSError):
            assert "out cannot be written (No space left on device); fix that" in str(raised.value)

    stop_at(2, KeyboardInterrupt())
    assert files(tmp_path / "out") == {}
    stop_at(6, OSError(28, "No space left on device"))
    assert (tmp_path / "out" / ".partial" / "progress.json").is_file()
    pack_shards(folder, tmp_path / "out", **OPTIONS)
    assert files(tmp_path / "out") == whole


@pytest.fixture
def half(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """OUT of a pack interrupted after the second shard."""
    with monkeypatch.context() as patch:
        real = writer.PackWriter._save_progress

        def record(self: writer.PackWriter) -> None:
            real(self)
            if self.progress.shards == 2:
                raise KeyboardInterrupt

        patch.setattr(writer.PackWriter, "_save_progress", record)
        with pytest.raises(KeyboardInterrupt):
            pack_shards(folder, tmp_path / "half", **OPTIONS)
    return tmp_path / "half"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples_per_shard": 3}, r"started with another samples-per-shard \(2, now 3\); give the same arguments"),
        ({"max_side": None}, r"another max-side \(30, now none\).* or add --force to start over"),
        ({"dedup": False}, r"another dedup \(True, now False\)"),
        ({"group_column": "item"}, r"another group-column \(none, now item\)"),
        ({"caption_columns": ["x", "y"]}, r"another caption-column \(none, now x, y\)"),
    ],
)
def test_other_arguments_do_not_resume(half: Path, folder: Path, options: dict[str, Any], message: str) -> None:
    before = files(half)
    with pytest.raises(InputError, match=message):
        pack_shards(folder, half, **{**OPTIONS, **options})
    assert files(half) == before


def test_another_source_does_not_resume(half: Path, folder: Path, tmp_path: Path, whole: dict[str, bytes]) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    with pytest.raises(InputError, match=r"another source \(.*/in, now .*/copy\)"):
        pack_shards(tmp_path / "copy", half, **OPTIONS)
    added = put(folder / "new.png", "")
    with pytest.raises(InputError, match=r"another count of files \(19, now 20\)"):
        pack_shards(folder, half, **OPTIONS)
    added.unlink()
    pack_shards(folder, half, **OPTIONS)
    assert files(half) == whole


def test_a_changed_table_does_not_resume(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"image": f"in/{name}.png", "caption": name} for name in ("c", "d", "e", "f", "a_b")]
    write_csv(tmp_path / "t.csv", rows)
    with monkeypatch.context() as patch:
        patch.setattr(writer.PackWriter, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pack_shards(tmp_path / "t.csv", tmp_path / "out", **OPTIONS)
    status = (tmp_path / "t.csv").stat()
    os.utime(tmp_path / "t.csv", ns=(0, 0))
    with pytest.raises(InputError, match="another time of the table"):
        pack_shards(tmp_path / "t.csv", tmp_path / "out", **OPTIONS)
    os.utime(tmp_path / "t.csv", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert pack_shards(tmp_path / "t.csv", tmp_path / "out", **OPTIONS)["samples"] == 5
    pack_shards(tmp_path / "t.csv", tmp_path / "again", **OPTIONS)
    assert files(tmp_path / "out") == files(tmp_path / "again")


def test_a_damaged_or_locked_folder_is_an_error(half: Path, folder: Path) -> None:
    again = partial(pack_shards, folder, half, **OPTIONS)
    put(half / "shard-000000.tar", "mine")
    with pytest.raises(InputError, match=r"already holds shard-000000\.tar"):
        again()
    (half / "shard-000000.tar").unlink()
    with held_by_another_process(half), pytest.raises(InputError, match=r"another command, process \d+ on .* is w"):
        again()
    (half / ".partial" / "shard-000001.tar.partial").unlink()
    with pytest.raises(InputError, match=r"shard-000001\.tar\.partial of the unfinished pack is missing"):
        again()
    for text in ("{}", "[]"):
        put(half / ".partial" / "progress.json", text)
        with pytest.raises(InputError, match=r"progress\.json is damaged; restore it, or add --force"):
            again()


def test_ctrl_c_stops_the_command_and_all_its_workers(tmp_path: Path) -> None:
    put(tmp_path / "a.png", encoded(drawing(0, size=256)[0]))
    write_csv(tmp_path / "t.csv", [{"image": "a.png", "caption": f"number {number}"} for number in range(20_000)])
    # A background job and its children ignore SIGINT.
    handler = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{handler}; from mmrl.cli import main; import sys; sys.argv[0] = 'mmrl'; main()"
    arguments = [tmp_path / "t.csv", tmp_path / "out", "--samples-per-shard", "100", "--workers", "2"]
    command = [sys.executable, "-c", code, "pack", *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        while not (tmp_path / "out" / ".partial" / "progress.json").exists():
            assert process.poll() is None
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        shown, errors = process.communicate(timeout=180)  # surviving workers would hold the pipes open
    assert process.returncode not in (0, None)
    assert "Traceback" not in errors
    assert "Run the same command again to resume." in shown
