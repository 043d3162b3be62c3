"""Ranks against brute force; ties; results are bitwise independent of tiles, row order, threads and processes."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.oracles import brute_force, positive_ranks, unit
from helpers.worlds import run_in_world
from torch import Tensor

from mmrl.errors import InputError
from mmrl.evaluate.ranking import ranks, tiles
from mmrl.evaluate.ranking.ranks import PerQuery, rank_both, rank_queries, top_k

DIMS = [33, 5, 16]


def random_data(queries: int, gallery: int, groups: int, repeat: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random vectors and groups; with `repeat`, a third of the vectors are copies."""
    rng = torch.Generator().manual_seed(queries + gallery)
    x, y = torch.randn(queries, 40, generator=rng), torch.randn(gallery, 40, generator=rng)
    if repeat:
        x[2::3], y[2::3] = x[1], y[::3][: len(y[2::3])]
    query_group, gallery_group = (torch.randint(0, groups, (n,), generator=rng) for n in (queries, gallery))
    return x, y, query_group, gallery_group


def assert_equal(one: dict[int, PerQuery], other: dict[int, PerQuery]) -> None:
    assert list(one) == list(other)
    for dim in one:
        assert all(torch.equal(a, b) for a, b in zip(astuple(one[dim]), astuple(other[dim]), strict=True))


@pytest.mark.parametrize("same_rows", [False, True])
# One positive per query; a few; so many that whole rows are sorted; both kinds in one set.
@pytest.mark.parametrize(("rows", "groups"), [((70, 131), 400), ((150, 97), 30), ((129, 65), 2), ((60, 200), 14)])
def test_ranks_equal_brute_force(
    monkeypatch: pytest.MonkeyPatch, rows: tuple[int, int], groups: int, same_rows: bool
) -> None:
    monkeypatch.setattr(tiles, "_CPU_TILE", 64)
    monkeypatch.setattr(ranks, "_CHUNK_ELEMENTS", 4000)
    x, y, query_group, gallery_group = (
        one.double() if one.is_floating_point() else one for one in random_data(*rows, groups)
    )
    if same_rows:
        y, gallery_group = x, query_group
    positive: np.ndarray = (query_group[:, None] == gallery_group).numpy()
    if same_rows:
        np.fill_diagonal(positive, False)
    result = rank_queries(x, y, query_group, gallery_group, DIMS, same_rows=same_rows)
    for dim in DIMS:
        assert result[dim].query_Q.tolist() == np.flatnonzero(positive.any(1)).tolist()
        score = unit(x.numpy(), dim) @ unit(y.numpy(), dim).T
        keep = ~np.eye(len(x), dtype=bool) if same_rows else np.ones_like(positive)
        expected = [positive_ranks(score[q][keep[q]], positive[q][keep[q]])[0] for q in result[dim].query_Q]
        assert result[dim].rank_Q.tolist() == expected
        if not same_rows:
            by_hand = brute_force(unit(x.numpy(), dim), unit(y.numpy(), dim), positive, (1, 10))
            assert result[dim].scores((1, 10)) == pytest.approx(by_hand, abs=1e-12)


@pytest.mark.parametrize("groups", [300, 12, 2])
def test_equal_vectors_tie_at_any_row(groups: int) -> None:
    x, y, query_group, gallery_group = random_data(200, 700, groups, repeat=True)
    positive = (query_group[:, None] == gallery_group).numpy()
    result = rank_queries(x, y, query_group, gallery_group, DIMS)
    for dim in DIMS:
        expected = brute_force(unit(x.numpy(), dim), unit(y.numpy(), dim), positive, (1, 10))
        # A rank may differ where two different vectors are equal up to rounding.
        assert result[dim].scores((1, 10)) == pytest.approx(expected, rel=1e-4)


def test_if_all_vectors_are_equal_the_ranks_are_the_worst() -> None:
    constant = torch.randn(1, 40)
    image, text = constant.expand(100, 40), constant.expand(1300, 40)
    by_image, by_text = rank_both(image, text, torch.arange(100), torch.arange(1300) % 100, DIMS)
    for dim in DIMS:
        assert by_image[dim].rank_Q.unique().tolist() == [1300 - 13 + 1]
        assert by_text[dim].rank_Q.unique().tolist() == [100]


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("groups", [500, 20])
def test_tiles_and_row_order_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch, groups: int) -> None:
    x, y, query_group, gallery_group = random_data(330, 590, groups, repeat=True)
    whole = rank_both(x, y, query_group, gallery_group, DIMS)
    alone = rank_queries(y, y, gallery_group, gallery_group, DIMS, same_rows=True)
    assert_equal(whole[1], rank_queries(y, x, gallery_group, query_group, DIMS))
    order_Q, order_G = torch.randperm(330), torch.randperm(590)
    shuffled = rank_both(x[order_Q], y[order_G], query_group[order_Q], gallery_group[order_G], DIMS)
    for one, other, order in zip(whole, shuffled, (order_Q, order_G), strict=True):
        for dim in DIMS:
            index = order[other[dim].query_Q].argsort()
            assert torch.equal(order[other[dim].query_Q][index], one[dim].query_Q)
            for a, b in zip(astuple(one[dim])[1:], astuple(other[dim])[1:], strict=True):
                assert torch.equal(a, b[index])
    monkeypatch.setattr(tiles, "_CPU_TILE", 64)
    monkeypatch.setattr(ranks, "_CHUNK_ELEMENTS", 9000)
    monkeypatch.setattr(tiles, "_TILES_PER_TASK", 2)
    for one, other in zip(whole, rank_both(x, y, query_group, gallery_group, DIMS), strict=True):
        assert_equal(one, other)
    assert_equal(alone, rank_queries(y, y, gallery_group, gallery_group, DIMS, same_rows=True))


