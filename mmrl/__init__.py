"""mmrl: train, evaluate and export CLIP-style image-text encoders with nested (Matryoshka) embeddings.

The public names are imported on first use, so that ``import mmrl`` loads neither torch nor deepspeed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mmrl.version import __version__

if TYPE_CHECKING:
    from mmrl.data.stream import stream as stream
    from mmrl.evaluate.ranking.retrieval import retrieval as retrieval
    from mmrl.images.image_spec import ImageSpec as ImageSpec
    from mmrl.inference.load import load as load
    from mmrl.losses.nested_infonce import nested_info_nce as nested_info_nce
    from mmrl.losses.rotated import rotated_nested_info_nce as rotated_nested_info_nce
    from mmrl.model.rotation import NestedRotation as NestedRotation

_MODULE_OF = {
    "ImageSpec": "mmrl.images.image_spec",
    "NestedRotation": "mmrl.model.rotation",
    "load": "mmrl.inference.load",
    "nested_info_nce": "mmrl.losses.nested_infonce",
    "retrieval": "mmrl.evaluate.ranking.retrieval",
    "rotated_nested_info_nce": "mmrl.losses.rotated",
    "stream": "mmrl.data.stream",
}

__all__ = [
    "ImageSpec",
    "NestedRotation",
    "__version__",
    "load",
    "nested_info_nce",
    "retrieval",
    "rotated_nested_info_nce",
    "stream",
]


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(import_module(_MODULE_OF[name]), name)
    raise AttributeError(f"module 'mmrl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
