"""LoRA (arXiv 2106.09685): low-rank adapters on the linear layers in a tower's blocks, which train while the rest is
frozen. The adapters are peft's. Encoders never have them: `unload` and `merged_weights` make plain weights W + s B A.

nn.MultiheadAttention reads the weights of its layers itself. peft's wrapper of it writes merged weights into the module
for each forward pass and subtracts them afterwards, which changes frozen weights by rounding and replaces parameters
that ZeRO partitions. So attention is computed by two plain linear layers instead, until `unload`.

Shapes: B rows, L tokens, W the tower's width, H heads.
"""

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from mmrl.errors import InputError
from mmrl.model.depth import block_of
from mmrl.settings import Settings

_ADAPTER = "default"


class LoraConfig(Settings):
    """Low-rank adapters (LoRA, arXiv 2106.09685) on the linear layers of attention and MLP. They and the projections
    train; the rest of the tower is frozen. Checkpoints and exports hold merged weights. Requires the extra `lora`."""

    rank: int = Field(default=8, ge=1)
    """Rank of the change of each weight."""
    alpha: float = Field(default=16.0, gt=0)
    """The change is multiplied by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapters' inputs."""
    towers: Literal["both", "image", "text"] = "both"
    """Towers with adapters. The other one trains as usual, or as lock_* and train_last_blocks say."""


class _LinearAttention(nn.Module):
    """Self-attention with the parameters of an nn.MultiheadAttention, its projections being called as modules."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads, self.dropout = attention.num_heads, attention.dropout
        self.in_proj = _linear(attention.in_proj_weight, attention.in_proj_bias)
        self.out_proj = _linear(attention.out_proj.weight, attention.out_proj.bias)

    def forward(
        self,
        query_BLW: torch.Tensor,
        key_BLW: torch.Tensor,
        value_BLW: torch.Tensor,
        need_weights: bool = False,
        attn_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, None]:
        """As nn.MultiheadAttention with `batch_first`, for self-attention (three times the same input, which ZeRO stage
        3 hands over as three views) and an additive mask."""
        assert query_BLW.shape == key_BLW.shape == value_BLW.shape
        assert not need_weights
        if attn_mask is not None and attn_mask.dim() == 3:  # (B * H, L, L)
            attn_mask = attn_mask.unflatten(0, (-1, self.heads))
        q, k, v = self.in_proj(query_BLW).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out_BHLw = F.scaled_dot_product_attention(q, k, v, attn_mask, self.dropout if self.training else 0.0)
        return self.out_proj(out_BHLw.transpose(1, 2).flatten(2)), None

    def plain(self) -> nn.MultiheadAttention:
        """The nn.MultiheadAttention with these parameters."""
        width = self.out_proj.out_features
        attention = nn.MultiheadAttention(width, self.heads, self.dropout, batch_first=True, device="meta")
        attention.in_proj_weight = cast(nn.Parameter, self.in_proj.weight)
        attention.in_proj_bias = self.in_proj.bias
        attention.out_proj.weight, attention.out_proj.bias = self.out_proj.weight, self.out_proj.bias
        return attention.train(self.training)


def _linear(weight: torch.Tensor, bias: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight, linear.bias = cast(nn.Parameter, weight), cast(nn.Parameter, bias)
    return linear


def inject(tower: nn.Module, config: LoraConfig, side: str, run: Callable[[], object] | None = None) -> None:
    """Adds adapters to the linear layers in a tower's blocks.

    Args:
        run: a forward pass of the tower. Layers that it does not call get no adapters: some towers read their weights
            and compute the product elsewhere. None: all are called.

    Raises:
        InputError: peft is not installed; the tower has no such layers, as a ResNet.
    """
    if find_spec("peft") is None:
        raise InputError("model.lora: needs peft, which is not installed; run pip install 'mmrl-clip[lora]'.")
    import peft

    for name, module in [*tower.named_modules()]:
        if type(module) is nn.MultiheadAttention and block_of(name) and _is_plain(module):
            block = tower.get_submodule(name.rpartition(".")[0])
            if not hasattr(block, "ln_1_kv"):  # which open_clip's blocks have for cross-attention
                _replace(tower, name, _LinearAttention(module))
    linear = {name: m for name, m in tower.named_modules() if type(m) is nn.Linear and block_of(f"{name}.weight")}
    if run is not None:
        linear = _called(linear, run)
    if not linear:
        kind = type(getattr(tower, "trunk", tower)).__name__
        raise InputError(
            f"model.lora: the {side} tower, a {kind}, has no linear layers in blocks that are known by their names; "
            f"leave it out by model.lora.towers, and use model.train_last_blocks.{side} or model.lock_{side}."
        )
    options: dict[str, Any] = {"r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout}
    peft.inject_adapter_in_model(peft.LoraConfig(**options, target_modules=[*linear]), tower)


def _is_plain(module: nn.MultiheadAttention) -> bool:
    has_extras = module.bias_k is not None or module.bias_v is not None or module.add_zero_attn
    return module.batch_first and module._qkv_same_embed_dim and module.in_proj_bias is not None and not has_extras


def _called(modules: dict[str, nn.Linear], run: Callable[[], object]) -> dict[str, nn.Linear]:
    called: set[str] = set()
    hooks = [
        module.register_forward_hook(lambda *_, name=name: called.add(name))  # add returns None: no output is replaced
        for name, module in modules.items()
    ]
    run()
    for hook in hooks:
        hook.remove()
    return {name: module for name, module in modules.items() if name in called}


def adapters(model: nn.Module) -> dict[str, Any]:
    """peft's layers by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def is_adapter(name: str) -> bool:
    return ".lora_" in name


def merged_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, W + s B A) of each weight with an adapter, by its name in the model after `unload`."""
    for name, layer in adapters(model).items():
        parent, _, child = name.rpartition(".")
        is_in_proj = child == "in_proj" and isinstance(model.get_submodule(parent), _LinearAttention)
        merged = layer.base_layer.weight.detach() + layer.get_delta_weight(_ADAPTER).detach()
        yield (f"{name}_weight" if is_in_proj else f"{name}.weight"), merged


def unload(model: nn.Module) -> None:
    """Replaces adapters by plain layers with new weights, of the values before adaptation, and the biases they have."""
    for name, layer in adapters(model).items():
        base = cast(nn.Linear, layer.base_layer)
        base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)
        _replace(model, name, base)
    for name, module in [*model.named_modules()]:
        if isinstance(module, _LinearAttention):
            _replace(model, name, module.plain())


def _replace(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    root.get_submodule(parent).add_module(child, module)
