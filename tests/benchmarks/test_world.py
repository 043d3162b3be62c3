"""The rules of the larger data set, on packages of a few files."""

import io
import json
import tarfile
from pathlib import Path

import pytest
import starter
import world
from world import Drawing, Icon


def archive(folder: Path, artist: str, files: dict[str, str]) -> Path:
    """An npm package of these files, under the name that the builder looks for."""
    path = folder / world.SOURCES[artist].package.archive_name
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content.encode())
            tar.addfile(member, io.BytesIO(content.encode()))
    return path


def mdi_entry(name: str, aliases: tuple[str, ...] = (), tags: tuple[str, ...] = (), deprecated: bool = False) -> dict:
    return {"name": name, "aliases": list(aliases), "tags": list(tags), "deprecated": deprecated}


@pytest.fixture
def packages(tmp_path: Path) -> dict[str, Path]:
    """A small package of every set, with the special cases of each."""
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" width="24" height="24" viewBox="0 0 24 24"><path d="M2 2h9v9z"/></svg>'
    )
    mdi = [
        mdi_entry("magnify", aliases=("search",)),
        mdi_entry("magnify-outline"),  # left out: there is "magnify"
        mdi_entry("bone-outline"),  # kept: there is no "bone"
        mdi_entry("git", tags=("Brand / Logo",)),
        mdi_entry("old", deprecated=True),
    ]
    tabler = {
        "search": {"category": "System", "tags": ["find", 5], "styles": {"outline": {}}},
        "brand-x": {"category": "Brand", "tags": [], "styles": {"outline": {}}},
        "only-filled": {"category": "System", "tags": [], "styles": {"filled": {}}},
    }
    phosphor = """
      { name: "acorn", pascal_name: "Acorn", categories: [e.NATURE], figma_category: a.X,
        tags: ["*new*", "nut"], codepoint: 1 },
      { name: "apple-logo", pascal_name: "AppleLogo", categories: [e.BRAND], figma_category: a.X,
        tags: ["mac"], codepoint: 2 },
    """
    carbon = [
        {"name": "Arrow--left", "aliases": ["back"], "namespace": [], "assets": [{"size": 32, "filepath": "32/a.svg"}]},
        {"name": "small", "aliases": [], "namespace": [], "assets": [{"size": 16, "filepath": "16/small.svg"}]},
        {"name": "cells", "aliases": [], "namespace": ["health"], "assets": [{"size": 32, "filepath": "32/c.svg"}]},
        {"name": "logo--x", "aliases": [], "namespace": [], "assets": [{"size": 32, "filepath": "32/x.svg"}]},
    ]
    fontawesome = {
        "dog": {
            "label": "Dog",
            "search": {"terms": ["pet"]},
            "familyStylesByLicense": {"free": [{"family": "classic", "style": "solid"}]},
        },
        "apple": {
            "label": "Apple",
            "search": {"terms": []},
            "familyStylesByLicense": {"free": [{"family": "classic", "style": "brands"}]},
        },
    }
    return {
        "mdi": archive(tmp_path, "mdi", {"meta.json": json.dumps(mdi), "svg/magnify.svg": svg}),
        "tabler": archive(tmp_path, "tabler", {"icons.json": json.dumps(tabler), "icons/outline/search.svg": svg}),
        "phosphor": archive(tmp_path, "phosphor", {"dist/index.mjs": phosphor, "assets/regular/acorn.svg": svg}),
        "carbon": archive(tmp_path, "carbon", {"metadata.json": json.dumps({"icons": carbon}), "svg/32/a.svg": svg}),
        "fontawesome": archive(
            tmp_path,
            "fontawesome",
            {"metadata/icon-families.json": json.dumps(fontawesome), "svgs/solid/dog.svg": svg},
        ),
        "bootstrap": archive(
            tmp_path, "bootstrap", {"icons/left-arrow.svg": svg, "icons/heart-fill.svg": svg, "icons/git.svg": svg}
        ),
        "lucide": archive(tmp_path, "lucide", {"tags.json": '{"arrow-left": ["back"]}', "icons/arrow-left.svg": svg}),
    }


