"""`mmrl eval` and `mmrl compare`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from mmrl.cli.options import Captions, Force, Json, Model, RandomWeights, parse_ints


def eval_(
    model: Model,
    shards: Annotated[
        list[str],
        typer.Argument(
            help="Shards, a folder of images with KEY.txt or KEY.json, or a data set in CLIP_benchmark's layout; "
            "NAME=SHARDS names the set (repeatable)."
        ),
    ],
    dims: Annotated[
        str | None,
        typer.Option(
            "--dims", "--dim", help="Dims to evaluate, e.g. 512,128 (default: the trained dims and the full dim)."
        ),
    ] = None,
    captions: Captions = None,
    ks: Annotated[
        str | None, typer.Option(help="More K of recall@K, e.g. 50,100; 1, 5 and 10 are always reported.")
    ] = None,
    directions: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated list of image_to_text, text_to_image, image_to_image, text_to_text (default: all "
            "that have positives in the set)."
        ),
    ] = None,
    folds: Annotated[int, typer.Option(min=1, help="Average over this many equal folds, e.g. 5 for COCO 1K.")] = 1,
    degrade: Annotated[
        int, typer.Option(min=0, help="Degrade this many images (JPEG, blur, size, crop) as queries for the originals.")
    ] = 0,
    classes: Annotated[
        str | None,
        typer.Option(help="Zero-shot classification by KEY.cls: a file with one class name per line, or imagenet."),
    ] = None,
    templates: Annotated[
        str | None,
        typer.Option(
            help="Prompts: imagenet (80), simple (7, the default), or a file with one template per line, with {c} for "
            "the class name."
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(help="Recommend the smallest dim and precision within it, e.g. recall_drop=1%,metric=R@10."),
    ] = None,
    vectors: Annotated[
        str | None, typer.Option(help="Number of vectors to compute memory for, e.g. 100M (default: 1M).")
    ] = None,
    compare: Annotated[list[str] | None, typer.Option(help="Baseline model to compare with (repeatable).")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for retrieval.json and report/index.html.")] = None,
    random_weights: RandomWeights = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Score retrieval in all directions, or zero-shot classification, at every dim.

    Under torchrun, srun or mpirun the processes divide the work.
    """
    from mmrl.distributed import comm
    from mmrl.evaluate.command import EvalOptions, evaluate_model
    from mmrl.evaluate.directions import DIRECTIONS
    from mmrl.model.source import with_random_weights

    if random_weights:
        model, compare = with_random_weights(model), [with_random_weights(one) for one in compare or ()]
    options = EvalOptions(
        dims=parse_ints("dims", dims),
        captions=captions,
        ks=parse_ints("ks", ks) or [],
        folds=folds,
        directions=DIRECTIONS if directions is None else directions.split(","),
        degrade=degrade,
        classes=classes,
        templates=templates,
        budget=budget,
        vectors=vectors,
        compare=compare or (),
    )
    result = evaluate_model(model, shards, options, out, quiet=as_json, force=force)
    if as_json and comm.world().is_rank_0:
        print(json.dumps(result, indent=2))


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Two or more run folders, or folders written by mmrl eval --out.")],
    metric: Annotated[
        list[str] | None, typer.Option(help="Metric to compare (repeatable; default: R@1 and R@10).")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for index.html, compare.md and compare.json.")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Compare evaluated runs: their scores, and paired differences to the first run with 95 % intervals."""
    from mmrl.evaluate.report.compare import DEFAULT_METRICS, compare_runs

    result = compare_runs(runs, metric or DEFAULT_METRICS, out, quiet=as_json, force=force)
    if as_json:
        print(json.dumps(result, indent=2))
