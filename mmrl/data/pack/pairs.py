"""The image-text pairs of a folder or a table: where each image is, its captions, its group, its name in a shard."""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from mmrl.data.fetch import is_url
from mmrl.data.folder import ImageFolder, caption_list, group_name
from mmrl.data.index import Problem
from mmrl.data.pack.tables import Row, Table
from mmrl.data.samples import BadSample
from mmrl.errors import InputError, did_you_mean

IMAGE_COLUMNS = ("image", "image_path", "path", "filename", "file")
CAPTION_COLUMNS = ("caption", "captions", "text", "title")
"""The names of `folder.CAPTION_KEYS`. The order differs from theirs: shards that were packed before must stay equal."""


@dataclass(frozen=True)
class Pair:
    """An image, not opened yet, with its captions and its group."""

    origin: str
    """The folder or the table."""
    listed_as: str
    """Its key in bad_samples.jsonl."""
    key: str
    """Its name in a shard, before -2, -3, … is appended to equal ones."""
    image: Path | str
    """A file, or an http(s) URL as a string."""
    captions: list[str]
    group: str | None

    def problem(self, reason: str) -> Problem:
        """The line of this pair in bad_samples.jsonl."""
        return Problem(self.origin, self.listed_as, reason)


class FolderPairs:
    """The images of a folder, in the order of `ImageFolder`; then its captions without an image, as problems."""

    columns = None

    def __init__(self, folder: ImageFolder) -> None:
        self._folder = folder

    def __len__(self) -> int:
        return len(self._folder) + len(self._folder.problems)

    def fingerprint(self) -> dict[str, Any]:
        """Facts by which a resumed pack recognises its source."""
        return {"count of files": self._folder.num_files, "hash of file names": self._folder.fingerprint}

    def after(self, position: int) -> Iterator[Pair | Problem]:
        """All but the first `position` pairs."""
        for number in range(position, len(self._folder)):
            try:
                file = self._folder.image_file(number)
            except BadSample as error:
                yield error.problem
                continue
            key = _key_of_path(file.path.relative_to(self._folder.folder))
            yield Pair(str(self._folder.folder), file.key, key, file.path, file.captions, file.group)
        yield from self._folder.problems[max(0, position - len(self._folder)) :]


class TablePairs:
    """The rows of a table, in its order."""

    def __init__(self, table: Table, image: str | None, captions: Sequence[str], group: str | None) -> None:
        """`image`, `captions` and `group` are the columns that the user named.

        Raises:
            InputError: the table has no such column, or none of the default ones.
        """
        self._table = table
        # Nothing is downloaded unless the user named the column.
        self._may_fetch = image is not None
        self._image = self._choose("image-column", [image] if image else [], IMAGE_COLUMNS)[0]
        self._captions = self._choose("caption-column", captions, CAPTION_COLUMNS)
        self._group = None if group is None else self._choose("group-column", [group], ())[0]
        self.columns = {"image": self._image, "captions": self._captions, "group": self._group}

    def _choose(self, option: str, named: Sequence[str], defaults: Sequence[str]) -> list[str]:
        """The named columns, else the default ones that the table has."""
        path, columns = self._table.path, self._table.columns
        for name in named:
            if name not in columns:
                raise InputError(f"{option}: {path} has no column {name!r}.{did_you_mean(name, columns)}")
        chosen = list(named) or [name for name in defaults if name in columns]
        if not chosen:
            raise InputError(
                f"{option}: {path} has none of the columns {', '.join(defaults)}; name one of {', '.join(columns)}."
            )
        return chosen

    def __len__(self) -> int:
        return self._table.count

    def fingerprint(self) -> dict[str, Any]:
        """Facts by which a resumed pack recognises its source."""
        status = self._table.path.stat()
        return {"size of the table": status.st_size, "time of the table": status.st_mtime_ns}

    def after(self, position: int) -> Iterator[Pair | Problem]:
        """All but the first `position` pairs."""
        used = {self._image, *self._captions, *([self._group] if self._group else [])}
        for row in self._table.rows(sorted(used)):
            if row.number > position:
                yield self._pair(row)

    def _pair(self, row: Row) -> Pair | Problem:
        origin, listed_as = str(self._table.path), f"row {row.number}"
        if row.broken:
            return Problem(origin, listed_as, f"broken row: {row.broken}")
        image = row.values.get(self._image)
        if image is None or image == "":
            return Problem(origin, listed_as, f"missing image: {self._image} is empty")
        if not isinstance(image, str):
            kind = type(image).__name__
            return Problem(origin, listed_as, f"missing image: {self._image} holds a value of type {kind}, not a path")
        if "://" in image:
            image = image.strip()
            if not is_url(image):
                return Problem(origin, listed_as, f"missing image: {image} is neither a path nor an http(s) URL")
            if not self._may_fetch:
                reason = f"missing image: {image} is a URL; name its column with --image-column to fetch it"
                return Problem(origin, listed_as, reason)
        captions = [caption for column in self._captions for caption in caption_list(row.values.get(column))]
        group = group_name(row.values.get(self._group)) if self._group else None
        if is_url(image):
            key, location = _key_of_url(image), image
        else:
            key, location = self._key(Path(image)), self._table.path.parent / image
        return Pair(origin, key, key, location, captions, group)

    def _key(self, image: Path) -> str:
        """The key of a path relative to the table's folder; of the file name alone if the image is elsewhere."""
        folder = self._table.path.parent.absolute()
        if image.is_absolute():
            image = image.relative_to(folder) if image.is_relative_to(folder) else Path(image.name)
        return _key_of_path(image)


def safe_key(name: str) -> str:
    """A path without its extension -> a WebDataset key of letters, digits, '_' and '-': it would end at a dot."""
    return re.sub(r"[^\w-]", "_", unicodedata.normalize("NFC", name)) or "_"


def _key_of_url(url: str) -> str:
    try:
        return _key_of_path(PurePosixPath(unquote(urlsplit(url).path)))
    except ValueError:  # an unbalanced bracket in the host; the URL will be listed as bad
        return safe_key(url)


def _key_of_path(path: PurePath) -> str:
    parts = [*path.parts[:-1], path.stem]
    return safe_key("/".join(part for part in parts if part not in (path.anchor, "..")))
