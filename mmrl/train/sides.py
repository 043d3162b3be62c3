"""What the towers encode in a step, and the sides of the loss that their embeddings belong to.

Each micro-batch goes through a tower once: its rows, then its second members, then its hard negatives.

Shapes: m pairs of a micro-batch, b of this process, n hard negatives of all of them, D the embedding's width, G keys of
a group.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from mmrl.data.batches import Batch, Tokenise
from mmrl.engine.engine import Engine, Rows
from mmrl.inference import teacher as teachers
from mmrl.inference.teacher import TeacherConfig
from mmrl.losses.terms import HardNegatives, SecondMembers, Teacher

Kind = Literal["image", "text"]


@dataclass(frozen=True)
class TeacherOfRun:
    """The teacher of a run, for batches whose texts end with its token ids."""

    teacher: teachers.Teacher
    weight: float
    context_length: int
    """The student's tokens of a text, which come before the teacher's."""

    def __call__(self, micro_batches: Sequence[Batch], engine: Engine) -> Teacher:
        """The teacher's side of the pairs."""
        images, texts = [], []
        for batch in micro_batches:
            images.append(self.teacher.images(engine.to_device(batch.image), batch.keys))
            texts.append(self.teacher.texts(engine.to_device(batch.text)[:, self.context_length :], batch.caption))
        return Teacher(torch.cat(images), torch.cat(texts), self.teacher.logit_scale, self.weight)


class _TokenisedForBoth:
    """Token ids for the student, followed by those for the teacher: (M, L). A class, so that it can be pickled."""

    def __init__(self, student: Tokenise, teacher: Tokenise) -> None:
        self._student, self._teacher = student, teacher

    def __call__(self, texts: list[str]) -> torch.Tensor:
        return torch.cat([self._student(texts), self._teacher(texts)], 1)


def open_teacher(
    config: TeacherConfig | None, engine: Engine, tokenise: Tokenise
) -> tuple[TeacherOfRun | None, Tokenise]:
    """The teacher of a run, if its config has one, and the tokeniser of its stream.

    Raises:
        InputError: the teacher's model or embeddings cannot be opened.
    """
    if config is None:
        return None, tokenise
    teacher = teachers.open_teacher(config, engine.device, engine.precision)
    of_run = TeacherOfRun(teacher, config.weight, tokenise([""]).shape[1])
    return of_run, tokenise if teacher.tokenise is None else _TokenisedForBoth(tokenise, teacher.tokenise)


def tower_inputs(batch: Batch, context_length: int | None = None) -> tuple[Rows | None, Rows | None]:
    """All rows of a micro-batch for the image tower and for the text tower; None for a tower without.

    Args:
        context_length: tokens of a text, where a teacher's follow them.
    """
    images, texts = _rows_of(batch, "image"), _rows_of(batch, "text")
    if context_length is not None:
        texts = {name: text_L[:, :context_length] for name, text_L in texts.items()}
    return _joined(images), _joined(texts)


def split(
    image_D: torch.Tensor | None, text_D: torch.Tensor | None, micro_batches: Sequence[Batch]
) -> tuple[torch.Tensor | None, torch.Tensor | None, SecondMembers | None, HardNegatives | None]:
    """The images and texts of the pairs, (b, D), their second members and their hard negatives, from the embeddings of
    all micro-batches' rows."""
    of_kind: dict[Kind, dict[str, torch.Tensor]] = {
        "image": _split(image_D, micro_batches, "image"),
        "text": _split(text_D, micro_batches, "text"),
    }
    image, text = of_kind["image"], of_kind["text"]
    second = negatives = None
    if micro_batches[0].second is not None:
        second = SecondMembers(image.get("second"), text.get("second"), groups(micro_batches, "second"))
    if micro_batches[0].negatives is not None:
        negatives = HardNegatives(
            image.get("negatives"),
            text.get("negatives"),
            groups(micro_batches, "negatives"),
            _valid(micro_batches, "valid_image"),
            _valid(micro_batches, "valid_text"),
        )
    return image.get("first"), text.get("first"), second, negatives


def groups(micro_batches: Sequence[Batch], which: Literal["first", "second", "negatives"] = "first") -> torch.Tensor:
    """The groups of the pairs, (b, G), of their second members, or of their hard negatives, (n, G)."""
    return torch.cat([_keys(batch, which) for batch in micro_batches])


def _keys(batch: Batch, which: str) -> torch.Tensor:
    """The group and the text of each row. With second texts also both texts of its pair: if two pairs have an equal
    question or an equal passage, the other member of each matches both."""
    part: Batch = batch if which == "first" else getattr(batch, which)
    if batch.second is None or batch.second.text is None:
        return part.groups
    of_pair = (part, part) if which == "negatives" else (batch, batch.second)
    captions = [one.caption[:, None] for one in of_pair if one.caption is not None]
    return torch.cat([part.groups, *captions], 1)


def _rows_of(batch: Batch, kind: Kind) -> dict[str, Any]:
    parts = {"first": batch, "second": batch.second, "negatives": batch.negatives}
    rows = {name: getattr(part, kind) for name, part in parts.items() if part is not None}
    return {name: x for name, x in rows.items() if x is not None}


def _joined(rows: dict[str, Any]) -> Rows | None:
    if len(rows) <= 1:
        return next(iter(rows.values()), None)
    return tuple(one for x in rows.values() for one in (x if isinstance(x, tuple) else (x,)))


def _split(x_D: torch.Tensor | None, micro_batches: Sequence[Batch], kind: Kind) -> dict[str, torch.Tensor]:
    if x_D is None:
        return {}
    sizes = {name: _length(rows) for name, rows in _rows_of(micro_batches[0], kind).items()}
    if len(sizes) == 1:
        return dict.fromkeys(sizes, x_D)
    x_MrD = x_D.view(len(micro_batches), -1, x_D.shape[1])
    parts = x_MrD.split([*sizes.values()], 1)
    return {name: part.reshape(-1, x_D.shape[1]) for name, part in zip(sizes, parts, strict=True)}


def _length(rows: Rows) -> int:
    return sum(map(len, rows)) if isinstance(rows, tuple) else len(rows)


def _valid(micro_batches: Sequence[Batch], name: str) -> torch.Tensor | None:
    flags = [getattr(batch.negatives, name) for batch in micro_batches]
    return None if flags[0] is None else torch.cat(flags)
