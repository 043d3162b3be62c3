"""What is learned for the smaller dims alone: the rotation Q and the smaller dims' logit scales.

They are kept outside of DeepSpeed, replicated in float32 on every rank, with their own Adam. ZeRO's gradient clipping
covers all parameters that DeepSpeed holds, so there a large gradient of Q would shrink the towers' update.

Shapes: D the embedding's width, K nested dims, k = K - 1 smaller dims.
"""

import torch
from torch import nn

from mmrl.distributed import comm
from mmrl.engine import optim
from mmrl.engine.optim import MovingAverage, OptimConfig
from mmrl.model.rotation import NestedRotation
from mmrl.model.two_tower import clamp_log_scale
from mmrl.nesting import Nesting


class Prefixes:
    """The rotation and the smaller dims' logit scales, their optimizer, and their moving average if there is one."""

    def __init__(
        self, nested: Nesting, log_scale_1: torch.Tensor, config: OptimConfig, ema: float | None, device: torch.device
    ) -> None:
        """Args:
        nested: the dims; the largest is the embedding's width.
        log_scale_1: the logarithm of the full dim's logit scale, where the others start.
        ema: decay of the moving average.
        """
        self._module = _PrefixModule(nested, log_scale_1.detach()).to(device)
        self._average = None if ema is None else MovingAverage(self._module, ema)
        scale_lr = config.lr if config.lr_logit_scale is None else config.lr_logit_scale
        groups = [
            {"params": list(self._module.rotation.parameters()), "lr": 0.0, "peak_lr": config.lr_rotation},
            {"params": [self._module.log_scale_k], "lr": 0.0, "peak_lr": scale_lr},
        ]
        self._optimizer = torch.optim.Adam(groups, betas=(config.betas[0], config.betas[1]), eps=config.eps, fused=True)

    @property
    def rotation(self) -> NestedRotation:
        """Q, as trained."""
        return self._module.rotation

    @property
    def logit_scale_k(self) -> torch.Tensor:
        """The logit scales of the smaller dims, in ascending order of the dims, with their gradient."""
        return clamp_log_scale(self._module.log_scale_k).exp()

    def folded(self, log_scale_1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What is folded into an encoder: Q, float64 (D, D) on the CPU, and the logarithms of all K logit scales. They
        are the moving averages if there are any.

        Args:
            log_scale_1: the logarithm of the full dim's logit scale.
        """
        module = self._module if self._average is None else self._average.module
        assert isinstance(module, _PrefixModule)
        log_scale_k = module.log_scale_k.detach()
        return module.rotation.matrix(), torch.cat([log_scale_k, log_scale_1.detach().to(log_scale_k.device)])

    def reduce(self) -> torch.Tensor:
        """Averages the gradients over ranks; returns their norm, (). Collective."""
        gradients = [p.grad for p in self._module.parameters() if p.grad is not None]
        assert gradients, "the loss of the smaller dims was not differentiated"
        mean = comm.all_reduce_sum(torch.cat([grad.flatten() for grad in gradients])) / comm.world().size
        for grad, flat in zip(gradients, mean.split([grad.numel() for grad in gradients]), strict=True):
            grad.copy_(flat.view_as(grad))
        return mean.norm()

    def step(self, lr_factor: float, skip: bool) -> None:
        """Updates and clears the gradients.

        Args:
            lr_factor: factor on the peak learning rates.
            skip: do not update, because the towers' update was skipped.
        """
        if not skip:
            optim.set_lr(self._optimizer, lr_factor)
            self._optimizer.step()
        if self._average is not None:  # as often as that of the towers
            self._average.update_parameters(self._module)
        self._optimizer.zero_grad()

    def state(self) -> dict[str, torch.Tensor]:
        """Parameters, their moving average and the optimizer's moments by name, on the CPU."""
        tensors = dict(self._module.state_dict())
        if self._average is not None:
            tensors |= {f"average/{name}": tensor for name, tensor in self._average.state_dict().items()}
        for name, parameter in self._module.named_parameters():
            moments = self._optimizer.state.get(parameter, {})
            tensors |= {f"{kind}/{name}": tensor for kind, tensor in moments.items()}
        return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Loads the result of `state`."""
        self._module.load_state_dict({name: tensors[name] for name in self._module.state_dict()})
        if self._average is not None:
            self._average.load_state_dict({name: tensors[f"average/{name}"] for name in self._average.state_dict()})
        for name, parameter in self._module.named_parameters():
            for kind in ("step", "exp_avg", "exp_avg_sq"):
                if f"{kind}/{name}" in tensors:
                    self._optimizer.state[parameter][kind] = tensors[f"{kind}/{name}"].to(parameter.device)


class _PrefixModule(nn.Module):
    def __init__(self, nested: Nesting, log_scale_1: torch.Tensor) -> None:
        super().__init__()
        self.rotation = NestedRotation(nested.dims[-1], nested.dims)
        self.log_scale_k = nn.Parameter(log_scale_1.repeat(len(nested.dims) - 1))
