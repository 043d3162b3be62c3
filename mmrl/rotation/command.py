"""`mmrl rotate`: any trained pair of towers made cuttable, without training.

One orthogonal matrix, found from the embeddings of pictures and texts together, is folded into both projections. Every
similarity of whole vectors stays what it was. The matrix begins as the principal directions of both modalities, and is
then learnt by the nested loss of the prefixes, on vectors alone (learned.py). Without that (steps=0) every
prefix is what uncentred principal component analysis keeps in so many numbers.

Shapes: N pictures or texts, D the embedding's width.
"""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from mmrl import nesting
from mmrl.data.samples import SampleReader
from mmrl.data.sources import open_reader
from mmrl.distributed import comm
from mmrl.errors import InputError, RunStopped
from mmrl.evaluate import sets
from mmrl.evaluate.sets import Embedded
from mmrl.model import bundle
from mmrl.model.bundle import Bundle
from mmrl.rotation import learned, moments
from mmrl.rotation.moments import Moments

# An orthogonal matrix changes no similarity; what is left is the rounding of weights and products in float32.
WORST_ERROR = 1e-6
_LEAST_DIM = 8  # of the dims that a model gets which has none
_LEAST_GAIN = 1e-4  # in mean mAP: what two decimals of a per cent show
_ENOUGH = 10  # samples for each number of the embedding, below which a note is due

Result = dict[str, Any]


def rotate_model(
    model: str,
    shards: str,
    out: Path,
    dims: Sequence[int] | None = None,
    validate: str | None = None,
    keep: int | None = None,
    samples: int | None = None,
    captions: int | None = None,
    steps: int = learned.STEPS,
    quiet: bool = False,
) -> Result:
    """Writes MODEL to OUT, turned so that its prefixes are embeddings; returns its manifest.

    Several processes (torchrun) divide the shards; the main one writes.

    Args:
        dims: what OUT is to be cut to, as its manifest tells; those that MODEL was trained for, else halves down to 8.
        validate: shards by which it is decided whether, and from which number on, turning helps. Nothing is written
            where it does not.
        keep: leave the first so many numbers as they are, such as dims that were trained and are to stay. Left out,
            none; with `validate`, as many as serve best.
        samples: read about so many, spread evenly over the shards; all when left out.
        captions: texts of each sample that are used, the plain one first; all when left out.
        steps: in which the rotation is learnt, after the principal directions; 0 leaves these.

    Raises:
        InputError: no such model or shards, too few samples, dims that it does not have, vectors that are not finite,
            OUT exists and is not empty.
        RunStopped: turning does not help on `validate`, or similarities did not stay what they were.
    """
    world = comm.start()
    console = Console(quiet=quiet or not world.is_rank_0)
    _check_out(out)
    reader = open_reader(shards)
    validation = None if validate is None else open_reader(validate)
    whole = bundle.open_model(model)
    whole.model.to(world.device)
    dims = _checked_dims(whole, dims)
    _check_keep(whole, keep)
    _check_count(shards, len(reader), whole.dim)
    _tell_before(console, model, whole, keep, validate)
    found = moments.of_set(model, whole, reader, samples, captions, console, with_pairs=steps > 0)
    _check_count(shards, found.images, whole.dim)
    _tell_after(console, whole.dim, found)
    candidates = [keep or 0]
    if validation is not None and keep is None:
        candidates = [0, *(dim for dim in whole.nested_dims if dim < whole.dim)]
    scale = whole.model.logit_scale[-1].item()
    turns = {kept: learned.best(found.moment_DD, found.pairs, scale, dims, kept, steps) for kept in candidates}
    kept, judged = candidates[0], None
    if validation is not None:
        rotations = {kept: rotation_DD for kept, (rotation_DD, _) in turns.items()}
        kept, judged = _judge(whole, rotations, validation, dims, captions, console)
    rotation_DD, learnt = turns[kept]
    if learnt is not None:
        console.print(learnt.told(), soft_wrap=True, highlight=False)
    about = {
        "moments": "mean of x x^T over unit vectors, uncentred; pictures and texts weigh one half each",
        "images": found.images,
        "texts": found.texts,
        "kept_as_they_were": kept,
        "effective_rank": nesting.effective_rank(found.moment_DD),
        "share_of_second_moment": _shares(rotation_DD, found.moment_DD, dims),
        **({} if learnt is None else {"learnt": learnt.as_json()}),
        **({} if judged is None else {"validation": {"shards": validate, **judged}}),
    }
    manifest, refusal = comm.broadcast_object(
        _write(model, whole, rotation_DD, out, dims, about, reader) if world.is_rank_0 else None
    )
    if refusal is not None:
        raise RunStopped(refusal)
    console.print(_summary(out, manifest), highlight=False, markup=False, soft_wrap=True)
    return manifest


