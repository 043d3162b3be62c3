"""N gloo processes give the loss and gradients of one process; helpers for a world of one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
import torch
import torch.multiprocessing
from helpers import reference
from helpers.worlds import run_in_world
from torch.nn import functional as F

from mmrl.distributed import comm
from mmrl.losses.nested_infonce import InfoNCEOptions, nested_info_nce
from mmrl.losses.nested_sigmoid import nested_sigmoid
from mmrl.losses.rotated import rotated_nested_info_nce
from mmrl.losses.terms import HardNegatives, SecondMembers, Teacher

DIMS, WEIGHTS = [2, 5, 8], [1.0, 0.5, 2.0]
# Two keys, with rows of different ranks that are equal in one column, in both, or in none.
GROUPS = torch.tensor([[4, 4, -1, 2, 4, -1, 2, 9, 9, 9, 1, -1], [6, -1, 7, 6, 6, 7, -1, 8, 3, 8, 7, 3]]).T


class LossInputs(NamedTuple):
    """A loss's inputs: the rows of one rank, or of all."""

    image: torch.Tensor
    text: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor
    groups: torch.Tensor


Result = tuple[torch.Tensor, dict[int, torch.Tensor]]
# (mmrl's loss, the plain formula).
LossPair = tuple[Callable[[LossInputs], Result], Callable[[LossInputs], Result]]


def _formula(options: InfoNCEOptions) -> dict[str, Any]:
    return options.model_dump(include={"same_group", "label_smoothing", "distillation"})


def _more_sides(given: LossInputs) -> dict[str, torch.Tensor]:
    """Second members, two hard negatives of each pair, and a teacher, all of them functions of a pair's own row."""
    one = torch.arange(64, dtype=torch.float64).reshape(8, 8).sin()
    negatives = {
        f"negative_{name}": torch.stack([x @ one, x @ one.T], 1).reshape(-1, 8)
        for name, x in (("image", given.image), ("text", given.text))
    }
    keys = (given.groups[:, None] + torch.tensor([100, 3])[:, None]).reshape(-1, 2)
    return negatives | {
        "second_image": given.image @ one,
        "second_text": given.text @ one,
        "negative_keys": keys,
        "valid": given.groups[:, :1].expand(-1, 2).reshape(-1) % 3 > 0,
        "image_bT": F.normalize(given.image.detach() @ one[:, :3], dim=1),
        "text_bT": F.normalize(given.text.detach() @ one[:, :3], dim=1),
    }


def _terms(has_teacher: bool) -> LossPair:
    """All terms at once, with hard negatives or with a teacher."""
    options = InfoNCEOptions(image_image=0.5, text_text=0.25, label_smoothing=0.1)

    def ours(given: LossInputs) -> Result:
        x = _more_sides(given)
        negatives = HardNegatives(x["negative_image"], x["negative_text"], x["negative_keys"], x["valid"], ~x["valid"])
        loss = nested_info_nce(
            given.image, given.text, given.scale, DIMS, WEIGHTS, given.groups, options,
            second=SecondMembers(x["second_image"], x["second_text"], given.groups),
            negatives=None if has_teacher else negatives,
            teacher=Teacher(x["image_bT"], x["text_bT"], 9.0, 0.7) if has_teacher else None,
        )  # fmt: skip
        return loss.total + 0 * given.bias.sum(), loss.by_dim

    def plain(given: LossInputs) -> Result:
        x, keys, smoothing = _more_sides(given), (given.groups, given.groups), 0.1
        rows = x["negative_image"][x["valid"]], x["negative_keys"][x["valid"]]
        columns = x["negative_text"][~x["valid"]], x["negative_keys"][~x["valid"]]
        main, by_dim = reference.nested_term(
            given.image, given.text, given.scale, DIMS, WEIGHTS, keys, smoothing,
            negative_rows=None if has_teacher else rows,
            negative_columns=None if has_teacher else columns,
            teacher=(x["image_bT"], x["text_bT"], 9.0, 0.7) if has_teacher else None,
        )  # fmt: skip
        fixed = given.scale.detach()
        images, _ = reference.nested_term(given.image, x["second_image"], fixed, DIMS, WEIGHTS, keys, smoothing)
        texts, _ = reference.nested_term(given.text, x["second_text"], fixed, DIMS, WEIGHTS, keys, smoothing)
        return main + 0.5 * images + 0.25 * texts + 0 * given.bias.sum(), by_dim

    return ours, plain


