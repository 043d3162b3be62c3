"""Whether the Triton kernels run on a device: compiles and runs them once, on 64 pairs."""

import functools

import torch

from mmrl.errors import InputError
from mmrl.losses import softmax
from mmrl.losses.backward import gradients
from mmrl.losses.sweep import LOG2_E, LogitMatrix, Targets, matmul_precision, split_into_blocks
from mmrl.nesting import Nesting

_PAIRS = 64


@functools.cache
def triton_problem(device: torch.device) -> str | None:
    """Why the kernels cannot be used on this device; None if they can. The first call takes seconds on a GPU."""
    try:
        from mmrl.losses import kernels
    except ImportError:
        return "the triton package is not installed"
    if not kernels.can_run_on(device):
        return "they need an NVIDIA GPU"
    try:
        with matmul_precision(torch.float32, device):
            found, expected = (_all_results(device, use_triton) for use_triton in (True, False))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    except Exception as error:  # of Triton, of the C compiler that it calls, or of the driver
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return None


def require_triton(device: torch.device) -> None:
    """Raise InputError if the kernels cannot be used on this device."""
    if problem := triton_problem(device):
        raise InputError(f"loss.kernels: triton cannot be used ({problem}); leave it at 'auto'.")


def _all_results(device: torch.device, use_triton: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    image_BD, text_BD = torch.randn(2, _PAIRS, 32, generator=generator).to(device).unbind()
    nested, shifts = Nesting.from_dims([16, 32], None, 32), [0.0, 0.0]
    rows, columns = (split_into_blocks(x, nested.dims) for x in (image_BD, text_BD))
    matrix = LogitMatrix(rows, columns, torch.full((2,), 10.0 * LOG2_E, device=device), 0)
    targets = Targets(torch.full((_PAIRS,), 2.0, device=device))
    sums = softmax.exp_sums(matrix, shifts, targets, distillation=True, use_triton=use_triton)
    lse = sums.row_Kn.log2(), sums.column_Km.log2()
    prob = softmax.SoftmaxProb(shifts, *lse, distillation=1.0)
    ones_K = torch.ones(2, device=device)
    found = gradients(matrix, prob, ones_K, targets, 32, 1.0, triton_lse=lse if use_triton else None)
    return vars(sums) | vars(found)
