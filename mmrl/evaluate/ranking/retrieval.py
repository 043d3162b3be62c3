"""Cross-modal retrieval at every dim: exact, deterministic, from two matrices of embeddings.

Shapes: N images, M texts, D the embedding's width; Q queries and G gallery rows of one direction.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from mmrl.errors import InputError
from mmrl.evaluate.ranking.ranks import KS, OnRows, PerQuery, Scores, rank_both
from mmrl.nesting import check_dims

Array = torch.Tensor | np.ndarray

# Beyond this a float32 square is not finite.
_LARGEST = 1e18


def retrieval(
    image_ND: Array,
    text_MD: Array,
    image_of_text_M: Array | None = None,
    *,
    image_group_N: Array | None = None,
    text_group_M: Array | None = None,
    dims: Sequence[int] | None = None,
    ks: Sequence[int] = KS,
    folds: int = 1,
    on_rows: OnRows | None = None,
    over_ranks: bool = False,
) -> dict[int, dict[str, Scores]]:
    """Image->text and text->image scores of the renormalised prefix at each of `dims`.

    Who is whose positive: text m of image image_of_text_M[m]; or, with the two group arrays, all of equal group; or,
    with neither, row i of row i.

    A positive's rank is 1 + the number of non-positives that score as high or higher. R@K: the share of queries that
    have a positive at rank <= K (each text is a query of its own; an image hits with any of its texts). mAP, mAP@R
    (within the first R places, R the query's number of positives) and nDCG@10 count every positive, each at its place
    among all; MRR, median_rank and mean_rank are of the best one. Queries without a positive are left out.

    Args:
        folds: the images are cut into so many equal runs of neighbours, each searched among its own texts alone, and
            the scores are the mean over them: COCO's "1K" is 5,000 images with folds=5.
        on_rows: told numbers of rows that add up to N + M, for a progress bar.
        over_ranks: all processes call this, with the same arguments, and divide the work; each has the whole answer.

    Returns: {dim: {"image_to_text": {"R@1": …, "mAP": …, "nDCG@10": …, "median_rank": …}, "text_to_image": {…}}};
    shares in 0..1, ranks from 1.

    Raises:
        InputError: shapes that do not match, numbers that are not finite, dims out of range, nothing to retrieve.
    """
    image_ND, text_MD = checked("image_ND", image_ND), checked("text_MD", text_MD)
    if image_ND.shape[1] != text_MD.shape[1]:
        raise InputError(f"image_ND, text_MD: widths {image_ND.shape[1]} and {text_MD.shape[1]} differ.")
    dtype = torch.promote_types(image_ND.dtype, text_MD.dtype)
    image_ND, text_MD = image_ND.to(dtype), text_MD.to(dtype)
    dims = list(dims) if dims is not None else [image_ND.shape[1]]
    check_dims(dims, image_ND.shape[1])
    check_ks(ks)
    image_group, text_group = positives(len(image_ND), len(text_MD), image_of_text_M, image_group_N, text_group_M)
    parts = []
    for image_n, text_m in fold_rows(image_group, text_group, folds):
        both = rank_both(
            image_ND[image_n],
            text_MD[text_m],
            image_group[image_n],
            text_group[text_m],
            dims,
            on_rows=on_rows,
            over_ranks=over_ranks,
        )
        parts.append(of_directions({"image_to_text": both[0], "text_to_image": both[1]}, ks))
    return mean_of(parts)


def of_directions(per_query: dict[str, dict[int, PerQuery]], ks: Sequence[int]) -> dict[int, dict[str, Scores]]:
    """{direction: {dim: …}} -> {dim: {direction: scores}}, from the widest dim."""
    dims = sorted({dim for by_dim in per_query.values() for dim in by_dim}, reverse=True)
    return {dim: {way: by_dim[dim].scores(ks) for way, by_dim in per_query.items()} for dim in dims}


def mean_of(parts: Sequence[dict[int, dict[str, Scores]]]) -> dict[int, dict[str, Scores]]:
    """The mean of each score over folds."""
    return {
        dim: {
            way: {name: float(np.mean([part[dim][way][name] for part in parts])) for name in scores}
            for way, scores in ways.items()
        }
        for dim, ways in parts[0].items()
    }


def fold_rows(
    image_group_N: torch.Tensor, text_group_M: torch.Tensor, folds: int
) -> list[tuple[slice | torch.Tensor, slice | torch.Tensor]]:
    """The images and the texts of each fold: the texts that have a positive among its images.

    Raises:
        InputError: the images cannot be divided so.
    """
    if folds == 1:
        return [(slice(None), slice(None))]
    count = len(image_group_N)
    if not 1 <= folds <= count or count % folds:
        raise InputError(f"folds: {count} images cannot be divided into {folds} equal folds.")
    spans = [slice(start, start + count // folds) for start in range(0, count, count // folds)]
    return [(span, torch.isin(text_group_M, image_group_N[span]).nonzero()[:, 0]) for span in spans]


def check_ks(ks: Sequence[int]) -> None:
    """Raises InputError unless the K of each recall@K is a whole number from 1."""
    if not ks or any(k != int(k) or k < 1 for k in ks) or len(set(ks)) != len(ks):
        raise InputError(f"ks: {list(ks)}; give distinct whole numbers from 1, such as 1,5,10.")


def positives(
    num_images: int,
    num_texts: int,
    image_of_text_M: Array | None = None,
    image_group_N: Array | None = None,
    text_group_M: Array | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The three ways of naming positives as one: int64 (N,) and (M,), equal where a pair is positive.

    Raises:
        InputError: lengths that do not match, an image that does not exist, only one of the two groups.
    """
    if (image_group_N is None) != (text_group_M is None):
        raise InputError("image_group_N, text_group_M: give both or neither.")
    if image_group_N is None or text_group_M is None:
        image_group_N = torch.arange(num_images)
        if image_of_text_M is None and num_images != num_texts:
            raise InputError(f"image_of_text_M: needed, since there are {num_images} images and {num_texts} texts.")
        text_group_M = torch.arange(num_texts) if image_of_text_M is None else torch.as_tensor(image_of_text_M)
        if len(text_group_M) and not 0 <= int(text_group_M.min()) <= int(text_group_M.max()) < num_images:
            raise InputError(f"image_of_text_M: must name images 0 to {num_images - 1}.")
    image_group_N, text_group_M = torch.as_tensor(image_group_N), torch.as_tensor(text_group_M)
    if len(image_group_N) != num_images or len(text_group_M) != num_texts:
        raise InputError(
            f"groups: {len(image_group_N)} and {len(text_group_M)} for {num_images} images and {num_texts} texts."
        )
    return _apart(image_group_N.long(), -2), _apart(text_group_M.long(), -2 - num_images)


def _apart(group_N: torch.Tensor, first: int) -> torch.Tensor:
    """Gives each row of group -1, which is none, a number of its own: first, first - 1, …"""
    none = group_N == -1
    return torch.where(none, first - torch.arange(len(group_N)), group_N)


def checked(name: str, matrix: Array) -> torch.Tensor:
    """A matrix of embeddings as a tensor.

    Raises:
        InputError: no rows, or numbers that are not finite, or too large for their squares to be.
    """
    matrix = torch.as_tensor(matrix)
    if not matrix.is_floating_point():
        matrix = matrix.float()
    if matrix.ndim != 2 or not matrix.numel():
        raise InputError(f"{name}: shape {tuple(matrix.shape)}; want (rows, D) with at least one row.")
    # Of the least and the greatest a NaN is one, and no copy is made.
    least, most = matrix.aminmax()
    if not (torch.isfinite(least) and torch.isfinite(most)):
        raise InputError(f"{name}: holds numbers that are not finite; the model or its input is broken.")
    if max(-least, most) > _LARGEST:
        raise InputError(f"{name}: holds numbers beyond {_LARGEST:g}, whose squares overflow; scale the embeddings.")
    return matrix


def chance(
    query_group_Q: torch.Tensor, gallery_group_G: torch.Tensor, ks: Sequence[int], same_rows: bool = False
) -> Scores:
    """Expected R@K of a random order: 1 - C(G - P, K) / C(G, K) for a query with P positives among G. With `same_rows`
    a query is left out of its own gallery."""
    values, place = gallery_group_G.unique(return_inverse=True)
    count = torch.cat([place.bincount(minlength=len(values)), torch.zeros(1, dtype=torch.int64)])
    found_Q = torch.searchsorted(values, query_group_Q).clamp_max(len(values) - 1)
    positives = count[torch.where(values[found_Q] == query_group_Q, found_Q, len(values))] - int(same_rows)
    # Few counts of positives differ, so that K as large as the gallery costs little.
    count_u, queries_u = positives[positives > 0].unique(return_counts=True)
    total = len(gallery_group_G) - int(same_rows)
    scores = {}
    for k in ks:
        drawn = np.arange(min(k, total))
        miss_u = np.prod(np.clip((total - count_u.numpy()[:, None] - drawn) / (total - drawn), 0, 1), axis=1)
        scores[f"R@{k}"] = float(1 - np.average(miss_u, weights=queries_u.numpy()))
    return scores


def as_json(scores: dict[int, dict[str, Scores]]) -> dict[str, Any]:
    """The same with string keys, as retrieval.json has it."""
    return {str(dim): directions for dim, directions in scores.items()}
