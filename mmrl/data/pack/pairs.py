"""The image-text pairs of a folder or a table: where each image is, its captions, its group, its name in a shard."""

import ast
import itertools
import re
import unicodedata
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from mmrl.data.fetch import is_http
from mmrl.data.folder import NO_CAPTION, ImageFolder, Unusable
from mmrl.data.groups import NO_GROUP, group_id
from mmrl.data.index import Problem
from mmrl.data.pack.hub import HubTable
from mmrl.data.pack.tables import Row, Table
from mmrl.data.parsing import BOTH, IMAGE, TEXT
from mmrl.data.samples import BadSample
from mmrl.data.texts import caption_list, group_name, strip_blank
from mmrl.errors import InputError, did_you_mean
from mmrl.output.files import parse_json

IMAGE_COLUMNS = ("image", "image_path", "path", "filename", "file", "file_name", "img")
CAPTION_COLUMNS = ("caption", "captions", "text", "title")
"""The names of `folder.CAPTION_KEYS`. The order differs from theirs: shards that were packed before must stay equal."""
MISSING = frozenset(
    ("#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA", "NULL",
     "NaN", "None", "n/a", "nan", "null", "\\N")
)  # fmt: skip
"""Texts that stand for a missing caption or group in tables: those that pandas reads as missing, and MySQL's."""
T = TypeVar("T")
_LISTED_TEXT = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""")
_TEXT_LIST = re.compile(rf"\[\s*(?:{_LISTED_TEXT.pattern})(?:[\s,]+(?:{_LISTED_TEXT.pattern}))*\s*\]", re.DOTALL)


@dataclass(frozen=True)
class Columns:
    """The columns of a table that the user names, or keys in NAME.json; None and () for the default ones."""

    image: str | None = None
    captions: Sequence[str] = ()
    group: str | None = None
    second_text: str | None = None
    second_image: str | None = None
    sides: Collection[str] = BOTH
    """What a pair must have: an image, a caption, or both."""


@dataclass(frozen=True)
class Pair:
    """An image, not opened yet, with its captions and its group; or two images, or two texts."""

    origin: str
    """The folder or the table."""
    listed_as: str
    """Its key in bad_samples.jsonl."""
    key: str
    """Its name in a shard, before -2, -3, … is appended to equal ones."""
    image: Path | str | bytes | None
    """A file, an http(s) URL as a string, or the image file's bytes; None for two texts."""
    captions: list[str]
    group: str | None
    second_text: str = ""
    second_image: Path | str | bytes | None = None

    @property
    def images(self) -> tuple[Path | str | bytes | None, ...]:
        """The image and the second image."""
        return self.image, self.second_image

    def problem(self, reason: str) -> Problem:
        """The line of this pair in bad_samples.jsonl."""
        return Problem(self.origin, self.listed_as, reason)


class Missing(Unusable):
    """A row has no value where a pair may need one."""


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

    def groups(self) -> Iterator[int]:
        """The id of the group of each pair."""
        for number in range(len(self)):
            group = None
            with suppress(BadSample):
                if number < len(self._folder) and self._folder.has_metadata:
                    group = self._folder.image_file(number).group
            yield _id_of(group)

    def after(self, position: int) -> Iterator[Pair | Problem]:
        """All but the first `position` pairs."""
        for number in range(position, len(self._folder)):
            try:
                file = self._folder.image_file(number)
            except BadSample as error:
                yield error.problem
                continue
            key = safe_key(_name_of_path(file.path.relative_to(self._folder.folder)))
            yield Pair(str(self._folder.folder), file.key, key, file.path, file.captions, file.group)
        yield from self._folder.problems[max(0, position - len(self._folder)) :]


