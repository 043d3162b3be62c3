"""Nested symmetric InfoNCE over the global batch: all dims in one pass over tiles, in memory linear in the batch.

Each rank computes the logits of its local images with all texts. Communication, whatever the number of dims and terms:
forward one all-gather of the texts, one all-reduce of the columns' exponential sums and one of the loss; backward one
reduce-scatter of the text gradient. Groups add an all-gather, and so does a teacher of another dtype. On a GPU, and
where logits may be too large for a shared shift (see softmax.py), an all-reduce of K numbers decides on the shifts;
shifts per row add one of extremes.

On a GPU the host waits once: it reads the scales and the lowest logits of matching pairs together.

Shapes: b local pairs (of this rank), B = b * world_size pairs of the global batch, D embedding width, K dims; n rows
and m columns of a term's logits, with its hard negatives; k is K, or K + 1 with a teacher.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from mmrl.distributed import comm
from mmrl.errors import InputError
from mmrl.hardware import reads_at_once
from mmrl.losses import inputs, softmax
from mmrl.losses.backward import gradients
from mmrl.losses.inputs import Groups, NestedLoss
from mmrl.losses.softmax import Shift
from mmrl.losses.sweep import LOG2_E, LogitMatrix, Targets, constant, matmul_precision
from mmrl.losses.terms import (
    DEFAULT_OPTIONS,
    HardNegatives,
    InfoNCEOptions,
    SecondMembers,
    Sides,
    Teacher,
    Term,
    TermKeys,
    TermMatrices,
    gather,
    gather_keys,
    make_sides,
    reduce_scatter,
)
from mmrl.losses.triton_probe import require_triton, triton_problem
from mmrl.nesting import Nesting

# With a shared shift, exponents (base 2) stay below _MAX_EXPONENT, so that a sum of 2^30 terms fits float32. If a row's
# largest exponent could be below _MIN_EXPONENT, where float32 loses precision, the dim uses per-row maxima instead.
_MAX_EXPONENT, _MIN_EXPONENT = 80.0, -100.0


def nested_info_nce(
    image_BD: torch.Tensor | None,
    text_BD: torch.Tensor | None,
    logit_scale: torch.Tensor | float,
    dims: Sequence[int],
    weights: Sequence[float] | None = None,
    groups: Groups | None = None,
    options: InfoNCEOptions = DEFAULT_OPTIONS,
    check_finite: bool = False,
    second: SecondMembers | None = None,
    negatives: HardNegatives | None = None,
    teacher: Teacher | None = None,
) -> NestedLoss:
    """Equals, in value and gradient, this formula on the rows of all ranks (tests/helpers/reference.py)::

        logits = {d: scale[d] * F.normalize(image[:, :d]) @ F.normalize(text[:, :d]).T for d in dims}
        loss = {d: (F.cross_entropy(logits[d], labels) + F.cross_entropy(logits[d].T, labels)) / 2 for d in dims}
        total = sum(w[d] * loss[d] for d in dims) / sum(w.values())

    with `labels = torch.arange(B)`. Sources: Kusupati et al. 2022 (arXiv 2205.13147), equation 1, for the nesting;
    Radford et al. 2021 (arXiv 2103.00020), figure 3, for the loss.

    Args:
        image_BD, text_BD: the local rows, of any float dtype, not normalised; image i matches text i. Every rank has
            the same number of rows. Logits and sums are float32, or float64 for float64 embeddings. A zero vector has
            zero similarities and, as with `F.normalize`, a very large gradient (finite except in float16). One of
            them may be None where no term compares it.
        logit_scale: the multiplier, already exponentiated, positive: a scalar, (1,), or (K,) in the order of `dims`.
        dims: nested dims, in any order.
        weights: one per dim (default: equal).
        groups: int64 (b,), or (b, G) for several keys, such as item and caption; or a tuple (image groups,
            text groups).
            Pairs of one group (equal in any column) are not negatives of each other; negative values are in no group.
            Must be given on all ranks or on none.
        options: label smoothing, distillation, the treatment of groups, and the weights of the terms.
        check_finite: check the embeddings for NaN and infinity first (synchronises with the device).
        second: the second members of the pairs, for the terms image_image and text_text. Each adds its weight times
            the same loss between first and second members; the logit scale descends the first term alone.
        negatives: further columns of the images' softmax and further rows of the texts'.
        teacher: adds its weight times KL(teacher's softmax || own softmax) to image_text at every dim, instead of
            options.distillation.

    Time and memory: 4 B^2 D multiply-adds per term for all dims and all ranks together, forward and backward. Per rank,
    O(B (D + K)) numbers and the tile buffers, whose size `sweep.tile_shape` adapts to the device.

    Raises:
        InputError: shapes that do not match, dims out of range or repeated, invalid weights or scales.
    """
    sides = make_sides(image_BD, text_BD, groups, options, second, negatives, teacher, check_finite)
    first = next(iter(sides.embeddings.values()))
    nested = Nesting.from_dims(dims, weights, first.shape[1])
    operands = Operands(sides, inputs.per_dim("logit_scale", logit_scale, dims, first), nested)
    (limits,) = read_limits(operands)
    return sweep_loss(operands, limits, options)


class Operands(NamedTuple):
    """What the logits of one sweep are computed from."""

    sides: Sides
    scale_K: torch.Tensor
    nested: Nesting


Limits = list[tuple[float, float]]
"""Each dim's logit scale, and a lower bound of the logits of all ranks' matching pairs; both in base 2."""


@torch.no_grad()
def read_limits(*sweeps: Operands) -> list[list[Limits]]:
    """The limits of the terms of several sweeps, in one read: each read waits for the device. Collective. Raises
    InputError: a logit scale is zero, negative or infinite."""
    terms = [(one, term) for one in sweeps for term in one.sides.terms]
    scale_k = [term.scales(one.scale_K).double() for one, term in terms]
    scale_K = torch.cat(scale_k)
    scales: list[float] = scale_K.tolist() if reads_at_once(scale_K) else []
    lowest = [-scale for scale in scales]
    if not scales or any(_may_underflow(scale * LOG2_E, -scale * LOG2_E) for scale in scales):
        lowest_K = torch.cat([_lowest_matching_cosine(*one) for one in terms]) * scale_K
        scales, lowest = torch.stack([scale_K, -comm.all_reduce_max(-lowest_K)]).tolist()
    inputs.check_scales(scales)
    limits = iter([(scale * LOG2_E, low * LOG2_E) for scale, low in zip(scales, lowest, strict=True)])
    of_term = iter([[*islice(limits, len(one))] for one in scale_k])
    return [[next(of_term) for _ in one.sides.terms] for one in sweeps]


def _lowest_matching_cosine(operands: Operands, term: Term) -> torch.Tensor:
    """Each dim's lowest cosine of a local matching pair: (k,)."""
    local = operands.sides.embeddings
    with comm.single_process():
        matrix = TermMatrices(local, local, operands.scale_K, operands.nested).of(term.without_negatives(), ())
    return (inputs.matching_logits(matrix) / matrix.scale_K[:, None]).amin(1).double()


def sweep_loss(operands: Operands, limits: list[Limits], options: InfoNCEOptions) -> NestedLoss:
    """`nested_info_nce` of operands whose limits were read."""
    sides, scale_K, nested = operands
    total, by_dim_TK, kl_TK = _NestedInfoNCE.apply(  # pyright: ignore[reportGeneralTypeIssues]
        scale_K, sides, nested, limits, options, *sides.embeddings.values()
    )
    by_dim, *others = [dict(zip(nested.dims, by_dim_K.unbind(), strict=True)) for by_dim_K in by_dim_TK]
    # Without a teacher, the largest dim is one.
    main = sides.terms[0]
    taught = nested.dims if main.teacher_scale is not None else nested.dims[:-1]
    kl_by_dim = dict(zip(taught, kl_TK[0].unbind(), strict=False)) if main.distillation else {}
    names = [term.name for term in sides.terms[1:]]
    return NestedLoss(total, by_dim, kl_by_dim, dict(zip(names, others, strict=True)))


@dataclass
class _TermState:
    """What the backward pass of a term needs besides tensors."""

    term: Term
    shifts: list[Shift]
    targets: Targets
    use_triton: bool
    num_groups: int
    """Tensors of groups among those that are saved."""


class _NestedInfoNCE(torch.autograd.Function):
    """Forward saves the embeddings and the log-sum-exps of rows and columns; backward recomputes the logits."""

    @staticmethod
    def forward(
        ctx: Any,
        scale_K: torch.Tensor,
        sides: Sides,
        nested: Nesting,
        limits: list[Limits],
        options: InfoNCEOptions,
        *embeddings: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        local = dict(zip(sides.embeddings, embeddings, strict=True))
        b, K = len(local[sides.terms[0].rows]), len(nested.dims)
        B = b * comm.world().size
        gathered = gather(local, sides.columns, b)
        matrices, states, sums = TermMatrices(local, gathered, scale_K, nested), [], []
        like = embeddings[0]
        for term, keys, of_term in zip(sides.terms, gather_keys(sides, b, B), limits, strict=True):
            groups = () if keys is None else keys.local(b)
            matrix = matrices.of(term, groups)
            targets = _targets(matrix, term, keys, options, B)
            use_triton = _use_triton(matrix, options)
            with matmul_precision(like.dtype, like.device):
                shifts = _choose_shifts(matrix, targets, of_term)
                sums.append(softmax.exp_sums(matrix, shifts, targets, term.distillation > 0, use_triton))
            states.append((_TermState(term, shifts, targets, use_triton, len(groups)), matrix, groups))

        column_sums = [x for one in sums for x in (one.column_Km, one.column_logit_gap_Km)]
        column_sums = iter(_all_reduce_together(column_sums))
        saved, results = [], []
        for (state, matrix, groups), one in zip(states, sums, strict=True):
            lse, result_2k = _term_loss(state, matrix, one, (next(column_sums), next(column_sums)))
            results.append(result_2k[:, :K])
            saved += [*lse, *groups]
        by_dim_TK, kl_TK = (comm.all_reduce_sum(torch.stack(results, 1)) / (2 * B * LOG2_E)).unbind()

        ctx.save_for_backward(scale_K, *saved, *local.values(), *gathered.values())
        ctx.states, ctx.nested, ctx.num_pairs = [state for state, _, _ in states], nested, (b, B)
        ctx.local_names, ctx.gathered_names = [*local], [*gathered]
        ctx.mark_non_differentiable(by_dim_TK, kl_TK)
        weight_T1 = constant([term.weight for term in sides.terms], by_dim_TK)[:, None]
        distillation_T1 = constant([term.distillation for term in sides.terms], by_dim_TK)[:, None]
        total = ((by_dim_TK + distillation_T1 * kl_TK) * weight_T1 * constant(nested.weights, by_dim_TK)).sum()
        return total, by_dim_TK, kl_TK

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (torch's decorator has no types)
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        scale_K, *saved = ctx.saved_tensors
        rest, (b, B) = iter(saved), ctx.num_pairs
        of_terms = [[next(rest) for _ in range(2 + state.num_groups)] for state in ctx.states]
        local, gathered = ({name: next(rest) for name in names} for names in (ctx.local_names, ctx.gathered_names))
        matrices, grad_scale = TermMatrices(local, gathered, scale_K, ctx.nested), grads[0]
        row_grads: dict[str, torch.Tensor] = {}
        column_grads: dict[str, torch.Tensor] = {}
        log_scale_grad_K = None
        for state, (row_lse, column_lse, *groups) in zip(ctx.states, of_terms, strict=True):
            term, lse, like = state.term, (row_lse, column_lse), local[state.term.rows]
            # Ranks' gradients add up to the whole, and DDP averages them: hence the factor world size.
            weights = [*ctx.nested.weights, 0.0][: len(row_lse)]  # 0 for a teacher
            grad_scale_k = constant(weights, row_lse) * (term.weight * comm.world().size / (2 * B))
            with matmul_precision(like.dtype, like.device):
                found = gradients(
                    matrices.of(term, groups),
                    softmax.SoftmaxProb(state.shifts, *lse, term.distillation),
                    grad_scale_k,
                    state.targets,
                    like.shape[1],
                    distillation=term.distillation,
                    triton_lse=lse if state.use_triton else None,
                )
            log_scale_grad_K = found.log_scale_K if log_scale_grad_K is None else log_scale_grad_K
            _add(row_grads, (term.rows, term.negative_rows), found.row_nD, b)
            _add(column_grads, (term.columns, term.negative_columns), found.column_mD, B)
        for name, grad in reduce_scatter(column_grads, B).items():
            row_grads[name] = row_grads[name].add_(grad) if name in row_grads else grad
        of_sides = (
            row_grads[name].mul_(grad_scale).to(x.dtype) if name in row_grads else None for name, x in local.items()
        )
        assert log_scale_grad_K is not None
        return (grad_scale * log_scale_grad_K / scale_K).to(scale_K.dtype), *[None] * 4, *of_sides


def _add(grads: dict[str, torch.Tensor], names: tuple[str, str | None], both: torch.Tensor, count: int) -> None:
    """Adds the gradients of a side, and of the hard negatives that follow its `count` rows."""
    for name, grad in zip(names, (both[:count], both[count:]), strict=True):
        if name:
            grads[name] = grads[name].add_(grad) if name in grads else grad


def _all_reduce_together(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The sums over ranks of several tensors, by one all-reduce."""
    flat = comm.all_reduce_sum(torch.cat([x.flatten() for x in tensors]))
    return [part.view_as(x) for part, x in zip(flat.split([x.numel() for x in tensors]), tensors, strict=True)]


def _term_loss(
    state: _TermState, matrix: LogitMatrix, sums: softmax.ExpSums, columns: tuple[torch.Tensor, torch.Tensor]
) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The log-sum-exps (base 2) of rows and columns, infinite for hard negatives, which are no queries; and each dim's
    loss and KL divergence, summed over the local pairs and both directions: (2, k). `columns` are `column_Km` and
    `column_logit_gap_Km` of all ranks together."""
    b, B = matrix.num_matching, matrix.num_matching * comm.world().size
    matching_kb = inputs.matching_logits(matrix)
    exp_sum_km, column_gap_km = columns
    row_lse_kn = sums.row_Kn.log2() + _stack_shifts(state.shifts, 0, sums.row_Kn)
    column_lse_km = exp_sum_km.log2() + _stack_shifts(state.shifts, 1, exp_sum_km)
    # Subtract row by row, so that large logits cancel before the sum over rows.
    image_to_text_kb = row_lse_kn[:, :b] - matching_kb
    text_to_image_kb = column_lse_km[:, matrix.matching_columns] - matching_kb
    loss_kb = image_to_text_kb + text_to_image_kb + matching_kb * (2 - state.targets.matching_n[:b])
    loss_kb -= sums.target_logit_Kn[:, :b]
    loss_k, kl_kb = loss_kb.sum(1) - sums.target_logit_Kn[:, b:].sum(1), torch.zeros_like(loss_kb)
    if state.term.distillation:
        row_kl_kn = sums.row_logit_gap_Kn / sums.row_Kn[-1] + row_lse_kn - row_lse_kn[-1]
        column_kl_km = column_gap_km / exp_sum_km[-1] + column_lse_km - column_lse_km[-1]
        kl_kb = row_kl_kn[:, :b] + column_kl_km[:, matrix.matching_columns]
    row_lse_kn[:, b:] = torch.inf
    column_lse_km[:, B:] = torch.inf
    return (row_lse_kn, column_lse_km), torch.stack([loss_k, kl_kb.sum(1)])


def _targets(matrix: LogitMatrix, term: Term, keys: TermKeys | None, options: InfoNCEOptions, B: int) -> Targets:
    """The targets of both directions of a term together."""
    like, local, b = matrix.rows.inverse_norm_Kn, matrix.matching_columns, matrix.num_matching
    positive, smooth = options.same_group == "positive", options.label_smoothing
    matching_n = like.new_full((len(matrix.rows),), 2.0)
    matching_n[b:] = 0
    if not smooth and (keys is None or not positive):
        return Targets(matching_n)
    n, m = len(matrix.rows), len(matrix.columns)
    row_others_N, column_others_m = like.new_zeros(B), like.new_zeros(m)
    candidates = [like.new_full((), count) for count in (m, B + (n - b) * comm.world().size)]
    if keys is not None:
        row_others_N, column_others_m = (one.to(like) for one in keys.others())
        candidates = [one.to(like) for one in keys.candidates()]
    # Hard negatives have no targets of their own.
    others = row_others_N[local], column_others_m[:B]
    if positive:
        targets = [(1 - smooth) / (1 + one) for one in others]
        smoothing = [(smooth / count).expand_as(one) for one, count in zip(others, candidates, strict=True)]
    else:
        targets = [torch.full_like(one, 1 - smooth) for one in others]
        smoothing = [smooth / (count - one) for one, count in zip(others, candidates, strict=True)]

    def padded(rows: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return F.pad(rows, (0, n - b)), F.pad(columns, (0, m - B))

    matching_n[:b] = targets[0] + targets[1][local]
    return Targets(
        matching_n=matching_n,
        mask_same_group=not positive,
        same_group=padded(*targets) if positive else None,
        smoothing=padded(*smoothing) if smooth else None,
    )


def _use_triton(matrix: LogitMatrix, options: InfoNCEOptions) -> bool:
    """Whether to use the Triton kernels. Raises InputError: `kernels: triton` is set, but they do not support this
    device or dtype."""
    like = matrix.rows.inverse_norm_Kn
    supported = like.dtype == torch.float32
    if options.kernels != "triton":
        return options.kernels == "auto" and like.is_cuda and supported and triton_problem(like.device) is None
    require_triton(like.device)
    if not supported:
        raise InputError("loss.kernels: triton supports only float32 or narrower embeddings; leave it at 'auto'.")
    return True


def _shared_shift(scale: float) -> float:
    """The shift of all logits of a dim of this scale (base 2), so that no exponential overflows."""
    return max(0.0, scale - _MAX_EXPONENT)


def _may_underflow(scale: float, lowest: float) -> bool:
    """Whether with the shared shift a row's sum, which has its matching pair's logit, may underflow."""
    return lowest < _shared_shift(scale) + _MIN_EXPONENT


def _choose_shifts(matrix: LogitMatrix, targets: Targets, limits: Limits) -> list[Shift]:
    """For each dim one shared shift if no sum can underflow, else the maximum logit of each row and column. The same
    choice on all ranks."""
    shared = [_shared_shift(scale) for scale, _ in limits]
    shifts: list[Shift] = [*shared]
    needs_max_K = [_may_underflow(*one) for one in limits]
    if any(needs_max_K):
        row_Kb, column_KB = softmax.max_logits(matrix, needs_max_K, targets)
        column_KB = comm.all_reduce_max(column_KB)
        shifts = [(row_Kb[k], column_KB[k]) if needs_max_K[k] else shared[k] for k in range(len(shared))]
    return shifts


def _stack_shifts(shifts: Sequence[Shift], side: int, like_Kn: torch.Tensor) -> torch.Tensor:
    """The row shifts (side 0) or the column shifts (side 1) of all dims: (K, n)."""
    return torch.stack(
        [
            s[side] if isinstance(s, tuple) else like.new_full(like.shape, s)
            for s, like in zip(shifts, like_Kn, strict=True)
        ]
    )
