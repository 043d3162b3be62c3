"""`mmrl mine`: hard negatives for training: for each sample of a set, the nearest wrong items by a model.

    OUT/
        SHARD.parquet    a row per sample: key, and of its negatives: negatives (keys), captions, groups, scores
        mined.json       format, encoder, settings, layout of the set, counts; written last
        embeddings/      as `mmrl embed --texts` writes it, for further runs with other settings
        embedded.json    of what embeddings/ is

Shapes: N samples with a caption, M captions, C distinct ones, d dims.
"""

import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from mmrl.data.arrow import arrow
from mmrl.data.captions import caption_id
from mmrl.data.folder import is_image_folder
from mmrl.data.groups import NO_GROUP, group_id, own_group
from mmrl.data.negatives import FORMAT, MINED
from mmrl.data.parsing import IMAGE
from mmrl.data.samples import FieldsConfig
from mmrl.data.sources import open_reader
from mmrl.errors import InputError
from mmrl.inference.evaluated import require_both_towers
from mmrl.output.console import print_line
from mmrl.output.files import atomic_path, check_report_folder, create_folder, parse_json, path_inside, write_atomic
from mmrl.output.progress import progress_bar
from mmrl.search.embed import EMBEDDINGS, TEXTS, embed_images
from mmrl.search.encoder_identity import identify_encoder
from mmrl.search.mining import Bounds, Lists, MiningSet, Negatives, best
from mmrl.search.table import METADATA_KEY, VECTORS, Column, copy_vectors
from mmrl.version import __version__

EMBEDDED, FOLDER = "embedded.json", "embeddings"
DIRECTIONS = ("image_to_text", "text_to_image", "both")
_EXAMPLES, _SHOWN = 5, 3


@dataclass(frozen=True)
class MineOptions:
    """What is mined."""

    direction: str = "image_to_text"
    num: int = 8
    """Negatives per sample."""
    margin: float = 0.05
    """Candidates that score above the matching pair's score minus this are skipped: they may be right."""
    relative_margin: float = 0.0
    """As `margin`, as a share of the matching pair's score."""
    dim: int | None = None
    """Dim to compare at (default: the encoder's full dim)."""
    captions: bool = False
    """Write captions only, no keys."""
    group_key: str = "group"

    def __post_init__(self) -> None:
        if self.direction not in DIRECTIONS:
            raise InputError(f"direction: {self.direction!r} is unknown; allowed: {', '.join(DIRECTIONS)}.")
        if self.num < 1 or not self.margin >= 0 or not 0 <= self.relative_margin < 1:
            raise InputError(
                f"num, margin, relative-margin: {self.num}, {self.margin} and {self.relative_margin}; num must be at "
                "least 1, margin at least 0, and relative-margin at least 0 and below 1."
            )


