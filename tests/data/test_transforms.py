import numpy as np
import pytest
import torch
from conftest import drawing

from mmrl.data.transforms import Augmentation, AugmentConfig
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
