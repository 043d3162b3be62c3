"""A folder of images with captions: the reader of `mmrl pack`, `mmrl eval` and `mmrl embed`.

    FOLDER/
        sub/NAME.jpg    an image: one of `image_extensions`, in upper or lower case, or an image by its first bytes
        sub/NAME.txt    its caption, UTF-8
        sub/NAME.json   {"captions": […], "group": …}; captions under any of CAPTION_KEYS, a string or a list

Subfolders and links are followed; hidden files and hidden folders are skipped. An image's key is its path below FOLDER
with its extension, `sub/NAME.jpg`. Images that differ in their extension alone share their captions and their group.

Intended differences between the commands:
- `mmrl embed` embeds images without a caption too; `mmrl pack` and `mmrl eval` list them as bad samples.
- `mmrl pack` derives the names in its shards from the keys (`pairs.safe_key`), because a WebDataset key ends at its
  first dot, and appends -2, -3, … to names that become equal. Its list of bad samples has the keys of this reader.
- `mmrl pack --caption-column` and `--group-column` and `mmrl embed --group-key` replace the JSON keys.
"""

import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from mmrl.data.index import Problem, printable
from mmrl.data.samples import NO_GROUP, BadSample, Sample, group_id
from mmrl.data.shards import files_below
from mmrl.data.texts import caption_list, clean_captions, decode_text, group_name, strip_blank
from mmrl.errors import InputError
from mmrl.images.decode import decode_pixels, image_extensions
from mmrl.images.upright import format_of
from mmrl.output.files import parse_json

CAPTION_KEYS = ("captions", "caption", "text", "title")
"""Keys of NAME.json that hold captions; the captions are used in this order, after that of NAME.txt."""
NO_CAPTION = "no caption: none given, or only empty ones"


@dataclass(frozen=True)
class ImageFile:
    """An image file, not read yet, with its captions and its group."""

    key: str
    path: Path
    captions: list[str]
    """Stripped, distinct, not empty."""
    group: str | None


class Unusable(ValueError):
    """An image or a pair that cannot be used. The message is "KIND: detail"; bad samples are counted by KIND."""


