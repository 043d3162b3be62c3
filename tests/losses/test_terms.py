"""Terms between second members, hard negatives and a teacher, against the plain formulas in helpers/reference.py."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import reference
from torch.nn import functional as F

from mmrl.errors import InputError
from mmrl.losses.inputs import NestedLoss
from mmrl.losses.nested_infonce import InfoNCEOptions, nested_info_nce
from mmrl.losses.rotated import rotated_nested_info_nce
from mmrl.losses.terms import HardNegatives, SecondMembers, Teacher

DIMS, WEIGHTS = [4, 16, 8], [1.0, 3.0, 0.5]
KEYS = torch.tensor([[3, 5], [-1, 5], [3, -1], [7, -1], [-1, 8], [7, 8], [7, 2], [1, 2], [2, -1]])
SECOND_KEYS = torch.tensor([[3, 6], [-1, 5], [3, -1], [7, 9], [-1, 8], [7, 5], [7, -1], [1, 2], [2, -1]])
NEGATIVE_KEYS = torch.tensor([[9, 5], [-1, -1]] * 8 + [[3, 1], [7, -1]])
VALID = torch.tensor([True, True, False] * 6)
CLOSE: dict[torch.dtype, dict[str, Any]] = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-12},
    torch.float32: {"rtol": 1e-3, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 3e-2},
}
SIDES = ("image", "text", "second_image", "second_text", "negative_image", "negative_text")


def make_embeddings(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = {name: 18 if name.startswith("negative") else 9 for name in SIDES}
    return {
        name: torch.randn(count, 16, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for name, count in rows.items()
    }


def make_teacher() -> Teacher:
    generator = torch.Generator().manual_seed(5)
    image_bT, text_bT = F.normalize(torch.randn(2, 9, 5, generator=generator, dtype=torch.float64), dim=-1)
    return Teacher(image_bT, text_bT, 20.0, 0.7)


@pytest.fixture(params=[(64, 64), (4, 2), (3, 7)], ids=["one tile", "4x2 tiles", "3x7 tiles"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "mmrl.losses.sweep.tile_shape", lambda n, m, *_: (min(n, request.param[0]), min(m, request.param[1]))
    )


def plain_total(
    x: dict[str, torch.Tensor],
    scale_K: torch.Tensor,
    dims: list[int],
    weights: list[float],
    options: InfoNCEOptions,
    teacher: Teacher | None,
    has_negatives: bool,
) -> tuple[torch.Tensor, dict[str, dict[int, torch.Tensor]]]:
    """The total, and each dim's InfoNCE of each term, by the plain formulas."""
    common: dict[str, Any] = {"label_smoothing": options.label_smoothing}
    fixed = scale_K.detach()
    more: dict[str, Any] = {}
    if has_negatives:
        more = {
            f"negative_{name}s": (x[f"negative_{side}"][VALID], NEGATIVE_KEYS[VALID])
            for name, side in (("row", "image"), ("column", "text"))
        }
    if teacher is not None:
        more["teacher"] = (teacher.image_bT, teacher.text_bT, teacher.logit_scale, teacher.weight)
    main, by_dim = reference.nested_term(x["image"], x["text"], scale_K, dims, weights, (KEYS, KEYS), **common, **more)
    total, terms = options.image_text * main, {"image_text": by_dim}
    for name, side in (("image_image", "image"), ("text_text", "text")):
        if weight := options.term_weights[name]:
            keys = KEYS, SECOND_KEYS
            one, by_dim = reference.nested_term(x[side], x[f"second_{side}"], fixed, dims, weights, keys, **common)
            total, terms[name] = total + weight * one, by_dim
    return total, terms


CASES = {
    "image-image": (InfoNCEOptions(image_image=0.5), False, False),
    "all": (InfoNCEOptions(image_image=0.5, text_text=2.0, label_smoothing=0.1), False, False),
    "negatives": (InfoNCEOptions(), True, False),
    "all with negatives": (
        InfoNCEOptions(image_text=0.7, image_image=0.5, text_text=2.0, label_smoothing=0.1), True, False,
    ),
    "teacher": (InfoNCEOptions(image_image=0.5, label_smoothing=0.1), False, True),
}  # fmt: skip


def loss_of(function: Callable[..., NestedLoss], x: dict[str, torch.Tensor], case: str, *arguments: Any) -> NestedLoss:
    options, has_negatives, has_teacher = CASES[case]
    second = SecondMembers(x["second_image"], x["second_text"], SECOND_KEYS)
    negatives = HardNegatives(x["negative_image"], x["negative_text"], NEGATIVE_KEYS, VALID, VALID)
    return function(
        x["image"], x["text"], *arguments, WEIGHTS, KEYS, options,
        second=second if options.image_image or options.text_text else None,
        negatives=negatives if has_negatives else None,
        teacher=make_teacher() if has_teacher else None,
    )  # fmt: skip


