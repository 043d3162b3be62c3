"""The lines that `mmrl export` prints, and the model card (README.md) with the front matter that model hubs read."""

from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader

from mmrl.evaluate.report.tables import recall_markdown
from mmrl.export.formats.base import Format
from mmrl.model.manifest import CARD, is_rotated
from mmrl.output.console import without_secrets
from mmrl.output.files import parse_json

# Kinds of images that some tools do not read as training does, and what to do.
_REMEDIES = {
    "rotated by EXIF": "apply `PIL.ImageOps.exif_transpose`",
    "transparent": "composite on the background colour",
    "16-bit": "convert to 8 bits",
    "CMYK": "convert to RGB",
}
_INPUTS = {("image", "text"): "pixels and token ids", ("image",): "pixels", ("text",): "token ids"}
_TAGS = {
    ("image", "text"): ("zero-shot-image-classification", "image-text-retrieval"),
    ("image",): ("image-feature-extraction", "image-retrieval"),
    ("text",): ("sentence-similarity", "text-retrieval"),
}
"""{towers: (the front matter's pipeline_tag, a tag)}"""
_RECIPE_SECTIONS = ("model", "nesting", "loss", "data", "optim", "train")


def summary(folder: Path, manifest: dict[str, Any]) -> str:
    """One line for the exported folder, two for its tool's preprocessing and one for each variant of its graphs."""
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    contract = manifest["contract"]
    lines = [
        f"{folder}: {manifest['dim']}-d encoder, {size / 1e6:.1f} MB; maximum difference from the source's prefix "
        f"{contract['worst_absolute_difference']:.0e} on equal {_INPUTS[tuple(manifest['towers'])]}",
        *(f"  {contract['checked_by']}, {line}" for line in _tool_errors(contract).values()),
    ]
    variants = manifest.get("variants") or {}
    for name, one in variants.items() if len(variants) > 1 else ():
        error = one["cosine_error"]
        errors = (f"{error[side]['mean']:.0e} ({side}s)" for side in manifest["towers"])
        text = f"  {name}: {one['megabytes']} MB, cosine error {', '.join(errors)}"
        if "recall" in one:
            text += f", recall loss {100 * one['recall']['relative_loss']:.1f} % on {one['recall']['set']}"
        lines.append(text + (", the default" if name == manifest["graphs"]["default"] else ""))
    if "int8" in variants and "recall" not in variants["int8"]:
        lines.append("  int8 is not the default because its recall was not measured; --measure SHARDS measures it")
    return "\n".join(lines)


def _tool_errors(contract: dict[str, Any]) -> dict[str, str]:
    """{"texts" and "images", of the towers that there are: what the tool does to difficult ones}"""
    lines = {"texts": _text_errors(contract)} if "hard_texts" in contract else {}
    return {**lines, **({"images": _image_errors(contract)} if "hard_images_cosine_error" in contract else {})}


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
    errors = contract.get("hard_images_cosine_error", {})
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
    contract, source = manifest["contract"], manifest["source"]
    about = source.get("rotated_from", source)
    rotated, towers = is_rotated(manifest), tuple(manifest["towers"])
    templates = Environment(  # noqa: S701 (Markdown has no HTML to escape)
        loader=FileSystemLoader(Path(__file__).parent / "card_template"), trim_blocks=True, keep_trailing_newline=True
    )
    templates.filters["e"] = lambda value: f"{value:.0e}"
    text = templates.get_template("card.md").render(
        m=manifest,
        name=name,
        contract=contract,
        about=about,
        rotated=rotated,
        licence=licence,
        run=run,
        front_matter=_front_matter(format, towers, licence),
        inputs=_INPUTS[towers],
        what=" and ".join(f"{side}s" for side in towers),
        nested_dims=_nested_dims(manifest, rotated),
        errors=_tool_errors(contract),
        remedies=[(kind, _REMEDIES[kind]) for kind in _special_images(contract) if kind in _REMEDIES],
        **({} if run is None else {**_evaluation(run, manifest), **_recipe(run)}),
    )
    (folder / CARD).write_text(text)


def _front_matter(format: Format, towers: tuple[str, ...], licence: str | None) -> str:
    task, tag = _TAGS[towers]
    fields = {
        "license": licence or "other",
        **({} if licence else {"license_name": "not-stated"}),
        "library_name": format.library,
        "pipeline_tag": task,
        "tags": ["clip", tag, "matryoshka", "feature-extraction", "mmrl"],
    }
    return yaml.safe_dump(fields, sort_keys=False)


def _nested_dims(manifest: dict[str, Any], rotated: bool) -> str:
    """The trained dims, and whether the encoder's own is one of them."""
    dim, nested = manifest["dim"], sorted(manifest["nested_dims"], reverse=True)
    listed = ", ".join(map(str, nested)) or f"none up to {dim}"
    own = f" This encoder's own dim, {dim}, is not one of them." if nested and dim not in nested else ""
    by_rotation = ", those of `mmrl rotate`, which rotated the embedding of a trained model without training it"
    return f"Nested dims: {listed}{by_rotation}.{own}" if rotated else f"Trained dims: {listed}.{own}"


def _evaluation(run: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """The run's scores of the exported step, if it stored them: its tables of dims up to the encoder's, and whether its
    own dim is among them."""
    step, dim, tables = manifest["source"].get("step"), manifest["dim"], []
    stored = [path / "retrieval.json" for path in (run / "checkpoints" / f"step-{step}", run)]
    results = [parse_json(path.read_text()) for path in stored if path.is_file()]
    # The run's own file may hold scores of another step, or of `mmrl eval --out RUN`, which names no step.
    scores = next((one["sets"] for one in results if step is not None and one.get("step") == step), {})
    for set_name, one in scores.items():
        if kept := {d: values for d, values in one["dims"].items() if int(d) <= dim}:
            tables.append(recall_markdown(set_name, {**one, "dims": kept}))
    return {"scores": scores, "tables": tables, "measured": all(str(dim) in one["dims"] for one in scores.values())}


def _recipe(run: Path) -> dict[str, Any]:
    """What the run was trained on, and its config."""
    config = _public(yaml.safe_load((run / "config.yaml").read_text()))
    recipe = {name: config[name] for name in _RECIPE_SECTIONS if name in config}
    return {
        "shards": config.get("data", {}).get("train") or [one["shards"] for one in config["data"].get("sources", [])],
        "recipe": yaml.safe_dump(recipe, sort_keys=False),
        "rotate_at_end": recipe.get("nesting", {}).get("rotate_at_end"),
    }


def _public(value: Any) -> Any:
    """A part of a config `without_secrets`."""
    if isinstance(value, dict):
        return {name: _public(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_public(one) for one in value]
    return without_secrets(value) if isinstance(value, str) else value