def test_each_set_is_read_without_brands_outlined_duplicates_and_deprecated_icons(packages: dict[str, Path]) -> None:
    found = {
        artist: {icon.name: icon.keywords for icon in read(packages[artist])} for artist, read in world.READERS.items()
    }
    assert found == {
        "mdi": {"magnify": ("search",), "bone-outline": ()},
        "tabler": {"search": ("find", "5")},
        "phosphor": {"acorn": ("nut",)},
        "carbon": {"Arrow--left": ("back",), "logo--x": ()},
        "fontawesome": {"Dog": ("pet",)},
        "bootstrap": {"git": (), "left-arrow": ()},
        "lucide": {"arrow-left": ("back",)},
    }


def test_an_icon_by_several_names_is_one_concept(packages: dict[str, Path]) -> None:
    drawn = {(one.artist, one.concept): one for one in world.draw_icons(packages, {"dog": "1f415"})}
    assert set(drawn) == {
        ("mdi", "magnify"),
        ("tabler", "magnify"),  # an alias in mdi
        ("phosphor", "acorn"),
        ("carbon", "arrow-left"),
        ("fontawesome", "1f415"),  # as the emoji of that name
        # not ("bootstrap", "git"): mdi marks it as a brand
        ("bootstrap", "arrow-left"),  # the same words in another order
        ("lucide", "arrow-left"),
    }
    assert drawn["tabler", "magnify"].captions == ("search", "search: find, 5")
    assert drawn["bootstrap", "arrow-left"].captions == ("left arrow",)


def test_an_alias_that_is_ambiguous_or_an_icon_itself_is_ignored() -> None:
    mdi = [Icon("account", (), "", ("user",)), Icon("person", (), "", ("user", "man")), Icon("man", (), "")]
    found = world.concepts_of({"mdi": mdi, "x": [Icon("user", (), ""), Icon("man", (), "")]}, {})
    assert found["x", "user"] == "user"  # two icons have this alias
    assert found["x", "man"] == "man"


def test_icons_are_rendered_at_one_size() -> None:
    head = '<?xml version="1.0"?>\n<!-- by -->\n<svg '
    svg = f'{head}width="24" viewBox="0 0 9 9" height="1em" stroke-width="2"><rect width="9"/></svg>'
    sized = f'{head}width="128" height="128" viewBox="0 0 9 9" stroke-width="2"><rect width="9"/></svg>'
    assert world.sized(svg) == sized


def test_splits_keep_concepts_and_artists_apart() -> None:
    concepts = [f"concept {number}" for number in range(400)]
    artists = ("mdi", "tabler", "lucide", "bootstrap")
    held_out = set(concepts[:3])
    split_of = world.split_drawings([(artist, concept) for artist in artists for concept in concepts], held_out)
    members = {split: {pair for pair, where in split_of.items() if where == split} for split in world.SPLITS}
    of = {split: {concept for _, concept in pairs} for split, pairs in members.items()}
    assert not of["train"] & (of["val-concepts"] | of["test-concepts"])
    assert not of["val-concepts"] & of["test-concepts"]
    assert of["test-artist"] == of["val-artist"] == of["train"]
    assert held_out <= of["test-concepts"]
    assert {artist for artist, _ in members["train"]} == {"mdi", "tabler"}
    assert {artist for artist, _ in members["test-artist"]} == {"lucide"}
    assert {artist for artist, _ in members["val-artist"]} == {"bootstrap"}
    assert len(of["test-concepts"]) == pytest.approx(400 * 0.06, abs=15)
    # The split of a concept depends on no other concept; concepts that are not in train are not in test-artist.
    some = world.split_drawings([("lucide", concepts[9]), ("mdi", concepts[8])], held_out)
    assert some == {pair: split_of[pair] for pair in some}
    assert ("lucide", concepts[9]) not in some or some["lucide", concepts[9]] == "test-concepts"


def test_a_sample_has_its_names_and_its_group() -> None:
    files = world.sample_files(Drawing("mdi", "magnify", ("magnify", "magnify: search"), b"picture"))
    assert files["txt"] == b"magnify"
    assert json.loads(files["json"]) == {
        "captions": ["magnify", "magnify: search"],
        "group": "magnify",
        "artist": "mdi",
    }


def test_every_source_is_pinned_and_named_in_the_notice() -> None:
    notice = world.notice()
    for source in world.SOURCES.values():
        assert len(source.package.sha256) == 64
        assert f"{source.package.name} {source.package.version}" in notice
        assert source.licence in notice
    assert set(world.SOURCES) == set(world.READERS)
    assert set(world.VAL_ARTISTS + world.TEST_ARTISTS) <= set(world.SOURCES) | set(starter.ARTISTS)
