"""`mmrl export` and `mmrl rotate`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from mmrl.cli.options import Captions, Force, Json, Model, RandomWeights, parse_ints


def export(
    model: Model,
    out: Annotated[Path, typer.Argument(help="New folder; OUT/D per dim if several are given.")],
    dim: Annotated[
        str, typer.Option("--dim", "--dims", help="Dims to export, e.g. 128 or 512,128; any from 1 to the full dim.")
    ],
    format: Annotated[
        str,
        typer.Option(help="bundle, open_clip, onnx, openvino, sentence_transformers, transformers or transformers.js."),
    ] = "bundle",
    quantize: Annotated[
        str | None, typer.Option(help="Variants of ONNX graphs in addition to fp32: fp16, int8 or fp16,int8.")
    ] = None,
    check_shards: Annotated[
        str | None, typer.Option(help="Samples to check the export on (default: the starter set).")
    ] = None,
    measure: Annotated[
        str | None,
        typer.Option(
            help="Shards to measure each variant's recall on; int8 becomes the default if it loses at most 1 %."
        ),
    ] = None,
    license: Annotated[str | None, typer.Option(help="Licence for the model card, e.g. apache-2.0.")] = None,
    random_weights: RandomWeights = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Export an encoder per dim: embeddings truncated to DIM, projections included (other layers are unchanged)."""
    from mmrl.export.bundles import export as export_encoders
    from mmrl.model.source import with_random_weights
    from mmrl.output.next_steps import after_export

    dims = parse_ints("dim", dim) or []
    manifests = export_encoders(
        with_random_weights(model) if random_weights else model,
        out,
        dims,
        format,
        quantize=(quantize or "").split(",") if quantize else (),
        check_shards=check_shards,
        measure_shards=measure,
        licence=license,
        force=force,
        log=None if as_json else print,
    )
    print(json.dumps(manifests, indent=2) if as_json else after_export(model, out, dims, measure or check_shards))


def rotate(
    model: Model,
    shards: Annotated[str, typer.Argument(help="Shards of your data; 10 samples per embedding dim or more.")],
    out: Annotated[Path, typer.Argument(help="New folder for the rotated encoder.")],
    dims: Annotated[
        str | None,
        typer.Option(
            "--dims", "--dim", help="Dims to optimise, e.g. 512,128 (default: the trained dims, else halves down to 8)."
        ),
    ] = None,
    validate: Annotated[
        str | None,
        typer.Option(metavar="SHARDS", help="Show recall before and after on these shards; write only if it improves."),
    ] = None,
    keep: Annotated[
        int | None, typer.Option(min=0, help="Leave the first KEEP dims unchanged, e.g. trained dims.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Use about this many samples, spread over the shards (default: all).")
    ] = None,
    captions: Captions = None,
    steps: Annotated[int, typer.Option(min=0, help="Steps to learn the rotation after PCA; 0: PCA only.")] = 300,
    random_weights: RandomWeights = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Rotate a trained encoder so that its embeddings can be truncated. No training; full-dim similarities are
    unchanged."""
    from mmrl.distributed import comm
    from mmrl.model.source import with_random_weights
    from mmrl.output.next_steps import after_train
    from mmrl.rotation.command import rotate_model

    model = with_random_weights(model) if random_weights else model
    at = parse_ints("dims", dims)
    manifest = rotate_model(
        model, shards, out, at, validate, keep, samples, captions, steps, quiet=as_json, force=force
    )
    if comm.world().is_rank_0:
        sets, scores = {"val": validate} if validate else {}, out.with_name(f"{out.name}-eval")
        print(json.dumps(manifest, indent=2) if as_json else after_train(out, sets, scores))
