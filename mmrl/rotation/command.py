"""`mmrl rotate`: rotate a trained encoder so that its embeddings can be truncated, without training it.

One orthogonal matrix is computed from the embeddings of images and texts and folded into both projections. Full-dim
similarities do not change. The matrix starts as the principal directions of both modalities (uncentred PCA) and is then
learned by the nested loss of the prefixes, on embeddings only (learned.py). steps=0 stops at PCA.

Shapes: N images or texts, D the embedding's width.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console

from mmrl import nesting
from mmrl.data.samples import SampleReader
from mmrl.data.sources import open_reader
from mmrl.distributed import comm
from mmrl.errors import InputError, RunStopped
from mmrl.evaluate import sets
from mmrl.evaluate.directions import CROSS_MODAL
from mmrl.evaluate.report.tables import all_tables
from mmrl.evaluate.sets import Embedded
from mmrl.inference.evaluated import require_both_towers
from mmrl.model import bundle
from mmrl.model.bundle import Bundle
from mmrl.model.manifest import check_encoder_out
from mmrl.model.source import ModelSource, StoredModel, parse_model
from mmrl.output.console import print_line, without_secrets
from mmrl.output.files import atomic_path
from mmrl.output.progress import progress_bar
from mmrl.rotation import learned, moments
from mmrl.rotation.moments import Moments

# A rotation changes no similarity except by rounding of weights and products in float32.
MAX_ERROR = 1e-6
_MIN_DIM = 8  # of the default dims of a model without trained dims
_MIN_GAIN = 1e-4  # in mean mAP: the second decimal of a percentage
_SAMPLES_PER_DIM = 10  # a note is printed below this

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
    force: bool = False,
) -> Result:
    """Writes the rotated MODEL to OUT; returns its manifest.

    With several processes (torchrun, srun or mpirun) each embeds a share of the shards, and rank 0 writes.

    Args:
        dims: the dims to optimise, listed in OUT's manifest; default: the trained dims of MODEL, else halves down to 8.
        validate: shards to measure the rotation on. Nothing is written unless it improves mAP there.
        keep: leave the first `keep` dims unchanged, e.g. trained dims. Default: 0; with `validate`, the best on those.
        samples: use about this many samples, spread evenly over the shards; default: all.
        captions: use at most this many texts per sample, the plain one first; default: all.
        steps: to learn the rotation, after PCA; 0 stops at PCA.
        force: replace an encoder in OUT that was rotated or exported.

    Raises:
        InputError: no such model or shards, MODEL lacks a tower, too few samples, dims that MODEL does not have,
            embeddings that are not finite, OUT is not new or empty.
        RunStopped: the rotation does not help on `validate`, or similarities changed, or OUT cannot be written.
    """
    world = comm.start()
    console = Console(quiet=quiet or not world.is_rank_0)
    require_both_towers(model, "mmrl rotate")
    source = parse_model(model)
    check_encoder_out(out, force, source.folder if isinstance(source, StoredModel) else None)
    reader = open_reader(shards)
    validation = None if validate is None else open_reader(validate)
    encoder = bundle.open_model(source)
    encoder.model.to(world.device)
    trained = [dim for dim in encoder.nested_dims if dim < encoder.dim]
    dims = _checked_dims(encoder.dim, trained, dims)
    if keep is not None and not 0 <= keep < encoder.dim - 1:
        raise InputError(
            f"keep: {keep} of {encoder.dim} dims leaves nothing to rotate; give 0 to {encoder.dim - 2}, e.g. the "
            "largest trained dim that must not change."
        )
    _check_count(shards, len(reader), encoder.dim)
    if trained and not keep and validate is None:
        print_line(
            console,
            f"Note: this model was trained at the dims {', '.join(map(str, encoder.nested_dims))}. The rotation may "
            "make the smallest of them worse: --validate SHARDS measures that and leaves dims unchanged where it is "
            "better.",
        )
    found = moments.compute_moments(model, encoder, reader, samples, captions, console, with_pairs=steps > 0)
    _check_count(shards, found.images, encoder.dim)
    _print_sample_notes(console, encoder.dim, found)
    candidates = [0, *trained] if validation is not None and keep is None else [keep or 0]
    scale = encoder.model.logit_scale[-1].item()
    rotations = {
        kept: learned.find_rotation(found.moment_DD, found.pairs, scale, dims, kept, steps) for kept in candidates
    }
    kept, scores = candidates[0], None
    if validation is not None:
        matrices = {kept: rotation_DD for kept, (rotation_DD, _) in rotations.items()}
        kept, scores = _best_on_validation(encoder, matrices, validation, dims, captions, console)
    rotation_DD, learned_rotation = rotations[kept]
    if learned_rotation is not None:
        print_line(console, learned_rotation.summary())
    about = {
        "moments": "mean of x x^T over unit vectors, uncentred; pictures and texts weigh one half each",
        "images": found.images,
        "texts": found.texts,
        "kept_as_they_were": kept,
        "effective_rank": nesting.effective_rank(found.moment_DD),
        "share_of_second_moment": _shares(rotation_DD, found.moment_DD, dims),
        **({} if learned_rotation is None else {"learnt": learned_rotation.as_json()}),
        **({} if scores is None else {"validation": {"shards": without_secrets(str(validate)), **scores}}),
    }
    manifest = _on_rank_0(lambda: _write(source, encoder, rotation_DD, out, dims, about, reader))
    print_line(console, _summary(out, manifest))
    return manifest


# ------------------------------------------------------------------------------------------------ checks, notes


def _checked_dims(full_dim: int, trained: Sequence[int], dims: Sequence[int] | None) -> list[int]:
    """The dims to optimise, ascending."""
    if dims is not None:
        nesting.check_dims(dims, full_dim)
        return sorted(dims)
    if trained:
        return sorted({*trained, full_dim})
    halves = [full_dim]
    while halves[0] % 2 == 0 and halves[0] // 2 >= _MIN_DIM:
        halves.insert(0, halves[0] // 2)
    return halves


def _check_count(shards: str, count: int, dim: int) -> None:
    if count < dim:
        raise InputError(
            f"shards: {shards} has {count:,} usable samples, too few for {dim:,} dims; give at least {dim:,}, better "
            f"{_SAMPLES_PER_DIM * dim:,}."
        )


def _print_sample_notes(console: Console, dim: int, found: Moments) -> None:
    if found.bad:
        first = found.bad[0]
        print_line(console, f"{len(found.bad):,} bad samples skipped, e.g. {first.key}: {first.reason}")
    if found.images < _SAMPLES_PER_DIM * dim:
        print_line(
            console,
            f"Note: {found.images:,} samples are few for {dim:,} dims, and the weakest directions are noise; "
            f"{_SAMPLES_PER_DIM * dim:,} or more are better.",
        )


# ------------------------------------------------------------------------------------------------ validation


def _best_on_validation(
    encoder: Bundle,
    rotations: dict[int, torch.Tensor],
    validation: SampleReader,
    dims: Sequence[int],
    captions: int | None,
    console: Console,
) -> tuple[int, Result]:
    """The key of the best rotation by mean mAP over dims and directions, and the scores before and after.

    The set is embedded once and its embeddings are rotated, since a rotation is linear.

    Args:
        rotations: by the number of leading dims that each leaves unchanged.

    Raises:
        RunStopped: no rotation is better than none.
    """
    with progress_bar(console) as progress:
        task = progress.add_task("validating", total=len(validation))
        embedded = sets.embed(
            validation, encoder, captions=captions, on_batch=lambda count: progress.advance(task, count)
        )
    before = sets.score(embedded, dims)
    after = {kept: sets.score(_rotate(embedded, rotation_DD), dims) for kept, rotation_DD in rotations.items()}
    before, after = comm.broadcast_object((before, after))  # ranks may round differently
    best = max(after, key=lambda kept: _mean_map(after[kept]))
    for kept, scores in after.items():
        which = f"all but the first {kept} dims" if kept else "all dims"
        gain = f"mean mAP {100 * _mean_map(before):.2f} → {100 * _mean_map(scores):.2f} %"
        print_line(console, f"rotating {which}: {gain}")
    console.print(*all_tables({"before": before, "rotated": after[best]}), sep="\n")
    if _mean_map(after[best]) < _mean_map(before) + _MIN_GAIN:
        raise RunStopped(
            f"The rotation does not help on {len(embedded.keys):,} validation images (mean mAP over the dims "
            f"{100 * _mean_map(before):.2f} % without, {100 * _mean_map(after[best]):.2f} % with the best one); "
            "nothing was written. Use the model as it is."
        )
    return best, {"before": before["dims"], "after": after[best]["dims"]}


def _rotate(embedded: Embedded, rotation_DD: torch.Tensor) -> Embedded:
    image_ND, text_MD = (
        (rows.double() @ rotation_DD.T).to(rows.dtype) for rows in (embedded.image_ND, embedded.text_MD)
    )
    return replace(embedded, image_ND=image_ND, text_MD=text_MD)


def _mean_map(scores: Result) -> float:
    return fmean(by_direction[way]["mAP"] for by_direction in scores["dims"].values() for way in CROSS_MODAL)


def _shares(rotation_DD: torch.Tensor, moment_DD: torch.Tensor, dims: Sequence[int]) -> dict[str, float]:
    """The share of the mean squared length that each prefix has."""
    kept_D = (rotation_DD @ moment_DD @ rotation_DD.T).diagonal()
    return {str(dim): float(kept_D[:dim].sum() / kept_D.sum()) for dim in dims}


# ------------------------------------------------------------------------------------------------ writing


def _on_rank_0(write: Callable[[], Result]) -> Result:
    """Calls `write` on rank 0; returns its result, or raises rank 0's RunStopped, on every rank."""
    result, failure = None, None
    if comm.world().is_rank_0:
        try:
            result = write()
        except RunStopped as error:
            failure = str(error)
    result, failure = comm.broadcast_object((result, failure))
    if failure is not None:
        raise RunStopped(failure)
    return result


