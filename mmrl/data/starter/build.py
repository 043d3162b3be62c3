"""Builds the starter shards anew from the npm packages that their drawings and words come from.

    python -m mmrl.data.starter.build OUT

The way of the data: packages, pinned, fetched by npm and only ever read → the concepts and their words → the
drawings of each artist → 64 px WebP → splits → plain tars that can be seeked. It needs npm and resvg-py and
takes a minute on one core. Keys, words and splits always come out the same, and so do all bytes while resvg,
Pillow and libwebp stay at their versions.
"""

import argparse
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from PIL import Image

from mmrl.data import starter
from mmrl.errors import InputError


@dataclass(frozen=True)
class Package:
    """An npm package at one version, recognised by the hash of its archive."""

    name: str
    version: str
    sha256: str

    @property
    def archive_name(self) -> str:
        """What `npm pack` calls the file."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


WORDS = Package("emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a")
# The artists by the names that their keys bear.
ARTISTS = {
    "noto": Package("@iconify-json/noto", "1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
    "noto_v1": Package(
        "@iconify-json/noto-v1", "1.2.5", "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37"
    ),
    "fluent_flat": Package(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    ),
    "fluent_3d": Package(
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    ),
    "emojione": Package(
        "@iconify-json/emojione", "1.2.3", "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e"
    ),
    "twemoji": Package(
        "@iconify-json/twemoji", "1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"
    ),
}

TEST_ARTIST = "twemoji"
# The one package of pictures; the others hold vector icons in Iconify's json.
PAINTED = "fluent_3d"
# One drawing each, shaded and flat: a picture of the one is a near-copy of the other's.
DRAWN_ALIKE = {"fluent_3d", "fluent_flat"}
# Flags are nearly the same picture by every artist; components are skin tones and hair, not concepts.
LEFT_OUT_CATEGORIES = {"flags", "component"}
VAL_CONCEPTS_PERCENT = 4
VAL_PICTURES_PERCENT = 7
RENDER_SIZE = 128
PICTURE_SIZE = 64
WEBP_QUALITY = 85


@dataclass(frozen=True)
class Concept:
    """One emoji: `code_point` such as "1f9d1-200d-1f33e", its Unicode CLDR name, keywords and category."""

    code_point: str
    name: str
    tags: tuple[str, ...]
    category: str

    @property
    def captions(self) -> list[str]:
        """The name, and the name with its keywords where it has any."""
        return [self.name, f"{self.name}: {', '.join(self.tags)}"] if self.tags else [self.name]


@dataclass(frozen=True)
class IconSet:
    """An Iconify package: the icons by name, and the name of each code point where the package tells it."""

    icons: dict[str, Any]
    name_of: dict[str, str]


# ------------------------------------------------------------------------------------------------ packages


def fetch(package: Package, folder: Path) -> Path:
    """The package's archive in `folder`, fetched by npm from its configured registry unless it is there."""
    archive = folder / package.archive_name
    if not archive.exists():
        npm = shutil.which("npm")
        if npm is None:
            raise InputError("npm was not found; install Node.js, or name a folder of fetched --packages.")
        spec = f"{package.name}@{package.version}"
        command = [npm, "pack", spec, "--pack-destination", str(folder), "--ignore-scripts", "--silent"]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)  # noqa: S603 (pinned names)
    if hashlib.sha256(archive.read_bytes()).hexdigest() != package.sha256:
        raise InputError(f"{archive} is not the {package.name} {package.version} known here; delete it.")
    return archive


def members(archive: Path, *patterns: str) -> dict[str, bytes]:
    """The files of an npm archive whose path matches one of the patterns; nothing is unpacked to disk."""
    found = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            path = member.name.removeprefix("package/")
            content = tar.extractfile(member) if any(fnmatch(path, pattern) for pattern in patterns) else None
            if content is not None:
                found[path] = content.read()
    return found


def code_point(hexcode: str) -> str:
    """Lower case, and without the variation selector FE0F, which sources write or leave out as they like."""
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def read_concepts(archive: Path) -> dict[str, Concept]:
    """The concepts by code point, without skin tones and without the categories left out."""
    files = members(archive, "en/data.json", "meta/groups.json")
    category_of = json.loads(files["meta/groups.json"])["groups"]
    concepts = {}
    for entry in json.loads(files["en/data.json"]):
        category = category_of[str(entry["group"])] if "group" in entry else "component"
        if category not in LEFT_OUT_CATEGORIES:
            name, point = entry["label"], code_point(entry["hexcode"])
            # A keyword that only repeats the name says nothing more.
            tags = tuple(tag for tag in entry.get("tags", ()) if tag != name)
            concepts[point] = Concept(point, name, tags, category)
    return concepts


