"""`mmrl eval` and `mmrl compare`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from mmrl.cli.options import Json, Model, numbers


def eval_(
    model: Model,
    shards: Annotated[
        list[str],
        typer.Argument(
            help="Shards, a folder of pictures with KEY.txt or KEY.json, or a data set of CLIP_benchmark's form; "
            "NAME=SHARDS names a set, several may be given"
        ),
    ],
    dims: Annotated[str | None, typer.Option(help="Such as 512,128; the trained dims when left out")] = None,
    captions: Annotated[int | None, typer.Option(min=1, help="Captions of each sample used; all when left out")] = None,
    ks: Annotated[str | None, typer.Option(help="The K of recall@K, beside 1, 5 and 10; such as 50,100")] = None,
    directions: Annotated[
        str | None,
        typer.Option(help="Of image_to_text, text_to_image, image_to_image, text_to_text; all that the set has"),
    ] = None,
    folds: Annotated[int, typer.Option(min=1, help="Mean over so many equal parts: 5 for COCO's 1K")] = 1,
    degrade: Annotated[
        int, typer.Option(min=0, help="Degrade so many pictures (JPEG, blur, size, crop) and look for their originals")
    ] = 0,
    classes: Annotated[
        str | None, typer.Option(help="Zero-shot classification by KEY.cls: a file with a class a line, or imagenet")
    ] = None,
    templates: Annotated[
        str | None, typer.Option(help="Prompts: imagenet (80), simple (7), or a file of lines with {c} for the class")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="Advise the smallest dim and precision within it: recall_drop=1%,metric=R@10")
    ] = None,
    vectors: Annotated[str | None, typer.Option(help="How many vectors the advice is for, such as 100M")] = None,
    compare: Annotated[
        list[str] | None, typer.Option(help="Another model on the same sets, as the un-nested twin; may be repeated")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write retrieval.json and report/index.html there")] = None,
    as_json: Json = False,
) -> None:
    """Score retrieval in all directions, or zero-shot classification, at every dim. Under torchrun work is divided."""
    from mmrl.distributed import comm
    from mmrl.evaluate.command import Asked, evaluate_model
    from mmrl.evaluate.sets import DIRECTIONS

    asked = Asked(
        dims=numbers("dims", dims),
        captions=captions,
        ks=numbers("ks", ks) or [],
        folds=folds,
        directions=DIRECTIONS if directions is None else directions.split(","),
        degrade=degrade,
        classes=classes,
        templates=templates,
        budget=budget,
        vectors=vectors,
        compare=compare or (),
    )
    result = evaluate_model(model, shards, asked, out, quiet=as_json)
    if as_json and comm.world().is_rank_0:
        print(json.dumps(result, indent=2))


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, or folders that mmrl eval --out wrote; two or more")],
    metric: Annotated[list[str] | None, typer.Option(help="R@1 and R@10 by default; may be repeated")] = None,
    out: Annotated[Path | None, typer.Option(help="Write index.html, compare.md and compare.json there")] = None,
    as_json: Json = False,
) -> None:
    """Put evaluated runs side by side, with paired intervals of each one's lead over the first."""
    from mmrl.evaluate.report import compare as comparing

    result = comparing.compare(runs, metric or comparing.METRICS, out, quiet=as_json)
    if as_json:
        print(json.dumps(result, indent=2))
