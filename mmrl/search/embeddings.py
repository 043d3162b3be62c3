"""Reads the output of `mmrl embed`: images or texts to build an index from, and caption embeddings to train its codes.

Shapes: n rows of one batch, M captions, D dim of the index's vectors.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, Field, PositiveInt
from rich.console import Console

from mmrl.codecs.code_index import training_rows
from mmrl.data.arrow import arrow
from mmrl.errors import InputError
from mmrl.inference.load import load
from mmrl.nesting import truncate
from mmrl.output.console import print_line
from mmrl.output.files import parse_json
from mmrl.search import items
from mmrl.search.embed import EMBEDDINGS, EMBEDDINGS_FORMAT, EMBEDDINGS_VERSION, TEXTS
from mmrl.search.encoder_identity import identify_encoder
from mmrl.search.index import Kind
from mmrl.search.table import METADATA_KEY, image_schema, read_vectors

_BATCH_ROWS = 2048


class _Column(BaseModel):
    precision: str


class _Metadata(BaseModel):
    """What is read of the metadata of a file of embeddings."""

    format: str
    version: int
    model: str
    origin_sha256: str
    dim: PositiveInt
    nested_dims: list[PositiveInt]
    columns: list[_Column] = Field(min_length=1)


Batches = Callable[..., Iterator[tuple[np.ndarray, Any]]]
"""The rows of a new index: unit vectors (n, D) and a record batch of `items.COLUMNS`."""


def embedding_files(embeddings: Path) -> dict[Kind, Path]:
    """The Parquet files of a folder, or the one that is given: that of images before that of texts. A file of texts
    beside images is left out if it is empty: no image has a caption. Raises InputError: there is none."""
    if embeddings.is_file():
        return {"texts" if embeddings.name == TEXTS else "images": embeddings}
    names: dict[Kind, str] = {"images": EMBEDDINGS, "texts": TEXTS}
    found: dict[Kind, Path] = {kind: embeddings / name for kind, name in names.items() if (embeddings / name).is_file()}
    pyarrow, parquet = arrow("mmrl index")
    with suppress(pyarrow.ArrowException, OSError):  # a damaged file is reported when it is opened
        if len(found) == 2 and not parquet.read_metadata(found["texts"]).num_rows:
            del found["texts"]
    if not found:
        path = embeddings / EMBEDDINGS
        raise InputError(f"embeddings: {path} does not exist; give the output folder of mmrl embed.")
    return found


def open_embeddings(path: Path, kind: Kind) -> tuple[dict[str, Any], int, Batches, Any]:
    """Opens embeddings.parquet or texts.parquet: its metadata, number of rows, rows, and the schema of its items.
    Raises InputError: `mmrl embed` did not write this file, or its first vector column is neither fp32 nor fp16."""
    pyarrow, parquet = arrow("mmrl index")
    try:
        with parquet.ParquetFile(path) as file:
            schema, count = file.schema_arrow, file.metadata.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(
            f"embeddings: {path} is not a readable Parquet file ({error}); run mmrl embed again."
        ) from None
    is_ours = False
    names = items.COLUMNS if kind == "images" else ["key", "caption", "group", "group_name"]
    missing = {"embedding", *names} - set(schema.names)
    metadata: dict[str, Any] = {}
    with suppress(ValueError):
        metadata = parse_json((schema.metadata or {}).get(METADATA_KEY, b"{}"))
        _Metadata.model_validate(metadata, strict=True)
        is_ours = (metadata["format"], metadata["version"]) == (EMBEDDINGS_FORMAT, EMBEDDINGS_VERSION)
    if missing or not is_ours:
        lacks = f"it lacks column {sorted(missing)[0]!r}" if missing else "it lacks mmrl's metadata of that version"
        raise InputError(
            f"embeddings: {path} was not written by this version's mmrl embed ({EMBEDDINGS_FORMAT} version "
            f"{EMBEDDINGS_VERSION}): {lacks}."
        )
    if not count:
        raise InputError(f"embeddings: {path} has no rows.")
    vector, dim = schema.field("embedding").type, metadata["dim"]
    if metadata["columns"][0]["precision"] not in ("fp32", "fp16"):
        raise InputError(
            f"embeddings: {path} has no fp32 or fp16 vectors, which an index needs for its final ranking; run mmrl "
            "embed again with --precision fp32 or fp16 among others."
        )
    if not pyarrow.types.is_fixed_size_list(vector) or vector.list_size != dim:
        raise InputError(
            f"embeddings: {path}: its column embedding is a {vector}, not a list of {dim} numbers; run mmrl embed "
            "again."
        )

    def batches(dim: int = metadata["dim"]) -> Iterator[tuple[np.ndarray, Any]]:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=["embedding", *names]):
                # Normalised again: they may be rounded to fp16, or have more dims than the index.
                rows_nD = torch.from_numpy(read_vectors(batch, "embedding").astype(np.float32))
                rows = batch.select(names) if kind == "images" else _text_items(batch)
                yield truncate(rows_nD, dim).numpy(), rows

    return metadata, count, batches, image_schema([], {}).remove_metadata()


def _text_items(batch: Any) -> Any:
    """Rows of texts.parquet as items: the text is the only caption, and there is no thumbnail."""
    pyarrow, _ = arrow("mmrl index")
    offsets = pyarrow.array(range(len(batch) + 1), pyarrow.int32())
    columns = {name: batch.column(name) for name in ("key", "group", "group_name")}
    columns["captions"] = pyarrow.ListArray.from_arrays(offsets, batch.column("caption"))
    columns["thumbnail"] = pyarrow.array([b""] * len(batch), pyarrow.binary())
    schema = image_schema([], {}).remove_metadata()
    return pyarrow.record_batch([columns[field.name].cast(field.type) for field in schema], schema=schema)


def caption_vectors(embeddings: Path, metadata: dict[str, Any], count: int, console: Console) -> np.ndarray:
    """Caption embeddings (M, D): up to 20,000 from texts.parquet, else up to `count` encoded now, else none."""
    _, parquet = arrow("mmrl index")
    path = (embeddings if embeddings.is_dir() else embeddings.parent) / TEXTS
    rng = np.random.default_rng(0)
    if path.is_file():
        with parquet.ParquetFile(path) as file:
            chosen = training_rows(file.metadata.num_rows)
            vectors, start = [], 0
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=["embedding"]):
                inside = chosen[(chosen >= start) & (chosen < start + len(batch))] - start
                vectors.append(read_vectors(batch, "embedding")[inside].astype(np.float32))
                start += len(batch)
        return np.concatenate(vectors)
    table = parquet.read_table(embeddings / EMBEDDINGS if embeddings.is_dir() else embeddings, columns=["captions"])
    rows = rng.permutation(len(table))
    captions_of = table.take(rows[: 4 * count])["captions"].to_pylist()
    captions = [captions[0] for captions in captions_of if captions][:count]
    try:
        name, encoder_path, digest = identify_encoder(metadata["model"])
        if captions and digest == metadata["origin_sha256"]:
            return load(encoder_path, dim=metadata["dim"], towers="text").encode_texts(captions)
        reason = "no image has a caption" if not captions else f"{name} is now another encoder"
    except InputError as error:
        reason = str(error)
    print_line(console, f"Codes are trained and measured with images only: {reason}")
    return np.zeros((0, metadata["dim"]), np.float32)
