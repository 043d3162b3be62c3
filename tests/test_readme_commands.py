"""The commands and the Python of README.md, executed as they are written, in their order.

What differs from what a user does: a name that a hub would resolve is replaced by a local file, and trainings are
short. Not run are the two make targets (CI runs one of them, the quickstart trains for minutes) and the fine-tuning of
ViT-B/32, which train/test_shipped_configs.py runs.
"""

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from mmrl import cli
from mmrl.data.sources import open_reader
from mmrl.data.starter import shards

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^    ((?:mmrl|make) [^\n#]*?)(?:  +#.*)?$", README, re.M)
IMAGES = 650  # mmrl rotate wants as many as ViT-B/32 has dims
HUB = "open_clip:ViT-B-32:laion2b_s34b_b79k"


def test_the_commands_are_found() -> None:
    names = [shlex.split(command)[1] for command in COMMANDS]
    assert names == [
        "quickstart", "test", "train", "eval", "export", "pack", "check", "train", "rotate", "export", "train",
    ]  # fmt: skip


def _write_photos(folder: Path) -> None:
    """Images with a caption beside each, of the starter data."""
    folder.mkdir()
    reader = open_reader([str(path) for path in shards("train")])
    for row in range(0, len(reader), len(reader) // IMAGES):
        sample = reader.read(row)
        (folder / f"{row}.webp").write_bytes(sample.image)
        (folder / f"{row}.txt").write_text(sample.captions[0])


@pytest.mark.slow
def test_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import open_clip

    monkeypatch.chdir(tmp_path)
    _write_photos(tmp_path / "photos")
    torch.manual_seed(0)
    torch.save(open_clip.create_model("ViT-B-32").state_dict(), "weights.pt")
    for command in COMMANDS:
        arguments = shlex.split(command)
        if arguments[0] == "make" or "configs/finetune_512_128.yaml" in arguments:
            continue
        arguments = ["open_clip:ViT-B-32:weights.pt" if one == HUB else one for one in arguments]
        if arguments[1] == "train":
            arguments.append("train.duration=2 epochs")
        if arguments[1] == "rotate":  # random weights gain nothing on held-out images, which ends the command with 1
            arguments = [*arguments[: arguments.index("--validate")], "--steps", "10", "--dims", "256,128"]
        if arguments[1] == "export":
            for out in Path.cwd().glob("encoders"):  # the second of README's two examples
                out.rename("first")
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code, command
    for number, name in enumerate(("a.jpg", "b.jpg")):
        from PIL import Image

        Image.open(sorted(Path("photos").glob("*.webp"))[number]).convert("RGB").save(name)
    (tmp_path / "encoders").rename("second")
    (tmp_path / "first").rename("encoders")
    (block,) = re.findall(r"```python\n(.*?)```", README, re.S)
    exec(block, {})  # noqa: S102 (our own README)