# ------------------------------------------------------------------------------------------------ drawings


def read_icon_set(archive: Path) -> IconSet:
    """Names without an icon of their own (aliases) are left out of `name_of`."""
    files = members(archive, "icons.json", "chars.json")
    icons = json.loads(files["icons.json"])
    names = json.loads(files["chars.json"])
    name_of = {code_point(point): name for point, name in names.items() if name in icons["icons"]}
    return IconSet(icons, name_of)


def names_by_code_point(icon_sets: Iterable[IconSet]) -> dict[str, set[str]]:
    """Every name that any of the sets has for a code point."""
    names = defaultdict(set)
    for icon_set in icon_sets:
        for point, name in icon_set.name_of.items():
            names[point].add(name)
    return dict(names)


def find_icons(icon_set: IconSet, names_elsewhere: dict[str, set[str]]) -> dict[str, str]:
    """Code point → icon name: as the set says, or, where it says nothing, by the names in the other sets.

    The older sets name their icons but tell no code points. Their aliases are passed over on purpose: some
    lend a later name to another thing (`cricket`, the insect, leads to the drawing of the game).
    """
    if icon_set.name_of:
        return icon_set.name_of
    found = {}
    for point, names in names_elsewhere.items():
        own = sorted(name for name in names if name in icon_set.icons["icons"])
        if own:
            found[point] = own[0]
    return found


def svg_of(icon_set: IconSet, name: str) -> str:
    """The icon, centred in a square SVG document; measures that it doesn't state itself are the set's."""
    icon = icon_set.icons["icons"][name]
    left, top, width, height = (
        icon.get(key, icon_set.icons.get(key, default))
        for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{RENDER_SIZE}" height="{RENDER_SIZE}" viewBox="{left} {top} {width} {height}">'
        f"{icon['body']}</svg>"
    )


def rasterise(svg: str) -> Image.Image:
    """The drawing at twice the size of the pictures, on nothing."""
    import resvg_py  # here, since only the build needs it, not those who read its other functions

    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True))))


