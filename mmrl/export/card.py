"""The lines that `mmrl export` prints, and the model card (README.md) with the front matter that model hubs read."""

import json
from pathlib import Path
from typing import Any

import yaml

from mmrl.evaluate.report.tables import recall_markdown
from mmrl.export.formats.base import Format
from mmrl.model.manifest import CARD

# Kinds of images that some tools do not read as training does, and what to do.
_REMEDIES = {
    "rotated by EXIF": "apply `PIL.ImageOps.exif_transpose`",
    "transparent": "composite on the background colour",
    "16-bit": "convert to 8 bits",
    "CMYK": "convert to RGB",
}
_RECIPE_SECTIONS = ("model", "nesting", "loss", "data", "optim", "train")


def summary(folder: Path, manifest: dict[str, Any]) -> str:
    """One line for the exported folder, two for its tool's preprocessing and one for each variant of its graphs."""
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    contract = manifest["contract"]
    lines = [
        f"{folder}: {manifest['dim']}-d encoder, {size / 1e6:.1f} MB; maximum difference from the source's prefix "
        f"{contract['worst_absolute_difference']:.0e} on equal pixels and token ids",
        *(f"  {contract['checked_by']}, {line}" for line in (_text_errors(contract), _image_errors(contract))),
    ]
    variants = manifest.get("variants") or {}
    for name, one in variants.items() if len(variants) > 1 else ():
        error = one["cosine_error"]
        text = (
            f"  {name}: {one['megabytes']} MB, cosine error {error['image']['mean']:.0e} (images), "
            f"{error['text']['mean']:.0e} (texts)"
        )
        if "recall" in one:
            text += f", recall loss {100 * one['recall']['relative_loss']:.1f} % on {one['recall']['set']}"
        lines.append(text + (", the default" if name == manifest["graphs"]["default"] else ""))
    if "int8" in variants and "recall" not in variants["int8"]:
        lines.append("  int8 is not the default because its recall was not measured; --measure SHARDS measures it")
    return "\n".join(lines)


def _text_errors(contract: dict[str, Any]) -> str:
    hard = contract["hard_texts"]
    differing, worst = hard["tokenised_differently"], f"cosine error up to {hard['worst_cosine_error']:.0e}"
    if not differing:
        return f"texts: training's token ids for all {hard['count']} difficult texts, {worst}"
    return (
        f"texts: training's token ids for {hard['count'] - len(differing)} of {hard['count']} difficult texts, {worst} "
        f"for the others, e.g. {differing[0][:40]!r}"
    )


def _image_errors(contract: dict[str, Any]) -> str:
    errors, special = contract["hard_images_cosine_error"], _special_images(contract)
    worst = max((error for kind, error in errors.items() if kind not in special), default=0.0)
    named = {kind: "refused" if error is None else f"{error:.0e}" for kind, error in special.items()}
    return "; ".join([f"images: cosine error up to {worst:.0e}", *(f"{kind} {error}" for kind, error in named.items())])


def _special_images(contract: dict[str, Any]) -> dict[str, float | None]:
    """The kinds of images that the tool refuses, or reads much worse than it resizes plain ones."""
    errors = contract["hard_images_cosine_error"]
    plain = max((error or 0.0 for kind, error in errors.items() if kind not in _REMEDIES), default=0.0)
    limit = 10 * max(plain, 1e-6)
    return {kind: error for kind, error in errors.items() if error is None or (kind in _REMEDIES and error > limit)}


def write(
    folder: Path, name: str, format: Format, manifest: dict[str, Any], run: Path | None, licence: str | None
) -> None:
    """Writes FOLDER/README.md.

    Args:
        name: the folder's final name, for the usage examples.
        run: the run that the encoder was trained in, for its recipe and scores; None if unknown.
        licence: an SPDX identifier, such as apache-2.0.
    """
    dim = manifest["dim"]
    sections = [
        _front_matter(format, licence),
        f"# Image-text encoder, {dim}-d\n",
        f"Maps images and texts to {dim}-d embeddings; their cosine similarity scores how well they match. Embeddings "
        f"can be truncated to fewer dims and renormalised. {_nested_dims(manifest)}\n",
        f"## Usage\n\n{format.usage.replace('FOLDER', name)}",
        f"## Source\n\n{_contract(manifest)}",
        f"## Preprocessing\n\n{_preprocessing(manifest)}",
        _variants(manifest),
        _evaluation(run, manifest, name),
        _recipe(run, manifest),
        _limits(manifest, licence),
    ]
    (folder / CARD).write_text("\n".join(section for section in sections if section))


