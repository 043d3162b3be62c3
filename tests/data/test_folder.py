"""`mmrl pack`, `mmrl eval` and `mmrl embed` read a folder of images alike: keys, captions, groups and bad samples."""

import json
import os
from dataclasses import astuple
from pathlib import Path

import pyarrow.parquet
import pytest
from conftest import drawing, encoded
from helpers.encoders import save_random_encoder
from helpers.pack_sources import bad_lines, put

from mmrl.data.folder import NO_CAPTION, ImageFolder
from mmrl.data.index import BAD_SAMPLES
from mmrl.data.pack.command import pack_shards
from mmrl.data.samples import NO_GROUP, group_id
from mmrl.data.sources import open_reader
from mmrl.errors import InputError
from mmrl.evaluate import sets
from mmrl.evaluate.readers import open_set
from mmrl.model import bundle
from mmrl.search.embed import EMBEDDINGS, embed_images

# Key of each good image -> its captions, its group, its name in a shard.
GOOD = {
    "PHOTO.JPG": (["upper case"], None, "PHOTO"),
    "\\xff.png": (["a name that is not UTF-8"], None, "_"),
    "a.b.jpg": (["a title"], None, "a_b"),
    "bitmap.bmp": (["from text"], None, "bitmap"),
    "sub/deep er/c.v2.webp": (["zero", "one", "two", "three"], "7", "sub_deep_er_c_v2"),
    "twin.jpg": (["two images"], "shared", "twin"),
    "twin.png": (["two images"], "shared", "twin-2"),
    "日本 é.jpeg": (["unicode"], None, "日本_é"),
}
# Key of each bad image with a caption, and of each caption without an image -> the start of the reason.
BAD = {
    "alone": "missing image: no image for alone.txt",
    "broken-link.png": "missing image: ",
    "damaged.png": "unreadable image: ",
    "latin.png": "unreadable text: latin.txt is not UTF-8",
    "list.png": "unreadable text: list.json holds no JSON object",
    "pipe.png": "unreadable text: pipe.txt is not a readable file",
    "sub/alone": "missing image: no image for alone.json and alone.txt",
    "surrogate.png": "unreadable text: ",
    "surrogate-group.png": "unreadable text: ",
}
UNCAPTIONED = {"blank.png", "null.png", "uncaptioned.png"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with all that GOOD, BAD and UNCAPTIONED list, and hidden files."""
    root = tmp_path / "photos"
    formats = {".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".bmp": "BMP", ".png": "PNG"}
    images = [*GOOD, *(key for key in BAD if key.endswith(".png")), *UNCAPTIONED, ".hidden.png", ".hidden/x.png"]
    for number, name in enumerate(images):
        path = root / name.replace("\\xff", "\udcff")
        if name != "broken-link.png":
            put(path, encoded(drawing(number)[0], formats[path.suffix.lower()]))
    (root / "broken-link.png").symlink_to("nowhere.png")
    put(root / "damaged.png", (root / "damaged.png").read_bytes()[:-60])
    os.mkfifo(root / "pipe.txt")
    texts = {
        "PHOTO.TXT": "upper case\n",
        "\udcff.txt": "a name that is not UTF-8",
        "a.b.json": json.dumps({"title": "a title"}),
        "bitmap.json": json.dumps({"text": "from text", "group": ""}),
        "sub/deep er/c.v2.txt": "\ufeff zero ",
        "sub/deep er/c.v2.JSON": json.dumps(
            {"caption": "three", "captions": ["one", " zero", "", None, "two"], "group": 7, "licence": "mine"}
        ),
        "twin.json": json.dumps({"captions": "two images", "group": "shared"}),
        "日本 é.txt": "unicode",
        "alone.txt": "no image",
        "broken-link.txt": "no image either",
        "damaged.txt": "damaged",
        "latin.txt": "é".encode("latin-1"),
        "list.json": "[1]",
        "sub/alone.json": "{}",
        "sub/alone.txt": "x",
        "surrogate.json": '{"caption": "\\ud800"}',
        "surrogate-group.json": '{"caption": "x", "group": "\\ud800"}',
        "blank.txt": " \n",
        "null.json": '{"captions": null, "caption": []}',
        ".hidden.txt": "hidden",
        ".alone.txt": "hidden",
        "notes.md": "neither an image nor a caption",
    }
    for name, text in texts.items():
        put(root / name, text)
    return root


def test_the_commands_read_a_folder_alike(folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    # pack
    pack_shards(folder, tmp_path / "packed", quiet=True)
    shards = open_reader(tmp_path / "packed")
    samples = [shards.read_image(number)[0] for number in range(len(shards))]
    packed = [(one.name.rpartition("/")[2], one.captions, one.group) for one in samples]
    bad_of_pack = {tuple(line.values()) for line in bad_lines(tmp_path / "packed")}

    # eval
    encoder = bundle.load(save_random_encoder(str(tiny_model), tmp_path / "model"))
    reader = open_set(str(folder)).reader
    embedded = sets.embed(reader, encoder)
    captions_of: dict[str, list[str]] = {key: [] for key in embedded.keys}
    for caption, image in zip(embedded.captions, embedded.image_of_text_M.tolist(), strict=True):
        captions_of[embedded.keys[image]].append(caption)
    groups = [group if group >= 0 else NO_GROUP for group in embedded.image_group_N.tolist()]
    evaluated = [(key, captions, group) for (key, captions), group in zip(captions_of.items(), groups, strict=True)]
    bad_of_eval = {astuple(problem) for problem in embedded.bad}

    # embed
    embed_images(str(tmp_path / "model"), str(folder), tmp_path / "embedded", quiet=True)
    table = pyarrow.parquet.read_table(tmp_path / "embedded" / EMBEDDINGS).to_pylist()
    rows = [(row["key"], row["captions"], row["group"]) for row in table]
    lines = (tmp_path / "embedded" / BAD_SAMPLES).read_text().splitlines()
    bad_of_embed = {tuple(json.loads(line).values()) for line in lines}

    expected = [
        (key, captions, NO_GROUP if group is None else group_id(group)) for key, (captions, group, _) in GOOD.items()
    ]
    assert sorted(evaluated) == sorted(expected)
    assert [row for row in rows if row[1]] == evaluated
    assert packed == [(GOOD[key][2], captions, group) for key, captions, group in evaluated]

    # Images without a caption are embedded, and bad samples of the other two.
    assert {key for key, captions, _ in rows if not captions} == UNCAPTIONED
    assert bad_of_pack == bad_of_eval == bad_of_embed | {(str(folder), key, NO_CAPTION) for key in UNCAPTIONED}
    assert {(shard, key) for shard, key, _ in bad_of_embed} == {(str(folder), key) for key in BAD}
    for _, key, reason in bad_of_embed:
        assert reason.startswith(BAD[key])


def test_images_are_read_on_access(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    real = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: opened.append(path.name) or real(path))
    reader = ImageFolder(folder)
    assert len(reader) == len(GOOD) + len(UNCAPTIONED) + sum(key.endswith(".png") for key in BAD)
    reader.image_file(0)
    assert opened == ["PHOTO.TXT"]
    reader.read_image(0)
    assert opened == ["PHOTO.TXT", "PHOTO.TXT", "PHOTO.JPG"]


def test_a_folder_without_captions_is_refused_by_eval(tmp_path: Path) -> None:
    put(tmp_path / "a.png", encoded(drawing(1)[0]))
    put(tmp_path / "b.png", encoded(drawing(2)[0]))
    put(tmp_path / "b.json", "{")
    with pytest.raises(InputError, match=r"shards: none of the first 2 images in .* has a usable caption \(a\.png: no"):
        open_set(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"shards: the folder .*empty holds no images \(\.jpg, "):
        open_set(str(tmp_path / "empty"))