class TablePairs:
    """The rows of a table, in its order."""

    def __init__(self, table: Table | HubTable, named: Columns) -> None:
        """Finds the columns.

        Raises:
            InputError: the table has no such column, or none of the default ones; a column is named twice.
        """
        self._table, self._sides = table, named.sides
        # Nothing is downloaded unless the user named the column.
        self._may_fetch = named.image is not None
        seconds = {"second_text": named.second_text, "second_image": named.second_image}
        rest = set(table.columns) - set(seconds.values())
        self._image = None
        if IMAGE in named.sides:
            self._image = self._choose("image-column", [named.image] if named.image else [], IMAGE_COLUMNS, rest)[0]
        captions, needs_captions = named.captions, TEXT in named.sides
        self._captions = self._choose("caption-column", captions, CAPTION_COLUMNS, rest, needs_captions)
        self._group = None if named.group is None else self._choose("group-column", [named.group], ())[0]
        for name, column in seconds.items():
            option = f"{name.replace('_', '-')}-column"
            if column is not None and self._choose(option, [column], ())[0] in (self._image, *self._captions):
                raise InputError(f"{option}: {column} is the column of the image or of captions too; name another.")
        self._second_text, self._second_image = named.second_text, named.second_image
        self.columns = {"image": self._image, "captions": self._captions, "group": self._group}
        self.columns |= {name: column for name, column in seconds.items() if column is not None}

    def _choose(
        self,
        option: str,
        named: Sequence[str],
        defaults: Sequence[str],
        among: Collection[str] = (),
        is_needed: bool = True,
    ) -> list[str]:
        """The named columns, else the default ones that the table has and that are `among` these."""
        path, columns = self._table.path, self._table.columns
        for name in named:
            if name not in columns:
                raise InputError(f"{option}: {path} has no column {name!r}.{did_you_mean(name, columns)}")
        in_lower_case = {name.lower(): name for name in reversed(columns) if name in among}
        chosen = list(named) or [in_lower_case[name] for name in defaults if name in in_lower_case]
        for name in chosen:
            if columns.count(name) > 1:
                raise InputError(f"{option}: {path} has {columns.count(name)} columns {name!r}; rename all but one.")
        if not chosen and is_needed:
            raise InputError(
                f"{option}: {path} has none of the columns {', '.join(defaults)}; name one of {', '.join(columns)}."
            )
        return chosen

    def __len__(self) -> int:
        return self._table.count

    def fingerprint(self) -> dict[str, Any]:
        """Facts by which a resumed pack recognises its source."""
        return self._table.fingerprint()

    def groups(self) -> Iterator[int]:
        """The id of the group of each pair."""
        if self._group is None:
            yield from itertools.repeat(NO_GROUP, len(self))
            return
        for row in self._table.rows([self._group]):
            with suppress(UnicodeDecodeError):
                yield NO_GROUP if row.broken else _id_of(self._group_of(row))
                continue
            yield NO_GROUP

    def after(self, position: int) -> Iterator[Pair | Problem]:
        """All but the first `position` pairs."""
        used = {self._image, *self._captions, self._group, self._second_text, self._second_image}
        for row in self._table.rows(sorted(filter(None, used))):
            if row.number > position:
                yield self._pair(row)

    def _pair(self, row: Row) -> Pair | Problem:
        origin, listed_as = str(row.file), f"row {row.number}"
        if row.broken:
            return Problem(origin, listed_as, f"broken row: {row.broken}")
        try:
            name, image = f"{row.file.stem}-{row.number}", None
            if self._image is not None:
                name, image = self._image_of(row, self._image)
            captions = _read(TEXT in self._sides, self._texts_of, row, self._captions, "caption") or []
            group = self._group_of(row)
            second_text, second_image = self._second_of(row)
        except UnicodeDecodeError:
            return Problem(origin, listed_as, "unreadable text: bytes that are not UTF-8")
        except Unusable as error:
            return Problem(origin, listed_as, str(error))
        if any(_UNDECODED.search(text) for text in (*captions, group or "", second_text)):
            return Problem(origin, listed_as, "unreadable text: not UTF-8; save the table as UTF-8")
        key = safe_key(name)
        return Pair(origin, key, key, image, captions, group, second_text, second_image)

    def _group_of(self, row: Row) -> str | None:
        group = group_name(row.values.get(self._group)) if self._group else None
        return None if group in MISSING else group

    def _second_of(self, row: Row) -> tuple[str, Path | str | bytes | None]:
        """The second text and the second image; "" and None without one, if the run has both towers: a pair for one
        tower is nothing without it.

        Raises:
            Unusable: it is missing, of no use, or there are several.
        """
        is_needed, texts, image = len(self._sides) == 1, None, None
        if self._second_text is not None:
            texts = _read(is_needed, self._texts_of, row, [self._second_text], "second text")
        if self._second_image is not None:
            image = _read(is_needed, self._image_of, row, self._second_image)
        distinct = list(dict.fromkeys(filter(None, map(strip_blank, texts or []))))
        if len(distinct) > 1:
            raise Unusable(
                f"several second texts: {self._second_text} holds {len(distinct)}; write a row for each, with a "
                "common group"
            )
        return "".join(distinct), image and image[1]

    def _image_of(self, row: Row, column: str) -> tuple[str, Path | str | bytes]:
        """The name and the image of a column, as in Pair.

        Raises:
            Unusable: there is none.
        """
        image, name = row.values.get(column), f"{row.file.stem}-{row.number}"
        if isinstance(image, dict) and image.keys() & {"bytes", "path"}:  # as the library `datasets` stores images
            path = image.get("path")
            name = _name_of_path(Path(path)) if isinstance(path, str) and strip_blank(path) else name
            if image.get("bytes"):
                return name, image["bytes"]
            image = path
        if isinstance(image, bytes) and image:
            if not _is_text(image):  # no path
                return name, image
            image = image.decode()
        if image is None or image in ("", b"") or image != image:  # NaN
            raise Missing(f"missing image: {column} is empty")
        if not isinstance(image, str):
            raise Unusable(f"missing image: {column} holds a value of type {type(image).__name__}, not a path")
        if "://" not in image:
            return self._name_in(row.file.parent, Path(image)), row.file.parent / image
        image = strip_blank(image)
        if not is_http(image):
            raise Unusable(f"missing image: {image} is neither a path nor an http(s) URL")
        if not self._may_fetch and column == self._image:
            raise Unusable(f"missing image: {image} is a URL; name its column with --image-column to fetch it")
        return _name_of_url(image), image

    @staticmethod
    def _texts_of(row: Row, columns: Sequence[str], what: str) -> list[str]:
        """The texts in columns, of which one is not empty; a list of texts that was written as text is read as the
        list.

        Raises:
            Unusable: "no caption: …", with the reason if there is a value.
        """
        values = [row.values.get(column) for column in columns]
        found = [text for value in values for text in caption_list(value)]
        captions = [text for one in found for text in _listed_texts(one) if strip_blank(text) not in MISSING]
        if captions and any(map(strip_blank, captions)):
            return captions
        for column, value in zip(columns, values, strict=True):
            if found and strip_blank(found[0]):
                raise Missing(f"no {what}: {column} holds {found[0]!r}, which stands for a missing value")
            if value is not None and value == value and not caption_list(value) and value != []:
                raise Unusable(f"no {what}: {column} holds a value of type {type(value).__name__}, not text")
        raise Missing(NO_CAPTION.replace("caption", what))

    @staticmethod
    def _name_in(folder: Path, image: Path) -> str:
        """The name of a path relative to the table's folder; of the file name alone if the image is elsewhere."""
        folder = folder.absolute()
        if image.is_absolute():
            image = image.relative_to(folder) if image.is_relative_to(folder) else Path(image.name)
        return _name_of_path(image)


