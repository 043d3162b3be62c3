"""The FastAPI application of `mmrl serve`: the search page and its JSON API over an index, and the embeddings API.

Clients send a text, image bytes, numbers or a group name, never a path. Nothing they send is stored.

Shapes: D query embedding dim.
"""

import asyncio
import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import FastAPI, File, Form, HTTPException, Query, Request, Response, UploadFile
from fastapi.responses import FileResponse, PlainTextResponse
from pydantic import BaseModel, Field

from mmrl.errors import InputError
from mmrl.inference.base import LoadedEncoder
from mmrl.search.batching import Batcher
from mmrl.search.calibrate import K
from mmrl.search.embed import MAX_TEXT_LENGTH
from mmrl.search.embeddings_api import add_embeddings_api
from mmrl.search.items import Item
from mmrl.search.limits import MAX_UPLOAD_BYTES, add_limits
from mmrl.search.metrics import Metrics
from mmrl.search.query import Searcher, check_query_text
from mmrl.version import __version__

MAX_RESULTS = 100
_SEARCH_TIMEOUT_S = 20
# Searches that run and that wait; a further one is refused at once with status 503.
_MAX_CONCURRENT, _MAX_QUEUED = 4, 64
_CACHED_QUERIES = 256  # query embeddings in the cache, so that moving the dim slider needs no encoding
_EXAMPLE_QUERIES = 6
_DOCS_PAGE = {"/docs": "docs.html", "/docs.js": "docs.js", "/style.css": "style.css", "/icon.svg": "icon.svg"}
_SEARCH_PAGE = {"/": "index.html", "/app.js": "app.js"}

# Checked by `Searcher.search`, with the same message as `mmrl search`.
Dim = Annotated[int | None, Field(description="Embedding dim to compare at, 1 to the index's dim (default: that dim)")]
Count = Annotated[int, Field(ge=1, le=MAX_RESULTS, description="Number of results")]
Group = Annotated[str | None, Field(max_length=1000, description="Search only images of this group")]
Exact = Annotated[bool, Field(description="Compare all full vectors instead of using the index's codes")]


class SearchOptions(BaseModel):
    """What every search takes besides its query."""

    dim: Dim = None
    k: Count = 24
    group: Group = None
    exact: Exact = False


class TextQuery(SearchOptions):
    """A search by text."""

    # Checked by `check_query_text`, with the same message as `mmrl search`.
    text: str = Field(examples=["red running shoes"], json_schema_extra={"maxLength": MAX_TEXT_LENGTH})


class ItemQuery(SearchOptions):
    """A search by an image of the index."""

    row: int = Field(ge=0, description="The image's row, as returned by a search or sample")


class IndexedImage(BaseModel):
    """An image of the index."""

    row: int
    key: str
    captions: list[str]
    group_name: str | None
    thumbnail: str = Field(description="URL path of the WebP thumbnail; empty for a text")


class Result(IndexedImage):
    """A search result."""

    rank: int
    score: float = Field(description="Cosine similarity with the query at the searched dim")


class Milliseconds(BaseModel):
    """Server-side time of a search."""

    encode: float = Field(description="Encoding the query; 0 if its embedding was cached")
    search: float


class SearchResponse(BaseModel):
    """The nearest images, most similar first."""

    dim: int
    trained: bool = Field(description="Whether the encoder was trained at this dim")
    bytes_per_vector: int = Field(description="Size of a float32 vector at this dim")
    milliseconds: Milliseconds
    results: list[Result]


class GroupCount(BaseModel):
    """A group and its number of images."""

    name: str
    count: int


