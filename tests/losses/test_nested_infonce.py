"""The trainer's loss against losses/reference.py, in one process; tests/test_distributed.py has several."""

import itertools
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from mmrl.errors import InputError
from mmrl.losses import reference, sweep
from mmrl.losses.nested_infonce import InfoNCEOptions, nested_info_nce

pytestmark = pytest.mark.usefixtures("narrow_products")

GROUPS = torch.tensor([3, -1, 3, 7, -1, 7, 7, 1, 2])
TEXT_GROUPS = torch.tensor([3, 3, -1, 7, 5, -1, 7, 1, 1])
OPTIONS = [
    InfoNCEOptions(same_group=same_group, label_smoothing=smoothing, distillation=distillation)  # pyright: ignore[reportArgumentType]
    for same_group, smoothing, distillation in itertools.product(("mask", "positive"), (0.0, 0.1), (0.0, 0.7))
]
CLOSE: dict[torch.dtype, dict[str, Any]] = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-12},
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
}


def embeddings(dtype: torch.dtype, rows: int = 9, width: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    pair = [torch.randn(rows, width, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)]
    return pair[0].requires_grad_(), pair[1].requires_grad_()


def of_reference(
    image_BD: torch.Tensor,
    text_BD: torch.Tensor,
    scale: torch.Tensor,
    dtype: torch.dtype,
    *arguments: Any,
    **named: Any,
) -> tuple[torch.Tensor, dict[int, torch.Tensor], tuple[torch.Tensor, ...]]:
    """Value, values by dim and gradients of the plain formula, computed in `dtype` from the same numbers."""
    given = [x.detach().to(dtype).requires_grad_() for x in (image_BD, text_BD, scale)]
    total, by_dim = reference.nested_info_nce(given[0], given[1], given[2], *arguments, **named)
    return total.detach(), {d: x.detach() for d, x in by_dim.items()}, torch.autograd.grad(total, given)


@pytest.fixture(params=[None, (4, 2), (3, 5)], ids=["one tile", "4x2 tiles", "3x5 tiles"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with tiles so small that these nine rows fill many, the last ones in part."""
    if request.param is not None:
        monkeypatch.setattr(sweep, "tile_shape", lambda *_: request.param)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("groups", [None, GROUPS, (GROUPS, TEXT_GROUPS)], ids=["-", "groups", "pair"])
@pytest.mark.parametrize("scale", [torch.tensor(14.0), torch.tensor([100.0]), torch.tensor([1.0, 20.0, 50.0])])
@pytest.mark.parametrize("weights", [None, [1.0, 0.5, 0.0]])
def test_value_and_gradients_are_the_plain_formulas(
    dtype: torch.dtype, groups: reference.Groups | None, scale: torch.Tensor, weights: list[float] | None
) -> None:
    dims = [3, 8, 16]
    image_BD, text_BD = embeddings(dtype)
    scale = scale.to(dtype).requires_grad_()
    loss = nested_info_nce(image_BD, text_BD, scale, dims, weights, groups)
    grads = torch.autograd.grad(loss.total, [image_BD, text_BD, scale])
    # The truth is computed in float64 from the same, already rounded, numbers.
    total, by_dim, true_grads = of_reference(image_BD, text_BD, scale, torch.float64, dims, weights, groups)
    torch.testing.assert_close(loss.total.double(), total, **CLOSE[dtype])
    for dim in dims:
        torch.testing.assert_close(loss.by_dim[dim].double(), by_dim[dim], **CLOSE[dtype])
    for grad, true_grad in zip(grads, true_grads, strict=True):
        torch.testing.assert_close(grad.double(), true_grad, **CLOSE[dtype])


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("groups", [None, GROUPS, (GROUPS, TEXT_GROUPS)], ids=["-", "groups", "pair"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("scale", [10.0, 100.0])
def test_the_options_are_the_plain_formulas(
    options: InfoNCEOptions, groups: reference.Groups | None, scale: float
) -> None:
    dims, weights = [3, 8, 16], [0.5, 1.0, 2.0]
    image_BD, text_BD = embeddings(torch.float64)
    scale_1 = torch.tensor([scale], dtype=torch.float64, requires_grad=True)
    loss = nested_info_nce(image_BD, text_BD, scale_1, dims, weights, groups, options)
    grads = torch.autograd.grad(loss.total, [image_BD, text_BD, scale_1])
    total, by_dim, true_grads = of_reference(
        image_BD, text_BD, scale_1, torch.float64, dims, weights, groups, **options.model_dump(exclude={"kernels"})
    )
    torch.testing.assert_close(loss.total, total, **CLOSE[torch.float64])
    torch.testing.assert_close(loss.by_dim, by_dim, **CLOSE[torch.float64])
    torch.testing.assert_close(grads, true_grads, **CLOSE[torch.float64])


@pytest.mark.parametrize("rows", [1, 2, 65, 130, 300])
@pytest.mark.parametrize("dims", [[1], [16], [1, 2, 3], [5, 16], [7, 11, 13]])
def test_any_size_and_any_dims(rows: int, dims: list[int]) -> None:
    image_BD, text_BD = embeddings(torch.float64, rows)
    scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    loss = nested_info_nce(image_BD, text_BD, scale, dims)
    grads = torch.autograd.grad(loss.total, [image_BD, text_BD, scale])
    total, _, true_grads = of_reference(image_BD, text_BD, scale, torch.float64, dims)
    torch.testing.assert_close(loss.total, total, **CLOSE[torch.float64])
    torch.testing.assert_close(grads, true_grads, **CLOSE[torch.float64])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scale", [14.0, 100.0])
@pytest.mark.parametrize("rows", [9, 200])
def test_errs_no_more_than_the_plain_formula_in_the_same_precision(dtype: torch.dtype, scale: float, rows: int) -> None:
    dims = [4, 16, 32]
    image_BD, text_BD = embeddings(dtype, rows, 32)
    scale_1 = torch.tensor([scale], requires_grad=True)
    loss = nested_info_nce(image_BD, text_BD, scale_1, dims)
    grads = torch.autograd.grad(loss.total, [image_BD, text_BD, scale_1])
    true_total, _, true_grads = of_reference(image_BD, text_BD, scale_1, torch.float64, dims)
    plain_total, _, plain_grads = of_reference(image_BD, text_BD, scale_1, dtype, dims)

    def error(value: torch.Tensor, truth: torch.Tensor) -> float:
        return (value.double() - truth).abs().max().item()

    assert loss.total.dtype == torch.float32
    assert [grad.dtype for grad in grads] == [dtype, dtype, torch.float32]
    # Beside the plain path's own error, one rounding of the result to its type, and float32's of the sums.
    assert error(loss.total, true_total) <= error(plain_total, true_total) + 1e-6 * true_total
    for grad, plain, truth in zip(grads, plain_grads, true_grads, strict=True):
        rounding = torch.finfo(grad.dtype).eps * truth.abs().max() + 1e-6
        assert error(grad, truth) <= error(plain, truth) + rounding


@pytest.mark.usefixtures("wide_products")
def test_bfloat16_on_a_processor_without_its_products_errs_no_more_either() -> None:
    test_errs_no_more_than_the_plain_formula_in_the_same_precision(torch.bfloat16, 30.0, 200)


def test_gradcheck() -> None:
    image_BD, text_BD = embeddings(torch.float64, rows=5, width=6)
    scale_K = torch.tensor([3.0, 9.0], dtype=torch.float64, requires_grad=True)

    def total(image_BD: torch.Tensor, text_BD: torch.Tensor, scale_K: torch.Tensor) -> torch.Tensor:
        return nested_info_nce(image_BD, text_BD, scale_K, [2, 5], [1, 2], GROUPS[:5]).total

    assert gradcheck(total, (image_BD, text_BD, scale_K))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_anti_aligned_pairs_at_the_largest_scale_stay_exact(dtype: torch.dtype) -> None:
    """All logits of a row are ±100: its positive's exponential vanishes beside any shift that all rows share."""
    image_BD, _ = embeddings(dtype, rows=6)
    text_BD = -image_BD.detach().clone().requires_grad_()
    scale = torch.tensor(100.0, requires_grad=True)
    loss = nested_info_nce(image_BD, text_BD, scale, [8, 16])
    grads = torch.autograd.grad(loss.total, [image_BD, text_BD, scale])
    total, _, true_grads = of_reference(image_BD, text_BD, scale, torch.float64, [8, 16])
    torch.testing.assert_close(loss.total.double(), total, rtol=1e-5, atol=0)
    for grad, truth in zip(grads, true_grads, strict=True):
        bound = 2 * torch.finfo(grad.dtype).eps if grad.dtype == torch.bfloat16 else 1e-5
        assert (grad.double() - truth).abs().max() <= bound * truth.abs().max().clamp_min(1)


@pytest.mark.parametrize("scale", [1.0, 60.0, 100.0, 150.0])
def test_every_range_of_logits_is_exact(scale: float) -> None:
    """Rows whose largest logit lies anywhere from -scale to scale, where one shift for all may not do."""
    generator = torch.Generator().manual_seed(1)
    direction_D = torch.nn.functional.normalize(torch.randn(16, generator=generator, dtype=torch.float64), dim=0)
    side = torch.linspace(-1, 1, 12, dtype=torch.float64)[:, None] * direction_D
    image_BD = (side + 1e-3 * torch.randn(12, 16, generator=generator, dtype=torch.float64)).float().requires_grad_()
    text_BD = (direction_D + 1e-2 * torch.randn(12, 16, generator=generator)).float().requires_grad_()
    factor = torch.tensor(scale, requires_grad=True)
    loss = nested_info_nce(image_BD, text_BD, factor, [4, 16])
    grads = torch.autograd.grad(loss.total, [image_BD, text_BD, factor])
    total, _, true_grads = of_reference(image_BD, text_BD, factor, torch.float64, [4, 16])
    plain_total, _, plain_grads = of_reference(image_BD, text_BD, factor, torch.float32, [4, 16])
    assert abs(loss.total.item() - total) <= abs(plain_total - total) + 1e-6 * total
    for grad, plain, truth in zip(grads, plain_grads, true_grads, strict=True):
        plain_error = (plain - truth).abs().max()
        assert (grad - truth).abs().max() <= 2 * plain_error + 2e-6 * truth.abs().max()


def test_a_scale_gone_wrong_makes_the_loss_nan_as_an_embedding_does() -> None:
    image_BD, text_BD = torch.randn(2, 9, 16)
    assert nested_info_nce(image_BD, text_BD, torch.tensor(torch.nan), [4, 16]).total.isnan()


def test_zero_vectors_stay_finite() -> None:
    image_BD, text_BD = embeddings(torch.float32)
    with torch.no_grad():
        image_BD[2] = 0
        text_BD[5, :3] = 0
    loss = nested_info_nce(image_BD, text_BD, 20.0, [3, 16])
    grads = torch.autograd.grad(loss.total, [image_BD, text_BD])
    total, _, true_grads = of_reference(image_BD, text_BD, torch.tensor(20.0), torch.float64, [3, 16])
    torch.testing.assert_close(loss.total.double(), total, **CLOSE[torch.float32])
    for grad, truth in zip(grads, true_grads, strict=False):
        assert grad.isfinite().all()
        # Of a zero vector it is 1e12 times a sum: large, as F.normalize's is, and right.
        torch.testing.assert_close(grad.double(), truth, rtol=1e-4, atol=1e-5)


def test_a_norm_at_its_lower_bound_is_a_constant() -> None:
    image_BD, text_BD = embeddings(torch.float64)
    with torch.no_grad():
        image_BD[2] *= 1e-13
    scale = torch.tensor(20.0, dtype=torch.float64, requires_grad=True)
    loss = nested_info_nce(image_BD, text_BD, scale, [3, 16])
    grads = torch.autograd.grad(loss.total, [image_BD, text_BD, scale])
    total, _, true_grads = of_reference(image_BD, text_BD, scale, torch.float64, [3, 16])
    torch.testing.assert_close(loss.total, total, **CLOSE[torch.float64])
    torch.testing.assert_close(grads, true_grads, **CLOSE[torch.float64])


def test_a_masked_pair_is_no_rows_largest_logit() -> None:
    """Own pairs that point away from each other, beside a masked pair that is equal: its logit would be the shift."""
    image_BD, _ = embeddings(torch.float32, rows=2)
    text_BD = -image_BD.detach().flip(0) * torch.tensor([[1.0], [-1.0]])
    groups = torch.zeros(2, dtype=torch.int64)
    loss = nested_info_nce(image_BD, text_BD, 300.0, [16], groups=groups)
    total, _, _ = of_reference(
        image_BD, text_BD.requires_grad_(), torch.tensor(300.0), torch.float64, [16], None, groups
    )
    torch.testing.assert_close(loss.total.double(), total, rtol=1e-5, atol=1e-5)


def test_negative_groups_are_none() -> None:
    image_BD, text_BD = embeddings(torch.float64)
    groups = torch.tensor([-3, -2, -1, 4, 4, -2, -2, 0, -3])
    loss = nested_info_nce(image_BD, text_BD, 20.0, [4, 16], groups=groups)
    alike = nested_info_nce(image_BD, text_BD, 20.0, [4, 16], groups=groups.clamp(min=-1))
    total, _, _ = of_reference(image_BD, text_BD, torch.tensor(20.0), torch.float64, [4, 16], None, groups)
    torch.testing.assert_close(loss.total, total)
    assert torch.equal(loss.total, alike.total)


def test_the_value_does_not_drown_in_large_logits() -> None:
    """Nearly perfect pairs at the largest scale: logits of a hundred whose differences are the loss."""
    image_BD, noise_BD = embeddings(torch.float32, rows=256, width=32)
    text_BD = (image_BD + 0.3 * noise_BD).detach().requires_grad_()
    loss = nested_info_nce(image_BD, text_BD, 100.0, [16, 32])
    total, _, _ = of_reference(image_BD, text_BD, torch.tensor(100.0), torch.float64, [16, 32])
    assert loss.total.item() == pytest.approx(total.item(), abs=3e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_around_it_changes_nothing(dtype: torch.dtype) -> None:
    image_BD, text_BD = embeddings(torch.float32)
    with torch.autocast("cpu", dtype):
        inside = nested_info_nce(image_BD, text_BD, 20.0, [4, 16])
        grads = torch.autograd.grad(inside.total, [image_BD, text_BD])
    outside = nested_info_nce(image_BD, text_BD, 20.0, [4, 16])
    assert torch.equal(inside.total, outside.total)
    assert all(map(torch.equal, grads, torch.autograd.grad(outside.total, [image_BD, text_BD])))


def test_columns_beyond_the_largest_dim_have_no_gradient() -> None:
    image_BD, text_BD = embeddings(torch.float32)
    loss = nested_info_nce(image_BD, text_BD, 20.0, [4, 10])
    for grad in torch.autograd.grad(loss.total, [image_BD, text_BD]):
        assert grad[:, :10].abs().min() > 0
        assert (grad[:, 10:] == 0).all()


def test_a_factor_before_the_loss_reaches_the_gradients() -> None:
    image_BD, text_BD = embeddings(torch.float64)
    once = torch.autograd.grad(nested_info_nce(image_BD, text_BD, 5.0, [4, 16]).total, [image_BD, text_BD])
    thrice = torch.autograd.grad(3 * nested_info_nce(image_BD, text_BD, 5.0, [4, 16]).total, [image_BD, text_BD])
    torch.testing.assert_close([3 * grad for grad in once], list(thrice))


def test_one_group_masks_all_negatives() -> None:
    image_BD, text_BD = embeddings(torch.float32)
    loss = nested_info_nce(image_BD, text_BD, 10.0, [16], groups=torch.zeros(9, dtype=torch.int64))
    assert loss.total.item() == pytest.approx(0, abs=1e-6)


def test_dims_in_any_order_keep_their_weights_and_scales() -> None:
    image_BD, text_BD = embeddings(torch.float64)
    one = nested_info_nce(image_BD, text_BD, torch.tensor([5.0, 9.0]), [4, 16], [1, 3])
    other = nested_info_nce(image_BD, text_BD, torch.tensor([9.0, 5.0]), [16, 4], [3, 1])
    torch.testing.assert_close(one.total, other.total)
    assert list(other.by_dim) == [4, 16]


def test_what_is_saved_grows_linearly_with_the_batch() -> None:
    """Also the tiles: past one tile, twice the batch takes the same buffers."""

    def saved(rows: int) -> int:
        image_BD, text_BD = embeddings(torch.float32, rows)
        sizes: list[int] = []

        def pack(x: torch.Tensor) -> torch.Tensor:
            sizes.append(x.numel() * x.element_size())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            nested_info_nce(image_BD, text_BD, 10.0, [4, 8, 16])
        return sum(sizes)

    assert saved(2048) <= 2.2 * saved(1024)


class Held(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, and remembers the most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._uses: Counter[int] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        for result in results if isinstance(results, tuple | list) else (results,):
            if isinstance(result, torch.Tensor):
                storage = result.untyped_storage()
                self._uses[storage.data_ptr()] += 1
                if self._uses[storage.data_ptr()] == 1:
                    self.now += storage.nbytes()
                    self.most = max(self.most, self.now)
                weakref.finalize(result, self._release, storage.data_ptr(), storage.nbytes())
        return results

    def _release(self, pointer: int, size: int) -> None:
        self._uses[pointer] -= 1
        if not self._uses[pointer]:
            self.now -= size


def test_temporaries_grow_linearly_with_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "_cache_bytes", lambda: 1 << 20)  # the tiles stay small beside the embeddings

    def peak(rows: int) -> int:
        image_BD, text_BD = embeddings(torch.float32, rows)
        with Held() as held:
            torch.autograd.grad(nested_info_nce(image_BD, text_BD, 10.0, [4, 8, 16]).total, [image_BD, text_BD])
        return held.most

    assert peak(1024) >= 2 * 1024 * 16 * 4  # it sees the gradients at least
    assert peak(2048) <= 2.2 * peak(1024)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"dims": [32]}, "dims: 32 is out of range; this embedding has dims 1 to 16"),
        ({"dims": [0]}, "0 is out of range"),
        ({"dims": [4, 4]}, "4 is given twice"),
        ({"dims": []}, "dims: empty"),
        ({"text_BD": torch.ones(8, 16)}, r"shapes \(9, 16\) and \(8, 16\)"),
        ({"text_BD": torch.ones(9, 16, dtype=torch.int64)}, "both must be of one float type"),
        ({"image_BD": torch.ones(0, 16), "text_BD": torch.ones(0, 16)}, "at least one pair"),
        ({"logit_scale": torch.ones(3)}, "logit_scale: 3 values for 1 dims"),
        ({"logit_scale": 0.0}, "logit_scale: 0.0; the multiplier must be positive and finite"),
        ({"logit_scale": -100.0}, "logit_scale: -100.0; the multiplier must be positive"),
        ({"weights": [0.0]}, "not all zero"),
        ({"weights": [-1.0]}, "not negative"),
        ({"weights": [1.0, 1.0]}, "2 given for 1 dims"),
        ({"groups": torch.zeros(4, dtype=torch.int64)}, r"groups: torch.int64 of shape \(4,\); want int64 \(9,\)"),
        ({"groups": torch.zeros(9)}, "groups: torch.float32"),
        ({"groups": [1] * 9}, "groups: a list; want int64"),
        ({"groups": (GROUPS, GROUPS, GROUPS)}, "groups: a tuple of 3; want int64"),
        ({"groups": (None, GROUPS)}, "groups: a NoneType; want int64"),
        (
            {"text_BD": torch.full((9, 16), torch.nan), "check_finite": True},
            "0 and 9 of 9 rows here hold NaN or infinity",
        ),
    ],
)
def test_unfit_arguments_are_named(arguments: dict[str, object], says: str) -> None:
    image_BD, text_BD = embeddings(torch.float32)
    good = {"image_BD": image_BD, "text_BD": text_BD, "logit_scale": 1.0, "dims": [16]}
    with pytest.raises(InputError, match=says):
        nested_info_nce(**{**good, **arguments})  # pyright: ignore[reportArgumentType]
