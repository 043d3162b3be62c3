"""The terms of a loss: which sides of the pairs are compared, and their embeddings and groups on all ranks.

A pair has an image and a text. With second members it has another image or text of the same item too, with hard
negatives rows that match nothing, and with a teacher the embeddings of another model. Each term is a symmetric
InfoNCE between the local rows of one side and all ranks' rows of another; the terms share norms and collectives.

Shapes: b local pairs (of this rank), B = b * world_size, n rows and m columns of a term's logits (with its hard
negatives), D embedding width, T width of a teacher's embedding, K dims, G keys of a group.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from pydantic import Field

from mmrl.distributed import comm
from mmrl.errors import InputError
from mmrl.hardware import reads_at_once
from mmrl.losses import inputs
from mmrl.losses.inputs import Groups, count_same_group
from mmrl.losses.sweep import LOG2_E, EmbeddingBlocks, LogitMatrix, constant, split_into_blocks
from mmrl.nesting import Nesting
from mmrl.settings import Settings, machine_field


@dataclass(frozen=True)
class SecondMembers:
    """Another image or another text of each pair's item."""

    image_bD: torch.Tensor | None = None
    text_bD: torch.Tensor | None = None
    groups: torch.Tensor | None = None
    """As the `groups` of the loss, of the second members."""


@dataclass(frozen=True)
class HardNegatives:
    """Wrong images and texts, any equal number per pair: images are compared with all texts, texts with all images."""

    image_nD: torch.Tensor | None = None
    text_nD: torch.Tensor | None = None
    groups: torch.Tensor | None = None
    """As the `groups` of the loss, of these rows."""
    valid_image_n: torch.Tensor | None = None
    valid_text_n: torch.Tensor | None = None
    """False for rows that only fill the tensor: they are masked."""


@dataclass(frozen=True)
class Teacher:
    """Another model's embeddings of the pairs, whose softmaxes the students' are drawn to at every dim."""

    image_bT: torch.Tensor
    text_bT: torch.Tensor
    logit_scale: float
    """The teacher's, already exponentiated."""
    weight: float
    """Of KL(teacher's softmax || softmax of a dim), added to each dim's loss."""


@dataclass(frozen=True)
class Term:
    """One symmetric InfoNCE. `rows`, `columns` … are names of sides."""

    name: str
    rows: str
    columns: str
    weight: float = 1.0
    negative_rows: str | None = None
    negative_columns: str | None = None
    teacher_scale: float | None = None
    """The teacher's logit scale; None without a teacher."""
    distillation: float = 0.0

    def scales(self, scale_K: torch.Tensor) -> torch.Tensor:
        """The logit scales of the dims, and the teacher's."""
        if self.teacher_scale is None:
            return scale_K
        return torch.cat([scale_K, constant((self.teacher_scale,), scale_K)])

    def without_negatives(self) -> "Term":
        """The term without its hard negatives."""
        return replace(self, negative_rows=None, negative_columns=None)


class InfoNCEOptions(Settings):
    """Options of the symmetric InfoNCE."""

    same_group: Literal["mask", "positive"] = "mask"
    """Other pairs of one group: mask them (no negatives), or make them positives that share the target equally."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of each target that is spread evenly over all unmasked pairs of its row or column."""
    distillation: float = Field(default=0.0, ge=0)
    """Weight of KL(softmax of the largest dim, detached || softmax of the dim), added to each smaller dim's loss."""
    image_text: float = Field(default=1.0, ge=0)
    """Weight of the InfoNCE between images and texts."""
    image_image: float = Field(default=0.0, ge=0)
    """Weight of the InfoNCE between two images of one group, or between an image and its second augmentation where the
    group has one image (see data.augment.second)."""
    text_text: float = Field(default=0.0, ge=0)
    """Weight of the InfoNCE between two captions of one sample or group."""
    kernels: Literal["auto", "torch", "triton"] = machine_field("auto")
    """PyTorch operations or fused Triton kernels between the matrix products. 'auto' uses the kernels on a GPU where
    they run: they need a C compiler, and embeddings in float32 or narrower."""

    @property
    def term_weights(self) -> dict[str, float]:
        """The weights of the terms by their names."""
        return {"image_text": self.image_text, "image_image": self.image_image, "text_text": self.text_text}


DEFAULT_OPTIONS = InfoNCEOptions()


