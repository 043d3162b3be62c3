"""What `mmrl embed` reads: the samples of shards, the images of a folder, or texts without images, in a fixed order and
from any position."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch

from mmrl.data.folder import CAPTION_KEYS, ImageFolder, files_below, is_image_folder
from mmrl.data.index import Problem, printable
from mmrl.data.pack.pairs import MISSING
from mmrl.data.pack.tables import KINDS, Row, Table
from mmrl.data.samples import NO_GROUP, BadSample, FieldsConfig, Sample, SampleReader, group_id
from mmrl.data.sources import open_reader
from mmrl.data.texts import caption_list, clean_captions, decode_text, group_name, strip_blank
from mmrl.errors import InputError

_KEY_COLUMNS = ("key", "id", "_id")


class Source(Protocol):
    """Samples by position."""

    has_images: bool
    problems: list[Problem]
    """What is known to be bad before any sample is read; it has no position."""
    notes: list[str]
    """What is not read; to be printed before work begins."""
    fingerprint: str
    """Differs between sets of samples."""

    def __len__(self) -> int: ...

    def read(self, start: int, end: int) -> Iterator[tuple[Sample, torch.Tensor | None] | Problem]:
        """Samples `start` … `end` - 1, each with its image, uint8 (C, H, W), or None if the source has none; a Problem
        in place of each bad one."""
        ...


class ImageSource:
    """The images of shards or of a folder."""

    has_images = True

    def __init__(self, reader: SampleReader | ImageFolder) -> None:
        self._reader = reader
        self.problems = reader.problems
        self.notes = reader.notes if isinstance(reader, SampleReader) else []
        self.fingerprint = reader.fingerprint

    def __len__(self) -> int:
        return len(self._reader)

    def read(self, start: int, end: int) -> Iterator[tuple[Sample, torch.Tensor] | Problem]:
        for number in range(start, end):
            try:
                yield self._reader.read_image(number)
            except BadSample as error:
                yield error.problem


class TextSource:
    """The texts of a table's rows, of the lines of a .txt file, or of the .txt files of a folder; kept in memory.

    A row's texts are those of its columns CAPTION_KEYS, its key that of the first of its columns _KEY_COLUMNS.
    """

    has_images = False
    problems: list[Problem] = []  # noqa: RUF012 (never changed)

    def __init__(self, path: Path, group_key: str) -> None:
        """Reads the texts.

        Raises:
            InputError: the file cannot be read, or has no texts.
        """
        self.notes: list[str] = []
        self._samples: list[Sample | Problem] = []
        if path.suffix.lower() in KINDS:
            table = Table(path)
            names = [name for name in CAPTION_KEYS if name in table.columns]
            if not names:
                raise InputError(f"source: {path} has none of the columns {', '.join(CAPTION_KEYS)}; rename one.")
            self.notes.append(f"The texts of {path} are those of its columns {', '.join(names)}; images are not read.")
            self._samples += [self._of_row(path, row, names, group_key) for row in table.rows()]
        else:
            files = [path] if path.is_file() else _text_files(path)
            for file in files:
                try:
                    text = decode_text(file.read_bytes())
                except (OSError, UnicodeDecodeError) as error:
                    self._samples.append(Problem(str(path), printable(file.name), f"unreadable text: {error}"))
                    continue
                name = printable(file.relative_to(path).as_posix() if file != path else path.name)
                numbered = enumerate(text.splitlines(), start=1)
                lines = [(f"{name}/{number}", line) for number, line in numbered] if file == path else [(name, text)]
                self._samples += [Sample(key, b"", [line], NO_GROUP) for key, line in lines if strip_blank(line)]
        if not any(isinstance(sample, Sample) for sample in self._samples):
            raise InputError(f"source: {path} holds no texts.")
        facts = [[one.name, one.captions, one.group] for one in self._samples if isinstance(one, Sample)]
        self.fingerprint = hashlib.blake2b(repr(facts).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()

    def __len__(self) -> int:
        return len(self._samples)

    def read(self, start: int, end: int) -> Iterator[tuple[Sample, None] | Problem]:
        for sample in self._samples[start:end]:
            yield sample if isinstance(sample, Problem) else (sample, None)

    @staticmethod
    def _of_row(path: Path, row: Row, names: list[str], group_key: str) -> Sample | Problem:
        keys = (row.values.get(name) for name in _KEY_COLUMNS)
        key = next((str(value) for value in keys if value not in (None, "")), f"{path.name}/{row.number}")
        try:
            texts = clean_captions(text for name in names for text in caption_list(row.values.get(name)))
            group = group_name(row.values.get(group_key))
            key.encode()
        except UnicodeError:
            return Problem(str(path), f"row {row.number}", "unreadable text: not UTF-8; save the table as UTF-8")
        texts = [text for text in texts if text not in MISSING]
        if row.broken or not texts:
            return Problem(str(path), f"row {row.number}", f"broken row: {row.broken}" if row.broken else "no text")
        return Sample(key, b"", texts, NO_GROUP if group is None else group_id(group), group or "")


def open_source(source: str, group_key: str = "group") -> Source:
    """Opens shards; a folder that holds images and no shards; or texts: a table, a .txt file, a folder of .txt files.

    Args:
        group_key: the key of the group in a sample's JSON, or its column in a table.

    Images need no captions.

    Raises:
        InputError: there are no images or texts, or no sample of the shards has a `group_key` other than the default.
    """
    path = Path(source)
    if path.is_file() and path.suffix.lower() in (*KINDS, ".txt"):
        return TextSource(path, group_key)
    if is_image_folder(path):
        try:
            return ImageSource(ImageFolder(path, group_key=group_key))
        except InputError:
            if not _text_files(path):
                raise
            return TextSource(path, group_key)
    fields = FieldsConfig() if group_key == "group" else FieldsConfig(group=group_key)
    return ImageSource(open_reader(source, fields, require_captions=False))


def _text_files(folder: Path) -> list[Path]:
    return [path for path in files_below(folder) if path.suffix.lower() == ".txt"]
