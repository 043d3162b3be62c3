"""The rows that `mmrl embed` writes: as Arrow tables, in parts that are joined at the end, and as .npy files.

Shapes: N rows, d the length of a column's vectors.
"""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmrl.data.pack.tables import arrow
from mmrl.data.samples import Sample
from mmrl.search.precision import Column

METADATA_KEY = b"mmrl"
_THUMBNAIL_SIDE, _THUMBNAIL_QUALITY = 160, 88
_ROWS_AT_A_TIME = 2048
_ABOUT = ("key", "captions", "group", "group_name")


def picture_schema(columns: Sequence[Column], metadata: dict[str, Any]) -> Any:
    """The columns of embeddings.parquet. A group of -1 is none."""
    pyarrow, _ = arrow("mmrl embed")
    about = [("captions", pyarrow.list_(pyarrow.string())), *_group_fields(pyarrow)]
    vectors = [(column.name, vector_type(pyarrow, column)) for column in columns]
    fields = [("key", pyarrow.string()), *about, *vectors, ("thumbnail", pyarrow.binary())]
    return pyarrow.schema(fields).with_metadata({METADATA_KEY: json.dumps(metadata)})


def text_schema(columns: Sequence[Column], metadata: dict[str, Any]) -> Any:
    """The columns of texts.parquet: a row a caption, `key` the picture's."""
    pyarrow, _ = arrow("mmrl embed")
    vectors = [(column.name, vector_type(pyarrow, column)) for column in columns]
    fields = [("key", pyarrow.string()), ("caption", pyarrow.string()), *_group_fields(pyarrow), *vectors]
    return pyarrow.schema(fields).with_metadata({METADATA_KEY: json.dumps(metadata)})


def _group_fields(pyarrow: Any) -> list[tuple[str, Any]]:
    return [("group", pyarrow.int64()), ("group_name", pyarrow.string())]


def vector_type(pyarrow: Any, column: Column) -> Any:
    """A list of fixed size, which LanceDB wants for search and every reader takes."""
    return pyarrow.list_(pyarrow.from_numpy_dtype(np.dtype(column.dtype)), column.width)


def vector_array(pyarrow: Any, rows_Nd: np.ndarray) -> Any:
    """(N, width) of a column's type -> its Arrow array."""
    flat = pyarrow.array(np.ascontiguousarray(rows_Nd).reshape(-1))
    return pyarrow.FixedSizeListArray.from_arrays(flat, rows_Nd.shape[1])


def vectors_in(batch: Any, name: str) -> np.ndarray:
    """The vectors of one column of a table or record batch: (N, width)."""
    array = batch.column(name)
    array = array.combine_chunks() if hasattr(array, "combine_chunks") else array
    return array.flatten().to_numpy(zero_copy_only=False).reshape(-1, array.type.list_size)


@dataclass
class Rows:
    """Some pictures, by column, without their vectors."""

    keys: list[str] = field(default_factory=list)
    captions: list[list[str]] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    group_names: list[str | None] = field(default_factory=list)
    thumbnails: list[bytes] = field(default_factory=list)

    def add(self, sample: Sample, picture: Image.Image) -> None:
        self.keys.append(sample.name)
        self.captions.append(sample.captions)
        self.groups.append(sample.group)
        self.group_names.append(sample.group_name or None)
        self.thumbnails.append(thumbnail(picture))

    def as_table(self, schema: Any, vectors: Sequence[np.ndarray]) -> Any:
        """`vectors`: (N, width) for each column of vectors, in the schema's order."""
        pyarrow, _ = arrow("mmrl embed")
        plain = [self.keys, self.captions, self.groups, self.group_names]
        arrays = [pyarrow.array(values, schema.field(name).type) for name, values in zip(_ABOUT, plain, strict=True)]
        arrays += [vector_array(pyarrow, rows_Nd) for rows_Nd in vectors]
        arrays.append(pyarrow.array(self.thumbnails, pyarrow.binary()))
        return pyarrow.Table.from_arrays(arrays, schema=schema)

    def text_rows(self) -> list[int]:
        """The row of each caption's picture."""
        return [row for row, captions in enumerate(self.captions) for _ in captions]

    def as_text_table(self, schema: Any, vectors: Sequence[np.ndarray]) -> Any:
        """`vectors`: (M, width) for each column, of the M captions in their order."""
        pyarrow, _ = arrow("mmrl embed")
        rows = self.text_rows()
        plain = {
            "key": [self.keys[row] for row in rows],
            "caption": [caption for captions in self.captions for caption in captions],
            "group": [self.groups[row] for row in rows],
            "group_name": [self.group_names[row] for row in rows],
        }
        arrays = [pyarrow.array(values, schema.field(name).type) for name, values in plain.items()]
        return pyarrow.Table.from_arrays([*arrays, *(vector_array(pyarrow, v) for v in vectors)], schema=schema)


