"""Zero-shot classification sets of drawings, labelled with their colour."""

from pathlib import Path

from conftest import drawing, encoded, write_tar

CLASSES = ["red", "green", "blue", "grey"]
NAMES, TEMPLATES = "classnames.txt", "zeroshot_classification_templates.txt"


def labelled_members(number: int, label: str) -> list[tuple[str, bytes]]:
    """The members of one sample with this text as its label."""
    return [(f"s{number:04}.png", encoded(drawing(number)[0])), (f"s{number:04}.cls", label.encode())]


def write_labelled(folder: Path) -> Path:
    """A classification set of CLIP_benchmark's form: two shards of 20 samples in test/, names and templates."""
    for shard in range(2):
        members = [m for n in range(20) for m in labelled_members(20 * shard + n, str(n % 4))]
        write_tar(folder / "test" / f"{shard}.tar", members)
    (folder / "test" / "nshards.txt").write_text("2")
    (folder / NAMES).write_text("\n".join(CLASSES))
    (folder / TEMPLATES).write_text("a {c} thing\n{c}, seen from afar\n")
    return folder
