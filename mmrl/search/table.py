"""The columns and files that `mmrl embed` writes: Parquet tables, one per chunk and then concatenated, and .npy files.

Shapes: N images, M captions, d width of a vector column.
"""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmrl.codecs.table import CODECS, Precision
from mmrl.data.arrow import arrow
from mmrl.data.samples import Sample
from mmrl.output.files import atomic_path

METADATA_KEY = b"mmrl"
VECTORS = "embedding"
"""The name of the first vector column; the names of others begin with it."""
_THUMBNAIL_SIDE, _THUMBNAIL_QUALITY = 160, 88
_BATCH_ROWS = 2048


@dataclass(frozen=True)
class Column:
    """One column of vectors."""

    name: str
    dim: int
    precision: Precision

    @property
    def width(self) -> int:
        """Elements per row: dims, or bytes for binary."""
        return CODECS["binary"].bytes(self.dim) if self.precision == "binary" else self.dim

    @property
    def dtype(self) -> type[np.generic]:
        """Element type."""
        dtype = CODECS[self.precision].dtype
        assert dtype is not None
        return dtype


def columns_of(dims: list[int], precisions: list[Precision]) -> list[Column]:
    """A column for each dim at each precision, widest first: `embedding`, then e.g. `embedding_64_int8`."""
    pairs: list[tuple[int, Precision]] = [
        (dim, precision) for dim in sorted(dims, reverse=True) for precision in precisions
    ]
    return [
        Column(f"{VECTORS}_{dim}_{precision}" if position else VECTORS, dim, precision)
        for position, (dim, precision) in enumerate(pairs)
    ]


def image_schema(columns: Sequence[Column], metadata: dict[str, Any]) -> Any:
    """The Arrow schema of embeddings.parquet. Group -1 means no group."""
    pyarrow, _ = arrow("mmrl embed")
    schema = _schema(("captions", pyarrow.list_(pyarrow.string())), columns, metadata)
    return schema.append(pyarrow.field("thumbnail", pyarrow.binary()))


def text_schema(columns: Sequence[Column], metadata: dict[str, Any]) -> Any:
    """The Arrow schema of texts.parquet: one row per caption, with its image's `key`."""
    pyarrow, _ = arrow("mmrl embed")
    return _schema(("caption", pyarrow.string()), columns, metadata)


def _schema(captions: tuple[str, Any], columns: Sequence[Column], metadata: dict[str, Any]) -> Any:
    pyarrow, _ = arrow("mmrl embed")
    fields = [("key", pyarrow.string()), captions, ("group", pyarrow.int64()), ("group_name", pyarrow.string())]
    for column in columns:
        # A fixed-size list: LanceDB requires it for search, and every Parquet reader supports it.
        vector = pyarrow.list_(pyarrow.from_numpy_dtype(np.dtype(column.dtype)), column.width)
        fields.append((column.name, vector))
    return pyarrow.schema(fields).with_metadata({METADATA_KEY: json.dumps(metadata)})


def vector_array(pyarrow: Any, rows_Nd: np.ndarray) -> Any:
    """Vectors (N, width) -> an Arrow array of fixed-size lists."""
    flat = pyarrow.array(np.ascontiguousarray(rows_Nd).reshape(-1))
    return pyarrow.FixedSizeListArray.from_arrays(flat, rows_Nd.shape[1])


def read_vectors(batch: Any, name: str) -> np.ndarray:
    """One vector column of a table or record batch: (N, width)."""
    array = batch.column(name)
    array = array.combine_chunks() if hasattr(array, "combine_chunks") else array
    return array.flatten().to_numpy(zero_copy_only=False).reshape(-1, array.type.list_size)


def image_row(sample: Sample, image: Image.Image | None) -> dict[str, Any]:
    """The row of a sample, without its vectors. `image` is stored as a thumbnail; None: the row has texts only."""
    return {
        "key": sample.name,
        "captions": sample.captions,
        "group": sample.group,
        "group_name": sample.group_name or None,
        "thumbnail": b"" if image is None else thumbnail(image),
    }


