"""Inputs for the tests of `mmrl pack`, and functions that read its output."""

import csv
import json
import os
import signal
import tarfile
from pathlib import Path
from typing import Any

from conftest import drawing, encoded

from mmrl.data.pack.pairs import safe_key
from mmrl.data.pack.writer import BAD_SAMPLES
from mmrl.output.files import LOCK

Rows = list[dict[str, Any]]


def put(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def members(out: Path) -> dict[str, bytes]:
    """All members of all shards, in order."""
    found = {}
    for shard in sorted(out.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                assert member.name not in found
                found[member.name] = file.read()
    return found


def bad_lines(out: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (out / BAD_SAMPLES).read_text().splitlines()]


def files(out: Path) -> dict[str, bytes]:
    """All files of a pack, by path, without the lock of one that was killed."""
    paths = [path for path in out.rglob("*") if path.is_file() and path.name != LOCK]
    return {str(path.relative_to(out)): path.read_bytes() for path in paths}


def write_csv(path: Path, rows: Rows, separator: str = ",") -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=separator)
        writer.writeheader()
        writer.writerows(rows)


def image_folder(folder: Path) -> dict[str, bytes]:
    """Writes six images with captions and groups in every supported form; returns key in the shards -> image bytes."""
    images = {}
    kinds = ["PNG", "JPEG", "WEBP", "JPEG", "PNG", "PNG"]
    names = ["a.png", "sub/b.JPG", "sub/deep er/c.v2.webp", "d.jpeg", "e.png", "f.png"]
    for number, (name, kind) in enumerate(zip(names, kinds, strict=True)):
        data = encoded(drawing(number)[0], kind)
        path = put(folder / name, data)
        images[safe_key(str(Path(name).with_suffix("")))] = data
        caption, group = drawing(number)[1:]
        if number < 4:
            put(path.with_suffix(".txt"), f" {caption}\n")
        if number in (2, 4):
            put(path.with_suffix(".json"), json.dumps({"captions": [caption, f"{caption}, é"], "group": group}))
        if number == 3:
            put(path.with_suffix(".json"), json.dumps({"group": 7, "licence": "mine"}))
    put(folder / "f.json", json.dumps({"caption": "in the format of img2dataset"}))
    put(folder / ".hidden.png", b"")
    return images


def end_by(how: str) -> str:
    """A worker function that ends its process for some items."""
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "exit":
        os._exit(3)
    return how
