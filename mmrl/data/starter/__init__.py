"""The starter set: 8,748 emoji images by six artists with their Unicode names, shipped with the package.

WebP images of 64 x 64 pixels on white, of 1,644 concepts (code points), without skin tones and flags:

    split            images  concepts  contents
    train             5,887     1,412  five artists: noto, noto_v1, fluent_flat, fluent_3d, emojione
    val-pictures        211       211  held-out images of concepts that train has from other artists
    val-concepts        224        53  held-out concepts, by the same five artists
    test-artist       1,465     1,465  a sixth artist, twemoji; train has all of its concepts but the 53 of val-concepts
    test-concepts       961       179  held-out concepts, by all six artists

A sample is KEY.webp, KEY.txt (the name) and KEY.json; KEY is ARTIST_CODEPOINT, e.g. "noto_1f9c2". The JSON has
`captions` (the name, and the name with its keywords if there are any), `tags` (the keywords), `group` (the concept's
code point), `category` (e.g. "food-drink") and `artist`. The two fluent artists share their drawings, so val-pictures
has none of theirs. Choose recipes and checkpoints on the val splits and use the test splits once, at the end. Sources
and licences: NOTICE. Builder: tests/benchmarks/starter.py in the repository.
"""

from pathlib import Path

from mmrl.errors import InputError

# Split -> shard files.
SPLITS = {
    "train": tuple(f"train-{shard:04d}.tar" for shard in range(4)),
    "val-pictures": ("val-pictures.tar",),
    "val-concepts": ("val-concepts.tar",),
    "test-artist": ("test-artist.tar",),
    "test-concepts": ("test-concepts.tar",),
}


def folder() -> Path:
    """The folder of the shards."""
    return Path(__file__).parent


def shards(name: str) -> list[Path]:
    """The shards of a split."""
    if name not in SPLITS:
        raise InputError(f"starter: there is no split {name!r}; choose one of {', '.join(SPLITS)}.")
    return [folder() / shard for shard in SPLITS[name]]
