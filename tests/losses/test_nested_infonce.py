"""nested_info_nce against helpers/reference.py in one process; tests/distributed/test_comm.py has several processes."""

import itertools
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from helpers import reference
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from mmrl.errors import InputError
from mmrl.losses import sweep
from mmrl.losses.inputs import count_same_group
from mmrl.losses.nested_infonce import InfoNCEOptions, nested_info_nce

pytestmark = pytest.mark.usefixtures("bf16_grad_products")

GROUPS = torch.tensor([3, -1, 3, 7, -1, 7, 7, 1, 2])
TEXT_GROUPS = torch.tensor([3, 3, -1, 7, 5, -1, 7, 1, 1])
# A second key: with rows that are equal in one column only, in both, and through a third row.
CAPTIONS = torch.tensor([5, 5, 5, -1, 8, 8, 2, 2, -1])
TWO_KEYS = torch.stack([GROUPS, CAPTIONS], 1)
ALL_GROUPS = {
    "-": None,
    "groups": GROUPS,
    "pair": (GROUPS, TEXT_GROUPS),
    "two keys": TWO_KEYS,
    "pair of two keys": (TWO_KEYS, torch.stack([TEXT_GROUPS, CAPTIONS.flip(0)], 1)),
}
with_groups = pytest.mark.parametrize("groups", ALL_GROUPS.values(), ids=ALL_GROUPS)
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


def reference_loss(
    image_BD: torch.Tensor,
    text_BD: torch.Tensor,
    scale: torch.Tensor,
    dtype: torch.dtype,
    *arguments: Any,
    **named: Any,
) -> tuple[torch.Tensor, dict[int, torch.Tensor], tuple[torch.Tensor, ...]]:
    """Value, value of each dim and gradients of the plain formula, computed in `dtype`."""
    given = [x.detach().to(dtype).requires_grad_() for x in (image_BD, text_BD, scale)]
    total, by_dim = reference.nested_info_nce(given[0], given[1], given[2], *arguments, **named)
    return total.detach(), {d: x.detach() for d, x in by_dim.items()}, torch.autograd.grad(total, given)