def mine_negatives(
    model: str,
    source: str,
    out: Path,
    options: MineOptions | None = None,
    *,
    batch_size: int = 64,
    workers: int = 1,
    force: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Writes OUT/SHARD.parquet for each shard and OUT/mined.json; returns the contents of the latter.

    Args:
        batch_size, workers: as in `embed_images`.
        force: replace negatives with other settings in OUT.

    Raises:
        InputError: as `embed_images`; the model lacks a tower; the source has no shards or no captions; OUT holds
            other files or negatives with other settings.
    """
    arrow("mmrl mine")
    options, console = options or MineOptions(), Console(quiet=quiet)
    if is_image_folder(Path(source)):
        raise InputError(f"shards: {source} is a folder of images, which no training reads; pack it with mmrl pack.")
    require_both_towers(model, "mmrl mine")
    reader = open_reader(source, FieldsConfig(group=options.group_key), required=[IMAGE])
    name, _, digest = identify_encoder(model)
    settings = {**vars(options), "encoder": digest, "layout": reader.layout}
    files = {shard: f"{shard}.parquet" for shard in map(reader.shard_name, range(reader.num_shards))}
    old = _old_files(out)
    own = {EMBEDDED, FOLDER, *(Path(file).parts[0] for file in (*files.values(), *old))}
    check_report_folder(out, MINED, own, settings, force=force)
    create_folder(out)
    embedded = {key: settings[key] for key in ("encoder", "dim", "group_key")} | {"set": reader.fingerprint}
    if not _is_stored(out, embedded):
        (out / EMBEDDED).unlink(missing_ok=True)
        dims = None if options.dim is None else [options.dim]
        embed_images(
            model, source, out / FOLDER, dims, batch_size,
            texts=True, group_key=options.group_key, workers=workers, force=force, quiet=quiet,
        )  # fmt: skip
        write_atomic(out / EMBEDDED, json.dumps(embedded))
    for file in (MINED, *old):
        path_inside(out, file).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", suffix=".partial", dir=out) as vectors:
        mined = _Miner(_open_set(out / FOLDER, Path(vectors), source), options, console)
        mined.write(out, files)
    result = {
        "format": FORMAT,
        "model": name,
        "settings": settings,
        "layout": reader.layout,
        "files": files,
        **mined.counts(),
        "mmrl_version": __version__,
    }
    write_atomic(out / MINED, json.dumps(result, indent=2) + "\n")
    mined.print_summary(out)
    return result


def _old_files(out: Path) -> list[str]:
    """The files of earlier negatives in OUT."""
    try:
        return list(parse_json((out / MINED).read_text())["files"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def _is_stored(out: Path, embedded: dict[str, Any]) -> bool:
    """Whether OUT/embeddings is complete and of this encoder, dim and set."""
    try:
        is_same = parse_json((out / EMBEDDED).read_text()) == embedded
    except (OSError, ValueError):
        return False
    return is_same and all((out / FOLDER / name).is_file() for name in (EMBEDDINGS, TEXTS))


@dataclass(frozen=True)
class _Set:
    """The samples that have a caption."""

    items: MiningSet
    keys_N: Any
    """An Arrow array, as `captions_C`."""
    captions_C: Any
    group_N: np.ndarray
    """The id of each sample's group as a training stream has it."""


def _open_set(folder: Path, vectors: Path, source: str) -> _Set:
    """Reads what `embed_images` wrote; vectors are memory-mapped from files in the folder `vectors`."""
    pyarrow, parquet = arrow("mmrl mine")
    images = parquet.read_table(folder / EMBEDDINGS, columns=["key", "captions", "group"])
    dim = parse_json(images.schema.metadata[METADATA_KEY])["dim"]
    # Large: strings of more than 2 GB.
    texts_M = pyarrow.concat_arrays([chunk.flatten().cast("large_string") for chunk in images["captions"].chunks])
    count_R = np.concatenate([chunk.value_lengths().to_numpy() for chunk in images["captions"].chunks])
    row_N = np.flatnonzero(count_R)
    if not len(row_N):
        raise InputError(f"shards: no sample of {source} has a caption.")
    ids_M = np.fromiter((caption_id(text.as_py()) for text in texts_M), np.int64, len(texts_M))
    _, first_C, caption_M = np.unique(ids_M, return_index=True, return_inverse=True)
    keys_N = pyarrow.concat_arrays([chunk.cast("large_string") for chunk in images["key"].chunks]).take(row_N)
    group_N = images["group"].to_numpy()[row_N]
    for n in np.flatnonzero(group_N == NO_GROUP).tolist():
        group_N[n] = group_id(own_group(keys_N[n].as_py()))

    def mapped(name: str, chosen: np.ndarray, rows: int) -> np.ndarray:
        target = np.full(rows, -1)
        target[chosen] = np.arange(len(chosen))
        path = vectors / f"{name}.npy"
        copy_vectors(folder / name, Column(VECTORS, dim, "fp32"), path, target, len(chosen))
        return np.load(path, mmap_mode="r")

    sample_M = np.repeat(np.arange(len(row_N)), count_R[row_N])
    # In the samples' order, each once: a sample may have one caption twice.
    order = np.sort(np.unique(sample_M * len(first_C) + caption_M, return_index=True)[1])
    captions_of = Lists(np.searchsorted(sample_M[order], np.arange(len(row_N) + 1)), caption_M[order])
    image_Nd, text_Cd = mapped(EMBEDDINGS, row_N, len(images)), mapped(TEXTS, first_C, len(texts_M))
    items = MiningSet(image_Nd, text_Cd, np.unique(group_N, return_inverse=True)[1], captions_of)
    return _Set(items, keys_N, texts_M.take(first_C), group_N)


class _Miner:
    """Mines a set shard by shard, and counts."""

    def __init__(self, opened: _Set, options: MineOptions, console: Console) -> None:
        self._set, self._options, self._console = opened, options, console
        self._bounds = Bounds(options.num, options.margin, options.relative_margin)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._skipped, self._lengths = Counter[str](), Counter[int]()
        self._examples: list[str] = []

    def write(self, out: Path, files: dict[str, str]) -> None:
        """Writes a file per shard, given the names of the files in the order of the shards."""
        pyarrow, parquet = arrow("mmrl mine")
        strings = pyarrow.list_(pyarrow.string())
        schema = pyarrow.schema(
            {"key": pyarrow.string(), "negatives": strings, "captions": strings,
             "groups": pyarrow.list_(pyarrow.int64()), "scores": pyarrow.list_(pyarrow.float32())}
        )  # fmt: skip
        with progress_bar(self._console) as bar:
            task, first = bar.add_task("mining", total=len(self._set.keys_N)), 0
            for file, last in zip(files.values(), _shard_ends(self._set.keys_N, list(files)), strict=True):
                with atomic_path(out / file) as partial, parquet.ParquetWriter(partial, schema) as writer:
                    for sample_n in self._set.items.chunks(first, last, self._device):
                        writer.write_table(pyarrow.table(self._rows(sample_n, self._mine(sample_n)), schema))
                        bar.advance(task, len(sample_n))
                first = last

    def _mine(self, sample_n: np.ndarray) -> Negatives:
        searches = {"image_to_text": MiningSet.nearest_captions, "text_to_image": MiningSet.nearest_images}
        parts = [
            search(self._set.items, sample_n, self._bounds, self._device)
            for direction, search in searches.items()
            if self._options.direction in (direction, "both")
        ]
        found = best(parts, self._options.num, self._options.captions)
        self._skipped.update(found.skipped)
        return found

    def _rows(self, sample_n: np.ndarray, found: Negatives) -> dict[str, Any]:
        """The columns of some samples' rows."""
        pyarrow, _ = arrow("mmrl mine")
        lengths = np.bincount(found.sample - sample_n[0], minlength=len(sample_n))
        self._lengths.update(lengths.tolist())
        offsets = pyarrow.array(np.concatenate([[0], np.cumsum(lengths)]), pyarrow.int32())
        keys = self._set.keys_N.take(pyarrow.array(found.negative)).cast("string")
        captions = self._set.captions_C.take(pyarrow.array(found.caption)).cast("string")
        self._show(sample_n, offsets.to_numpy(), captions, found.score)
        none = pyarrow.array([0] * len(offsets), pyarrow.int32())
        return {
            "key": self._set.keys_N.take(pyarrow.array(sample_n)).cast("string"),
            "negatives": pyarrow.ListArray.from_arrays(none if self._options.captions else offsets, keys),
            "captions": pyarrow.ListArray.from_arrays(offsets, captions),
            "groups": pyarrow.ListArray.from_arrays(offsets, pyarrow.array(self._set.group_N[found.negative])),
            "scores": pyarrow.ListArray.from_arrays(offsets, pyarrow.array(found.score, pyarrow.float32())),
        }

    def _show(self, sample_n: np.ndarray, offsets: np.ndarray, captions: Any, score: np.ndarray) -> None:
        """Adds the samples of this chunk that are among the examples."""
        items = self._set.items
        for sample in np.linspace(0, len(items.group_N) - 1, _EXAMPLES + 2).astype(int)[1:-1]:
            row = sample - sample_n[0]
            if not 0 <= row < len(sample_n) or offsets[row] == offsets[row + 1]:
                continue
            own = items.captions_of.take(np.array([sample]))[1]
            match, caption = max(zip((items.text_Cd[own] @ items.image_Nd[sample]).tolist(), own.tolist(), strict=True))
            shown = range(offsets[row], min(offsets[row + 1], offsets[row] + _SHOWN))
            wrong = ", ".join(f"{captions[n].as_py()[:60]!r} {score[n]:.3f}" for n in shown)
            key, right = self._set.keys_N[sample].as_py(), self._set.captions_C[caption].as_py()[:60]
            self._examples.append(f"  {key} {right!r} {match:.3f}: {wrong}")

    def counts(self) -> dict[str, Any]:
        """For mined.json."""
        return {
            "samples": self._lengths.total(),
            "negatives": sum(length * samples for length, samples in self._lengths.items()),
            "short": sum(samples for length, samples in self._lengths.items() if length < self._options.num),
            "skipped": dict(self._skipped),
        }

    def print_summary(self, out: Path) -> None:
        """Counts and examples."""
        counts, skipped = self.counts(), self._skipped
        lines = [
            f"{out}: {counts['negatives']:,} negatives of {counts['samples']:,} samples",
            f"Better candidates that were skipped: {skipped['group']:,} of the same group, {skipped['caption']:,} with "
            f"an equal caption, {skipped['margin']:,} above the margin",
        ]
        if counts["short"]:
            lines.append(
                f"{counts['short']:,} samples have fewer than {self._options.num} negatives: the set is small, or most "
                "of it is above the margin; a smaller --margin finds more."
            )
        if self._examples:
            lines += ["Examples (key, best caption, its score: the nearest wrong ones):", *self._examples]
        print_line(self._console, "\n".join(lines))


def _shard_ends(keys_N: Any, shards: Sequence[str]) -> list[int]:
    """For each shard, in the order of the samples, the index after its last sample."""
    ends, current = [0] * len(shards), 0
    for index, key in enumerate(keys_N):
        while not key.as_py().startswith(f"{shards[current]}/"):
            current += 1
            ends[current] = index
        ends[current] = index + 1
    return [max(ends[: n + 1]) for n in range(len(ends))]
