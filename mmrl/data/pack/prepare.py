"""A pair -> the files of its sample: read or fetched, checked, made smaller. What the workers of `mmrl pack` do."""

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

from PIL import Image

from mmrl.data.fetch import Unfetched, fetch
from mmrl.data.index import Problem
from mmrl.data.pack.pairs import STORED, Pair
from mmrl.images.decode import decode_pixels, to_picture

AT_ONCE = 32
"""Pairs to prepare in one go: enough to fetch at once, few enough to hold the pictures of."""
_EXTENSION_OF_FORMAT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
_JPEG_QUALITY = 92


@dataclass(frozen=True)
class Prepared:
    """A sample as it goes into a shard."""

    origin: str
    key: str
    members: dict[str, bytes]
    """Extension -> content."""
    digest: bytes
    """Of the picture's bytes as they were found; equal for equal pictures alone."""
    grouped: bool


class _Unusable(ValueError):
    """This pair cannot be packed: "KIND: detail", KIND being what the bad ones are counted by."""


def prepare(pairs: Sequence[Pair | Problem], max_side: int | None) -> list[Prepared | Problem]:
    """The samples of these pairs, in their order, with a problem in place of each that cannot be used.

    Args:
        max_side: pixels; larger pictures are made smaller and stored as JPEG. All others keep their bytes.
    """
    prepared = []
    for pair, data in zip(pairs, _contents(pairs), strict=True):
        if isinstance(pair, Problem):
            prepared.append(pair)
            continue
        try:
            prepared.append(_sample(pair, data, max_side))
        except _Unusable as error:
            prepared.append(Problem(pair.origin, pair.key, str(error)))
    return prepared


def _contents(pairs: Sequence[Pair | Problem]) -> Iterator[bytes | _Unusable]:
    """Each pair's picture, or why there is none; begun all at once where some are fetched, since that is waiting."""
    if not any(isinstance(pair, Pair) and isinstance(pair.image, str) for pair in pairs):
        yield from map(_content, pairs)
        return
    threads = [_Fetching(pair) for pair in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
        yield thread.content


class _Fetching(Thread):
    """A daemon, unlike the threads of concurrent.futures: no slow server keeps a process that wants to end."""

    content: bytes | _Unusable

    def __init__(self, pair: Pair | Problem) -> None:
        super().__init__(daemon=True)
        self._pair = pair

    def run(self) -> None:
        self.content = _content(self._pair)


def _content(pair: Pair | Problem) -> bytes | _Unusable:
    if isinstance(pair, Problem):
        return b""
    if isinstance(pair.image, str):
        try:
            return fetch(pair.image)
        except Unfetched as error:
            return _Unusable(f"missing image: {pair.image} cannot be fetched ({error})")
    # A regular file only: a table may name a device that never ends.
    with suppress(OSError, ValueError):
        if pair.image.is_file():
            return pair.image.read_bytes()
    return _Unusable(f"missing image: {pair.image} is no file that can be read")


def _sample(pair: Pair, data: bytes | _Unusable, max_side: int | None) -> Prepared:
    """The pair's sample.

    Raises:
        _Unusable: the picture is missing or unreadable, no caption is left once the blanks are off.
    """
    if isinstance(data, _Unusable):
        raise data
    captions = list(dict.fromkeys(text for caption in pair.captions if (text := caption.strip())))
    if not captions:
        raise _Unusable("no caption: none given, or only empty ones")
    facts: dict[str, Any] = {"captions": captions} if len(captions) > 1 else {}
    if pair.group is not None:
        facts["group"] = pair.group
    extension, picture = _stored(pair.image, data, max_side)
    members = {extension: picture}
    try:
        members["txt"] = captions[0].encode()
        if facts:
            members["json"] = json.dumps(facts, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise _Unusable(f"unreadable text: {error}") from None
    digest = hashlib.blake2b(data, digest_size=16).digest()
    return Prepared(pair.origin, pair.key, members, digest, pair.group is not None)


def _stored(image: Path | str, data: bytes, max_side: int | None) -> tuple[str, bytes]:
    """A picture's extension and bytes in the shard: its own, unless it is too large or of a kind that shards lack."""
    try:
        pixels_CHW = decode_pixels(data)
    except ValueError as error:
        raise _Unusable(f"unreadable image: {image}: {error}") from None
    if max_side is not None and max(pixels_CHW.shape[1:]) > max_side:
        picture = to_picture(pixels_CHW)
        picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
        return "jpg", _encoded(picture, "JPEG", quality=_JPEG_QUALITY)
    # Servers send what they like, whatever the address ends in.
    extension = "" if isinstance(image, str) else image.suffix[1:].lower()
    if extension not in STORED:
        extension = _EXTENSION_OF_FORMAT.get(Image.open(io.BytesIO(data)).format or "", "")
    return (extension, data) if extension else ("png", _encoded(to_picture(pixels_CHW), "PNG"))


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
