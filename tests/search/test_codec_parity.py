"""What `mmrl eval` measures for a codec is what the command that it prints builds: the same ranks, option by option."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from helpers.indexes import generated_embeddings, indexed

from mmrl import cli
from mmrl.codecs.table import CODECS, CODES, PRECISIONS, Code
from mmrl.evaluate.analysis import compression
from mmrl.evaluate.analysis.advice import Budget, advise
from mmrl.evaluate.analysis.bootstrap import Bootstrap
from mmrl.evaluate.analysis.compression import Option, measure, shortlists
from mmrl.evaluate.analysis.task import Task
from mmrl.search import build
from mmrl.search import index as index_module
from mmrl.search.build import write_index
from mmrl.search.embed import EMBEDDINGS, TEXTS
from mmrl.search.index import Index, open_index
from mmrl.search.table import read_vectors

__all__ = ["indexed"]

DIM, K = 64, 10


@pytest.fixture(autouse=True)
def small_sets_are_compressed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "_EXACT_SCAN_ROWS", 5)
    monkeypatch.setattr(build, "_MIN_COMPRESSED", 5)
    monkeypatch.setattr(compression, "_MIN_PQ_GALLERY", 5)


def ranks_in_index(index: Index, task: Task) -> np.ndarray:
    """The rank of each query's best positive among the K nearest of an index; infinite if it is not among them."""
    ranks = []
    for query_D, group in zip(task.query_QD.numpy(), task.query_group_Q.tolist(), strict=True):
        rows, _ = index.nearest(query_D, index.dim, K)
        positions = np.flatnonzero(task.gallery_group_G.numpy()[rows] == group)
        ranks.append(positions[0] + 1.0 if len(positions) else np.inf)
    return np.array(ranks)


def within_k(option: Option) -> np.ndarray:
    return np.where(option.rank_Q.numpy() <= K, option.rank_Q.numpy(), np.inf)


# ------------------------------------------------------------------------------------------------ 3,000 vectors


@pytest.fixture(scope="module")
def task() -> Task:
    """Texts near their images, the first dims larger than the last."""
    rng = np.random.default_rng(0)
    deviations = np.arange(1, DIM + 1) ** -0.5
    image_GD = rng.standard_normal((3000, DIM)) * deviations
    row_Q = rng.permutation(3000)[:400]
    text_QD = image_GD[row_Q] + 0.6 * rng.standard_normal((400, DIM)) * deviations
    image_GD, text_QD = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image_GD, text_QD))
    vectors = torch.from_numpy(text_QD).float(), torch.from_numpy(image_GD).float()
    return Task("text_to_image", *vectors, torch.from_numpy(row_Q), torch.arange(3000))


