"""Speed of the data pipeline compared with open_clip's, and the cost of resuming and of long runs:

    python tests/benchmarks/data.py [decode] [workers] [resume] [memory] [peak] [pack] [check]   (default: all)

decode    samples per second of one core, from tar to 224-pixel training crops: open_clip's transforms on its WebDataset
          pipeline; our stream (uint8, which is normalised on the device, and also with normalisation on the same core);
          and only decoding and resizing the same bytes in memory. The rows alternate.
workers   two worker processes compared with one; the consumer does nothing.
resume    1,000,000 small samples in 100 shards: from a new stream to its first batch, at the start and at 90 % of an
          epoch, with the index present; and the size of the state.
memory    resident memory of all loader processes together over 20 epochs with persistent workers.
peak      memory of one loader worker, which it shares with no other process, while it loads a batch.
pack      `mmrl pack` compared with a loop that reads the files and writes them into a tar, also with downscaling.
check     `mmrl check` without decoding: bytes per second of one worker.

Photos are generated: smooth waves with grain, about 500 x 400 pixels, JPEG of quality 90, about 65 KB each.
"""

import argparse
import importlib
import io
import json
import multiprocessing
import os
import statistics
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from open_clip.transform import AugmentationCfg, PreprocessCfg, image_transform_v2
from PIL import Image

from mmrl.data.check.command import check_shards
from mmrl.data.pack.command import pack_shards
from mmrl.data.sources import DataConfig, open_training_set
from mmrl.data.stream import Stream
from mmrl.data.transforms import AugmentConfig
from mmrl.images.decode import decode_pixels, to_pil
from mmrl.images.image_spec import ImageSpec

wds: Any = importlib.import_module("webdataset")  # its star imports are invisible to type checkers
SPEC = ImageSpec(height=224, width=224, mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28))
CROP = [0.9, 1.0]
BATCH = 64


