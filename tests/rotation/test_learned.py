"""The learnt rotation: it finds what tells pairs apart where principal directions do not, and changes nothing else."""

import pytest
import torch
import torch.nn.functional as F

from mmrl import nesting
from mmrl.rotation import learned
from mmrl.rotation.learned import Pairs, learn, mean_reciprocal_rank

DIM, DIMS, SCALE = 24, [4, 8, 24], 20.0


def of_rows(image_ND: torch.Tensor, text_ND: torch.Tensor) -> Pairs:
    number_N = torch.arange(len(image_ND))
    return Pairs(image_ND, text_ND, number_N, torch.full_like(number_N, -1))


def second_moment(pairs: Pairs) -> torch.Tensor:
    rows = [F.normalize(rows.double(), dim=-1) for rows in (pairs.image_ND, pairs.text_MD)]
    return sum(row.T @ row / len(row) for row in rows) / 2  # pyright: ignore[reportReturnType]


@pytest.fixture(scope="module")
def noisy() -> Pairs:
    """What a pair shares lies in 4 of 24 directions; more of the variance, in 8 others, says nothing of the partner."""
    draw = torch.Generator().manual_seed(0)
    axes_DD = torch.linalg.qr(torch.randn(DIM, DIM, generator=draw))[0]
    shared_N4 = torch.randn(600, 4, generator=draw)

    def rows() -> torch.Tensor:
        noise_N8 = 2 * torch.randn(600, 8, generator=draw)
        rest = 0.05 * torch.randn(600, 12, generator=draw)
        return torch.cat([noise_N8, shared_N4 + 0.1 * torch.randn(600, 4, generator=draw), rest], 1) @ axes_DD

    return of_rows(rows(), rows())


def test_it_finds_the_shared_directions_that_principal_ones_miss(noisy: Pairs) -> None:
    begin_DD = nesting.principal_rotation(second_moment(noisy))
    learnt = learn(noisy, SCALE, begin_DD, DIMS)
    assert learnt is not None
    assert learnt.helps
    assert (learnt.pictures, learnt.judged_by) == (540, 60)
    judges = noisy.turned(begin_DD).of(torch.arange(9, 600, 10))
    assert learnt.before == pytest.approx(mean_reciprocal_rank(judges, [4, 8]), abs=1e-6)
    assert learnt.before < 0.3
    assert mean_reciprocal_rank(noisy.turned(learnt.rotation_DD).of(torch.arange(9, 600, 10)), [4]) > 0.85


def test_it_is_orthogonal_and_the_same_again(noisy: Pairs) -> None:
    begin_DD = nesting.principal_rotation(second_moment(noisy))
    one, two = (learn(noisy, SCALE, begin_DD, DIMS, steps=30) for _ in range(2))
    assert one is not None
    assert two is not None
    assert torch.equal(one.rotation_DD, two.rotation_DD)
    product_DD = one.rotation_DD @ one.rotation_DD.T
    torch.testing.assert_close(product_DD, torch.eye(DIM).double(), rtol=0, atol=1e-12)
    assert one.rotation_DD.dtype == torch.float64


def test_the_first_numbers_are_kept(noisy: Pairs) -> None:
    begin_DD = nesting.principal_rotation(second_moment(noisy), keep=4)
    learnt = learn(noisy, SCALE, begin_DD, DIMS, keep=4)
    assert learnt is not None
    assert learnt.helps
    torch.testing.assert_close(learnt.rotation_DD[:4], torch.eye(DIM).double()[:4])
    assert learn(noisy, SCALE, begin_DD, [4, 24], keep=4) is None


