"""Every file that is an image counts as one, whatever its ending, in folders, tables and tars; none is passed over."""

import io
from pathlib import Path

import numpy as np
import pytest
from conftest import drawing, encoded, write_tar
from PIL import Image

from mmrl.data.check.command import check_shards
from mmrl.data.folder import ImageFolder
from mmrl.data.index import index_shard
from mmrl.data.pack.command import pack_shards
from mmrl.data.samples import BadSample, FieldsConfig
from mmrl.data.sources import open_reader

KINDS = {
    "a.jfif": "JPEG", "b.JPE": "JPEG", "c.avif": "AVIF", "d.TIFF": "TIFF", "e.bmp": "BMP", "f.jp2": "JPEG2000",
    "g.Ppm": "PPM", "h.apng": "PNG", "i": "JPEG", "j": "WEBP",
}  # fmt: skip


def images() -> dict[str, bytes]:
    return {name: encoded(drawing(number)[0], kind) for number, (name, kind) in enumerate(KINDS.items())}


def put_folder(folder: Path) -> Path:
    folder.mkdir()
    by_content = {"k.jpg_large": encoded(drawing(8)[0], "JPEG"), "l.png?w=300": encoded(drawing(9)[0])}
    for name, data in {**images(), **by_content, "m.svg": b"<svg/>", "n.heic": b"....ftypheic", "o.tga": b""}.items():
        (folder / name).write_bytes(data)
        (folder / name).with_suffix(".txt").write_text("a caption")
    for name, data in {"README": b"text", "notes.md": b"# Notes", "empty": b"", "clip.mp4": b"....ftypisom"}.items():
        (folder / name).write_bytes(data)
    return folder


def test_a_folder_counts_every_image(tmp_path: Path) -> None:
    reader = ImageFolder(put_folder(tmp_path / "photos"))
    assert not reader.problems
    good, bad = [], {}
    for number in range(len(reader)):
        try:
            good.append(reader.read_image(number)[0].name)
        except BadSample as error:
            bad[error.problem.key] = error.problem.reason
    assert good == [*KINDS, "k.jpg_large", "l.png?w=300"]
    assert bad.keys() == {"m.svg", "n.heic", "o.tga"}
    assert all("no picture in a known format" in reason for reason in bad.values())


def test_pack_keeps_every_image_and_its_pixels(tmp_path: Path) -> None:
    result = pack_shards(put_folder(tmp_path / "photos"), tmp_path / "packed", quiet=True)
    assert (result["samples"], result["bad"]) == (12, {"unreadable image": 3})
    reader = open_reader(tmp_path / "packed")
    folder = ImageFolder(tmp_path / "photos")
    for number in range(len(reader)):
        np.testing.assert_array_equal(reader.read_image(number)[1], folder.read_image(number)[1])


def test_a_tar_counts_every_image(tmp_path: Path) -> None:
    members = [
        (name, data)
        for image, content in images().items()
        for name, data in ((image, content), (f"{image.partition('.')[0]}.txt", b"a caption"))
    ]
    path = write_tar(tmp_path / "a.tar", [*members, ("README", b"text"), ("z.svg", b"<svg/>"), ("z.txt", b"a caption")])
    assert [index_shard(path).key(row) for row in range(11)] == [*"abcdefghij", "z"]
    assert check_shards(path, workers=1, quiet=True).problems == {"no picture in a known format": 1}
    reader = open_reader(path)
    for number in range(10):
        assert reader.read_image(number)[1].shape == (3, 32, 32)
    with pytest.raises(BadSample, match="no picture in a known format"):
        reader.read_image(10)


def test_configured_extensions_are_those_alone() -> None:
    assert FieldsConfig(image=["png"]).image_extensions == ["png"]
    assert FieldsConfig().image_extensions[:4] == ("jpg", "jpeg", "png", "webp")


def test_pack_keeps_transparency_when_it_shrinks(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    image = drawing(0, 64)[0].convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize((64, 64)))
    for name, kind in {"a.png": "PNG", "b.tiff": "TIFF", "c.jpg": "JPEG"}.items():
        (tmp_path / "photos" / name).write_bytes(encoded(image.convert("RGB") if kind == "JPEG" else image, kind))
        (tmp_path / "photos" / name).with_suffix(".txt").write_text("a caption")
    pack_shards(tmp_path / "photos", tmp_path / "small", max_side=32, quiet=True)
    reader = open_reader(tmp_path / "small")
    shapes = [reader.read_image(number)[1].shape for number in range(3)]
    assert shapes == [(4, 32, 32), (4, 32, 32), (3, 32, 32)]
    assert Image.open(io.BytesIO(reader.read(2).image)).format == "JPEG"