class ImageFolder:
    """The images of a folder and its subfolders, sorted by path; an `ImageReader`. Text files are read on access."""

    def __init__(
        self,
        folder: Path,
        *,
        caption_keys: Sequence[str] = CAPTION_KEYS,
        group_key: str = "group",
        require_captions: bool = False,
        argument: str = "source",
    ) -> None:
        """Lists the folder's files.

        Args:
            require_captions: an image without a caption is a bad sample.
            argument: the command's name for the folder, for the error message.

        Raises:
            InputError: the folder holds no images.
        """
        self.folder = folder
        self._caption_keys, self._group_key, self._require_captions = caption_keys, group_key, require_captions
        self._images: list[tuple[str, Path]] = []
        self._texts: dict[str, dict[str, Path]] = {}
        for path in files_below(folder):
            stem, extension = path.relative_to(folder).with_suffix("").as_posix(), path.suffix[1:].lower()
            if extension in ("txt", "json"):
                self._texts.setdefault(stem, {})[extension] = path
            elif extension in image_extensions() or _is_image(path):
                self._images.append((stem, path))
        stems = {stem for stem, _ in self._images}
        for stem in self._texts.keys() - stems:  # macOS writes "é" as two characters, other systems as one
            forms = (unicodedata.normalize(form, stem) for form in ("NFC", "NFD"))
            same = next((form for form in forms if form in stems), None)
            if same is not None and self._texts[stem].keys().isdisjoint(self._texts.get(same, {})):
                self._texts.setdefault(same, {}).update(self._texts.pop(stem))
        if not self._images:
            raise InputError(f"{argument}: the folder {folder} holds no images (.jpg, .png, .webp, …).")
        self._images.sort()
        self.problems = [
            self._bad(stem, f"missing image: no image for {_names(self._texts[stem])}").problem
            for stem in sorted(self._texts.keys() - stems)
        ]
        """Captions without an image."""
        self.has_metadata = any("json" in files for files in self._texts.values())
        names = [stem + path.suffix for stem, path in self._images]
        names += [stem + path.suffix for stem, files in self._texts.items() for path in files.values()]
        self.num_files = len(names)
        """Images, texts and JSON files."""
        self.fingerprint = hashlib.blake2b(os.fsencode("\n".join(sorted(names))), digest_size=8).hexdigest()
        """Hash of the file names. The contents are not in it: reading them all would take long."""

    def __len__(self) -> int:
        return len(self._images)

    def image_file(self, number: int) -> ImageFile:
        """Image `number` with its captions and group; the image itself is not opened.

        Raises:
            BadSample: its texts cannot be read, or it has no caption and `require_captions` is set.
        """
        stem, path = self._images[number]
        key = path.relative_to(self.folder).as_posix()
        try:
            captions, group = self._read_texts(self._texts.get(stem, {}))
        except (ValueError, OSError) as error:
            raise self._bad(key, f"unreadable text: {error}") from None
        if self._require_captions and not captions:
            raise self._bad(key, NO_CAPTION)
        return ImageFile(printable(key), path, captions, group)

    def read_image(self, number: int) -> tuple[Sample, torch.Tensor]:
        """Sample `number` and its image, uint8 (C, H, W).

        Raises:
            BadSample: as `image_file`, or the image is missing or cannot be decoded.
        """
        file = self.image_file(number)
        try:
            data = read_image_file(file.path)
            pixels_CHW = decode_image(data, file.path)
        except Unusable as error:
            raise self._bad(file.key, str(error)) from None
        group = NO_GROUP if file.group is None else group_id(file.group)
        return Sample(file.key, data, file.captions, group, file.group or ""), pixels_CHW

    def _bad(self, key: str, reason: str) -> BadSample:
        return BadSample(Problem(str(self.folder), key, reason))

    def _read_texts(self, files: dict[str, Path]) -> tuple[list[str], str | None]:
        """The captions and the group in an image's .txt and .json file."""
        captions = [_read_text(files["txt"])] if "txt" in files else []
        if "json" not in files:
            return clean_captions(captions), None
        try:
            metadata = parse_json(_read_text(files["json"]))
        except json.JSONDecodeError as error:
            raise ValueError(f"{files['json'].name} is not JSON ({error})") from None
        if not isinstance(metadata, dict):
            raise ValueError(f"{files['json'].name} holds no JSON object")
        for key in self._caption_keys:
            captions += caption_list(metadata.get(key))
        group = group_name(metadata.get(self._group_key))
        (group or "").encode()
        return clean_captions(captions), group


def is_image_folder(path: Path) -> bool:
    """Whether this is a folder without shards, to be read as a folder of images."""
    return path.is_dir() and not any(file.suffix == ".tar" for file in files_below(path))


def read_image_file(path: Path) -> bytes:
    """The bytes of an image file; if there is none, of one whose name differs as names in tables of other systems do:
    by blanks at its ends, by backslashes as separators, by the Unicode form.

    Raises:
        Unusable: "missing image: …".
    """
    spellings = (str(path), *("/".join(map(strip_blank, re.split(ends, str(path)))) for ends in ("/", r"[/\\]")))
    for spelling in spellings:
        for form in (None, "NFC", "NFD"):
            file = Path(unicodedata.normalize(form, spelling) if form else spelling)
            # Regular files only: a table may name a device that never ends.
            with suppress(OSError, ValueError):
                if file.is_file():
                    return file.read_bytes()
    raise Unusable(f"missing image: {path} is not a readable file")


def decode_image(data: bytes, source: Path | str) -> torch.Tensor:
    """An image file's bytes -> uint8 (C, H, W).

    Raises:
        Unusable: "unreadable image: SOURCE: …".
    """
    try:
        return decode_pixels(data)
    except ValueError as error:
        raise Unusable(f"unreadable image: {source}: {error}") from None


def _is_image(path: Path) -> bool:
    """Whether the first bytes of a file are those of an image that can be read."""
    with suppress(OSError):
        if path.is_file():
            with path.open("rb") as file:
                return bool(format_of(file.read(32)))
    return False


def _read_text(path: Path) -> str:
    if not path.is_file():  # a pipe would be waited for
        raise ValueError(f"{path.name} is not a readable file")
    try:
        return decode_text(path.read_bytes())
    except UnicodeDecodeError:
        raise ValueError(f"{path.name} is not UTF-8") from None


def _names(files: dict[str, Path]) -> str:
    return " and ".join(path.name for path in files.values())
