"""Runs with one tower: two texts or two images of an item."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from conftest import drawing, encoded, start_training, write_tar
from helpers import reference
from helpers.encoders import save_random_encoder
from safetensors.torch import load_file

import mmrl
from mmrl.config import Config, load_config
from mmrl.data.sources import open_reader, open_training_set
from mmrl.data.stream import Stream
from mmrl.engine import optim
from mmrl.errors import InputError
from mmrl.evaluate import configured
from mmrl.model import bundle, two_tower
from mmrl.train import sides
from mmrl.train.trainer import train

WriteConfig = Callable[..., Path]
LOSS = {
    "text": {"image_text": 0, "text_text": 1, "label_smoothing": 0.1},
    "image": {"image_text": 0, "image_image": 1, "label_smoothing": 0.1},
}
CLOSE: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-4}


def question_and_passage(number: int) -> list[tuple[str, bytes]]:
    """A sample without an image."""
    _, caption, group = drawing(number)
    metadata = {"captions": [f"what is {caption}?"], "second_text": f"it shows {caption}", "group": f"{group} {number}"}
    return [(f"{number:05}.json", json.dumps(metadata).encode())]


def two_photos(number: int) -> list[tuple[str, bytes]]:
    """A sample with two images and no caption."""
    (photo, _, _), (catalogue, _, _) = drawing(number), drawing(number + 1200)
    return [(f"{number:05}.png", encoded(photo)), (f"{number:05}.second.png", encoded(catalogue))]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, make = tmp_path_factory.mktemp("pairs"), {"text": question_and_passage, "image": two_photos}
    for side, members in make.items():
        for shard, numbers in enumerate((range(20), range(20, 37))):
            write_tar(folder / side / f"{shard}.tar", [one for n in numbers for one in members(n)])
    return {side: folder / side for side in make}


def config_of(write_config: WriteConfig, side: str, shards: Path, tiny_model: Path, **sections: Any) -> Path:
    evaluation = {"sets": {"val": {"shards": str(shards)}}, "every": "100 steps"}
    values: dict[str, Any] = {
        "model": {"name": str(tiny_model), "towers": side},
        "loss": LOSS[side],
        "data": {"train": str(shards)},
        "evaluation": evaluation,
    }
    return write_config(**{**values, **sections})


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state = load_file(folder / "checkpoints" / "last" / "model.safetensors")
    return {name: tensor for name, tensor in state.items() if "in_proj_bias" not in name}


def assert_same_run(one: Path, other: Path) -> None:
    assert losses(other) == pytest.approx(losses(one), abs=3e-5)
    torch.testing.assert_close(weights(other), weights(one), **CLOSE)


@pytest.mark.parametrize("side", ["text", "image"])
def test_one_tower_trains_evaluates_resumes_and_opens(
    write_config: WriteConfig, pairs: dict[str, Path], tiny_model: Path, tmp_path: Path, side: str
) -> None:
    path = config_of(write_config, side, pairs[side], tiny_model, checkpoint={"every": "5 steps"})
    run = train(load_config(path))
    assert not any(name.startswith("image" if side == "text" else "text") for name in weights(run))
    direction = f"{side}_to_{side}"
    scores = json.loads((run / "retrieval.json").read_text())
    assert [*scores["dims"]["16"]] == [direction]
    assert scores["num_queries"] == {direction: 37}
    assert scores["chance"][direction]["R@1"] == pytest.approx(
        1 / 37
    )  # queries are the first members, the rest gallery
    assert list(scores.get("ceiling", {})) == ([direction] if side == "text" else [])
    assert_same_run(run, train(load_config(path, [f"run={tmp_path}/micro", "train.micro_batch=4"])))

    resumed = train(load_config(path, [f"run={tmp_path}/resumed"]))
    last = resumed / "checkpoints" / "last"
    last.unlink()
    last.symlink_to("step-5")
    train(load_config(path, [f"run={tmp_path}/resumed", "resume=auto"]))
    assert losses(resumed) == losses(run)
    assert all(torch.equal(tensor, weights(run)[name]) for name, tensor in weights(resumed).items())

    encoder = mmrl.load(run, dim=8)
    if side == "text":
        assert encoder.encode_texts(["what is it?"]).shape == (1, 8)
        with pytest.raises(InputError, match="no image tower"):
            encoder.encode_images([drawing(0)[0]])
    else:
        assert encoder.encode_images([drawing(0)[0]]).shape == (1, 8)
        with pytest.raises(InputError, match="no text tower"):
            encoder.encode_texts(["a"])


def plain_run(config: Config, side: Literal["text", "image"]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same training in plain PyTorch: one process, no DeepSpeed, the reference loss."""
    torch.manual_seed(config.seed)
    built = bundle.initial_towers(config.model)
    model = two_tower.from_towers(built, config.model.logit_scale, 1)
    optimizer = optim.build(model, built.model_cfg, config.optim)
    stream = Stream(
        open_training_set(config.data, [side]),
        config.train.batch_size,
        image=built.image_spec,
        text=built.tokenise,
        config=config.data,
        second=frozenset([side]),
        sides=[side],
    )
    batches, values = stream.forever(), []
    for step in range(8):
        optimizer.zero_grad()
        optim.set_lr(optimizer, optim.lr_factor(config.optim, step, 8, 2, 0))
        batch = next(batches)
        assert batch.second is not None
        tower, rows = getattr(model, side), (getattr(batch, side), getattr(batch.second, side))
        groups, second_groups = sides.groups([batch]), sides.groups([batch], "second")
        first_BD, second_BD = tower(torch.cat(rows)).chunk(2)
        total, by_dim = reference.nested_term(
            first_BD, second_BD, model.logit_scale, [4, 8, 16], None, (groups, second_groups), 0.1
        )
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm or 1e9)
        optimizer.step()
        values.append(sum(loss.item() for loss in by_dim.values()) / 3)
    return values, {name: tensor for name, tensor in model.state_dict().items() if "in_proj_bias" not in name}