def _write(
    source: ModelSource,
    encoder: Bundle,
    rotation_DD: torch.Tensor,
    out: Path,
    dims: Sequence[int],
    about: Result,
    reader: SampleReader,
) -> Result:
    """Writes OUT; returns its manifest."""
    rotated = replace(encoder, nested_dims=tuple(dims))
    try:
        with atomic_path(out) as partial:
            state = bundle.rotated_state(encoder, rotation_DD)
            manifest = bundle.save(rotated, partial, state, _manifest_source(source, encoder))
            worst = _max_difference(encoder, bundle.load(partial), reader)
            if not worst <= MAX_ERROR:  # so that NaN fails
                raise RunStopped(
                    f"The rotation changes similarities of {source.text} by {worst:.1e}, more than the {MAX_ERROR:.0e} "
                    "allowed; nothing was written."
                )
            manifest["rotation"] = about
            manifest["contract"] = {
                "equals": f"the source's similarities of all {encoder.dim} numbers, on samples of the shards",
                "worst_absolute_difference": worst,
                "allowed": MAX_ERROR,
            }
            bundle.write_manifest(partial, manifest)
    except OSError as error:
        raise RunStopped(f"{out} could not be written ({error}).") from error
    return manifest


def _manifest_source(source: ModelSource, encoder: Bundle) -> Result:
    """The manifest's `source`. The original's hash is not its `weights_sha256`, which is equal for encoders with equal
    embeddings only."""
    about: Result = {"model": Path(source.text).name, "dim": encoder.dim}
    if isinstance(source, StoredModel):
        manifest = bundle.read_manifest(source.folder)
        about["rotated_from"] = {**manifest["source"], "weights_sha256": bundle.origin(manifest)}
    return about


