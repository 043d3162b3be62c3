"""Good and bad samples of a shard."""

from conftest import drawing, encoded, sample_members

from mmrl.images.image_spec import ImageSpec

SPEC = ImageSpec(height=32, width=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def bad_members() -> list[tuple[str, bytes]]:
    """Good samples 0 … 39, and after them one of each kind of bad one."""
    picture, caption = encoded(drawing(0)[0]), b"a caption"
    good = [member for number in range(40) for member in sample_members(number)]
    return [
        *good,
        ("corrupt.png", picture[:40] + bytes(50)), ("corrupt.txt", caption),
        ("halved.png", picture[: len(picture) // 2]), ("halved.txt", caption),
        ("noimage.txt", caption),
        ("silent.png", picture), ("silent.txt", b"  \n"),
        ("latin.png", picture), ("latin.txt", "caf\u00e9".encode("latin-1")),
        ("badjson.png", picture), ("badjson.txt", caption), ("badjson.json", b"{"),
    ]  # fmt: skip
