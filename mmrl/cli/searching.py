"""`mmrl embed`, `mmrl index`, `mmrl search` and `mmrl serve`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from mmrl.cli.options import Json, Model, numbers
from mmrl.errors import InputError


def embed(
    model: Model,
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
        numbers("dim", dim),
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
