"""Which encoder an index was built with: its path and the hash of its original weights."""

import hashlib
import json
from pathlib import Path

from mmrl.errors import InputError
from mmrl.model import bundle
from mmrl.model.source import StoredModel, parse_model


def identify_encoder(model: str | Path) -> tuple[str, str | Path, str]:
    """The name of MODEL to store in an index, the path for `mmrl.load`, and the SHA-256 of its original weights.

    The hash detects that a run folder's best checkpoint has changed. Encoders truncated from one checkpoint share its
    hash: their embeddings agree, so an index of 512-d vectors accepts queries from the 128-d export.

    Raises:
        InputError: there is no such encoder.
    """
    source = parse_model(model)
    if isinstance(source, StoredModel):
        return str(Path(model).absolute()), source.folder, _origin(source.folder)
    digest = hashlib.sha256()
    for name, tensor in sorted(bundle.open_model(source).state().items()):
        digest.update(name.encode())
        digest.update(tensor.float().numpy().tobytes())
    return str(model), model, digest.hexdigest()


def _origin(folder: Path) -> str:
    """`bundle.origin` of an exported encoder of any format."""
    try:
        return bundle.origin(json.loads((folder / bundle.MANIFEST).read_text()))
    except (ValueError, KeyError, TypeError):
        bundle.read_manifest(folder)  # raises a more precise error in most cases
        raise InputError(
            f"{folder / bundle.MANIFEST} does not name the weights that it is of; export the encoder again."
        ) from None