class IndexInfo(BaseModel):
    """The served index."""

    name: str
    items: Literal["images", "texts"]
    queries: list[str] = Field(description="What the encoder can encode: image, text or both")
    count: int
    dim: int = Field(description="The largest dim that can be searched")
    dims: list[int] = Field(description="The encoder's trained dims, and the largest dim; any other is allowed, too")
    nested_dims: list[int] = Field(description="The encoder's trained dims")
    codes: str | None = Field(description="Code of the first stage, if the index is compressed")
    recall: dict[str, float] | None = Field(
        description=f"Share of the {K} nearest images that the compressed search finds, by query modality"
    )
    groups: list[GroupCount] = Field(description="The 500 largest groups")
    examples: list[str] = Field(description="Captions to use as example queries")
    most_upload: int = Field(description="Maximum size of an uploaded image, in bytes")


class _LiveIndex:
    """The served index as it is on disk: what is deleted from it disappears without a restart."""

    def __init__(self, searcher: Searcher) -> None:
        self._searcher, self._lock = searcher, threading.Lock()
        self.info = _index_info(searcher)

    def __call__(self) -> Searcher:
        """The searcher of now. Raises HTTPException 503 if the index was rebuilt with another encoder."""
        with self._lock:
            before = self._searcher.index
            try:
                index = before.reopened()
            except InputError:  # it is being replaced
                index = before
            if index.manifest["encoder"]["origin_sha256"] != before.manifest["encoder"]["origin_sha256"]:
                raise HTTPException(503, "The index was rebuilt with another encoder; restart the server.")
            if index is not before:
                self._searcher = replace(self._searcher, index=index)
                self.info = _index_info(self._searcher)
            return self._searcher


class _QueryRunner:
    """Runs searches in a thread pool with a limited queue, and caches recent query embeddings."""

    def __init__(self, live: _LiveIndex) -> None:
        self._live = live
        self._pool = ThreadPoolExecutor(_MAX_CONCURRENT, "search")
        self._pending = 0
        self._cache_lock = threading.Lock()
        self._cache: OrderedDict[bytes, np.ndarray] = OrderedDict()

    async def run(
        self, encode: Callable[[Searcher], np.ndarray], cache_key: bytes | None, options: SearchOptions
    ) -> SearchResponse:
        """Encodes a query, unless `cache_key` is in the cache, and searches. Raises HTTPException: 503 if the queue is
        full, 504 after _SEARCH_TIMEOUT_S."""
        if self._pending >= _MAX_CONCURRENT + _MAX_QUEUED:
            raise HTTPException(503, "Too many searches at once; try again in a moment.")
        self._pending += 1
        future = asyncio.get_running_loop().run_in_executor(self._pool, self._search, encode, cache_key, options)
        future.add_done_callback(self._on_done)
        try:
            # Shielded: a thread cannot be cancelled, and counts as pending until it ends.
            return await asyncio.wait_for(asyncio.shield(future), _SEARCH_TIMEOUT_S)
        except TimeoutError:
            raise HTTPException(504, f"The search took more than {_SEARCH_TIMEOUT_S} seconds.") from None

    def _on_done(self, future: "asyncio.Future[SearchResponse]") -> None:
        self._pending -= 1
        if not future.cancelled():
            future.exception()  # retrieved, so that asyncio does not log the error of a search that timed out

    def _search(
        self, encode: Callable[[Searcher], np.ndarray], cache_key: bytes | None, options: SearchOptions
    ) -> SearchResponse:
        searcher, start = self._live(), time.perf_counter()
        query_D = self._cached(cache_key)
        cached = query_D is not None
        if query_D is None:
            query_D = encode(searcher)
            self._keep(cache_key, query_D)
        encoded = time.perf_counter()
        hits = searcher.search(query_D, options.dim, options.k, options.group or None, options.exact)
        searched = time.perf_counter()
        dim = searcher.max_dim if options.dim is None else options.dim
        milliseconds = Milliseconds(
            encode=0.0 if cached else round((encoded - start) * 1e3, 2), search=round((searched - encoded) * 1e3, 2)
        )
        return SearchResponse(
            dim=dim,
            trained=dim in searcher.nested_dims,
            bytes_per_vector=4 * dim,
            milliseconds=milliseconds,
            results=[
                Result(rank=hit.rank, score=round(hit.score, 6), **_image_fields(searcher, hit.row, hit.item))
                for hit in hits
            ],
        )

    def _cached(self, key: bytes | None) -> np.ndarray | None:
        with self._cache_lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        return None

    def _keep(self, key: bytes | None, query_D: np.ndarray) -> None:
        with self._cache_lock:
            if key is not None:
                self._cache[key] = query_D
            if len(self._cache) > _CACHED_QUERIES:
                self._cache.popitem(last=False)


