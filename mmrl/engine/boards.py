"""Where a run's curves and pictures are shown, behind one interface: TensorBoard and Weights & Biases, both extras."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import yaml
from PIL import Image

from mmrl.errors import InputError
from mmrl.output.files import write_atomic

_PROJECT = "mmrl"


class Board(Protocol):
    """A tool that shows them."""

    name: str
    """For messages."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Adds a point to each curve."""

    def recall_by_dim(self, title: str, steps: Sequence[int], curves: Mapping[str, Sequence[float]]) -> None:
        """Shows one score at every dim over steps in one chart; `curves` maps the tag of each dim's score to its
        values."""

    def picture(self, tag: str, picture: Image.Image, step: int) -> None:
        """Shows a picture."""

    def close(self) -> None:
        """Writes what is left."""


class TensorBoard:
    """Event files in RUN/tensorboard."""

    name = "TensorBoard"

    def __init__(self, run: Path, start: int) -> None:
        """Points after step `start` of an earlier start are hidden; raises InputError if TensorBoard is missing."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise InputError(
                "tracking.tensorboard: TensorBoard is not installed; run pip install 'mmrl-clip[tensorboard]'."
            ) from None
        self._writer, self._charts = SummaryWriter(str(run / "tensorboard"), purge_step=start + 1), {}

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    def recall_by_dim(self, title: str, steps: Sequence[int], curves: Mapping[str, Sequence[float]]) -> None:
        """In the tab "Custom scalars", which draws curves that are there already together."""
        if title not in self._charts:
            self._charts[title] = ["Multiline", list(curves)]
            self._writer.add_custom_scalars({"Recall by dim": self._charts})

    def picture(self, tag: str, picture: Image.Image, step: int) -> None:
        self._writer.add_image(tag, np.asarray(picture), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A run of Weights & Biases. With WANDB_MODE=offline its files stay in RUN/wandb, for `wandb sync`."""

    name = "Weights & Biases"

    def __init__(self, run: Path, project: str | bool) -> None:
        """Creates the run, or continues that of an earlier start of the same folder.

        Raises:
            InputError: wandb is not installed, or cannot log in.
        """
        try:
            import wandb
        except ImportError:
            raise InputError("tracking.wandb: wandb is not installed; run pip install 'mmrl-clip[wandb]'.") from None
        self._wandb, stored, config = wandb, run / "wandb" / "id.txt", run / "config.yaml"
        try:
            self._run = wandb.init(
                project=_PROJECT if project is True else str(project),
                name=run.name,
                dir=str(run),
                id=stored.read_text().strip() if stored.exists() else None,
                resume="allow" if stored.exists() else None,
                config=yaml.safe_load(config.read_text()) if config.exists() else None,
                settings=wandb.Settings(silent=True, console="off", disable_git=True, save_code=False),
            )
        except wandb.Error as error:
            raise InputError(
                f"tracking.wandb: the run cannot be created ({error}); run wandb login, or set WANDB_MODE=offline."
            ) from None
        write_atomic(stored, self._run.id + "\n")
        # Not wandb's own step, which may not go back: a run that resumes logs the steps after its checkpoint again.
        self._run.define_metric("*", step_metric="step")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({"step": step, **values})

    def recall_by_dim(self, title: str, steps: Sequence[int], curves: Mapping[str, Sequence[float]]) -> None:
        keys = [tag.rpartition("/")[2] for tag in curves]
        chart = self._wandb.plot.line_series([*steps], [[*one] for one in curves.values()], keys, title, "step")
        self._run.log({title: chart, "step": steps[-1]})

    def picture(self, tag: str, picture: Image.Image, step: int) -> None:
        self._run.log({tag: self._wandb.Image(picture), "step": step})

    def close(self) -> None:
        self._run.finish()
