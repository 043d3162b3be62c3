"""The folder that `mmrl pack` fills: stopped at any moment, it goes on where it stood, to the same bytes.

    OUT/.partial/           while OUT is not whole; nothing in it is named as a shard is, so nobody trains on it
        shard-000000.tar.partial, shard-000000.tar.index …
        bad_samples.jsonl   what was left out so far
        names.txt           digest of the picture and key of each sample so far, one a line
        progress.json       the arguments, and how far the finished shards reach

A finished shard is on the disk before progress.json tells of it. Whatever reaches beyond that (half a shard, the last
lines of the lists) is cut off by the run that goes on.
"""

import fcntl
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from mmrl.data.index import BAD_SAMPLES, SUFFIX, Problem, index_shard, save_index
from mmrl.data.pack.prepare import Prepared
from mmrl.errors import InputError

_PARTIAL, _NAMES, _PROGRESS = ".partial", "names.txt", "progress.json"


@dataclass
class Progress:
    """How far a pack has come, as progress.json holds it after each shard."""

    arguments: dict[str, Any]
    """All that the shards' bytes depend on, the source's fingerprint included."""
    position: int = 0
    """So many pairs of the source have been dealt with."""
    samples: int = 0
    shards: int = 0
    repeated: int = 0
    """Samples without a group that show a picture which an earlier one shows."""
    bad: Counter[str] = field(default_factory=Counter)
    first_bad: str = ""
    length_of_names: int = 0
    length_of_bad_samples: int = 0
    is_whole: bool = False
    """All shards are finished; what is left to do is to move them up into OUT."""


@contextmanager
def opened(out: Path, arguments: dict[str, Any], samples_per_shard: int, *, dedup: bool) -> Iterator["PackWriter"]:
    """A writer for OUT that begins, or goes on where one with the same arguments stopped.

    Raises:
        InputError: OUT cannot be written to, holds something else, is being filled by another process, or was begun
            with other arguments.
    """
    others = _prepare(out)
    partial = out / _PARTIAL
    folder = os.open(partial, os.O_RDONLY)
    try:
        _lock(folder, out)
        progress = _progress_in(partial, arguments)
        writer = None
        try:
            if others and not progress.is_whole:
                raise InputError(_holds(out, others))
            writer = PackWriter(out, folder, progress, samples_per_shard, dedup)
            yield writer
        finally:
            if writer is not None:
                writer.close()
            if not progress.shards:
                shutil.rmtree(partial, ignore_errors=True)
    finally:
        os.close(folder)


def _lock(folder: int, out: Path) -> None:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"out: another mmrl pack is filling {out}; wait for it or name another folder.") from None
    except OSError:  # a file system without locks
        pass


def _holds(out: Path, others: list[str]) -> str:
    return f"out: {out} already holds {others[0]}; name a new or empty folder."


