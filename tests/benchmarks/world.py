"""Builds a larger data set than the starter set: emoji with names in seven languages, and the icons of seven sets.

    python tests/benchmarks/world.py OUT [--packages DIR]

About 27,000 images (64 x 64 pixels on white, WebP) of about 15,000 concepts by 13 artists, from npm packages with
pinned versions and hashes. It uses the functions of the starter set's builder, starter.py. Nothing of it ships with
mmrl. It needs npm and resvg-py and takes a few minutes on one core. OUT/NOTICE names the sources.

The concept of an icon is the set of words of its name: "circle arrow left" and "arrow-left-circle" are one concept. An
icon whose name @mdi/svg lists as an alias of one of its icons belongs to the concept of that icon, and an icon with the
name of an emoji belongs to the concept of the emoji. The first caption of a sample is the name given by its artist, and
the second adds keywords. The other captions of an emoji are its names in other languages.

    split          what it holds
    train          nine artists: noto, noto_v1, fluent_flat, fluent_3d; mdi, tabler, phosphor, carbon, fontawesome
    val-artist     two artists that are not in train, emojione and bootstrap; concepts of train
    val-concepts   concepts that are not in train; artists of train
    test-artist    two more artists that are not in train, twemoji and lucide; concepts of train
    test-concepts  more concepts that are not in train, including those of the starter set's test; all artists

Left out: brands and logos; outlined or filled variants of an icon that is there; Remix Icon, because its licence
file (unlike the package's "Apache-2.0") forbids collections of its icons; OpenMoji, which is share-alike.
"""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import starter
from starter import Package


@dataclass(frozen=True)
class Source:
    """An icon set."""

    package: Package
    licence: str
    """Licence of the icons, from the licence file in the package."""
    author: str


SOURCES = {
    "mdi": Source(
        Package("@mdi/svg", "7.4.47", "de92e5dc9ce46c392ab5c53aa7190b19f82b40cb48872a083f788c7e13e91fef"),
        "Apache-2.0",
        "Pictogrammers and contributors",
    ),
    "tabler": Source(
        Package("@tabler/icons", "3.51.0", "b30108713d3fa60aee862c2a133225da8e0f309be0708fe2925763ff810c766c"),
        "MIT",
        "Copyright (c) 2020-2026 Paweł Kuna",
    ),
    "phosphor": Source(
        Package("@phosphor-icons/core", "2.1.1", "313332be6190b724da24107addd781799b48bf76b13963f24501112ffe1baadd"),
        "MIT",
        "Copyright (c) 2023 Phosphor Icons",
    ),
    "carbon": Source(
        Package("@carbon/icons", "11.89.0", "0700c375e42de275bd3f25e4d19966fa03f37d53b1e9f92055cb94b6ee4dd0b7"),
        "Apache-2.0",
        "Copyright IBM Corp.",
    ),
    "fontawesome": Source(
        Package(
            "@fortawesome/fontawesome-free",
            "7.3.1",
            "ca4e32843bd81711894385c2466fb19c55cfd32ef3c58830b2d1df7bd42e6571",
        ),
        "CC BY 4.0",
        "Font Awesome Free by Fonticons, Inc. (https://fontawesome.com)",
    ),
    "bootstrap": Source(
        Package("bootstrap-icons", "1.13.2", "7b5960145e1ab14a49a117f96a9e5a54a94fdf07f21e302d9e4f88d73dd19f9c"),
        "MIT",
        "Copyright (c) 2019-2024 The Bootstrap Authors",
    ),
    "lucide": Source(
        Package("lucide-static", "1.62.0", "386f9080c440d6f5049cefe3456ae8357f7a0c7f76e59670cd1cb83bc7050a44"),
        "ISC",
        "Copyright (c) 2026 Lucide Icons and Contributors",
    ),
}
VAL_ARTISTS, TEST_ARTISTS = ("emojione", "bootstrap"), ("twemoji", "lucide")
LOCALES = ("de", "es", "fr", "it", "nl", "pt")
SPLITS = ("train", "val-artist", "val-concepts", "test-artist", "test-concepts")
TRAIN_SHARDS = 8
VAL_CONCEPTS_PERCENT, TEST_CONCEPTS_PERCENT = 4, 6
# Sets that do not mark brands: icons that another set marks as a brand are left out of them.
_BRANDS_UNMARKED = ("carbon", "bootstrap", "lucide")
_BRAND = re.compile(r"^(brand|logo|ibm|watson)\b|\blogo\b")


