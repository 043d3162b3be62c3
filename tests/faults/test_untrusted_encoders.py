"""An encoder, index or model config from an untrusted source runs no code and makes no network request, in any command.

Each payload would create a file (the canary) if its Python ran. Every attempted connection is recorded and refused.
"""

import json
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY_MODEL, VOCABULARY, drawing
from huggingface_hub import constants
from typer.testing import CliRunner

import mmrl
from mmrl.cli import app
from mmrl.errors import InputError
from mmrl.model import bundle, towers, two_tower
from mmrl.model.manifest import MANIFEST, hash_files
from mmrl.model.model_cfg import check_model_cfg
from mmrl.model.towers import TowersConfig
from mmrl.model.two_tower import LogitScaleConfig

Change = Callable[[Path, dict[str, Any], Path], None]


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """A file that a payload creates if it is executed."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "code of the payload was executed"


@pytest.fixture(autouse=True)
def connections(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Records attempted connections and name look-ups; fails if there are any."""
    attempts: list[Any] = []

    def refuse(*arguments: Any, **_: Any) -> Any:
        attempts.append(arguments)
        raise OSError("no network in this test")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("transformers asked whether to run code"))
    yield attempts
    assert not attempts, "a stored name caused a network call"


@pytest.fixture
def encoder(hf_model: Path, tmp_path: Path) -> Path:
    """A bundle with a Hugging Face tokenizer and text tower."""
    torch.manual_seed(1)
    built = towers.build(TowersConfig(name=str(hf_model)))
    one = bundle.make_bundle(two_tower.from_towers(built, LogitScaleConfig(), 1), built, (16,))
    bundle.save(one, tmp_path / "encoder", one.state(), {"step": 1})
    return tmp_path / "encoder"


def write_payload(folder: Path, canary: Path) -> None:
    """Writes Python code that transformers would import if it were allowed to."""
    code = f"open({str(canary)!r}, 'w').close()\n"
    (folder / "evil.py").write_text(
        f"{code}from transformers import BertConfig, BertModel, BertTokenizerFast\n"
        "class EvilConfig(BertConfig):\n    model_type = 'evil'\n"
        "class EvilModel(BertModel):\n    config_class = EvilConfig\n"
        "class EvilTokenizer(BertTokenizerFast):\n    pass\n"
    )


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def auto_map_in_tokenizer(folder: Path, model_cfg: dict[str, Any], canary: Path) -> None:
    write_payload(folder / "tokenizer", canary)
    edit_json(
        folder / "tokenizer" / "tokenizer_config.json",
        auto_map={"AutoTokenizer": [None, "evil.EvilTokenizer"]},
        tokenizer_class="EvilTokenizer",
    )


def trusting_kwargs(folder: Path, model_cfg: dict[str, Any], canary: Path) -> None:
    auto_map_in_tokenizer(folder, model_cfg, canary)
    model_cfg["text_cfg"]["tokenizer_kwargs"] = {"trust_remote_code": True}


def other_kwargs(folder: Path, model_cfg: dict[str, Any], canary: Path) -> None:
    model_cfg["text_cfg"]["tokenizer_kwargs"] = {"tokenizer_file": "/etc/hostname"}


def auto_map_in_text_model(folder: Path, model_cfg: dict[str, Any], canary: Path) -> None:
    write_payload(folder / "text_model", canary)
    edit_json(
        folder / "text_model" / "config.json",
        auto_map={"AutoConfig": "evil.EvilConfig", "AutoModel": "evil.EvilModel"},
        model_type="evil",
    )


def auto_map_beside_a_known_type(folder: Path, model_cfg: dict[str, Any], canary: Path) -> None:
    write_payload(folder / "text_model", canary)
    edit_json(folder / "text_model" / "config.json", auto_map={"AutoModel": "evil.EvilModel"})


def kernels_of_a_hub(folder: Path, model_cfg: dict[str, Any], canary: Path) -> None:
    edit_json(folder / "text_model" / "config.json", attn_implementation="stranger/attention")


def no_text_model(folder: Path, model_cfg: dict[str, Any], canary: Path) -> None:
    shutil.rmtree(folder / "text_model")


def no_tokenizer(folder: Path, model_cfg: dict[str, Any], canary: Path) -> None:
    shutil.rmtree(folder / "tokenizer")


def timm_from_a_hub(folder: Path, model_cfg: dict[str, Any], canary: Path) -> None:
    model_cfg["vision_cfg"] = {"timm_model_name": "hf-hub:stranger/model", "image_size": 32}


def timm_from_a_folder(folder: Path, model_cfg: dict[str, Any], canary: Path) -> None:
    model_cfg["vision_cfg"] = {"timm_model_name": f"local-dir:{folder}", "image_size": 32}


def unknown_key(folder: Path, model_cfg: dict[str, Any], canary: Path) -> None:
    model_cfg["text_cfg"]["hf_model_kwargs"] = {"trust_remote_code": True}


CHANGES: list[Change] = [
    trusting_kwargs, auto_map_in_tokenizer, other_kwargs, auto_map_in_text_model, auto_map_beside_a_known_type,
    kernels_of_a_hub, no_text_model, no_tokenizer, timm_from_a_hub, timm_from_a_folder, unknown_key,
]  # fmt: skip


