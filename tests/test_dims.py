"""One rule for dims in every command: any from 1 to D is taken, with one note if it was not trained."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.encoders import save_random_encoder
from helpers.indexes import clustered, generated_embeddings, indexed

import mmrl
from mmrl import cli
from mmrl.errors import InputError
from mmrl.nesting import untrained_note
from mmrl.search.embed import embed_images
from mmrl.search.query import Searcher, search_index

__all__ = ["indexed"]

FORMATS = ("bundle", "open_clip", "onnx", "openvino", "sentence_transformers", "transformers", "transformers.js")
NOTE = "Note: 5 is not a trained dim (trained: 16, 8, 4). Compare the recall: mmrl eval --dims 8,5,4"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, str, str]]:
    """Runs `mmrl …` in this process; returns its exit code, its output and its error output."""

    def command(*arguments: object) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["mmrl", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        shown = capsys.readouterr()
        return end.value.code or 0, shown.out, shown.err

    return command


def api(index: Path) -> Any:
    pytest.importorskip("fastapi", reason="the extra [serve] is not installed")
    from starlette.testclient import TestClient

    from mmrl.search.app import create_app

    return TestClient(create_app(Searcher.open(index), ["*"]), base_url="http://localhost")


def commands(folder: Path, out: Path, dim: int) -> dict[str, list[object]]:
    """Every command that takes a dim of the 16-d encoder in `folder`, nested at 4, 8 and 16."""
    model, shards = folder / "model", folder / "images.tar"
    return {
        "eval": ["eval", model, shards, "--dims", dim],
        **{f"export {name}": ["export", model, out, "--dim", dim, "--format", name] for name in FORMATS},
        "embed": ["embed", model, shards, out, "--dim", dim],
        "embed, several": ["embed", model, shards, out, "--dim", f"{dim},8"],
        "index": ["index", folder / "embeddings", out, "--code", "sq8", "--dim", dim],
        "search": ["search", folder / "index", "a red square", "--dim", dim],
    }


@pytest.mark.parametrize("dim", [0, 17])
@pytest.mark.parametrize("name", commands(Path(), Path(), 1))
def test_a_dim_out_of_range_is_one_sentence(
    indexed: Path, tmp_path: Path, run: Callable[..., tuple[Any, str, str]], name: str, dim: int
) -> None:
    code, _, error = run(*commands(indexed, tmp_path / "out", dim)[name])
    option = "dims" if name == "eval" else "dim"
    assert (code, error) == (2, f"mmrl: {option}: {dim} is out of range; this embedding has dims 1 to 16.\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dim", [0, 17])
def test_a_dim_out_of_range_is_the_same_sentence_in_python_and_in_the_api(indexed: Path, dim: int) -> None:
    says = f"dim: {dim} is out of range; this embedding has dims 1 to 16."
    for call in (
        lambda: mmrl.load(indexed / "model", dim=dim),
        lambda: search_index(indexed / "index", "x", dim=dim, quiet=True),
    ):
        with pytest.raises(InputError) as error:
            call()
        assert str(error.value) == says
    answer = api(indexed / "index").post("/api/search/text", json={"text": "x", "dim": dim})
    assert (answer.status_code, answer.json()) == (422, {"detail": says})


@pytest.mark.parametrize("name", ["eval", "export bundle", "embed", "search"])
def test_an_untrained_dim_is_noted_once(
    indexed: Path, tmp_path: Path, run: Callable[..., tuple[Any, str, str]], name: str
) -> None:
    code, shown, _ = run(*commands(indexed, tmp_path / "out", 5)[name])
    assert code == 0
    assert shown.splitlines().count(NOTE) == shown.count("Note:") == 1
    code, shown, _ = run(*commands(indexed, tmp_path / "trained", 8)[name])
    assert code == 0
    assert "Note:" not in shown


def test_codes_of_an_untrained_dim_are_noted(tmp_path: Path, run: Callable[..., tuple[Any, str, str]]) -> None:
    generated_embeddings(tmp_path / "e", clustered(1000, 64, 1), clustered(60, 64, 2))  # nested at 16, 32 and 64
    _, shown, _ = run("index", tmp_path / "e", tmp_path / "i", "--code", "sq8", "--dim", 20)
    assert (
        "Note: 20 is not a trained dim (trained: 64, 32, 16). Compare the recall: mmrl eval --dims 32,20,16\n" in shown
    )
    _, shown, _ = run("index", tmp_path / "e", tmp_path / "j", "--code", "sq8")
    assert "Note:" not in shown


def test_json_names_the_trained_dims(indexed: Path, tmp_path: Path, run: Callable[..., tuple[Any, str, str]]) -> None:
    def result(name: str, dim: int = 5) -> Any:
        return json.loads(run(*commands(indexed, tmp_path / name, dim)[name], "--json")[1])

    assert result("eval")["nested_dims"] == [4, 8, 16]
    assert (result("embed")["dim"], result("embed")["nested_dims"]) == (5, [4])
    exported = result("export bundle")["5"]
    assert (exported["dim"], exported["nested_dims"]) == (5, [4])
    assert (result("search")["trained"], result("search", 8)["trained"]) == (False, True)


def test_the_server_names_the_trained_dims(
    indexed: Path, tmp_path: Path, run: Callable[..., tuple[Any, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = api(indexed / "index")
    assert client.get("/api/index").json()["nested_dims"] == [4, 8, 16]
    answers = [client.post("/api/search/text", json={"text": "x", "dim": dim}).json() for dim in (5, 8)]
    assert [(one["dim"], one["trained"]) for one in answers] == [(5, False), (8, True)]

    run(*commands(indexed, tmp_path / "e", 5)["embed"])
    run("index", tmp_path / "e", tmp_path / "i")
    info = api(tmp_path / "i").get("/api/index").json()
    assert (info["dim"], info["dims"], info["nested_dims"]) == (5, [4, 5], [4])
    monkeypatch.setattr("uvicorn.Server.run", lambda *_, **__: None)
    _, shown, _ = run("serve", tmp_path / "i", "--port", 0)
    assert "Note: 5 is not a trained dim (trained: 4). Compare the recall: mmrl eval --dims 5,4\n" in shown


def test_embeddings_and_index_have_the_trained_dims_of_the_opened_checkpoint(
    tiny_model: Path, indexed: Path, tmp_path: Path
) -> None:
    """A run's best checkpoint is opened, whatever its last one was trained at."""
    checkpoints = tmp_path / "run" / "checkpoints"
    for step, name, dims in ((5, "best", [8, 16]), (9, "last", [4, 8, 16])):
        folder = save_random_encoder(str(tiny_model), checkpoints / f"step-{step}")
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps(manifest | {"nested_dims": dims}))
        (checkpoints / name).symlink_to(folder.name)
    source = str(indexed / "images.tar")
    assert embed_images(str(tmp_path / "run"), source, tmp_path / "a", quiet=True)["nested_dims"] == [8, 16]
    shutil.rmtree(checkpoints / "step-5")
    (checkpoints / "best").unlink()
    assert embed_images(str(tmp_path / "run"), source, tmp_path / "b", quiet=True)["nested_dims"] == [4, 8, 16]


@pytest.mark.parametrize(
    ("dims", "trained", "note"),
    [
        ([8, 4], (4, 8), None),
        ([100], (64, 128), "100 is not a trained dim (trained: 128, 64). Compare the recall: "
         "mmrl eval --dims 128,100,64"),
        ([32], (64, 128), "32 is not a trained dim (trained: 128, 64). Compare the recall: mmrl eval --dims 64,32"),
        ([256], (64, 128), "256 is not a trained dim (trained: 128, 64). Compare the recall: "
         "mmrl eval --dims 256,128"),
        ([90, 64, 100], (64, 128), "90, 100 are not trained dims (trained: 128, 64). Compare the recall: "
         "mmrl eval --dims 128,100,90,64"),
        ([32], (), "32 is not a trained dim (trained: none)."),
    ],
)  # fmt: skip
def test_the_note_compares_with_the_next_trained_dims(
    dims: list[int], trained: tuple[int, ...], note: str | None
) -> None:
    assert untrained_note(dims, trained) == (None if note is None else f"Note: {note}")
