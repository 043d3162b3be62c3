"""`mmrl rotate` with several processes, and the share of a set that each of them reads."""

import socket
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.encoders import save_random_encoder
from helpers.worlds import Program, run_in_world
from rich.console import Console

from mmrl import cli
from mmrl.data.sources import open_reader
from mmrl.model import bundle
from mmrl.rotation import moments
from mmrl.rotation.command import rotate_model


@pytest.fixture(scope="module")
def plain(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, not nested, 16-d."""
    folder = save_random_encoder(str(tiny_model), tmp_path_factory.mktemp("plain"))
    manifest = bundle.read_manifest(folder)
    bundle.write_manifest(folder, manifest | {"nested_dims": [16]})
    return folder


@pytest.mark.parametrize("size", [2, *(pytest.param(size, marks=pytest.mark.slow) for size in (1, 3))])
def test_any_number_of_processes_writes_the_same_bits(
    plain: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(moments, "CHUNK_SIZE", moments.CHUNK_SIZE)  # restores it, after _rotate_in_chunks_of_seven
    (tmp_path / "world").mkdir()
    work = partial(_rotate_in_chunks_of_seven, plain, shards)
    run_in_world(size, work, tmp_path / "world", start_method="forkserver")
    work(tmp_path)
    hashes = {bundle.read_manifest(folder / "out")["weights_sha256"] for folder in (tmp_path, tmp_path / "world")}
    assert len(hashes) == 1


def _rotate_in_chunks_of_seven(plain: Path, shards: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    moments.CHUNK_SIZE = 7  # seven chunks of the 48 samples
    assert "learnt" in rotate_model(str(plain), str(shards), folder / "out", steps=20, quiet=True)["rotation"]


@pytest.mark.slow
def test_processes_that_slurm_starts_divide_the_samples(plain: Path, shards: Path, tmp_path: Path) -> None:
    """As for `mmrl train`: every launcher of mmrl.distributed.launchers, not only torchrun's WORLD_SIZE."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environ = {"SLURM_JOB_ID": "2", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "node0"}
    environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    arguments = ["rotate", str(plain), str(shards), str(tmp_path / "out"), "--steps", "0"]
    programs = [
        Program(cli.main, arguments, tmp_path, environ | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)})
        for rank in range(2)
    ]
    results = [program.wait() for program in programs]
    assert [code for code, _, _ in results] == [0, 0], results
    assert "rotated with 48 images" in results[0][1]
    assert results[1][1] == ""  # one process prints and writes
    one = rotate_model(str(plain), str(shards), tmp_path / "one", steps=0, quiet=True)
    assert bundle.read_manifest(tmp_path / "out")["weights_sha256"] == one["weights_sha256"]


def test_samples_are_spread_over_the_shards(
    plain: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moments, "CHUNK_SIZE", 8)
    manifest = rotate_model(str(plain), str(shards), tmp_path / "out", samples=20, steps=20)
    assert manifest["rotation"]["images"] == 24
    assert moments.spread_chunks(6, 20) == [0, 2, 4]


def test_the_pairs_to_learn_from_are_spread_over_the_shards(
    plain: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moments, "CHUNK_SIZE", 8)
    monkeypatch.setattr(moments, "IMAGES_PER_DIM", 1)  # 16 of the 48, from two of the six chunks
    whole, reader = bundle.open_model(plain), open_reader(str(shards))
    found = moments.compute_moments("plain", whole, reader, None, None, Console(quiet=True), with_pairs=True)
    assert found.images == 48
    assert found.pairs is not None
    batches = list(moments.read_chunks(whole, reader, [0, 3]))
    vectors = [moments.embed(whole, batch) for batch in batches]
    torch.testing.assert_close(found.pairs.image_ND, torch.cat([image_ND for image_ND, _ in vectors]))
    torch.testing.assert_close(found.pairs.text_MD, torch.cat([text_MD for _, text_MD in vectors]))
    rows = [batch.row_of_text_M + 8 * i for i, batch in enumerate(batches)]
    assert torch.equal(found.pairs.image_of_text_M, torch.cat(rows))
    assert torch.equal(found.pairs.group_N, torch.cat([batch.group_B for batch in batches]))


def test_workers_that_decode_change_nothing(plain: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "CHUNK_SIZE", 8)
    encoder, reader, quiet = bundle.open_model(plain), open_reader(str(shards)), Console(quiet=True)
    here = moments.compute_moments("plain", encoder, reader, 20, None, quiet, with_pairs=True)
    monkeypatch.setattr(moments, "decoding_workers", lambda *_: 2)
    there = moments.compute_moments("plain", encoder, reader, 20, None, quiet, with_pairs=True)
    assert here.pairs is not None
    assert there.pairs is not None
    assert (here.images, here.texts) == (there.images, there.texts) == (24, here.texts)
    assert torch.equal(here.moment_DD, there.moment_DD)
    assert torch.equal(here.pairs.image_ND, there.pairs.image_ND)
    assert torch.equal(here.pairs.group_N, there.pairs.group_N)
