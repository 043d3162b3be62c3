"""`mmrl export`: a trained model -> encoders of one dim each, with truncated projections, in a format of another tool.

Each folder is reopened with that tool and compared with the source before it gets its final name.

    OUT/  (OUT/D per dim if there are several)
        manifest.json    see mmrl/model/manifest.py
        README.md        the model card
        …                the format's files; see formats/
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmrl.errors import InputError
from mmrl.export import card, contract, measure
from mmrl.export.contract import Reference
from mmrl.export.formats import base
from mmrl.export.formats.base import Format, Truncated
from mmrl.export.measure import Recall
from mmrl.export.onnx_graphs import EXTERNAL_SUFFIX
from mmrl.inference.extras import require_packages
from mmrl.model import bundle, layouts
from mmrl.model.bundle import Bundle
from mmrl.model.manifest import check_encoder_out, hash_files, write_manifest
from mmrl.model.source import ModelSource, StoredModel, parse_model
from mmrl.model.towers import SIDES
from mmrl.nesting import check_dims, untrained_note
from mmrl.output.files import atomic_path, check_out_folder, create_folder

# Maximum mean cosine error of a variant on the samples. Beyond it something is broken: rounding alone stays below.
_MAX_ERROR = {"fp16": 1e-3, "int8": 0.1}


@dataclass(frozen=True)
class _Job:
    """What the dims of one export share."""

    format: Format
    full: Bundle
    reference: Reference
    source: dict[str, Any]
    """The manifests' `source`."""
    rotation: dict[str, Any] | None
    """The manifests' `rotation`: how `mmrl rotate` rotated MODEL, if it did."""
    recall: Recall | None
    variants: tuple[str, ...]
    run: Path | None
    licence: str | None


