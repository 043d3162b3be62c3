"""Every model config of the installed open_clip: planned, and the small ones trained for a step, stored and loaded."""

import open_clip
import pytest
import torch
import torch.nn.functional as F

from mmrl.errors import InputError
from mmrl.model import bundle, footprint, towers, two_tower
from mmrl.model.two_tower import LogitScaleConfig, ModelConfig

_SMALL = 110e6  # parameters; the step of a larger model is taken on fake tensors only
_FROM_THE_HUB = ("roberta", "mt5", "nllb")


@pytest.mark.slow
@pytest.mark.parametrize("name", open_clip.list_models())
def test_a_config_works_or_is_refused_in_one_sentence(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    if any(part in name for part in _FROM_THE_HUB):  # its text tower's config is there, and tests do not reach it
        with pytest.raises(InputError, match=r"^model\.name .*: the text tower cannot be built: .{20,450}$"):
            footprint.measure(ModelConfig(name=name), in_16_bits=True)
        return
    found = footprint.measure(ModelConfig(name=name), in_16_bits=True)  # forward and backward, without memory
    assert found.parameters > 1e6
    assert found.forward_flops_per_pair > 1e7
    assert found.activations_per_pair > 1e5
    if found.parameters > _SMALL:
        return
    torch.manual_seed(0)
    built = towers.build(ModelConfig(name=name))
    model = two_tower.from_towers(built, LogitScaleConfig(), 1).train()
    spec = built.image_spec
    pixels = torch.randint(0, 256, (2, 3, spec.height, spec.width), dtype=torch.uint8)
    tokens = torch.randint(1, 100, (2, built.model_cfg["text_cfg"].get("context_length", 77)))
    image_BD, text_BD, scale, _ = model(pixels, tokens)
    assert image_BD is not None
    assert text_BD is not None
    assert image_BD.shape == text_BD.shape == (2, built.embed_dim)
    F.cross_entropy(scale * F.normalize(image_BD) @ F.normalize(text_BD).T, torch.arange(2)).backward()
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    one = bundle.make_bundle(model.eval(), built, (built.embed_dim,))
    folder = tmp_path_factory.mktemp("bundle")
    bundle.save(one, folder, one.state(), {})
    with torch.no_grad():
        assert torch.equal(bundle.load(folder).model.encode_image(pixels), model.encode_image(pixels))
