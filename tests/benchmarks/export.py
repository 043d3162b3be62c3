"""Latency of exported ONNX graphs compared with torch:

    python tests/benchmarks/export.py [--model open_clip:ViT-B-32] [--dim 128] [--rounds 15] [--folder DIR]

Exports MODEL once with all variants (into DIR, which is reused), then times one image and one text through torch eager
and through onnxruntime, on one thread each, in rounds within one process. Each row shows its median and the median of
its per-round ratios to torch. Times are CPU time of the process, which other processes hardly change; wall time is
shown next to it. At the end: a new process from its start to the first vector.

The weights of `open_clip:NAME` are random: fine for latency, meaningless for the recall of int8.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from mmrl.export import bundles
from mmrl.inference.standalone import Encoder
from mmrl.model import bundle
from mmrl.nesting import truncate

_FIRST = """
import time
began = time.perf_counter()
import sys, mmrl
encoder = mmrl.load(sys.argv[1], towers=sys.argv[2], variant="fp32")
encoder.encode_texts(["red running shoes"]) if sys.argv[2] == "text" else encoder.encode_images([sys.argv[3]])
print(time.perf_counter() - began, time.process_time())
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="open_clip:ViT-B-32")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept = options.folder or Path(tempfile.mkdtemp(prefix="mmrl-export-"))
    folder = kept / f"{options.model.replace(':', '-').replace('/', '-')}-{options.dim}"
    if not folder.exists():
        bundles.export(options.model, folder, [options.dim], "onnx", quantize=["fp16", "int8"])
    loaded = bundle.open_model(options.model)
    spec = loaded.image_spec
    pixels = torch.randint(0, 256, (1, 3, spec.height, spec.width), dtype=torch.uint8)
    graphs = {name: Encoder(folder, variant=name, threads=1) for name in ("fp32", "fp16", "int8")}
    short = ["red running shoes"]
    full = loaded.tokenise(short)
    print(f"{options.model}, {options.dim}-d, one thread, {torch.__version__}; load {os.getloadavg()[0]:.1f}")

    @torch.inference_mode()
    def image() -> object:
        return truncate(loaded.model.encode_image(pixels), options.dim).numpy()

    @torch.inference_mode()
    def text() -> object:
        return truncate(loaded.model.encode_text(full), options.dim).numpy()

    few = graphs["fp32"].tokenise(short)
    length = loaded.tokenise.context_length
    compare("one image", {"torch": image, **_of(graphs, "encode_pixels", pixels.numpy())}, options.rounds)
    compare(f"one text, {length} tokens", {"torch": text, **_of(graphs, "encode_tokens", full.numpy())}, options.rounds)
    compare(
        f"one text, its {few.shape[1]} tokens", {"torch": text, **_of(graphs, "encode_tokens", few)}, options.rounds
    )
    first_vector(folder, spec.height)


def _of(graphs: dict[str, Encoder], call: str, inputs: np.ndarray) -> dict[str, Callable[[], object]]:
    return {f"ONNX {name}": lambda one=one: getattr(one, call)(inputs) for name, one in graphs.items()}


def compare(title: str, rows: dict[str, Callable[[], object]], rounds: int) -> None:
    """Time the rows in rounds of alternating order; print them with their ratios to torch and to ONNX fp32."""
    cpu: dict[str, list[float]] = defaultdict(list)
    wall: dict[str, list[float]] = defaultdict(list)
    for call in rows.values():
        call()
    for number in range(rounds):
        for name in list(rows)[:: 1 if number % 2 else -1]:
            began, used = time.perf_counter(), time.process_time()
            rows[name]()
            cpu[name].append(time.process_time() - used)
            wall[name].append(time.perf_counter() - began)
    print(f"\n{title:<28}   ms   wall ms   x torch   x ONNX fp32")
    for name in rows:
        ratios = [
            statistics.median(a / b for a, b in zip(cpu[base], cpu[name], strict=True))
            for base in ("torch", "ONNX fp32")
        ]
        ms, wall_ms = (1000 * statistics.median(times[name]) for times in (cpu, wall))
        print(f"  {name:<26} {ms:6.1f} {wall_ms:7.1f} {ratios[0]:9.2f} {ratios[1]:9.2f}")


def first_vector(folder: Path, side: int) -> None:
    """Print the time of a new process from its start to the first vector of one tower, the best of three."""
    from PIL import Image

    image = folder.parent / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)).save(image)
    print("\nload to first vector, s       wall             CPU")
    for tower in ("text", "image"):
        command = [sys.executable, "-c", _FIRST, str(folder), tower, str(image)]
        runs = [subprocess.run(command, check=True, capture_output=True, text=True).stdout.split() for _ in range(3)]
        wall, cpu = (min(float(run[clock]) for run in runs) for clock in (0, 1))
        print(f"  {tower:<26} {wall:6.2f} {cpu:12.2f}")


if __name__ == "__main__":
    main()
