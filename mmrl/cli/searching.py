"""`mmrl embed`, `mmrl index`, `mmrl search`, `mmrl serve` and `mmrl mine`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from mmrl.cli.options import BatchSize, Force, GroupKey, Json, Model, RandomWeights, parse_ints
from mmrl.errors import InputError
from mmrl.output.files import exclusive

IndexFolder = Annotated[Path, typer.Argument(metavar="INDEX", help="Output folder of mmrl index")]
IndexModel = Annotated[
    str | None, typer.Option(help="Path of the index's encoder (default: the path stored in the index)")
]


def embed(
    model: Model,
    source: Annotated[
        str,
        typer.Argument(
            metavar="SHARDS", help="Shards, a folder of images, or texts: a table, a .txt file or a folder of them"
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder for embeddings.parquet and texts.parquet")],
    dim: Annotated[
        str | None,
        typer.Option("--dim", "--dims", help="Embedding dims, e.g. 512,64 (default: the encoder's full dim)"),
    ] = None,
    precision: Annotated[
        str, typer.Option(help="One or more of fp32,fp16,int8,binary; one column per dim and precision")
    ] = "fp32",
    texts: Annotated[bool, typer.Option("--texts", help="Embed the texts, too, into texts.parquet")] = False,
    second: Annotated[
        bool, typer.Option("--second", help="Embed the samples' second members, e.g. passages, in place of the first")
    ] = False,
    npy: Annotated[bool, typer.Option("--npy", help="Also write .npy files in clip-retrieval's layout")] = False,
    group_key: GroupKey = "group",
    batch_size: BatchSize = 64,
    workers: Annotated[int, typer.Option(min=1, help="Number of processes; each loads the encoder")] = 1,
    force: Force = False,
    random_weights: RandomWeights = False,
    as_json: Json = False,
) -> None:
    """Embed the images and texts of SHARDS into Parquet files. Resumable: run the same command again."""
    from mmrl.model.source import with_random_weights
    from mmrl.output.next_steps import after_embed
    from mmrl.search.embed import embed_images

    with exclusive(out, "mmrl embed"):
        result = embed_images(
            with_random_weights(model) if random_weights else model,
            source,
            out,
            parse_ints("dim", dim),
            batch_size,
            precisions=precision.split(","),
            texts=texts,
            npy=npy,
            group_key=group_key,
            second=second,
            workers=workers,
            force=force,
            quiet=as_json,
        )
    print(json.dumps(result, indent=2) if as_json else after_embed(out, result["columns"]))


def index(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="EMBEDDINGS", help="Output of mmrl embed; with --delete or --compact, the index to change"
        ),
    ],
    out: Annotated[
        Path | None, typer.Argument(metavar="INDEX", help="New folder; with --add, the index to add to")
    ] = None,
    code: Annotated[
        str,
        typer.Option(
            help="exact: no compression; pq, binary, sq8 or fp32: code of the first search stage; auto: exact up to "
            "50,000 images, else pq"
        ),
    ] = "auto",
    dim: Annotated[
        int | None,
        typer.Option(
            "--dim", "--dims", help="Dim of the codes (default: the trained dim closest to a quarter of the full dim)"
        ),
    ] = None,
    candidates: Annotated[
        int | None,
        typer.Option(min=1, help="Images ranked by full vectors (default: calibrated for recall@10 of 0.99)"),
    ] = None,
    add: Annotated[
        bool, typer.Option("--add", help="Add EMBEDDINGS to INDEX; images with the same key are replaced")
    ] = False,
    delete: Annotated[
        list[str] | None,
        typer.Option(help="Key of an image to delete; @FILE: a file with one key per line (repeatable)"),
    ] = None,
    compact: Annotated[bool, typer.Option("--compact", help="Rewrite the index without its deleted images")] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Build an index of images and texts from embeddings, or add to, delete from or compact one."""
    from mmrl.output.next_steps import after_index
    from mmrl.search.build import add_to_index, compact_index, delete_from_index, write_index

    changes = bool(delete) or compact
    if sum((add, bool(delete), compact)) > 1 or changes == (out is not None):
        raise InputError(
            "index: give EMBEDDINGS INDEX, EMBEDDINGS INDEX --add, INDEX --delete KEY, or INDEX --compact."
        )
    with exclusive(out or source, "mmrl index"):
        if delete:
            manifest = delete_from_index(source, _read_keys(delete), as_json)
        elif out is None:
            manifest = compact_index(source, quiet=as_json)
        elif add:
            manifest = add_to_index(source, out, quiet=as_json)
        else:
            manifest = write_index(source, out, code=code, dim=dim, candidates=candidates, force=force, quiet=as_json)
    print(json.dumps(manifest, indent=2) if as_json else after_index(out or source))


