"""The page over an index and its JSON API: a FastAPI application.

What comes from outside is a text, a picture's bytes, numbers and a group's name: never a path, and nothing is stored.

Shapes: D the length of a query's vector.
"""

import asyncio
import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, File, Form, HTTPException, Query, Request, Response, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mmrl.errors import InputError
from mmrl.search.calibrate import K
from mmrl.search.embed import LONGEST_TEXT
from mmrl.search.items import Item
from mmrl.search.query import Hit, Searcher
from mmrl.version import __version__

MOST_UPLOAD = 16 << 20
"""Bytes of a request's body."""
MOST_RESULTS = 100
_SECONDS_TO_READ, _SECONDS_TO_ANSWER = 20, 20
# Queries at work and waiting; one more is turned away at once.
_AT_ONCE, _WAITING = 4, 64
_REMEMBERED = 256  # queries whose vectors are kept, so that the dim's slider costs no encoding
_EXAMPLES = 6
_PAGE = {"": "index.html", "app.js": "app.js", "style.css": "style.css", "docs": "docs.html", "docs.js": "docs.js",
         "icon.svg": "icon.svg"}  # fmt: skip
_TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob:; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}

Dim = Annotated[int | None, Field(ge=1, description="Compare the first so many numbers; all when left out")]
Count = Annotated[int, Field(ge=1, le=MOST_RESULTS, description="How many pictures to return")]
Group = Annotated[str | None, Field(max_length=1000, description="Only pictures of this group")]
Exact = Annotated[bool, Field(description="Compare all vectors, also where the index has codes")]


class TextQuery(BaseModel):
    """A search by words."""

    text: str = Field(min_length=1, max_length=LONGEST_TEXT, examples=["red running shoes"])
    dim: Dim = None
    k: Count = 24
    group: Group = None
    exact: Exact = False


class ItemQuery(BaseModel):
    """A search by a picture of the index."""

    row: int = Field(ge=0, description="The picture's `row` in an earlier answer")
    dim: Dim = None
    k: Count = 24
    group: Group = None
    exact: Exact = False


class Picture(BaseModel):
    """A picture of the index."""

    row: int
    key: str
    captions: list[str]
    group_name: str | None
    thumbnail: str = Field(description="Where it is served, WebP")


class Result(Picture):
    """A picture found."""

    rank: int
    score: float = Field(description="The cosine with the query at the dim searched")


class Milliseconds(BaseModel):
    """What an answer took here."""

    encode: float = Field(description="The query's vector; 0 where it was at hand from before")
    search: float


class Answer(BaseModel):
    """The nearest pictures, the best first."""

    dim: int
    bytes_per_vector: int = Field(description="Of so many float32 numbers")
    milliseconds: Milliseconds
    results: list[Result]


class GroupCount(BaseModel):
    """A group and how many pictures are of it."""

    name: str
    count: int


class IndexFacts(BaseModel):
    """What is being searched."""

    name: str
    count: int
    dim: int = Field(description="The widest vectors that can be compared")
    dims: list[int] = Field(description="The prefixes that the encoder was trained at, and the widest")
    codes: str | None = Field(description="The first stage of a compressed index")
    recall: dict[str, float] | None = Field(description="Of the 10 nearest, the share that the codes find")
    groups: list[GroupCount] = Field(description="The largest 500")
    examples: list[str]
    most_upload: int = Field(description="Bytes that a picture may have")


