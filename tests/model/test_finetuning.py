"""What trains when part of a tower is frozen: the last blocks, or LoRA adapters."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_MODEL, start_training
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

from mmrl.config import load_config
from mmrl.distributed import comm
from mmrl.engine.engine import Engine
from mmrl.errors import InputError
from mmrl.model import bundle, folding, lora, two_tower
from mmrl.model.towers import TowersConfig
from mmrl.model.two_tower import LogitScaleConfig
from mmrl.train.preflight import prepare
from mmrl.train.trainer import Trainer, train

WriteConfig = Callable[..., Path]
# Image towers by name: vision_cfg, and the number of blocks or stages.
_TIMM = {"timm_model_pretrained": False, "timm_pool": "", "timm_proj": "linear", "image_size": 64}
_IMAGE_TOWERS: dict[str, tuple[dict[str, Any], int]] = {
    "vit": ({**TINY_MODEL["vision_cfg"], "layers": 3}, 3),
    "resnet": ({"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 16, "patch_size": None}, 4),
    **{name: ({**_TIMM, "timm_model_name": f"test_{name}"}, 4) for name in ("convnext", "byobnet", "nfnet")},
    "timm-vit": ({**_TIMM, "timm_model_name": "test_vit", "timm_pool": "token"}, 6),
}
_OPTIONS = {
    "last_blocks": ["model.train_last_blocks=1", "optim.layer_decay=0.5"],
    "lora": ["model.lora={rank: 2, dropout: 0.1}", "optim.lr=1e-2"],
}
needs_peft = pytest.mark.skipif(find_spec("peft") is None, reason="peft is not installed (the extra lora)")
each_option = pytest.mark.parametrize("option", ["last_blocks", pytest.param("lora", marks=needs_peft)])


@pytest.fixture
def config_with(tmp_path: Path, hf_model: Path) -> Callable[..., str]:
    """Writes a model config with this image tower, and a text tower of three blocks, or a BERT."""

    def write(image: str = "vit", bert: bool = False) -> str:
        text = json.loads(hf_model.read_text())["text_cfg"] if bert else {**TINY_MODEL["text_cfg"], "layers": 3}
        values = {**TINY_MODEL, "vision_cfg": _IMAGE_TOWERS[image][0], "text_cfg": text}
        (tmp_path / f"{image}.json").write_text(json.dumps(values))
        return str(tmp_path / f"{image}.json")

    return write


@pytest.mark.parametrize(("image", "recomputes"), [("vit", True), *((image, False) for image in _IMAGE_TOWERS)])
def test_the_last_blocks_train_and_no_gradient_reaches_the_others(
    config_with: Callable[..., str], image: str, recomputes: bool
) -> None:
    torch.manual_seed(0)
    name = config_with(image, bert=image == "vit")
    built = bundle.initial_towers(
        TowersConfig.model_validate({"name": name, "train_last_blocks": 1, "grad_checkpointing": recomputes})
    )
    model = two_tower.from_towers(built, LogitScaleConfig(), 1).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    reached: list[str] = []

    def note(key: str, _module: nn.Module, _inputs: object, output: Any) -> None:
        if (output[0] if isinstance(output, tuple) else output).requires_grad:
            reached.append(key)

    for key, module in model.named_modules():
        if [*module.parameters()] and not any(p.requires_grad for p in module.parameters()):
            module.register_forward_hook(partial(note, key))
    side = built.image_spec.height
    image_BD, text_BD, _, _ = model(
        torch.randint(0, 256, (4, 3, side, side), dtype=torch.uint8), built.tokenise(["a red square"] * 4)
    )
    assert reached == []
    assert image_BD is not None
    assert text_BD is not None
    (image_BD.square().sum() + text_BD.square().sum()).backward()
    with_gradient = {key for key, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {key for key, p in model.named_parameters() if p.requires_grad} - {"log_logit_scale"}
    blocks = {block for key in with_gradient if key.startswith("image") and (block := _block(key))}
    last = _IMAGE_TOWERS[image][1]
    assert blocks == ({f"layer{last}"} if image == "resnet" else {str(last - 1)})
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert {key for key in changed if "running_" not in key and "num_batches" not in key} <= with_gradient
    statistics = {key for key in changed if "running_" in key}  # those of trained batch norms
    assert {key.rpartition(".")[0] + ".weight" for key in statistics} <= with_gradient
    assert bool(statistics) == (image in ("resnet", "byobnet"))


def _block(key: str) -> str | None:
    parts = key.split(".")
    for part, after in pairwise(parts):
        if part in ("resblocks", "blocks", "stages"):
            return after
        if part.startswith("layer") and part[5:].isdigit():
            return part
    return None


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"train_last_blocks": 4},
            r"train_last_blocks.image: 4 blocks, but the image tower, a VisionTransformer, has 3; ",
        ),
        ({"train_last_blocks": {"text": 4}}, r"train_last_blocks.text: 4 blocks, .*, has 3; set it to at most 3\.$"),
        pytest.param(
            {"lora": {}, "name": "nfnet"},
            r"lora: the image tower, a NormFreeNet, has no linear layers .* model\.lora\.towers",
            marks=needs_peft,
        ),
    ],
)
def test_what_a_tower_does_not_have_is_refused(
    config_with: Callable[..., str], model: dict[str, Any], message: str
) -> None:
    values = {**model, "name": config_with(model.get("name", "vit"))}
    with pytest.raises(InputError, match=rf"^model\.{message}"):
        bundle.initial_towers(TowersConfig.model_validate(values))


def test_two_rules_for_one_tower_are_refused(write_config: WriteConfig) -> None:
    with pytest.raises(InputError, match=r"model: lock_text and lora: each says what of the text tower trains"):
        load_config(write_config(), ["model.lock_text=true", "model.lora={}"])
    load_config(write_config(), ["model.lock_text=true", "model.train_last_blocks={image: 1}"])


@needs_peft
@pytest.mark.parametrize("image", ["vit", "timm-vit"])
def test_merged_adapters_compute_what_adapters_compute(config_with: Callable[..., str], image: str) -> None:
    """At the start nothing changes; with any adapters, the merged encoder has the same names and embeddings."""
    name = config_with(image, bert=image == "vit")
    torch.manual_seed(0)
    plain = two_tower.from_towers(bundle.initial_towers(TowersConfig(name=name)), LogitScaleConfig(), 1)
    torch.manual_seed(0)
    built = bundle.initial_towers(TowersConfig(name=name, lora=lora.LoraConfig(rank=3)))
    model = two_tower.from_towers(built, LogitScaleConfig(), 1)
    side = built.image_spec.height
    inputs = torch.randint(0, 256, (4, 3, side, side), dtype=torch.uint8), built.tokenise(["a red square", "stripe"])

    def embed(one: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat(one.eval()(*inputs)[:2])

    torch.testing.assert_close(embed(model), embed(plain), rtol=0, atol=1e-6)
    layers = lora.adapters(model)
    kinds = {key.rpartition(".")[2] for key in layers if key.startswith("image")}
    assert kinds == ({"in_proj", "out_proj", "c_fc", "c_proj"} if image == "vit" else {"qkv", "proj", "fc1", "fc2"})
    for layer in layers.values():
        nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    training = bundle.make_bundle(model, built, (16,))
    encoder = folding.share_weights(training)
    scale = model.log_logit_scale
    folding.fold(training, encoder, torch.eye(16, dtype=torch.float64), scale, None)
    assert list(encoder.model.state_dict()) == list(plain.state_dict())
    difference = (embed(model) - embed(plain)).abs().max()
    assert difference > 0.01
    torch.testing.assert_close(embed(encoder.model), embed(model), rtol=1e-6, atol=1e-6)
    model.train()
    torch.cat(model(*inputs)[:2]).square().sum().backward()
    assert {key for key, p in model.named_parameters() if p.grad is not None} == {
        key for key, p in model.named_parameters() if p.requires_grad and key != "log_logit_scale"
    }


def weights(run: Path, file: str = "model.safetensors", checkpoint: str = "last") -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / checkpoint / file)


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.usefixtures("short_rotations")
@each_option
def test_training_resumes_and_does_not_depend_on_zero_and_micro_batches(
    write_config: WriteConfig, tmp_path: Path, config_with: Callable[..., str], option: str
) -> None:
    overrides = [*_OPTIONS[option], "evaluation.at_start=true"]
    path = write_config(model={"name": config_with()}, checkpoint={"every": 4, "keep": 9})
    console = Console(record=True, width=200)
    more = ["train.ema=0.5", "engine.precision=bf16", "nesting.rotate_at_start=true", "nesting.rotate_at_end=true"]
    run = train(load_config(path, [*overrides, *more]), console)
    shown = console.export_text()
    assert " M of them train, nested dims" in shown
    scores = [json.loads(line)["sets"]["val"] for line in (run / "evaluations.jsonl").read_text().splitlines()]
    start, end = (100 * one["dims"]["16"]["text_to_image"]["R@10"] for one in (scores[0], scores[-1]))
    forgotten = f"text→image R@10 on val: {start:.1f} % at the start, {end:.1f} % now (16-d)"
    assert forgotten in shown
    assert forgotten in (run / "report" / "report.md").read_text()
    whole = weights(run)
    average = weights(run, "training/average.safetensors") if option == "lora" else {}
    (run / "checkpoints" / "last").unlink()
    (run / "checkpoints" / "last").symlink_to("step-4")
    train(load_config(path, [*overrides, *more, "resume=auto"]))
    assert all(torch.equal(tensor, whole[name]) for name, tensor in weights(run).items())
    assert all(torch.equal(tensor, weights(run, "training/average.safetensors")[n]) for n, tensor in average.items())
    # Frozen weights are bit-equal to the start, in every form of training.
    initial = _initial_weights(load_config(path, [*overrides, f"run={tmp_path}/start"]))
    without_dropout = [one.replace(", dropout: 0.1", "") for one in overrides]
    runs = {}
    for key, stage, micro_batch in (("plain", 0, 12), ("two", 2, 4), ("three", 3, 4)):
        form = [f"run={tmp_path}/{key}", f"engine.zero_stage={stage}", f"train.micro_batch={micro_batch}"]
        runs[key] = train(load_config(path, [*without_dropout, *form]))
        assert losses(runs[key]) == pytest.approx(losses(runs["plain"]), abs=2e-5), key
        file = "training/weights.safetensors" if option == "lora" else "model.safetensors"
        found = weights(runs[key], file)
        frozen = [name for name in found if name in initial and not initial[name][1]]
        assert len(frozen) > 10
        assert all(torch.equal(found[name], initial[name][0]) for name in frozen)
    trained = {name for name, (_, trains) in initial.items() if trains}
    assert trained == {label.partition("/")[2] for label in weights(run, "training/optimizer.safetensors")} - {""}
    names = weights(runs["plain"]).keys()
    assert not any("lora" in name or "base_layer" in name for name in names)


def _initial_weights(config: Any) -> dict[str, tuple[torch.Tensor, bool]]:
    """{name: (value, trains)} of the model as a run starts with it."""
    trainer = Trainer(config, prepare(config, comm.start()), comm.world(), Console(quiet=True))
    return {name: (p.detach().clone(), p.requires_grad) for name, p in trainer.engine.model.named_parameters()}


@pytest.mark.slow
@each_option
def test_two_processes_train_as_one(
    write_config: WriteConfig, tmp_path: Path, config_with: Callable[..., str], option: str
) -> None:
    overrides = [one.replace(", dropout: 0.1", "") for one in _OPTIONS[option]]
    path = write_config(model={"name": config_with()}, evaluation={})
    one = train(load_config(path, overrides))
    cases = {stage: tmp_path / f"stage{stage}" for stage in range(4)}
    options = " ".join(overrides).replace("{rank: 2}", '{"rank":2}')  # the options are split at spaces
    start_training(path, 2, tmp_path, *(f"{options} run={run} engine.zero_stage={n}" for n, run in cases.items()))
    for stage, run in cases.items():
        assert losses(run) == pytest.approx(losses(one), abs=2e-5), stage
        for name, tensor in weights(run).items():
            if "in_proj_bias" not in name:
                torch.testing.assert_close(tensor, weights(one)[name], rtol=0, atol=1e-4)


@needs_peft
@pytest.mark.parametrize(("option", "stage"), [("model.lora={rank: 2}", 0), ("model.train_last_blocks=0", 2)])
def test_optimizer_state_is_that_of_what_trains(write_config: WriteConfig, option: str, stage: int) -> None:
    path = write_config(evaluation={}, train={"batch_size": 12, "duration": 1})
    config = load_config(path, [option, f"engine.zero_stage={stage}"])
    trainer = Trainer(config, prepare(config, comm.start()), comm.world(), Console(quiet=True))
    trainer.step(trainer._feed.take())
    trained = sum(p.numel() for p in trainer.engine.model.parameters() if p.requires_grad)
    assert trained < 0.01 * sum(p.numel() for p in trainer.engine.model.parameters())
    assert sum(tensor.numel() for tensor in _optimizer_tensors(trainer.engine)) == pytest.approx(2 * trained, rel=0.01)


def _optimizer_tensors(engine: Engine) -> Iterator[torch.Tensor]:
    for state in engine._base_optimizer.state.values():
        yield from (x for x in state.values() if isinstance(x, torch.Tensor) and x.numel() > 1)
