"""`mmrl search`: a text or a picture -> the nearest pictures of an index, as a table, JSON and a contact sheet."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmrl import sheet
from mmrl.errors import InputError
from mmrl.export.encoder import load
from mmrl.nesting import check_dims
from mmrl.search.embed import identify
from mmrl.search.index import Index, Item, open_index


@dataclass(frozen=True)
class Hit:
    """One picture found."""

    rank: int
    score: float
    """The cosine with the query at the dim searched."""
    item: Item


def search(
    folder: Path,
    text: str | None,
    *,
    image: Path | None = None,
    model: str | None = None,
    dim: int | None = None,
    k: int = 5,
    picture: Path | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Shows the `k` pictures of an index that are nearest to a text, or to a picture; returns what `--json` prints.

    Args:
        image: the query where it is given; `text` is then not looked at.
        model: where the index's encoder is now; the path that the index keeps when left out.
        dim: the prefix searched; all of the index's vectors when left out.
        picture: a file for the contact sheet, of any kind that Pillow writes.

    Raises:
        InputError: no index, no query, an encoder that is gone or is not the one that the index was built with, a dim
            that the index does not have, a picture that cannot be read or written.
    """
    if image is None and not (text and text.strip()):
        raise InputError("query: give a text, or a picture with --image FILE.")
    if k < 1:
        raise InputError(f"k: {k} is too small; give at least 1.")
    if picture is not None:
        sheet.check(picture)
    index = open_index(folder)
    query_D = _embedded_query(index, text, image, model)
    widest = min(index.dim, len(query_D))
    dim = widest if dim is None else dim
    check_dims([dim], widest, "dim")
    rows, scores = index.nearest(query_D, dim, k)
    hits = [
        Hit(rank, float(score), item)
        for rank, (score, item) in enumerate(zip(scores, index.items(rows), strict=True), start=1)
    ]
    console = Console(quiet=quiet)
    shown = image.name if image is not None else str(text)
    if image is not None and text:
        console.print(f"The picture is the query; the text {text!r} is not looked at.", highlight=False, markup=False)
    console.print(_table(shown, index, dim, hits))
    if picture is not None:
        note = f"{len(hits)} nearest of {len(index.vectors_ND):,} pictures, by {dim} of {index.dim} numbers"
        sheet.write(picture, shown, note, [_tile(hit) for hit in hits], image)
        console.print(f"Written: {picture}", highlight=False, markup=False, soft_wrap=True)
    return {
        "query": {"image": str(image)} if image is not None else {"text": text},
        "dim": dim,
        "count": len(index.vectors_ND),
        "results": [_as_json(hit) for hit in hits],
    }


def _embedded_query(index: Index, text: str | None, image: Path | None, model: str | None) -> np.ndarray:
    """The query's vector, from the one tower that it needs: (D,)."""
    kept = index.manifest["encoder"]
    named = model or kept["model"]
    try:
        _, where, digest = identify(named)
    except InputError as error:
        if model is not None:
            raise
        raise InputError(
            f"index: the encoder of {index.folder} cannot be opened: {error} Name its present place with --model."
        ) from None
    if digest != kept["origin_sha256"]:
        raise InputError(
            f"model: {index.folder} was built with another encoder (weights {kept['origin_sha256'][:12]}…) than "
            f"{named} is now ({digest[:12]}…); name that one with --model, or embed and index again."
        )
    encoder = load(where, towers="text" if image is None else "image")
    return encoder.encode_texts([str(text)])[0] if image is None else encoder.encode_images([image])[0]


def _table(query: str, index: Index, dim: int, hits: Sequence[Hit]) -> Table:
    title = Text(f"{query}: {len(hits)} nearest of {len(index.vectors_ND):,}, {dim}-d")
    table = Table(title=title)
    table.add_column("rank", justify="right")
    table.add_column("score", justify="right")
    table.add_column("key", overflow="fold")
    table.add_column("caption")
    for hit in hits:
        # As Text, or a caption such as "[red] shoe" would be read as markup.
        table.add_row(str(hit.rank), f"{hit.score:.3f}", Text(hit.item.key), Text(hit.item.captions[0]))
    return table


def _tile(hit: Hit) -> sheet.Tile:
    return sheet.Tile(hit.item.thumbnail, f"{hit.rank}.", f"{hit.score:.3f}", hit.item.captions[0])


def _as_json(hit: Hit) -> dict[str, Any]:
    item = hit.item
    return {"rank": hit.rank, "score": hit.score, "key": item.key, "captions": item.captions, "group": item.group}
