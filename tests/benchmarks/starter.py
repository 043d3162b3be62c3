"""Rebuild the starter shards from the npm packages that hold the drawings and the words.

    python tests/benchmarks/starter.py OUT

Steps: download the pinned packages with npm (no code of theirs is run), read the concepts and their names, render each
artist's drawings, encode them as 64 px WebP, split, write tars. Needs npm and resvg-py; takes a minute on one core.
Keys, words and splits are always the same, and all bytes are as long as the versions of resvg, Pillow and libwebp are.
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
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from PIL import Image

from mmrl.data.starter import SPLITS
from mmrl.errors import InputError


@dataclass(frozen=True)
class Package:
    """An npm package at one version, with the hash of its archive."""

    name: str
    version: str
    sha256: str

    @property
    def archive_name(self) -> str:
        """The file name that `npm pack` uses."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


WORDS = Package("emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a")
# Artist, as in the keys -> package.
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
# The only package of raster images; the others hold vector icons in Iconify's JSON format.
RASTER_ARTIST = "fluent_3d"
# The same drawings, shaded and flat, so that images of one are near-duplicates of the other's.
NEAR_DUPLICATE_ARTISTS = {"fluent_3d", "fluent_flat"}
# Flags look nearly the same by every artist; components are skin tones and hair, not concepts.
EXCLUDED_CATEGORIES = {"flags", "component"}
VAL_CONCEPTS_PERCENT = 4
VAL_IMAGES_PERCENT = 7
RENDER_SIZE = 128
IMAGE_SIZE = 64
WEBP_QUALITY = 85


@dataclass(frozen=True)
class Concept:
    """One emoji: its code point, e.g. "1f9d1-200d-1f33e", and its Unicode CLDR name, keywords and category."""

    code_point: str
    name: str
    tags: tuple[str, ...]
    category: str

    @property
    def captions(self) -> list[str]:
        """The name, and the name with the keywords if there are any."""
        return [self.name, f"{self.name}: {', '.join(self.tags)}"] if self.tags else [self.name]


@dataclass(frozen=True)
class IconSet:
    """An Iconify package: its JSON, with the icons by name, and code point -> icon name if the package has that."""

    icons: dict[str, Any]
    name_of: dict[str, str]


# ------------------------------------------------------------------------------------------------ packages


def fetch(package: Package, folder: Path) -> Path:
    """Downloads a package's archive to `folder` with npm, unless it is there already, and checks its hash."""
    archive = folder / package.archive_name
    if not archive.exists():
        npm = shutil.which("npm")
        if npm is None:
            raise InputError(
                "npm was not found; install Node.js, or pass a folder of downloaded packages as --packages."
            )
        spec = f"{package.name}@{package.version}"
        command = [npm, "pack", spec, "--pack-destination", str(folder), "--ignore-scripts", "--silent"]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    if hashlib.sha256(archive.read_bytes()).hexdigest() != package.sha256:
        raise InputError(f"{archive} does not have the SHA-256 of {package.name} {package.version}; delete it.")
    return archive


def members(archive: Path, *patterns: str) -> dict[str, bytes]:
    """The files of an npm archive whose path matches a pattern, in memory: path -> content."""
    found = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            path = member.name.removeprefix("package/")
            content = tar.extractfile(member) if any(fnmatch(path, pattern) for pattern in patterns) else None
            if content is not None:
                found[path] = content.read()
    return found


def code_point(hexcode: str) -> str:
    """Normalises a code point: lower case, without the variation selector FE0F, which only some sources write."""
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def read_concepts(archive: Path) -> dict[str, Concept]:
    """Code point -> concept, without the excluded categories."""
    files = members(archive, "en/data.json", "meta/groups.json")
    category_of = json.loads(files["meta/groups.json"])["groups"]
    concepts = {}
    for entry in json.loads(files["en/data.json"]):
        category = category_of[str(entry["group"])] if "group" in entry else "component"
        if category not in EXCLUDED_CATEGORIES:
            name, point = entry["label"], code_point(entry["hexcode"])
            tags = tuple(tag for tag in entry.get("tags", ()) if tag != name)
            concepts[point] = Concept(point, name, tags, category)
    return concepts


# ------------------------------------------------------------------------------------------------ drawings


def read_icon_set(archive: Path) -> IconSet:
    """Reads an Iconify package. `name_of` has no aliases, i.e. names without their own icon."""
    files = members(archive, "icons.json", "chars.json")
    icons = json.loads(files["icons.json"])
    names = json.loads(files["chars.json"])
    name_of = {code_point(point): name for point, name in names.items() if name in icons["icons"]}
    return IconSet(icons, name_of)


def names_by_code_point(icon_sets: Iterable[IconSet]) -> dict[str, set[str]]:
    """Code point -> all names for it in any of the sets."""
    names = defaultdict(set)
    for icon_set in icon_sets:
        for point, name in icon_set.name_of.items():
            names[point].add(name)
    return dict(names)


def find_icons(icon_set: IconSet, other_names: dict[str, set[str]]) -> dict[str, str]:
    """Code point -> icon name, from the set itself or else by the names in the other sets.

    The older sets have icon names but no code points. Their aliases are not used, since some are wrong: `cricket`, the
    insect, is an alias of the drawing of the game.
    """
    if icon_set.name_of:
        return icon_set.name_of
    found = {}
    for point, names in other_names.items():
        own = sorted(name for name in names if name in icon_set.icons["icons"])
        if own:
            found[point] = own[0]
    return found


