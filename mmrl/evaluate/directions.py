"""The directions of retrieval, QUERY_to_GALLERY, in the order of every table, and their labels."""

from collections.abc import Collection, Mapping
from typing import Any

CROSS_MODAL = ("image_to_text", "text_to_image")
SAME_MODAL = ("image_to_image", "text_to_text")
DIRECTIONS = CROSS_MODAL + SAME_MODAL
ARROWS = {direction: direction.replace("_to_", "→") for direction in DIRECTIONS}
CLASSIFICATION = "classification"
"""The only key of a zero-shot classification set's scores, where a retrieval set has its directions."""


def modalities(direction: str) -> tuple[str, str]:
    """The modality of the queries and of the gallery: image_to_text -> ("image", "text")."""
    query, _, gallery = direction.split("_")
    return query, gallery


def of_towers(sides: Collection[str]) -> tuple[str, ...]:
    """The directions between the modalities of an encoder; the first ones are the main ones of a set."""
    return tuple(direction for direction in DIRECTIONS if {*modalities(direction)} <= {*sides})


def main_directions(available: Collection[str]) -> tuple[str, ...]:
    """Those of these directions that stand for a set: the cross-modal ones, or of an encoder with one tower its
    own."""
    cross = tuple(direction for direction in CROSS_MODAL if direction in available)
    return cross or tuple(direction for direction in SAME_MODAL if direction in available)


def is_classification(result: Mapping[str, Any]) -> bool:
    """Whether an entry of retrieval.json is that of a zero-shot classification set."""
    return CLASSIFICATION in result["chance"]
