"""Tar members of good and bad samples."""

from conftest import drawing, encoded, sample_members

from mmrl.images.image_spec import ImageSpec

SPEC = ImageSpec(height=32, width=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def bad_members() -> list[tuple[str, bytes]]:
    """40 good samples, then one bad sample of each kind."""
    image, caption = encoded(drawing(0)[0]), b"a caption"
    good = [member for number in range(40) for member in sample_members(number)]
    return [
        *good,
        ("corrupt.png", image[:40] + bytes(50)), ("corrupt.txt", caption),
        ("halved.png", image[: len(image) // 2]), ("halved.txt", caption),
        ("noimage.txt", caption),
        ("silent.png", image), ("silent.txt", b"  \n"),
        ("latin.png", image), ("latin.txt", "caf\u00e9".encode("latin-1")),
        ("badjson.png", image), ("badjson.txt", caption), ("badjson.json", b"{"),
    ]  # fmt: skip
