"""Several gloo processes against one: gather, loss and gradients under data-parallel averaging."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from mmrl import distributed
from mmrl.losses import reference
from mmrl.losses.nested_infonce import nested_info_nce

DIMS, WEIGHTS = [2, 5, 8], [1.0, 0.5, 2.0]
GROUPS = torch.tensor([4, 4, -1, 2, 4, -1, 2, 9, 9, 9, 1, -1])


def run_in_world(size: int, work: Callable[[Path], None], folder: Path) -> None:
    """Runs work(folder) on `size` processes."""
    torch.multiprocessing.start_processes(  # pyright: ignore[reportPrivateImportUsage]
        _child, (size, work, folder), nprocs=size, start_method="fork"
    )


def _child(rank: int, size: int, work: Callable[[Path], None], folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    if dist.is_initialized():  # inherited, where another test of this process has trained
        dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    try:
        work(folder)
    finally:
        dist.destroy_process_group()


def _towers() -> tuple[torch.nn.Linear, torch.nn.Linear, torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    image, text = torch.nn.Linear(6, 8).double(), torch.nn.Linear(6, 8).double()
    return image, text, torch.randn(12, 6).double(), torch.randn(12, 6).double()


def _loss_of_my_rows(folder: Path) -> None:
    world = distributed.world()
    image, text, x, y = _towers()
    scale = torch.tensor([20.0], dtype=torch.float64, requires_grad=True)
    rows = slice(world.rank * 12 // world.size, (world.rank + 1) * 12 // world.size)
    loss = nested_info_nce(image(x[rows]), text(y[rows]), scale, DIMS, WEIGHTS, GROUPS[rows])
    loss.total.backward()
    grads = [parameter.grad for parameter in (*image.parameters(), *text.parameters(), scale)]
    averaged = [distributed.mean(grad) for grad in grads if grad is not None]
    torch.save((loss.total.detach(), loss.by_dim, averaged), folder / f"rank{world.rank}.pt")


@pytest.mark.parametrize("size", [2, 3])
def test_loss_and_averaged_gradients_equal_one_process(size: int, tmp_path: Path) -> None:
    run_in_world(size, _loss_of_my_rows, tmp_path)
    image, text, x, y = _towers()
    scale = torch.tensor([20.0], dtype=torch.float64, requires_grad=True)
    total, by_dim = reference.nested_info_nce(image(x), text(y), scale, DIMS, WEIGHTS, GROUPS)
    total.backward()
    expected = [parameter.grad for parameter in (*image.parameters(), *text.parameters(), scale)]
    for rank in range(size):
        got_total, got_by_dim, grads = torch.load(tmp_path / f"rank{rank}.pt")
        torch.testing.assert_close(got_total, total.detach())
        torch.testing.assert_close(got_by_dim, {dim: value.detach() for dim, value in by_dim.items()})
        torch.testing.assert_close(grads, expected)


def test_a_world_of_one_needs_no_process_group() -> None:
    x = torch.randn(3, 2, requires_grad=True)
    assert distributed.gather(x) is x
    assert distributed.gather_objects("a") == ["a"]
    assert distributed.from_main(5) == 5
    assert torch.equal(distributed.mean(x), x)
