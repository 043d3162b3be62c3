"""Small real things that the tests share: shards of drawn pictures, a tiny open_clip model, a run's config."""

import io
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

# Before torch is imported: more threads than cores make small models many times slower, in children as well.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
# The indexes of the tests' shards are kept apart from the user's, and go with the tests.
os.environ["MMRL_CACHE"] = tempfile.mkdtemp(prefix="mmrl-tests-")

import numpy as np
import pytest
import torch
import yaml
from helpers.worlds import run_in_world
from PIL import Image
from rich.console import Console

if torch.cuda.is_available():
    # The tests of this process use its GPU. The processes that it starts use the CPU, since several cannot share a GPU.
    torch.cuda.init()
    torch.cuda.device_count()  # cached from now on
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
else:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # the kernels of losses/kernels.py run on the CPU

TINY_MODEL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "green", "square", "stripe", "number", "##s"]
COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 70, 220), "grey": (128, 128, 128)}
SHAPES = ("square", "stripe", "corner")


def drawing(number: int, size: int = 32) -> tuple[Image.Image, str, str]:
    """Picture `number` of an endless, learnable set, its caption and its group."""
    colour = list(COLOURS)[number % 4]
    shape = SHAPES[number // 4 % 3]
    canvas = np.random.default_rng(number).integers(200, 256, (size, size, 3)).astype(np.uint8)
    area = {
        "square": (slice(8, 24), slice(8, 24)),
        "stripe": (slice(12, 20), slice(0, size)),
        "corner": (slice(0, 14), slice(0, 14)),
    }
    canvas[area[shape]] = COLOURS[colour]
    return Image.fromarray(canvas), f"a {colour} {shape} number {number}", f"{colour} {shape}"


def pytest_sessionfinish() -> None:
    shutil.rmtree(os.environ["MMRL_CACHE"], ignore_errors=True)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    """The picture as a file's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """A plain tar of these members."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample_members(number: int) -> list[tuple[str, bytes]]:
    """The members of one good sample."""
    image, caption, group = drawing(number)
    metadata = {"captions": [caption, f"{caption}, again"], "group": group}
    return [
        (f"{number:05}.png", encoded(image)),
        (f"{number:05}.txt", caption.encode()),
        (f"{number:05}.json", json.dumps(metadata).encode()),
    ]


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three shards of 20, 17 and 11 samples."""
    folder = tmp_path_factory.mktemp("shards")
    first = 0
    for shard, count in enumerate((20, 17, 11)):
        members = [m for number in range(first, first + count) for m in sample_members(number)]
        write_tar(folder / f"part-{shard}.tar", members)
        first += count
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model config of the user's: two transformers of one layer, 16-d."""
    path = tmp_path_factory.mktemp("models") / "tiny-test.json"
    path.write_text(json.dumps(TINY_MODEL))
    return path


@pytest.fixture(scope="session")
def hf_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model config whose text tower and tokenizer are a local Hugging Face BERT."""
    from transformers import BertConfig, BertTokenizerFast  # pyright: ignore[reportAttributeAccessIssue]

    folder = tmp_path_factory.mktemp("bert")
    BertTokenizerFast(vocab={token: number for number, token in enumerate(VOCABULARY)}).save_pretrained(folder)
    BertConfig(
        vocab_size=len(VOCABULARY), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16,
    ).save_pretrained(folder)  # fmt: skip
    text = {
        "hf_model_name": str(folder),
        "hf_tokenizer_name": str(folder),
        "hf_proj_type": "linear",
        "hf_pooler_type": "mean_pooler",
        "context_length": 12,
    }
    path = tmp_path_factory.mktemp("models") / "tiny-bert.json"
    path.write_text(json.dumps({**TINY_MODEL, "text_cfg": text}))
    return path


@pytest.fixture
def write_config(tmp_path: Path, shards: Path, tiny_model: Path) -> Callable[..., Path]:
    """Writes the YAML of a small run; keyword arguments replace whole sections."""

    def write(name: str = "config.yaml", **sections: Any) -> Path:
        values: dict[str, Any] = {
            "run": str(tmp_path / "run"),
            "model": {"name": str(tiny_model)},
            "nesting": {"dims": [16, 4, 8]},
            "data": {"train": str(shards), "augment": {"rotate": 5.0, "brightness": 0.1}},
            "optim": {"lr": 1e-3, "warmup": "2 steps"},
            "train": {"batch_size": 12, "duration": "8 steps"},
            "evaluation": {"sets": {"val": {"shards": str(shards), "captions": 1}}, "every": "100 steps"},
            "checkpoint": {"every": "100 steps"},
            "tracking": {"log_every": 1},
        }
        values |= sections
        values["data"] = {"workers": 0, **values["data"]}  # a worker takes seconds to start
        values["engine"] = {"precision": "fp32", **values.get("engine", {})}
        path = tmp_path / name
        path.write_text(yaml.safe_dump(values))
        return path

    return write


@pytest.fixture
def short_rotations(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's rotation is learned in 20 steps instead of 300: for tests of what becomes of it."""
    from mmrl.rotation import learned

    defaults = learned.find_rotation.__defaults__
    assert defaults is not None
    monkeypatch.setattr(learned.find_rotation, "__defaults__", (defaults[0], 20))


@pytest.fixture
def bf16_grad_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The matrix products of the loss's backward pass in bfloat16 on any CPU: the less exact of the two paths."""
    monkeypatch.setattr("mmrl.losses.sweep.has_native_bfloat16", lambda _: True)


@pytest.fixture
def fp32_grad_products(monkeypatch: pytest.MonkeyPatch, bf16_grad_products: None) -> None:
    """The matrix products of the loss's backward pass in float32, as on a CPU without bfloat16 instructions."""
    monkeypatch.setattr("mmrl.losses.sweep.has_native_bfloat16", lambda _: False)


def start_training(path: Path, processes: int, folder: Path, *cases: str) -> None:
    """Trains by each case's overrides, one after another, in a world of so many processes."""
    run_in_world(processes, partial(_train_all, path, cases), folder, start_method="forkserver")


def _train_all(path: Path, cases: Sequence[str], _folder: Path) -> None:
    from mmrl.config import load_config
    from mmrl.train.trainer import train

    for case in cases:
        train(load_config(path, case.split()), Console(quiet=True))
