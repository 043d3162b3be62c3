"""The rule of all commands that write a folder: earlier work with other settings is replaced with --force only."""

import json
from pathlib import Path

import pytest
from helpers.encoders import TEXTS, save_random_encoder

import mmrl
from mmrl.data.pack.command import pack_shards
from mmrl.errors import InputError
from mmrl.export.bundles import export
from mmrl.model.manifest import read_manifest
from mmrl.output.files import atomic_path, check_out_folder
from mmrl.search.build import write_index
from mmrl.search.embed import embed_images

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


def test_a_folder_is_replaced_only_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name in ("a", "b"):
        with atomic_path(out) as folder:
            folder.mkdir()
            (folder / name).touch()
    with pytest.raises(FileExistsError), atomic_path(out):
        out.mkdir()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "b"]


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
