"""What `mmrl embed` reads: the samples of shards, the images of a folder, or texts without images, in a fixed order and
from any position."""

import hashlib
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch

from mmrl.data.folder import CAPTION_KEYS, ImageFolder, files_below, is_image_folder
from mmrl.data.index import Problem, printable
from mmrl.data.pack.pairs import MISSING
from mmrl.data.pack.tables import KINDS, Row, Table
from mmrl.data.parsing import BOTH, IMAGE, TEXT
from mmrl.data.samples import NO_GROUP, BadSample, FieldsConfig, Sample, SampleReader, group_id
from mmrl.data.sources import open_reader
from mmrl.data.texts import caption_list, clean_captions, decode_text, group_name, strip_blank
from mmrl.errors import InputError

SECOND = FieldsConfig().second_text
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


class SampleSource:
    """The samples of shards, or of a folder of images."""

    def __init__(self, reader: SampleReader | ImageFolder, has_images: bool, second: bool) -> None:
        """Args:
        has_images: False: only the texts are read.
        second: the second members of samples are read, in place of the first ones.
        """
        self._reader, self.has_images, self._second = reader, has_images, second
        self.problems = reader.problems
        self.notes = reader.notes if isinstance(reader, SampleReader) else []
        self.fingerprint = reader.fingerprint

    def __len__(self) -> int:
        return len(self._reader)

    def read(self, start: int, end: int) -> Iterator[tuple[Sample, torch.Tensor | None] | Problem]:
        for number in range(start, end):
            try:
                yield self._read(number)
            except BadSample as error:
                yield error.problem

    def _read(self, number: int) -> tuple[Sample, torch.Tensor | None]:
        reader = self._reader
        if isinstance(reader, ImageFolder):
            if self.has_images:
                return reader.read_image(number)
            file = reader.image_file(number)
            group = NO_GROUP if file.group is None else group_id(file.group)
            return Sample(file.key, b"", file.captions, group, file.group or ""), None
        sample = reader.read(number, with_image=self.has_images)
        if self._second:
            texts = [sample.second_text] if sample.second_text else []
            sample = replace(sample, image=sample.second_image, captions=texts)
            if not (sample.image if self.has_images else texts):
                kind = IMAGE if self.has_images else TEXT
                raise BadSample(reader.problem(number, f"no second {kind} (fields.second_{kind})"))
        return sample, reader.decode(number, sample.image) if self.has_images else None


class TextSource:
    """The texts of a table's rows, of the lines of a .txt file, or of the .txt files of a folder; kept in memory.

    A row's texts are those of its columns CAPTION_KEYS, its key that of the first of its columns _KEY_COLUMNS.
    """

    has_images = False
    problems: list[Problem] = []  # noqa: RUF012 (never changed)

    def __init__(self, path: Path, group_key: str, second: bool = False) -> None:
        """Reads the texts.

        Args:
            second: those of the column SECOND instead.

        Raises:
            InputError: the file cannot be read, or has no texts.
        """
        self.notes: list[str] = []
        self._samples: list[Sample | Problem] = []
        if path.suffix.lower() in KINDS:
            table = Table(path)
            keys = (SECOND,) if second else CAPTION_KEYS
            names = [name for name in keys if name in table.columns]
            if not names:
                raise InputError(f"source: {path} has none of the columns {', '.join(keys)}; rename one.")
            self.notes.append(f"The texts of {path} are those of its columns {', '.join(names)}; images are not read.")
            self._samples += [self._of_row(path, row, names, group_key) for row in table.rows()]
        elif second:
            raise InputError(f"second: {path} has no second texts; give shards, or a table with a column {SECOND}.")
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


def open_source(source: str, group_key: str = "group", sides: Collection[str] = BOTH, second: bool = False) -> Source:
    """Opens shards; a folder that holds images and no shards; or texts: a table, a .txt file, a folder of .txt files.

    Args:
        group_key: the key of the group in a sample's JSON, or its column in a table.
        sides: the towers of the encoder. Without IMAGE, samples need a caption and no image; else an image and no
            caption.
        second: read the second members of samples (fields.second_image, fields.second_text), in place of the first;
            their texts alone if no sample has a second image.

    Raises:
        InputError: there are no images or texts, or no sample of the shards has a `group_key` other than the default,
            or a second member.
    """
    path, has_images = Path(source), IMAGE in sides
    if path.is_file() and path.suffix.lower() in (*KINDS, ".txt"):
        return TextSource(path, group_key, second)
    if is_image_folder(path):
        if second:
            raise InputError(f"second: {path} is a folder without shards, which has no second members; give shards.")
        try:
            folder = ImageFolder(path, group_key=group_key, require_captions=not has_images)
            return SampleSource(folder, has_images, second)
        except InputError:
            if not _text_files(path):
                raise
            return TextSource(path, group_key)
    fields = FieldsConfig() if group_key == "group" else FieldsConfig(group=group_key)
    if not second:
        return SampleSource(open_reader(source, fields, required=[IMAGE if has_images else TEXT]), has_images, second)
    reader = open_reader(source, fields, required=())
    found = [kind for kind in (IMAGE, TEXT) if kind in sides and reader.second_counts[kind]]
    if not found:
        raise InputError(
            f"second: none of {reader.looked_at} samples of {source} that were looked at has a second "
            f"{' or '.join(sides)} (KEY.second.jpg or the like; {SECOND!r} in the JSON)."
        )
    return SampleSource(reader, found[0] == IMAGE, second)


def _text_files(folder: Path) -> list[Path]:
    return [path for path in files_below(folder) if path.suffix.lower() == ".txt"]
