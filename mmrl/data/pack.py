"""`mmrl pack`: a user's pictures and captions -> WebDataset shards that stream.py reads.

    OUT/
        shard-000000.tar …    samples KEY.jpg|jpeg|png|webp + KEY.txt (+ KEY.json), in the order of the source
        bad_samples.jsonl     what was left out, one object a sample; only where something was

The shards appear together at the end, so a folder that has any has all. Their bytes are a function of the source
alone, not of the machine or the hour (of Pillow's version too, where pictures are encoded again).
"""

import io
import json
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mmrl.data.index import Problem
from mmrl.data.pairs import STORED, FolderPairs, Pair, TablePairs
from mmrl.data.tables import KINDS, Table
from mmrl.decode import decode
from mmrl.errors import InputError

BAD_SAMPLES = "bad_samples.jsonl"
_EXTENSION_OF_FORMAT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
_JPEG_QUALITY = 92


class _Unusable(ValueError):
    """This pair cannot be packed: "KIND: detail", KIND being what the bad ones are counted by."""


def pack(
    source: Path,
    out: Path,
    *,
    image_column: str | None = None,
    caption_columns: Sequence[str] = (),
    group_column: str | None = None,
    samples_per_shard: int = 1000,
    max_side: int | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Packs image-text pairs into shards; returns what `--json` prints.

    Args:
        source: a folder of pictures with KEY.txt and/or KEY.json beside them, or a table with a column of paths,
            which are relative to the table's folder.
        image_column: the table's column of paths; the first of IMAGE_COLUMNS that it has when left out.
        caption_columns: columns of captions (or of lists of them), the first caption foremost; all of CAPTION_COLUMNS
            that it has when left out. For a folder: keys of KEY.json, `captions` and `caption` when left out.
        group_column: names the item shown; for a folder a key of KEY.json, `group` when left out.
        max_side: pixels; larger pictures are made smaller and stored as JPEG. All others keep their bytes.

    Raises:
        InputError: no such source or column, an unreadable table, OUT holds something else, no usable pair at all.
    """
    for name, number in (("samples-per-shard", samples_per_shard), ("max-side", max_side)):
        if number is not None and number < 1:
            raise InputError(f"{name}: {number} is too small; give at least 1.")
    if source.is_dir():
        if image_column is not None:
            raise InputError(f"image-column: {source} is a folder; only a table has columns of paths.")
        pairs = FolderPairs(source, caption_columns or ("captions", "caption"), group_column or "group")
    elif source.is_file():
        pairs = TablePairs(Table(source), image_column, caption_columns, group_column)
    else:
        raise InputError(f"source: {source} does not exist; give a folder of pictures or a table ({', '.join(KINDS)}).")
    console = Console(quiet=quiet)
    columns = (TextColumn("packing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        _Packer(out, samples_per_shard, max_side) as packer,
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        for pair in progress.track(pairs, total=len(pairs)):
            packer.add(pair)
        shards = packer.finish(source)
    _show(console, source, packer, shards)
    return {
        "shards": [str(shard) for shard in shards],
        "samples": packer.samples,
        "bad": dict(packer.bad),
        "bad_samples": str(out / BAD_SAMPLES) if packer.bad else None,
        "columns": pairs.columns,
    }


def _show(console: Console, source: Path, packer: "_Packer", shards: list[Path]) -> None:
    size = sum(shard.stat().st_size for shard in shards) / 1e6
    last = f" … {shards[-1].name}" if len(shards) > 1 else ""
    lines = [f"{source}: {packer.samples:,} samples, {size:,.1f} MB in {shards[0]}{last}"]
    if packer.bad:
        lines.append(f"Left out: {packer.account_of_bad()}")
    if packer.repeated:
        lines.append(
            f"{packer.repeated:,} samples show a picture that another one shows as well; without a common group they "
            "are each other's negatives: --group-column may name the column of paths."
        )
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


class _Packer:
    """Pairs in, shards out."""

    def __init__(self, out: Path, samples_per_shard: int, max_side: int | None) -> None:
        self.samples = self.repeated = 0
        self.bad: Counter[str] = Counter()
        self._out, self._samples_per_shard, self._max_side = out, samples_per_shard, max_side
        self._used: dict[str, int] = {}
        self._pictures: set[Path] = set()
        self._first_bad = ""
        self._partial: list[Path] = []
        self._tar: Any = None
        _prepare(out)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        for path in self._partial:
            path.unlink(missing_ok=True)

    def add(self, pair: Pair | Problem) -> None:
        """Writes the pair, or notes why not."""
        if isinstance(pair, Problem):
            self._note(pair)
            return
        try:
            members = _members(pair, self._max_side)
        except _Unusable as error:
            self._note(Problem(pair.origin, pair.key, str(error)))
            return
        if self.samples % self._samples_per_shard == 0:
            self._open_next()
        self._tar.write({"__key__": self._unique(pair.key), **members})
        self.samples += 1
        if pair.origin and pair.group is None:  # two files of a folder are two pictures
            self.repeated += pair.image in self._pictures
            self._pictures.add(pair.image)

    def finish(self, source: Path) -> list[Path]:
        """Gives the shards their names.

        Raises:
            InputError: there is none, since every pair was bad.
        """
        self._close()
        if not self.samples:
            raise InputError(f"source: nothing in {source} can be packed: {self.account_of_bad()}")
        shards = [path.with_suffix("") for path in self._partial]
        for path, shard in zip(self._partial, shards, strict=True):
            path.rename(shard)
        return shards

    def account_of_bad(self) -> str:
        """How many were left out, why, where they are listed, and the first of them."""
        counts = ", ".join(f"{count:,} {kind}" for kind, count in self.bad.most_common())
        return f"{counts}; listed in {self._out / BAD_SAMPLES}, such as {self._first_bad}."

    def _note(self, problem: Problem) -> None:
        self.bad[problem.reason.partition(":")[0]] += 1
        # A name that is not UTF-8 cannot be printed as it is.
        shown = f"{problem.key}: {problem.reason}".encode(errors="backslashreplace").decode()
        self._first_bad = self._first_bad or shown
        with (self._out / BAD_SAMPLES).open("a") as file:
            file.write(json.dumps(asdict(problem)) + "\n")

    def _unique(self, key: str) -> str:
        """The key itself the first time, then with -2, -3, … where that is free."""
        name = key
        while name in self._used:
            self._used[key] += 1
            name = f"{key}-{self._used[key]}"
        self._used[name] = 1
        return name

    def _open_next(self) -> None:
        # webdataset takes seconds to import.
        from webdataset.writer import TarWriter

        self._close()
        path = self._out / f"shard-{len(self._partial):06d}.tar.partial"
        self._partial.append(path)
        self._file = path.open("wb")
        self._tar = TarWriter(self._file, user="", group="", mtime=0, encoder=False)

    def _close(self) -> None:
        if self._tar is not None:
            self._tar.close()
            self._file.close()
            self._tar = None


def _prepare(out: Path) -> None:
    """Makes the folder; what an earlier attempt without result left there goes."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"out: {out} cannot be made a folder ({error.strerror}); name a new one.") from None
    if not os.access(out, os.W_OK):
        raise InputError(f"out: {out} may not be written to; name another folder.")
    left = [path for path in out.iterdir() if path.name == BAD_SAMPLES or path.name.endswith(".tar.partial")]
    others = sorted(path.name for path in out.iterdir() if path not in left)
    if others:
        raise InputError(f"out: {out} already holds {others[0]}; name a new or empty folder.")
    for path in left:
        path.unlink()


def _members(pair: Pair, max_side: int | None) -> dict[str, bytes]:
    """A sample's files by extension.

    Raises:
        _Unusable: the picture is missing or unreadable, no caption is left once the blanks are off.
    """
    data = _read(pair.image)
    captions = list(dict.fromkeys(text for caption in pair.captions if (text := caption.strip())))
    if not captions:
        raise _Unusable("no caption: none given, or only empty ones")
    facts: dict[str, Any] = {"captions": captions} if len(captions) > 1 else {}
    if pair.group is not None:
        facts["group"] = pair.group
    extension, picture = _stored(pair.image, data, max_side)
    members = {extension: picture}
    try:
        members["txt"] = captions[0].encode()
        if facts:
            members["json"] = json.dumps(facts, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise _Unusable(f"unreadable text: {error}") from None
    return members


def _read(path: Path) -> bytes:
    # A regular file only: a table may name a device that never ends.
    with suppress(OSError, ValueError):
        if path.is_file():
            return path.read_bytes()
    raise _Unusable(f"missing image: {path} is no file that can be read")


def _stored(path: Path, data: bytes, max_side: int | None) -> tuple[str, bytes]:
    """A picture's extension and bytes in the shard: its own, unless it is too large or of a kind that shards lack."""
    try:
        image = decode(data)
    except ValueError as error:
        raise _Unusable(f"unreadable image: {path}: {error}") from None
    extension = path.suffix[1:].lower()
    if max_side is not None and max(image.size) > max_side:
        image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
        return "jpg", _encoded(image, "JPEG", quality=_JPEG_QUALITY)
    if extension not in STORED:
        extension = _EXTENSION_OF_FORMAT.get(Image.open(io.BytesIO(data)).format or "", "")
    return (extension, data) if extension else ("png", _encoded(image, "PNG"))


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
