"""`mmrl …`: parse, call, print. Each command imports what it needs, so that --help is quick."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmrl.errors import InputError, RunStopped

if TYPE_CHECKING:
    from mmrl.data.check_shard import Tokens
    from mmrl.data.sources import DataConfig

app = typer.Typer(
    name="mmrl",
    help="Train, evaluate and export image-text encoders with nested (Matryoshka) embeddings.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
config_app = typer.Typer(help="About config files.", no_args_is_help=True)
app.add_typer(config_app, name="config")

Json = Annotated[bool, typer.Option("--json", help="Print machine-readable results.")]


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="YAML file, such as configs/quickstart.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="train.batch_size=128")] = None,
) -> None:
    """Carry out the run that CONFIG describes. Start it under torchrun for several processes."""
    from mmrl import config as configs
    from mmrl.train import train

    train(configs.load(config, overrides or []))


@app.command()
def plan(
    config: Annotated[str, typer.Argument(help="YAML file, such as configs/vit_b32_512_to_64.yaml")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="train.batch_size=32768")
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of the planned run, one process each")] = 8,
    memory: Annotated[float, typer.Option(min=1, help="GB of memory of each")] = 80.0,
    tflops: Annotated[
        float | None, typer.Option(min=0.001, help="TFLOP/s that a GPU reaches; 40 % of an H100's")
    ] = None,
    gigabytes: Annotated[
        float | None, typer.Option(min=0.001, help="GB/s sent; 80 % of NVLink's, or of 400 Gb/s")
    ] = None,
    as_json: Json = False,
) -> None:
    """Tell what CONFIG needs of memory, network and time, before anything is booked."""
    from mmrl import config as configs
    from mmrl import plan as planning

    result = planning.plan(configs.load(config, overrides or []), gpus, memory, tflops, gigabytes)
    print(json.dumps(result.as_json(), indent=2) if as_json else "\n".join(planning.lines(result)))


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="Run folder, checkpoint, bundle, or open_clip:NAME[:PRETRAINED]")],
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
    from mmrl import distributed
    from mmrl.evaluate.command import Asked, evaluate_model
    from mmrl.evaluate.sets import DIRECTIONS

    asked = Asked(
        dims=_numbers("dims", dims),
        captions=captions,
        ks=_numbers("ks", ks) or [],
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
    if as_json and distributed.world().is_main:
        print(json.dumps(result, indent=2))


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, or folders that mmrl eval --out wrote; two or more")],
    metric: Annotated[list[str] | None, typer.Option(help="R@1 and R@10 by default; may be repeated")] = None,
    out: Annotated[Path | None, typer.Option(help="Write index.html, compare.md and compare.json there")] = None,
    as_json: Json = False,
) -> None:
    """Put evaluated runs side by side, with paired intervals of each one's lead over the first."""
    from mmrl.evaluate import compare as comparing

    result = comparing.compare(runs, metric or comparing.METRICS, out, quiet=as_json)
    if as_json:
        print(json.dumps(result, indent=2))


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="Run folder, checkpoint, bundle, or open_clip:NAME[:PRETRAINED]")],
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
    from mmrl.export.summary import line

    manifests = export_encoders(
        model,
        out,
        _numbers("dim", dim) or [],
        format,
        quantize=(quantize or "").split(",") if quantize else (),
        check_shards=check_shards,
        measure_shards=measure,
        licence=license,
        on_done=None if as_json else lambda folder, manifest: print(line(folder, manifest)),
    )
    if as_json:
        print(json.dumps(manifests, indent=2))


@app.command()
def rotate(
    model: Annotated[str, typer.Argument(help="Run folder, checkpoint, bundle, or open_clip:NAME[:PRETRAINED]")],
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
    as_json: Json = False,
) -> None:
    """Make a trained encoder cuttable without training: whole vectors compare as before, a prefix says most of it."""
    from mmrl import distributed
    from mmrl.export.rotate import rotate_model

    manifest = rotate_model(
        model, shards, out, _numbers("dims", dims), validate, keep, samples, captions, quiet=as_json
    )
    if as_json and distributed.world().is_main:
        print(json.dumps(manifest, indent=2))