def _prepare(out: Path) -> list[str]:
    """Makes the folders; returns what stands in OUT besides what an attempt without result or half a one left."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"out: {out} cannot be made a folder ({error.strerror}); name a new one.") from None
    if not os.access(out, os.W_OK):
        raise InputError(f"out: {out} may not be written to; name another folder.")
    others = sorted(path.name for path in out.iterdir() if path.name not in (_PARTIAL, BAD_SAMPLES))
    if others and not (out / _PARTIAL).is_dir():
        raise InputError(_holds(out, others))
    (out / _PARTIAL).mkdir(exist_ok=True)
    return others


def _progress_in(partial: Path, arguments: dict[str, Any]) -> Progress:
    """What progress.json tells; where there is none, nothing is finished and the folder is emptied."""
    remedy = f"or delete {partial} to begin anew."
    try:
        saved = json.loads((partial / _PROGRESS).read_text())
        progress = Progress(**{**saved, "bad": Counter(saved["bad"])})
    except FileNotFoundError:
        for path in partial.iterdir():
            path.unlink()
        return Progress(arguments)
    except (ValueError, TypeError, KeyError):
        raise InputError(f"out: {partial / _PROGRESS} is not what mmrl pack wrote; restore it, {remedy}") from None
    for name, now in arguments.items():
        before = progress.arguments.get(name)
        if before != now:
            raise InputError(
                f"out: {partial.parent} was begun with another {name} ({_shown(before)}, now {_shown(now)}); "
                f"give the same arguments and source to go on, {remedy}"
            )
    if not progress.is_whole:
        wanted = [partial / _partial_name(number) for number in range(progress.shards)]
        lost = [path for path in (*wanted, partial / _NAMES, partial / BAD_SAMPLES) if not path.is_file()]
        if lost:
            raise InputError(f"out: {lost[0]}, of the shards finished before, is gone; restore it, {remedy}")
    return progress


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value) or "none"
    return "none" if value is None else str(value)


def _partial_name(number: int) -> str:
    return f"shard-{number:06d}.tar.partial"


class PackWriter:
    """Samples in, shards out. `folder` is the open folder of what is unfinished."""

    def __init__(self, out: Path, folder: int, progress: Progress, samples_per_shard: int, dedup: bool) -> None:
        self.progress = progress
        self._out, self._partial, self._folder = out, out / _PARTIAL, folder
        self._samples_per_shard, self._dedup = samples_per_shard, dedup
        self._used: dict[str, int] = {}
        self._name_of_picture: dict[bytes, str] = {}
        self._tar: Any = None
        self._files: list[IO[bytes]] = []
        if not progress.is_whole:
            (out / BAD_SAMPLES).unlink(missing_ok=True)  # of an attempt without result
            self._names = self._list(_NAMES, progress.length_of_names)
            self._bad_samples = self._list(BAD_SAMPLES, progress.length_of_bad_samples)
            with (self._partial / _NAMES).open(encoding="utf-8", newline="\n") as file:
                for line in file:
                    digest, name = line.rstrip("\n").split(" ")
                    self._remember(bytes.fromhex(digest), name)

    def _list(self, name: str, length: int) -> IO[bytes]:
        """A file to add lines to, of which the finished shards know these first bytes."""
        file = (self._partial / name).open("ab")
        self._files.append(file)
        file.truncate(length)
        return file

    def close(self) -> None:
        """Lets go of the files; what is in an unfinished shard is lost."""
        with suppress(OSError):  # a full disk was told of before
            if self._tar is not None:
                self._tar.close()
        for file in self._files:
            with suppress(OSError):
                file.close()

    def add(self, sample: Prepared | Problem) -> None:
        """Writes the next sample of the source, or notes why not."""
        self.progress.position += 1
        if isinstance(sample, Problem):
            self._note(sample)
            return
        first = self._name_of_picture.get(sample.digest)
        if first is not None and self._dedup:
            self._note(Problem(sample.origin, sample.key, f"duplicate: the picture of {first}, byte for byte"))
            return
        if self._tar is None:
            self._tar = self._new_shard()
        name = self._unique(sample.key)
        self._tar.write({"__key__": name, **sample.members})
        self._names.write(f"{sample.digest.hex()} {name}\n".encode())
        self._remember(sample.digest, name)
        self.progress.samples += 1
        self.progress.repeated += first is not None and not sample.grouped
        if self.progress.samples % self._samples_per_shard == 0:
            self._finish_shard()

    def finish(self, source: Path) -> list[Path]:
        """Moves all up into OUT, and takes away the rest.

        Raises:
            InputError: there is no shard, since every pair was bad.
        """
        progress = self.progress
        if self._tar is not None:
            self._finish_shard()
        if not progress.samples:
            self._bad_samples.flush()
            (self._partial / BAD_SAMPLES).rename(self._out / BAD_SAMPLES)
            raise InputError(f"source: nothing in {source} can be packed: {self.account_of_bad()}")
        if not progress.is_whole:
            progress.is_whole = True
            self._record()
        shards = [self._out / f"shard-{number:06d}.tar" for number in range(progress.shards)]
        moves = {shard.name + SUFFIX: shard.with_name(shard.name + SUFFIX) for shard in shards}
        moves |= {_partial_name(number): shard for number, shard in enumerate(shards)}
        if progress.bad:
            moves[BAD_SAMPLES] = self._out / BAD_SAMPLES
        for name, place in moves.items():
            with suppress(FileNotFoundError):  # moved by a run that was stopped in the middle of this
                (self._partial / name).rename(place)
        for path in self._partial.iterdir():
            if path.name != _PROGRESS:  # goes last, since it tells what the others are
                path.unlink()
        shutil.rmtree(self._partial)
        return shards

    def account_of_bad(self) -> str:
        """How many were left out, why, where they are listed, and the first of them."""
        counts = ", ".join(f"{count:,} {kind}" for kind, count in self.progress.bad.most_common())
        return f"{counts}; listed in {self._out / BAD_SAMPLES}, such as {self.progress.first_bad}."

    def _note(self, problem: Problem) -> None:
        progress = self.progress
        progress.bad[problem.kind] += 1
        # A name that is not UTF-8 cannot be printed as it is.
        shown = f"{problem.key}: {problem.reason}".encode(errors="backslashreplace").decode()
        progress.first_bad = progress.first_bad or shown
        self._bad_samples.write(json.dumps(asdict(problem)).encode() + b"\n")

    def _remember(self, digest: bytes, name: str) -> None:
        self._used[name] = 1
        self._name_of_picture.setdefault(digest, name)

    def _unique(self, key: str) -> str:
        """The key itself the first time, then with -2, -3, … where that is free."""
        name = key
        while name in self._used:
            self._used[key] += 1
            name = f"{key}-{self._used[key]}"
        return name

    def _new_shard(self) -> Any:
        # webdataset takes seconds to import.
        from webdataset.writer import TarWriter

        self._file = (self._partial / _partial_name(self.progress.shards)).open("wb")
        self._files.append(self._file)
        # PAX has long names; for short ones of ASCII it writes the same bytes as the plainest format.
        return TarWriter(self._file, user="", group="", mtime=0, encoder=False, format="PAX_FORMAT")

    def _finish_shard(self) -> None:
        self._tar.close()
        self._tar = None
        _to_disk(self._file)
        self._file.close()
        self._files.remove(self._file)
        shard = self._partial / _partial_name(self.progress.shards)
        save_index(index_shard(shard), shard.with_name(shard.stem + SUFFIX))
        self.progress.shards += 1
        self._record()

    def _record(self) -> None:
        """Makes progress.json tell of all that is written, in one step."""
        progress = self.progress
        for file in (self._names, self._bad_samples):
            _to_disk(file)
        os.fsync(self._folder)
        progress.length_of_names, progress.length_of_bad_samples = self._names.tell(), self._bad_samples.tell()
        beside = self._partial / f"{_PROGRESS}.new"
        with beside.open("wb") as file:
            file.write(json.dumps(vars(progress)).encode())
            _to_disk(file)
        beside.replace(self._partial / _PROGRESS)


def _to_disk(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
