"""`mmrl search`: a text or a picture -> the nearest pictures of an index, as a table, JSON and a contact sheet.

Shapes: D the length of a query's vector.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmrl.errors import InputError
from mmrl.images import contact_sheet
from mmrl.inference.base import LoadedEncoder
from mmrl.inference.load import load
from mmrl.model.towers import offline
from mmrl.nesting import check_dims
from mmrl.search.embed import LONGEST_TEXT, identify
from mmrl.search.index import Index, open_index
from mmrl.search.items import Item


@dataclass(frozen=True)
class Hit:
    """One picture found."""

    rank: int
    row: int
    score: float
    """The cosine with the query at the dim searched."""
    item: Item

    def to_json(self) -> dict[str, Any]:
        """What `--json` and the page's API tell of it."""
        item = self.item
        return {
            "rank": self.rank,
            "score": self.score,
            "key": item.key,
            "captions": item.captions,
            "group": item.group,
            "group_name": item.group_name,
        }


@dataclass(frozen=True)
class Searcher:
    """An index and the encoder that it was made with."""

    index: Index
    encoder: LoadedEncoder

    @classmethod
    def open(
        cls, folder: Path, model: str | None = None, towers: Literal["both", "image", "text"] = "both"
    ) -> "Searcher":
        """Opens an index and the encoder that it names, or that `model` names.

        Raises:
            InputError: no index, an encoder that is gone or is not the one that the index was built with.
        """
        index = open_index(folder)
        with (
            nullcontext() if model else offline()
        ):  # an index may name a hub's repository that its reader did not choose
            return cls(index, load(_encoder_of(index, model), towers=towers))

    @property
    def widest(self) -> int:
        """The largest dim that can be searched."""
        return min(self.index.dim, self.encoder.dim)

    def embed_text(self, text: str) -> np.ndarray:
        """A text's vector: (D,).

        Raises:
            InputError: it is empty, too long, or no text.
        """
        return self.encoder.encode_texts([checked_text(text)])[0]

    def embed_picture(self, picture: Path | bytes) -> np.ndarray:
        """A picture's vector, from a file or its content: (D,).

        Raises:
            InputError: it cannot be read, is too large, or is no picture.
        """
        return self.encoder.encode_images([picture])[0]

    def find(
        self, query_D: np.ndarray, dim: int | None, k: int, group: str | None = None, exact: bool = False
    ) -> list[Hit]:
        """The k pictures nearest to a vector, the best first, by its first `dim` numbers; all where that is None.

        Raises:
            InputError: a k below 1, a dim that the index or the encoder does not have, no such group.
        """
        if k < 1:
            raise InputError(f"k: {k} is too small; give at least 1.")
        dim = self.widest if dim is None else dim
        check_dims([dim], self.widest, "dim")
        rows, scores = self.index.nearest(query_D, dim, k, group=group, exact=exact)
        return [
            Hit(rank, int(row), float(score), item)
            for rank, (row, score, item) in enumerate(zip(rows, scores, self.index.take(rows), strict=True), start=1)
        ]


def search(
    folder: Path,
    text: str | None,
    *,
    image: Path | None = None,
    model: str | None = None,
    dim: int | None = None,
    k: int = 5,
    group: str | None = None,
    exact: bool = False,
    picture: Path | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Shows the `k` pictures of an index that are nearest to a text, or to a picture; returns what `--json` prints.

    Args:
        image: the query where it is given; `text` is then not looked at.
        model: where the index's encoder is now; the path that the index keeps when left out.
        dim: the prefix searched; all of the index's vectors when left out.
        group: only pictures of this group.
        exact: pass by the codes of a compressed index.
        picture: a file for the contact sheet, of any kind that Pillow writes.

    Raises:
        InputError: no index, no query, an encoder that is gone or is not the one that the index was built with, a dim
            or group that the index does not have, a picture that cannot be read or written.
    """
    if image is None:
        text = checked_text(text)
    if k < 1:
        raise InputError(f"k: {k} is too small; give at least 1.")
    if picture is not None:
        contact_sheet.check(picture)
    searcher = Searcher.open(folder, model, "text" if image is None else "image")
    index = searcher.index
    dim = searcher.widest if dim is None else dim
    check_dims([dim], searcher.widest, "dim")
    query_D = searcher.embed_text(str(text)) if image is None else searcher.embed_picture(image)
    hits = searcher.find(query_D, dim, k, group, exact)
    console = Console(quiet=quiet)
    shown = image.name if image is not None else str(text)
    if image is not None and text:
        console.print(f"The picture is the query; the text {text!r} is not looked at.", highlight=False, markup=False)
    console.print(_table(shown, index, dim, hits))
    if picture is not None:
        note = f"{len(hits)} nearest of {len(index):,} pictures, by {dim} of {index.dim} numbers"
        contact_sheet.write(picture, shown, note, [_tile(hit) for hit in hits], image)
        console.print(f"Written: {picture}", highlight=False, markup=False, soft_wrap=True)
    return {
        "query": {"image": str(image)} if image is not None else {"text": text},
        "dim": dim,
        "count": len(index),
        "results": [hit.to_json() for hit in hits],
    }


def checked_text(text: str | None) -> str:
    """A query in words.

    Raises:
        InputError: it is empty, longer than any tower could read, or holds half characters.
    """
    if text is None or not text.strip():
        raise InputError("query: give a text, or a picture with --image FILE.")
    if len(text) > LONGEST_TEXT:
        raise InputError(
            f"query: a text of {len(text):,} letters is too long; at most {LONGEST_TEXT:,} are taken, and the encoder "
            "reads the first few dozen words."
        )
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError("query: the text is not valid Unicode; give it as UTF-8.") from None
    return text


def _encoder_of(index: Index, model: str | None) -> str | Path:
    """What to load for the index's queries."""
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
    return where


def _table(query: str, index: Index, dim: int, hits: Sequence[Hit]) -> Table:
    title = Text(f"{query}: {len(hits)} nearest of {len(index):,}, {dim}-d")
    table = Table(title=title)
    table.add_column("rank", justify="right")
    table.add_column("score", justify="right")
    table.add_column("key", overflow="fold")
    table.add_column("caption")
    for hit in hits:
        # As Text, or a caption such as "[red] shoe" would be read as markup.
        table.add_row(str(hit.rank), f"{hit.score:.3f}", Text(hit.item.key), Text(hit.item.caption))
    return table


def _tile(hit: Hit) -> contact_sheet.Tile:
    return contact_sheet.Tile(hit.item.thumbnail, f"{hit.rank}.", f"{hit.score:.3f}", hit.item.caption)
