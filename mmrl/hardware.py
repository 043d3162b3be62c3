"""Peak FLOP/s and bfloat16 support of devices."""

import torch

# Dense 16-bit matrix products with float32 accumulation, TFLOP/s, from NVIDIA's data sheets. The key is a substring of
# the CUDA device name; the first match counts.
_PEAK_TFLOPS_16 = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H200": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "V100-SXM": 125.0,
    "V100-PCIE": 112.0,
    "T4": 65.0,
}
H100_TFLOPS_16 = _PEAK_TFLOPS_16["H100"]


def peak_flops(device: torch.device, precision: str) -> float | None:
    """The device's peak FLOP/s in bf16 or fp16; None if unknown.

    None for fp32, whose peak depends on whether TF32 is allowed, and for a MIG slice, which has a fraction of its
    GPU's peak.
    """
    if device.type != "cuda" or precision not in ("bf16", "fp16"):
        return None
    name = torch.cuda.get_device_name(device)
    found = next((peak for part, peak in _PEAK_TFLOPS_16.items() if part in name.split(" MIG")[0]), None)
    return None if found is None or " MIG " in name else found * 1e12


def has_native_bfloat16(device: torch.device) -> bool:
    """Whether the device has bfloat16 matrix instructions. Without them a bfloat16 product takes 5 to 30 times as long
    as a float32 one on a CPU, and is no faster on a GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return True
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # missing in older torch
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
