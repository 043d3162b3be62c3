"""Writes samples into shards. A pack that is interrupted at any moment resumes and ends with the same bytes.

    OUT/.partial/           while the pack is unfinished; no file in it is named like a shard, so none is trained on
        shard-000000.tar.partial, shard-000000.tar.index …
        bad_samples.jsonl   the pairs skipped so far
        names.txt           image digest and key of each sample so far, one per line
        progress.json       the arguments, and the state after the last finished shard

A shard is flushed to disk before progress.json counts it. On resume, whatever was written after that (half a shard,
the last lines of the lists) is truncated.
"""

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

from mmrl.data.counts import LIST, write_list
from mmrl.data.fields import FieldsConfig
from mmrl.data.groups import encode_groups, groups_suffix, parse_groups
from mmrl.data.index import BAD_SAMPLES, Problem, index_shard
from mmrl.data.index_file import SUFFIX, save_index
from mmrl.data.pack.prepare import Prepared
from mmrl.errors import InputError
from mmrl.output.files import LOCK, check_out_folder, create_folder, exclusive, parse_json

_PARTIAL, _NAMES, _PROGRESS = ".partial", "names.txt", "progress.json"
_FIELDS = FieldsConfig()
_TAR, _GROUPS = _PARTIAL, groups_suffix(_FIELDS)
# The files of a finished pack, relative to OUT.
_OF_PACK = re.compile(r"((train|val)/)?(shard-\d+\.tar(\.\w+)*|shards\.json|bad_samples\.jsonl)")


@dataclass
class HeldOut:
    """What a pack with a holdout has held out so far."""

    shards: int = 0
    """The first ones."""
    samples: int = 0
    images_in_train: int = 0
    """Samples of the training part whose image has the same bytes as a held-out one."""


@dataclass
class PackProgress:
    """The state of a pack after a shard. The field names are the keys of progress.json."""

    arguments: dict[str, Any]
    """Everything that the shards' bytes depend on, including the fingerprint of the source."""
    position: int = 0
    """Number of the source's pairs that are packed or skipped."""
    samples: int = 0
    shards: int = 0
    repeated: int = 0
    """Samples without a group whose image an earlier sample has."""
    seconds: int = 0
    """Samples with a second text or image."""
    bad: Counter[str] = field(default_factory=Counter)
    first_bad: str = ""
    length_of_names: int = 0
    length_of_bad_samples: int = 0
    held_out: HeldOut = field(default_factory=HeldOut)
    is_whole: bool = False
    """All shards are finished and only have to be moved into OUT."""


@contextmanager
def open_writer(
    out: Path,
    arguments: dict[str, Any],
    samples_per_shard: int,
    *,
    dedup: bool,
    held_out: int | None = None,
    force: bool = False,
) -> Iterator["PackWriter"]:
    """Yields a writer for OUT: a new one, or one that resumes a pack with the same arguments.

    With `held_out`, that many pairs come first and go into OUT/val, all others into OUT/train. With `force`, what an
    earlier pack left in OUT is deleted.

    Raises:
        InputError: OUT cannot be written, is not empty, is being written by another process, or was started with other
            arguments.
    """
    others = _prepare_folders(out, force)
    partial = out / _PARTIAL
    folder, held = os.open(partial, os.O_RDONLY), ExitStack()
    try:
        held.enter_context(exclusive(out, "mmrl pack"))
        if force:
            _delete_pack(out)
            others = []
        progress = _load_progress(partial, arguments)
        writer = None
        try:
            if others and not progress.is_whole:
                check_out_folder(out, (_PARTIAL, BAD_SAMPLES))
            writer = PackWriter(out, folder, progress, samples_per_shard, dedup, held_out)
            yield writer
        finally:
            if writer is not None:
                writer.close()
            if not progress.shards:
                shutil.rmtree(partial, ignore_errors=True)
    finally:
        held.close()
        os.close(folder)


