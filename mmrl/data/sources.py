"""The `data:` section of a config, and the readers that open its samples."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from mmrl.data.opening import open_shards
from mmrl.data.parsing import BOTH
from mmrl.data.samples import FieldsConfig, SampleReader, Source
from mmrl.data.shards import ShardSpec, expand
from mmrl.data.stores import RemoteConfig, ShardCache
from mmrl.data.transforms import AugmentConfig
from mmrl.errors import InputError
from mmrl.settings import Settings, machine_field


def _check_probabilities(values: list[float] | None) -> list[float] | None:
    if values is not None and (not values or not min(values) >= 0 or not 0 < sum(values) < float("inf")):
        raise ValueError("probabilities must be finite, not negative and not all zero")
    return values


class SourceConfig(Settings):
    """One of several sets of shards that are trained on together."""

    shards: str | list[str]
    """The source's shards, in any form that data.train takes."""
    name: str | None = None
    """Prefix of its samples' names (default: its index in the list)."""
    repeat: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Passes over it per epoch; with 0.5, two epochs together are one pass."""
    fields: FieldsConfig | None = None
    """The names of its fields (default: data.fields)."""


class DataConfig(Settings):
    """The training samples, and how batches are made of them."""

    train: str | list[str] = []  # noqa: RUF012 (pydantic copies)
    """Shards: a tar, a brace pattern, a folder, a list file (@shards.txt), `starter:train`, a Hugging Face data set
    (`hf:NAME:SPLIT` or `hf:FOLDER:SPLIT`, packed once into the cache folder), a URL of one of these (https://, s3://,
    gs:// …), or a list of these."""
    sources: list[SourceConfig] = Field(default=[], max_length=1000)
    """Instead of `train`: several sets of shards, each with its own fields and its own repeat."""
    fields: FieldsConfig = FieldsConfig()
    captions: Annotated[list[float] | None, AfterValidator(_check_probabilities)] = None
    """Probabilities of a sample's first, second, … caption; captions beyond the list share the last probability
    (default: uniform). One caption is drawn per sample and epoch."""
    mask_equal_captions: bool = True
    """Two samples of a batch with an equal drawn caption or second text, but for case, spaces, HTML entities and
    Unicode forms, are no negatives of each other, as if they had one group (see loss.same_group). false in runs that
    began before this key existed."""
    augment: AugmentConfig = AugmentConfig()
    scaled_decode: bool = False
    """Decode JPEGs much larger than the model's input at 1/2, 1/4 or 1/8 of their size: several times faster for images
    of some megapixels. Pixels differ slightly from those of evaluation (PSNR 44 dB and above)."""
    shuffle_window: int | None = Field(default=None, ge=1)
    """Samples among which a batch is drawn, from neighbouring shards of each lane (default: 16 global batches, and at
    least 16,384)."""
    lanes: int = Field(default=64, ge=1)
    """The most parts that an epoch's shards are divided into. Each lane fills the same rows of every batch, so a host
    downloads the shards of its rows' lanes only. The number is a divisor of the global batch, and smaller for sets of
    fewer shuffle windows. 1 in runs that began before this key existed."""
    negatives: int = Field(default=0, ge=0)
    """Hard negatives per pair and step: further wrong texts for its image, and wrong images for its text, besides the
    other pairs of the batch. Drawn anew each epoch from those of the sample (see fields.negatives)."""
    negatives_from: str | None = None
    """A folder that `mmrl mine` wrote for these shards (default: the samples' own negatives)."""
    negatives_images: bool = False
    """Load the images of negatives that are samples, too; false uses their texts only."""
    max_bad_fraction: float = Field(default=0.01, ge=0, le=1)
    """Training stops when more than this fraction of an epoch's samples is bad (or of a million, if an epoch has
    more)."""
    cache: bool = machine_field(False)
    """Keep decoded images in memory, once per worker: for small sets and many epochs."""
    workers: int | None = machine_field(None, ge=0)
    """DataLoader worker processes per rank; 0 loads in the training process itself (default: the cores per rank but
    one, fewer where the shared memory is short; 0 with `cache`, which is kept once per worker)."""
    remote: RemoteConfig = RemoteConfig()
    allow_pipe: bool = machine_field(False)
    """Allow shards of the form `pipe:COMMAND`, which a shell runs. Use it only with shard lists that you trust."""


def open_reader(
    shards: ShardSpec,
    fields: FieldsConfig | None = None,
    remote: RemoteConfig | None = None,
    allow_pipe: bool = False,
    required: Collection[str] = BOTH,
) -> SampleReader:
    """Opens the samples of a shard spec and checks the shards and field names, so that mistakes show at once.

    Args:
        required: as for SampleReader.

    Raises:
        InputError: shards missing, empty or not tars; fields that no sample has.
    """
    cache = ShardCache(remote or RemoteConfig())
    source = Source(open_shards(expand(shards, allow_pipe), cache), fields or FieldsConfig())
    return SampleReader([source], cache, required)


def data_config(data: ShardSpec | DataConfig) -> DataConfig:
    """The config of training samples that are given as shards or as such a config."""
    if isinstance(data, DataConfig):
        return data
    return DataConfig(train=str(data) if isinstance(data, str | Path) else [str(one) for one in data])


def open_source(one: SourceConfig, locations: Sequence[str], config: DataConfig, cache: ShardCache) -> Source:
    """Opens the shards of one of `named_sources`; raises InputError as `open_shards`."""
    return Source(open_shards(locations, cache), one.fields or config.fields, one.repeat, one.name or "")


def open_training_set(config: DataConfig, required: Collection[str] = BOTH) -> SampleReader:
    """Opens the samples of all sources of a config; `required` as for SampleReader.

    Raises:
        InputError: as open_reader and named_sources; or a shard is in two sources.
    """
    cache, sources = ShardCache(config.remote), named_sources(config)
    expanded = [expand(one.shards, config.allow_pipe) for one in sources]
    source_of: dict[str, str] = {}
    for one, locations in zip(sources, expanded, strict=True):
        for location in locations:
            if location in source_of:
                raise InputError(
                    f"data.sources: {location} is in both {source_of[location]!r} and {one.name!r}, so its samples "
                    "would be negatives of themselves; keep it in one source and set that source's repeat."
                )
            source_of[location] = one.name or ""
    opened = [open_source(one, locations, config, cache) for one, locations in zip(sources, expanded, strict=True)]
    # With negatives all have a group, so that none is one that the batch has as a pair.
    return SampleReader(opened, cache, required, group_all=config.negatives > 0)


def named_sources(config: DataConfig) -> list[SourceConfig]:
    """The sources of a config with their names filled in; the name is empty if only `train` is set.

    Raises:
        InputError: both `train` and `sources` are given, or two sources have one name.
    """
    if not config.sources:
        return [SourceConfig(shards=config.train, name="")]
    if config.train:
        raise InputError("data.train: cannot be set together with data.sources; move its shards into the sources.")
    names = [str(i) if one.name is None else one.name for i, one in enumerate(config.sources)]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise InputError(f"data.sources: two have the name {repeated!r}; names must be unique.")
    return [one.model_copy(update={"name": name}) for one, name in zip(config.sources, names, strict=True)]
