"""A user's folder or table -> image-text pairs: where each picture lies, what is said of it, what its key will be."""

import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from mmrl.data.fetch import is_address
from mmrl.data.index import Problem
from mmrl.data.pack.tables import Row, Table
from mmrl.data.samples import FieldsConfig
from mmrl.errors import InputError, did_you_mean

IMAGE_COLUMNS = ("image", "image_path", "path", "filename", "file")
CAPTION_COLUMNS = ("caption", "captions", "text", "title")
# Pictures that a shard holds as they are, and those that Pillow reads but a shard does not hold.
STORED = tuple(FieldsConfig().image)
CONVERTED = ("bmp", "gif", "tif", "tiff")


@dataclass(frozen=True)
class Pair:
    """A picture's place and what is said of it, not yet opened. `origin` is the table that it stands in, or ''."""

    origin: str
    key: str
    image: Path | str
    """A file, or an http(s) address as text."""
    captions: list[str]
    group: str | None


class FolderPairs:
    """The pictures of a folder and of those below it, sorted by path. Hidden files are passed over."""

    def __init__(self, folder: Path, caption_keys: Sequence[str], group_key: str) -> None:
        self.columns = None
        self._caption_keys, self._group_key = caption_keys, group_key
        images: list[tuple[str, Path]] = []
        texts: dict[str, dict[str, Path]] = {}
        for path in _files_below(folder):
            stem = path.relative_to(folder).with_suffix("").as_posix()
            extension = path.suffix[1:].lower()
            if extension in (*STORED, *CONVERTED):
                images.append((stem, path))
            elif extension in ("txt", "json"):
                texts.setdefault(stem, {})[extension] = path
        if not images:
            raise InputError(f"source: the folder {folder} holds no picture (.{', .'.join((*STORED, *CONVERTED))}).")
        self._images = sorted(images)
        self._texts = texts
        self._alone = sorted(texts.keys() - {stem for stem, _ in images})

    def __len__(self) -> int:
        return len(self._images) + len(self._alone)

    def fingerprint(self) -> dict[str, Any]:
        """By what a folder is known again: its files' names, since to look into all of them would take long."""
        names = [stem + path.suffix for stem, path in self._images]
        names += [stem + path.suffix for stem, files in self._texts.items() for path in files.values()]
        digest = hashlib.blake2b(os.fsencode("\n".join(sorted(names))), digest_size=8)
        return {"count of files": len(names), "hash of file names": digest.hexdigest()}

    def after(self, position: int) -> Iterator[Pair | Problem]:
        """What follows the first `position` of them."""
        for stem, path in self._images[position:]:
            try:
                captions, group = self._said_of(self._texts.get(stem, {}))
                yield Pair("", safe_key(stem), path, captions, group)
            except (ValueError, OSError) as error:
                yield Problem("", safe_key(stem), f"unreadable text: {error}")
        for stem in self._alone[max(0, position - len(self._images)) :]:
            names = " and ".join(path.name for path in self._texts[stem].values())
            yield Problem("", safe_key(stem), f"missing image: no picture beside {names}")

    def _said_of(self, files: dict[str, Path]) -> tuple[list[str], str | None]:
        captions = [_text_in(files["txt"])] if "txt" in files else []
        if "json" not in files:
            return captions, None
        try:
            metadata = json.loads(_text_in(files["json"]))
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{files['json'].name} is not JSON ({error})") from None
        if not isinstance(metadata, dict):
            raise ValueError(f"{files['json'].name} holds no JSON object")
        for key in self._caption_keys:
            captions += _texts_of(metadata.get(key))
        return captions, _group_of(metadata.get(self._group_key))


def _text_in(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path.name} is not UTF-8") from None


def _files_below(folder: Path) -> Iterator[Path]:
    """Links are followed, to folders too, but into no folder twice."""
    seen: set[tuple[int, int]] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        status = Path(place).stat()
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(place, name) for name in sorted(names) if not name.startswith("."))