@dataclass(frozen=True)
class Icon:
    """An icon of a set: its name and keywords, and the path of its SVG in the package."""

    name: str
    keywords: tuple[str, ...]
    path: str
    aliases: tuple[str, ...] = ()
    """Other names of the same icon, if the set lists them apart from keywords."""


@dataclass(frozen=True)
class Drawing:
    """A future sample: artist, concept, captions and image."""

    artist: str
    concept: str
    captions: tuple[str, ...]
    picture: bytes

    @property
    def key(self) -> str:
        """ARTIST_CONCEPT. It has no dot, which would end the key of a tar member."""
        return f"{self.artist}_{self.concept}"


# ------------------------------------------------------------------------------------------------ words


def words(name: str) -> str:
    """`arrow-left--circle` or `Arrow Left Circle` → "arrow left circle"."""
    return " ".join(re.findall(r"[a-z0-9]+", name.lower()))


def bag(name: str) -> str:
    """The words of a name in alphabetical order: equal for names of the same words in another order."""
    return "-".join(sorted(words(name).split()))


def keywords(of: Iterable[str], name: str) -> tuple[str, ...]:
    """Keywords as plain words, each once, without those that repeat the name."""
    seen = dict.fromkeys(words(one) for one in of if not one.startswith("*"))  # *new*, *updated*
    return tuple(one for one in seen if one and one != words(name))


# ------------------------------------------------------------------------------------------------ icon sets


def read_mdi(archive: Path) -> Iterator[Icon]:
    meta = json.loads(starter.members(archive, "meta.json")["meta.json"])
    kept = [one for one in meta if not one["deprecated"] and "Brand / Logo" not in one["tags"]]
    names = {one["name"] for one in kept}
    for one in kept:
        if one["name"].removesuffix("-outline") == one["name"] or one["name"].removesuffix("-outline") not in names:
            aliases = tuple(one["aliases"])
            yield Icon(one["name"], keywords(aliases, one["name"]), f"svg/{one['name']}.svg", aliases)


def read_tabler(archive: Path) -> Iterator[Icon]:
    for name, one in json.loads(starter.members(archive, "icons.json")["icons.json"]).items():
        if one["category"] != "Brand" and "outline" in one["styles"]:
            yield Icon(name, keywords(map(str, one["tags"]), name), f"icons/outline/{name}.svg")


def read_phosphor(archive: Path) -> Iterator[Icon]:
    """The tags are in a script; it is parsed as text and not run."""
    script = starter.members(archive, "dist/index.mjs")["dist/index.mjs"].decode()
    for name, categories, tags in re.findall(
        r'name: "([^"]+)",\s+pascal_name:.*?categories: \[(.*?)\].*?tags: \[(.*?)\]', script, re.DOTALL
    ):
        if "BRAND" not in categories:
            yield Icon(name, keywords(re.findall(r'"([^"]*)"', tags), name), f"assets/regular/{name}.svg")


def read_carbon(archive: Path) -> Iterator[Icon]:
    for one in json.loads(starter.members(archive, "metadata.json")["metadata.json"])["icons"]:
        large = next((asset for asset in one["assets"] if asset["size"] in (32, "glyph")), None)
        if large and not one["namespace"] and not one.get("deprecated"):
            yield Icon(one["name"], keywords(one.get("aliases", ()), one["name"]), f"svg/{large['filepath']}")


def read_fontawesome(archive: Path) -> Iterator[Icon]:
    families = json.loads(starter.members(archive, "metadata/icon-families.json")["metadata/icon-families.json"])
    for name, one in families.items():
        if any(free["style"] == "solid" for free in one["familyStylesByLicense"]["free"]):
            terms = map(str, one["search"]["terms"])
            yield Icon(one["label"], keywords(terms, one["label"]), f"svgs/solid/{name}.svg")


def read_bootstrap(archive: Path) -> Iterator[Icon]:
    for path in sorted(starter.members(archive, "icons/*.svg")):
        name = Path(path).stem
        if not name.endswith("-fill"):
            yield Icon(name, (), path)


def read_lucide(archive: Path) -> Iterator[Icon]:
    for name, tags in json.loads(starter.members(archive, "tags.json")["tags.json"]).items():
        yield Icon(name, keywords(tags, name), f"icons/{name}.svg")


