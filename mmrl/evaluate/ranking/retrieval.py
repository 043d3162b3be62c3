"""Cross-modal retrieval metrics at every dim, exact and deterministic, from two matrices of embeddings.

Shapes: N images, M texts, D the embedding's width; Q queries and G gallery rows of one direction; u distinct values.
"""

from collections.abc import Sequence

import numpy as np
import torch

from mmrl.errors import InputError
from mmrl.evaluate.directions import CROSS_MODAL
from mmrl.evaluate.ranking.ranks import KS, OnRows, PerQuery, Scores, rank_both
from mmrl.nesting import check_dims

Array = torch.Tensor | np.ndarray

# The square of a larger value overflows float32.
_MAX_VALUE = 1e18


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
    """Image→text and text→image scores of the renormalised prefix at each of `dims`.

    Positives: text m and image image_of_text_M[m]; or, with the two group arrays, all rows of equal group (-1 is no
    group); or, with neither, row i and row i.

    The rank of a positive is 1 + the number of non-positives that score at least as high. R@K is the share of queries
    with a positive at rank <= K (each text is a query; an image hits with any of its texts). mAP, mAP@R (within the
    first R ranks, R the query's number of positives) and nDCG@10 use the ranks of all positives; MRR, median_rank and
    mean_rank that of the best one. Queries without a positive are left out.

    Args:
        folds: the images are divided into this many equal runs of consecutive rows. Each is searched among its own
            texts only, and the scores are averaged: COCO's "1K" is 5,000 images with folds=5.
        on_rows: called with numbers of rows that add up to N + M, for a progress bar.
        over_ranks: divide the work over all processes. All of them must call this with the same arguments; each gets
            the whole result.

    Returns: {dim: {"image_to_text": {"R@1": …, "mAP": …, "nDCG@10": …, "median_rank": …}, "text_to_image": {…}}};
    shares in 0..1, ranks from 1.

    Raises:
        InputError: shapes that do not match, values that are not finite, dims out of range, nothing to retrieve.
    """
    image_ND, text_MD = check_embeddings("image_ND", image_ND), check_embeddings("text_MD", text_MD)
    if image_ND.shape[1] != text_MD.shape[1]:
        raise InputError(f"image_ND, text_MD: widths {image_ND.shape[1]} and {text_MD.shape[1]} differ.")
    dtype = torch.promote_types(image_ND.dtype, text_MD.dtype)
    image_ND, text_MD = image_ND.to(dtype), text_MD.to(dtype)
    dims = list(dims) if dims is not None else [image_ND.shape[1]]
    check_dims(dims, image_ND.shape[1])
    check_ks(ks)
    image_group, text_group = positive_groups(len(image_ND), len(text_MD), image_of_text_M, image_group_N, text_group_M)
    scores_of_folds = []
    for image_n, text_m in fold_rows(image_group, text_group, folds):
        groups = image_group[image_n], text_group[text_m]
        both = rank_both(image_ND[image_n], text_MD[text_m], *groups, dims, on_rows=on_rows, over_ranks=over_ranks)
        scores_of_folds.append(scores_by_dim(dict(zip(CROSS_MODAL, both, strict=True)), ks))
    return mean_over_folds(scores_of_folds)


def scores_by_dim(per_query: dict[str, dict[int, PerQuery]], ks: Sequence[int]) -> dict[int, dict[str, Scores]]:
    """{direction: {dim: …}} -> {dim: {direction: scores}}, from the widest dim."""
    dims = sorted({dim for by_dim in per_query.values() for dim in by_dim}, reverse=True)
    return {dim: {direction: by_dim[dim].scores(ks) for direction, by_dim in per_query.items()} for dim in dims}


def mean_over_folds(folds: Sequence[dict[int, dict[str, Scores]]]) -> dict[int, dict[str, Scores]]:
    """The mean of each score over the folds."""
    return {
        dim: {
            direction: {name: float(np.mean([fold[dim][direction][name] for fold in folds])) for name in scores}
            for direction, scores in directions.items()
        }
        for dim, directions in folds[0].items()
    }