def text_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per caption of some image rows."""
    return [{**row, "caption": caption} for row in rows for caption in row["captions"]]


def to_table(schema: Any, rows: Sequence[dict[str, Any]], vectors: Sequence[np.ndarray]) -> Any:
    """An Arrow table of `image_schema` or `text_schema`; `vectors` holds (N, width) for each vector column."""
    pyarrow, _ = arrow("mmrl embed")
    remaining = iter(vectors)
    arrays = [
        vector_array(pyarrow, next(remaining))
        if field.name.startswith(VECTORS)
        else pyarrow.array([row[field.name] for row in rows], field.type)
        for field in schema
    ]
    return pyarrow.Table.from_arrays(arrays, schema=schema)


def thumbnail(image: Image.Image) -> bytes:
    """An RGB image -> WebP bytes, at most 160 pixels on the longer side."""
    small = image.copy()
    small.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=_THUMBNAIL_QUALITY)
    return buffer.getvalue()


def concatenate(chunks: Sequence[Path], out: Path, schema: Any) -> int:
    """Concatenates Parquet files of one schema, one row group per file; returns the number of rows."""
    _, parquet = arrow("mmrl embed")
    rows = 0
    with atomic_path(out) as partial, parquet.ParquetWriter(partial, schema) as writer:
        for chunk in chunks:
            table = parquet.read_table(chunk, partitioning=None).replace_schema_metadata(schema.metadata)
            rows += len(table)
            if len(table):
                writer.write_table(table)
    return rows


def write_npy(out: Path, images: Path, texts: Path | None, columns: Sequence[Column]) -> None:
    """Writes the vectors in clip-retrieval's layout. Row i of every file belongs to image i:

    img_emb/img_emb_0.npy, text_emb/text_emb_0.npy (the image's first caption; zeros if it has none),
    metadata/metadata_0.parquet (image_path, caption), and the same for other columns, e.g. img_emb_64_int8/.
    """
    pyarrow, parquet = arrow("mmrl embed")
    items = parquet.read_table(images, columns=["key", "captions"])
    captions = items["captions"].to_pylist()
    first = [one[0] if one else "" for one in captions]
    (out / "metadata").mkdir(exist_ok=True)
    metadata = pyarrow.table({"image_path": items["key"], "caption": pyarrow.array(first, pyarrow.string())})
    parquet.write_table(metadata, out / "metadata" / "metadata_0.parquet")
    for column in columns:
        suffix = column.name.removeprefix(VECTORS)
        copy_vectors(images, column, out / f"img_emb{suffix}" / f"img_emb{suffix}_0.npy", None, len(first))
        if texts is not None:
            counts_N = np.array([len(one) for one in captions])
            image_row_M = np.full(int(counts_N.sum()), -1)
            image_row_M[(np.cumsum(counts_N) - counts_N)[counts_N > 0]] = np.flatnonzero(counts_N)
            copy_vectors(texts, column, out / f"text_emb{suffix}" / f"text_emb{suffix}_0.npy", image_row_M, len(first))


def copy_vectors(source: Path, column: Column, path: Path, target_row: np.ndarray | None, count: int) -> None:
    """Copies one vector column to a .npy file of `count` rows; vector i goes to row `target_row[i]`, -1 is skipped."""
    path.parent.mkdir(exist_ok=True)
    shape = (count, column.width)
    out_Nd = np.lib.format.open_memmap(path, mode="w+", dtype=column.dtype, shape=shape)
    start = 0
    with arrow("mmrl embed")[1].ParquetFile(source) as file:
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=[column.name]):
            rows = (
                np.arange(start, start + len(batch)) if target_row is None else target_row[start : start + len(batch)]
            )
            out_Nd[rows[rows >= 0]] = read_vectors(batch, column.name)[rows >= 0]
            start += len(batch)
    out_Nd.flush()