def create_app(
    served: Searcher | LoadedEncoder, hosts: list[str], name: str = "mmrl", api_key: str | None = None
) -> FastAPI:
    """The application: the embeddings API of an encoder, and with an index its search page and search API.

    Args:
        hosts: allowed Host headers, ["*"] for any.
        name: the encoder's id in the embeddings API.
        api_key: the key that requests must carry, except those for the pages and /health; None: no key is needed.
    """
    searches = isinstance(served, Searcher)
    app = FastAPI(
        title="mmrl API",
        version=__version__,
        description="Embeds texts and images" + (", and searches an index by them" if searches else "")
        + ", at any embedding dim." + (" Send the API key as Authorization: Bearer KEY." if api_key else ""),
        docs_url=None,  # FastAPI's docs page loads scripts from a CDN; ours is page/docs.html
        redoc_url=None,
    )  # fmt: skip
    encoder = served.encoder if searches else served
    metrics = Metrics()
    batcher = Batcher(encoder, metrics)
    pages = {**_DOCS_PAGE, **(_SEARCH_PAGE if searches else {"/": "docs.html"})}
    add_limits(app, hosts, metrics, api_key, public={*pages, "/openapi.json", "/health"})
    for path, file in pages.items():
        app.add_route(path, partial(_page_file, file), include_in_schema=False)
    if searches:
        _add_search_api(app, served, batcher)
    add_embeddings_api(app, encoder, batcher, name)

    @app.get("/health", tags=["server"])
    async def health() -> dict[str, str]:
        """{"status": "ok"} as long as the server answers. Needs no API key."""
        return {"status": "ok"}

    @app.get("/metrics", tags=["server"], response_class=PlainTextResponse)
    async def metrics_text() -> PlainTextResponse:
        """Counters of requests, batches and times, in the text format of Prometheus."""
        return PlainTextResponse(metrics.text(), media_type="text/plain; version=0.0.4")

    return app