def _front_matter(format: Format, licence: str | None) -> str:
    fields = {
        "license": licence or "other",
        **({} if licence else {"license_name": "not-stated"}),
        "library_name": format.library,
        "pipeline_tag": "zero-shot-image-classification",
        "tags": ["clip", "image-text-retrieval", "matryoshka", "feature-extraction", "mmrl"],
    }
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---\n"


def _is_rotated(manifest: dict[str, Any]) -> bool:
    """Whether `mmrl rotate` rotated the encoder, or the one that it was truncated from."""
    return manifest.get("rotation") is not None or "rotated_from" in manifest["source"]


def _nested_dims(manifest: dict[str, Any]) -> str:
    """The trained dims, and whether the encoder's own is one of them."""
    dim, nested = manifest["dim"], sorted(manifest["nested_dims"], reverse=True)
    listed = ", ".join(map(str, nested)) or f"none up to {dim}"
    own = f" This encoder's own dim, {dim}, is not one of them." if nested and dim not in nested else ""
    if _is_rotated(manifest):
        return (
            f"Nested dims: {listed}, those of `mmrl rotate`, which rotated the embedding of a trained model without "
            f"training it.{own}"
        )
    return f"Trained dims: {listed}.{own}"


def _contract(manifest: dict[str, Any]) -> str:
    contract, source = manifest["contract"], manifest["source"]
    image, text = (f"{contract['end_to_end_cosine_error'][modality]['mean']:.0e}" for modality in ("image", "text"))
    samples = contract["samples"]
    about = source.get("rotated_from", source)
    step = f", step {about['step']:,}" if "step" in about else ""
    rotated = ", rotated by `mmrl rotate`" if _is_rotated(manifest) else ""
    whose = "the rotated encoder's" if rotated else "its"
    return (
        f"Exported from `{about.get('run', source['model'])}`{step}{rotated}. The embeddings equal {whose} "
        f"{source['dim']}-d embeddings, truncated to "
        f"{manifest['dim']} dims and renormalised. Checked at export with {contract['checked_by']} on "
        f"{samples['count']} samples of {samples['set']}: on equal pixels and token ids the maximum difference of a "
        f"value is {contract['worst_absolute_difference']:.0e}; end to end, from image file and text to embedding, the "
        f"mean cosine error is {image} for images and {text} for texts.\n\n"
        "Only the projections were truncated, so the encoder is as fast as its source.\n"
    )


def _preprocessing(manifest: dict[str, Any]) -> str:
    """What the tool makes of difficult inputs, and what to do about it."""
    contract = manifest["contract"]
    lines = [f"- {line[0].upper()}{line[1:]}." for line in (_text_errors(contract), _image_errors(contract))]
    if contract["hard_texts"]["tokenised_differently"]:
        lines[0] += " Clean such texts first: `html.unescape(html.unescape(ftfy.fix_text(text)))`."
    special = _special_images(contract)
    lines[1] += "".join(f" If {kind}: {_REMEDIES[kind]} first." for kind in special if kind in _REMEDIES)
    kinds = ", ".join(contract["hard_images_cosine_error"])
    return (
        f"From image and text to embedding, compared with training's preprocessing, with {contract['checked_by']} on "
        "typographic, escaped and long texts of many scripts, and on one image of each kind that has another size than "
        f"the encoder's ({kinds}):\n\n" + "\n".join(lines) + "\n"
    )


