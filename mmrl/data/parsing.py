"""Parse a sample: tar members -> image bytes, captions and group, or the reason why it is bad.

Nothing here runs code from the data: members are read as images, text and JSON, whatever their names.
"""

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from mmrl.data.fields import FIRST_DOT, FieldsConfig, hidden_images
from mmrl.data.texts import caption_list, clean_captions, decode_text, group_name
from mmrl.output.files import parse_json

IMAGE, TEXT = "image", "text"
BOTH = frozenset({IMAGE, TEXT})
"""What training with both towers requires of a sample."""


@dataclass(frozen=True)
class ParsedSample:
    """The fields of a sample's members."""

    image: bytes
    """Empty if the sample has none and none is required, as are the second members."""
    captions: list[str]
    """The plain caption first, then those of the JSON that differ from it; stripped, never empty."""
    group: str | None
    negatives: list[str]
    second_text: str
    second_image: bytes


# What the functions below raise on a bad sample; `reason_of` turns it into the reason.
SAMPLE_ERRORS = (ValueError, OSError)


def parse(
    fields: FieldsConfig,
    extensions: Collection[str],
    read: Callable[[str], bytes],
    required: Collection[str] = BOTH,
) -> ParsedSample:
    """Parses a sample, given the extensions of its members and a function that reads the member with an extension.

    Args:
        required: IMAGE and TEXT, or one of them: a sample without it is an error.

    Raises:
        one of SAMPLE_ERRORS: no image, no usable caption, text that is not UTF-8, invalid JSON; or what `read` raises.
    """
    image = next((extension for extension in fields.image_extensions if extension in extensions), None)
    if image is None and IMAGE in required:
        is_hidden = hidden_images(fields, extensions, TEXT in required)
        raise ValueError(f"no image: {FIRST_DOT}" if is_hidden else f"no image: none of .{', .'.join(fields.image)}")
    metadata = parse_metadata(fields, extensions, read)
    captions = [decode_text(read(fields.text))] if fields.text in extensions else []
    captions += caption_list(metadata.get(fields.captions))
    usable = clean_captions(captions)
    if not usable and TEXT in required:
        raise ValueError("only empty captions" if captions else "no caption")
    negatives = caption_list(metadata.get(fields.negatives))
    second_image = fields.second_image_of(extensions)
    return ParsedSample(
        b"" if image is None else read(image),
        usable,
        group_name(metadata.get(fields.group)),
        negatives,
        next(iter(clean_captions(caption_list(metadata.get(fields.second_text)))), ""),
        b"" if second_image is None else read(second_image),
    )


def parse_metadata(fields: FieldsConfig, extensions: Collection[str], read: Callable[[str], bytes]) -> dict[str, Any]:
    """A sample's JSON object; empty if it has none. Raises as `parse`."""
    if fields.metadata not in extensions:
        return {}
    return metadata_object(read(fields.metadata), fields.metadata)


def metadata_object(data: bytes, extension: str) -> dict[str, Any]:
    """The JSON object in a member. Raises ValueError if there is none."""
    try:
        metadata = parse_json(data)
    except (json.JSONDecodeError, UnicodeError):
        raise
    except ValueError as error:  # a number of thousands of digits
        raise ValueError(f"metadata not JSON: {error}") from None
    if not isinstance(metadata, dict):
        raise ValueError(f"metadata not JSON: .{extension} is not a JSON object")
    return metadata


def reason_of(error: BaseException) -> str:
    """The reason of a Problem, for an error that `parse` raised."""
    if isinstance(error, UnicodeError):
        return f"text not UTF-8: {error}"
    if isinstance(error, json.JSONDecodeError):
        return f"metadata not JSON: {error}"
    return f"shard out of reach: {error}" if isinstance(error, OSError) else str(error)