READERS = {
    "mdi": read_mdi,
    "tabler": read_tabler,
    "phosphor": read_phosphor,
    "carbon": read_carbon,
    "fontawesome": read_fontawesome,
    "bootstrap": read_bootstrap,
    "lucide": read_lucide,
}


def brands(archives: dict[str, Path]) -> set[str]:
    """The bags of all names that one of the sets marks as a brand."""
    meta = json.loads(starter.members(archives["mdi"], "meta.json")["meta.json"])
    tabler = json.loads(starter.members(archives["tabler"], "icons.json")["icons.json"])
    families = json.loads(
        starter.members(archives["fontawesome"], "metadata/icon-families.json")["metadata/icon-families.json"]
    )
    names = [one["name"] for one in meta if "Brand / Logo" in one["tags"]]
    names += [name.removeprefix("brand-") for name, one in tabler.items() if one["category"] == "Brand"]
    names += [
        name
        for name, one in families.items()
        if any(free["style"] == "brands" for free in one["familyStylesByLicense"]["free"])
    ]
    return {bag(name) for name in names}


def concepts_of(icon_sets: dict[str, list[Icon]], emoji: dict[str, str]) -> dict[tuple[str, str], str]:
    """(artist, name) → concept. `emoji` holds the code point of each emoji by the bag of its name.

    A name that is an alias of one icon of @mdi/svg gets that icon's concept, unless an icon of @mdi/svg has this name
    or several have this alias.
    """
    own = {bag(icon.name) for icon in icon_sets["mdi"]}
    leads: dict[str, set[str]] = defaultdict(set)
    for icon in icon_sets["mdi"]:
        for alias in icon.aliases:
            leads[bag(alias)].add(bag(icon.name))
    found = {}
    for artist, icons in icon_sets.items():
        for icon in icons:
            concept = bag(icon.name)
            if concept not in own and len(leads.get(concept, ())) == 1:
                concept = next(iter(leads[concept]))
            found[artist, icon.name] = emoji.get(concept, concept)
    return found


def draw_icons(archives: dict[str, Path], emoji: dict[str, str]) -> Iterator[Drawing]:
    """One drawing of each concept by each set: the first in the order of names if a set has several."""
    known_brands = brands(archives)
    icon_sets = {
        artist: sorted(
            (
                icon
                for icon in READERS[artist](archive)
                if words(icon.name)
                and not _BRAND.search(words(icon.name))
                and not (artist in _BRANDS_UNMARKED and bag(icon.name) in known_brands)
            ),
            key=lambda icon: icon.name,
        )
        for artist, archive in archives.items()
    }
    concept_of = concepts_of(icon_sets, emoji)
    for artist, icons in icon_sets.items():
        files = starter.members(archives[artist], *{f"{Path(icon.path).parent}/*.svg" for icon in icons})
        drawn: set[str] = set()
        for icon in icons:
            concept = concept_of[artist, icon.name]
            if concept in drawn or icon.path not in files:
                continue
            drawn.add(concept)
            name = words(icon.name)
            captions = (name, f"{name}: {', '.join(icon.keywords)}") if icon.keywords else (name,)
            yield Drawing(
                artist, concept, captions, starter.encode(starter.rasterise(sized(files[icon.path].decode())))
            )


def sized(svg: str) -> str:
    """The SVG with its width and height replaced by the size that images are rendered at."""
    head, rest = re.match(r"(.*?<svg\b)([^>]*>.*)", svg, re.DOTALL).groups()  # pyright: ignore[reportOptionalMemberAccess]
    attributes, _, body = rest.partition(">")
    attributes = re.sub(r'\s(width|height)="[^"]*"', "", attributes)
    size = starter.RENDER_SIZE
    return f'{head} width="{size}" height="{size}"{attributes}>{body}'


# ------------------------------------------------------------------------------------------------ emoji


def names_abroad(archive: Path) -> dict[str, tuple[str, ...]]:
    """Code point → names in the other languages."""
    files = starter.members(archive, *(f"{locale}/data.json" for locale in LOCALES))
    found: dict[str, list[str]] = defaultdict(list)
    for locale in LOCALES:
        for entry in json.loads(files[f"{locale}/data.json"]):
            found[starter.code_point(entry["hexcode"])].append(entry["label"])
    return {point: tuple(names) for point, names in found.items()}


