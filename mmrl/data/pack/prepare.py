"""A pair -> the members of its sample: reads or fetches the image, checks it, shrinks it. Runs in worker processes.

Shapes: C colour channels, H and W the image's size.
"""

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

from PIL import Image

from mmrl.data.fetch import FetchError, fetch
from mmrl.data.folder import Unusable, decode_image, read_image_file
from mmrl.data.index import Problem
from mmrl.data.pack.pairs import Pair
from mmrl.data.samples import FieldsConfig
from mmrl.data.texts import clean_captions
from mmrl.images.decode import with_alpha
from mmrl.images.upright import format_of

CHUNK = 32
"""Pairs that one worker prepares at a time: enough downloads at once, few enough images in memory."""
_SHARD_EXTENSIONS, _SECOND = FieldsConfig().image, FieldsConfig().second_image
_EXTENSION_OF_FORMAT = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
_JPEG_QUALITY = 92


@dataclass(frozen=True)
class Prepared:
    """A sample, ready to be written into a shard."""

    pair: Pair
    members: dict[str, bytes]
    """Extension -> content."""
    digest: bytes
    """Hash of the image's bytes in the source; of the texts if there is no image."""


def prepare(pairs: Sequence[Pair | Problem], max_side: int | None) -> list[Prepared | Problem]:
    """The samples of these pairs, in their order; a Problem in place of each that cannot be used.

    Args:
        max_side: pixels; larger images are shrunk to it and stored as JPEG, or as PNG if a pixel is transparent. All
            others keep their bytes.
    """
    prepared = []
    for pair, images in zip(pairs, _read_images(pairs), strict=True):
        if isinstance(pair, Problem):
            prepared.append(pair)
            continue
        try:
            prepared.append(_prepare_one(pair, images, max_side))
        except Unusable as error:
            prepared.append(pair.problem(str(error)))
    return prepared


def _read_images(pairs: Sequence[Pair | Problem]) -> Iterator[list[bytes | Unusable]]:
    """The bytes of each pair's images, or why they cannot be read. If any are downloads, all are read in parallel."""
    if not any(isinstance(image, str) for pair in pairs if isinstance(pair, Pair) for image in pair.images):
        yield from map(_read_pair, pairs)
        return
    threads = [_ReadThread(pair) for pair in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
        yield thread.content


class _ReadThread(Thread):
    """A daemon, unlike the threads of concurrent.futures: a slow server cannot keep the process from exiting."""

    content: list[bytes | Unusable]

    def __init__(self, pair: Pair | Problem) -> None:
        super().__init__(daemon=True)
        self._pair = pair

    def run(self) -> None:
        self.content = _read_pair(self._pair)


def _read_pair(pair: Pair | Problem) -> list[bytes | Unusable]:
    return [] if isinstance(pair, Problem) else [_read_image(image) for image in pair.images if image is not None]


def _read_image(image: Path | str | bytes) -> bytes | Unusable:
    try:
        if isinstance(image, bytes):
            return image
        return fetch(image) if isinstance(image, str) else read_image_file(image)
    except FetchError as error:
        return Unusable(f"missing image: {image} cannot be fetched ({error})")
    except Unusable as error:
        return error


def _prepare_one(pair: Pair, images: Sequence[bytes | Unusable], max_side: int | None) -> Prepared:
    """The pair's sample.

    Raises:
        Unusable: a text is not UTF-8, or an image is missing or unreadable.
    """
    texts, stored = _text_members(pair), dict[str, bytes]()
    contents = ["\0".join([*pair.captions, pair.second_text]).encode()] if pair.image is None else []
    for start, source, data in zip(("", f"{_SECOND}."), pair.images, images, strict=False):
        if isinstance(data, Unusable):
            raise data
        assert source is not None
        extension, image = _stored_image(source, data, max_side)
        stored[start + extension] = image
        contents.append(data)
    return Prepared(pair, {**stored, **texts}, hashlib.blake2b(contents[0], digest_size=16).digest())


def _text_members(pair: Pair) -> dict[str, bytes]:
    """The .txt member of an image, and a .json one if there are several captions, a second text or a group; of two
    texts the .json member alone."""
    try:
        captions = clean_captions(pair.captions)
        metadata: dict[str, Any] = {"captions": captions} if len(captions) > 1 or pair.image is None else {}
        if pair.second_text:
            metadata["second_text"] = pair.second_text
        if pair.group is not None:
            metadata["group"] = pair.group
        members = {} if pair.image is None or not captions else {"txt": captions[0].encode()}
        if metadata:
            members["json"] = json.dumps(metadata, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise Unusable(f"unreadable text: {error}") from None
    return members


def _stored_image(image: Path | str | bytes, data: bytes, max_side: int | None) -> tuple[str, bytes]:
    """An image's extension and bytes in the shard: unchanged unless it is too large or its format is not for shards."""
    pixels_CHW = decode_image(data, "its bytes" if isinstance(image, bytes) else image)
    if max_side is not None and max(pixels_CHW.shape[1:]) > max_side:
        shrunk = with_alpha(pixels_CHW)
        shrunk.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
        if shrunk.mode == "RGBA":
            return "png", _encode(shrunk, "PNG")
        return "jpg", _encode(shrunk, "JPEG", quality=_JPEG_QUALITY)
    # A URL's extension need not be that of the image it returns.
    extension = image.suffix[1:].lower() if isinstance(image, Path) else ""
    if extension not in _SHARD_EXTENSIONS:
        extension = _EXTENSION_OF_FORMAT.get(format_of(data), "")
    return (extension, data) if extension else ("png", _encode(with_alpha(pixels_CHW), "PNG"))


def _encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