def encode(drawing: Image.Image) -> bytes:
    """The drawing, centred in a square of the pictures' size, on white, as WebP."""
    side = max(drawing.size)
    square = Image.new("RGBA", (side, side))
    square.paste(drawing.convert("RGBA"), ((side - drawing.width) // 2, (side - drawing.height) // 2))
    small = square.resize((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.LANCZOS)
    picture = Image.alpha_composite(Image.new("RGBA", small.size, "white"), small).convert("RGB")
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=WEBP_QUALITY, method=6)
    return buffer.getvalue()


def drawings(archives: dict[str, Path], wanted: Collection[str]) -> Iterator[tuple[str, str, Image.Image]]:
    """(artist, code point, drawing) for every wanted code point that an artist drew."""
    icon_sets = {artist: read_icon_set(path) for artist, path in archives.items() if artist != PAINTED}
    names = names_by_code_point(icon_sets.values())
    for artist, icon_set in icon_sets.items():
        for point, name in find_icons(icon_set, names).items():
            if point in wanted:
                yield artist, point, rasterise(svg_of(icon_set, name))
    for point, content in pictures(archives[PAINTED]).items():
        if point in wanted:
            yield PAINTED, point, Image.open(io.BytesIO(content))


def pictures(archive: Path) -> dict[str, bytes]:
    """Code point → WebP file, from a package of pictures that are named by code point."""
    files = members(archive, "assets/*.webp")
    # A few come twice, with and without FE0F in their names: the first by name is taken.
    return {code_point(Path(path).stem): files[path] for path in sorted(files, reverse=True)}


# ------------------------------------------------------------------------------------------------ splits


def held_out_concepts() -> set[str]:
    """The code points of `test-concepts`; a list, not a rule: they were drawn once and stay for ever."""
    lines = (starter.folder() / "held_out_concepts.txt").read_text(encoding="utf-8").splitlines()
    return {line.split()[0] for line in lines if line and not line.startswith("#")}


def split_keys(keys: Iterable[str], held_out: Collection[str]) -> dict[str, list[str]]:
    """The keys of each split, in the order they are written.

    Depends on nothing but the keys and the held-out concepts, and a concept's place on no other concept.
    """
    splits: dict[str, list[str]] = {name: [] for name in starter.SPLITS}
    rest: dict[str, list[str]] = defaultdict(list)
    for key in sorted(keys):
        artist, concept = artist_and_concept(key)
        if concept in held_out:
            splits["test-concepts"].append(key)
        elif artist == TEST_ARTIST:
            splits["test-artist"].append(key)
        elif _percentile(concept) < VAL_CONCEPTS_PERCENT:
            splits["val-concepts"].append(key)
        else:
            rest[concept].append(key)
    for keys_of_concept in rest.values():
        held_back = validation_picture(keys_of_concept)
        for key in keys_of_concept:
            splits["val-pictures" if key == held_back else "train"].append(key)
    splits["val-pictures"].sort()
    splits["train"].sort(key=lambda key: _digest(f"mmrl-starter-order:{key}"))
    return splits


def validation_picture(keys: Collection[str]) -> str | None:
    """Which of one concept's pictures is held back for `val-pictures`: one at most, and two others stay.

    Never one of the artists that are drawn alike, since the other's near-copy would stay in training.
    """
    candidates = [
        key for key in keys if artist_and_concept(key)[0] not in DRAWN_ALIKE and _percentile(key) < VAL_PICTURES_PERCENT
    ]
    return min(candidates, key=_val_digest) if candidates and len(keys) >= 3 else None


def artist_and_concept(key: str) -> tuple[str, str]:
    """The two halves of a key: "noto_v1_1f9c2" is ("noto_v1", "1f9c2")."""
    artist, _, concept = key.rpartition("_")
    return artist, concept


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _val_digest(name: str) -> str:
    return _digest(f"mmrl-starter-val:{name}")


def _percentile(name: str) -> int:
    return int(_val_digest(name), 16) % 100


# ------------------------------------------------------------------------------------------------ shards


def sample_files(artist: str, concept: Concept, picture: bytes) -> dict[str, bytes]:
    """The files of one sample by their extension."""
    facts = {
        "captions": concept.captions,
        "tags": concept.tags,
        "group": concept.code_point,
        "category": concept.category,
        "artist": artist,
    }
    text = json.dumps(facts, ensure_ascii=False, separators=(",", ":"))
    return {"webp": picture, "txt": concept.name.encode(), "json": text.encode()}


def write_shard(path: Path, keys: Iterable[str], samples: dict[str, dict[str, bytes]]) -> None:
    """A plain tar in which nothing but the samples and their order shows: no owner, no time."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key in keys:
            for extension, content in samples[key].items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def build(out: Path, packages: Path) -> dict[str, int]:
    """Writes all shards to `out` and returns the number of samples in each split."""
    concepts = read_concepts(fetch(WORDS, packages))
    archives = {artist: fetch(package, packages) for artist, package in ARTISTS.items()}
    samples: dict[str, dict[str, bytes]] = {}
    for artist, point, drawing in drawings(archives, concepts):
        samples[f"{artist}_{point}"] = sample_files(artist, concepts[point], encode(drawing))
    splits = split_keys(samples, held_out_concepts())
    out.mkdir(parents=True, exist_ok=True)
    for split, keys in splits.items():
        names = starter.SPLITS[split]
        for part, name in enumerate(names):
            start, stop = (len(keys) * i // len(names) for i in (part, part + 1))
            write_shard(out / name, keys[start:stop], samples)
    return {split: len(keys) for split, keys in splits.items()}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser("python -m mmrl.data.starter.build", description="Build the starter set.")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the shards")
    parser.add_argument("--packages", type=Path, help="folder to keep the fetched packages in, and to reuse")
    arguments = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as temporary:
            packages = arguments.packages or Path(temporary)
            packages.mkdir(parents=True, exist_ok=True)
            counts = build(arguments.out, packages.resolve())
    except InputError as error:
        parser.exit(2, f"{error}\n")
    for split, count in counts.items():
        print(f"{split:14} {count:5} samples")


if __name__ == "__main__":
    main()