@pytest.fixture(scope="module")
def embeddings(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parity") / "e"
    return generated_embeddings(folder, task.gallery_GD.numpy(), task.query_QD.numpy())


@pytest.mark.parametrize("dim", [64, 16])
@pytest.mark.parametrize("code", CODES)
def test_an_index_finds_what_evaluation_measured(
    task: Task, embeddings: Path, tmp_path: Path, code: Code, dim: int
) -> None:
    """The same candidates and ranks, but for one query in a hundred, whose scores are nearly equal."""
    manifest = write_index(embeddings, tmp_path / "i", code=code, dim=dim, candidates=50, quiet=True)
    index = open_index(tmp_path / "i")
    assert index.funnel is not None
    rows_QC = np.concatenate([index.funnel.first(query_D[None], 50) for query_D in task.query_QD.numpy()])
    candidate_QC = shortlists(task, dim, code, [50])[50]
    assert (np.sort(rows_QC) == np.sort(candidate_QC.numpy())).all(axis=1).mean() >= 0.99
    measured = compression._reranked(task, candidate_QC, DIM).numpy()
    same = ranks_in_index(index, task) == np.where(measured <= K, measured, np.inf)
    assert same.mean() >= 0.99
    assert manifest["codes"]["resident_bytes"] == 3000 * CODECS[code].bytes(dim)
    if code in compression.SHORTLIST_CODES and (code, dim) != ("sq8", DIM):
        option = next(o for o in measure(task, [64, 16]) if (o.dim, o.precision, o.candidates) == (dim, code, 50))
        np.testing.assert_array_equal(option.rank_Q.numpy(), measured)
        assert option.bytes * 3000 == manifest["codes"]["resident_bytes"]


# ------------------------------------------------------------------------------------------------ printed commands


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", [*shlex.split(command), "--json"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    printed = capsys.readouterr()
    assert not end.value.code, printed.err
    return json.loads(printed.out)


def ranks_in_columns(embeddings: Path, task: Task, dim: int, precision: str) -> np.ndarray:
    """Ranks by the stored column, scored as its users do: cosine of the numbers, Hamming distance of the bits."""
    stored_Gd = read_vectors(pyarrow.parquet.read_table(embeddings / EMBEDDINGS), "embedding")
    query_Qd = task.query_QD[:, :dim].double().numpy()
    if precision == "binary":
        bits_Gd = np.unpackbits(stored_Gd, axis=1, count=dim).astype(bool)
        score_QG = -((query_Qd > 0)[:, None] != bits_Gd[None]).sum(-1).astype(float)
    else:
        stored_Gd = stored_Gd.astype(np.float64)
        score_QG = query_Qd @ (stored_Gd / np.linalg.norm(stored_Gd, axis=1, keepdims=True)).T
    positive_QG = (task.query_group_Q[:, None] == task.gallery_group_G).numpy()
    best_Q1 = np.where(positive_QG, score_QG, -np.inf).max(1, keepdims=True)
    return 1.0 + ((score_QG >= best_Q1) & ~positive_QG).sum(1)


def test_the_printed_commands_build_what_was_measured(
    indexed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every option that the advice can recommend, built by the command that it prints."""
    monkeypatch.setattr(compression, "_MAX_LIST_SHARE", 0.5)
    where = {"MODEL": indexed / "model", "SHARDS": indexed / "images.tar"}
    run(monkeypatch, capsys, f"mmrl embed {where['MODEL']} {where['SHARDS']} {tmp_path}/texts --texts")
    images, texts = (pyarrow.parquet.read_table(tmp_path / "texts" / name) for name in (EMBEDDINGS, TEXTS))
    row_of = {key: row for row, key in enumerate(images["key"].to_pylist())}
    group_Q = torch.tensor([row_of[key] for key in texts["key"].to_pylist()])
    text_QD, image_GD = (torch.from_numpy(read_vectors(table, "embedding").copy()) for table in (texts, images))
    task = Task("text_to_image", text_QD, image_GD, group_Q, torch.arange(len(images)))
    options = measure(task, [16, 8])
    assert {(o.precision, bool(o.candidates)) for o in options} == {
        *((precision, False) for precision in PRECISIONS), *((code, True) for code in compression.SHORTLIST_CODES)
    }  # fmt: skip
    full = next(o for o in options if (o.dim, o.precision, o.candidates) == (16, "fp32", 0))
    for number, option in enumerate(options):
        # With the full vector beside it, a budget of everything recommends this option.
        advice = advise([full, option], Budget(1, relative=False), Bootstrap(group_Q), 1000)
        answer = advice["two_stage" if option.candidates else "smallest"]
        assert (answer["dim"], answer["precision"], answer["candidates"]) == (
            option.dim, option.precision, option.candidates
        )  # fmt: skip
        folder = {"EMBEDDINGS": tmp_path / f"e{number}", "INDEX": tmp_path / f"i{number}"}
        if option.candidates:  # the same embeddings for all indexes, with the texts that evaluation saw
            folder["EMBEDDINGS"] = tmp_path / "texts"
        commands = answer["commands"]
        built: dict[str, Any] = {}
        for command in commands[1:] if option.candidates else commands:
            for word, path in {**where, **folder}.items():
                command = command.replace(word, str(path))
            built = run(monkeypatch, capsys, command)
        if option.candidates:
            assert built["codes"]["resident_bytes"] == option.bytes * built["rows"]
            got, expected = ranks_in_index(open_index(folder["INDEX"]), task), within_k(option)
        else:
            assert built["columns"] == [{"name": "embedding", "dim": option.dim, "precision": option.precision}]
            got = ranks_in_columns(folder["EMBEDDINGS"], task, option.dim, option.precision)
            expected = option.rank_Q.numpy()
        assert (got == expected).mean() >= 0.97, commands  # one of 49 queries may have nearly equal scores