@app.command()
def pack(
    source: Annotated[
        Path, typer.Argument(help="Folder of pictures with KEY.txt or KEY.json, or CSV|TSV|JSONL|Parquet")
    ],
    out: Annotated[Path, typer.Argument(help="New folder for the shards")],
    image_column: Annotated[
        str | None,
        typer.Option(help="Column of paths (image, image_path, path, … by default) or, if named, of URLs to fetch"),
    ] = None,
    caption_column: Annotated[
        list[str] | None, typer.Option(help="May be repeated; caption, captions, text and title by default")
    ] = None,
    group_column: Annotated[str | None, typer.Option(help="Names the item: one item is no negative of itself")] = None,
    samples_per_shard: Annotated[int, typer.Option(min=1)] = 1000,
    max_side: Annotated[int | None, typer.Option(min=1, help="Make larger pictures this small, as JPEG")] = None,
    dedup: Annotated[
        bool, typer.Option("--dedup", help="Of pictures equal byte for byte keep the first, lose the others' captions")
    ] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes at work; one a core by default")] = None,
    as_json: Json = False,
) -> None:
    """Pack image-text pairs of your own into shards. Stopped, the same command goes on where it stood."""
    from mmrl.data import pack as packing
    from mmrl.data.workers import usable_cores

    result = packing.pack(
        source,
        out,
        image_column=image_column,
        caption_columns=caption_column or (),
        group_column=group_column,
        samples_per_shard=samples_per_shard,
        max_side=max_side,
        dedup=dedup,
        workers=workers or usable_cores(),
        quiet=as_json,
    )
    if as_json:
        print(json.dumps(result, indent=2))


@app.command()
def check(
    shards: Annotated[list[str] | None, typer.Argument(help="Shards; those of the config when left out")] = None,
    config: Annotated[
        Path | None, typer.Option(help="A run's YAML: its shards, fields, limits, batch size and tokenizer")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Global batch of the planned run")] = None,
    world_size: Annotated[int, typer.Option(min=1, help="Processes (GPUs) of the planned run")] = 1,
    loader_workers: Annotated[int | None, typer.Option(min=0, help="data.workers of the planned run")] = None,
    decode: Annotated[
        bool, typer.Option(help="Decode every picture as training does; without it many times faster")
    ] = True,
    tokenizer: Annotated[
        str | None, typer.Option(help="Model config, such as ViT-B-32, whose tokenizer tells captions' lengths")
    ] = None,
    index: Annotated[bool, typer.Option("--index", help="Write each shard's index beside it")] = False,
    sheet: Annotated[Path | None, typer.Option(help="Draw random samples into this file, such as sheet.png")] = None,
    list_file: Annotated[Path | None, typer.Option("--list", help="Write every problem there, as JSON lines")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes that check; all cores by default")] = None,
    as_json: Json = False,
) -> None:
    """Find every problem of SHARDS before a run: exit 0 if they are fit to train on, 1 if not."""
    from mmrl.data import check as checking

    data, tokens, side, planned = _to_check(shards or [], config, tokenizer)
    result = checking.check(
        data,
        batch_size=batch_size or planned,
        world_size=world_size,
        loader_workers=loader_workers,
        decode=decode,
        tokens=tokens,
        least_side=side,
        workers=workers,
        index=index,
        list_file=list_file,
        sheet_file=sheet,
        quiet=as_json,
    )
    if as_json:
        print(json.dumps(result.as_json(), indent=2))
    if not result.ok:
        raise typer.Exit(1)


def _to_check(
    shards: list[str], config: Path | None, tokenizer: str | None
) -> "tuple[DataConfig, Tokens | None, int, int | None]":
    """The data section, the tokenizer, the least side of a picture and the batch size that the options mean."""
    from mmrl import config as configs
    from mmrl.data.check_shard import Tokens
    from mmrl.data.sources import DataConfig

    if config is None and not shards:
        raise InputError("shards: none are given; name a tar, a folder, a pattern, @list.txt, or a run with --config.")
    run = None if config is None else configs.load(config)
    data = DataConfig() if run is None else run.data
    if shards:
        data = data.model_copy(update={"train": shards, "sources": []})
    model = tokenizer or (run.model.name if run else None)
    if model is None:
        return data, None, 64, None
    from mmrl.model import towers

    tokenise = towers.tokenise_of(model)
    side = towers.input_side(towers.read_model_cfg(model))
    return data, Tokens(tokenise.lengths, tokenise.context_length), side, run.train.batch_size if run else None


@app.command()
def embed(
    model: Annotated[str, typer.Argument(help="Run folder, checkpoint, bundle, or open_clip:NAME[:PRETRAINED]")],
    source: Annotated[str, typer.Argument(metavar="SHARDS", help="Shards, or a folder of pictures")],
    out: Annotated[Path, typer.Argument(help="New folder for embeddings.parquet; a stopped one goes on")],
    dim: Annotated[
        str | None, typer.Option(help="Lengths of the vectors, such as 512,64; the encoder's own when left out")
    ] = None,
    precision: Annotated[
        str, typer.Option(help="Some of fp32,fp16,int8,binary: a column for each dim at each")
    ] = "fp32",
    texts: Annotated[bool, typer.Option("--texts", help="Embed the captions as well: texts.parquet")] = False,
    npy: Annotated[
        bool, typer.Option("--npy", help="The vectors as .npy too, laid out as clip-retrieval does")
    ] = False,
    group_key: Annotated[str, typer.Option(help="The key in a sample's JSON that is kept as its group")] = "group",
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures encoded at once")] = 64,
    workers: Annotated[int, typer.Option(min=1, help="Processes, each with an encoder of its own")] = 1,
    as_json: Json = False,
) -> None:
    """Embed every picture of SHARDS, for an index or another tool. Stopped, the same command goes on where it stood."""
    from mmrl.search.embed import embed_pictures

    result = embed_pictures(
        model,
        source,
        out,
        _numbers("dim", dim),
        batch_size,
        precisions=precision.split(","),
        texts=texts,
        npy=npy,
        group_key=group_key,
        workers=workers,
        quiet=as_json,
    )
    if as_json:
        print(json.dumps(result, indent=2))


@app.command()
def index(
    source: Annotated[
        Path, typer.Argument(metavar="EMBEDDINGS", help="What mmrl embed wrote; the INDEX, for --delete and --compact")
    ],
    out: Annotated[
        Path | None, typer.Argument(metavar="INDEX", help="New folder; with --add the index that grows")
    ] = None,
    code: Annotated[
        str, typer.Option(help="exact, or what the first stage searches: pq, binary, int8, fp32; auto: by size")
    ] = "auto",
    dim: Annotated[
        int | None, typer.Option(min=1, help="The first stage looks at so many numbers; about a quarter by default")
    ] = None,
    grow: Annotated[bool, typer.Option("--add", help="Add to INDEX; equal keys are replaced")] = False,
    delete: Annotated[
        list[str] | None, typer.Option(help="Take out the picture of this key; @FILE holds a key a line")
    ] = None,
    compact: Annotated[bool, typer.Option("--compact", help="Rewrite INDEX without what was deleted")] = False,
    as_json: Json = False,
) -> None:
    """Make an index of embeddings, add to one, delete from one."""
    from mmrl.search import build

    changes = bool(delete) or compact
    if sum((grow, bool(delete), compact)) > 1 or changes == (out is not None):
        raise InputError(
            "index: want EMBEDDINGS INDEX, EMBEDDINGS INDEX --add, INDEX --delete KEY, or INDEX --compact."
        )
    if out is None:
        manifest = build.delete(source, _listed(delete), as_json) if delete else build.compact(source, quiet=as_json)
    elif grow:
        manifest = build.add(source, out, quiet=as_json)
    else:
        manifest = build.write_index(source, out, code=code, dim=dim, quiet=as_json)
    if as_json:
        print(json.dumps(manifest, indent=2))


@app.command()
def search(
    index: Annotated[Path, typer.Argument(help="What mmrl index wrote")],
    query: Annotated[str | None, typer.Argument(help="A text; not needed with --image")] = None,
    image: Annotated[Path | None, typer.Option(help="Search by this picture instead")] = None,
    model: Annotated[str | None, typer.Option(help="Where the index's encoder is now, if it has moved")] = None,
    dim: Annotated[int | None, typer.Option(min=1, help="Compare the first so many numbers; all when left out")] = None,
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="How many pictures to show")] = 5,
    group: Annotated[str | None, typer.Option(help="Only pictures of this group")] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Compare all vectors, also where the index has codes")] = False,
    picture: Annotated[
        Path | None, typer.Option(help="Draw the pictures found into this file, such as found.png")
    ] = None,
    as_json: Json = False,
) -> None:
    """Find the pictures nearest to a text, or to a picture, at any dim."""
    from mmrl.search import query as queries

    result = queries.search(
        index, query, image=image, model=model, dim=dim, k=k, group=group, exact=exact, picture=picture, quiet=as_json
    )
    if as_json:
        print(json.dumps(result, indent=2))