def export(
    model: str,
    out: Path,
    dims: Sequence[int],
    format: str = "bundle",
    *,
    quantize: Sequence[str] = (),
    check_shards: str | None = None,
    measure_shards: str | None = None,
    licence: str | None = None,
    force: bool = False,
    log: Callable[[str], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Writes an encoder per dim, whose embeddings are MODEL's truncated to that dim; returns {dim: manifest}.

    Args:
        dims: any from 1 to MODEL's dim; `log` gets a note on those that were not trained.
        quantize: variants of the ONNX graphs in addition to fp32: 'fp16', 'int8'.
        check_shards: samples to compare the written encoders on; default: of the starter set.
        measure_shards: shards to measure each variant's recall on.
        licence: for the model card, an SPDX identifier.
        force: replace an exported encoder in OUT.
        log: called with each line to show: the note, and the summary of each written folder.

    Raises:
        InputError: before any work, if MODEL names no encoder, a dim is out of range, OUT is not new or empty, or the
            format is unknown, cannot hold these towers or needs a package that is not installed.
        RunStopped: a written encoder differs from the source by more than the tolerance.
    """
    chosen = base.get_format(format)
    require_packages(*chosen.needs)
    variants = _checked_variants(chosen, quantize, measure_shards)
    folders = {dim: out if len(dims) == 1 else out / str(dim) for dim in dims}
    source = parse_model(model)
    if len(dims) > 1:
        check_out_folder(out, {folder.name for folder in folders.values()})
    for folder in folders.values():
        check_encoder_out(folder, force, source.folder if isinstance(source, StoredModel) else None)
    stored = bundle.read_manifest(source.folder) if isinstance(source, StoredModel) else None
    base.check_towers(chosen, stored["towers"] if stored else SIDES, model)
    full = bundle.open_model(source)
    check_dims(dims, full.dim, "dim")
    chosen.check(full)
    create_folder(folders[dims[0]].parent)
    note = untrained_note(dims, full.nested_dims)
    if log and note:
        log(note)
    job = _Job(
        chosen,
        full,
        Reference(full, contract.read_samples(check_shards, full.model.sides)),
        _manifest_source(source, full, stored),
        stored.get("rotation") if stored else None,
        None if measure_shards is None else Recall(full, measure_shards, dims),
        variants,
        _run_of(source),
        licence,
    )
    manifests = {}
    for dim, folder in folders.items():
        manifests[str(dim)] = _export_dim(job, dim, folder)
        if log:
            log(card.summary(folder, manifests[str(dim)]))
    return manifests


def _export_dim(job: _Job, dim: int, out: Path) -> dict[str, Any]:
    """Truncates, writes, reopens, checks and measures the encoder of one dim; OUT appears only if all succeed."""
    with atomic_path(out) as folder, tempfile.TemporaryDirectory(dir=out.parent, prefix=".cut-") as scratch:
        folder.mkdir()
        truncated = _truncate(job, dim, Path(scratch))
        graphs = job.format.write(truncated, folder, job.variants)
        files = hash_files(folder)
        manifest: dict[str, Any] = {**truncated.manifest, "layout": job.format.name}
        if not graphs:
            manifest["weights_sha256"] = files[layouts.layout_of_manifest(manifest, folder).weights]
        manifest |= {
            "files": files,
            **({"rotation": job.rotation} if job.rotation else {}),
            **({"graphs": graphs} if graphs else {}),
        }
        write_manifest(folder, manifest)  # reopen() reads it
        manifest["contract"] = job.reference.check(job.format.reopen(folder, "fp32"), dim, job.format.tolerance)
        if graphs:
            manifest["variants"] = _measured_variants(job, dim, folder, graphs)
            preferred = [name for name in ("int8", "fp16") if name in job.variants]
            graphs["default"] = measure.default_variant(manifest["variants"], preferred)
        write_manifest(folder, manifest)
        card.write(folder, out.name, job.format, manifest, job.run, job.licence)
        _make_readable(folder)
    return manifest


def _truncate(job: _Job, dim: int, scratch: Path) -> Truncated:
    """The encoder of `dim`, written as a bundle to `scratch` and loaded from there."""
    small = replace(job.full, dim=dim, nested_dims=bundle.dims_up_to(job.full.nested_dims, dim))
    manifest = bundle.save(small, scratch, bundle.truncated_state(job.full, dim), job.source)
    return Truncated(bundle.load(scratch), scratch, manifest)


def _measured_variants(job: _Job, dim: int, folder: Path, graphs: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{variant: size, cosine error and, with `measure_shards`, recall}"""
    measured = {}
    for name in ("fp32", *job.variants):
        opened = job.format.reopen(folder, name)
        paths = [folder / graphs[modality][name] for modality in job.full.model.sides]
        weights = [other for path in paths for other in (Path(f"{path}{EXTERNAL_SUFFIX}"), path.with_suffix(".bin"))]
        size = sum(path.stat().st_size for path in (*paths, *weights) if path.is_file())
        measured[name] = {
            "megabytes": round(size / 1e6, 1),
            "cosine_error": job.reference.errors(opened, dim, _MAX_ERROR.get(name, 1e-6)),
            **({"recall": job.recall.measure(opened, dim)} if job.recall else {}),
        }
    return measured


def _make_readable(folder: Path) -> None:
    """Gives all files the default mode: some writers make files that only their owner can read, and servers run as
    another user."""
    mode = folder.stat().st_mode & 0o777
    for path in folder.rglob("*"):
        path.chmod(mode if path.is_dir() else mode & 0o666)


def _checked_variants(chosen: Format, quantize: Sequence[str], measure_shards: str | None) -> tuple[str, ...]:
    if (quantize or measure_shards) and not chosen.variants:
        option = "quantize" if quantize else "measure"
        raise InputError(f"{option}: the format {chosen.name} has float32 weights only; use onnx or transformers.js.")
    for name in quantize:
        if name not in chosen.variants:
            raise InputError(
                f"quantize: {name!r} is unknown to the format {chosen.name}; allowed: {', '.join(chosen.variants)}."
            )
    return tuple(dict.fromkeys(quantize))


def _manifest_source(source: ModelSource, full: Bundle, stored: dict[str, Any] | None) -> dict[str, Any]:
    """The manifests' `source`. That of an export is kept when it is exported again. `stored` is the manifest of a
    stored model."""
    about: dict[str, Any] = {"model": Path(source.text).name, "dim": full.dim}
    return about | {**stored["source"], "weights_sha256": bundle.origin(stored)} if stored else about


def _run_of(source: ModelSource) -> Path | None:
    """The run folder of a checkpoint RUN/checkpoints/NAME; None for other encoders."""
    if not isinstance(source, StoredModel):
        return None
    checkpoints = source.folder.resolve().parent
    is_run = checkpoints.name == "checkpoints" and (checkpoints.parent / "config.yaml").is_file()
    return checkpoints.parent if is_run else None