def test_where_others_are_not_served_the_beginning_is_kept(noisy: Pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    begin_DD = nesting.principal_rotation(second_moment(noisy))
    best = learn(noisy, SCALE, begin_DD, DIMS)
    assert best is not None
    monkeypatch.setattr(learned, "_LR", 1.0)  # thrown about
    worse = learn(noisy, SCALE, best.rotation_DD, DIMS, steps=3)
    assert worse is not None
    assert not worse.helps
    assert worse.after < worse.before
    assert torch.equal(worse.rotation_DD, best.rotation_DD)
    assert not worse.as_json()["taken"]


def test_cuts_between_the_dims_begin_with_what_pairs_share(noisy: Pairs) -> None:
    """At 8 alone any order of the four shared numbers and four others is as good."""
    learnt = learn(noisy, SCALE, nesting.principal_rotation(second_moment(noisy)), [8, DIM])
    assert learnt is not None
    judges = noisy.turned(learnt.rotation_DD).of(torch.arange(9, 600, 10))
    assert mean_reciprocal_rank(judges, [4]) > 0.85


def test_what_pairs_do_not_ask_for_is_learnt_from_whole_vectors() -> None:
    """Eight numbers tell all pairs apart. Eight others, by which twenty pairs each are alike, do not, though most of
    what whole vectors say is theirs: by pairs alone they had 0.7 of the eight places."""
    draw = torch.Generator().manual_seed(1)
    own_N8, alike_N8 = torch.randn(2, 600, 8, generator=draw)
    shared_N16 = torch.cat([own_N8, 2 * alike_N8[torch.arange(600) // 20]], 1)
    image_ND, text_ND = (torch.cat([0.3 * torch.randn(600, 8, generator=draw), shared_N16], 1) for _ in range(2))
    learnt = learn(of_rows(image_ND, text_ND), SCALE, torch.eye(DIM).double(), [8, DIM])
    assert learnt is not None
    assert learnt.after > 0.99
    assert learnt.rotation_DD[:8, 16:].square().sum() > 2


def test_what_scores_as_high_as_the_right_one_comes_before_it() -> None:
    same = of_rows(torch.ones(10, DIM), torch.ones(10, DIM))
    assert mean_reciprocal_rank(same, [4, 8]) == pytest.approx(0.1)


@pytest.mark.parametrize(("pictures", "steps"), [(600, 0), (9, 300)])
def test_no_steps_and_too_few_pictures_learn_nothing(noisy: Pairs, pictures: int, steps: int) -> None:
    few = noisy.of(torch.arange(pictures))
    assert learn(few, SCALE, torch.eye(DIM).double(), DIMS, steps=steps) is None


def test_texts_of_one_picture_and_pictures_of_one_group_are_no_negatives() -> None:
    # Two pictures of one group, alike, and a third; the first has two texts.
    image_ND = torch.tensor([[1.0, 0, 0], [1.0, 0, 0], [0, 1.0, 0]])
    text_MD = torch.tensor([[1.0, 0.1, 0], [1.0, 0.2, 0], [1.0, 0, 0], [0, 1.0, 0]])
    of_text_M = torch.tensor([0, 0, 1, 2])
    alone = Pairs(image_ND, text_MD, of_text_M, torch.tensor([-1, -1, -1]))
    # Picture 1's own text is the best of its row, and picture 0's the second; for a text the two pictures tie.
    assert mean_reciprocal_rank(alone, [2]) == pytest.approx((0.5 + 1 + 1 + 0.5 + 0.5 + 1) / 6)
    grouped = Pairs(image_ND, text_MD, of_text_M, torch.tensor([2**63 - 1, 2**63 - 1, -1]))
    assert mean_reciprocal_rank(grouped, [2]) == 1
    # A batch of the first picture's two texts alone has no negatives at all, so there is nothing to descend.
    both = Pairs(image_ND[:1], text_MD[:2], of_text_M[:2], torch.tensor([-1]))
    turned = learned._descend(both, SCALE, [2], 0, 5, torch.Generator().manual_seed(0))
    torch.testing.assert_close(turned, torch.eye(3).double(), rtol=0, atol=1e-6)


def test_the_parts_of_pairs_keep_their_texts() -> None:
    pairs = Pairs(torch.eye(3), torch.arange(12.0).view(4, 3), torch.tensor([0, 1, 1, 2]), torch.tensor([4, -1, 4]))
    some = pairs.of(torch.tensor([2, 1]))
    assert some.image_ND.tolist() == [[0, 0, 1], [0, 1, 0]]
    assert some.text_MD.tolist() == [[3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert some.image_of_text_M.tolist() == [1, 1, 0]
    assert some.group_N.tolist() == [4, -1]
