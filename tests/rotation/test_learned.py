"""The learned rotation: it separates matching pairs where PCA does not, and stays orthogonal."""

import pytest
import torch
import torch.nn.functional as F

from mmrl import nesting
from mmrl.rotation import learned
from mmrl.rotation.learned import Pairs, learn_rotation, mean_reciprocal_rank

DIM, DIMS, SCALE = 24, [4, 8, 24], 20.0


def pairs_of(image_ND: torch.Tensor, text_ND: torch.Tensor) -> Pairs:
    index_N = torch.arange(len(image_ND))
    return Pairs(image_ND, text_ND, index_N, torch.full_like(index_N, -1))


def second_moment(pairs: Pairs) -> torch.Tensor:
    rows = [F.normalize(rows.double(), dim=-1) for rows in (pairs.image_ND, pairs.text_MD)]
    return sum(row.T @ row / len(row) for row in rows) / 2  # pyright: ignore[reportReturnType]


@pytest.fixture(scope="module")
def noisy() -> Pairs:
    """Images and texts agree in 4 of 24 directions; 8 others have more variance, but independent in both."""
    draw = torch.Generator().manual_seed(0)
    axes_DD = torch.linalg.qr(torch.randn(DIM, DIM, generator=draw))[0]
    shared_N4 = torch.randn(600, 4, generator=draw)

    def rows() -> torch.Tensor:
        noise_N8 = 2 * torch.randn(600, 8, generator=draw)
        rest = 0.05 * torch.randn(600, 12, generator=draw)
        return torch.cat([noise_N8, shared_N4 + 0.1 * torch.randn(600, 4, generator=draw), rest], 1) @ axes_DD

    return pairs_of(rows(), rows())


def test_it_finds_the_shared_directions_that_pca_misses(noisy: Pairs) -> None:
    initial_DD = nesting.principal_rotation(second_moment(noisy))
    learned_rotation = learn_rotation(noisy, SCALE, initial_DD, DIMS, steps=150)
    assert learned_rotation is not None
    assert learned_rotation.helps
    assert (learned_rotation.images, learned_rotation.holdout_images) == (540, 60)
    holdout = noisy.rotated(initial_DD).select(torch.arange(9, 600, 10))
    assert learned_rotation.before == pytest.approx(mean_reciprocal_rank(holdout, [4, 8]), abs=1e-6)
    assert learned_rotation.before < 0.3
    assert (
        mean_reciprocal_rank(noisy.rotated(learned_rotation.rotation_DD).select(torch.arange(9, 600, 10)), [4]) > 0.85
    )


def test_it_is_orthogonal_and_deterministic(noisy: Pairs) -> None:
    initial_DD = nesting.principal_rotation(second_moment(noisy))
    one, two = (learn_rotation(noisy, SCALE, initial_DD, DIMS, steps=30) for _ in range(2))
    assert one is not None
    assert two is not None
    assert torch.equal(one.rotation_DD, two.rotation_DD)
    product_DD = one.rotation_DD @ one.rotation_DD.T
    torch.testing.assert_close(product_DD, torch.eye(DIM).double(), rtol=0, atol=1e-12)
    assert one.rotation_DD.dtype == torch.float64


def test_keep_leaves_the_first_dims_unchanged(noisy: Pairs) -> None:
    initial_DD = nesting.principal_rotation(second_moment(noisy), keep=4)
    learned_rotation = learn_rotation(noisy, SCALE, initial_DD, DIMS, keep=4, steps=150)
    assert learned_rotation is not None
    assert learned_rotation.helps
    torch.testing.assert_close(learned_rotation.rotation_DD[:4], torch.eye(DIM).double()[:4])
    assert learn_rotation(noisy, SCALE, initial_DD, [4, 24], keep=4) is None


