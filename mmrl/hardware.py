"""What GPUs can do by their data sheets, and bfloat16 support of devices."""

import re
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Gpu:
    """A GPU by NVIDIA's data sheet of that name; nothing here is measured."""

    in_name: str
    """Part of its name in CUDA."""
    tflops_16: float
    """Peak of dense 16-bit matrix products with float32 accumulation, TFLOP/s."""
    tflops_32: float
    """Peak of float32, TFLOP/s."""
    memory_gb: float
    memory_gb_s: float
    """Memory bandwidth, GB/s."""
    link_gb_s: float
    """GB/s per direction to the other GPUs of its host: NVLink, or else PCIe."""
    has_bfloat16: bool = True


# The first one whose `in_name` is part of a device's name is that device.
GPUS = {
    "h100-pcie": Gpu("H100 PCIe", 756, 51, 80, 2000, 64),
    "h100-nvl": Gpu("H100 NVL", 835, 60, 94, 3900, 300),
    "h100": Gpu("H100", 989, 67, 80, 3350, 450),
    "h200": Gpu("H200", 989, 67, 141, 4800, 450),
    "a100-40gb": Gpu("A100-SXM4-40GB", 312, 19.5, 40, 1555, 300),
    "a100": Gpu("A100", 312, 19.5, 80, 2039, 300),
    "l40s": Gpu("L40S", 362, 91.6, 48, 864, 32),
    "a10": Gpu("A10", 125, 31.2, 24, 600, 32),
    "l4": Gpu("L4", 121, 30.3, 24, 300, 32),
    "v100": Gpu("V100-SXM2", 125, 15.7, 32, 900, 150, has_bfloat16=False),
    "v100-pcie": Gpu("V100-PCIE", 112, 14, 32, 900, 16, has_bfloat16=False),
    "t4": Gpu("T4", 65, 8.1, 16, 320, 16, has_bfloat16=False),
}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """The device's peak FLOP/s in bf16 or fp16; None if unknown.

    None for fp32, whose peak depends on whether TF32 is allowed, and for a MIG slice, which has a fraction of its
    GPU's peak.
    """
    if device.type != "cuda" or precision not in ("bf16", "fp16"):
        return None
    name = torch.cuda.get_device_name(device)
    if " MIG " in name:
        return None
    # Not followed by a letter or digit: an A10G is not an A10, nor an L40 an L4.
    found = next((gpu for gpu in GPUS.values() if re.search(rf"\b{gpu.in_name}(?![0-9A-Za-z])", name)), None)
    return None if found is None else found.tflops_16 * 1e12


def reads_at_once(x: torch.Tensor) -> bool:
    """Whether the host reads the values of x without waiting for a device that is still computing them."""
    return x.device.type == "cpu"


def has_native_bfloat16(device: torch.device) -> bool:
    """Whether the device has bfloat16 matrix instructions. Without them a bfloat16 product takes 5 to 30 times as long
    as a float32 one on a CPU, and is no faster on a GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return True
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # missing in older torch
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
