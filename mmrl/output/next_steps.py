"""The last lines of a command: the commands that come next, with the paths of this one."""

import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mmrl.output.console import visible

SHARDS = "SHARDS"
"""Stands for the user's own shards where a command knows none."""


def after_pack(out: Path, held_out: bool, towers: str = "both") -> str:
    """Check the shards, and train on them with these towers."""
    train = out / "train" if held_out else out
    val = ["--val", out / "val"] if held_out else []
    if towers != "both":
        of_tower = [f"model.towers={towers}", "loss.image_text=0", f"loss.{towers}_{towers}=1"]
        return _steps(
            (["check", train, "--towers", towers], "bad samples, duplicates, long texts"),
            (["train", "--data", train, *val, *of_tower], "train a model"),
        )
    return _steps(
        (["check", train], "bad images, duplicates, long captions"), (["train", "--data", train, *val], "train a model")
    )


def after_train(model: Path, sets: Mapping[str, str | list[str]], scores: Path) -> str:
    """Evaluate the model on these sets (name: shards) into the folder `scores`."""
    named = [f"{name}={shards}" for name, shards in sets.items() if isinstance(shards, str)]
    return _steps((["eval", model, *(named or [SHARDS]), "--out", scores], "which dim do I need?"))


def after_eval(model: str, full_dim: int, dim: int, shards: str, second: bool = False) -> str:
    """Export the advised dim; embed the gallery, or the second members, with a model that has this dim already."""
    if dim == full_dim:
        words = ["embed", model, shards, _beside(model, "embeddings"), *(["--second"] if second else [])]
        return _steps((words, "a gallery's vectors, as Parquet"))
    return _steps((["export", model, _beside(model, f"encoder-{dim}"), "--dim", dim], f"an encoder of {dim} dims"))


def after_export(model: str, out: Path, dims: Sequence[int], shards: str | None = None) -> str:
    """Embed with the smallest of the exported encoders."""
    encoder = out if len(dims) == 1 else out / str(min(dims))
    embeddings = encoder.with_name(f"{encoder.name}-embeddings")
    return _steps((["embed", encoder, shards or _shards_of(model), embeddings], "a gallery's vectors, as Parquet"))


def after_embed(out: Path, columns: Sequence[Mapping[str, Any]]) -> str:
    """Index the embeddings, if they have a column that an index is built from."""
    if columns[0]["precision"] not in ("fp32", "fp16"):
        return "Other tools read these embeddings; for an index of mmrl, embed with --precision fp32 among others."
    is_named_so = out.name.endswith("embeddings")
    index = out.with_name(f"{out.name.removesuffix('embeddings')}index" if is_named_so else f"{out.name}-index")
    return _steps((["index", out, index], "an index to search"))


def after_mine(model: str, out: Path) -> str:
    """Train with the negatives."""
    is_run = (Path(model) / "config.yaml").is_file()
    config, run = (Path(model) / "config.yaml", f"{model.rstrip('/')}-negatives") if is_run else ("CONFIG", "RUN")
    words = ["train", config, f"run={run}", "data.negatives=1", f"data.negatives_from={out}"]
    return _steps((words, "train with the negatives"))


def after_index(index: Path) -> str:
    """Serve the index."""
    return _steps((["serve", index], "search in a browser"))


def _steps(*steps: tuple[list[Any], str]) -> str:
    """The line "Next:" and, for each step (arguments of mmrl, purpose), the line to type."""
    # As the user typed it, unless the shell finds it by name.
    typed, found = sys.argv[0], shutil.which("mmrl")
    by_name = Path(typed).name != "mmrl" or (found is not None and Path(found).resolve() == Path(typed).resolve())
    lines = [(shlex.join(["mmrl" if by_name else typed, *map(str, words)]), purpose) for words, purpose in steps]
    width = min(max(len(line) for line, _ in lines), 90)
    return visible("\n".join(["Next:", *(f"  {line:<{width}}  # {purpose}" for line, purpose in lines)]))


def _beside(model: str, name: str) -> Path:
    """Where a model's further output goes: into its run folder, or into the current folder for any other model."""
    return Path(model) / name if (Path(model) / "config.yaml").is_file() else Path(name)


def _shards_of(model: str) -> str:
    """The shards that a run folder was evaluated on, else those it was trained on; SHARDS for any other model."""
    path = Path(model) / "config.yaml"
    config = yaml.safe_load(path.read_text()) if path.is_file() else {}
    sets = config.get("evaluation", {}).get("sets", {})
    given = [*(one["shards"] for one in sets.values()), config.get("data", {}).get("train")]
    return next((shards for shards in given if isinstance(shards, str)), SHARDS)
