"""`mmrl search`: the images of an index nearest to a text or an image, as a table, as JSON and as a contact sheet.

Shapes: D query embedding dim.
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
from mmrl.model.bundle import dims_up_to
from mmrl.model.guards import offline
from mmrl.nesting import check_dims, untrained_note
from mmrl.output.console import print_line, visible
from mmrl.search.embed import MAX_TEXT_LENGTH
from mmrl.search.encoder_identity import identify_encoder
from mmrl.search.index import Index, index_of, open_index
from mmrl.search.items import Item


@dataclass(frozen=True)
class Hit:
    """One search result."""

    rank: int
    row: int
    score: float
    """Cosine similarity with the query at the searched dim."""
    item: Item

    def to_json(self) -> dict[str, Any]:
        """A result as `mmrl search --json` prints it."""
        item = {name: getattr(self.item, name) for name in ("key", "captions", "group", "group_name")}
        return {"rank": self.rank, "score": self.score, **item}


@dataclass(frozen=True)
class Searcher:
    """An index and the encoder of its queries."""

    index: Index
    encoder: LoadedEncoder

    @classmethod
    def open(
        cls,
        folder: Path,
        model: str | None = None,
        towers: Literal["both", "image", "text"] = "both",
        kind: str | None = None,
    ) -> "Searcher":
        """Opens an index of `kind`, images or texts (default: images, else texts), and its encoder: `model` if given,
        else the path stored in the index. Raises InputError: not an index, or the encoder cannot be opened or differs
        from the one that built the index."""
        index = open_index(index_of(folder, kind))
        # Offline unless --model is given: the path stored in an index may name a Hugging Face repository.
        with nullcontext() if model else offline():
            return cls(index, load(_find_encoder(index, model), towers=towers))

    @property
    def max_dim(self) -> int:
        """The largest dim that can be searched."""
        return min(self.index.dim, self.encoder.dim)

    @property
    def nested_dims(self) -> tuple[int, ...]:
        """The trained dims up to `max_dim`, ascending."""
        return dims_up_to(self.index.manifest["nested_dims"], self.max_dim)

    def check_options(self, dim: int | None, k: int) -> int:
        """The dim to search at (None: `max_dim`); raises InputError as `search`."""
        if k < 1:
            raise InputError(f"k: {k} is too small; give at least 1.")
        dim = self.max_dim if dim is None else dim
        check_dims([dim], self.max_dim, "dim")
        return dim

    def search(
        self, query_D: np.ndarray, dim: int | None, k: int, group: str | None = None, exact: bool = False
    ) -> list[Hit]:
        """The k nearest images to a query embedding at `dim` (None: `max_dim`), most similar first. Raises InputError:
        k is below 1, or the index or its encoder lacks this dim or group."""
        dim = self.check_options(dim, k)
        rows, scores = self.index.nearest(query_D, dim, k, group=group, exact=exact)
        return [
            Hit(rank, int(row), float(score), item)
            for rank, (row, score, item) in enumerate(
                zip(rows, scores, self.index.items.take(rows), strict=True), start=1
            )
        ]


def search_index(
    folder: Path,
    text: str | None,
    *,
    image: Path | None = None,
    model: str | None = None,
    dim: int | None = None,
    k: int = 5,
    group: str | None = None,
    exact: bool = False,
    kind: str | None = None,
    picture: Path | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Searches an index by text or by image, prints a table of the k nearest images or texts, and returns them.

    Args:
        image: query image; `text` is then ignored.
        model: path of the index's encoder (default: the path stored in the index).
        dim: embedding dim to compare at (default: the index's full dim).
        group: search only images of this group.
        exact: compare all full vectors instead of using the index's codes.
        kind: images or texts (default: images, else texts).
        picture: file to draw the results into as a contact sheet, in any image format that Pillow writes.

    Raises:
        InputError: not an index; no query; the encoder cannot be opened or differs from the one that built the index;
            no such dim or group; an image cannot be read or written.
    """
    if image is None:
        text = check_query_text(text)
    if picture is not None:
        contact_sheet.check_path(picture)
    searcher = Searcher.open(folder, model, "text" if image is None else "image", kind)
    index = searcher.index
    if picture is not None and index.kind == "texts":
        raise InputError("picture: texts have no thumbnails; leave out --picture, or search --in images.")
    dim = searcher.check_options(dim, k)
    encoder = searcher.encoder
    (query_D,) = encoder.encode_texts([str(text)]) if image is None else encoder.encode_images([image])
    hits = searcher.search(query_D, dim, k, group, exact)
    console = Console(quiet=quiet)
    print_line(console, untrained_note([dim], searcher.nested_dims))
    title = image.name if image is not None else str(text)
    if image is not None and text:
        print_line(console, f"Searching by the image; the text {text!r} is ignored.")
    console.print(_table(title, index, dim, hits))
    if picture is not None:
        note = f"{len(hits)} nearest of {len(index):,} images, at {dim} of {index.dim} dims"
        tiles = [
            contact_sheet.Tile(hit.item.thumbnail, f"{hit.rank}.", f"{hit.score:.3f}", hit.item.caption) for hit in hits
        ]
        contact_sheet.write(picture, title, note, tiles, image)
        print_line(console, f"Wrote {picture}")
    return {
        "query": {"image": str(image)} if image is not None else {"text": text},
        "dim": dim,
        "trained": dim in searcher.nested_dims,
        "in": index.kind,
        "count": len(index),
        "results": [hit.to_json() for hit in hits],
    }


def check_query_text(text: str | None) -> str:
    """The text of a query. Raises InputError: it is empty, or as `check_text`."""
    if text is None or not text.strip():
        raise InputError("query: give a text, or an image with --image FILE.")
    return check_text(text, "query")


def check_text(text: str, name: str) -> str:
    """Raises InputError, whose sentence begins with `name`, if a text has more than MAX_TEXT_LENGTH characters or is
    not valid Unicode."""
    if len(text) > MAX_TEXT_LENGTH:
        raise InputError(
            f"{name}: the text has {len(text):,} characters, more than the {MAX_TEXT_LENGTH:,} allowed; shorten it: "
            "the encoder reads only the first few dozen words."
        )
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{name}: the text is not valid Unicode; give it as UTF-8.") from None
    return text


def _find_encoder(index: Index, model: str | None) -> str | Path:
    """The encoder to load for the index's queries, after a check that it is the one that built the index."""
    stored = index.manifest["encoder"]
    name = model or stored["model"]
    try:
        _, path, digest = identify_encoder(name)
    except InputError as error:
        if model is not None:
            raise
        raise InputError(
            f"index: the encoder of {index.folder} cannot be opened: {error} Give its current path with --model."
        ) from None
    if digest != stored["origin_sha256"]:
        raise InputError(
            f"model: {index.folder} was built with another encoder (weights {stored['origin_sha256'][:12]}…) than "
            f"{name} ({digest[:12]}…); give the encoder of the index with --model, or run mmrl embed and mmrl index "
            "again."
        )
    return path


def _table(query: str, index: Index, dim: int, hits: Sequence[Hit]) -> Table:
    title = Text(f"{visible(query)}: {len(hits)} nearest of {len(index):,}, {dim}-d")
    table = Table(title=title)
    table.add_column("rank", justify="right")
    table.add_column("score", justify="right")
    table.add_column("key", overflow="fold")
    table.add_column("caption")
    for hit in hits:
        # As Text: rich would read a caption such as "[red] shoe" as markup.
        table.add_row(str(hit.rank), f"{hit.score:.3f}", Text(visible(hit.item.key)), Text(visible(hit.item.caption)))
    return table
