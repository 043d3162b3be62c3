import pytest
import torch
import torch.nn.functional as F

from mmrl.errors import InputError
from mmrl.nesting import Nesting, NestingConfig, effective_rank, principal_rotation, truncate


def test_dims_are_sorted_with_their_weights() -> None:
    nested = Nesting.from_dims([64, 8, 32], [1, 2, 1], 64)
    assert nested.dims == (8, 32, 64)
    assert nested.weights == (0.5, 0.25, 0.25)


def test_the_prefix_gradient_rises_to_its_end_and_stays_there() -> None:
    rising = NestingConfig(dims=[8, 4]).prefix_gradient
    assert [rising.at(step, 10) for step in (0, 5, 10, 15)] == pytest.approx([0, 0.075, 0.3, 0.3])
    constant = NestingConfig.model_validate({"dims": [8, 4], "prefix_gradient": 1}).prefix_gradient
    assert [constant.at(step, 10) for step in (0, 1, 10)] == [1, 1, 1]
    published = NestingConfig(dims=[8, 4], rotation=False)
    assert published.prefix_gradient == constant
    assert NestingConfig(**published.model_dump()) == published


def test_stored_configs_of_earlier_versions_load() -> None:
    values = {"dims": [8, 4], "weights": None, "dims_per_step": None, "start": None}
    assert NestingConfig.model_validate(values) == NestingConfig(dims=[8, 4], rotation=False), "what such a run trained"


@pytest.mark.parametrize(
    ("dims", "weights", "message"),
    [
        ([8, 128], None, "128 is out of range; this embedding has dims 1 to 64"),
        ([0], None, "0 is out of range"),
        ([8, 8], None, "8 is given twice"),
        ([8.5], None, "8.5 is no whole number"),
        ([], None, "empty"),
        ([8, 16], [1], "1 given for 2 dims"),
        ([8, 16], [0, 0], "not all zero"),
        ([8, 16], [1, -1], "not negative"),
        ([8, 16], [1, float("nan")], "finite"),
    ],
)
def test_invalid_dims_and_weights_raise(dims: list[int], weights: list[float] | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Nesting.from_dims(dims, weights, 64)


def test_truncate_renormalises_the_prefix_in_float32() -> None:
    x_ND = torch.randn(5, 16).bfloat16()
    assert torch.equal(truncate(x_ND, 4), F.normalize(x_ND.float()[:, :4], dim=-1))
    assert torch.equal(truncate(torch.zeros(1, 4), 2), torch.zeros(1, 2))


def test_the_pca_rotation_puts_the_principal_components_first() -> None:
    x_ND = torch.randn(200, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64) + 1
    rotation = principal_rotation(x_ND.T @ x_ND / 200)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(6, dtype=torch.float64))
    directions = torch.linalg.svd(x_ND).Vh
    torch.testing.assert_close((rotation @ directions.T).abs(), torch.eye(6, dtype=torch.float64))
    assert (rotation.gather(1, rotation.abs().argmax(1, keepdim=True)) > 0).all()


def test_the_pca_rotation_leaves_the_first_keep_dims_unchanged() -> None:
    x_ND = torch.randn(200, 6, dtype=torch.float64)
    rotation = principal_rotation(x_ND.T @ x_ND, keep=2)
    assert torch.equal(rotation[:2], torch.eye(6, dtype=torch.float64)[:2])
    assert torch.equal(rotation[2:, 2:], principal_rotation(x_ND[:, 2:].T @ x_ND[:, 2:]))
    assert not rotation[2:, :2].any()


def test_the_effective_rank_of_equal_eigenvalues_is_their_number() -> None:
    assert effective_rank(torch.eye(8) / 8) == pytest.approx(8)
    assert effective_rank(torch.diag(torch.tensor([1.0, 0, 0]))) == pytest.approx(1)
    assert effective_rank(torch.diag(torch.tensor([0.5, 0.25, 0.25]))) == pytest.approx(2**1.5)
