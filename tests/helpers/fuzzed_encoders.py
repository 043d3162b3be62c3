"""Damaged encoders of graphs and damaged search indexes, for fuzzers: they are refused with a sentence, or work."""

import importlib.util
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY_MODEL, sample_members, write_tar

import mmrl
from helpers.encoders import IMAGES, TEXTS, save_random_encoder
from helpers.fuzz import Attempt, alter, damage
from helpers.graphs import save_graph_encoder, update_hashes
from mmrl.search.build import write_index
from mmrl.search.embed import embed_images
from mmrl.search.index import open_index


def vectors_of(folder: Path) -> np.ndarray:
    """The vectors that an encoder gives to TEXTS and IMAGES."""
    encoder = mmrl.load(folder, device="cpu")
    return np.concatenate([encoder.encode_texts(TEXTS), encoder.encode_images(IMAGES)])


def start_graphs(folder: Path) -> Attempt:
    """Of ONNX and OpenVINO: damaged files, some of them with the right hash, and odd values in the manifest."""
    pytest.importorskip("onnx", reason="the extra [export] is not installed")
    runtimes = {"onnx": "onnxruntime", "openvino": "openvino"}
    installed = [layout for layout, runtime in runtimes.items() if importlib.util.find_spec(runtime)]
    want = {one: vectors_of(save_graph_encoder(folder / one, one)) for one in installed}

    def attempt(draw: random.Random) -> bool:
        layout, damaged = draw.choice(installed), folder / "damaged"
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.copytree(folder / layout, damaged)
        manifest, kind = damaged / "manifest.json", draw.random()
        if kind < 0.4:
            values = json.loads(manifest.read_text())
            alter(values, draw)
            manifest.write_text(json.dumps(values))
        else:
            path = draw.choice(sorted(damaged.iterdir()))
            path.unlink() if draw.random() < 0.1 else path.write_bytes(damage(path.read_bytes(), draw))
            if kind < 0.7 and path != manifest:
                update_hashes(damaged)
        vectors = vectors_of(damaged)
        # A stranger's encoder may give any vectors; a damaged file must not.
        return kind < 0.7 or np.array_equal(vectors, want[layout])

    return attempt


def start_search(folder: Path) -> Attempt:
    """Search indexes: damaged files, and odd values in the manifest."""
    (folder / "tiny.json").write_text(json.dumps(TINY_MODEL))
    save_random_encoder(str(folder / "tiny.json"), folder / "model")
    write_tar(folder / "a.tar", [member for number in range(8) for member in sample_members(number)])
    embed_images(str(folder / "model"), str(folder / "a.tar"), folder / "embeddings", quiet=True)
    write_index(folder / "embeddings", folder / "sound", quiet=True)
    query_D = open_index(folder / "sound").vectors_ND[3].copy()

    def attempt(draw: random.Random) -> bool:
        damaged = folder / "damaged"
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.copytree(folder / "sound", damaged)
        manifest = damaged / "manifest.json"
        if draw.random() < 0.5:
            values = json.loads(manifest.read_text())
            alter(values, draw)
            manifest.write_text(json.dumps(values))
        else:
            path = draw.choice([one for one in sorted(damaged.rglob("*")) if one.is_file()])
            path.unlink() if draw.random() < 0.1 else path.write_bytes(damage(path.read_bytes(), draw))
        opened = open_index(damaged)
        rows, _ = opened.nearest(query_D, opened.dim, 3)
        return len(opened.items.take(rows)) == 3 and len(opened.named_groups) > 0

    return attempt