def thumbnail(image: Image.Image) -> bytes:
    """An RGB picture -> WebP of at most 160 pixels a side."""
    small = image.copy()
    small.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=_THUMBNAIL_QUALITY)
    return buffer.getvalue()


def join(parts: Sequence[Path], out: Path, schema: Any) -> int:
    """Parquet files of one schema -> one file, a row group each; returns its rows."""
    _, parquet = arrow("mmrl embed")
    beside = out.with_name(f".{out.name}.partial")
    rows = 0
    try:
        with parquet.ParquetWriter(beside, schema) as writer:
            for part in parts:
                table = parquet.read_table(part, partitioning=None).replace_schema_metadata(schema.metadata)
                rows += len(table)
                if len(table):
                    writer.write_table(table)
        beside.replace(out)
    finally:
        beside.unlink(missing_ok=True)
    return rows


def write_npy(out: Path, pictures: Path, texts: Path | None, columns: Sequence[Column]) -> None:
    """The vectors again as clip-retrieval lays them out, row i of each file the same picture:

    img_emb/img_emb_0.npy, text_emb/text_emb_0.npy (each picture's first caption; zeros where it has none),
    metadata/metadata_0.parquet (image_path, caption); other columns likewise, such as img_emb_64_int8/.
    """
    pyarrow, parquet = arrow("mmrl embed")
    about = parquet.read_table(pictures, columns=["key", "captions"])
    captions = about["captions"].to_pylist()
    first = [some[0] if some else "" for some in captions]
    (out / "metadata").mkdir(exist_ok=True)
    named = pyarrow.table({"image_path": about["key"], "caption": pyarrow.array(first, pyarrow.string())})
    parquet.write_table(named, out / "metadata" / "metadata_0.parquet")
    for column in columns:
        suffix = column.name.removeprefix("embedding")
        _copy_vectors(pictures, column, out / f"img_emb{suffix}" / f"img_emb{suffix}_0.npy", None, len(first))
        if texts is not None:
            counts_N = np.array([len(some) for some in captions])
            row_of_M = np.full(int(counts_N.sum()), -1)
            row_of_M[(np.cumsum(counts_N) - counts_N)[counts_N > 0]] = np.flatnonzero(counts_N)
            _copy_vectors(texts, column, out / f"text_emb{suffix}" / f"text_emb{suffix}_0.npy", row_of_M, len(first))


def _copy_vectors(source: Path, column: Column, path: Path, row_of: np.ndarray | None, count: int) -> None:
    """One column as a .npy of `count` rows; with `row_of` each goes to the row that it names, or nowhere where that is
    -1."""
    path.parent.mkdir(exist_ok=True)
    shape = (count, column.width)
    out_Nd = np.lib.format.open_memmap(path, mode="w+", dtype=column.dtype, shape=shape)
    start = 0
    with arrow("mmrl embed")[1].ParquetFile(source) as file:
        for batch in file.iter_batches(batch_size=_ROWS_AT_A_TIME, columns=[column.name]):
            rows = np.arange(start, start + len(batch)) if row_of is None else row_of[start : start + len(batch)]
            out_Nd[rows[rows >= 0]] = vectors_in(batch, column.name)[rows >= 0]
            start += len(batch)
    out_Nd.flush()