@pytest.mark.usefixtures("tiles", "bf16_grad_products")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [8.0, 100.0])
def test_terms_equal_the_plain_formula(dtype: torch.dtype, case: str, scale: float) -> None:
    x = make_embeddings(dtype)
    scale_1 = torch.tensor(
        [scale], dtype=torch.float64 if dtype == torch.float64 else torch.float32, requires_grad=True
    )
    loss = loss_of(nested_info_nce, x, case, scale_1, DIMS)
    grads = torch.autograd.grad(loss.total, [*x.values(), scale_1], allow_unused=True)
    options, has_negatives, has_teacher = CASES[case]
    exact = {name: one.detach().double().requires_grad_() for name, one in x.items()}
    exact_scale = scale_1.detach().double().requires_grad_()
    teacher = make_teacher() if has_teacher else None
    total, terms = plain_total(exact, exact_scale, DIMS, WEIGHTS, options, teacher, has_negatives)
    true_grads = torch.autograd.grad(total, [*exact.values(), exact_scale], allow_unused=True)
    torch.testing.assert_close(loss.total.double(), total, **CLOSE[dtype])
    found = {"image_text": loss.by_dim} | loss.other_terms
    assert found.keys() == terms.keys()
    for name, by_dim in terms.items():
        for dim, value in by_dim.items():
            torch.testing.assert_close(found[name][dim].double(), value, **CLOSE[dtype])
    for name, grad, true_grad in zip([*SIDES, "scale"], grads, true_grads, strict=True):
        if true_grad is None:
            assert grad is None or not grad.any(), name
        else:
            assert grad is not None, name
            torch.testing.assert_close(
                grad.double(), true_grad, msg=lambda text, name=name: f"{name}: {text}", **CLOSE[dtype]
            )
    if has_negatives:  # what only fills the tensors has no gradient
        assert grads[4] is not None
        assert not grads[4][~VALID].any()


@pytest.mark.parametrize("case", CASES)
def test_a_rotation_serves_all_terms(case: str) -> None:
    generator = torch.Generator().manual_seed(1)
    rotation_DD = torch.linalg.qr(torch.randn(16, 16, generator=generator, dtype=torch.float64)).Q.requires_grad_()
    x, a = make_embeddings(torch.float64), 0.3
    scale_K = torch.tensor([5.0, 30.0, 10.0], dtype=torch.float64, requires_grad=True)
    loss = loss_of(rotated_nested_info_nce, x, case, scale_K, DIMS, lambda rows: F.linear(rows, rotation_DD), a)
    leaves = [*x.values(), scale_K, rotation_DD]
    grads = torch.autograd.grad(loss.total, leaves, allow_unused=True)
    options, has_negatives, has_teacher = CASES[case]
    arguments = options, make_teacher() if has_teacher else None, has_negatives
    full, _ = plain_total(x, scale_K[1:2], [16], [1.0], *arguments)
    rotated = {name: F.linear(rows, rotation_DD) for name, rows in x.items()}
    prefixes, _ = plain_total(rotated, scale_K[[0, 2]], [4, 8], [1.0, 0.5], *arguments)
    of_full = torch.autograd.grad(full, leaves, allow_unused=True)
    of_prefixes = torch.autograd.grad(prefixes, leaves, allow_unused=True)
    torch.testing.assert_close(loss.total, full + prefixes, **CLOSE[torch.float64])
    for i, grad in enumerate(grads):
        factor = a if i < len(SIDES) else 1.0
        parts = [(of_full[i], 1.0), (of_prefixes[i], factor)]
        expected = sum(weight * one for one, weight in parts if one is not None)
        torch.testing.assert_close(
            torch.zeros_like(leaves[i]) if grad is None else grad,
            expected + torch.zeros_like(leaves[i]),
            **CLOSE[torch.float64],
        )
    assert all(sorted(one) == sorted(DIMS) for one in (loss.by_dim, *loss.other_terms.values()))


def test_one_side_alone() -> None:
    """A run with two text sides: text_text is the first term, whose scale is learned and which has the negatives."""
    x = make_embeddings(torch.float64)
    scale_1 = torch.tensor([8.0], dtype=torch.float64, requires_grad=True)
    loss = nested_info_nce(
        None, x["text"], scale_1, DIMS, WEIGHTS, KEYS, InfoNCEOptions(image_text=0, text_text=1),
        second=SecondMembers(text_bD=x["second_text"], groups=SECOND_KEYS),
        negatives=HardNegatives(text_nD=x["negative_text"], groups=NEGATIVE_KEYS),
    )  # fmt: skip
    total, by_dim = reference.nested_term(
        x["text"], x["second_text"], scale_1, DIMS, WEIGHTS, (KEYS, SECOND_KEYS),
        negative_columns=(x["negative_text"], NEGATIVE_KEYS),
    )  # fmt: skip
    leaves = [x["text"], x["second_text"], x["negative_text"], scale_1]
    torch.testing.assert_close(loss.total, total, **CLOSE[torch.float64])
    assert loss.by_dim == {dim: pytest.approx(value.item()) for dim, value in by_dim.items()}
    torch.testing.assert_close(
        torch.autograd.grad(loss.total, leaves), torch.autograd.grad(total, leaves), **CLOSE[torch.float64]
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"second": None}, "the term image_image needs second image embeddings"),
        ({"second": SecondMembers(torch.zeros(9, 8))}, r"second_image: .*expected \(9, 16\)"),
        ({"negatives": HardNegatives(torch.zeros(10, 16))}, "negative_image: .*expected a multiple of 9 rows of 16"),
        ({"teacher": Teacher(torch.zeros(9, 3), torch.zeros(9, 4), 1.0, 1.0)}, "teacher: embeddings of shapes"),
        ({"options": InfoNCEOptions(image_text=0)}, "at least one of image_text, image_image and text_text"),
    ],
)
def test_bad_arguments_are_refused(change: dict[str, Any], sentence: str) -> None:
    x = make_embeddings(torch.float32)
    named: dict[str, Any] = {"options": InfoNCEOptions(image_image=1), "second": SecondMembers(x["second_image"])}
    with pytest.raises(InputError, match=sentence):
        nested_info_nce(x["image"], x["text"], 10.0, DIMS, **named | change)