def draw_emoji(
    archives: dict[str, Path], concepts: dict[str, starter.Concept], abroad: dict[str, tuple[str, ...]]
) -> Iterator[Drawing]:
    """The emoji as the starter set draws them, with the names in other languages added."""
    for artist, point, drawing in starter.drawings(archives, concepts):
        captions = (*concepts[point].captions, *abroad.get(point, ()))
        yield Drawing(artist, point, captions, starter.encode(drawing))


# ------------------------------------------------------------------------------------------------ splits, shards


def split_drawings(drawings: Iterable[tuple[str, str]], held_out: set[str]) -> dict[tuple[str, str], str]:
    """(artist, concept) → split. Drawings of a held-out artist have none if their concept is not in train.

    The split of a concept depends only on its name, not on the other concepts.
    """
    pairs = sorted(drawings)
    split_of: dict[tuple[str, str], str] = {}
    later: list[tuple[str, str]] = []
    for artist, concept in pairs:
        percentile = _percentile(concept)
        if concept in held_out or percentile < TEST_CONCEPTS_PERCENT:
            split_of[artist, concept] = "test-concepts"
        elif artist in (*VAL_ARTISTS, *TEST_ARTISTS):
            later.append((artist, concept))
        elif percentile < TEST_CONCEPTS_PERCENT + VAL_CONCEPTS_PERCENT:
            split_of[artist, concept] = "val-concepts"
        else:
            split_of[artist, concept] = "train"
    shown = {concept for (_, concept), split in split_of.items() if split == "train"}
    for artist, concept in later:
        if concept in shown:
            split_of[artist, concept] = "val-artist" if artist in VAL_ARTISTS else "test-artist"
    return split_of


def _percentile(concept: str) -> int:
    return int(hashlib.sha256(f"mmrl-world:{concept}".encode()).hexdigest(), 16) % 100


def sample_files(drawing: Drawing) -> dict[str, bytes]:
    """The files of one sample by their extension."""
    facts: dict[str, Any] = {"captions": drawing.captions, "group": drawing.concept, "artist": drawing.artist}
    text = json.dumps(facts, ensure_ascii=False, separators=(",", ":"))
    return {"webp": drawing.picture, "txt": drawing.captions[0].encode(), "json": text.encode()}


def build(out: Path, packages: Path) -> dict[str, int]:
    """Writes OUT/SPLIT/*.tar and OUT/NOTICE; returns the number of samples in each split."""
    words_archive = starter.fetch(starter.WORDS, packages)
    concepts = starter.read_concepts(words_archive)
    emoji_archives = {artist: starter.fetch(package, packages) for artist, package in starter.ARTISTS.items()}
    icon_archives = {artist: starter.fetch(source.package, packages) for artist, source in SOURCES.items()}
    emoji = {bag(concept.name): point for point, concept in concepts.items()}
    drawings = {
        (one.artist, one.concept): one
        for many in (
            draw_emoji(emoji_archives, concepts, names_abroad(words_archive)),
            draw_icons(icon_archives, emoji),
        )
        for one in many
    }
    split_of = split_drawings(drawings, starter.held_out_concepts())
    counts = {}
    for split in SPLITS:
        chosen = [drawings[pair] for pair, where in split_of.items() if where == split]
        chosen.sort(key=lambda one: hashlib.sha256(f"mmrl-world-order:{one.key}".encode()).hexdigest())
        (out / split).mkdir(parents=True, exist_ok=True)
        shards = TRAIN_SHARDS if split == "train" else 1
        for part in range(shards):
            some = chosen[len(chosen) * part // shards : len(chosen) * (part + 1) // shards]
            files = {one.key: sample_files(one) for one in some}
            starter.write_shard(out / split / f"{split}-{part:04d}.tar", files, files)
        counts[split] = len(chosen)
    (out / "NOTICE").write_text(notice(), encoding="utf-8")
    return counts


def notice() -> str:
    """The sources and licences of all images and texts."""
    lines = ["Icons, rendered on white at 64 x 64 pixels as WebP; a selection without brands.", ""]
    lines += [
        f"{artist}: {one.package.name} {one.package.version}. {one.author}. {one.licence}."
        for artist, one in SOURCES.items()
    ]
    return "\n".join([*lines, "", "Emoji, names and keywords: see the NOTICE of the starter set.", ""])


if __name__ == "__main__":
    starter.main("Build the larger data set of the benchmarks.", build)
