"""Checks of a run's config and data that need no process of their own."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmrl.config import Config, load_config
from mmrl.data.order import SourceShare
from mmrl.errors import InputError
from mmrl.train import preflight
from mmrl.train.preflight import _check_cache_size


def remote_set(shards: int, gigabytes: float) -> Any:
    """What the check reads of a set of remote shards of this size with 10,000 samples each."""
    sizes = [int(gigabytes * 1e9)] * shards
    return SimpleNamespace(is_remote=True, shares=[SourceShare([10_000] * shards)], shard_bytes=lambda: sizes)


def config(gigabytes: float) -> Config:
    return load_config(Path("configs/quickstart.yaml"), [f"data.remote.gigabytes={gigabytes}", "train.batch_size=4096"])


def test_a_cache_too_small_for_the_lanes_of_a_host_is_refused() -> None:
    few, many = remote_set(50, 1), remote_set(1000, 1)
    _check_cache_size(config(51), few, share_of_host=1)  # holds the whole set
    _check_cache_size(config(130), many, share_of_host=1)
    _check_cache_size(config(40), many, share_of_host=1 / 4)
    with pytest.raises(InputError, match=r"100 GB are too few .* \(64 lanes, each with 2 shards .* at least 128,"):
        _check_cache_size(config(100), many, share_of_host=1)
    many.is_remote = False
    _check_cache_size(config(100), many, share_of_host=1)


def test_kernels_that_fail_on_a_gpu_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "triton_problem", lambda _: "Failed to find C compiler")
    gpu, quickstart = torch.device("cuda"), config(51)
    assert preflight._kernels_note(quickstart, torch.device("cpu")) is None
    note = preflight._kernels_note(quickstart, gpu)
    assert note is not None
    assert note.endswith("by PyTorch operations, as its Triton kernels fail: Failed to find C compiler")
    monkeypatch.setattr(preflight, "triton_problem", lambda _: None)
    assert preflight._kernels_note(quickstart, gpu) is None