def photo(number: int) -> bytes:
    """A JPEG of about 500 x 400."""
    rng = np.random.default_rng(number)
    height, width = 400 + number % 17, 500 - number % 13
    y, x = np.mgrid[0:height, 0:width]
    waves = [128 + 90 * np.sin(x / rng.uniform(10, 40) + y / rng.uniform(10, 40)) for _ in range(3)]
    grain = rng.normal(0, 6, (height, width, 3))
    buffer = io.BytesIO()
    Image.fromarray((np.stack(waves, -1) + grain).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_shards(folder: Path, shards: int, samples: int, image: Callable[[int], bytes]) -> None:
    """Write shards of KEY.jpg + KEY.txt."""
    folder.mkdir(exist_ok=True)
    for shard in range(shards):
        with tarfile.open(folder / f"shard-{shard:04}.tar", "w") as tar:
            for number in range(shard * samples, (shard + 1) * samples):
                for name, data in (("jpg", image(number)), ("txt", f"photo number {number}".encode())):
                    info = tarfile.TarInfo(f"{number:08}.{name}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def photos(work: Path, shards: int = 4, samples: int = 256) -> Path:
    """A folder of shards with 64 different photos."""
    folder = work / "photos"
    if not folder.exists():
        some = [photo(number) for number in range(64)]
        write_shards(folder, shards, samples, lambda number: some[number % 64])
    return folder


def our_stream(folder: Path, workers: int = 0, image: ImageSpec | None = SPEC, batch: int = BATCH) -> Stream:
    """The stream that training uses."""
    config = DataConfig(train=str(folder), augment=AugmentConfig(random_resized_crop=CROP), workers=workers)
    return Stream(open_training_set(config), batch, num_workers=workers, image=image, config=config)


def measure_decode(work: Path, rounds: int = 5) -> None:
    """One core each."""
    folder = photos(work)
    transform = image_transform_v2(
        PreprocessCfg(224, "RGB", SPEC.mean, SPEC.std, "bicubic"),
        is_train=True,
        aug_cfg=AugmentationCfg(scale=(0.9, 1.0)),
    )
    some = [photo(number) for number in range(64)]

    def open_clips() -> int:
        # As open_clip.data.get_wds_dataset builds it, in one process.
        pipeline = wds.DataPipeline(
            wds.SimpleShardList(sorted(map(str, folder.glob("*.tar")))),
            wds.tarfile_to_samples(),
            wds.shuffle(512),
            wds.decode("pilrgb"),
            wds.rename(image="jpg;png;jpeg;webp", text="txt"),
            wds.map_dict(image=transform),
            wds.to_tuple("image", "text"),
            wds.batched(BATCH, partial=False),
        )
        return sum(len(texts) for _, texts in pipeline)

    def ours() -> int:
        return sum(len(batch.keys) for batch in our_stream(folder))

    def ours_normalised() -> int:
        return sum(len(SPEC.normalise(batch.image)) for batch in our_stream(folder))

    def decode_and_resize() -> int:
        for number in range(1024):
            pixels_CHW = decode_pixels(some[number % 64])
            crop_CHW = pixels_CHW[:, 8:-8, 8:-8]
            F.interpolate(crop_CHW[None], size=(224, 224), mode="bicubic", antialias=True)
        return 1024

    rows: dict[str, Callable[[], int]] = {
        "open_clip": open_clips,
        "mmrl": ours,
        "mmrl, with normalisation": ours_normalised,
        "decode and resize only": decode_and_resize,
    }
    rates: dict[str, list[float]] = {name: [] for name in rows}
    for repeat in range(rounds + 1):
        for name, run in rows.items():
            began = time.perf_counter()
            count = run()
            if repeat:  # the first one warms up
                rates[name].append(count / (time.perf_counter() - began))
    for name, values in rates.items():
        print(f"decode   {name:26} {statistics.median(values):7.0f} samples/s per core")
    for of, to in (
        ("mmrl", "open_clip"),
        ("mmrl, with normalisation", "open_clip"),
        ("mmrl", "decode and resize only"),
    ):
        print(f"decode   {of:26} / {to:26} {ratio(rates[of], rates[to]):.2f}")


def measure_workers(work: Path, rounds: int = 3) -> None:
    """From the second epoch of persistent workers on, so that their start is not timed."""
    folder = photos(work)
    streams = {workers: our_stream(folder, workers) for workers in (1, 2)}
    rates: dict[int, list[float]] = {1: [], 2: []}
    for repeat in range(rounds + 1):
        for workers, stream in streams.items():
            began = time.perf_counter()
            count = sum(len(batch.keys) for batch in stream)
            if repeat:  # the first one warms up
                rates[workers].append(count / (time.perf_counter() - began))
    for workers, values in rates.items():
        print(f"workers  {workers}                        {statistics.median(values):9.0f} samples/s")
    print(f"workers  two / one                  {ratio(rates[2], rates[1]):7.2f}")


def measure_resume(work: Path) -> None:
    """In one process, as after a restart."""
    folder = work / "million"
    print("resume   writing 1,000,000 samples …", flush=True)
    write_shards(folder, 100, 10_000, lambda number: b"%d" % number)
    began = time.perf_counter()
    stream = our_stream(folder, image=None, batch=256)
    print(f"resume   first open, writes indexes {time.perf_counter() - began:7.1f} s")
    state = stream.state_dict()
    print(f"resume   size of the state          {len(json.dumps(state)):7} bytes")
    for share in (0.0, 0.9):
        began = time.perf_counter()
        stream = our_stream(folder, image=None, batch=256)
        position = int(share * stream.batches_per_epoch) * 256
        stream.load_state_dict({**state, "epoch": 1, "position": position})
        next(iter(stream))
        print(f"resume   first batch at {share:3.0%}         {time.perf_counter() - began:7.2f} s")


def measure_memory(work: Path, epochs: int = 20) -> None:
    """Proportional set size: shared pages count once."""
    folder = photos(work)
    stream = our_stream(folder, workers=2)
    for epoch in range(epochs):
        for _ in stream:
            pass
        if epoch in (0, 1, 4, 9, 14, epochs - 1):
            print(f"memory   after epoch {epoch + 1:3}            {_memory_of_all():7.0f} MiB", flush=True)


def measure_peak(work: Path) -> None:
    """Sampled every 20 ms (Linux)."""
    folder = photos(work)
    for rows, augment in ((64, {}), (1024, {}), (1024, {"flip": 0.5, "rotate": 5, "brightness": 0.2})):
        config = DataConfig(augment=AugmentConfig.model_validate({"random_resized_crop": CROP, **augment}))
        stream = Stream(open_training_set(config.model_copy(update={"train": str(folder)})), rows, num_workers=1,
                        image=SPEC, config=config)  # fmt: skip
        peak, done = 0, threading.Event()

        def watch(done: threading.Event = done) -> None:
            nonlocal peak
            while not done.wait(0.02):
                peak = max([peak, *(_private_bytes(one.pid or 0) for one in multiprocessing.active_children())])

        thread = threading.Thread(target=watch)
        thread.start()
        next(iter(stream))
        done.set()
        thread.join()
        what = f"{rows} rows, {'augmented' if augment else 'cropped'}"
        print(f"peak     {what:26} {peak / 1e6:8.0f} MB")


def _private_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def measure_pack(work: Path, rounds: int = 3) -> None:
    """One worker. The plain loop reads, decodes (and downscales) each image and writes it into a tar."""
    folder = work / "files"
    folder.mkdir(exist_ok=True)
    for number in range(1024):
        (folder / f"{number:04}.jpg").write_bytes(photo(number % 64))
        (folder / f"{number:04}.txt").write_text(f"photo number {number}")

    def plain_loop(max_side: int | None) -> None:
        with tarfile.open(work / "plain.tar", "w") as tar:
            for path in sorted(folder.glob("*.jpg")):
                data = path.read_bytes()
                pixels_CHW = decode_pixels(data)
                if max_side is not None:
                    image, buffer = to_pil(pixels_CHW), io.BytesIO()
                    image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
                    image.save(buffer, "JPEG", quality=92)
                    data = buffer.getvalue()
                for name, content in ((path.name, data), (f"{path.stem}.txt", path.with_suffix(".txt").read_bytes())):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))

    for max_side in (None, 256):
        ratios = []
        for repeat in range(rounds + 1):
            began = time.perf_counter()
            plain_loop(max_side)
            middle = time.perf_counter()
            pack_shards(folder, work / f"packed-{max_side}-{repeat}", max_side=max_side, quiet=True)
            if repeat:
                ratios.append((middle - began) / (time.perf_counter() - middle))
        what = "original size" if max_side is None else f"downscaled to {max_side}"
        print(f"pack     {what:26} {statistics.median(ratios):7.2f} of the plain loop's speed")