@pytest.mark.parametrize("side", ["text", "image"])
def test_one_tower_learns_as_in_plain_pytorch(
    write_config: WriteConfig, pairs: dict[str, Path], tiny_model: Path, side: Literal["text", "image"]
) -> None:
    nesting = {"dims": [16, 4, 8], "rotation": False}
    path = config_of(write_config, side, pairs[side], tiny_model, nesting=nesting, evaluation={})
    config = load_config(path)
    run, (values, state) = train(config), plain_run(config, side)
    assert losses(run) == pytest.approx(values, abs=2e-5)
    torch.testing.assert_close(weights(run), state, **CLOSE)


def test_pairs_with_an_equal_text_are_no_negatives(write_config: WriteConfig, tiny_model: Path, tmp_path: Path) -> None:
    """Four pairs: two have one question, two one passage, and the passage of one is the question of another."""
    pairs = [("a", "x"), ("a", "y"), ("b", "y"), ("y", "z")]
    members = [
        (f"{n}.json", json.dumps({"captions": [one], "second_text": other}).encode())
        for n, (one, other) in enumerate(pairs)
    ]
    shard = write_tar(tmp_path / "pairs.tar", members)
    path = config_of(
        write_config, "text", shard, tiny_model, evaluation={}, train={"batch_size": 4, "duration": "1 steps"}
    )
    config = load_config(path, ["loss.label_smoothing=0"])
    batch = next(iter(Stream(open_training_set(config.data, ["text"]), 4, second=frozenset(["text"]), sides=["text"])))
    assert batch.second is not None
    drawn = list(zip(batch.text, batch.second.text, strict=True))
    rows = [drawn.index(pair) for pair in pairs]
    keys, second_keys = sides.groups([batch])[rows], sides.groups([batch], "second")[rows]
    assert ((keys[:, None] == second_keys) & (keys >= 0)[:, None]).any(2).tolist() == [
        [True, True, False, False],
        [True, True, True, False],
        [False, True, True, False],
        [False, True, True, True],  # its question is the passage of two others
    ]


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        (
            {"loss": {"image_text": 0, "text_text": 1}},
            r"config.yaml: loss: no term of the loss trains the image tower; set model.towers: text",
        ),
        ({"model": {"name": "x", "towers": "text"}}, "model.towers: text trains by loss.text_text alone"),
        ({"model": {"name": "x", "towers": "text", "lock_image": True}}, "lock_image: there is no image tower"),
        (
            {"model": {"name": "x", "towers": "image", "pretrained_text": True}},
            "pretrained_text: there is no text tower",
        ),
        (
            {
                "model": {"name": "x", "towers": "text"},
                "loss": {"image_text": 0, "text_text": 1},
                "teacher": {"model": "y"},
            },
            "teacher: needs the image tower",
        ),
        (
            {
                "model": {"name": "x", "towers": "text"},
                "loss": {"image_text": 0, "text_text": 1},
                "nesting": {"dims": [16, 8], "rotate_at_start": True},
            },
            "nesting.rotate_at_start: needs the image tower",
        ),
        (
            {
                "model": {"name": "x", "towers": "image"},
                "loss": {"image_text": 0, "image_image": 1},
                "optim": {"lr": 1e-3, "lr_text": 1e-4},
            },
            "optim.lr_text: needs the text tower, and model.towers is image; remove the key",
        ),
    ],
)
def test_what_one_tower_cannot_do_is_refused(
    write_config: WriteConfig, sections: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        load_config(write_config(**sections))


def test_a_run_refuses_a_direction_and_an_encoder_of_the_other_tower(
    write_config: WriteConfig, pairs: dict[str, Path], tiny_model: Path, tmp_path: Path
) -> None:
    best = {"set": "val", "dim": 8}
    evaluation = {"sets": {"val": {"shards": str(pairs["text"])}}, "best": best}
    path = config_of(write_config, "text", pairs["text"], tiny_model, evaluation=evaluation)
    with pytest.raises(InputError, match=r"evaluation.best.direction: text_to_image is not .*; set it to text_to_text"):
        train(load_config(path))
    with pytest.raises(InputError, match=r"no image: none of|no sample .* has .jpg"):
        train(load_config(config_of(write_config, "image", pairs["text"], tiny_model)))


@pytest.mark.parametrize("key", ["name", "pretrained"])
def test_an_encoder_without_the_tower_is_refused_before_the_data_are_read(
    write_config: WriteConfig, tiny_model: Path, tmp_path: Path, key: str
) -> None:
    encoder = save_random_encoder(str(tiny_model), tmp_path / "encoder", towers="text")
    path = write_config(data={"train": "nowhere"}, evaluation={}, model={"name": str(tiny_model), key: str(encoder)})
    says = "model.towers: both, but .*encoder has no image tower; set model.towers: text"
    with pytest.raises(InputError, match=says):
        train(load_config(path))


def test_a_set_with_nothing_to_find_is_refused_before_the_training(
    write_config: WriteConfig, pairs: dict[str, Path], tiny_model: Path, tmp_path: Path
) -> None:
    """Not at the first evaluation, which may be hours later."""
    for side, members in (
        ("text", [("a.json", b'{"captions": ["one", " One"]}'), ("b.json", b'{"captions": ["one"]}')]),
        ("image", [(f"{n}.png", encoded(drawing(n)[0])) for n in range(3)]),
    ):
        shard = write_tar(tmp_path / f"{side}.tar", members)
        evaluation = {"sets": {"val": {"shards": str(shard)}}, "every": "100 steps"}
        path = config_of(write_config, side, pairs[side], tiny_model, evaluation=evaluation)
        with pytest.raises(InputError, match=f"evaluation.sets.val: no sample has a second {side} .*nothing to find"):
            train(load_config(path))


@pytest.mark.parametrize(
    ("members", "captions", "expected"),
    [
        ([{"captions": ["one"], "second_text": "two"}], None, True),
        ([{"captions": ["one", "two"]}], None, True),
        ([{"captions": ["one", "two"]}], 1, False),
        ([{"captions": ["one"], "group": "x"}, {"captions": ["two"], "group": "x"}], 1, True),
        ([{"captions": ["one"], "group": "x"}, {"captions": ["One"], "group": "x"}], 1, False),
        ([{"captions": []}, {"captions": ["one"]}], None, False),
    ],
)
def test_what_is_a_positive_for_texts(
    tmp_path: Path, members: list[dict[str, Any]], captions: int | None, expected: bool
) -> None:
    shard = write_tar(tmp_path / "a.tar", [(f"{n}.json", json.dumps(one).encode()) for n, one in enumerate(members)])
    reader = open_reader(str(shard), required=["text"])
    assert configured._has_positives(reader, "text", captions) == expected


@pytest.mark.slow
def test_two_processes_learn_what_one_does(
    write_config: WriteConfig, pairs: dict[str, Path], tiny_model: Path, tmp_path: Path
) -> None:
    path = config_of(write_config, "text", pairs["text"], tiny_model, evaluation={})
    of_side = {
        "text": "",
        "image": f"model.towers=image loss.text_text=0 loss.image_image=1 data.train={pairs['image']}",
    }
    runs = {side: train(load_config(path, [f"run={tmp_path}/{side}", *of_side[side].split()])) for side in of_side}
    cases = [("text", 0), ("text", 3), ("image", 2)]
    overrides = [f"run={tmp_path}/{side}-{stage} engine.zero_stage={stage} {of_side[side]}" for side, stage in cases]
    start_training(path, 2, tmp_path, *overrides)
    for side, stage in cases:
        assert_same_run(runs[side], tmp_path / f"{side}-{stage}")