class TablePairs:
    """The rows of a table, in its order."""

    def __init__(self, table: Table, image: str | None, captions: Sequence[str], group: str | None) -> None:
        self._table = table
        # The permission to fetch: nothing goes out into the network for a column that nobody named.
        self._may_fetch = image is not None
        self._image = self._choose("image-column", [image] if image else [], IMAGE_COLUMNS)[0]
        self._captions = self._choose("caption-column", captions, CAPTION_COLUMNS)
        self._group = None if group is None else self._choose("group-column", [group], ())[0]
        self.columns = {"image": self._image, "captions": self._captions, "group": self._group}

    def _choose(self, option: str, named: Sequence[str], usual: Sequence[str]) -> list[str]:
        """The columns that are named, or those of the usual ones that there are."""
        path, columns = self._table.path, self._table.columns
        for name in named:
            if name not in columns:
                raise InputError(f"{option}: {path} has no column {name!r}.{did_you_mean(name, columns)}")
        chosen = list(named) or [name for name in usual if name in columns]
        if not chosen:
            raise InputError(
                f"{option}: {path} has none of {', '.join(usual)}; its columns are {', '.join(columns)}. Name one."
            )
        return chosen

    def __len__(self) -> int:
        return self._table.count

    def fingerprint(self) -> dict[str, Any]:
        """By what a table is known again."""
        status = self._table.path.stat()
        return {"size of the table": status.st_size, "time of the table": status.st_mtime_ns}

    def after(self, position: int) -> Iterator[Pair | Problem]:
        """What follows the first `position` of them."""
        used = {self._image, *self._captions, *([self._group] if self._group else [])}
        for row in self._table.rows(sorted(used)):
            if row.number > position:
                yield self._pair(row)

    def _pair(self, row: Row) -> Pair | Problem:
        origin, place = str(self._table.path), f"row {row.number}"
        if row.broken:
            return Problem(origin, place, f"broken row: {row.broken}")
        image = row.values.get(self._image)
        if image is None or image == "":
            return Problem(origin, place, f"missing image: {self._image} is empty")
        if not isinstance(image, str):
            return Problem(origin, place, f"missing image: {self._image} holds no path but a {type(image).__name__}")
        if "://" in image:
            image = image.strip()
            if not is_address(image):
                return Problem(origin, place, f"missing image: {image} is neither a path nor an http(s) address")
            if not self._may_fetch:
                reason = f"missing image: {image} is an address; name its column by --image-column to fetch it"
                return Problem(origin, place, reason)
        captions = [caption for column in self._captions for caption in _texts_of(row.values.get(column))]
        group = _group_of(row.values.get(self._group)) if self._group else None
        if is_address(image):
            return Pair(origin, _key_of_address(image), image, captions, group)
        return Pair(origin, self._key(image), self._table.path.parent / image, captions, group)

    def _key(self, image: str) -> str:
        """From the path as the table has it; from its last part where it is absolute and lies elsewhere."""
        path, root = Path(image), self._table.path.parent.absolute()
        if path.is_absolute():
            path = path.relative_to(root) if path.is_relative_to(root) else Path(path.name)
        return _key_of(path)


def _key_of_address(address: str) -> str:
    try:
        return _key_of(PurePosixPath(unquote(urlsplit(address).path)))
    except ValueError:  # half a pair of brackets in the host: bad anyway, so all of it may be its name
        return safe_key(address)


def _key_of(path: PurePath) -> str:
    parts = [*path.parts[:-1], path.stem]
    return safe_key("/".join(part for part in parts if part not in (path.anchor, "..")))


def _texts_of(value: Any) -> list[str]:
    """The texts of a cell: one, or those of a list."""
    values = value if isinstance(value, list) else [value]
    return [text for text in values if isinstance(text, str)]


def _group_of(value: Any) -> str | None:
    # Parquet's missing numbers come as NaN, which differs from itself.
    return None if value is None or value == "" or value != value else str(value)


def safe_key(name: str) -> str:
    """A path without its extension -> a WebDataset key: letters, digits, '_' and '-'; a key ends at its first dot."""
    return re.sub(r"[^\w-]", "_", unicodedata.normalize("NFC", name)) or "_"