def measure_check(work: Path) -> None:
    """Files of 60 KB of random bytes: nothing is decoded."""
    folder, rng = work / "random", np.random.default_rng(0)
    write_shards(folder, 4, 2048, lambda _: rng.bytes(60_000))
    for _ in range(3):
        began = time.perf_counter()
        result = check_shards(str(folder), decode=False, workers=1, quiet=True)
        size = sum(one.bytes for one in result.sets)
        print(f"check    without decoding          {size / 1e6 / (time.perf_counter() - began):8.0f} MB/s")


def _memory_of_all() -> float:
    """MiB of this process and its children (Linux)."""
    me, total = os.getpid(), 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        pid = int(stat.parent.name)
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            if me in (pid, parent):
                line = next(line for line in (stat.parent / "smaps_rollup").read_text().splitlines() if "Pss:" in line)
                total += int(line.split()[1])
        except OSError:
            continue
    return total / 1024


def ratio(of: list[float], to: list[float]) -> float:
    """The median of the per-round ratios."""
    return statistics.median(a / b for a, b in zip(of, to, strict=True))


MEASURES: dict[str, Callable[[Path], Any]] = {
    "decode": measure_decode,
    "workers": measure_workers,
    "resume": measure_resume,
    "memory": measure_memory,
    "peak": measure_peak,
    "pack": measure_pack,
    "check": measure_check,
}


def main() -> None:
    """Run the named measurements."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", nargs="*", choices=[*MEASURES, []], default=[])
    parser.add_argument("--folder", type=Path, help="folder for the generated shards (default: a temporary one)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="mmrl-benchmark-") as temporary:
        os.environ["MMRL_CACHE"] = f"{temporary}/cache"
        for what in arguments.what or MEASURES:
            MEASURES[what](arguments.folder or Path(temporary))
            sys.stdout.flush()


if __name__ == "__main__":
    main()
