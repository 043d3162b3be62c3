"""`sentence_transformers`: the folder of `transformers` and the config file of SentenceTransformer."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mmrl.export.contract import Reopened
from mmrl.export.formats import transformers
from mmrl.export.formats.base import Format, Truncated


def _write(truncated: Truncated, folder: Path, variants: Sequence[str]) -> None:
    transformers.write(truncated, folder, variants)
    settings = {
        "model_type": "SentenceTransformer",
        "prompts": {},
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
        "truncate_dim": None,
    }
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings, indent=2) + "\n")


def _reopen(folder: Path, variant: str | None) -> Reopened:
    import sentence_transformers

    model = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    inner = transformers.FORMAT.reopen(folder, None)

    def encode(inputs: list[Any]) -> np.ndarray:
        return model.encode(inputs, normalize_embeddings=True, show_progress_bar=False)

    def images(images: list[Image.Image]) -> np.ndarray:
        return encode(images)

    def pixels(pixels_BCHW: torch.Tensor) -> np.ndarray:
        return inner.pixels(pixels_BCHW)

    return Reopened(f"sentence-transformers {sentence_transformers.__version__}", pixels, inner.tokens, images, encode)


FORMAT = Format(
    name="sentence_transformers",
    check=lambda full: transformers.check_architecture(full, "sentence_transformers"),
    write=_write,
    reopen=_reopen,
    tolerance=1e-5,
    usage="""```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("FOLDER")  # truncate_dim=64 for 64-d embeddings
vectors = model.encode(["a red shoe"], normalize_embeddings=True)  # Pillow images work, too
```
""",
    library="sentence-transformers",
    needs=("sentence_transformers",),
)