def svg_of(icon_set: IconSet, name: str) -> str:
    """An icon as a square SVG document, centred. Sizes default to those of the set."""
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
    """Renders an SVG at twice the final size, on a transparent background."""
    import resvg_py  # only the build needs it, not importers of other functions

    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True))))


def encode(drawing: Image.Image) -> bytes:
    """Encodes a drawing as a square WebP of IMAGE_SIZE, centred on white."""
    side = max(drawing.size)
    square = Image.new("RGBA", (side, side))
    square.paste(drawing.convert("RGBA"), ((side - drawing.width) // 2, (side - drawing.height) // 2))
    small = square.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)
    image = Image.alpha_composite(Image.new("RGBA", small.size, "white"), small).convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=WEBP_QUALITY, method=6)
    return buffer.getvalue()


def drawings(archives: dict[str, Path], wanted: Collection[str]) -> Iterator[tuple[str, str, Image.Image]]:
    """Yields (artist, code point, drawing) for each artist and each of the `wanted` code points."""
    icon_sets = {artist: read_icon_set(path) for artist, path in archives.items() if artist != RASTER_ARTIST}
    names = names_by_code_point(icon_sets.values())
    for artist, icon_set in icon_sets.items():
        for point, name in find_icons(icon_set, names).items():
            if point in wanted:
                yield artist, point, rasterise(svg_of(icon_set, name))
    for point, content in read_raster_images(archives[RASTER_ARTIST]).items():
        if point in wanted:
            yield RASTER_ARTIST, point, Image.open(io.BytesIO(content))


def read_raster_images(archive: Path) -> dict[str, bytes]:
    """Code point -> WebP file, from a package whose images are named by code point."""
    files = members(archive, "assets/*.webp")
    # Some occur twice, with and without FE0F in the name; the first by name is used.
    return {code_point(Path(path).stem): files[path] for path in sorted(files, reverse=True)}


# ------------------------------------------------------------------------------------------------ splits


def held_out_concepts() -> set[str]:
    """The code points of `test-concepts`: a stored list that never changes."""
    lines = (Path(__file__).parent / "held_out_concepts.txt").read_text(encoding="utf-8").splitlines()
    return {line.split()[0] for line in lines if line and not line.startswith("#")}


def split_keys(keys: Iterable[str], held_out: Collection[str]) -> dict[str, list[str]]:
    """Split -> keys in the order in which they are written.

    Deterministic. The split of a concept depends on no other concept.
    """
    splits: dict[str, list[str]] = {name: [] for name in SPLITS}
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
        held_out_key = validation_image(keys_of_concept)
        for key in keys_of_concept:
            splits["val-pictures" if key == held_out_key else "train"].append(key)
    splits["val-pictures"].sort()
    splits["train"].sort(key=lambda key: _digest(f"mmrl-starter-order:{key}"))
    return splits


def validation_image(keys: Collection[str]) -> str | None:
    """The key of the one image of a concept that goes to `val-pictures`; None if fewer than two would remain.

    Never one by NEAR_DUPLICATE_ARTISTS, whose near-duplicate would stay in training.
    """
    candidates = [
        key
        for key in keys
        if artist_and_concept(key)[0] not in NEAR_DUPLICATE_ARTISTS and _percentile(key) < VAL_IMAGES_PERCENT
    ]
    return min(candidates, key=_val_digest) if candidates and len(keys) >= 3 else None


def artist_and_concept(key: str) -> tuple[str, str]:
    """Splits a key: "noto_v1_1f9c2" -> ("noto_v1", "1f9c2")."""
    artist, _, concept = key.rpartition("_")
    return artist, concept


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _val_digest(name: str) -> str:
    return _digest(f"mmrl-starter-val:{name}")


def _percentile(name: str) -> int:
    return int(_val_digest(name), 16) % 100


# ------------------------------------------------------------------------------------------------ shards


def sample_files(artist: str, concept: Concept, image: bytes) -> dict[str, bytes]:
    """Extension -> content of one sample's files."""
    facts = {
        "captions": concept.captions,
        "tags": concept.tags,
        "group": concept.code_point,
        "category": concept.category,
        "artist": artist,
    }
    text = json.dumps(facts, ensure_ascii=False, separators=(",", ":"))
    return {"webp": image, "txt": concept.name.encode(), "json": text.encode()}


def write_shard(path: Path, keys: Iterable[str], samples: dict[str, dict[str, bytes]]) -> None:
    """Writes a reproducible tar: without owner and modification time."""
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
        names = SPLITS[split]
        for shard, name in enumerate(names):
            start, stop = (len(keys) * i // len(names) for i in (shard, shard + 1))
            write_shard(out / name, keys[start:stop], samples)
    return {split: len(keys) for split, keys in splits.items()}


def main(description: str, build_set: Callable[[Path, Path], dict[str, int]]) -> None:
    """The command-line entry point of a program that builds a set from npm packages."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the shards")
    parser.add_argument("--packages", type=Path, help="folder that keeps the downloaded packages for reuse")
    arguments = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as temporary:
            packages = arguments.packages or Path(temporary)
            packages.mkdir(parents=True, exist_ok=True)
            counts = build_set(arguments.out, packages.resolve())
    except InputError as error:
        parser.exit(2, f"{error}\n")
    for split, count in counts.items():
        print(f"{split:14} {count:6} samples")


if __name__ == "__main__":
    main("Rebuild the starter set.", build)