@app.command()
def serve(
    index: Annotated[Path, typer.Argument(help="What mmrl index wrote")],
    model: Annotated[str | None, typer.Option(help="Where the index's encoder is now, if it has moved")] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; this machine alone by default")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one")] = 8000,
) -> None:
    """Show an index in the browser: type a text or drop a picture. Its API is described at /docs."""
    from mmrl.search.serve import serve

    serve(index, model, host, port)


def _listed(names: list[str] | None) -> list[str]:
    """Names, those that begin with @ being files of names."""
    found = []
    for name in names or []:
        if not name.startswith("@"):
            found.append(name)
            continue
        try:
            found += [line for line in Path(name[1:]).read_text().splitlines() if line]
        except (OSError, ValueError) as error:
            raise InputError(f"delete: the list {name[1:]} cannot be read ({error}).") from None
    return found


@config_app.command("schema")
def schema() -> None:
    """Print the JSON schema of config files, for editors."""
    from mmrl import config as configs

    print(configs.schema())


def _numbers(option: str, text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{option}: {text!r} is no list of numbers such as 512,128.") from None


def main() -> None:
    """The entry point: exit 0 for success, 2 for a mistake of the user's, 1 for anything else."""
    try:
        app()
    except InputError as error:
        print(f"mmrl: {error}", file=sys.stderr)
        sys.exit(2)
    except RunStopped as error:
        print(f"mmrl: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
