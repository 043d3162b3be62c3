from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import drawing
from PIL import Image
from pydantic import ValidationError

from mmrl.data import draws
from mmrl.data.transforms import Augmentation, AugmentConfig
from mmrl.evaluate.degrade import degrade_image
from mmrl.images.decode import to_tensor
from mmrl.images.image_spec import ImageSpec

SPEC = ImageSpec(height=32, width=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def changed(config: AugmentConfig, count: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` copies of one image, before and after."""
    augmentation = Augmentation(config, SPEC)
    before = torch.stack([SPEC.pixels(drawing(2)[0])] * count)
    return before, augmentation.apply(before, augmentation.random_params(0, 0, np.arange(count)))


def test_the_default_config_changes_nothing() -> None:
    before, after = changed(AugmentConfig())
    assert after is before


def test_an_identity_transform_is_exact() -> None:
    before, after = changed(AugmentConfig(flip=1e-12))
    assert torch.equal(before, after)


def test_flip_mirrors_the_configured_fraction_of_images() -> None:
    before, after = changed(AugmentConfig(flip=0.25), count=1000)
    mirrored = (after == before.flip(3)).flatten(1).all(1)
    assert ((after == before).flatten(1).all(1) | mirrored).all()
    assert mirrored.float().mean().item() == pytest.approx(0.25, abs=0.04)


def test_the_area_outside_the_image_has_the_fill_colour() -> None:
    for fill in (255, 0):
        _, after = changed(AugmentConfig(zoom=[0.5, 0.5], fill=fill))
        assert (after[:, :, 0] == fill).all()
        assert (after[:, :, :, -1] == fill).all()


def test_shift_differs_per_sample() -> None:
    _, after = changed(AugmentConfig(shift=0.25))
    assert len({tuple(image.flatten().tolist()) for image in after}) > 150


def test_grey_has_equal_channels() -> None:
    _, after = changed(AugmentConfig(grey=0.5), count=1000)
    grey = ((after[:, 0] == after[:, 1]) & (after[:, 1] == after[:, 2])).flatten(1).all(1)
    assert grey.float().mean().item() == pytest.approx(0.5, abs=0.05)


def test_brightness_scales_and_stays_in_range() -> None:
    before, after = changed(AugmentConfig(brightness=0.2, channel_gain=0.1))
    ratio = after.float().mean((1, 2, 3)) / before.float().mean((1, 2, 3))
    assert 0.75 < ratio.min() < 0.9
    assert ratio.max() < 1.2


@pytest.mark.parametrize("size", [32, 100])
def test_random_crop_keeps_the_configured_area_and_has_the_specs_size(size: int) -> None:
    augmentation = Augmentation(AugmentConfig(random_resized_crop=[0.4, 0.6]), SPEC)
    image = to_tensor(drawing(2, 100)[0].resize((size, size * 2)))
    crops = []
    for params_P in augmentation.random_params(3, 1, np.arange(50)):
        assert augmentation.crop_and_resize(image, params_P).shape == (3, 32, 32)
        top, left, height, width = augmentation._crop_box(size * 2, size, params_P)
        assert 0 <= top <= size * 2 - height
        assert 0 <= left <= size - width
        crops.append(height * width / (2 * size * size))
    assert min(crops) > 0.3
    assert max(crops) < 0.65


def photo(channels: int = 3, height: int = 120, width: int = 160) -> torch.Tensor:
    """An image with detail of every size; with 4 channels, its left half is transparent."""
    rng = np.random.default_rng(0)
    layers = [
        Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).resize((width, height))
        for size in (3, 12, 48, 120)
    ]
    image = Image.fromarray(np.mean([np.asarray(layer) for layer in layers], axis=0).astype(np.uint8))
    if channels == 4:
        image.putalpha(Image.fromarray((np.arange(width) >= width // 2)[None].repeat(height, 0)))
    return to_tensor(image)


def fitted(augmentation: Augmentation, image_CHW: torch.Tensor, count: int = 20) -> torch.Tensor:
    """The image cropped, degraded and resized with the random numbers of `count` samples."""
    params_BP = augmentation.random_params(0, 0, np.arange(count))
    return torch.stack([augmentation.crop_and_resize(image_CHW, params_P) for params_P in params_BP])


def psnr(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(10 * torch.log10(255**2 / (one.float() - other.float()).square().mean()))


def test_random_numbers_of_earlier_versions_keep_their_values() -> None:
    params_BP = Augmentation(AugmentConfig(), SPEC).random_params(3, 1, np.arange(5))
    assert np.array_equal(params_BP[:, :16], draws.uniform(3, 1, 1 << 22, np.arange(5)[:, None], np.arange(16)))


@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize(
    ("kind", "severity"),
    [("downscale", 20), ("blur", 0.01), ("blur", 0.06), ("jpeg", 30), ("jpeg", 5)],
)
def test_degraded_training_images_are_those_of_an_evaluation(kind: str, severity: float, side: int) -> None:
    spec = replace(SPEC, height=side, width=side)
    config = AugmentConfig.model_validate({kind: [severity, severity], "degrade": 1.0})
    expected = spec.pixels(degrade_image(photo(), kind, severity, "key"))
    found = fitted(Augmentation(config, spec), photo(), 1)[0]
    assert psnr(found, expected) > 45
    assert psnr(found, expected) > psnr(expected, spec.pixels(photo())) + 10


def test_severities_are_in_their_range_and_drawn_with_the_probability() -> None:
    augmentation = Augmentation(AugmentConfig(downscale=[10, 100], blur=[0.01, 0.1], jpeg=[5, 80], degrade=0.3), SPEC)
    params_BP = augmentation.random_params(0, 0, np.arange(2000))
    drawn = [[augmentation._severity([10, 100], params_P[n : n + 2]) for params_P in params_BP] for n in (16, 18, 20)]
    for values in drawn:
        found = np.array([value for value in values if value])
        assert len(found) / 2000 == pytest.approx(0.3, abs=0.04)
        assert found.min() >= 10
        assert found.max() <= 100
        assert np.log10(found).mean() == pytest.approx(1.5, abs=0.05)
    both = [bool(one) and bool(other) for one, other in zip(drawn[0], drawn[1], strict=True)]
    assert np.mean(both) == pytest.approx(0.09, abs=0.03)


def test_all_degradations_and_the_crop_combine() -> None:
    keys = {"downscale": [12, 60], "blur": [0.005, 0.05], "jpeg": [5, 60], "degrade": 0.8}
    config = AugmentConfig.model_validate({**keys, "random_resized_crop": [0.3, 1.0]})
    found = fitted(Augmentation(config, SPEC), photo())
    assert found.shape == (20, 3, 32, 32)
    assert len({image.numpy().tobytes() for image in found}) == 20
    plain = fitted(Augmentation(AugmentConfig(random_resized_crop=[0.3, 1.0]), SPEC), photo())
    detail = [(x[..., 1:].float() - x[..., :-1].float()).abs().mean() for x in (found, plain)]
    assert detail[0] < detail[1]


def test_transparent_images_get_random_backgrounds() -> None:
    augmentation = Augmentation(AugmentConfig(background=0.6), SPEC)
    found, white = fitted(augmentation, photo(4), 300), SPEC.pixels(photo(4))
    assert ((found[..., 18:].int() - white[..., 18:]).abs() <= 1).all()
    is_white = (found[..., :14] == white[..., :14]).flatten(1).all(1)
    assert 1 - is_white.float().mean().item() == pytest.approx(0.6, abs=0.08)
    behind = found[~is_white][..., :14].float()
    assert 90 < behind.mean() < 165
    assert behind.mean((1, 2, 3)).std() > 20
    assert (behind.amax((2, 3)) - behind.amin((2, 3))).max() > 60  # a gradient
    assert (behind.diff(dim=2).abs() < 12).all()  # a smooth one
    assert torch.equal(fitted(augmentation, photo(), 3), fitted(Augmentation(AugmentConfig(), SPEC), photo(), 3))


def test_second_images_have_their_own_settings_and_random_numbers() -> None:
    shopper = AugmentConfig(blur=[0.1, 0.1], degrade=1.0)
    config = AugmentConfig(random_resized_crop=[0.3, 1.0], second=shopper)
    first, second = (Augmentation(config, SPEC, second=which) for which in (False, True))
    assert first.config is config
    assert second.config is shopper
    same = Augmentation(AugmentConfig(random_resized_crop=[0.3, 1.0]), SPEC, second=True)
    assert not torch.equal(fitted(same, photo()), fitted(first, photo()))
    assert np.array_equal(same.random_params(1, 2, np.arange(3)), second.random_params(1, 2, np.arange(3)))
    with pytest.raises(ValidationError, match="second images have no second image of their own"):
        AugmentConfig.model_validate({"second": {"second": {"flip": 0.5}}})


@pytest.mark.parametrize("keys", [{}, {"background": 1.0}, {"jpeg": [5, 9]}, {"random_resized_crop": [0.5, 0.9]}])
def test_what_is_cached_gives_the_same_images(keys: dict[str, Any]) -> None:
    augmentation = Augmentation(AugmentConfig.model_validate(keys), SPEC)
    for image_CHW in (photo(), photo(4)):
        kept_CHW = augmentation.kept(image_CHW)
        assert torch.equal(fitted(augmentation, kept_CHW), fitted(augmentation, image_CHW))
        assert (kept_CHW is image_CHW) == bool(keys and (len(image_CHW) == 4 or "background" not in keys))