@torch.inference_mode()
def _max_difference(encoder: Bundle, rotated: Bundle, reader: SampleReader) -> float:
    """The greatest change of a full-dim similarity, on the first chunk with usable samples."""
    rotated.model.to(comm.world().device)
    chunks = range(-(-len(reader) // moments.CHUNK_SIZE))
    batch = next(batch for batch in moments.read_chunks(encoder, reader, chunks) if batch.keys)
    old, new = (_similarities(*moments.embed(one, batch)) for one in (encoder, rotated))
    return float((old - new).abs().max())


def _similarities(image_ND: torch.Tensor, text_ND: torch.Tensor) -> torch.Tensor:
    """Cosine similarities of all images and texts with all, in float64."""
    unit = F.normalize(torch.cat([image_ND, text_ND]).double(), dim=-1)
    return unit @ unit.T


def _summary(out: Path, manifest: Result) -> str:
    about = manifest["rotation"]
    shares = ", ".join(f"{dim}: {100 * share:.1f}" for dim, share in reversed(about["share_of_second_moment"].items()))
    worst = manifest["contract"]["worst_absolute_difference"]
    return (
        f"{out}: {manifest['dim']}-d encoder, rotated with {about['images']:,} images and {about['texts']:,} texts; "
        f"full-dim similarities changed by at most {worst:.0e}\n"
        f"effective rank {about['effective_rank']:.1f} of {manifest['dim']}; % of the mean squared length in the first "
        f"dims: {shares}"
    )