def _variants(manifest: dict[str, Any]) -> str:
    if not manifest.get("variants"):
        return ""
    lines = ["| variant | MB | cosine error, images | texts | relative recall loss |", "|---|---:|---:|---:|---:|"]
    for name, one in manifest["variants"].items():
        image, text = (f"{one['cosine_error'][modality]['mean']:.0e}" for modality in ("image", "text"))
        recall = one.get("recall")
        loss = f"{100 * recall['relative_loss']:.1f} % on {recall['set']}" if recall else "not measured"
        default = " (default)" if name == manifest["graphs"]["default"] else ""
        lines.append(f"| {name}{default} | {one['megabytes']} | {image} | {text} | {loss} |")
    return (
        "## Variants\n\n"
        + "\n".join(lines)
        + "\n\n`int8` embeddings depend slightly on the other inputs of their batch, because the range of the "
        "activations is computed per batch: they are not reproducible to the bit.\n"
    )


def _evaluation(run: Path | None, manifest: dict[str, Any], name: str) -> str:
    """The run's scores at dims up to the encoder's, if the run stored them for the exported step."""
    step = manifest["source"].get("step")
    if run is None:
        return ""
    stored = [path / "retrieval.json" for path in (run / "checkpoints" / f"step-{step}", run)]
    results = [json.loads(path.read_text()) for path in stored if path.is_file()]
    # The run's own file may hold scores of another step, or of `mmrl eval --out RUN`, which names no step.
    result = next((one for one in results if step is not None and one.get("step") == step), None)
    if result is None:
        return (
            "## Evaluation\n\n"
            f"The run has no stored scores of the exported step{'' if step is None else f' ({step:,})'}. To measure "
            f"them: `mmrl eval {name} SHARDS`.\n"
        )
    dim, tables = manifest["dim"], []
    for set_name, scores in result["sets"].items():
        kept = {d: values for d, values in scores["dims"].items() if int(d) <= dim}
        if kept:
            tables.append(recall_markdown(set_name, {**scores, "dims": kept}))
    if tables:
        tables.insert(0, f"Scores of step {step:,} on the run's evaluation sets:\n")
    if any(str(dim) not in scores["dims"] for scores in result["sets"].values()):
        tables.append(f"The run was not evaluated at {dim} dims. To measure them: `mmrl eval {name} SHARDS`.\n")
    return "## Evaluation\n\n" + "\n".join(tables)


def _recipe(run: Path | None, manifest: dict[str, Any]) -> str:
    if run is None:
        return "## Data and recipe\n\nNot recorded: this encoder was not exported from a checkpoint in a run folder.\n"
    config = yaml.safe_load((run / "config.yaml").read_text())
    recipe = {name: config[name] for name in _RECIPE_SECTIONS if name in config}
    shards = config.get("data", {}).get("train") or [one.get("shards") for one in config["data"].get("sources", [])]
    text = yaml.safe_dump(recipe, sort_keys=False)
    step = manifest["source"].get("step")
    what = "Trained" if step is None else f"Step {step:,} of a run"
    at_end = (
        "`rotate_at_end` rotated the run's last step only. " if recipe.get("nesting", {}).get("rotate_at_end") else ""
    )
    return f"## Data and recipe\n\n{what} with mmrl on `{shards}`. {at_end}The run's config:\n\n```yaml\n{text}```\n"


def _transparency(image: dict[str, Any]) -> list[str]:
    if image.get("background") is None:
        return ["- Transparency is ignored: the colours that it hides are shown."]
    return [
        f"- `mmrl.load` and `encoder.py` show transparent pixels on the RGB colour {image['background']}. The "
        "preprocessing of other tools has no such setting: composite such images first."
    ]


def _limits(manifest: dict[str, Any], licence: str | None) -> str:
    image, length = manifest["image"], manifest["tokenizer"]["context_length"]
    kind = "nested" if _is_rotated(manifest) else "trained"
    lines = [
        f"- Images are resized to {image['height']}×{image['width']} pixels (resize mode {image['resize_mode']}); "
        f"texts are truncated to {length} tokens.",
        *_transparency(image),
        "- Scores on data unlike the training data are unknown until measured (`mmrl eval`). The encoder has the "
        "biases of its training data.",
        f"- Embeddings can be truncated to any dim from 1 to {manifest['dim']}. Between two {kind} dims, recall is "
        "usually between theirs; below the smallest it falls quickly.",
    ]
    if licence is None:
        lines.append("- The licence was not stated at export; the terms of the training data may apply.")
    return "## Limits\n\n" + "\n".join(lines) + "\n"