class _Engine:
    """A searcher as many requests use it: a few at once, with the vectors of recent queries at hand."""

    def __init__(self, searcher: Searcher) -> None:
        self.searcher = searcher
        self._pool = ThreadPoolExecutor(_AT_ONCE, "search")
        self._at_work = 0
        self._encoding, self._cache_lock = threading.Lock(), threading.Lock()
        self._vectors: OrderedDict[bytes, np.ndarray] = OrderedDict()

    async def answer(
        self, embed: Callable[[], np.ndarray], name: bytes, dim: int | None, k: int, group: str | None, exact: bool
    ) -> Answer:
        """The answer to a query, whose vector `embed` makes and `name` tells from others."""
        if self._at_work >= _AT_ONCE + _WAITING:
            raise HTTPException(503, "Too many searches at once; try again in a moment.")
        self._at_work += 1
        work = asyncio.get_running_loop().run_in_executor(
            self._pool, self._answer, embed, name, dim, k, group or None, exact
        )
        work.add_done_callback(self._done)
        try:
            # Shielded: a thread cannot be stopped, and is counted until it ends.
            return await asyncio.wait_for(asyncio.shield(work), _SECONDS_TO_ANSWER)
        except TimeoutError:
            raise HTTPException(504, f"The search took more than {_SECONDS_TO_ANSWER} seconds.") from None

    def _done(self, work: "asyncio.Future[Answer]") -> None:
        self._at_work -= 1
        if not work.cancelled():
            work.exception()  # looked at, so that an answer nobody waits for any more makes no noise

    def _answer(
        self, embed: Callable[[], np.ndarray], name: bytes, dim: int | None, k: int, group: str | None, exact: bool
    ) -> Answer:
        began = time.perf_counter()
        query_D, known = self._vector(embed, name)
        embedded = time.perf_counter()
        hits = self.searcher.find(query_D, dim, k, group, exact)
        searched = time.perf_counter()
        dim = self.searcher.widest if dim is None else dim
        took = Milliseconds(
            encode=0.0 if known else round((embedded - began) * 1e3, 2), search=round((searched - embedded) * 1e3, 2)
        )
        return Answer(dim=dim, bytes_per_vector=4 * dim, milliseconds=took, results=[_result(hit) for hit in hits])

    def _vector(self, embed: Callable[[], np.ndarray], name: bytes) -> tuple[np.ndarray, bool]:
        with self._cache_lock:
            if name in self._vectors:
                self._vectors.move_to_end(name)
                return self._vectors[name], True
        with self._encoding:  # one at a time: it takes all cores, and tokenizers are not all safe for threads
            query_D = embed()
        with self._cache_lock:
            self._vectors[name] = query_D
            if len(self._vectors) > _REMEMBERED:
                self._vectors.popitem(last=False)
        return query_D, False


def create_app(searcher: Searcher, hosts: list[str]) -> FastAPI:
    """The application. `hosts` are the names by which it may be called, ["*"] for any."""
    app = FastAPI(
        title="mmrl: search an index",
        version=__version__,
        description="Search pictures by words or by picture, at any nested dim.",
        docs_url=None,  # FastAPI's own page fetches its parts from elsewhere; ours is in page/
        redoc_url=None,
    )
    engine = _Engine(searcher)
    facts = _facts(searcher)
    _add_limits(app, hosts)
    _add_page(app)

    @app.get("/api/index", tags=["index"])
    def index() -> IndexFacts:
        """What is being searched."""
        return facts

    @app.get("/api/groups", tags=["index"])
    def groups(containing: Annotated[str, Query(max_length=1000)] = "") -> list[GroupCount]:
        """The 50 largest groups whose names contain something."""
        wanted = containing.casefold()
        named = searcher.index.items.named_groups
        found = (GroupCount(name=name, count=count) for name, count in named if wanted in name.casefold())
        return [group for group, _ in zip(found, range(50), strict=False)]

    @app.get("/api/sample", tags=["index"])
    def sample(
        k: Annotated[int, Query(ge=1, le=MOST_RESULTS)] = 24,
        group: Annotated[str | None, Query(max_length=1000)] = None,
    ) -> list[Picture]:
        """Some pictures, the same at each call."""
        rows = searcher.index.sample(k, group or None)
        pairs = zip(rows, searcher.index.take(rows), strict=True)
        return [Picture(**_picture(int(row), item)) for row, item in pairs]

    @app.get("/api/thumbnails/{row}", tags=["index"], response_class=Response,
             responses={200: {"content": {"image/webp": {}}}})  # fmt: skip
    def thumbnail(row: int) -> Response:
        """A picture of the index, at most 160 pixels a side."""
        item = searcher.index.items[_checked_row(searcher, row)]
        return Response(item.thumbnail, media_type="image/webp", headers={"Cache-Control": "private, max-age=3600"})

    @app.post("/api/search/text", tags=["search"])
    async def search_text(query: TextQuery) -> Answer:
        """The pictures nearest to a text."""
        name = b"text" + hashlib.sha256(query.text.encode("utf-8", "surrogatepass")).digest()
        return await engine.answer(
            lambda: searcher.embed_text(query.text), name, query.dim, query.k, query.group, query.exact
        )

    @app.post("/api/search/image", tags=["search"])
    async def search_image(
        picture: Annotated[UploadFile, File(description="JPEG, PNG, WebP, GIF, BMP or TIFF")],
        dim: Annotated[Dim, Form()] = None,
        k: Annotated[Count, Form()] = 24,
        group: Annotated[Group, Form()] = None,
        exact: Annotated[Exact, Form()] = False,
    ) -> Answer:
        """The pictures nearest to a picture."""
        data = await picture.read()
        name = b"picture" + hashlib.sha256(data).digest()
        return await engine.answer(lambda: searcher.embed_picture(data), name, dim, k, group, exact)

    @app.post("/api/search/item", tags=["search"])
    async def search_item(query: ItemQuery) -> Answer:
        """The pictures nearest to one of the index, which is the first of them."""
        row = _checked_row(searcher, query.row)
        return await engine.answer(
            lambda: np.array(searcher.index.vectors_ND[row]),
            b"row%d" % row,
            query.dim,
            query.k,
            query.group,
            query.exact,
        )

    return app


