"""What an export says of itself: the lines that `mmrl export` prints, and its model card (README.md), with the front
matter that model hubs read."""

import json
from pathlib import Path
from typing import Any

import yaml

from mmrl.evaluate.report import write as report
from mmrl.export.formats.base import Format
from mmrl.model.manifest import CARD

_PARTS_OF_RUN = ("model", "nesting", "loss", "data", "optim", "train")


def line(folder: Path, manifest: dict[str, Any]) -> str:
    """What is printed: one line for the folder, and one for each variant of its graphs."""
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    worst = manifest["contract"]["worst_absolute_difference"]
    what = f"{manifest['dim']}-d encoder, {size / 1e6:.1f} MB"
    lines = [f"{folder}: {what}; differs from the full model's prefix by {worst:.0e}"]
    variants = manifest.get("variants") or {}
    for name, one in variants.items() if len(variants) > 1 else ():
        error = one["cosine_error"]
        text = (
            f"  {name}: {one['megabytes']} MB, cosine error {error['image']['mean']:.0e} (pictures), "
            f"{error['text']['mean']:.0e} (texts)"
        )
        if "recall" in one:
            text += f", {100 * one['recall']['relative_loss']:.1f} % of the recall lost on {one['recall']['set']}"
        lines.append(text + ("; opened by default" if name == manifest["graphs"]["default"] else ""))
    if "int8" in variants and "recall" not in variants["int8"]:
        lines.append("  int8 is not the default, since its recall was not measured: --measure SHARDS does it")
    return "\n".join(lines)


def write(folder: Path, one: Format, manifest: dict[str, Any], run: Path | None, licence: str | None) -> None:
    """Writes FOLDER/README.md.

    Args:
        run: the run folder that the encoder was trained in, if it is known: its recipe and its scores go along.
        licence: an SPDX identifier, such as apache-2.0.
    """
    dim = manifest["dim"]
    nested = ", ".join(str(d) for d in sorted(manifest["nested_dims"], reverse=True)) or "none"
    parts = [
        _front_matter(one, licence),
        f"# Image-text encoder, {dim}-d\n",
        f"Pictures and texts become vectors of {dim} numbers whose cosine tells how well they match. Shorter prefixes, "
        f"renormalised, are embeddings too; trained dims: {nested}.\n",
        f"## Use\n\n{one.usage.replace('FOLDER', folder.name.removeprefix('.').removesuffix('.partial'))}",
        f"## What it was cut from\n\n{_contract(manifest['contract'])}",
        _variants(manifest),
        _evaluation(run, dim),
        _recipe(run),
        _limits(manifest, licence),
    ]
    (folder / CARD).write_text("\n".join(part for part in parts if part))


def _front_matter(one: Format, licence: str | None) -> str:
    fields = {
        "license": licence or "other",
        **({} if licence else {"license_name": "not-stated"}),
        "library_name": one.library,
        "pipeline_tag": "zero-shot-image-classification",
        "tags": ["clip", "image-text-retrieval", "matryoshka", "feature-extraction", "mmrl"],
    }
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---\n"


def _contract(contract: dict[str, Any]) -> str:
    image, text = (f"{contract['end_to_end_cosine_error'][side]['mean']:.0e}" for side in ("image", "text"))
    samples = contract["samples"]
    return (
        f"Its vectors equal {contract['equals']}. Checked at export with {contract['checked_by']} on "
        f"{samples['count']} samples of {samples['set']}: on equal pixels and token ids the worst number differs by "
        f"{contract['worst_absolute_difference']:.0e}; from picture and text to vector the mean cosine error is "
        f"{image} for pictures and {text} for texts.\n\n"
        "The projections were cut, the layers were not: it is as fast as its source.\n"
    )


def _variants(manifest: dict[str, Any]) -> str:
    if not manifest.get("variants"):
        return ""
    lines = ["| variant | MB | cosine error, pictures | texts | relative loss of recall |", "|---|---:|---:|---:|---:|"]
    for name, one in manifest["variants"].items():
        image, text = (f"{one['cosine_error'][side]['mean']:.0e}" for side in ("image", "text"))
        recall = one.get("recall")
        lost = f"{100 * recall['relative_loss']:.1f} % on {recall['set']}" if recall else "not measured"
        default = " (default)" if name == manifest["graphs"]["default"] else ""
        lines.append(f"| {name}{default} | {one['megabytes']} | {image} | {text} | {lost} |")
    return (
        "## Variants\n\n"
        + "\n".join(lines)
        + "\n\n`int8` vectors depend a little on what else is in their batch, since "
        "the range of the activations is found over all of it: do not compare them byte by byte.\n"
    )


def _evaluation(run: Path | None, dim: int) -> str:

    path = None if run is None else run / "retrieval.json"
    if path is None or not path.is_file():
        return ""
    result = json.loads(path.read_text())
    tables = []
    for name, scores in result.get("sets", {}).items():
        kept = {d: values for d, values in scores["dims"].items() if int(d) <= dim}
        if kept:
            tables.append(report.markdown(name, {**scores, "dims": kept}))
    if not tables:
        return ""
    return "## Evaluation\n\nBy the run that trained it, on sets that it did not learn from:\n\n" + "\n".join(tables)


def _recipe(run: Path | None) -> str:
    path = None if run is None else run / "config.yaml"
    if path is None or not path.is_file():
        return "## Data and recipe\n\nNot recorded: the source of this encoder has no run folder.\n"
    config = yaml.safe_load(path.read_text())
    kept = {name: config[name] for name in _PARTS_OF_RUN if name in config}
    shards = config.get("data", {}).get("train") or [one.get("shards") for one in config["data"].get("sources", [])]
    text = yaml.safe_dump(kept, sort_keys=False)
    return f"## Data and recipe\n\nTrained with mmrl on `{shards}`, by this config:\n\n```yaml\n{text}```\n"


def _limits(manifest: dict[str, Any], licence: str | None) -> str:
    image, length = manifest["image"], manifest["tokenizer"]["context_length"]
    lines = [
        f"- Pictures are seen at {image['height']}×{image['width']} pixels ({image['resize_mode']} side fitted); texts "
        f"beyond {length} tokens are cut off.",
        "- It knows what its training data showed; scores on other data are unknown until they are measured "
        "(`mmrl eval`). Biases of the data are the encoder's.",
        "- A dim that was not trained is cut all the same, and is worse than the trained one above it.",
    ]
    if licence is None:
        lines.append("- Its licence was not stated at export; the training data's terms may bind it.")
    return "## Limits\n\n" + "\n".join(lines) + "\n"
