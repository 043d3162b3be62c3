"""The embeddings API of `mmrl serve`, as clients of OpenAI's API call it: POST /v1/embeddings and GET /v1/models.

Texts as `input`; images as data URLs, in either of the two forms that other servers take:

    {"input": ["data:image/png;base64,…"], "modality": "image"}                                            Infinity
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:…"}}]}]}   vLLM

Shapes: D the encoder's dim.
"""

import asyncio
import base64
import binascii
import re
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from mmrl.errors import InputError
from mmrl.inference.base import LoadedEncoder
from mmrl.nesting import check_dims, truncate
from mmrl.search.batching import Batcher, Modality
from mmrl.search.limits import MAX_IMAGES, MAX_TEXTS, MAX_WAITING
from mmrl.search.query import check_text

_DATA_URL = re.compile(r"data:[^,]{0,200};base64,", re.IGNORECASE)
_SENT_AS = "send it as a data URL, data:image/jpeg;base64,…"
_ONE_ITEM = "messages: want one message whose content is one text or one image, which becomes one embedding"
_INPUT_SCHEMA: dict[str, Any] = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}


class EmbeddingsRequest(BaseModel):
    """Texts or images to embed."""

    model_config = ConfigDict(extra="forbid")

    input: Annotated[
        Any,
        Field(
            json_schema_extra=_INPUT_SCHEMA,
            description=f"A text or up to {MAX_TEXTS:,} of them; with modality image, data URLs of up to {MAX_IMAGES}",
        ),
    ] = None
    modality: Annotated[Literal["text", "image"], Field(description="What input holds")] = "text"
    messages: Annotated[
        list[dict[str, Any]] | None,
        Field(description="Instead of input: one chat message with one text or one image_url"),
    ] = None
    dimensions: Annotated[
        int | None, Field(strict=True, description="Dims of the embeddings, from 1 to all (default: all)")
    ] = None
    encoding_format: Annotated[
        Literal["float", "base64"] | None,
        Field(description="A list of numbers, or the base64 of little-endian float32"),
    ] = None
    model: Annotated[str | None, Field(description="Ignored: the server has one model")] = None
    user: Annotated[str | None, Field(description="Ignored")] = None


class Embedding(BaseModel):
    """The embedding of one input: a unit vector."""

    object: Literal["embedding"]
    index: int = Field(description="The input's position")
    embedding: list[float] | str


class Usage(BaseModel):
    """Tokens are not counted: both values are 0."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsResponse(BaseModel):
    """The embeddings, in the order of the inputs."""

    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: Usage


class Model(BaseModel):
    """The served encoder."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="When the server started, in Unix seconds")
    owned_by: Literal["mmrl"] = "mmrl"
    dimensions: int = Field(description="The largest dim")
    trained_dimensions: list[int] = Field(description="The dims that recall was optimised at")


class Models(BaseModel):
    """The one served encoder."""

    object: Literal["list"] = "list"
    data: list[Model]


def add_embeddings_api(app: FastAPI, encoder: LoadedEncoder, batcher: Batcher, name: str) -> None:
    """Adds the routes to an application. `name` is the model's id."""
    nested_dims = list(encoder.nested_dims)
    model = Model(id=name, created=int(time.time()), dimensions=encoder.dim, trained_dimensions=nested_dims)

    @app.get("/v1/models", tags=["embeddings"])
    async def models() -> Models:
        """The served encoder, as OpenAI's API lists models."""
        return Models(data=[model])

    @app.post("/v1/embeddings", tags=["embeddings"], responses={200: {"model": EmbeddingsResponse}})
    async def embeddings(request: EmbeddingsRequest) -> JSONResponse:
        """Embeddings of texts or images. Requests that arrive together are encoded in one batch."""
        dim = encoder.dim if request.dimensions is None else request.dimensions
        check_dims([dim], encoder.dim, "dimensions")
        modality, inputs = parse_inputs(request)
        if batcher.waiting(modality) + len(inputs) > MAX_WAITING[modality]:
            raise HTTPException(503, f"Too many {modality}s wait to be encoded; try again in a moment.")
        futures = batcher.submit(modality, inputs)
        results = await asyncio.gather(*map(asyncio.wrap_future, futures), return_exceptions=True)
        for number, result in enumerate(results):
            if isinstance(result, InputError):
                raise InputError(f"input[{number}]: {result}")
            if isinstance(result, BaseException):
                raise result
        data = _encode_vectors([result for result in results if isinstance(result, np.ndarray)], dim, request)
        usage = {"prompt_tokens": 0, "total_tokens": 0}
        return JSONResponse({"object": "list", "model": name, "data": data, "usage": usage})