def apply(change: Change, folder: Path, canary: Path) -> None:
    """Changes a bundle and updates the hashes in its manifest."""
    manifest = json.loads((folder / MANIFEST).read_text())
    change(folder, manifest["model_cfg"], canary)
    weights = manifest["files"]["model.safetensors"]
    manifest["files"] = hash_files(folder) | {"model.safetensors": weights}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def run(*arguments: Any) -> str:
    """The error message of a command that refuses a file: an InputError, which `main` prints with exit code 2."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert isinstance(result.exception, InputError), result.output
    return str(result.exception)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_stored_encoder_is_refused_by_every_command(
    change: Change, encoder: Path, canary: Path, shards: Path, tmp_path: Path
) -> None:
    apply(change, encoder, canary)
    with pytest.raises(InputError):
        mmrl.load(encoder)
    for tower in ("text", "image"):
        try:
            mmrl.load(encoder, towers=tower)
        except InputError:
            continue  # the change may concern the other tower only
    messages = [
        run("eval", encoder, shards),
        run("export", encoder, tmp_path / "exported", "--dim", "8"),
        run("rotate", encoder, shards, tmp_path / "rotated"),
        run("embed", encoder, shards, tmp_path / "embeddings", "--texts"),
    ]
    assert all(str(encoder) in message for message in messages), messages


def test_an_index_that_names_such_an_encoder(encoder: Path, canary: Path, shards: Path, tmp_path: Path) -> None:
    for arguments in (("embed", encoder, shards, tmp_path / "e"), ("index", tmp_path / "e", tmp_path / "i")):
        assert CliRunner().invoke(app, [str(argument) for argument in arguments]).exit_code == 0
    apply(trusting_kwargs, encoder, canary)
    assert "trust_remote_code" in run("search", tmp_path / "i", "red")
    assert "trust_remote_code" in run("serve", tmp_path / "i")
    manifest = tmp_path / "i" / "manifest.json"
    for name in ("open_clip:hf-hub:stranger/model", "open_clip:ViT-B-32:laion2b_s34b_b79k"):
        edit_json(manifest, encoder=json.loads(manifest.read_text())["encoder"] | {"model": name})
        assert "--model" in run("search", tmp_path / "i", "red")


@pytest.mark.parametrize("kind", ["json", "local-dir"])
@pytest.mark.parametrize("change", [trusting_kwargs, auto_map_in_tokenizer, other_kwargs, timm_from_a_hub, unknown_key])
def test_a_model_config_is_refused_by_every_command(
    change: Change,
    kind: str,
    hf_model: Path,
    canary: Path,
    write_config: Callable[..., Path],
    shards: Path,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "stranger"
    (folder / "tokenizer").mkdir(parents=True)
    model_cfg = json.loads(hf_model.read_text())
    named = Path(model_cfg["text_cfg"]["hf_tokenizer_name"])
    for path in named.glob("*"):
        shutil.copy(path, folder / "tokenizer" / path.name)
    change(folder, model_cfg, canary)
    model_cfg["text_cfg"]["hf_tokenizer_name"] = str(folder / "tokenizer")
    if kind == "json":
        (folder / "stranger.json").write_text(json.dumps(model_cfg))
        name = str(folder / "stranger.json")
    else:
        for path in (folder / "tokenizer").glob("*"):
            shutil.copy(path, folder / path.name)
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": {}}))
        name = f"local-dir:{folder}"
    config = write_config(model={"name": name})
    model = f"open_clip:{name}"
    assert "open_clip has no model" not in run("eval", model, shards, "--random-weights")  # refused for its content
    run("embed", model, shards, tmp_path / "embeddings", "--random-weights")
    run("export", model, tmp_path / "exported", "--dim", "8", "--random-weights")
    run("check", shards, "--tokenizer", name)
    run("train", config)
    run("plan", config)


def test_a_siglip_name_downloads_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "my-siglip.json").write_text(json.dumps(TINY_MODEL))
    with pytest.raises(InputError, match="hf_tokenizer_name"):
        towers.build(TowersConfig(name=str(tmp_path / "my-siglip.json")))


def test_every_config_that_open_clip_ships_is_allowed() -> None:
    import open_clip

    paths = sorted((Path(open_clip.__file__).parent / "model_configs").glob("*.json"))
    assert len(paths) > 100
    for path in paths:
        check_model_cfg(json.loads(path.read_text()), path)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("vision_cfg", "width", 10**12),
        ("vision_cfg", "layers", -1),
        ("vision_cfg", "image_size", [32]),
        ("text_cfg", "context_length", "77"),
        ("text_cfg", "tokenizer_mode", "../clips"),
        ("text_cfg", "act_kwargs", {"inplace": True}),
        ("text_cfg", "norm_kwargs", {"device": "cuda"}),
    ],
)
def test_a_value_out_of_range_is_reported(section: str, key: str, value: Any) -> None:
    changed = {**TINY_MODEL, section: TINY_MODEL[section] | {key: value}}
    with pytest.raises(InputError, match=rf"^stranger: model config: {section}\.{key}"):
        check_model_cfg(changed, "stranger")


def test_the_payload_runs_if_it_is_trusted(encoder: Path, tmp_path: Path) -> None:
    """Checks the payload itself: if it could not run, the tests above could not fail."""
    from transformers import AutoTokenizer

    created = tmp_path / "created"
    write_payload(encoder / "tokenizer", created)
    auto_map_in_tokenizer(encoder, {}, created)
    AutoTokenizer.from_pretrained(encoder / "tokenizer", trust_remote_code=True)
    assert created.exists()


def test_a_valid_encoder_loads_offline(encoder: Path) -> None:
    vectors = mmrl.load(encoder).encode_texts([VOCABULARY[6]])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert mmrl.load(encoder).encode_images([drawing(1)[0]]).shape == (1, 16)
