"""Optional dependencies: which extra of mmrl-clip installs a package."""

from importlib.util import find_spec

from mmrl.errors import InputError

_EXTRA_OF = {
    "onnx": "export",
    "onnxscript": "export",
    "onnxruntime": "export",
    "openvino": "openvino",
    "sentence_transformers": "sentence-transformers",
}


def require_packages(*modules: str) -> None:
    """Raises InputError, with the pip command, if one of these modules is not installed."""
    for module in modules:
        if find_spec(module) is None:
            name = module.replace("_", "-")
            raise InputError(f"{name} is not installed; pip install 'mmrl-clip[{_EXTRA_OF[module]}]'")
