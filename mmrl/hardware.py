"""What the machine is good at."""

import torch

# Dense products of 16-bit numbers with sums in 32 bits, TFLOP/s, as NVIDIA's data sheets give them; found by a part of
# the name that CUDA gives, the first that fits.
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
    """Operations a second that a device is built for, where that is known: of a few GPUs, in bf16 and fp16. What
    float32's products reach depends on whether TF32 is allowed; a slice of a GPU (MIG) has a part of the whole's."""
    if device.type != "cuda" or precision not in ("bf16", "fp16"):
        return None
    name = torch.cuda.get_device_name(device)
    found = next((peak for part, peak in _PEAK_TFLOPS_16.items() if part in name.split(" MIG")[0]), None)
    return None if found is None or " MIG " in name else found * 1e12


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a device has bfloat16 products of its own. One without takes 5 to 30 times as long for them as for
    float32's, on a CPU, and gains nothing on a GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return True
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # older torch has none to tell
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
