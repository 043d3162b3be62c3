"""Embeds the test sets of claims.py with a trained run, and with what is computed from it without training.

Shapes: N images and their names, M captions, D full dim.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from claims_runs import NESTED, PLAIN, Run
from claims_scores import Embeddings
from rich.console import Console

from mmrl import nesting
from mmrl.data.sources import open_reader
from mmrl.evaluate import sets
from mmrl.model import bundle
from mmrl.rotation.command import rotate_model
from mmrl.train.trainer import train

LAST, ROTATED, PCA_BASIS = "", "rotate-", "pca-"
"""File prefixes of embeddings: of the last checkpoint as it is, after `mmrl rotate`, in the PCA basis."""
ROTATED_FOLDER = "rotate"


def measure(run: Run) -> None:
    """Write all embeddings of a trained run that are not written yet."""
    embed_tests(run, run.last, LAST)
    if run.has_curve:
        first = next(iter(run.data_set.tests))
        for checkpoint in sorted((run.folder / "checkpoints").glob("step-*")):
            embed_tests(run, checkpoint, f"{checkpoint.name}-", only=first)
    if run.arm in (PLAIN, NESTED):
        _rotate(run)
    if run.arm == PLAIN:
        _fit_pca(run)


def train_and_embed(run: Run) -> str:
    """Trains a run and embeds its test sets, or resumes it; returns one line about it. For other scripts' runs."""
    began = time.monotonic()
    train(run.config, Console(quiet=True))
    embed_tests(run, run.last, LAST)
    run.done_file.write_text(json.dumps({"finished": True}))
    return f"{run.arm}, seed {run.seed}: {time.monotonic() - began:.0f} s"


def _rotate(run: Run) -> None:
    """Rotate the run's last encoder by its training set, as `mmrl rotate` does by default, and embed the test sets."""
    rotated = run.folder / ROTATED_FOLDER
    if not rotated.exists():
        rotate_model(str(run.last), run.data_set.train, rotated, dims=run.dims, quiet=True)
    embed_tests(run, rotated, ROTATED)


def embed_tests(run: Run, encoder: Path, prefix: str, only: str | None = None) -> None:
    """Write the embeddings of the test sets, or of one of them, to the run's folder, unless they are there."""
    for name, shards in run.data_set.tests.items():
        path = run.folder / f"{prefix}{name}.npz"
        if not path.exists() and only in (None, name):
            _embed(encoder, shards).save(path)


def load_tests(runs: Sequence[Run], test: str, prefix: str = LAST) -> list[Embeddings]:
    """The embeddings of a test set by each run."""
    return [Embeddings.load(run.folder / f"{prefix}{test}.npz") for run in runs]


def _embed(encoder: Path, shards: str, captions: int | None = None) -> Embeddings:
    opened = bundle.open_model(encoder)
    found = sets.embed(open_reader(shards), opened, captions=captions)
    image_ND, text_MD = (F.normalize(rows.double(), dim=-1).float().numpy() for rows in (found.image_ND, found.text_MD))
    group_N, group_M = found.image_group_N.numpy(), found.text_group_M.numpy()
    _, name_N = np.unique(found.image_of_text_M.numpy(), return_index=True)  # a sample's first text is its name
    queries = _text_queries(group_M.tolist(), found.captions)
    return Embeddings(image_ND, text_MD[name_N], group_N, text_MD[queries], group_M[queries])


def _text_queries(groups: Sequence[int], captions: Sequence[str]) -> list[int]:
    """The indices of the captions used for text→text. A caption that starts with a shorter one of its group is left
    out, because it would be found by its spelling."""
    kept: dict[int, list[int]] = {}
    for index in sorted(range(len(captions)), key=lambda index: len(captions[index])):
        same_group = kept.setdefault(groups[index], [])
        if not any(captions[index].startswith(captions[other]) for other in same_group):
            same_group.append(index)
    return sorted(index for same_group in kept.values() for index in same_group)


def _fit_pca(run: Run) -> None:
    """Write the test embeddings in the PCA basis of the training set's unit vectors: one basis for both modalities,
    each centred by its own training mean."""
    paths = {name: run.folder / f"{PCA_BASIS}{name}.npz" for name in run.data_set.tests}
    if all(path.exists() for path in paths.values()):
        return
    trained = _embed(run.last, run.data_set.train, captions=1)
    means = [rows.astype(np.float64).mean(0) for rows in (trained.image_ND, trained.text_ND)]
    moments = [
        (rows - mean).T @ (rows - mean) / len(rows)
        for rows, mean in zip((trained.image_ND, trained.text_ND), means, strict=True)
    ]
    rotation_DD = nesting.principal_rotation(torch.from_numpy(sum(moments) / 2)).numpy()
    for name, path in paths.items():
        plain = Embeddings.load(run.folder / f"{LAST}{name}.npz")
        image_ND, text_ND, caption_MD = (
            ((rows - mean) @ rotation_DD.T).astype(np.float32)
            for rows, mean in zip((plain.image_ND, plain.text_ND, plain.caption_MD), [*means, means[1]], strict=True)
        )
        Embeddings(image_ND, text_ND, plain.group_N, caption_MD, plain.caption_group_M).save(path)