def _read(is_needed: bool, read: Callable[..., T], *arguments: Any) -> T | None:
    """What `read` returns; None if it is missing and not needed."""
    try:
        return read(*arguments)
    except Missing:
        if is_needed:
            raise
        return None


# What `tables` makes of a byte that is not UTF-8.
_UNDECODED = re.compile("[\udc80-\udcff]")


def _id_of(group: str | None) -> int:
    with suppress(UnicodeEncodeError):  # not UTF-8, and so listed as bad
        return NO_GROUP if group is None else group_id(group)
    return NO_GROUP


def _is_text(data: bytes) -> bool:
    try:
        return b"\0" not in data and bool(data.decode())
    except UnicodeDecodeError:
        return False


def _listed_texts(text: str) -> list[str]:
    """The texts of a list that pandas or NumPy wrote into a cell, as "['one', 'two']"; else the text itself."""
    stripped = strip_blank(text)
    if not _TEXT_LIST.fullmatch(stripped):
        return [text]
    with suppress(ValueError):
        return [one for one in parse_json(stripped) if isinstance(one, str)]
    try:
        return [str(ast.literal_eval(one)) for one in _LISTED_TEXT.findall(stripped)]
    except (ValueError, SyntaxError):
        return [text]


def safe_key(name: str) -> str:
    """A path without its extension -> a WebDataset key of letters, digits, '_' and '-': it would end at a dot."""
    return re.sub(r"[^\w-]", "_", unicodedata.normalize("NFC", name)) or "_"


def _name_of_url(url: str) -> str:
    try:
        return _name_of_path(PurePosixPath(unquote(urlsplit(url).path)))
    except ValueError:  # an unbalanced bracket in the host; the URL will be listed as bad
        return url


def _name_of_path(path: PurePath) -> str:
    """A path without its extension and without what leads out of its folder."""
    parts = [*path.parts[:-1], path.stem]
    return "/".join(part for part in parts if part not in (path.anchor, ".."))