@pytest.mark.usefixtures("three_threads")
def test_torchs_number_of_threads_is_restored_after_success_and_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def threads_of_a_new_thread() -> int:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(torch.get_num_threads).result()

    few = random_data(330, 590, 500)
    rank_both(*few, DIMS)
    assert threads_of_a_new_thread() == 3

    def fails(*_: object) -> None:
        assert torch.get_num_threads() == 1
        raise ZeroDivisionError

    monkeypatch.setattr(tiles.Direction, "count", fails)
    with pytest.raises(ZeroDivisionError):
        rank_both(*few, DIMS)
    assert threads_of_a_new_thread() == 3


def _ranked(over_ranks: bool) -> list[dict[int, PerQuery]]:
    few, many = random_data(200, 310, 90), random_data(90, 140, 3)
    return [
        *rank_both(*few, DIMS, over_ranks=over_ranks),
        rank_queries(*few, DIMS, over_ranks=over_ranks),
        rank_queries(few[1], few[1], few[3], few[3], DIMS, same_rows=True, over_ranks=over_ranks),
        rank_queries(*many, DIMS, over_ranks=over_ranks),
    ]


def _ranked_in_a_world(folder: Path) -> None:
    torch.set_num_threads(1)
    tiles._CPU_TILE = 64
    ranks._CHUNK_ELEMENTS = 4000
    for one, other in zip(_ranked(True), _ranked(False), strict=True):
        assert_equal(one, other)


@pytest.mark.parametrize("size", [2, 3])
def test_several_processes_give_the_result_of_one(tmp_path: Path, size: int) -> None:
    run_in_world(size, _ranked_in_a_world, tmp_path)


def test_a_large_group_stores_no_thresholds() -> None:
    group = torch.zeros(1000, dtype=torch.int64)
    side = tiles.SortedEmbeddings(torch.randn(1000, 8), group, [4, 8], torch.device("cpu"))
    direction = tiles.Direction(side, side, True)
    assert bool(direction.many_N.all())
    assert direction.threshold_KPN.numel() == 2 * 1024


def test_progress_adds_up() -> None:
    few, many = random_data(700, 610, 200), random_data(300, 210, 3)
    for one in (few, many):
        reported: list[float] = []
        rank_both(*one, [8], on_rows=reported.append)
        assert sum(reported) == pytest.approx(len(one[0]) + len(one[1]))
        reported.clear()
        rank_queries(one[0], one[0], one[2], one[2], [8], same_rows=True, on_rows=reported.append)
        assert sum(reported) == pytest.approx(len(one[0]))


def test_half_precision_is_ranked_in_float32() -> None:
    x, y, query_group, gallery_group = random_data(50, 60, 30)
    x, y = x.half(), y.half()
    expected = rank_queries(x.float(), y.float(), query_group, gallery_group, DIMS)
    assert_equal(rank_queries(x, y, query_group, gallery_group, DIMS), expected)


def test_top_k_is_a_stable_sort() -> None:
    score_qG = np.random.default_rng(0).integers(0, 9, (40, 90)).astype(np.float32)  # many ties
    column_qk, found_qk = top_k(score_qG, 7)
    expected_qk = np.argsort(-score_qG, axis=1, kind="stable")[:, :7]
    assert (column_qk == expected_qk).all()
    assert (found_qk == np.take_along_axis(score_qG, expected_qk, 1)).all()
    assert top_k(score_qG, 1000)[0].shape == (40, 90)
    assert top_k(score_qG[:, :0], 3)[0].shape == (40, 0)


def test_errors_name_the_argument() -> None:
    x, y, query_group, gallery_group = random_data(5, 6, 3)
    with pytest.raises(InputError, match="no query has a positive"):
        rank_queries(x, y, query_group, gallery_group + 100, DIMS)
    with pytest.raises(InputError, match="41 is out of range"):
        rank_queries(x, y, query_group, gallery_group, [41])
