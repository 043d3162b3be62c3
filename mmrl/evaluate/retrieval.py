"""Cross-modal retrieval at every dim: exact, deterministic, from two matrices of embeddings.

Shapes: N images, M texts, D the embedding's width, d one dim; Q queries and G gallery rows of one direction, q queries
of one chunk, P the greatest number of positives that a query has.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from mmrl.errors import InputError
from mmrl.nesting import check_dims, cut

Scores = dict[str, float]
Array = torch.Tensor | np.ndarray

# Similarities in memory at once: 64 MB of float32.
_CHUNK_ELEMENTS = 1 << 24


def retrieval(
    image_ND: Array,
    text_MD: Array,
    image_of_text_M: Array | None = None,
    *,
    image_group_N: Array | None = None,
    text_group_M: Array | None = None,
    dims: Sequence[int] | None = None,
    ks: Sequence[int] = (1, 5, 10),
) -> dict[int, dict[str, Scores]]:
    """Image->text and text->image scores of the renormalised prefix at each of `dims`.

    Who is whose positive: text m of image image_of_text_M[m]; or, with the two group arrays, all of equal group; or,
    with neither, row i of row i.

    A positive's rank is 1 + the number of non-positives that score as high or higher. R@K: the share of queries that
    have a positive at rank <= K (each text is a query of its own; an image hits with any of its texts). mAP and
    nDCG@10 count every positive, each at its place among all. Queries without a positive are left out.

    Returns: {dim: {"image_to_text": {"R@1": …, "mAP": …, "nDCG@10": …, "median_rank": …}, "text_to_image": {…}}};
    shares in 0..1, ranks from 1.

    Raises:
        InputError: shapes that do not match, numbers that are not finite, dims out of range, nothing to retrieve.
    """
    image_ND, text_MD = _checked("image_ND", image_ND), _checked("text_MD", text_MD)
    if image_ND.shape[1] != text_MD.shape[1]:
        raise InputError(f"image_ND, text_MD: widths {image_ND.shape[1]} and {text_MD.shape[1]} differ.")
    dims = list(dims) if dims is not None else [image_ND.shape[1]]
    check_dims(dims, image_ND.shape[1])
    image_group, text_group = positives(len(image_ND), len(text_MD), image_of_text_M, image_group_N, text_group_M)
    result = {}
    for dim in sorted(dims, reverse=True):
        image_Nd, text_Md = cut(image_ND, dim), cut(text_MD, dim)
        result[dim] = {
            "image_to_text": _one_direction(image_Nd, text_Md, image_group, text_group, ks),
            "text_to_image": _one_direction(text_Md, image_Nd, text_group, image_group, ks),
        }
    return result


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


def _checked(name: str, matrix: Array) -> torch.Tensor:
    matrix = torch.as_tensor(matrix)
    if matrix.ndim != 2 or not matrix.numel():
        raise InputError(f"{name}: shape {tuple(matrix.shape)}; want (rows, D) with at least one row.")
    if not torch.isfinite(matrix).all():
        raise InputError(f"{name}: holds numbers that are not finite; the model or its input is broken.")
    return matrix


def _one_direction(
    query_Qd: torch.Tensor,
    gallery_Gd: torch.Tensor,
    query_group_Q: torch.Tensor,
    gallery_group_G: torch.Tensor,
    ks: Sequence[int],
) -> Scores:
    chunk = max(1, _CHUNK_ELEMENTS // len(gallery_Gd))
    best_rank, precision, gain = [], [], []
    for start in range(0, len(query_Qd), chunk):
        rows = slice(start, start + chunk)
        place_qP, has_qP = places_of_positives(
            query_Qd[rows] @ gallery_Gd.T, query_group_Q[rows, None] == gallery_group_G
        )
        answerable = has_qP[:, 0]
        place_qP, has_qP = place_qP[answerable].double(), has_qP[answerable]
        nth_P = torch.arange(1, place_qP.shape[1] + 1)
        count_q = has_qP.sum(1)
        best_rank.append(place_qP[:, 0])
        precision.append((nth_P / place_qP * has_qP).sum(1) / count_q)
        discounts_q = ((place_qP <= 10) * has_qP / torch.log2(place_qP + 1)).sum(1)
        ideal_P = torch.cumsum((nth_P <= 10) / torch.log2(nth_P + 1.0), 0)
        gain.append(discounts_q / ideal_P[count_q - 1])
    best_Q = torch.cat(best_rank)
    if not len(best_Q):
        raise InputError("retrieval: no query has a positive; check image_of_text_M or the groups.")
    scores = {f"R@{k}": float((best_Q <= k).double().mean()) for k in ks}
    scores["mAP"] = float(torch.cat(precision).mean())
    scores["nDCG@10"] = float(torch.cat(gain).mean())
    scores["median_rank"] = float(best_Q.quantile(0.5))
    return scores


def places_of_positives(score_qG: torch.Tensor, positive_qG: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The places (from 1) of each query's positives, the best first, and which of them exist: (q, P) each.

    The place of the n-th best positive is n + the number of non-positives that score as high or higher.
    """
    most = max(int(positive_qG.sum(1).max()), 1)
    mine_qP = score_qG.masked_fill(~positive_qG, -torch.inf).topk(most, dim=1).values
    others_qG = score_qG.masked_fill(positive_qG, -torch.inf)
    above_qP = torch.stack([(others_qG >= mine_qP[:, p, None]).sum(1) for p in range(most)], dim=1)
    return above_qP + torch.arange(1, most + 1), torch.isfinite(mine_qP)


def chance(query_group_Q: torch.Tensor, gallery_group_G: torch.Tensor, ks: Sequence[int]) -> Scores:
    """Expected R@K of a random order: 1 - C(G - P, K) / C(G, K) for a query with P positives among G."""
    values, counts = gallery_group_G.unique(return_counts=True)
    count_of = dict(zip(values.tolist(), counts.tolist(), strict=True))
    positives_Q = np.array([count for group in query_group_Q.tolist() if (count := count_of.get(group))])
    total = len(gallery_group_G)
    scores = {}
    for k in ks:
        drawn = np.arange(min(k, total))
        miss_Q = np.prod(np.clip((total - positives_Q[:, None] - drawn) / (total - drawn), 0, 1), axis=1)
        scores[f"R@{k}"] = float(1 - miss_Q.mean())
    return scores


def as_json(scores: dict[int, dict[str, Scores]]) -> dict[str, Any]:
    """The same with string keys, as retrieval.json has it."""
    return {str(dim): directions for dim, directions in scores.items()}
