"""`bundle`: mmrl's own format, for mmrl.load; see mmrl/model/bundle.py."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from mmrl.export.contract import Reopened
from mmrl.export.formats.base import Format, Truncated
from mmrl.images.upright import upright
from mmrl.model import bundle
from mmrl.version import __version__


def _write(truncated: Truncated, folder: Path, variants: Sequence[str]) -> None:
    shutil.copytree(truncated.folder, folder, dirs_exist_ok=True)


def _reopen(folder: Path, variant: str | None) -> Reopened:
    opened = bundle.load(folder)
    model, spec = opened.model, opened.image_spec
    return Reopened.of_torch(
        f"mmrl {__version__}",
        model.encode_image,
        model.encode_text,
        normalise=lambda pixels_BCHW: pixels_BCHW,  # the model normalises them itself
        prepare=lambda image: spec.pixels(upright(image)),
        tokenise=opened.tokenise,
    )


FORMAT = Format(
    name="bundle", one_tower=True, check=lambda _: None, write=_write, reopen=_reopen, tolerance=1e-6, library="mmrl"
)
