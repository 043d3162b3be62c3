"""A checkpoint -> encoders of one dim each, with their projections really cut, in the layout that a tool loads; each
opened again with that tool and checked against the encoder it came from before it gets its name.

    OUT/  (OUT/D for each dim where there are several)
        manifest.json    see mmrl/model/manifest.py
        README.md        a model card
        …                what the format is; see formats/
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmrl.errors import InputError
from mmrl.export import card, contract, measure
from mmrl.export.contract import Source
from mmrl.export.formats import base
from mmrl.export.formats.base import Cut, Format
from mmrl.export.measure import Recall
from mmrl.inference.extras import need
from mmrl.model import bundle, layouts
from mmrl.model.bundle import Bundle
from mmrl.model.manifest import hash_files, write_manifest
from mmrl.nesting import check_dims

# The greatest mean cosine error of a variant on the samples: beyond it something is broken, not merely rounded.
_ALLOWED_ERROR = {"fp16": 1e-3, "int8": 0.1}


@dataclass(frozen=True)
class _Job:
    """What all dims of one export share."""

    one: Format
    whole: Bundle
    source: Source
    origin: dict[str, Any]
    """The manifest's `source`."""
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
    on_done: Callable[[Path, dict[str, Any]], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Writes the encoders whose vectors are the renormalised first numbers of MODEL's; returns {dim: manifest}.

    Args:
        quantize: variants of the graphs besides fp32: 'fp16', 'int8'.
        check_shards: where the samples of the check come from; the starter set's when left out.
        measure_shards: shards on which each variant's recall is measured.
        licence: for the model card, an SPDX identifier.
        on_done: told each folder and its manifest.

    Raises:
        InputError: before any work, if MODEL is none, a dim is not one that it has, OUT exists and is not empty, the
            format is none, cannot hold this architecture or needs a library that is not installed.
        RunStopped: the written encoder does not keep to the contract.
    """
    one = base.named(format)
    need(*one.needs)
    variants = _checked_variants(one, quantize, measure_shards)
    folders = {dim: out if len(dims) == 1 else out / str(dim) for dim in dims}
    for folder in {out, *folders.values()}:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"out: {folder} exists and is not empty; name a new folder.")
    whole = bundle.open_model(model)
    check_dims(dims, whole.dim, "dim")
    one.check(whole)
    origin: dict[str, Any] = {"model": Path(model).name, "dim": whole.dim}
    if not model.startswith("open_clip:"):
        manifest = bundle.read_manifest(bundle.find(model))
        origin |= {**manifest["source"], "weights_sha256": bundle.origin(manifest)}
    recall = None if measure_shards is None else Recall(whole, measure_shards)
    source = Source(whole, contract.read_samples(check_shards))
    job = _Job(one, whole, source, origin, recall, variants, _run_of(model), licence)
    manifests = {}
    for dim, folder in folders.items():
        manifests[str(dim)] = _export_one(job, dim, folder)
        if on_done:
            on_done(folder, manifests[str(dim)])
    return manifests


def export_bundle(model: str, out: Path, dim: int) -> dict[str, Any]:
    """`export` of one bundle of ours."""
    return export(model, out, [dim])[str(dim)]


def _export_one(job: _Job, dim: int, out: Path) -> dict[str, Any]:
    """One dim: cut, write, open again, check, measure; OUT appears whole or not at all."""
    with _beside(out) as folder, tempfile.TemporaryDirectory(dir=folder.parent, prefix=".cut-") as scratch:
        cut = _cut(job, dim, Path(scratch))
        graphs = job.one.write(cut, folder, job.variants)
        files = hash_files(folder)
        weights = layouts.LAYOUTS.get(job.one.name)
        manifest = {
            **cut.manifest,
            "layout": job.one.name,
            "weights_sha256": files[weights.weights] if weights else cut.manifest["weights_sha256"],
            "files": files,
            **({"graphs": graphs} if graphs else {}),
        }
        write_manifest(folder, manifest)  # by which the folder is opened
        manifest["contract"] = job.source.check(job.one.reopen(folder, "fp32"), dim, job.one.allowed)
        if graphs:
            manifest["variants"] = _measured_variants(job, dim, folder, graphs)
            order = [name for name in ("int8", "fp16") if name in job.variants]
            graphs["default"] = measure.default_variant(manifest["variants"], order)
        write_manifest(folder, manifest)
        card.write(folder, job.one, manifest, job.run, job.licence)
    return manifest


def _cut(job: _Job, dim: int, scratch: Path) -> Cut:
    """The encoder of `dim`, as a bundle in `scratch` and opened from there."""
    small = replace(job.whole, dim=dim, nested_dims=bundle.kept_dims(job.whole.nested_dims, dim))
    manifest = bundle.save(small, scratch, bundle.cut_state(job.whole, dim), job.origin)
    return Cut(bundle.load(scratch), scratch, manifest)


def _measured_variants(job: _Job, dim: int, folder: Path, graphs: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """For each variant its size, its cosine error, and its recall if shards were named."""
    found = {}
    for name in ("fp32", *job.variants):
        opened = job.one.reopen(folder, name)
        parts = [path for side in ("image", "text") for path in folder.glob(f"{graphs[side][name]}*")]
        size = sum(path.stat().st_size for path in parts)
        found[name] = {
            "megabytes": round(size / 1e6, 1),
            "cosine_error": job.source.errors(opened, dim, _ALLOWED_ERROR.get(name, 1e-6)),
            **({"recall": job.recall.of(opened, dim)} if job.recall else {}),
        }
    return found


@contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """A new folder beside OUT, which becomes OUT if all goes well, and is gone otherwise."""
    beside = out.parent / f".{out.name}.partial"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    usual = beside.stat().st_mode & 0o777
    try:
        yield beside
        # Some writers leave files that only their owner may read, and a server runs as somebody else.
        for path in (beside, *beside.rglob("*")):
            path.chmod(usual if path.is_dir() else usual & 0o666)
        if out.exists():
            out.rmdir()
        beside.rename(out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _checked_variants(one: Format, quantize: Sequence[str], measure_shards: str | None) -> tuple[str, ...]:
    for name in quantize:
        if name not in base.VARIANTS:
            raise InputError(f"quantize: {name!r} is not known; allowed: {', '.join(base.VARIANTS)}.")
    if (quantize or measure_shards) and not one.variants:
        option = "quantize" if quantize else "measure"
        raise InputError(f"{option}: the format {one.name} has float32 weights alone; use onnx or transformers.js.")
    return tuple(dict.fromkeys(quantize))


def _run_of(model: str) -> Path | None:
    """The run folder that MODEL is, or is a checkpoint of."""
    path = Path(model)
    return next((one for one in (path, path.resolve().parent.parent) if (one / "config.yaml").is_file()), None)