def _infonce(options: InfoNCEOptions) -> LossPair:
    def ours(given: LossInputs) -> Result:
        loss = nested_info_nce(given.image, given.text, given.scale, DIMS, WEIGHTS, given.groups, options)
        return loss.total + 0 * given.bias.sum(), loss.by_dim

    def plain(given: LossInputs) -> Result:
        total, by_dim = reference.nested_info_nce(
            given.image, given.text, given.scale, DIMS, WEIGHTS, given.groups, **_formula(options)
        )
        return total + 0 * given.bias.sum(), by_dim

    return ours, plain


def _sigmoid(same_group: Literal["mask", "positive"]) -> LossPair:
    def ours(given: LossInputs) -> Result:
        image, text, scale, bias, groups = given
        loss = nested_sigmoid(image, text, scale, bias, DIMS, WEIGHTS, groups, same_group)
        return loss.total, loss.by_dim

    def plain(given: LossInputs) -> Result:
        image, text, scale, bias, groups = given
        return reference.nested_sigmoid(image, text, scale, bias, DIMS, WEIGHTS, groups, same_group)

    return ours, plain


def _rotated(options: InfoNCEOptions) -> LossPair:
    """The rotation is a function of `bias`, so that the comparison of gradients covers it."""
    generator = torch.Generator().manual_seed(5)
    upper_DD = torch.randn(8, 8, generator=generator, dtype=torch.float64).triu(1)

    def matrix(bias: torch.Tensor) -> torch.Tensor:
        return torch.linalg.matrix_exp(bias * (upper_DD - upper_DD.T))

    def ours(given: LossInputs) -> Result:
        matrix_DD = matrix(given.bias)
        loss = rotated_nested_info_nce(
            given.image, given.text, given.scale, DIMS, lambda x: x @ matrix_DD.T, 1.0, WEIGHTS, given.groups, options
        )
        return loss.total, loss.by_dim

    def plain(given: LossInputs) -> Result:
        full, prefixes, by_dim = reference.rotated_nested_info_nce(
            given.image, given.text, given.scale, DIMS, matrix(given.bias), WEIGHTS, given.groups, **_formula(options)
        )
        return full + prefixes, by_dim

    return ours, plain


LOSSES = {
    "rotated": _rotated(InfoNCEOptions(distillation=0.5)),
    "plain": _infonce(InfoNCEOptions()),
    "all options": _infonce(InfoNCEOptions(same_group="positive", label_smoothing=0.1, distillation=0.5)),
    "masked options": _infonce(InfoNCEOptions(label_smoothing=0.1, distillation=0.5)),
    "terms, hard negatives": _terms(has_teacher=False),
    "terms, teacher": _terms(has_teacher=True),
    "sigmoid": _sigmoid("mask"),
    "sigmoid, positives": _sigmoid("positive"),
}


