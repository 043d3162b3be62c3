"""Hard negatives of a sample: other samples and captions, named in its JSON or found by `mmrl mine`.

Which of them a row gets is a pure function of (seed, epoch, sample).
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmrl.data import draws
from mmrl.data.arrow import arrow
from mmrl.data.captions import pick_caption
from mmrl.data.groups import NO_GROUP
from mmrl.data.lru import LruCache
from mmrl.data.samples import BadSample, Sample, SampleReader
from mmrl.data.sources import DataConfig
from mmrl.errors import InputError
from mmrl.output.files import parse_json, path_inside

MINED, FORMAT = "mined.json", "mmrl-negatives-1"
_DRAW = 1 << 25
# Limits per process: samples of the shards whose keys, or mined negatives, are in memory.
_KEYS, _ROWS = 500_000, 300_000
# Samples that are read at the start, to tell a missing field from samples without negatives.
_LOOKED_AT = 64
Load = Callable[[int], tuple[Sample, torch.Tensor | None, Any] | None]
"""Reads a sample, and its image if that is asked for; None if it is bad."""


@dataclass(frozen=True)
class Negative:
    """A text that is wrong for a row, and an image that is, if it is that of a sample."""

    key: str
    text: str
    group: int
    index: int | None = None
    """The sample that is loaded for it; None if it is a caption only."""
    sample: Sample | None = None
    image_CHW: torch.Tensor | None = None


class Negatives:
    """The hard negatives of each sample of a set."""

    def __init__(self, reader: SampleReader, seed: int, config: DataConfig, second_texts: bool = False) -> None:
        """Args:
        second_texts: a sample's wrong text is its second one, if it has one: texts are compared with second texts.

        Raises:
            InputError: no sample names negatives; the mined ones cannot be read, or are of another set; images of mined
            negatives are wanted, and they are captions only, or the shards are remote.
        """
        self._reader, self._seed, self._config, self._second_texts = reader, seed, config, second_texts
        self._keys = _SampleKeys(reader)
        self._mined = None if config.negatives_from is None else _Mined(Path(config.negatives_from), reader)
        self.identity = "" if self._mined is None else self._mined.identity
        """A hash of the mined negatives."""
        if self._mined is None:
            self._check_field()
        elif config.negatives_images and (reader.is_remote or not self._mined.has_keys):
            why = "the shards are remote" if reader.is_remote else "they are captions only"
            raise InputError(
                f"data.negatives_images: the negatives in {config.negatives_from} have no images to load, since {why}; "
                "set it to false."
            )

    def draw(self, epoch: int, index: int, sample: Sample, load: Load) -> Iterator[Negative]:
        """The usable negatives of sample + copy * N `index`, in a random order."""
        own = index % len(self._reader)
        entries, key = self._entries(own, sample), (self._seed, epoch, index, _DRAW)
        for n in draws.permutation(len(entries), *key):
            one = entries[n]
            if one.index is None:
                yield one
            elif one.index != own and (loaded := load(one.index)) is not None:
                other, image_CHW, _ = loaded
                choice = pick_caption(len(other.captions), self._config.captions, float(draws.uniform(*key, int(n), 0)))
                text = one.text or (other.second_text if self._second_texts else "") or other.captions[choice]
                yield replace(one, key=other.name, text=text, group=other.group, sample=other, image_CHW=image_CHW)

    def _entries(self, index: int, sample: Sample) -> list[Negative]:
        """The negatives of a sample, not loaded yet; the text of a sample is empty if any of its captions will do."""
        shard, row = self._reader.locate(index)
        if self._mined is not None:
            mined = self._mined.of(shard, row)
            if not self._config.negatives_images:
                return mined
            return [replace(one, index=self._keys.find(one.key, shard)) for one in mined]
        found = [(name, self._keys.find(name, shard)) for name in dict.fromkeys(sample.negatives)]
        # A caption has no group, and no key of its own.
        return [Negative(sample.name, "" if one is not None else name, NO_GROUP, one) for name, one in found]

    def _check_field(self) -> None:
        first = self._reader.sources[0].shards[0].samples
        last = (first if self._reader.is_remote else len(self._reader)) - 1
        looked_at = np.unique(np.linspace(0, last, _LOOKED_AT).astype(int)).tolist()
        for index in looked_at:
            try:
                if self._reader.read(index, with_image=False).negatives:
                    return
            except BadSample:
                continue
        key = self._config.fields.negatives
        raise InputError(
            f"data.negatives: none of {len(looked_at)} samples has a list {key!r} in its JSON; set fields.negatives to "
            "the key that you have, or data.negatives_from to the folder that mmrl mine wrote."
        )


class _SampleKeys:
    """Finds samples by their keys."""

    def __init__(self, reader: SampleReader) -> None:
        self._reader = reader
        self._shards = {reader.shard_name(shard): shard for shard in range(reader.num_shards)}
        self._rows = LruCache(_KEYS, self._load_rows, size_of=len)

    def find(self, name: str, shard: int) -> int | None:
        """The sample with this key in a shard, or with this "shard/key" in the set; None if there is none.

        Raises:
            InputError: it is in another shard of a remote set, or that shard cannot be read.
        """
        row, parts = self._rows[shard].get(name), name.split("/")
        for cut in range(1, len(parts)):
            if row is not None:
                break
            other = self._shards.get("/".join(parts[:cut]))
            if other is None:
                continue
            if other != shard and self._reader.is_remote:
                raise InputError(
                    f"fields.negatives: {name} is in another shard of a remote set, which would be downloaded for it; "
                    "name captions instead of samples, e.g. by mmrl mine --captions and data.negatives_from."
                )
            shard, row = other, self._rows[other].get("/".join(parts[cut:]))
        return None if row is None else self._reader.start_of(shard) + row

    def _load_rows(self, shard: int) -> dict[str, int]:
        return {key: row for row, key in enumerate(self._reader.keys(shard))}


class _Mined:
    """A folder that `mmrl mine` wrote, read shard by shard."""

    def __init__(self, folder: Path, reader: SampleReader) -> None:
        arrow("data.negatives_from")
        self._folder, self._reader = folder, reader
        try:
            text = (folder / MINED).read_text()
            facts = parse_json(text)
            if facts["format"] != FORMAT:
                raise ValueError(f"its format is {facts['format']}")
            self._files, layout, self.has_keys = facts["files"], facts["layout"], not facts["settings"]["captions"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"data.negatives_from: {folder / MINED} cannot be read ({error}); give a folder that mmrl mine wrote."
            ) from None
        names = [reader.shard_name(shard) for shard in range(reader.num_shards)]
        if layout != reader.plain_layout or [*self._files] != names:
            raise InputError(
                f"data.negatives_from: {folder} is of another set than data.train; run mmrl mine on those shards."
            )
        self.identity = hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
        self._shards = LruCache(_ROWS, self._open, size_of=lambda one: len(one[0]))

    def of(self, shard: int, row: int) -> list[Negative]:
        """The negatives of a sample."""
        table, row_N = self._shards[shard]
        if row_N[row] < 0:  # a sample without a caption when it was mined
            return []
        columns = (table[name][int(row_N[row])].as_py() for name in ("negatives", "captions", "groups"))
        keys, captions, groups = columns
        return [
            Negative(key, caption, group)
            for key, caption, group in zip(keys or [""] * len(captions), captions, groups, strict=True)
        ]

    def _open(self, shard: int) -> tuple[Any, np.ndarray]:
        """The table of a shard, and its row for each sample of the shard, or -1."""
        pyarrow, parquet = arrow("data.negatives_from")
        name = self._reader.shard_name(shard)
        path = path_inside(self._folder, self._files[name])
        try:
            columns = ["key", "negatives", "captions", "groups"]
            table = parquet.read_table(path, columns=columns, use_threads=False).combine_chunks()
            row_of = {key: row for row, key in enumerate(table["key"].to_pylist())}
            if missing := set(columns) - {*table.column_names}:
                raise ValueError(f"it lacks {min(missing)}")
        except (pyarrow.ArrowException, OSError, ValueError, KeyError) as error:
            raise InputError(f"data.negatives_from: {path} cannot be read ({error}); run mmrl mine again.") from None
        return table, np.array([row_of.get(f"{name}/{key}", -1) for key in self._reader.keys(shard)])
