"""`mmrl train --data` and `--val`: shards as they are; a folder of images or a table is packed on the way.

DIR/                RUN/shards, or that of --shards
    train/, val/    the shards
    packed.json     what they were packed from; a later start with the same source takes the shards as they are
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from mmrl.data.folder import is_image_folder
from mmrl.data.pack.command import open_pairs, pack_shards
from mmrl.data.pack.hub import pack_missing
from mmrl.data.pack.pairs import Columns
from mmrl.data.pack.tables import KINDS, parquet_files
from mmrl.data.shards import HUB
from mmrl.data.stores import is_remote
from mmrl.data.workers import usable_cores
from mmrl.distributed.launchers import detect_launch
from mmrl.errors import InputError
from mmrl.output.console import print_line
from mmrl.output.files import parse_json, write_atomic

_PACKED = "packed.json"
# The default hold-out: a tenth of the pairs, but at least 100 if these are not more than a fifth, and at most 5,000.
_SHARE, _FEWEST, _MOST_SHARE, _MOST = 10, 100, 5, 5_000
_FEWEST_PAIRS = 20


@dataclass(frozen=True)
class DataOptions:
    """What a user names as data, and how it is packed if it is a folder of images or a table."""

    data: str
    """Shards, a folder of images, or a table."""
    val: str | None = None
    """The same, for validation; None: the pairs that are held out, or the folder `val` next to a folder `train`."""
    shards: Path | None = None
    """Folder for the shards; None: RUN/shards."""
    holdout: str | None = None
    """Share or number of the pairs that are held out, as of `mmrl pack`."""
    image_column: str | None = None
    caption_columns: tuple[str, ...] = ()
    group_column: str | None = None


def needs_packing(data: str) -> bool:
    """Whether this is a folder of images or a table, not shards."""
    if data.startswith(("@", "starter:", HUB)) or is_remote(data):
        return False
    path = Path(data)
    return path.suffix.lower() in KINDS or is_image_folder(path) or bool(parquet_files(path))


def find_shards(options: DataOptions, run: str, max_side: int, console: Console) -> tuple[str, str | None]:
    """The shards to train on and those for validation, if there are any; packs what is not shards.

    Args:
        run: the run folder.
        max_side: pixels; larger images are shrunk to it.

    Raises:
        InputError: as `pack_shards`; --shards or --holdout for shards; shards that were packed from something else;
            several processes, which cannot pack together.
    """
    data, val = options.data, options.val
    packs = [one for one in (data, val) if one is not None and needs_packing(one)]
    pack_missing(filter(None, (data, val)))
    if not packs:
        if options.shards or options.holdout:
            raise InputError("shards, holdout: --data names shards already, so nothing is packed; remove the option.")
        return (data, val) if val else _pair_of_folders(Path(data)) or (data, None)
    if val is not None and options.holdout:
        raise InputError("holdout: --val is given, so nothing is held out; remove one of the two.")
    folder = options.shards or Path(run) / "shards"
    wanted = json.loads(json.dumps(_description(options, packs, max_side)))
    stored = _read_json(folder / _PACKED)
    if stored is None:
        _pack(options, folder, max_side, console)
        write_atomic(folder / _PACKED, json.dumps(wanted, indent=2) + "\n")
    elif stored != wanted:
        differing = ", ".join(sorted(key for key in wanted | stored if wanted.get(key) != stored.get(key)))
        raise InputError(
            f"shards: {folder} was packed from something else or with other options ({differing}); choose another "
            "folder with --shards, or delete it."
        )
    else:
        print_line(console, f"The shards in {folder} are those of {data}; they are used as they are.")
    train = str(folder / "train") if data in packs else data
    return train, str(folder / "val") if val is None or val in packs else val


def _pair_of_folders(data: Path) -> tuple[str, str | None] | None:
    """(train, val) if `data` is the folder `train` or its parent, as `mmrl pack --holdout` writes them."""
    parent = data.parent if data.name == "train" else data
    pair = parent / "train", parent / "val"
    if all(folder.is_dir() and any(folder.glob("*.tar")) for folder in pair):
        return str(pair[0]), str(pair[1])
    return None


def _description(options: DataOptions, packs: list[str], max_side: int) -> dict[str, object]:
    """All that the packed shards depend on."""
    named = Columns(options.image_column, options.caption_columns, options.group_column)
    return {
        **{key: value for key, value in asdict(options).items() if key not in ("data", "val", "shards")},
        "max_side": max_side,
        "sources": [{"path": str(Path(one).resolve()), **open_pairs(Path(one), named).fingerprint()} for one in packs],
    }


def _pack(options: DataOptions, folder: Path, max_side: int, console: Console) -> None:
    launch = detect_launch()
    if launch is not None and launch.size > 1:
        raise InputError(
            f"data: {options.data} has to be packed, which one process does; run mmrl pack {options.data} shards "
            "--holdout 10% first, then train with --data shards/train --val shards/val."
        )
    data, val = options.data, options.val
    named = Columns(options.image_column, options.caption_columns, options.group_column)
    jobs: list[tuple[str, Path, str | None]] = []
    if val is None:
        holdout = options.holdout or _default_holdout(data, len(open_pairs(Path(data), named)))
        jobs.append((data, folder, holdout))
    else:
        jobs += [(one, folder / name, None) for one, name in ((data, "train"), (val, "val")) if needs_packing(one)]
    for source, out, holdout in jobs:
        pack_shards(
            Path(source),
            out,
            image_column=options.image_column,
            caption_columns=options.caption_columns,
            group_column=options.group_column,
            max_side=max_side,
            holdout=holdout,
            workers=usable_cores(),
            quiet=console.quiet,
        )


def _default_holdout(data: str, pairs: int) -> str:
    if pairs < _FEWEST_PAIRS:
        raise InputError(f"data: {data} has {pairs} pairs; training needs {_FEWEST_PAIRS} or more.")
    return str(min(max(pairs // _SHARE, min(_FEWEST, pairs // _MOST_SHARE)), _MOST))


def _read_json(path: Path) -> dict[str, object] | None:
    try:
        return dict(parse_json(path.read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"shards: {path} cannot be read ({error}); choose another folder with --shards.") from None
