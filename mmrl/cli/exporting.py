"""`mmrl export` and `mmrl rotate`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from mmrl.cli.options import Json, Model, numbers


def export(
    model: Model,
    out: Annotated[Path, typer.Argument(help="New folder; OUT/D for each dim where several are given")],
    dim: Annotated[str, typer.Option(help="Such as 128, or 512,128")],
    format: Annotated[
        str, typer.Option(help="bundle, open_clip, onnx, sentence_transformers, transformers or transformers.js")
    ] = "bundle",
    quantize: Annotated[
        str | None, typer.Option(help="Of ONNX graphs: fp16, int8 or both (fp16,int8), beside float32")
    ] = None,
    check_shards: Annotated[
        str | None, typer.Option(help="Samples that the export is checked on; the starter set's when left out")
    ] = None,
    measure: Annotated[
        str | None,
        typer.Option(help="Shards to measure each variant's recall on; int8 becomes the default if it holds"),
    ] = None,
    license: Annotated[str | None, typer.Option(help="For the model card, such as apache-2.0")] = None,
    as_json: Json = False,
) -> None:
    """Write the encoder whose vectors are the first DIM numbers, with its projections really cut (layers are not)."""
    from mmrl.export.bundles import export as export_encoders
    from mmrl.export.card import line

    manifests = export_encoders(
        model,
        out,
        numbers("dim", dim) or [],
        format,
        quantize=(quantize or "").split(",") if quantize else (),
        check_shards=check_shards,
        measure_shards=measure,
        licence=license,
        on_done=None if as_json else lambda folder, manifest: print(line(folder, manifest)),
    )
    if as_json:
        print(json.dumps(manifests, indent=2))


def rotate(
    model: Model,
    shards: Annotated[
        str, typer.Argument(help="Shards of your own, ten samples or more for each number of the vectors")
    ],
    out: Annotated[Path, typer.Argument(help="New folder for the encoder")],
    dims: Annotated[
        str | None, typer.Option(help="What it is to be cut to, such as 512,128; halves down to 8 when left out")
    ] = None,
    validate: Annotated[
        str | None,
        typer.Option(metavar="SHARDS", help="Show recall before and after on these; write only what is better"),
    ] = None,
    keep: Annotated[
        int | None, typer.Option(min=0, help="Leave the first so many numbers as they are, such as trained dims")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Read about so many, spread over the shards; all when left out")
    ] = None,
    captions: Annotated[int | None, typer.Option(min=1, help="Captions of each sample used; all when left out")] = None,
    steps: Annotated[
        int,
        typer.Option(min=0, help="Of learning the rotation from the vectors; 0 stops at their principal directions"),
    ] = 300,
    as_json: Json = False,
) -> None:
    """Make a trained encoder cuttable without training: whole vectors compare as before, a prefix says most of it."""
    from mmrl.distributed import comm
    from mmrl.rotation.command import rotate_model

    cuts = numbers("dims", dims)
    manifest = rotate_model(model, shards, out, cuts, validate, keep, samples, captions, steps, quiet=as_json)
    if as_json and comm.world().is_rank_0:
        print(json.dumps(manifest, indent=2))