def _prepare_folders(out: Path, force: bool) -> list[str]:
    """Creates OUT and OUT/.partial; returns the names of files in OUT that no failed or unfinished pack left there."""
    create_folder(out)
    if not os.access(out, os.W_OK):
        raise InputError(f"out: {out} is not writable; choose another folder.")
    others = sorted(path.name for path in out.iterdir() if path.name not in (_PARTIAL, BAD_SAMPLES, LOCK))
    if force or not (out / _PARTIAL).is_dir():
        parts = {name: [*(out / name).glob("*")] if name in ("train", "val") else [out / name] for name in others}
        is_own = all(_OF_PACK.fullmatch(path.relative_to(out).as_posix()) for path in chain(*parts.values()))
        own = (_PARTIAL, BAD_SAMPLES, *(others if is_own else ()))
        check_out_folder(out, own, others[0] if others else None, force=force)
    (out / _PARTIAL).mkdir(exist_ok=True)
    return others


def _delete_pack(out: Path) -> None:
    for path in out.iterdir():
        if path.name == _PARTIAL:  # locked: only its files
            for file in path.iterdir():
                file.unlink()
        elif path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def _load_progress(partial: Path, arguments: dict[str, Any]) -> PackProgress:
    """Reads progress.json. If there is none, no shard is finished: the folder is emptied and the pack starts over."""
    remedy = "or add --force to start over."
    try:
        saved = parse_json((partial / _PROGRESS).read_text())
        held_out = HeldOut(**saved.get("held_out", {}))
        progress = PackProgress(**{**saved, "bad": Counter(saved["bad"]), "held_out": held_out})
    except FileNotFoundError:
        for path in partial.iterdir():
            path.unlink()
        return PackProgress(arguments)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise InputError(f"out: {partial / _PROGRESS} is damaged; restore it, {remedy}") from None
    for name, now in arguments.items():
        before = progress.arguments.get(name)
        if before != now:
            raise InputError(
                f"out: {partial.parent} was started with another {name} ({_shown(before)}, now {_shown(now)}); "
                f"give the same arguments and source to resume, {remedy}"
            )
    if not progress.is_whole:
        shards = [partial / _name(number, _TAR) for number in range(progress.shards)]
        lost = [path for path in (*shards, partial / _NAMES, partial / BAD_SAMPLES) if not path.is_file()]
        if lost:
            raise InputError(f"out: {lost[0]} of the unfinished pack is missing; restore it, {remedy}")
    return progress


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value) or "none"
    return "none" if value is None else str(value)


def _name(number: int, ending: str) -> str:
    return f"shard-{number:06d}.tar{ending}"


