"""The starter set: emoji by six artists, with their Unicode names. Small enough to ship, and real.

8,748 pictures (64 x 64 pixels on white, WebP) of 1,644 concepts, without skin tones and flags:

    split          pictures  concepts  what it holds
    train             5,887     1,412  five artists: noto, noto_v1, fluent_flat, fluent_3d, emojione
    val-pictures        211       211  pictures held back, of concepts that train shows in other drawings
    val-concepts        224        53  concepts held back, as those five artists draw them
    test-artist       1,465     1,465  a sixth artist, twemoji; train shows all but val-concepts' 53 concepts
    test-concepts       961       179  concepts held back, by all six artists

A sample is KEY.webp, KEY.txt (the name) and KEY.json; KEY is ARTIST_CODEPOINT, such as "noto_1f9c2". The
json holds `captions` (the name, and the name with its keywords where there are any), `tags` (the keywords),
`group` (the concept: its code point), `category` (such as "food-drink") and `artist`. The two fluent artists
share their drawings, so val-pictures has none of theirs. Choose recipes and checkpoints on the val splits;
the test splits are for the end. Sources and licences: NOTICE. How it was made: build.py.
"""

from pathlib import Path

from mmrl.errors import InputError

# The files of each split.
SPLITS = {
    "train": tuple(f"train-{part:04d}.tar" for part in range(4)),
    "val-pictures": ("val-pictures.tar",),
    "val-concepts": ("val-concepts.tar",),
    "test-artist": ("test-artist.tar",),
    "test-concepts": ("test-concepts.tar",),
}


def folder() -> Path:
    """Where the shards are."""
    return Path(__file__).parent


def shards(name: str) -> list[Path]:
    """The shards of the split `name`."""
    if name not in SPLITS:
        raise InputError(f"The starter set has no split {name!r}. Its splits: {', '.join(SPLITS)}.")
    return [folder() / shard for shard in SPLITS[name]]