def parse_inputs(request: EmbeddingsRequest) -> tuple[Modality, Sequence[str | bytes]]:
    """The modality and the texts or image files of a request. Raises InputError: neither or both of input and messages;
    not texts or data URLs; too many, or a text too long."""
    if (request.input is None) == (request.messages is None):
        raise InputError("input: give either input or messages.")
    if request.messages is not None:
        return _parse_messages(request.messages)
    values = [request.input] if isinstance(request.input, str) else request.input
    if not isinstance(values, list) or not values:
        raise InputError("input: want a text or a list of at least one.")
    limit = MAX_TEXTS if request.modality == "text" else MAX_IMAGES
    if len(values) > limit:
        raise InputError(f"input: {len(values):,} inputs are more than the {limit:,} allowed; send several requests.")
    check = _check_text if request.modality == "text" else _read_data_url
    return request.modality, [check(value, f"input[{number}]") for number, value in enumerate(values)]


def _parse_messages(messages: list[dict[str, Any]]) -> tuple[Modality, Sequence[str | bytes]]:
    content = messages[0].get("content") if len(messages) == 1 else None
    if isinstance(content, str):
        return "text", [_check_text(content, "messages")]
    item = content[0] if isinstance(content, list) and len(content) == 1 else None
    if not isinstance(item, dict):
        raise InputError(f"{_ONE_ITEM}.")
    if item.get("type") == "text":
        return "text", [_check_text(item.get("text"), "messages")]
    if item.get("type") == "image_url":
        url = item.get("image_url")
        return "image", [_read_data_url(url.get("url") if isinstance(url, dict) else url, "messages")]
    raise InputError(f"{_ONE_ITEM}, not a part of type {str(item.get('type'))[:40]!r}.")


def _check_text(text: object, name: str) -> str:
    if isinstance(text, int | list):
        raise InputError(
            f"{name}: token ids are not accepted, because tokenizers differ; send the text itself (in LangChain: "
            "check_embedding_ctx_length=False)."
        )
    if not isinstance(text, str):
        raise InputError(f"{name}: want a text.")
    if _DATA_URL.match(text):
        raise InputError(f"{name}: a data URL is no text; to embed the image, send modality: image with it.")
    return check_text(text, name)


def _read_data_url(url: object, name: str) -> bytes:
    head = _DATA_URL.match(url) if isinstance(url, str) else None
    if not isinstance(url, str) or head is None:
        raise InputError(f"{name}: want an image, and this server fetches no URLs; {_SENT_AS}.")
    try:
        return base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"{name}: the data URL is not valid base64 ({error}); {_SENT_AS}.") from None


def _encode_vectors(vectors: list[np.ndarray], dim: int, request: EmbeddingsRequest) -> list[dict[str, Any]]:
    rows_Nd = np.stack(vectors)
    if dim < rows_Nd.shape[1]:
        rows_Nd = truncate(torch.from_numpy(rows_Nd), dim).numpy()
    if request.encoding_format == "base64":
        encoded = [base64.b64encode(row_d).decode() for row_d in np.ascontiguousarray(rows_Nd, "<f4")]
    else:
        encoded = rows_Nd.tolist()
    return [{"object": "embedding", "index": number, "embedding": one} for number, one in enumerate(encoded)]
