"""Averages gradients over ranks while the backward pass still computes others."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist

from mmrl.distributed import comm


@dataclass
class _Bucket:
    """Parameters whose gradients are reduced together."""

    parameters: list[torch.nn.Parameter]
    ready: set[torch.nn.Parameter] = field(default_factory=set)
    is_stale: bool = False
    """A gradient has changed since the reduction began."""
    flat: torch.Tensor | None = None
    work: dist.Work | None = None


class GradientReducer:
    """Reduces gradients in buckets: each as soon as the backward pass has computed all of its gradients.

    Backward passes outside of `start` … `finish` only accumulate, such as those of all micro-batches but the last.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], bucket_elements: int) -> None:
        """`parameters` in the order of the forward pass; their gradients come in about the reverse order."""
        self._buckets: list[_Bucket] = []
        size = bucket_elements
        for parameter in reversed(list(parameters)):
            if size + parameter.numel() > bucket_elements or self._buckets[-1].parameters[0].dtype != parameter.dtype:
                self._buckets.append(_Bucket([]))
                size = 0
            size += parameter.numel()
            self._buckets[-1].parameters.append(parameter)
            parameter.register_post_accumulate_grad_hook(partial(self._computed, self._buckets[-1]))
        self._started = False
        self._launched = 0

    def start(self) -> None:
        """Called before the last backward pass of a step."""
        self._started, self._launched = True, 0
        for bucket in self._buckets:
            bucket.ready, bucket.is_stale = set(), False

    def finish(self) -> None:
        """Called after the last backward pass: the gradients are then the averages over ranks. Collective."""
        self._started = False
        for bucket in self._buckets[self._launched :]:  # with parameters that the loss does not depend on
            _launch(bucket)
        for bucket in self._buckets:
            if bucket.is_stale:
                _wait(bucket)
                _launch(bucket)
            flat = _wait(bucket).div_(comm.world().size)
            parts = flat.split([parameter.numel() for parameter in bucket.parameters])
            for parameter, part in zip(bucket.parameters, parts, strict=True):
                parameter.grad = part.view_as(parameter)  # not copied: the local gradients are freed

    def _computed(self, bucket: _Bucket, parameter: torch.nn.Parameter) -> None:
        if not self._started:
            return
        # Reentrant checkpointing may compute a gradient in several parts.
        bucket.is_stale |= bucket.work is not None
        bucket.ready.add(parameter)
        # In the order of the buckets, so that all ranks reduce the same one at a time.
        for following in self._buckets[self._launched :]:
            if len(following.ready) < len(following.parameters):
                break
            _launch(following)
            self._launched += 1


def _launch(bucket: _Bucket) -> None:
    with torch.no_grad():
        for parameter in bucket.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        bucket.flat = torch.cat([p.grad.flatten() for p in bucket.parameters if p.grad is not None])
    bucket.work = dist.all_reduce(bucket.flat, async_op=True)


def _wait(bucket: _Bucket) -> torch.Tensor:
    """The sums; on a GPU its stream waits for them, not the host."""
    assert bucket.work is not None
    assert bucket.flat is not None
    bucket.work.wait()
    flat, bucket.work, bucket.flat = bucket.flat, None, None
    return flat
