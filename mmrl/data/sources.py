"""What a config says of the data, and the samples that it names."""

from typing import Annotated

from pydantic import AfterValidator, Field

from mmrl.data.opening import open_shards
from mmrl.data.samples import FieldsConfig, SampleReader, Source
from mmrl.data.shards import Spec, expand
from mmrl.data.stores import Store, StoreConfig
from mmrl.data.transforms import AugmentConfig
from mmrl.errors import InputError
from mmrl.settings import Settings, machine


def _check_probabilities(values: list[float] | None) -> list[float] | None:
    if values is not None and (not values or not min(values) >= 0 or not 0 < sum(values) < float("inf")):
        raise ValueError("probabilities must not be negative, and not all zero")
    return values


class SourceConfig(Settings):
    """One of several sets of shards that are trained on together."""

    shards: str | list[str]
    """As data.train where there is but one source."""
    name: str | None = None
    """Begins the names of its samples; its place in the list when left out."""
    repeat: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """How often an epoch has each of its samples; 0.5 is one half in one epoch, the other in the next."""
    fields: FieldsConfig | None = None
    """The names of its parts; data.fields when left out."""


class DataConfig(Settings):
    """Where the training samples come from, and how they become batches."""

    train: str | list[str] = []  # noqa: RUF012 (pydantic copies)
    """Shards: a tar, a brace pattern, a folder, a list file (@shards.txt), `starter:train`, an address of one of these
    (https://, s3://, gs:// …), or a list of these."""
    sources: list[SourceConfig] = Field(default=[], max_length=1000)
    """Several sets of shards, each with its own fields and share of an epoch, instead of `train`."""
    fields: FieldsConfig = FieldsConfig()
    captions: Annotated[list[float] | None, AfterValidator(_check_probabilities)] = None
    """Probabilities of a sample's first, second, … caption; those beyond the list share the last one's. Uniform when
    left out. Drawn anew each epoch."""
    augment: AugmentConfig = AugmentConfig()
    scaled_decode: bool = False
    """Decode JPEGs much larger than the model's input at 1/2, 1/4 or 1/8: several times faster for pictures of some
    megapixels, for pixels that differ a little from those of evaluation (44 dB and above)."""
    shuffle_window: int = Field(default=16384, ge=1)
    """Samples are shuffled within windows of so many, across neighbouring shards."""
    max_bad_fraction: float = Field(default=0.01, ge=0, le=1)
    """Training stops when more than this share of the samples seen is bad; the first 1,000 count as if all seen."""
    cache: bool = machine(False)
    """Keep decoded pictures in memory, each loader its own: for sets that fit there and are seen many times."""
    workers: int = machine(0, ge=0)
    """Worker processes that load ahead, for each training process; 0 loads in the training process itself."""
    remote: StoreConfig = StoreConfig()
    allow_pipe: bool = machine(False)
    """Let shards be `pipe:COMMAND`, which a shell runs. For shard lists of your own alone."""


def open_reader(
    shards: Spec, fields: FieldsConfig | None = None, store: StoreConfig | None = None, allow_pipe: bool = False
) -> SampleReader:
    """The samples of a shard spec, after every check that can be made before long work starts."""
    files = Store(store or StoreConfig())
    return SampleReader([Source(open_shards(expand(shards, allow_pipe), files), fields or FieldsConfig())], files)


def open_training_set(config: DataConfig) -> SampleReader:
    """All that a config trains on.

    Raises:
        InputError: as open_reader and named_sources; or a shard is in two sources.
    """
    files, sources = Store(config.remote), named_sources(config)
    expanded = [expand(one.shards, config.allow_pipe) for one in sources]
    source_of: dict[str, str] = {}
    for one, locations in zip(sources, expanded, strict=True):
        for location in locations:
            if location in source_of:
                raise InputError(
                    f"data.sources: {location} is in {source_of[location]!r} and in {one.name!r}, so that its samples "
                    "would be negatives of themselves; give it to one of them, with repeat."
                )
            source_of[location] = one.name or ""
    return SampleReader(
        [
            Source(open_shards(locations, files), one.fields or config.fields, one.repeat, one.name or "")
            for one, locations in zip(sources, expanded, strict=True)
        ],
        files,
    )


def named_sources(config: DataConfig) -> list[SourceConfig]:
    """The sources of a config, each with its name, which is empty where there is `train` alone.

    Raises:
        InputError: both `train` and `sources` are given, or two sources have one name.
    """
    if not config.sources:
        return [SourceConfig(shards=config.train, name="")]
    if config.train:
        raise InputError("data.train: given beside data.sources; put its shards among the sources and leave it out.")
    names = [str(number) if one.name is None else one.name for number, one in enumerate(config.sources)]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise InputError(f"data.sources: two are called {repeated!r}; give each a name of its own.")
    return [one.model_copy(update={"name": name}) for one, name in zip(config.sources, names, strict=True)]
