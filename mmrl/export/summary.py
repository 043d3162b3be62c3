"""What `mmrl export` prints of a folder that it wrote."""

from pathlib import Path
from typing import Any


def line(folder: Path, manifest: dict[str, Any]) -> str:
    """One line a folder, and one a variant of its graphs."""
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
