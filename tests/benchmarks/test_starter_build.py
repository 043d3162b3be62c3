"""The functions that build the starter set."""

import io
import tarfile

import pytest
import starter
from PIL import Image

from mmrl.data.starter import SPLITS, folder, shards


def shipped_keys(split: str) -> list[str]:
    """The keys of a split, in the order of its shards."""
    keys: dict[str, None] = {}
    for shard in shards(split):
        with tarfile.open(shard) as tar:
            keys |= dict.fromkeys(name.partition(".")[0] for name in tar.getnames())
    return list(keys)


def test_the_notice_names_every_package() -> None:
    notice = (folder() / "NOTICE").read_text(encoding="utf-8")
    for package in (starter.WORDS, *starter.ARTISTS.values()):
        assert f"{package.name} {package.version}" in notice


def test_split_keys_gives_the_shipped_splits() -> None:
    shipped = {split: shipped_keys(split) for split in SPLITS}
    keys = [key for split in shipped.values() for key in split]
    assert starter.split_keys(reversed(keys), starter.held_out_concepts()) == shipped


def test_the_held_out_concepts_are_those_of_the_shipped_split() -> None:
    concepts = {starter.artist_and_concept(key)[1] for key in shipped_keys("test-concepts")}
    assert concepts == starter.held_out_concepts()


def test_a_held_out_concept_goes_to_test_concepts_for_all_artists() -> None:
    splits = starter.split_keys(["noto_1f9c2", "twemoji_1f9c2", "twemoji_1f355"], {"1f9c2"})
    assert splits["test-concepts"] == ["noto_1f9c2", "twemoji_1f9c2"]
    assert splits["test-artist"] == ["twemoji_1f355"]


def test_a_validation_image_leaves_two_images_in_train() -> None:
    key = shipped_keys("val-pictures")[0]
    concept = starter.artist_and_concept(key)[1]
    others = [f"fluent_3d_{concept}", f"fluent_flat_{concept}"]
    assert starter.validation_image([key, *others]) == key
    assert starter.validation_image([key, others[0]]) is None
    assert starter.validation_image(others) is None


@pytest.mark.parametrize(
    ("hexcode", "expected"),
    [("1F9C2", "1f9c2"), ("0023-FE0F-20E3", "0023-20e3"), ("1F441-FE0F-200D-1F5E8-FE0F", "1f441-200d-1f5e8")],
)
def test_code_points_are_normalised(hexcode: str, expected: str) -> None:
    assert starter.code_point(hexcode) == expected


def test_find_icons_uses_the_names_of_other_sets_for_a_set_without_code_points() -> None:
    newer = starter.IconSet({"icons": {}}, {"1f621": "enraged-face", "1f997": "cricket"})
    another = starter.IconSet({"icons": {}}, {"1f621": "pouting-face"})
    older = starter.IconSet({"icons": {"pouting-face": {}, "cricket-game": {}}, "aliases": {"cricket": {}}}, {})
    names = starter.names_by_code_point([newer, another, older])
    assert starter.find_icons(older, names) == {"1f621": "pouting-face"}
    assert starter.find_icons(newer, names) == newer.name_of


def test_an_icon_without_a_size_takes_that_of_its_set() -> None:
    icon_set = starter.IconSet({"icons": {"slice": {"body": "<g/>", "height": 25.22}}, "width": 36, "height": 36}, {})
    svg = starter.svg_of(icon_set, "slice")
    assert 'viewBox="0 0 36 25.22"' in svg
    assert "<g/></svg>" in svg


def test_encode_centres_a_drawing_on_a_white_square() -> None:
    drawing = Image.new("RGBA", (128, 64), "red")
    with Image.open(io.BytesIO(starter.encode(drawing))) as image:
        assert image.size == (64, 64)
        top, middle = image.getpixel((32, 4)), image.getpixel((32, 32))
    assert isinstance(top, tuple)
    assert isinstance(middle, tuple)
    assert min(top) > 245
    assert middle[0] > 245
    assert max(middle[1:]) < 16
