"""`mmrl check`: captions that samples share, and images of another set that the checked one has too (`--against`)."""

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_tar
from PIL import Image, ImageEnhance

from mmrl.data.check import report
from mmrl.data.check.command import check_shards
from mmrl.errors import InputError
from mmrl.images.perceptual_hash import NO_HASH, most_similar, perceptual_hash


def photo(seed: int, size: int = 96) -> Image.Image:
    """Smooth random colours, as in a photo."""
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def sample(key: str, image: bytes, *captions: str, group: str | None = None) -> list[tuple[str, bytes]]:
    metadata = {"captions": list(captions or [key])} | ({} if group is None else {"group": group})
    return [(f"{key}.png", image), (f"{key}.json", json.dumps(metadata).encode())]


def hash_of(image: Image.Image) -> np.ndarray:
    return perceptual_hash(torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1))


def rows(*images: Image.Image) -> np.ndarray:
    return np.stack([hash_of(image) for image in images])


def copies(image: Image.Image) -> dict[str, Image.Image]:
    width, height = image.size
    return {
        "JPEG": Image.open(io.BytesIO(encoded(image, "JPEG", quality=60))),
        "half": image.resize((width // 2, height // 2)),
        "enlarged": image.resize((3 * width, 3 * height)),
        "wider": image.resize((width + 9, height)),
        "brighter": ImageEnhance.Brightness(image).enhance(1.1),
        "less contrast": ImageEnhance.Contrast(image).enhance(0.9),
        "cropped": image.crop((1, 1, width - 1, height - 1)),
    }


def test_copies_look_alike_and_other_images_do_not() -> None:
    images = [photo(seed) for seed in range(40)]
    assert most_similar(rows(*images), rows(*images[1:]), lambda _: None).tolist() == [-1, *range(39)]
    for name, found in {name: [copies(image)[name] for image in images] for name in copies(images[0])}.items():
        assert most_similar(rows(*found), rows(*images), lambda _: None).tolist() == list(range(40)), name


def test_colour_and_noise_tell_images_apart() -> None:
    shape = Image.new("RGB", (64, 64), "white")
    hearts = []
    for colour in ("red", "blue", "green"):
        hearts.append(shape.copy())
        hearts[-1].paste(colour, (16, 20, 50, 44))
    noise = [
        Image.fromarray(np.random.default_rng(n).integers(0, 256, (224, 224, 3), dtype=np.uint8)) for n in range(5)
    ]
    for images in (hearts, noise):
        for i in range(len(images)):
            others = rows(*images[:i], *images[i + 1 :])
            assert most_similar(rows(images[i]), others, lambda _: None).tolist() == [-1]


def test_an_even_image_looks_like_no_other() -> None:
    even = [Image.new("RGB", (50, 40), colour) for colour in ("white", "white", "red")]
    assert all((hash_of(image) == NO_HASH).all() for image in even)
    assert most_similar(rows(even[0]), rows(*even), lambda _: None).tolist() == [-1]


def test_thin_images_have_a_hash() -> None:
    assert hash_of(Image.fromarray(np.arange(6000, dtype=np.uint8).reshape(1, 2000, 3))).shape == (8,)


def test_overlap_of_two_sets(tmp_path: Path) -> None:
    train = write_tar(tmp_path / "train.tar", [one for n in range(6) for one in sample(f"t{n}", encoded(photo(n)))])
    val = write_tar(
        tmp_path / "val.tar",
        [
            *sample("new", encoded(photo(100))),
            *sample("same", encoded(photo(3))),
            *sample("small", encoded(photo(4).resize((40, 40)))),
            *sample("jpeg", encoded(photo(5), "JPEG", quality=50)),
            *sample("broken", b"no image"),
        ],
    )
    result = check_shards(train, against=str(val), workers=1, quiet=True)
    found = result.overlap
    assert found is not None
    assert result.ok, "the other set is not what is checked"
    assert (found.samples, found.bad, found.identical, found.alike) == (5, 1, 1, 2)
    assert found.identical_examples == [[f"{val}/same", f"{train}/t3"]]
    assert found.alike_examples == [[f"{val}/small", f"{train}/t4"], [f"{val}/jpeg", f"{train}/t5"]]
    lines = "\n".join(report.result_lines(result))
    assert f"of 5 samples in {val}, 1 have an image of this set, and 2 one that looks like it; 1 bad sample" in lines
    assert f"{val}/small ~ {train}/t4" in lines
    assert dataclasses.asdict(result)["overlap"]["alike"] == 2
    assert check_shards(train, workers=1, quiet=True).overlap is None
    with pytest.raises(InputError, match="against: how images look is compared"):
        check_shards(train, against=str(val), decode=False, workers=1, quiet=True)
    with pytest.raises(InputError, match="nowhere"):
        check_shards(train, against=str(tmp_path / "nowhere.tar"), workers=1, quiet=True)


def test_samples_that_share_a_caption_without_a_group_are_counted(tmp_path: Path) -> None:
    images = [encoded(photo(n)) for n in range(9)]
    one = write_tar(
        tmp_path / "one.tar",
        [
            *sample("a", images[0], "A  dog", "first"),
            *sample("b", images[1], "a cat", "A CAT", "second"),  # its own captions are no pair
            *sample("c", images[2], "a hat", group="7"),
            *sample("d", images[3], "a hat", group="7"),  # one group
            *sample("e", images[4], "a bird", group="7"),
            *sample("f", b"no image", "first"),  # bad: training never sees it
        ],
    )
    two = write_tar(
        tmp_path / "two.tar",
        [
            *sample("g", images[5], "third", "a dog"),
            *sample("h", images[6], "a bird", group="8"),
            *sample("i", images[7], "a bird"),
            *sample("j", images[8], "A&nbsp;dog"),
        ],
    )
    result = check_shards([str(one), str(two)], workers=1, quiet=True)
    assert result.duplicates.captions_apart == 6  # a, g and j; e, h and i
    assert [f"{one}/a", f"{two}/j"] in result.duplicates.caption_examples
    assert "6 samples with a text of another one and no common group" in "\n".join(report.result_lines(result))
    alone = check_shards([str(two)], workers=1, quiet=True).duplicates
    assert alone.captions_apart == 4
