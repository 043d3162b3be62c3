import io

import pytest
import torch
import torch.nn.functional as F
from conftest import drawing
from PIL import Image, ImageFilter

from mmrl.evaluate.degrade import degrade_image
from mmrl.images.decode import to_tensor


@pytest.mark.parametrize("severity", [0.5, 2.0])
def test_the_degradations_of_an_evaluation_are_plain_calls_of_pillow_and_torch(severity: float) -> None:
    """Scores of different versions are compared, so these pixels must not change."""
    image = drawing(3, 96)[0].resize((96, 120))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=int(10 * severity))
    blurred = image.filter(ImageFilter.GaussianBlur(0.02 * severity * 96))
    small = F.interpolate(
        to_tensor(image)[None], (int(25 * severity), int(20 * severity)), mode="bilinear", antialias=True
    )
    for kind, amount, expected in (
        ("jpeg", 10 * severity, to_tensor(Image.open(file))),
        ("blur", 0.02 * severity, to_tensor(blurred)),
        ("downscale", 20 * severity, small[0]),
    ):
        assert torch.equal(degrade_image(to_tensor(image), kind, amount, "key"), expected)
