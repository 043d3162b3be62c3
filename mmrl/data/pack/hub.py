"""Hugging Face data sets as a source of `mmrl pack` and of training: `hf:NAME`, `hf:NAME:SPLIT`, `hf:FOLDER:SPLIT`.

They are opened by the library `datasets`, an extra: it knows the layouts of the hub and of `save_to_disk`. The Parquet
files of a data set are read without it, see tables.py. `datasets` 4 runs no code from a data set.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mmrl.data.download import locked
from mmrl.data.pack.tables import Row
from mmrl.data.shards import HUB, hub_folder
from mmrl.data.workers import usable_cores
from mmrl.errors import InputError


class HubTable:
    """A split of a data set, with the methods of a Table."""

    def __init__(self, spec: str) -> None:
        """Opens the data set; `datasets` downloads it on first use.

        Raises:
            InputError: `datasets` is not installed or cannot open it; it has several splits and none is named.
        """
        try:
            import datasets  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise InputError(
                f"source: {spec} needs datasets, which is not installed; run pip install 'mmrl-clip[datasets]', or "
                "pack its Parquet files."
            ) from None
        name = spec.removeprefix(HUB)
        name, split = (name, "") if ":" not in name else (name.rpartition(":")[0], name.rpartition(":")[2])
        is_saved = any((Path(name) / file).is_file() for file in ("state.json", "dataset_dict.json"))
        try:
            opened: Any = datasets.load_from_disk(name) if is_saved else datasets.load_dataset(name)
        except Exception as error:  # those of the hub, of pyarrow and of the file system
            raise InputError(f"source: datasets cannot open {spec} ({error}).") from None
        if isinstance(opened, dict):
            if split not in opened and (split or len(opened) > 1):
                raise InputError(f"source: {spec} names none of the splits; give {HUB}{name}:{'|'.join(opened)}.")
            split = split or next(iter(opened))
            opened = opened[split]
        elif split:
            raise InputError(f"source: {spec} names a split, but {name} has none; give {HUB}{name}.")
        for column, feature in opened.features.items():
            if isinstance(feature, datasets.Image):  # bytes or a path, as stored
                opened = opened.cast_column(column, datasets.Image(decode=False))
        self.path, self._data = Path(name) / split, opened
        self.columns, self.count = list(opened.column_names), len(opened)
        if not self.count:
            raise InputError(f"source: {spec} has no rows.")

    def fingerprint(self) -> dict[str, Any]:
        """Facts by which a resumed pack recognises its source."""
        return {"fingerprint": self._data._fingerprint}

    def rows(self, columns: list[str] | None = None) -> Iterator[Row]:
        """All rows in order, with these columns."""
        data = self._data if columns is None else self._data.select_columns(columns)
        for number, values in enumerate(data, start=1):
            yield Row(number, values, "", self.path)


def pack_missing(specs: Iterable[str]) -> None:
    """Packs those of these shard specs that are data sets and are not packed yet into the cache folder, where `expand`
    finds them. Of several processes of a host one packs, and the others wait.

    Raises:
        InputError: as HubTable and `pack_shards`; the cache folder cannot be written.
    """
    from mmrl.data.pack.command import pack_shards

    for spec in specs:
        if not spec.startswith(HUB):
            continue
        folder = hub_folder(spec)
        lock = folder.with_suffix(".lock")
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(locked(lock, wait=True))
            except OSError as error:
                raise InputError(
                    f"data.remote.folder: {lock} cannot be opened ({error.strerror}); set MMRL_CACHE to another folder."
                ) from None
            if not any(folder.glob("*.tar")):
                pack_shards(Path(spec), folder, workers=usable_cores(), quiet=os.environ.get("RANK", "0") != "0")
