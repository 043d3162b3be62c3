"""Counts the operations of a step for which the host waits for the device.

On a GPU PyTorch itself reports them. On a CPU nothing waits, so the operations that would wait on a GPU are counted:
reads of a tensor's values, results whose shape depends on values, and tensors made of Python numbers, which are copied
from memory that is not page-locked.
"""

import sys
import traceback
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_WAITING = {
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique_dim", "_unique", "_unique2",
    "unique_consecutive", "_linalg_check_errors", "lift_fresh", "_assert_async", "bincount",
}  # fmt: skip
_INDEXING = {"index", "index_put", "index_put_"}


@contextmanager
def host_syncs(device: torch.device, host_tensors: Collection[torch.Tensor] = ()) -> Iterator[list[str]]:
    """Collects "operation at file:line" of every wait inside this context.

    Args:
        host_tensors: tensors that a GPU run keeps on the CPU too, whose values may be read. Without effect on a GPU.
    """
    found: list[str] = []
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found += [f"{w.filename}:{w.lineno}" for w in caught if "synchronizing" in str(w.message)]
        return
    exempt = {tensor.untyped_storage().data_ptr() for tensor in host_tensors}
    with _Dispatched(found, exempt), _Called(found, exempt):
        yield found


def _add(found: list[str], name: str) -> None:
    frames = [f for f in traceback.extract_stack() if f.filename != __file__ and "/torch/" not in f.filename]
    found.append(f"{name} at {frames[-1].filename}:{frames[-1].lineno}")


class _Dispatched(TorchDispatchMode):
    """Sees every operator, also those inside PyTorch's own functions and in backward passes."""

    def __init__(self, found: list[str], exempt: set[int]) -> None:
        super().__init__()
        self._found, self._exempt = found, exempt

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        waits = name in _WAITING
        if name in _INDEXING:  # a mask selects a number of rows that only the device knows
            waits = any(index is not None and index.dtype == torch.bool for index in args[1])
        first = args[0] if args else None
        if waits and not (isinstance(first, torch.Tensor) and first.untyped_storage().data_ptr() in self._exempt):
            _add(self._found, name)
        return function(*args, **(kwargs or {}))


class _Called(TorchFunctionMode):
    """Sees the calls that dispatch no operator on a CPU."""

    def __init__(self, found: list[str], exempt: set[int]) -> None:
        super().__init__()
        self._found, self._exempt = found, exempt

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        moves = name == "to" and any(isinstance(x, torch.device | str) for x in (*args[1:], kwargs.get("device")))
        # Libraries move tensors to the device where they are, in case there are several.
        moves = moves and "/mmrl/" in sys._getframe(1).f_code.co_filename
        waits = name in ("tolist", "cpu", "numpy", "cuda") or moves
        if waits and not kwargs.get("non_blocking") and args[0].untyped_storage().data_ptr() not in self._exempt:
            _add(self._found, name)
        return function(*args, **kwargs)