def _facts(searcher: Searcher) -> IndexFacts:
    index, widest = searcher.index, searcher.widest
    captions = dict.fromkeys(item.caption for item in index.take(index.sample(4 * _EXAMPLES)))
    manifest = index.manifest
    return IndexFacts(
        name=index.folder.absolute().name,
        count=len(index),
        dim=widest,
        dims=sorted({*(dim for dim in manifest["nested_dims"] if dim <= widest), widest}),
        codes=manifest["codes"]["code"] if manifest["codes"] else None,
        recall=manifest["search"][f"recall@{K}"] if manifest["codes"] else None,
        groups=[GroupCount(name=name, count=count) for name, count in index.items.named_groups[:500]],
        examples=[caption for caption in captions if 0 < len(caption) <= 40][:_EXAMPLES],
        most_upload=MOST_UPLOAD,
    )


def _picture(row: int, item: Item) -> dict[str, Any]:
    return {
        "row": row,
        "key": item.key,
        "captions": item.captions,
        "group_name": item.group_name,
        "thumbnail": f"/api/thumbnails/{row}",
    }


def _result(hit: Hit) -> Result:
    return Result(rank=hit.rank, score=round(hit.score, 6), **_picture(hit.row, hit.item))


def _checked_row(searcher: Searcher, row: int) -> int:
    index = searcher.index
    if not 0 <= row < len(index.vectors_ND) or row in index.deleted:
        raise HTTPException(
            404, f"row: there is no picture {row}; the index has rows 0 to {len(index.vectors_ND) - 1}."
        )
    return row


def _add_page(app: FastAPI) -> None:
    """The files of page/, read once."""
    folder = files("mmrl.search") / "page"
    for path, name in _PAGE.items():
        content = (folder / name).read_bytes()

        def send(content: bytes = content, kind: str = _TYPES[name.rpartition(".")[2]]) -> Response:
            return Response(content, media_type=kind, headers={"Cache-Control": "no-cache"})

        app.add_api_route(f"/{path}", _without_arguments(send), include_in_schema=False)


def _without_arguments(send: Callable[[], Response]) -> Callable[[], Response]:
    return lambda: send()


def _add_limits(app: FastAPI, hosts: list[str]) -> None:
    """One sentence for each mistake, and bounds for what comes from outside."""

    @app.exception_handler(InputError)
    async def refuse(_: Request, error: InputError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 422)

    @app.exception_handler(RequestValidationError)
    async def refuse_request(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if isinstance(part, str) and part != "body") or "body"
        return JSONResponse({"detail": f"{where}: {first['msg']}; see /docs for what is allowed."}, 422)

    @app.middleware("http")
    async def add_headers(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        response = await call_next(request)
        response.headers.update(_HEADERS)
        return response

    app.add_middleware(_BodyLimits)
    # A page elsewhere may not reach a server of this machine under a name of its own (DNS rebinding).
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)


class _BodyLimits:
    """Refuses bodies that are too large or come too slowly, before anything is made of them."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        body, ended = bytearray(), False
        try:
            if not announced.isdigit() or int(announced) > MOST_UPLOAD:
                raise HTTPException(413, _TOO_LARGE)
            async with asyncio.timeout(_SECONDS_TO_READ):
                while not ended:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return
                    body += message.get("body", b"")
                    if len(body) > MOST_UPLOAD:
                        raise HTTPException(413, _TOO_LARGE)
                    ended = not message.get("more_body", False)
        except HTTPException as error:
            await JSONResponse({"detail": error.detail}, error.status_code, {"Connection": "close"})(
                scope, receive, send
            )
            return
        except TimeoutError:
            slow = {"detail": f"The request did not come within {_SECONDS_TO_READ} seconds."}
            await JSONResponse(slow, 408, {"Connection": "close"})(scope, receive, send)
            return
        whole: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def given() -> Message:
            return whole.pop() if whole else await receive()

        await self._app(scope, given, send)


_TOO_LARGE = f"The request is too large; a picture may have {MOST_UPLOAD >> 20} MB."
