"""Which encoder an index was built with: its path and the hash of its original weights."""

import hashlib
from pathlib import Path

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
        manifest = bundle.read_manifest(source.folder)
        return str(Path(model).absolute()), source.folder, bundle.origin(manifest)
    digest = hashlib.sha256()
    for name, tensor in sorted(bundle.open_model(source).state().items()):
        digest.update(name.encode())
        digest.update(tensor.float().numpy().tobytes())
    return str(model), model, digest.hexdigest()