def _add_search_api(app: FastAPI, searcher: Searcher, batcher: Batcher) -> None:
    """Adds the routes that the search page uses."""
    live = _LiveIndex(searcher)
    runner = _QueryRunner(live)

    @app.get("/api/index", tags=["index"])
    def index() -> IndexInfo:
        """The index: its size, dims, codes, largest groups and example queries."""
        live()
        return live.info

    @app.get("/api/groups", tags=["index"])
    def groups(containing: Annotated[str, Query(max_length=1000)] = "") -> list[GroupCount]:
        """The 50 largest groups whose name contains a string, ignoring case."""
        wanted = containing.casefold()
        named = live().index.named_groups
        matches = (GroupCount(name=name, count=count) for name, count in named if wanted in name.casefold())
        return list(islice(matches, 50))

    @app.get("/api/sample", tags=["index"])
    def sample(
        k: Annotated[int, Query(ge=1, le=MAX_RESULTS)] = 24, group: Annotated[str | None, Query(max_length=1000)] = None
    ) -> list[IndexedImage]:
        """A fixed random sample of images."""
        searcher = live()
        rows = searcher.index.sample(k, group or None)
        pairs = zip(rows, searcher.index.items.take(rows), strict=True)
        return [IndexedImage(**_image_fields(searcher, int(row), item)) for row, item in pairs]

    @app.get("/api/thumbnails/{row}", tags=["index"], response_class=Response,
             responses={200: {"content": {"image/webp": {}}}})  # fmt: skip
    def thumbnail(row: int) -> Response:
        """The WebP thumbnail of an image, at most 160 pixels on the longer side."""
        searcher = live()
        item = searcher.index.items[_checked_row(searcher, row)]
        return Response(item.thumbnail, media_type="image/webp", headers={"Cache-Control": "private, max-age=3600"})

    @app.post("/api/search/text", tags=["search"])
    async def search_text(query: TextQuery) -> SearchResponse:
        """The images most similar to a text."""
        cache_key = b"text" + hashlib.sha256(query.text.encode("utf-8", "surrogatepass")).digest()
        return await runner.run(lambda _: batcher.encode("text", check_query_text(query.text)), cache_key, query)

    @app.post("/api/search/image", tags=["search"])
    async def search_image(
        picture: Annotated[UploadFile, File(description="JPEG, PNG, WebP, GIF, BMP or TIFF")],
        dim: Annotated[Dim, Form()] = None,
        k: Annotated[Count, Form()] = 24,
        group: Annotated[Group, Form()] = None,
        exact: Annotated[Exact, Form()] = False,
    ) -> SearchResponse:
        """The images most similar to an uploaded image."""
        data = await picture.read()
        cache_key = b"picture" + hashlib.sha256(data).digest()
        options = SearchOptions(dim=dim, k=k, group=group, exact=exact)
        return await runner.run(lambda _: batcher.encode("image", data), cache_key, options)

    @app.post("/api/search/item", tags=["search"])
    async def search_item(query: ItemQuery) -> SearchResponse:
        """The images most similar to an image of the index. That image itself ranks first."""

        def vector(searcher: Searcher) -> np.ndarray:
            return np.array(searcher.index.vectors_ND[_checked_row(searcher, query.row)])

        return await runner.run(vector, None, query)


def _page_file(name: str, _: Request) -> FileResponse:
    return FileResponse(Path(__file__).parent / "page" / name)


def _index_info(searcher: Searcher) -> IndexInfo:
    index, max_dim = searcher.index, searcher.max_dim
    captions = dict.fromkeys(item.caption for item in index.items.take(index.sample(4 * _EXAMPLE_QUERIES)))
    manifest, reads_texts = index.manifest, "text" in searcher.encoder.towers
    return IndexInfo(
        name=index.folder.absolute().name,
        items=index.kind,
        queries=list(searcher.encoder.towers),
        count=len(index),
        dim=max_dim,
        dims=sorted({*searcher.nested_dims, max_dim}),
        nested_dims=list(searcher.nested_dims),
        codes=manifest["codes"]["code"] if manifest["codes"] else None,
        recall=manifest["search"][f"recall@{K}"] if manifest["codes"] else None,
        groups=[GroupCount(name=name, count=count) for name, count in index.named_groups[:500]],
        examples=[caption for caption in captions if 0 < len(caption) <= 40][:_EXAMPLE_QUERIES] if reads_texts else [],
        most_upload=MAX_UPLOAD_BYTES,
    )


def _image_fields(searcher: Searcher, row: int, item: Item) -> dict[str, Any]:
    # A browser must not take the thumbnail of another data folder from its cache.
    data = searcher.index.manifest["data"]
    return {
        "row": row,
        "key": item.key,
        "captions": item.captions,
        "group_name": item.group_name,
        "thumbnail": f"/api/thumbnails/{row}?of={data}" if item.thumbnail else "",
    }


def _checked_row(searcher: Searcher, row: int) -> int:
    """The row; raises HTTPException 404 if the index has no such row or it was deleted."""
    index = searcher.index
    if not 0 <= row < len(index.vectors_ND) or row in index.deleted:
        raise HTTPException(404, f"row: no image has row {row}; the index has rows 0 to {len(index.vectors_ND) - 1}.")
    return row