def _parameters() -> tuple[torch.nn.Linear, torch.nn.Linear, torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    image, text = torch.nn.Linear(6, 8).double(), torch.nn.Linear(6, 8).double()
    scale = torch.tensor([90.0], dtype=torch.float64, requires_grad=True)
    return image, text, scale, torch.tensor([-5.0], dtype=torch.float64, requires_grad=True)


def _inputs() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(4)
    return torch.randn(12, 6).double(), torch.randn(12, 6).double()


def _save_losses_of_local_rows(folder: Path) -> None:
    world, (x, y) = comm.world(), _inputs()
    rows = comm.local_rows(12 // world.size)
    results = {}
    for name, (ours, _) in LOSSES.items():
        image, text, scale, bias = _parameters()
        total, by_dim = ours(LossInputs(image(x[rows]), text(y[rows]), scale, bias, GROUPS[rows]))
        total.backward()
        grads = [parameter.grad for parameter in (*image.parameters(), *text.parameters(), scale, bias)]
        averaged = [comm.all_reduce_sum(grad) / world.size for grad in grads if grad is not None]
        results[name] = total.detach(), by_dim, averaged
    torch.save(results, folder / f"rank{world.rank}.pt")


@pytest.mark.parametrize("size", [2, 3])
def test_losses_and_averaged_gradients_equal_one_process(size: int, tmp_path: Path) -> None:
    run_in_world(size, _save_losses_of_local_rows, tmp_path, "forkserver")
    (x, y), results = _inputs(), [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(size)]
    for name, (_, plain) in LOSSES.items():
        image, text, scale, bias = _parameters()
        total, by_dim = plain(LossInputs(image(x), text(y), scale, bias, GROUPS))
        total.backward()
        expected = [parameter.grad for parameter in (*image.parameters(), *text.parameters(), scale, bias)]
        for result in results:
            got_total, got_by_dim, grads = result[name]
            torch.testing.assert_close(got_total, total.detach())
            torch.testing.assert_close(got_by_dim, {dim: value.detach() for dim, value in by_dim.items()})
            torch.testing.assert_close(grads, expected)


def _loss_under_ddp(folder: Path) -> None:
    world, (x, y) = comm.world(), _inputs()
    image, text, scale, bias = _parameters()
    towers = torch.nn.ModuleList([image, text])

    class Both(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.towers = towers

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return image(x), text(y)

    model, rows = torch.nn.parallel.DistributedDataParallel(Both()), comm.local_rows(12 // world.size)
    total, _ = LOSSES["plain"][0](LossInputs(*model(x[rows], y[rows]), scale=scale, bias=bias, groups=GROUPS[rows]))
    total.backward()
    if world.is_rank_0:
        torch.save([parameter.grad for parameter in towers.parameters()], folder / "grads.pt")


def test_gradients_under_ddp_equal_one_process(tmp_path: Path) -> None:
    run_in_world(2, _loss_under_ddp, tmp_path, "forkserver")
    image, text, scale, bias = _parameters()
    x, y = _inputs()
    LOSSES["plain"][1](LossInputs(image(x), text(y), scale, bias, GROUPS))[0].backward()
    expected = [parameter.grad for parameter in (*image.parameters(), *text.parameters())]
    torch.testing.assert_close(torch.load(tmp_path / "grads.pt"), expected)


def _count_collectives(folder: Path) -> None:
    counts = {}
    terms = {
        "options": InfoNCEOptions(image_image=1, text_text=1),
        "second": SecondMembers(torch.randn(6, 8), torch.randn(6, 8)),
        "negatives": HardNegatives(torch.randn(12, 8), torch.randn(12, 8)),
    }
    for name, dims, more in (("one dim", [8], {}), ("dims", [1, 2, 3, 4, 5, 8], {}), ("terms", [4, 8], terms)):
        image = torch.randn(6, 8, requires_grad=True)
        text = torch.randn(6, 8, requires_grad=True)
        with torch.profiler.profile() as profile:
            nested_info_nce(image, text, 20.0, dims, **more).total.backward()
        counts[name] = sorted(event.name for event in profile.events() or [] if event.name.startswith("gloo:"))
    torch.save(counts, folder / f"rank{comm.world().rank}.pt")


def test_the_number_of_collectives_does_not_depend_on_dims_and_terms(tmp_path: Path) -> None:
    run_in_world(2, _count_collectives, tmp_path, "forkserver")
    counts = torch.load(tmp_path / "rank0.pt")
    assert counts["one dim"] == counts["dims"] == counts["terms"]
    # All-gather of the texts, reduce-scatter of their gradient, all-reduce of the column sums and of the loss.
    assert len(counts["one dim"]) == 4


def test_one_process_needs_no_process_group() -> None:
    x = torch.randn(3, 2, requires_grad=True)
    assert comm.all_gather_rows(x) is x
    assert comm.all_gather_objects("a") == ["a"]
    assert comm.broadcast_object(5) == 5
    assert torch.equal(comm.all_reduce_sum(x), x)


def _work_alone_on_rank_0(folder: Path) -> None:
    rows_bD = torch.full((2, 3), float(comm.world().rank))
    if comm.world().is_rank_0:
        with comm.single_process():  # rank 1 takes no part, so a collective would never return
            assert comm.world().size == 1
            assert torch.equal(comm.all_gather_rows(rows_bD), rows_bD)
            assert comm.broadcast_object("mine") == "mine"
    assert comm.world().size == 2
    assert comm.all_gather_rows(rows_bD).shape == (4, 3)


def test_single_process_makes_collectives_local(tmp_path: Path) -> None:
    run_in_world(2, _work_alone_on_rank_0, tmp_path)
