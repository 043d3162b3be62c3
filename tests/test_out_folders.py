"""The rule of all commands that write a folder: earlier work with other settings is replaced with --force only."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.encoders import TEXTS, save_random_encoder
from helpers.locks import held_by_another_process
from safetensors.torch import save_file
from typer.testing import CliRunner

import mmrl
from mmrl.cli import app
from mmrl.config import dump_config, load_config
from mmrl.data.pack.command import pack_shards
from mmrl.errors import InputError
from mmrl.evaluate.command import EvalOptions, evaluate_model
from mmrl.evaluate.report.compare import compare_runs
from mmrl.export.bundles import export
from mmrl.model.manifest import read_manifest
from mmrl.output.files import atomic_path, check_out_folder, exclusive, write_atomic
from mmrl.search.build import write_index
from mmrl.search.embed import embed_images
from mmrl.train.trainer import train

REFUSED = r"already holds {}; choose another folder, or add --force to replace it\.$"


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_random_encoder(str(tiny_model), tmp_path_factory.mktemp("model") / "source"))


def test_the_rule(tmp_path: Path) -> None:
    check_out_folder(tmp_path / "new", difference="work")
    check_out_folder(tmp_path, difference="work")
    (tmp_path / ".a.1234.partial").touch()
    check_out_folder(tmp_path, difference="work")
    (tmp_path / "mine").touch()
    check_out_folder(tmp_path, ["mine"])
    check_out_folder(tmp_path, ["mine"], "work", force=True)
    with pytest.raises(InputError, match=REFUSED.format("work")):
        check_out_folder(tmp_path, ["mine"], "work")
    with pytest.raises(InputError, match="already holds mine; choose a new or empty folder"):
        check_out_folder(tmp_path, force=True)
    with pytest.raises(InputError, match=r"mine cannot be created \(a file has this name\)"):
        check_out_folder(tmp_path / "mine", force=True)


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(
    model: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for work in ("evaluate.sets.embed", "export.bundles.Reference"):
        monkeypatch.setattr(f"mmrl.{work}", None)  # would raise TypeError
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "out"
    for command in (lambda: evaluate_model(model, [str(shards)], EvalOptions(), out), lambda: export(model, out, [4])):
        with pytest.raises(InputError, match=r"out: the folder .* cannot be created \((Not a directory|File exists)\)"):
            command()
    monkeypatch.setattr("os.access", lambda *_: False)  # as for another user than root
    with pytest.raises(InputError, match=f"out: this user cannot write to the folder {tmp_path}; choose another"):
        export(model, tmp_path / "out", [4])


def test_a_folder_is_replaced_only_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name in ("a", "b"):
        with atomic_path(out) as folder:
            folder.mkdir()
            (folder / name).touch()
    with pytest.raises(FileExistsError), atomic_path(out):
        out.mkdir()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "b"]


def test_a_folder_has_one_writer(tmp_path: Path) -> None:
    out = tmp_path / "a" / "out"
    with held_by_another_process(out):
        with (
            pytest.raises(
                InputError, match=r"out: another command, process \d+ on \S+ is writing to this folder; wait"
            ),
            exclusive(out, "mmrl embed"),
        ):
            pass
        check_out_folder(out)  # the lock is no work
    assert not out.exists()
    out.mkdir()
    (out / ".lock").write_text("of a process that was killed \x1b[31m")
    with exclusive(out, "mmrl embed"):
        assert (out / ".lock").read_text().startswith("mmrl embed, process ")
    assert list(out.iterdir()) == []
    (tmp_path / "file").touch()
    with exclusive(tmp_path / "file", "mmrl embed"):  # the command says what is wrong with it
        pass


@pytest.mark.parametrize(
    "command", [["embed", "MODEL", "SHARDS", "OUT"], ["index", "SHARDS", "OUT"], ["index", "OUT", "--compact"]]
)
def test_a_second_writer_is_refused(command: list[str], tmp_path: Path) -> None:
    with held_by_another_process(tmp_path / "out"):
        arguments = [str(tmp_path / "out") if one == "OUT" else one for one in command]
        result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, InputError)
    assert "is writing to this folder" in str(result.exception)


def test_a_second_training_is_refused(write_config: Callable[..., Path], tmp_path: Path) -> None:
    config = load_config(write_config(evaluation={}))
    write_atomic(Path(config.run) / "config.yaml", dump_config(config))
    with held_by_another_process(Path(config.run)), pytest.raises(InputError, match="is writing to this folder"):
        train(config)


def test_an_export_replaces_exports_only(model: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(model, out, [8])
    with pytest.raises(InputError, match=REFUSED.format("an encoder")):
        export(model, out, [4])
    export(model, out, [4], force=True)
    assert mmrl.load(out).encode_texts(TEXTS).shape == (3, 4)
    # What an export is made from, and checkpoints, are kept.
    for source, folder in ((str(out), out), (str(out), Path(model))):
        with pytest.raises(InputError, match=r"already holds .*; choose a new or empty folder"):
            export(source, folder, [2], force=True)
    (out / "mine.txt").touch()
    with pytest.raises(InputError, match=r"already holds mine.txt; choose a new or empty folder"):
        export(model, out, [8], force=True)
    export(model, tmp_path / "two", [8, 4])
    with pytest.raises(InputError, match=REFUSED.format("an encoder")):
        export(model, tmp_path / "two", [4, 8])
    export(model, tmp_path / "two", [4, 8], "open_clip", force=True)
    assert read_manifest(tmp_path / "two" / "8")["layout"] == "open_clip"


def test_embeddings_and_indexes_with_other_settings_are_kept(model: str, shards: Path, tmp_path: Path) -> None:
    embeddings, index = tmp_path / "embeddings", tmp_path / "index"
    for _ in range(2):  # the same settings
        embed_images(model, str(shards), embeddings, [8], quiet=True)
        write_index(embeddings, index, quiet=True)
    written = (embeddings / "embeddings.parquet").read_bytes()
    with pytest.raises(InputError, match=REFUSED.format("embeddings whose dim was 8, not 4")):
        embed_images(model, str(shards), embeddings, [4], quiet=True)
    with pytest.raises(InputError, match=REFUSED.format("embeddings whose texts was False, not True")):
        embed_images(model, str(shards), embeddings, [8], texts=True, quiet=True)
    with pytest.raises(InputError, match=REFUSED.format("embeddings of another source")):
        embed_images(model, str(shards / "part-0.tar"), embeddings, [8], quiet=True)
    assert (embeddings / "embeddings.parquet").read_bytes() == written
    embed_images(model, str(shards), embeddings, [4], force=True, quiet=True)
    with pytest.raises(InputError, match=REFUSED.format("an index whose dim was 8, not 4")):
        write_index(embeddings, index, quiet=True)
    write_index(embeddings, index, force=True, quiet=True)
    assert json.loads((index / "manifest.json").read_text())["dim"] == 4


def test_reports_with_other_settings_are_kept(model: str, shards: Path, tmp_path: Path) -> None:
    def evaluate(out: Path, force: bool = False, **options: Any) -> dict[str, Any]:
        return evaluate_model(model, [f"val={shards}"], EvalOptions(**options), out, quiet=True, force=force)

    out = tmp_path / "a"
    for _ in range(2):  # the same settings
        evaluate(out, dims=[16, 8])
    written = (out / "retrieval.json").read_bytes()
    with pytest.raises(InputError, match=REFUSED.format(r"a report whose dims was \[16, 8\], not \[16, 4\]")):
        evaluate(out, dims=[16, 4])
    with pytest.raises(InputError, match="a report whose sets was"):
        evaluate_model(model, [f"val={shards / 'part-0.tar'}"], EvalOptions(dims=[16, 8]), out, quiet=True)
    assert (out / "retrieval.json").read_bytes() == written
    assert set(evaluate(out, force=True, dims=[16, 4])["dims"]) == {"16", "4"}
    # In a run's folder the report of training counts as one, and the run's files stay.
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    evaluate(tmp_path / "run", dims=[16])
    (tmp_path / "run" / "retrieval.json").write_text("{}")
    with pytest.raises(InputError, match=REFUSED.format("a retrieval.json whose settings are unknown")):
        evaluate(tmp_path / "run", dims=[16])
    (out / "mine.txt").touch()
    with pytest.raises(InputError, match=r"already holds mine.txt; choose a new or empty folder"):
        evaluate(out, force=True, dims=[16])

    evaluate(tmp_path / "b", dims=[16])
    both = tmp_path / "both"
    for _ in range(2):
        compare_runs([out, tmp_path / "b"], out=both, quiet=True)
    with pytest.raises(InputError, match=r"already holds a report whose metrics was"):
        compare_runs([out, tmp_path / "b"], ["R@5"], both, quiet=True)
    compare_runs([out, tmp_path / "b"], ["R@5"], both, quiet=True, force=True)
    assert "R@5" in (both / "compare.json").read_text()


def test_a_pack_replaces_shards_only(tmp_path: Path) -> None:
    from conftest import drawing

    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    for number in range(3):
        image, caption, _ = drawing(number)
        image.save(source / f"{number}.png")
        (source / f"{number}.txt").write_text(caption)
    pack_shards(source, out, quiet=True)
    with pytest.raises(InputError, match=REFUSED.format("shard-000000.tar")):
        pack_shards(source, out, samples_per_shard=2, quiet=True)
    pack_shards(source, out, samples_per_shard=2, force=True, quiet=True)
    assert len([*out.glob("*.tar")]) == 2
    (out / "thesis.tex").touch()
    with pytest.raises(InputError, match=r"already holds .*; choose a new or empty folder"):
        pack_shards(source, out, force=True, quiet=True)
    assert len([*out.glob("*.tar")]) == 2


def test_files_that_a_library_makes_private_get_the_permissions_of_new_files(tmp_path: Path) -> None:
    """safetensors creates its files for their owner alone."""
    new = tmp_path / "new"
    new.touch()
    with atomic_path(tmp_path / "folder") as partial:
        (partial / "inner").mkdir(parents=True)
        save_file({"a": torch.zeros(2)}, partial / "inner" / "a.safetensors")
        (partial / "program").touch(mode=0o700)
    with atomic_path(tmp_path / "b.safetensors") as partial:
        save_file({"a": torch.zeros(2)}, partial)
    modes = [(tmp_path / name).stat().st_mode for name in ("new", "folder/inner/a.safetensors", "b.safetensors")]
    assert modes[1:] == modes[:1] * 2
    assert (tmp_path / "folder/program").stat().st_mode & 0o777 == 0o700
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.safetensors", "folder", "new"]
