"""Prints step time and traffic for 8 to 4,096 GPUs, as modelled by `mmrl plan`.

    python tests/benchmarks/plan.py

The formulas and their constants are at the head of mmrl/train/plan.py, and are printed below the table. Nothing here
was measured on a GPU.
"""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from mmrl.config import load_config
from mmrl.model import footprint
from mmrl.train import plan

RECIPE = Path(__file__).parents[2] / "configs" / "vit_b32_512_to_64.yaml"
# Tower and dims: an L/14's embedding is 768 wide.
TOWERS = {"ViT-B-32": [512, 256, 128, 64], "ViT-L-14": [768, 512, 256, 128, 64]}
BATCHES = 32_768, 131_072, 1_048_576
GPUS = 8, 64, 512, 4096
MEMORY_GB = 80.0


def main() -> None:
    """Prints the table, in Markdown."""
    print(
        "| towers | global batch | GPUs | stage | micro-batch × passes | GB per GPU | sent per step | step | pairs/s |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for name, dims in TOWERS.items():
        overrides = [f"model.name={name}", f"nesting.dims={dims}", "engine.precision=bf16", "evaluation={}"]
        measured = footprint.measure(load_config(RECIPE, overrides).model, in_16_bits=True)
        for batch in BATCHES:
            config = load_config(RECIPE, [*overrides, f"train.batch_size={batch}"])
            for gpus in GPUS:
                result = plan.plan_resources(config, gpus, MEMORY_GB, measured=measured)
                if result.best is None:
                    print(f"| {name} | {batch:,} | {gpus:,} | – | does not fit | | | | |")
                    continue
                fit = result.stages[result.best]
                assert fit.micro_batch is not None
                print(
                    f"| {name} | {batch:,} | {gpus:,} | {fit.zero_stage} | {fit.micro_batch:,} × "
                    f"{result.pairs_per_gpu // fit.micro_batch} | {fit.total_gb:.1f} | {fit.traffic_gb:.2f} GB | "
                    f"{fit.step_seconds:.2f} s | {batch / fit.step_seconds:,.0f} |"
                )
    print(f"\n{plan.__doc__}")


if __name__ == "__main__":
    main()