def test_the_initial_rotation_is_kept_without_improvement(noisy: Pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    initial_DD = nesting.principal_rotation(second_moment(noisy))
    best = learn_rotation(noisy, SCALE, initial_DD, DIMS, steps=150)
    assert best is not None
    monkeypatch.setattr(learned, "_LR", 1.0)  # diverges
    worse = learn_rotation(noisy, SCALE, best.rotation_DD, DIMS, steps=3)
    assert worse is not None
    assert not worse.helps
    assert worse.after < worse.before
    assert torch.equal(worse.rotation_DD, best.rotation_DD)
    assert not worse.as_json()["taken"]


def test_dims_between_nested_dims_are_ordered_by_covariance(noisy: Pairs) -> None:
    """The loss at dim 8 does not depend on the order of the four shared dims and four others."""
    learned_rotation = learn_rotation(
        noisy, SCALE, nesting.principal_rotation(second_moment(noisy)), [8, DIM], steps=150
    )
    assert learned_rotation is not None
    holdout = noisy.rotated(learned_rotation.rotation_DD).select(torch.arange(9, 600, 10))
    assert mean_reciprocal_rank(holdout, [4]) > 0.85


def test_prefixes_are_distilled_from_the_full_dim() -> None:
    """Eight dims identify each pair. Eight others are equal within 20 pairs, but dominate full-dim similarities:
    learned from pairs only, they would get 0.7 of the eight dims."""
    draw = torch.Generator().manual_seed(1)
    unique_N8, common_N8 = torch.randn(2, 600, 8, generator=draw)
    shared_N16 = torch.cat([unique_N8, 2 * common_N8[torch.arange(600) // 20]], 1)
    image_ND, text_ND = (torch.cat([0.3 * torch.randn(600, 8, generator=draw), shared_N16], 1) for _ in range(2))
    learned_rotation = learn_rotation(pairs_of(image_ND, text_ND), SCALE, torch.eye(DIM).double(), [8, DIM], steps=150)
    assert learned_rotation is not None
    assert learned_rotation.after > 0.99
    assert learned_rotation.rotation_DD[:8, 16:].square().sum() > 2


def test_ties_rank_before_the_match() -> None:
    same = pairs_of(torch.ones(10, DIM), torch.ones(10, DIM))
    assert mean_reciprocal_rank(same, [4, 8]) == pytest.approx(0.1)


@pytest.mark.parametrize(("images", "steps"), [(600, 0), (9, 300)])
def test_no_steps_and_too_few_images_learn_nothing(noisy: Pairs, images: int, steps: int) -> None:
    few = noisy.select(torch.arange(images))
    assert learn_rotation(few, SCALE, torch.eye(DIM).double(), DIMS, steps=steps) is None


def test_texts_of_one_image_and_images_of_one_group_are_not_negatives() -> None:
    # Two equal images of one group, and a third image; the first has two texts.
    image_ND = torch.tensor([[1.0, 0, 0], [1.0, 0, 0], [0, 1.0, 0]])
    text_MD = torch.tensor([[1.0, 0.1, 0], [1.0, 0.2, 0], [1.0, 0, 0], [0, 1.0, 0]])
    of_text_M = torch.tensor([0, 0, 1, 2])
    ungrouped = Pairs(image_ND, text_MD, of_text_M, torch.tensor([-1, -1, -1]))
    # Image 1's text ranks first and image 0's second; for a text the two images tie.
    assert mean_reciprocal_rank(ungrouped, [2]) == pytest.approx((0.5 + 1 + 1 + 0.5 + 0.5 + 1) / 6)
    grouped = Pairs(image_ND, text_MD, of_text_M, torch.tensor([2**63 - 1, 2**63 - 1, -1]))
    assert mean_reciprocal_rank(grouped, [2]) == 1
    # A batch of the first image's two texts has no negatives, so there is no gradient.
    both = Pairs(image_ND[:1], text_MD[:2], of_text_M[:2], torch.tensor([-1]))
    rotation = learned._descend(both, SCALE, [2], 0, 5, torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotation, torch.eye(3).double(), rtol=0, atol=1e-6)


def test_selected_images_keep_their_texts() -> None:
    pairs = Pairs(torch.eye(3), torch.arange(12.0).view(4, 3), torch.tensor([0, 1, 1, 2]), torch.tensor([4, -1, 4]))
    some = pairs.select(torch.tensor([2, 1]))
    assert some.image_ND.tolist() == [[0, 0, 1], [0, 1, 0]]
    assert some.text_MD.tolist() == [[3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert some.image_of_text_M.tolist() == [1, 1, 0]
    assert some.group_N.tolist() == [4, -1]