@dataclass(frozen=True)
class Sides:
    """The local embeddings by the names of their sides, their groups, and the terms that compare them."""

    embeddings: dict[str, torch.Tensor]
    terms: tuple[Term, ...]
    """The logit scales descend the first one alone."""
    keys: dict[str, torch.Tensor] = field(default_factory=dict)
    """int64 (rows, G) of each side; empty without groups."""
    filled: tuple[str, ...] = ()
    """The sides whose keys end with one more: 0 for rows that only fill the tensor, else 1."""

    @property
    def columns(self) -> list[str]:
        """The sides that all ranks need, each once."""
        names = [name for term in self.terms for name in (term.columns, term.negative_columns)]
        names += ["teacher_text"] if "teacher_text" in self.embeddings else []
        return list(dict.fromkeys(name for name in names if name))

    def mapped(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Sides":
        """The sides with a function applied to the rows of all of them but the teacher's."""
        own = {name: x for name, x in self.embeddings.items() if not name.startswith("teacher")}
        parts = function(torch.cat([*own.values()])).split([len(x) for x in own.values()])
        return replace(self, embeddings=self.embeddings | dict(zip(own, parts, strict=True)))


def make_sides(
    image_bD: torch.Tensor | None,
    text_bD: torch.Tensor | None,
    groups: Groups | None,
    options: InfoNCEOptions,
    second: SecondMembers | None = None,
    negatives: HardNegatives | None = None,
    teacher: Teacher | None = None,
    check_finite: bool = False,
) -> Sides:
    """The sides and terms of a loss. Raises InputError: a term has a weight but not its sides; shapes or dtypes that do
    not match."""
    second, negatives, weights = second or SecondMembers(), negatives or HardNegatives(), options.term_weights
    given = {
        "image": image_bD,
        "text": text_bD,
        "second_image": second.image_bD,
        "second_text": second.text_bD,
        "negative_image": negatives.image_nD,
        "negative_text": negatives.text_nD,
    }
    embeddings = {name: x for name, x in given.items() if x is not None}
    is_valid = {"negative_image": negatives.valid_image_n, "negative_text": negatives.valid_text_n}
    valid = {name: one for name, one in is_valid.items() if name in embeddings and one is not None}
    pair = [x for x in (image_bD, text_bD, second.image_bD, second.text_bD) if x is not None][:2]
    if len(pair) < 2:
        raise InputError("loss: give the embeddings of two sides, such as images and texts.")
    inputs.check_inputs(pair[0], pair[1], groups, check_finite)
    _check_more(embeddings, pair[0], teacher)
    if valid and options.same_group == "positive":
        raise InputError("negatives: valid_image_n and valid_text_n mask rows; use same_group: mask.")
    if teacher is not None:
        embeddings |= {"teacher_image": teacher.image_bT.detach(), "teacher_text": teacher.text_bT.detach()}
    terms = tuple(
        Term(name, rows, columns, weights[name], distillation=options.distillation)
        for name, rows, columns in (
            ("image_text", "image", "text"),
            ("image_image", "image", "second_image"),
            ("text_text", "text", "second_text"),
        )
        if weights[name]
    )
    if not terms:
        raise InputError("loss: at least one of image_text, image_image and text_text must be above 0.")
    for term in terms:
        for name in (term.rows, term.columns):
            if name not in embeddings:
                raise InputError(f"loss: the term {term.name} needs {name.replace('_', ' ')} embeddings.")
    main = terms[0]  # of which the others have no part: hard negatives and the teacher
    of_columns = f"negative_{main.columns.removeprefix('second_')}"
    main = replace(main, negative_columns=of_columns if of_columns in embeddings else None)
    if main.name == "image_text":
        main = replace(main, negative_rows="negative_image" if "negative_image" in embeddings else None)
        if teacher is not None:
            main = replace(main, teacher_scale=teacher.logit_scale, distillation=teacher.weight)
    terms = (main, *terms[1:])
    used = {name for term in terms for name in (term.rows, term.columns, term.negative_rows, term.negative_columns)}
    used |= {"teacher_image", "teacher_text"} if terms[0].teacher_scale is not None else set()
    embeddings = {name: x for name, x in embeddings.items() if name in used}
    return Sides(embeddings, terms, _keys_of(embeddings, groups, second.groups, negatives.groups, valid), tuple(valid))


def _keys_of(
    embeddings: Mapping[str, torch.Tensor],
    groups: Groups | None,
    second: torch.Tensor | None,
    negative: torch.Tensor | None,
    valid: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """`Sides.keys`; rows without groups are in none."""
    if groups is None and not valid:
        return {}
    image, text = groups if isinstance(groups, tuple) else (groups, groups)
    of_side = {"image": image, "text": text, "second_image": second, "second_text": second}
    of_side |= {"negative_image": negative, "negative_text": negative}
    num_keys = 1 if image is None else image.reshape(len(image), -1).shape[1]
    keys = {}
    for name, group in of_side.items():
        if name in embeddings:
            x = embeddings[name]
            group = x.new_full((len(x), num_keys), -1, dtype=torch.int64) if group is None else group
            more = [valid[name].to(group.device).long()[:, None]] if name in valid else []
            keys[name] = torch.cat([group.reshape(len(x), -1), *more], 1)
    return keys


def _check_more(embeddings: Mapping[str, torch.Tensor], like: torch.Tensor, teacher: Teacher | None) -> None:
    b, D = like.shape
    for name, x in embeddings.items():
        rows_fit = len(x) % b == 0 if name.startswith("negative") else len(x) == b
        if x.ndim != 2 or x.shape[1] != D or not rows_fit or x.dtype != like.dtype:
            wanted = f"a multiple of {b} rows of {D}" if name.startswith("negative") else f"({b}, {D})"
            raise InputError(f"{name}: {x.dtype} of shape {tuple(x.shape)}; expected {wanted}, {like.dtype}.")
    if teacher is None:
        return
    shapes = tuple(teacher.image_bT.shape), tuple(teacher.text_bT.shape)
    if shapes[0] != shapes[1] or len(shapes[0]) != 2 or shapes[0][0] != b:
        raise InputError(f"teacher: embeddings of shapes {shapes[0]} and {shapes[1]}; both must be ({b}, T).")
    if any(name.startswith("negative") for name in embeddings):
        raise InputError("teacher: it has no embeddings of hard negatives; leave one of both out.")


def gather(local: Mapping[str, torch.Tensor], names: Sequence[str], b: int) -> dict[str, torch.Tensor]:
    """All ranks' rows of these sides, each with a multiple of `b` rows: one all-gather per dtype."""
    result: dict[str, torch.Tensor] = {}
    for dtype in dict.fromkeys(local[name].dtype for name in names):
        some = [name for name in names if local[name].dtype == dtype]
        flat = [local[name].reshape(b, -1) for name in some]
        gathered = comm.all_gather_rows(flat[0] if len(flat) == 1 else torch.cat(flat, 1))
        parts = gathered.split([x.shape[1] for x in flat], 1)
        result |= {name: part.reshape(-1, local[name].shape[1]) for name, part in zip(some, parts, strict=True)}
    return result


def reduce_scatter(of_columns: Mapping[str, torch.Tensor], B: int) -> dict[str, torch.Tensor]:
    """The sums over ranks of each side's gradients, for the local rows: one reduce-scatter."""
    flat = [x.reshape(B, -1) for x in of_columns.values()]
    local = comm.reduce_scatter_sum(flat[0] if len(flat) == 1 else torch.cat(flat, 1))
    parts = local.split([x.shape[1] for x in flat], 1)
    return {name: part.reshape(-1, x.shape[1]) for (name, x), part in zip(of_columns.items(), parts, strict=True)}


@dataclass(frozen=True)
class TermKeys:
    """The groups of a term's pairs, and which of them are hard negatives that only fill a tensor."""

    row_GN: torch.Tensor
    """Of all ranks' rows, the matching ones first; of these, row i matches column i."""
    column_Gm: torch.Tensor
    num_matching: int
    row_valid_N: torch.Tensor | None = None
    column_valid_m: torch.Tensor | None = None

    def local(self, b: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys of the local rows (G, n) and of all columns (G, m), negative values replaced so that none are equal.

        One more key is equal for rows that only fill the tensor and all columns, and for such columns and all rows.
        """
        row_GN, column_Gm = self.row_GN.clamp(min=-1), torch.where(self.column_Gm < 0, -2, self.column_Gm)
        if self.row_valid_N is not None and self.column_valid_m is not None:
            row_GN = torch.cat([row_GN, torch.where(self.row_valid_N, 1, 2)[None]])
            column_Gm = torch.cat([column_Gm, torch.where(self.column_valid_m, 2, 1)[None]])
        num_negatives = (row_GN.shape[1] - self.num_matching) * b // self.num_matching
        start = self.num_matching + comm.world().rank * num_negatives
        parts = [row_GN[:, comm.local_rows(b)], row_GN[:, start : start + num_negatives]]
        return torch.cat(parts, 1).contiguous(), column_Gm.contiguous()

    def candidates(self) -> tuple[torch.Tensor, torch.Tensor]:
        """For each row the number of columns that do not only fill the tensor, and for each column that of rows: ()."""
        counts = self.column_Gm.shape[1], self.row_GN.shape[1]
        valid = self.column_valid_m, self.row_valid_N
        columns, rows = (
            self.row_GN.new_full((), count) if one is None else one.sum()
            for count, one in zip(counts, valid, strict=True)
        )
        return columns, rows

    def others(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The number of columns in each row's group but its matching one, and of rows in each column's: (N,), (m,)."""
        row_GN, column_Gm = self.row_GN, self.column_Gm
        if self.row_valid_N is not None and self.column_valid_m is not None:
            row_GN, column_Gm = row_GN.where(self.row_valid_N, -1), column_Gm.where(self.column_valid_m, -1)
        b = self.num_matching
        return count_same_group(row_GN, column_Gm, b), count_same_group(column_Gm, row_GN, b)


def gather_keys(sides: Sides, b: int, B: int) -> list[TermKeys | None]:
    """The keys of each term; None for a term without. Keys that no pairs share are left out."""
    if not sides.keys:
        return [None] * len(sides.terms)
    key_of = gather(sides.keys, [*sides.keys], b)
    is_valid = {name: torch.ones(len(keys), dtype=torch.bool, device=keys.device) for name, keys in key_of.items()}
    is_valid |= {name: key_of[name][:, -1] > 0 for name in sides.filled}
    key_of |= {name: key_of[name][:, :-1] for name in sides.filled}
    result: list[TermKeys | None] = []
    for term in sides.terms:
        names = [[term.rows, term.negative_rows], [term.columns, term.negative_columns]]
        rows, columns = ([name for name in side if name] for side in names)
        row_GN, column_Gm = (torch.cat([key_of[name] for name in side]).T.contiguous() for side in (rows, columns))
        if reads_at_once(row_GN):
            pairs = zip(row_GN.split(1), column_Gm.split(1), strict=True)
            shared = [bool(count_same_group(row_1N, column_1m, B).any()) for row_1N, column_1m in pairs]
            row_GN, column_Gm = row_GN[shared], column_Gm[shared]
        if any(name in sides.filled for name in (*rows, *columns)):
            valid = (torch.cat([is_valid[name] for name in side]) for side in (rows, columns))
            result.append(TermKeys(row_GN, column_Gm, B, *valid))
        else:
            result.append(TermKeys(row_GN, column_Gm, B) if len(row_GN) else None)
    return result


class TermMatrices:
    """The logit matrices of all terms: local rows with all columns. Each side is split and normalised once."""

    def __init__(
        self,
        local: Mapping[str, torch.Tensor],
        gathered: Mapping[str, torch.Tensor],
        scale_K: torch.Tensor,
        nested: Nesting,
    ) -> None:
        self._local, self._gathered, self._dims = local, gathered, nested.dims
        self._scale_K = scale_K.detach().double()
        self._blocks: dict[str, EmbeddingBlocks] = {}

    def of(self, term: Term, groups: Sequence[torch.Tensor]) -> LogitMatrix:
        """The matrix of a term; `groups`, if any, are of the local rows and of all columns."""
        rows, columns = self._rows(term.rows), self._columns(term.columns)
        b, num_negatives = len(rows), 0
        if term.negative_rows:
            rows = rows.followed_by(negative := self._rows(term.negative_rows))
            num_negatives = len(negative)
        if term.negative_columns:
            columns = columns.followed_by(self._columns(term.negative_columns))
        has_teacher = term.teacher_scale is not None
        if has_teacher:
            rows, columns = rows.beside(self._rows("teacher_image")), columns.beside(self._columns("teacher_text"))
        scale_K = (term.scales(self._scale_K) * LOG2_E).to(rows.inverse_norm_Kn)
        return LogitMatrix(
            rows, columns, scale_K, comm.local_rows(b).start, *groups,
            num_negative_rows=num_negatives, has_teacher=has_teacher,
        )  # fmt: skip

    def _columns(self, name: str) -> EmbeddingBlocks:
        if name not in self._blocks:
            self._blocks[name] = self._split(name, self._gathered[name])
        return self._blocks[name]

    def _rows(self, name: str) -> EmbeddingBlocks:
        if name in self._gathered:
            return self._columns(name).part(comm.local_rows(len(self._local[name])))
        if name not in self._blocks:
            self._blocks[name] = self._split(name, self._local[name])
        return self._blocks[name]

    def _split(self, name: str, x: torch.Tensor) -> EmbeddingBlocks:
        return split_into_blocks(x, [x.shape[1]] if name.startswith("teacher") else self._dims)
