"""The directions of retrieval, QUERY_to_GALLERY, in the order of every table, and their labels."""

CROSS_MODAL = ("image_to_text", "text_to_image")
SAME_MODAL = ("image_to_image", "text_to_text")
DIRECTIONS = CROSS_MODAL + SAME_MODAL
ARROWS = {direction: direction.replace("_to_", "→") for direction in DIRECTIONS}


def modalities(direction: str) -> tuple[str, str]:
    """The modality of the queries and of the gallery: image_to_text -> ("image", "text")."""
    query, _, gallery = direction.split("_")
    return query, gallery