def search(
    index: IndexFolder,
    query: Annotated[str | None, typer.Argument(metavar="QUERY", help="Query text; not needed with --image")] = None,
    image: Annotated[Path | None, typer.Option(help="Query image, instead of a text")] = None,
    model: IndexModel = None,
    dim: Annotated[
        int | None, typer.Option("--dim", "--dims", help="Embedding dim to compare at (default: the full dim)")
    ] = None,
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="Number of results")] = 5,
    group: Annotated[str | None, typer.Option(help="Search only images of this group")] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Compare all full vectors instead of using the index's codes")
    ] = False,
    within: Annotated[
        str | None, typer.Option("--in", help="images or texts (default: images, if the index has them)")
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw the results into this image file, e.g. found.png")] = None,
    as_json: Json = False,
) -> None:
    """Search the images or the texts of an index by text or by image, at any embedding dim."""
    from mmrl.output.next_steps import after_index
    from mmrl.search.query import search_index

    result = search_index(
        index,
        query,
        image=image,
        model=model,
        dim=dim,
        k=k,
        group=group,
        exact=exact,
        kind=within,
        picture=picture,
        quiet=as_json,
    )
    print(json.dumps(result, indent=2) if as_json else after_index(index))


def serve(
    source: Annotated[
        str,
        typer.Argument(metavar="INDEX|MODEL", help="Output folder of mmrl index, or an encoder: no page, only the API"),
    ],
    model: IndexModel = None,
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen on; the default accepts connections from this machine only, others need an API key "
            "in the environment variable MMRL_API_KEY"
        ),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: a free one")] = 8000,
) -> None:
    """Serve the search page of an index, and an embeddings API that OpenAI's clients can call (/docs describes it)."""
    from mmrl.search.serve import serve as run_server

    run_server(source, model, host, port)


def mine(
    model: Model,
    source: Annotated[str, typer.Argument(metavar="SHARDS", help="The shards to train on")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder for the negatives and the embeddings")],
    direction: Annotated[
        str,
        typer.Option(
            help="image_to_text: captions near a sample's image; text_to_image: images near its captions; or both"
        ),
    ] = "image_to_text",
    num: Annotated[int, typer.Option("--num", "-n", help="Negatives per sample")] = 8,
    margin: Annotated[
        float, typer.Option(help="Skip what scores above the matching pair's score minus this: it may be right")
    ] = 0.05,
    relative_margin: Annotated[
        float, typer.Option(help="Also skip what scores above this share less than the matching pair, e.g. 0.05")
    ] = 0.0,
    dim: Annotated[
        int | None, typer.Option("--dim", "--dims", help="Embedding dim to compare at (default: the full dim)")
    ] = None,
    captions: Annotated[bool, typer.Option("--captions", help="Write captions only, no keys of samples")] = False,
    group_key: GroupKey = "group",
    batch_size: BatchSize = 64,
    workers: Annotated[int, typer.Option(min=1, help="Number of processes that embed; each loads the encoder")] = 1,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Mine hard negatives for training: the nearest wrong items of each sample of SHARDS, by MODEL. The embeddings are
    resumable, and kept for further runs with other settings."""
    from mmrl.output.next_steps import after_mine
    from mmrl.search.mine import MineOptions, mine_negatives

    options = MineOptions(direction, num, margin, relative_margin, dim, captions, group_key)
    with exclusive(out, "mmrl mine"):
        result = mine_negatives(
            model, source, out, options, batch_size=batch_size, workers=workers, force=force, quiet=as_json
        )
    print(json.dumps(result, indent=2) if as_json else after_mine(model, out))


def _read_keys(options: list[str] | None) -> list[str]:
    """The keys of --delete options. An option that starts with @ is a file with one key per line."""
    keys = []
    for option in options or []:
        if not option.startswith("@"):
            keys.append(option)
            continue
        try:
            keys += [line for line in Path(option[1:]).read_text().splitlines() if line]
        except (OSError, ValueError) as error:
            raise InputError(f"delete: the file of keys {option[1:]} cannot be read ({error}).") from None
    return keys