def fold_rows(
    image_group_N: torch.Tensor, text_group_M: torch.Tensor, folds: int
) -> list[tuple[slice | torch.Tensor, slice | torch.Tensor]]:
    """The rows of the images of each fold, and of the texts that have a positive among them. Raises InputError: the
    number of images is not divisible by `folds`."""
    if folds == 1:
        return [(slice(None), slice(None))]
    count = len(image_group_N)
    if not 1 <= folds <= count or count % folds:
        raise InputError(f"folds: {count} images cannot be divided into {folds} equal folds.")
    spans = [slice(start, start + count // folds) for start in range(0, count, count // folds)]
    return [(span, torch.isin(text_group_M, image_group_N[span]).nonzero()[:, 0]) for span in spans]


def check_ks(ks: Sequence[int]) -> None:
    """Raises InputError unless the K of recall@K are distinct whole numbers >= 1."""
    if not ks or any(not isinstance(k, int | np.integer) or k < 1 for k in ks) or len(set(ks)) != len(ks):
        raise InputError(f"ks: {list(ks)}; give distinct whole numbers from 1, such as 1,5,10.")


def positive_groups(
    num_images: int,
    num_texts: int,
    image_of_text_M: Array | None = None,
    image_group_N: Array | None = None,
    text_group_M: Array | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Groups of images and texts, int64 (N,) and (M,), equal where a pair is positive; the arguments are `retrieval`'s.
    Raises InputError: lengths that do not match, an image that does not exist, only one of the two groups."""
    if (image_group_N is None) != (text_group_M is None):
        raise InputError("image_group_N, text_group_M: give both or neither.")
    if image_group_N is None or text_group_M is None:
        image_group_N = torch.arange(num_images)
        if image_of_text_M is None and num_images != num_texts:
            raise InputError(f"image_of_text_M: needed, since there are {num_images} images and {num_texts} texts.")
        text_group_M = torch.arange(num_texts) if image_of_text_M is None else torch.as_tensor(image_of_text_M).long()
        if len(text_group_M) and not 0 <= int(text_group_M.min()) <= int(text_group_M.max()) < num_images:
            raise InputError(f"image_of_text_M: must name images 0 to {num_images - 1}.")
    image_group_N, text_group_M = torch.as_tensor(image_group_N), torch.as_tensor(text_group_M)
    shapes = tuple(image_group_N.shape), tuple(text_group_M.shape)
    if shapes != ((num_images,), (num_texts,)):
        raise InputError(f"groups: shapes {shapes[0]} and {shapes[1]} for {num_images} images and {num_texts} texts.")
    return fill_missing_groups(image_group_N.long()), fill_missing_groups(text_group_M.long(), num_images)


def fill_missing_groups(group_N: torch.Tensor, used: int = 0) -> torch.Tensor:
    """Replaces each -1 (no group) by a group that no other row has: row n gets -2 - used - n."""
    return torch.where(group_N == -1, -2 - used - torch.arange(len(group_N)), group_N)


def check_embeddings(name: str, matrix: Array) -> torch.Tensor:
    """A matrix of embeddings as a floating-point tensor. Raises InputError: no rows, or values that are not finite or
    whose squares would not be."""
    matrix = torch.as_tensor(matrix)
    if not matrix.is_floating_point():
        matrix = matrix.float()
    if matrix.ndim != 2 or not matrix.numel():
        raise InputError(f"{name}: shape {tuple(matrix.shape)}; expected (rows, D) with at least one row.")
    # aminmax propagates NaN, and copies nothing.
    least, most = matrix.aminmax()
    if not (torch.isfinite(least) and torch.isfinite(most)):
        raise InputError(f"{name}: contains values that are not finite; check the model and its input.")
    if max(-least, most) > _MAX_VALUE:
        raise InputError(f"{name}: contains values beyond {_MAX_VALUE:g}, whose squares overflow; scale them down.")
    return matrix


def chance(
    query_group_Q: torch.Tensor, gallery_group_G: torch.Tensor, ks: Sequence[int], same_rows: bool = False
) -> Scores:
    """Expected R@K of a random ranking: 1 - C(G - P, K) / C(G, K) for a query with P positives among G, averaged over
    the queries that have any. With `same_rows`, a query is left out of its own gallery."""
    groups, index_G = gallery_group_G.unique(return_inverse=True)
    count = torch.cat([index_G.bincount(minlength=len(groups)), torch.zeros(1, dtype=torch.int64)])
    index_Q = torch.searchsorted(groups, query_group_Q).clamp_max(len(groups) - 1)
    positives_Q = count[torch.where(groups[index_Q] == query_group_Q, index_Q, len(groups))] - int(same_rows)
    # Computed once per distinct number of positives: cheap even if K is as large as the gallery.
    count_u, queries_u = positives_Q[positives_Q > 0].unique(return_counts=True)
    total = len(gallery_group_G) - int(same_rows)
    scores = {}
    for k in ks:
        drawn = np.arange(min(k, total))
        miss_u = np.prod(np.clip((total - count_u.numpy()[:, None] - drawn) / (total - drawn), 0, 1), axis=1)
        scores[f"R@{k}"] = float(1 - np.average(miss_u, weights=queries_u.numpy()))
    return scores
