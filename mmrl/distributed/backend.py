"""GPU or CPU: refuses a host whose GPUs cannot be used, and lets all processes agree before they form a group.

Without this, a host with a wrong driver would train on its CPU without a word, or wait for the others' NCCL forever.
"""

import contextlib
import glob
import os
from collections.abc import Mapping
from datetime import timedelta

import torch
from torch._C._distributed_c10d import Store

from mmrl.errors import InputError

_NO_GPUS = ("", "-1", "NoDevFiles")
"""Values of CUDA_VISIBLE_DEVICES that hide all GPUs."""
_SECONDS_TO_READ = 30


def uses_gpu(environ: Mapping[str, str] = os.environ, devices: str = "/dev/nvidia[0-9]*") -> bool:
    """Whether this process trains on a GPU.

    Raises:
        InputError: this host has GPUs, but torch cannot use any of them.
    """
    if torch.cuda.is_available():
        return True
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in _NO_GPUS:
        return False
    files = sorted(glob.glob(devices))  # noqa: PTH207 (a pattern with a folder)
    # DeepSpeed's launcher sets CUDA_VISIBLE_DEVICES on CPU hosts too; CROSS_RANK is its own variable.
    is_promised = visible is not None and "CROSS_RANK" not in environ
    if not files and not is_promised:
        return False
    reason = "torch finds none"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
    found = f"has {files[0]}" if files else f"has CUDA_VISIBLE_DEVICES={visible}"
    raise InputError(
        f"GPU: this host {found}, but torch {torch.__version__} cannot use a GPU ({reason}); install a fitting NVIDIA "
        "driver and torch (in a container: docker run --gpus all), or train on the CPU with CUDA_VISIBLE_DEVICES=-1."
    )


def agree(store: Store, rank: int, size: int, on_gpu: bool, problem: str | None, host: str) -> None:
    """Stops all processes if one has a problem, or if only some have a GPU. Called by every process.

    Raises:
        InputError: on rank 0; other ranks exit with code 2.
    """
    if problem:
        store.set("mmrl/problem", f"Host {host}: {problem}")
    if not on_gpu:
        store.set("mmrl/host without a GPU", host)
    store.add("mmrl/gpus", int(on_gpu))
    if store.add("mmrl/joined", 1) == size:
        store.set("mmrl/decision", _decision(store, size))
    sentence = store.get("mmrl/decision").decode()
    if not sentence:
        return
    if rank:
        if store.add("mmrl/read", 1) == size - 1:
            store.set("mmrl/all have read", "")
        raise SystemExit(2)
    with contextlib.suppress(RuntimeError):  # rank 0 may hold the store, so it waits for the others
        store.wait(["mmrl/all have read"], timedelta(seconds=_SECONDS_TO_READ))
    raise InputError(sentence)


def _decision(store: Store, size: int) -> str:
    if store.check(["mmrl/problem"]):
        return store.get("mmrl/problem").decode()
    gpus = store.add("mmrl/gpus", 0)
    if 0 < gpus < size:
        host = store.get("mmrl/host without a GPU").decode()
        return (
            f"GPU: {gpus} of {size} processes have a GPU, but not those on host {host}; start processes on GPU hosts "
            "only, or set CUDA_VISIBLE_DEVICES=-1 for all of them."
        )
    return ""