@pytest.fixture(params=[None, (4, 2), (3, 5)], ids=["one tile", "4x2 tiles", "3x5 tiles"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that nine rows need several, the last ones partly filled."""
    if request.param is not None:
        monkeypatch.setattr(sweep, "tile_shape", lambda *_: request.param)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@with_groups
@pytest.mark.parametrize("scale", [torch.tensor(14.0), torch.tensor([100.0]), torch.tensor([1.0, 20.0, 50.0])])
@pytest.mark.parametrize("weights", [None, [1.0, 0.5, 0.0]])
def test_value_and_gradients_equal_the_plain_formula(
    dtype: torch.dtype, groups: reference.Groups | None, scale: torch.Tensor, weights: list[float] | None
) -> None:
    dims = [3, 8, 16]
    image_BD, text_BD = embeddings(dtype)
    scale = scale.to(dtype).requires_grad_()
    loss = nested_info_nce(image_BD, text_BD, scale, dims, weights, groups)
    grads = torch.autograd.grad(loss.total, [image_BD, text_BD, scale])
    # The expected values are computed in float64 from the same, already rounded, embeddings.
    total, by_dim, true_grads = reference_loss(image_BD, text_BD, scale, torch.float64, dims, weights, groups)
    torch.testing.assert_close(loss.total.double(), total, **CLOSE[dtype])
    for dim in dims:
        torch.testing.assert_close(loss.by_dim[dim].double(), by_dim[dim], **CLOSE[dtype])
    for grad, true_grad in zip(grads, true_grads, strict=True):
        torch.testing.assert_close(grad.double(), true_grad, **CLOSE[dtype])


@pytest.mark.usefixtures("tiles")
@with_groups
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("scale", [10.0, 100.0])
def test_options_equal_the_plain_formula(
    options: InfoNCEOptions, groups: reference.Groups | None, scale: float
) -> None:
    dims, weights = [3, 8, 16], [0.5, 1.0, 2.0]
    image_BD, text_BD = embeddings(torch.float64)
    scale_1 = torch.tensor([scale], dtype=torch.float64, requires_grad=True)
    loss = nested_info_nce(image_BD, text_BD, scale_1, dims, weights, groups, options)
    grads = torch.autograd.grad(loss.total, [image_BD, text_BD, scale_1])
    total, by_dim, true_grads = reference_loss(
        image_BD,
        text_BD,
        scale_1,
        torch.float64,
        dims,
        weights,
        groups,
        **options.model_dump(include={"same_group", "label_smoothing", "distillation"}),
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
    total, _, true_grads = reference_loss(image_BD, text_BD, scale, torch.float64, dims)
    torch.testing.assert_close(loss.total, total, **CLOSE[torch.float64])
    torch.testing.assert_close(grads, true_grads, **CLOSE[torch.float64])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scale", [14.0, 100.0])
@pytest.mark.parametrize("rows", [9, 200])
def test_error_is_at_most_that_of_the_plain_formula_in_the_same_dtype(
    dtype: torch.dtype, scale: float, rows: int
) -> None:
    dims = [4, 16, 32]
    image_BD, text_BD = embeddings(dtype, rows, 32)
    scale_1 = torch.tensor([scale], requires_grad=True)
    loss = nested_info_nce(image_BD, text_BD, scale_1, dims)
    grads = torch.autograd.grad(loss.total, [image_BD, text_BD, scale_1])
    true_total, _, true_grads = reference_loss(image_BD, text_BD, scale_1, torch.float64, dims)
    plain_total, _, plain_grads = reference_loss(image_BD, text_BD, scale_1, dtype, dims)

    def error(value: torch.Tensor, expected: torch.Tensor) -> float:
        return (value.double() - expected).abs().max().item()

    assert loss.total.dtype == torch.float32
    assert [grad.dtype for grad in grads] == [dtype, dtype, torch.float32]
    # Allowed on top of the plain formula's error: rounding the result to its dtype, and float32 rounding of the sums.
    assert error(loss.total, true_total) <= error(plain_total, true_total) + 1e-6 * true_total
    for grad, plain, truth in zip(grads, plain_grads, true_grads, strict=True):
        rounding = torch.finfo(grad.dtype).eps * truth.abs().max() + 1e-6
        assert error(grad, truth) <= error(plain, truth) + rounding


@pytest.mark.usefixtures("fp32_grad_products")
def test_error_bound_holds_for_bfloat16_without_native_bfloat16_products() -> None:
    test_error_is_at_most_that_of_the_plain_formula_in_the_same_dtype(torch.bfloat16, 30.0, 200)


def test_gradcheck() -> None:
    image_BD, text_BD = embeddings(torch.float64, rows=5, width=6)
    scale_K = torch.tensor([3.0, 9.0], dtype=torch.float64, requires_grad=True)

    def total(image_BD: torch.Tensor, text_BD: torch.Tensor, scale_K: torch.Tensor) -> torch.Tensor:
        return nested_info_nce(image_BD, text_BD, scale_K, [2, 5], [1, 2], GROUPS[:5]).total

    assert gradcheck(total, (image_BD, text_BD, scale_K))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_anti_aligned_pairs_at_scale_100_are_exact(dtype: torch.dtype) -> None:
    """Logits are ±100 and the matching pair's is -100: with a shared shift its exponential underflows."""
    image_BD, _ = embeddings(dtype, rows=6)
    text_BD = -image_BD.detach().clone().requires_grad_()
    scale = torch.tensor(100.0, requires_grad=True)
    loss = nested_info_nce(image_BD, text_BD, scale, [8, 16])
    grads = torch.autograd.grad(loss.total, [image_BD, text_BD, scale])
    total, _, true_grads = reference_loss(image_BD, text_BD, scale, torch.float64, [8, 16])
    torch.testing.assert_close(loss.total.double(), total, rtol=1e-5, atol=0)
    for grad, truth in zip(grads, true_grads, strict=True):
        bound = 2 * torch.finfo(grad.dtype).eps if grad.dtype == torch.bfloat16 else 1e-5
        assert (grad.double() - truth).abs().max() <= bound * truth.abs().max().clamp_min(1)


@pytest.mark.parametrize("scale", [1.0, 60.0, 100.0, 150.0])
def test_every_range_of_logits_is_exact(scale: float) -> None:
    """The rows' largest logits range from -scale to scale, so that one shared shift may not suffice."""
    generator = torch.Generator().manual_seed(1)
    direction_D = torch.nn.functional.normalize(torch.randn(16, generator=generator, dtype=torch.float64), dim=0)
    spread = torch.linspace(-1, 1, 12, dtype=torch.float64)[:, None] * direction_D
    image_BD = (spread + 1e-3 * torch.randn(12, 16, generator=generator, dtype=torch.float64)).float().requires_grad_()
    text_BD = (direction_D + 1e-2 * torch.randn(12, 16, generator=generator)).float().requires_grad_()
    scale_tensor = torch.tensor(scale, requires_grad=True)
    loss = nested_info_nce(image_BD, text_BD, scale_tensor, [4, 16])
    grads = torch.autograd.grad(loss.total, [image_BD, text_BD, scale_tensor])
    total, _, true_grads = reference_loss(image_BD, text_BD, scale_tensor, torch.float64, [4, 16])
    plain_total, _, plain_grads = reference_loss(image_BD, text_BD, scale_tensor, torch.float32, [4, 16])
    assert abs(loss.total.item() - total) <= abs(plain_total - total) + 1e-6 * total
    for grad, plain, truth in zip(grads, plain_grads, true_grads, strict=True):
        plain_error = (plain - truth).abs().max()
        assert (grad - truth).abs().max() <= 2 * plain_error + 2e-6 * truth.abs().max()


def test_a_nan_scale_gives_a_nan_loss() -> None:
    image_BD, text_BD = torch.randn(2, 9, 16)
    assert nested_info_nce(image_BD, text_BD, torch.tensor(torch.nan), [4, 16]).total.isnan()


def test_zero_vectors_stay_finite() -> None:
    image_BD, text_BD = embeddings(torch.float32)
    with torch.no_grad():
        image_BD[2] = 0
        text_BD[5, :3] = 0
    loss = nested_info_nce(image_BD, text_BD, 20.0, [3, 16])
    grads = torch.autograd.grad(loss.total, [image_BD, text_BD])
    total, _, true_grads = reference_loss(image_BD, text_BD, torch.tensor(20.0), torch.float64, [3, 16])
    torch.testing.assert_close(loss.total.double(), total, **CLOSE[torch.float32])
    for grad, truth in zip(grads, true_grads, strict=False):
        assert grad.isfinite().all()
        # A zero vector's gradient is 1e12 times a sum: as large as with F.normalize, and correct.
        torch.testing.assert_close(grad.double(), truth, rtol=1e-4, atol=1e-5)


def test_a_norm_at_its_lower_bound_is_a_constant() -> None:
    image_BD, text_BD = embeddings(torch.float64)
    with torch.no_grad():
        image_BD[2] *= 1e-13
    scale = torch.tensor(20.0, dtype=torch.float64, requires_grad=True)
    loss = nested_info_nce(image_BD, text_BD, scale, [3, 16])
    grads = torch.autograd.grad(loss.total, [image_BD, text_BD, scale])
    total, _, true_grads = reference_loss(image_BD, text_BD, scale, torch.float64, [3, 16])
    torch.testing.assert_close(loss.total, total, **CLOSE[torch.float64])
    torch.testing.assert_close(grads, true_grads, **CLOSE[torch.float64])


def test_masked_pairs_do_not_set_the_shift() -> None:
    """Matching pairs are anti-aligned and a masked pair is aligned: its logit must not become the row maximum."""
    image_BD, _ = embeddings(torch.float32, rows=2)
    text_BD = -image_BD.detach().flip(0) * torch.tensor([[1.0], [-1.0]])
    groups = torch.zeros(2, dtype=torch.int64)
    loss = nested_info_nce(image_BD, text_BD, 300.0, [16], groups=groups)
    total, _, _ = reference_loss(
        image_BD, text_BD.requires_grad_(), torch.tensor(300.0), torch.float64, [16], None, groups
    )
    torch.testing.assert_close(loss.total.double(), total, rtol=1e-5, atol=1e-5)


def test_negative_groups_are_no_group() -> None:
    image_BD, text_BD = embeddings(torch.float64)
    groups = torch.tensor([-3, -2, -1, 4, 4, -2, -2, 0, -3])
    loss = nested_info_nce(image_BD, text_BD, 20.0, [4, 16], groups=groups)
    clamped = nested_info_nce(image_BD, text_BD, 20.0, [4, 16], groups=groups.clamp(min=-1))
    total, _, _ = reference_loss(image_BD, text_BD, torch.tensor(20.0), torch.float64, [4, 16], None, groups)
    torch.testing.assert_close(loss.total, total)
    assert torch.equal(loss.total, clamped.total)


def test_two_keys_mask_the_pairs_that_either_masks_and_no_others() -> None:
    """Rows 0 and 1 share a caption, 1 and 2 a group: 0 and 2 stay each other's negatives."""
    keys = torch.tensor([[-1, 4], [6, 4], [6, -1]])
    image_BD, text_BD = (x.detach()[:3].requires_grad_() for x in embeddings(torch.float64))
    logits_BB = 5 * torch.nn.functional.normalize(image_BD) @ torch.nn.functional.normalize(text_BD).T
    masked_BB = torch.tensor([[0, 1, 0], [1, 0, 1], [0, 1, 0]], dtype=torch.bool)
    logits_BB, labels = logits_BB.masked_fill(masked_BB, -torch.inf), torch.arange(3)
    expected = (torch.nn.functional.cross_entropy(x, labels) for x in (logits_BB, logits_BB.T))
    total = nested_info_nce(image_BD, text_BD, 5.0, [16], groups=keys).total
    torch.testing.assert_close(total, sum(expected) / 2)


@pytest.mark.parametrize("column", [0, 1])
def test_a_second_key_that_is_equal_to_the_first_or_empty_changes_nothing(column: int) -> None:
    image_BD, text_BD = embeddings(torch.float64)
    for other in (torch.full_like(GROUPS, -1), GROUPS):
        keys = torch.stack([GROUPS, other] if column == 0 else [other, GROUPS], 1)
        for options in OPTIONS:
            one = nested_info_nce(image_BD, text_BD, 20.0, [4, 16], groups=GROUPS, options=options)
            two = nested_info_nce(image_BD, text_BD, 20.0, [4, 16], groups=keys, options=options)
            torch.testing.assert_close(two.total, one.total)


def test_a_small_loss_of_large_logits_is_exact() -> None:
    """Nearly aligned pairs at scale 100: the loss is a small difference of logits near 100."""
    image_BD, noise_BD = embeddings(torch.float32, rows=256, width=32)
    text_BD = (image_BD + 0.3 * noise_BD).detach().requires_grad_()
    loss = nested_info_nce(image_BD, text_BD, 100.0, [16, 32])
    total, _, _ = reference_loss(image_BD, text_BD, torch.tensor(100.0), torch.float64, [16, 32])
    assert loss.total.item() == pytest.approx(total.item(), abs=3e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_change_the_loss(dtype: torch.dtype) -> None:
    image_BD, text_BD = embeddings(torch.float32)
    with torch.autocast("cpu", dtype):
        inside = nested_info_nce(image_BD, text_BD, 20.0, [4, 16])
        grads = torch.autograd.grad(inside.total, [image_BD, text_BD])
    outside = nested_info_nce(image_BD, text_BD, 20.0, [4, 16])
    assert torch.equal(inside.total, outside.total)
    assert all(map(torch.equal, grads, torch.autograd.grad(outside.total, [image_BD, text_BD])))


def test_dims_beyond_the_largest_nested_dim_have_zero_gradient() -> None:
    image_BD, text_BD = embeddings(torch.float32)
    loss = nested_info_nce(image_BD, text_BD, 20.0, [4, 10])
    for grad in torch.autograd.grad(loss.total, [image_BD, text_BD]):
        assert grad[:, :10].abs().min() > 0
        assert (grad[:, 10:] == 0).all()


def test_gradients_scale_with_a_factor_on_the_loss() -> None:
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


def test_saved_tensors_grow_linearly_with_the_batch() -> None:
    """torch.autograd.graph.saved_tensors_hooks sees all that forward keeps for backward."""

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


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of all live tensors; `peak` is the maximum so far."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._uses: Counter[int] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        for result in results if isinstance(results, tuple | list) else (results,):
            if isinstance(result, torch.Tensor):
                storage = result.untyped_storage()
                self._uses[storage.data_ptr()] += 1
                if self._uses[storage.data_ptr()] == 1:
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                weakref.finalize(result, self._release, storage.data_ptr(), storage.nbytes())
        return results

    def _release(self, pointer: int, size: int) -> None:
        self._uses[pointer] -= 1
        if not self._uses[pointer]:
            self.now -= size


def test_temporaries_grow_linearly_with_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "_cache_bytes", lambda: 1 << 20)  # tiles stay small compared with the embeddings

    def peak(rows: int) -> int:
        image_BD, text_BD = embeddings(torch.float32, rows)
        with PeakMemory() as memory:
            torch.autograd.grad(nested_info_nce(image_BD, text_BD, 10.0, [4, 8, 16]).total, [image_BD, text_BD])
        return memory.peak

    assert peak(1024) >= 2 * 1024 * 16 * 4  # at least the gradients are counted
    assert peak(2048) <= 2.2 * peak(1024)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dims": [32]}, "dims: 32 is out of range; this embedding has dims 1 to 16"),
        ({"dims": [0]}, "0 is out of range"),
        ({"dims": [4, 4]}, "4 is given twice"),
        ({"dims": []}, "dims: empty"),
        ({"text_BD": torch.ones(8, 16)}, r"shapes \(9, 16\) and \(8, 16\)"),
        ({"text_BD": torch.ones(9, 16, dtype=torch.int64)}, "both must be of one float dtype"),
        ({"image_BD": torch.ones(0, 16), "text_BD": torch.ones(0, 16)}, "at least one pair"),
        ({"logit_scale": torch.ones(3)}, "logit_scale: 3 values for 1 dims"),
        ({"logit_scale": 0.0}, "logit_scale: 0.0; the multiplier must be positive and finite"),
        ({"logit_scale": -100.0}, "logit_scale: -100.0; the multiplier must be positive"),
        ({"weights": [0.0]}, "not all zero"),
        ({"weights": [-1.0]}, "not negative"),
        ({"weights": [1.0, 1.0]}, "2 given for 1 dims"),
        (
            {"groups": torch.zeros(4, dtype=torch.int64)},
            r"groups: torch.int64 of shape \(4,\); expected int64 of shape \(9,\) or \(9, keys\)",
        ),
        ({"groups": torch.zeros(9, 0, dtype=torch.int64)}, r"groups: torch.int64 of shape \(9, 0\)"),
        ({"groups": (GROUPS, TWO_KEYS)}, r"groups: shapes \(9,\) and \(9, 2\) of images and texts differ"),
        ({"groups": torch.zeros(9)}, "groups: torch.float32"),
        ({"groups": [1] * 9}, "groups: list; expected int64"),
        ({"groups": (GROUPS, GROUPS, GROUPS)}, "groups: a tuple of 3; expected int64"),
        ({"groups": (None, GROUPS)}, "groups: NoneType; expected int64"),
        (
            {"text_BD": torch.full((9, 16), torch.nan), "check_finite": True},
            "0 and 9 of 9 rows on rank 0 contain NaN or infinity",
        ),
    ],
)
def test_invalid_arguments_raise(arguments: dict[str, object], message: str) -> None:
    image_BD, text_BD = embeddings(torch.float32)
    good = {"image_BD": image_BD, "text_BD": text_BD, "logit_scale": 1.0, "dims": [16]}
    with pytest.raises(InputError, match=message):
        nested_info_nce(**{**good, **arguments})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("num_keys", [1, 2, 3, 4, 5])
def test_rows_of_a_group_are_counted_once(num_keys: int) -> None:
    generator = torch.Generator().manual_seed(num_keys)
    row_GN, column_GM = (torch.randint(-1, 3, (num_keys, size), generator=generator) for size in (12, 17))
    same_NM = ((row_GN[:, :, None] == column_GM[:, None]) & (row_GN >= 0)[:, :, None]).any(0)
    same_NM[range(9), range(9)] = False
    assert torch.equal(count_same_group(row_GN, column_GM, 9), same_NM.sum(1))