class PackWriter:
    """Writes samples into shards. `folder` is the open file descriptor of OUT/.partial."""

    def __init__(
        self,
        out: Path,
        folder: int,
        progress: PackProgress,
        samples_per_shard: int,
        dedup: bool,
        held_out: int | None = None,
    ) -> None:
        self.progress = progress
        self._held_out, self._samples_in_shard = held_out, 0
        self._waiting: list[Prepared | Problem] = []
        self._group: str | None = None
        """The samples of this group, until another one begins."""
        self._out, self._partial, self._folder = out, out / _PARTIAL, folder
        self._samples_per_shard, self._dedup = samples_per_shard, dedup
        self._used: dict[str, int] = {}
        self._key_of_image: dict[bytes, str] = {}
        self._tar: Any = None
        self._files: list[IO[bytes]] = []
        if not progress.is_whole:
            (out / BAD_SAMPLES).unlink(missing_ok=True)  # from an earlier pack without a usable pair
            self._names = self._open_list(_NAMES, progress.length_of_names)
            self._bad_samples = self._open_list(BAD_SAMPLES, progress.length_of_bad_samples)
            with (self._partial / _NAMES).open(encoding="utf-8", newline="\n") as file:
                for line in file:
                    digest, key = line.rstrip("\n").split(" ")
                    self._remember(bytes.fromhex(digest), key)
        self._held_out_keys = set(islice(self._used, progress.held_out.samples))

    def _open_list(self, name: str, length: int) -> IO[bytes]:
        """Opens a list to append to, truncated to its length after the last finished shard."""
        file = (self._partial / name).open("ab")
        self._files.append(file)
        file.truncate(length)
        return file

    def close(self) -> None:
        """Closes the files; the samples of an unfinished shard are lost."""
        with suppress(OSError):  # a full disk was reported before
            if self._tar is not None:
                self._tar.close()
        for file in self._files:
            with suppress(OSError):
                file.close()

    def add(self, sample: Prepared | Problem) -> None:
        """Takes the next sample of the source. It is written, or listed as bad, when its group ends."""
        group = sample.pair.group if isinstance(sample, Prepared) else self._group
        if group != self._group:
            self._write_waiting()
        self._group = group
        self._waiting.append(sample)
        if group is None or len(self._waiting) > self._samples_per_shard:
            self._write_waiting()

    def _write_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        images = [one.digest for one in waiting if isinstance(one, Prepared)]
        count = len({*images} - self._key_of_image.keys()) if self._dedup else len(images)
        if self._tar is not None and self._samples_in_shard + count > self._samples_per_shard >= count:
            self._finish_shard()  # the group begins the next one
        for sample in waiting:
            self._add(sample)

    def _add(self, sample: Prepared | Problem) -> None:
        if self.progress.position == self._held_out:
            self._end_held_out()
        self.progress.position += 1
        if isinstance(sample, Problem):
            self._add_bad(sample)
            return
        first = self._key_of_image.get(sample.digest)
        if first is not None and self._dedup:
            what = "texts are those" if sample.pair.image is None else "image has the same bytes as that"
            self._add_bad(sample.pair.problem(f"duplicate: the {what} of sample {first}"))
            return
        if self._tar is None:
            self._tar = self._new_shard()
        key = self._unique_key(sample.pair.key)
        self._tar.write({"__key__": key, **sample.members})
        self._names.write(f"{sample.digest.hex()} {key}\n".encode())
        self._remember(sample.digest, key)
        self.progress.samples += 1
        self.progress.seconds += bool(sample.pair.second_text or sample.pair.second_image)
        self._samples_in_shard += 1
        self.progress.repeated += first is not None and sample.pair.group is None
        if self.progress.held_out.shards and first in self._held_out_keys:
            self.progress.held_out.images_in_train += 1
        if self._samples_in_shard == self._samples_per_shard:
            self._finish_shard()

    def _end_held_out(self) -> None:
        """Ends the last shard of the held-out part."""
        if self._tar is not None:
            self._finish_shard()
        self.progress.held_out = HeldOut(self.progress.shards, self.progress.samples)
        self._held_out_keys = set(self._used)

    def finish(self, source: Path) -> list[Path]:
        """Moves the shards, their indexes and the list of bad samples into OUT, writes the list of shards, and removes
        OUT/.partial.

        Raises:
            InputError: there is no shard, or none of one part, because every pair was bad.
        """
        progress = self.progress
        self._write_waiting()
        if self._tar is not None:
            self._finish_shard()
        if progress.shards and self._held_out is not None and progress.held_out.shards in (0, progress.shards):
            part = "training" if progress.held_out.shards else "held-out"
            raise InputError(
                f"holdout: no {part} pair in {source} can be packed: {self.bad_summary()} Choose another --holdout or "
                f"--holdout-seed, and delete {self._partial}."
            )
        if not progress.samples:
            self._bad_samples.flush()
            (self._partial / BAD_SAMPLES).rename(self._out / BAD_SAMPLES)
            raise InputError(f"source: no pair in {source} can be packed: {self.bad_summary()}")
        if not progress.is_whole:
            progress.is_whole = True
            self._save_progress()
        shards = [self._out / _name(number, "") for number in range(progress.shards)]
        if self._held_out is not None:
            count = progress.held_out.shards
            val, train = self._out / "val", self._out / "train"
            shards = [*(val / shard.name for shard in shards[:count]), *(train / one.name for one in shards[:-count])]
            val.mkdir(exist_ok=True)
            train.mkdir(exist_ok=True)
        moves = {
            _name(number, ending): shard.with_name(shard.name + final)
            for ending, final in ((SUFFIX, SUFFIX), (_GROUPS, _GROUPS), (_TAR, ""))
            for number, shard in enumerate(shards)
        }
        for folder in {shard.parent for shard in shards}:
            indexes = {one.name: self._index_of(n, one) for n, one in enumerate(shards) if one.parent == folder}
            write_list(self._partial / f"{LIST}.{folder.name}", indexes)
            moves[f"{LIST}.{folder.name}"] = folder / LIST
        if progress.bad:
            moves[BAD_SAMPLES] = self._out / BAD_SAMPLES
        for name, target in moves.items():
            with suppress(FileNotFoundError):  # moved before this step was interrupted
                (self._partial / name).rename(target)
        for path in self._partial.iterdir():
            if path.name != _PROGRESS:  # removed last: without it, the pack could not resume
                path.unlink()
        shutil.rmtree(self._partial)
        return shards

    def _index_of(self, number: int, shard: Path) -> Path:
        """The index of a finished shard: it may have been moved before this step was interrupted."""
        index = self._partial / _name(number, SUFFIX)
        return index if index.exists() else shard.with_name(shard.name + SUFFIX)

    def bad_summary(self) -> str:
        """How many pairs were skipped, by kind, the file that lists them, and the first of them."""
        counts = ", ".join(f"{count:,} {kind}" for kind, count in self.progress.bad.most_common())
        return f"{counts}; listed in {self._out / BAD_SAMPLES}, e.g. {self.progress.first_bad}."

    def _add_bad(self, problem: Problem) -> None:
        progress = self.progress
        progress.bad[problem.kind] += 1
        # A file name that is not UTF-8 cannot be printed unescaped.
        shown = f"{problem.key}: {problem.reason}".encode(errors="backslashreplace").decode()
        progress.first_bad = progress.first_bad or shown
        self._bad_samples.write(json.dumps(asdict(problem)).encode() + b"\n")

    def _remember(self, digest: bytes, key: str) -> None:
        self._used[key] = 1
        self._key_of_image.setdefault(digest, key)

    def _unique_key(self, key: str) -> str:
        """The key itself if no sample has it, else the key with the first free suffix of -2, -3, …"""
        unique = key
        while unique in self._used:
            self._used[key] += 1
            unique = f"{key}-{self._used[key]}"
        return unique

    def _new_shard(self) -> Any:
        # webdataset takes seconds to import.
        from webdataset.writer import TarWriter

        self._file = (self._partial / _name(self.progress.shards, _TAR)).open("wb")
        self._files.append(self._file)
        # PAX allows long names; for short ASCII names it writes the same bytes as the ustar format.
        return TarWriter(self._file, user="", group="", mtime=0, encoder=False, format="PAX_FORMAT")

    def _finish_shard(self) -> None:
        self._tar.close()
        self._tar = None
        self._samples_in_shard = 0
        _flush_to_disk(self._file)
        self._file.close()
        self._files.remove(self._file)
        shard = self._partial / _name(self.progress.shards, _TAR)
        index = index_shard(shard)
        save_index(index, shard.with_name(_name(self.progress.shards, SUFFIX)))
        if _FIELDS.metadata in index.extensions:
            with shard.open("rb") as file:
                groups = parse_groups(_FIELDS, index, lambda offset, size: os.pread(file.fileno(), size, offset))
            (self._partial / _name(self.progress.shards, _GROUPS)).write_bytes(encode_groups(groups, index.tar))
        self.progress.shards += 1
        self._save_progress()

    def _save_progress(self) -> None:
        """Replaces progress.json atomically, after all that it counts is on the disk."""
        progress = self.progress
        for file in (self._names, self._bad_samples):
            _flush_to_disk(file)
        os.fsync(self._folder)
        progress.length_of_names, progress.length_of_bad_samples = self._names.tell(), self._bad_samples.tell()
        new = self._partial / f"{_PROGRESS}.new"
        with new.open("wb") as file:
            file.write(json.dumps({**vars(progress), "held_out": vars(progress.held_out)}).encode())
            _flush_to_disk(file)
        new.replace(self._partial / _PROGRESS)


def _flush_to_disk(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
