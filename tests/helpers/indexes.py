"""Test data for search: two models, images, their embeddings and an index; generated embeddings; brute force."""

import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from conftest import drawing, encoded, sample_members, write_tar
from PIL import Image

from mmrl.model import bundle, towers, two_tower
from mmrl.model.towers import TowersConfig
from mmrl.model.two_tower import LogitScaleConfig
from mmrl.search import embed
from mmrl.search.build import write_index
from mmrl.search.embed import embed_images
from mmrl.search.table import columns_of, image_schema, text_schema, vector_array

COUNT = 24


def stored(name: Path, folder: Path, seed: int) -> Path:
    """A bundle of random weights, nested at 4, 8 and 16."""
    torch.manual_seed(seed)
    built = towers.build(TowersConfig(name=str(name)))
    model = two_tower.from_towers(built, LogitScaleConfig(), 1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    one = bundle.make_bundle(model, built, (4, 8, 16))
    bundle.save(one, folder, one.state(), {})
    return folder


@pytest.fixture(scope="session")
def indexed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model/, other_model/, images.tar (three of its samples are bad), embeddings/ and index/."""
    folder = tmp_path_factory.mktemp("search")
    stored(tiny_model, folder / "model", 1)
    stored(tiny_model, folder / "other_model", 2)
    members = [member for number in range(COUNT) for member in sample_members(number)]
    members += [("large.jpg", encoded(drawing(50, 300)[0], "JPEG")), ("large.txt", b"a [red] large one")]
    members += [("broken.png", b"no picture"), ("broken.txt", b"x")]
    members += [("latin.png", encoded(drawing(0)[0])), ("latin.txt", "é".encode("latin-1"))]
    members += [*sample_members(3)]  # a duplicate key
    write_tar(folder / "images.tar", members)
    embed_images(str(folder / "model"), str(folder / "images.tar"), folder / "embeddings", batch_size=7, quiet=True)
    write_index(folder / "embeddings", folder / "index", quiet=True)
    return folder


def rows_of(folder: Path, name: str = embed.EMBEDDINGS) -> list[dict[str, Any]]:
    return pyarrow.parquet.read_table(folder / name).to_pylist()


def brute_force(query: np.ndarray, vectors: np.ndarray, dim: int) -> np.ndarray:
    """Cosine similarities of the prefixes, computed in float64."""
    query, vectors = query[:dim].astype(np.float64), vectors[:, :dim].astype(np.float64)
    return vectors @ query / np.linalg.norm(vectors, axis=1) / np.linalg.norm(query)


def image_bytes(kind: str = "WEBP") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, kind)
    return buffer.getvalue()


def clustered(count: int, dim: int, seed: int) -> np.ndarray:
    """Unit vectors in clusters, with variance falling from the first dim to the last."""
    rng = np.random.default_rng(seed)
    deviations = np.arange(1, dim + 1) ** -0.5
    centres = np.random.default_rng(7).standard_normal((40, dim)) * deviations
    rows = centres[rng.integers(0, 40, count)] + rng.standard_normal((count, dim)) * deviations
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def generated_embeddings(
    folder: Path, vectors: np.ndarray, texts: np.ndarray, keys: list[str] | None = None, model: str = "nowhere"
) -> Path:
    """Writes the output that `mmrl embed` would write for these vectors."""
    folder.mkdir(parents=True)
    columns = columns_of([vectors.shape[1]], ["fp32"])
    facts = {
        "format": embed.EMBEDDINGS_FORMAT,
        "version": embed.EMBEDDINGS_VERSION,
        "model": model,
        "origin_sha256": "generated",
        "dim": vectors.shape[1],
        "nested_dims": [16, 32, vectors.shape[1]],
        "columns": [asdict(column) for column in columns],
    }
    keys = keys or [f"shard/{number:05}" for number in range(len(vectors))]
    groups = [number % 3 for number in range(len(vectors))]
    plain = {
        "key": keys,
        "captions": [[f"picture {key}"] for key in keys],
        "group": [group_id_of(group) for group in groups],
        "group_name": [f"group {group}" for group in groups],
    }
    schema = image_schema(columns, facts)
    arrays = [pyarrow.array(values, schema.field(name).type) for name, values in plain.items()]
    arrays += [vector_array(pyarrow, vectors), pyarrow.array([image_bytes()] * len(vectors), pyarrow.binary())]
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(arrays, schema=schema), folder / embed.EMBEDDINGS)
    of_texts = text_schema(columns, facts)
    words = {
        "key": [""] * len(texts),
        "caption": [""] * len(texts),
        "group": [-1] * len(texts),
        "group_name": [""] * len(texts),
    }
    arrays = [pyarrow.array(values, of_texts.field(name).type) for name, values in words.items()]
    table = pyarrow.Table.from_arrays([*arrays, vector_array(pyarrow, texts)], schema=of_texts)
    pyarrow.parquet.write_table(table, folder / embed.TEXTS)
    return folder


def group_id_of(number: int) -> int:
    from mmrl.data.samples import group_id

    return group_id(f"group {number}")


def metadata_of(folder: Path) -> dict[str, Any]:
    return json.loads(pyarrow.parquet.read_schema(folder / embed.EMBEDDINGS).metadata[b"mmrl"])
