"""What a GPU run adds around its steps: batches loaded ahead, and few waits of the host."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.host_syncs import host_syncs
from rich.console import Console

from mmrl.config import load_config
from mmrl.data.sources import DataConfig, open_reader
from mmrl.data.stream import Stream
from mmrl.distributed import comm
from mmrl.engine.timing import StepTimer
from mmrl.evaluate import sets
from mmrl.images.image_spec import ImageSpec
from mmrl.losses import nested_infonce, sweep, terms
from mmrl.train.feed import BatchFeed
from mmrl.train.preflight import prepare
from mmrl.train.trainer import Trainer

SPEC = ImageSpec(height=8, width=8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def new_trainer(path: Path, *overrides: str) -> Trainer:
    config = load_config(path, list(overrides))
    return Trainer(config, prepare(config, comm.start()), comm.world(), Console(quiet=True))


def test_batches_that_are_loaded_ahead_do_not_move_the_position(shards: Path) -> None:
    def stream() -> Stream:
        tokens: Callable[[list[str]], torch.Tensor] = lambda texts: torch.zeros(len(texts), 3)  # noqa: E731
        reader = open_reader(str(shards))
        return Stream(reader, 8, seed=1, image=SPEC, text=tokens, config=DataConfig(train=str(shards)), micro_batch=4)

    sent: list[int] = []

    def to_device(rows: torch.Tensor) -> torch.Tensor:
        sent.append(id(rows))
        return rows

    engine: Any = SimpleNamespace(device=torch.device("cpu"), timer=StepTimer(torch.device("cpu")), to_device=to_device)
    plain, ahead = stream(), BatchFeed(stream(), 2, engine)
    ahead._is_ahead = True  # as on a GPU
    expected = plain.forever()
    for step in range(14):  # more than two epochs
        batches = ahead.take()
        assert [one.keys for one in batches] == [next(expected).keys for _ in range(2)]
        if step % 3:
            ahead.load_ahead()
        assert ahead.state_dict() == plain.state_dict()
        assert ahead.epoch == plain.epoch
        # One by one, as DataLoader pinned them: a stack of them would not be in page-locked memory.
        assert {id(one.group) for one in batches} <= set(sent)
    assert plain.epoch == 2


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_evaluation_encodes_in_the_training_precision(
    write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, precision: str, dtype: torch.dtype
) -> None:
    trainer = new_trainer(write_config(), f"engine.precision={precision}")
    seen: list[torch.dtype] = []
    monkeypatch.setattr(sets, "score", lambda embedded, *_, **__: {"rows": embedded.image_ND.dtype})
    model = trainer.encoder.model
    for tower in (model.image, model.text):
        tower.register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    assert trainer.score_sets() == {"val": {"rows": torch.float32}}
    assert set(seen) == {dtype}
    pixels = torch.zeros(1, 3, 32, 32, dtype=torch.uint8, device=trainer.engine.device)
    assert model.encode_image(pixels).dtype == torch.float32, "only within an evaluation"


READS: dict[str, Callable[[torch.Tensor], Any]] = {
    "item": lambda x: x[0].item(),
    "truth": lambda x: bool(x[0] > 0),
    "tolist": lambda x: x.tolist(),
    "numbers": lambda x: x.new_tensor([1.0, 2.0]),
    "mask": lambda x: x[x > 0],
    "list as index": lambda x: x[[0, 1]],
    "nonzero": lambda x: x.nonzero(),
    "solve": lambda x: torch.linalg.solve(torch.eye(2).to(x), x[:2]),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_every_kind_of_wait_is_counted(read: Callable[[torch.Tensor], Any]) -> None:
    x = torch.ones(3, device=comm.world().device)
    with host_syncs(x.device) as found:
        x.mul_(2).add_(x.sum())
        torch.full((1,), 3.0, device=x.device)
    assert not found
    with host_syncs(x.device) as found:
        read(x)
    assert len(found) >= 1


@pytest.mark.parametrize(
    "overrides",
    [
        "train.ema=0.9 model.logit_scale.init=100",
        "train.micro_batch=4 loss.label_smoothing=0.1 loss.distillation=0.5 loss.same_group=positive",
        "nesting.rotation=false loss.name=sigmoid loss.same_group=positive",
        "loss.image_image=0.5 loss.text_text=0.5 loss.label_smoothing=0.1",
        "engine.zero_stage=1",
        "engine.zero_stage=3",
    ],
)
def test_the_host_waits_at_most_twice_in_a_step(
    write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, overrides: str
) -> None:
    """Under ZeRO, DeepSpeed's optimizer adds waits of its own, once its own norm is known."""
    for module in (terms, nested_infonce, sweep):  # what a CPU may read without waiting, a GPU may not
        monkeypatch.setattr(module, "reads_at_once", lambda _: False)
    trainer = new_trainer(write_config(evaluation={}), *overrides.split())
    for _ in range(2):  # constants and optimizer states are made in the first steps
        trainer.step(trainer._feed.take())
    batches, averages = trainer._feed.take(), [trainer.ema, trainer._prefixes and trainer._prefixes._average]
    counters = [average.n_averaged for average in averages if average is not None]
    with host_syncs(trainer.engine.device, counters) as found:
        trainer.step(batches)
    own = [one for one in found if "/deepspeed/" not in one]
    assert 1 <= len(own) <= 2, own
    assert trainer.step_done == 3