# ------------------------------------------------------------------------------------------------ checks, notes


def _check_out(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"out: {out} exists and is not empty; name a new folder.")


def _checked_dims(whole: Bundle, dims: Sequence[int] | None) -> list[int]:
    """Ascending."""
    if dims is not None:
        nesting.check_dims(dims, whole.dim)
        return sorted(dims)
    if _is_nested(whole):
        return sorted({*whole.nested_dims, whole.dim})
    halves = [whole.dim]
    while halves[0] % 2 == 0 and halves[0] // 2 >= _LEAST_DIM:
        halves.insert(0, halves[0] // 2)
    return halves


def _is_nested(whole: Bundle) -> bool:
    return any(dim < whole.dim for dim in whole.nested_dims)


def _check_keep(whole: Bundle, keep: int | None) -> None:
    if keep is not None and not 0 <= keep < whole.dim - 1:
        raise InputError(
            f"keep: {keep} of {whole.dim} numbers leaves nothing to turn; give 0 to {whole.dim - 2}, such as the "
            "largest dim that is to stay as it was trained."
        )


def _check_count(shards: str, count: int, dim: int) -> None:
    if count < dim:
        raise InputError(
            f"shards: {shards} has {count:,} usable samples, too few to find {dim:,} directions; give at least "
            f"{dim:,}, better {_ENOUGH * dim:,}."
        )


def _tell_before(console: Console, model: str, whole: Bundle, keep: int | None, validate: str | None) -> None:
    if model.startswith("open_clip:") and model.count(":") == 1:
        console.print(f"Note: no weights are named ({model}:PRETRAINED), so the towers are random.", markup=False)
    if _is_nested(whole) and not keep and validate is None:
        trained = ", ".join(str(dim) for dim in whole.nested_dims)
        console.print(
            f"Note: this model was trained to be cut at {trained}. Turning may lower its smallest dims: --validate "
            "SHARDS measures it and keeps those that are better as they are.",
            soft_wrap=True,
            highlight=False,
        )


def _tell_after(console: Console, dim: int, found: Moments) -> None:
    if found.bad:
        first = found.bad[0]
        console.print(f"{len(found.bad):,} bad samples left out, such as {first.key}: {first.reason}", markup=False)
    if found.images < _ENOUGH * dim:
        console.print(
            f"Note: {found.images:,} samples for {dim:,} directions: the weakest of them are chance. "
            f"{_ENOUGH * dim:,} are better.",
            soft_wrap=True,
            highlight=False,
        )


# ------------------------------------------------------------------------------------------------ validation


def _judge(
    whole: Bundle,
    turns: dict[int, torch.Tensor],
    validation: SampleReader,
    dims: Sequence[int],
    captions: int | None,
    console: Console,
) -> tuple[int, Result]:
    """Which of the rotations is best on validation data, by the mean of mAP over dims and directions, and its scores.

    `turns` holds them by the number of leading entries that each leaves alone. Since a rotation is linear, the set is
    embedded once.

    Raises:
        RunStopped: none is better than no rotation.
    """
    with moments.progress_bar(console) as progress:
        task = progress.add_task("validating", total=len(validation))
        embedded = sets.embed(
            validation,
            whole.model,
            whole.image_spec,
            whole.tokenise,
            captions=captions,
            on_batch=lambda count: progress.advance(task, count),
        )
    before = sets.score(embedded, dims)
    after = {kept: sets.score(_turned(embedded, rotation_DD), dims) for kept, rotation_DD in turns.items()}
    before, after = comm.broadcast_object((before, after))  # one verdict, whatever the machines round
    best = max(after, key=lambda kept: _mean_map(after[kept]))
    helps = _mean_map(after[best]) >= _mean_map(before) + _LEAST_GAIN
    for kept, scores in after.items():
        turned = f"all but the first {kept} numbers" if kept else "all numbers"
        console.print(
            f"turning {turned}: mean mAP {100 * _mean_map(before):.2f} → {100 * _mean_map(scores):.2f}",
            highlight=False,
        )
    shown = best if helps else min(after)
    console.print(_before_and_after(before, after[shown], shown))
    if not helps:
        raise RunStopped(
            f"Turning does not help on {len(embedded.keys):,} validation pictures (mean mAP over the dims "
            f"{100 * _mean_map(before):.2f} as it is, {100 * _mean_map(after[best]):.2f} at best): nothing was "
            "written; go on with the model as it is."
        )
    return best, {"before": before["dims"], "after": after[best]["dims"]}


def _turned(embedded: Embedded, rotation_DD: torch.Tensor) -> Embedded:
    image_ND, text_MD = (
        (rows.double() @ rotation_DD.T).to(rows.dtype) for rows in (embedded.image_ND, embedded.text_MD)
    )
    return replace(embedded, image_ND=image_ND, text_MD=text_MD)


def _mean_map(scores: Result) -> float:
    values = [one["mAP"] for directions in scores["dims"].values() for one in _both(directions)]
    return sum(values) / len(values)


def _both(directions: Result) -> list[dict[str, float]]:
    return [directions["image_to_text"], directions["text_to_image"]]


def _before_and_after(before: Result, after: Result, kept: int) -> Table:
    turned = f"all but the first {kept} numbers turned" if kept else "all numbers turned"
    table = Table(
        title=f"{before['num_images']:,} images, {before['num_texts']:,} texts; mean of both directions, in %"
    )
    table.caption = f"before → after, {turned}"
    for column in ("dim", "R@1", "R@10", "mAP"):
        table.add_column(column, justify="right")
    for dim, directions in before["dims"].items():
        pairs = [
            [100 * sum(one[metric] for one in _both(scores)) / 2 for scores in (directions, after["dims"][dim])]
            for metric in ("R@1", "R@10", "mAP")
        ]
        table.add_row(dim, *(f"{old:.1f} → {new:.1f}" for old, new in pairs))
    return table


def _shares(rotation_DD: torch.Tensor, moment_DD: torch.Tensor, dims: Sequence[int]) -> dict[str, float]:
    """How much of the mean squared length (1, of unit vectors) each prefix keeps."""
    kept_D = (rotation_DD @ moment_DD @ rotation_DD.T).diagonal()
    return {str(dim): float(kept_D[:dim].sum() / kept_D.sum()) for dim in dims}


# ------------------------------------------------------------------------------------------------ writing


def _write(
    model: str,
    whole: Bundle,
    rotation_DD: torch.Tensor,
    out: Path,
    dims: Sequence[int],
    about: Result,
    reader: SampleReader,
) -> tuple[Result | None, str | None]:
    """The manifest of what was written, or why nothing was."""
    turned = replace(whole, nested_dims=tuple(dims))
    beside = out.parent / f".{out.name}.partial"
    shutil.rmtree(beside, ignore_errors=True)
    try:
        manifest = bundle.save(turned, beside, bundle.rotated_state(whole, rotation_DD), _source(model, whole))
        worst = _worst_difference(whole, bundle.load(beside), reader)
        if not worst <= WORST_ERROR:
            return None, f"{model} turned differs from itself by {worst:.1e} in its similarities; nothing was written."
        manifest["rotation"] = about
        manifest["contract"] = {
            "equals": f"the source's similarities of all {whole.dim} numbers, on samples of the shards",
            "worst_absolute_difference": worst,
            "allowed": WORST_ERROR,
        }
        bundle.write_manifest(beside, manifest)
        if out.exists():
            out.rmdir()
        beside.rename(out)
    except OSError as error:
        return None, f"{out} could not be written ({error})."
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return manifest, None


def _source(model: str, whole: Bundle) -> Result:
    """Where OUT comes from. Not as `weights_sha256`, which tells encoders whose vectors agree: these do not."""
    source: Result = {"model": Path(model).name, "dim": whole.dim}
    if not model.startswith("open_clip:"):
        manifest = bundle.read_manifest(bundle.find(model))
        source["rotated_from"] = {**manifest["source"], "weights_sha256": bundle.origin(manifest)}
    return source


@torch.inference_mode()
def _worst_difference(whole: Bundle, turned: Bundle, reader: SampleReader) -> float:
    """The greatest change of a similarity among the pictures and texts of the first part that has any."""
    turned.model.to(comm.world().device)
    batch = next(batch for batch in moments.read(whole, reader) if batch.keys)
    old, new = (_similarities(*moments.embed(encoder, batch)) for encoder in (whole, turned))
    return float((old - new).abs().max())


def _similarities(image_ND: torch.Tensor, text_ND: torch.Tensor) -> torch.Tensor:
    """Of all vectors with all, of both modalities, in float64."""
    unit = F.normalize(torch.cat([image_ND, text_ND]).double(), dim=-1)
    return unit @ unit.T


def _summary(out: Path, manifest: Result) -> str:
    about = manifest["rotation"]
    shares = ", ".join(f"{dim}: {100 * share:.1f}" for dim, share in reversed(about["share_of_second_moment"].items()))
    worst = manifest["contract"]["worst_absolute_difference"]
    return (
        f"{out}: {manifest['dim']}-d encoder, turned by {about['images']:,} pictures and {about['texts']:,} texts; "
        f"similarities changed by {worst:.0e} at most\n"
        f"effective rank {about['effective_rank']:.1f} of {manifest['dim']}; % of the squared length kept at {shares}"
    )
