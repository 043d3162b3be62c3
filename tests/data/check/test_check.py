import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
import torch
from conftest import drawing, encoded, sample_members, write_tar
from helpers.samples import SPEC, bad_members
from helpers.server import Server
from helpers.slow_images import of_scans
from PIL import Image

from mmrl import cli
from mmrl.data.check import report, shard
from mmrl.data.check.command import check_shards
from mmrl.data.check.findings import Spread
from mmrl.data.check.shard import TokenCounter
from mmrl.data.folder import ImageFolder
from mmrl.data.index_file import SUFFIX, load_index
from mmrl.data.samples import BadSample, FieldsConfig
from mmrl.data.sequential import read_sequential
from mmrl.data.sources import DataConfig, open_reader
from mmrl.data.stores import RemoteConfig
from mmrl.data.stream import Stream
from mmrl.errors import InputError, RunStopped
from mmrl.model import registry
from mmrl.model.tokenizer import BPE_CHARACTERS

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs `mmrl check …` in this process; returns exit code, stdout, stderr."""

    def command(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mmrl", "check", *map(str, arguments), "--workers", "1"])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    return command


def problems(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def count_words(texts: list[str]) -> list[int]:
    return [len(text.split()) for text in texts]


def test_a_clean_set(shards: Path, run: Command) -> None:
    code, out, _ = run(shards, "--batch-size", 12, "--world-size", 4, "--loader-workers", 2)
    assert code == 0
    assert "3 shards, 48 samples" in out
    assert "11 to 20 samples, median 17" in out
    assert "json 48, png 48, txt 48" in out
    assert "PNG 48; shorter side 32 pixels, 48 below 64; smallest 32x32 (00000), largest 32x32 (00000)" in out
    assert "96: 2 per sample; 21 to 31 characters, median 24" in out
    assert "groups    12; 48 samples with a group" in out
    assert "4 steps per epoch with a batch size of 12, 0 samples dropped per epoch; " in out
    assert "12 samples for each of 4 ranks" in out
    assert "3 shards for 8 loaders (ranks × workers); no problem" in out
    assert "OK to train on: 0 bad samples, 0.00% (limit 1.00%)." in out


def test_bad_samples_are_those_that_training_skips(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "some-bad.tar", bad_members())
    result = check_shards(path, workers=1, list_file=tmp_path / "bad.jsonl", quiet=True)
    config = DataConfig(train=str(path), max_bad_fraction=1.0)
    batches = Stream(open_reader(path), 12, image=SPEC, config=config).forever()
    skipped = {problem.key: problem.reason for _ in range(15) for problem in next(batches).bad}
    assert {one["key"]: one["reason"] for one in problems(tmp_path / "bad.jsonl")} == skipped
    assert skipped.keys() == {"corrupt", "halved", "noimage", "silent", "latin", "badjson"}
    assert result.bad_samples == len(skipped)
    assert result.problems == dict.fromkeys(
        ("no picture in a known format", "damaged picture", "no image", "only empty captions", "text not UTF-8",
         "metadata not JSON"), 1
    )  # fmt: skip
    # Without decoding, the two unreadable images are not found, and a note says so.
    quick = check_shards(path, workers=1, decode=False, quiet=True)
    assert quick.bad_samples == len(skipped) - 2
    assert "not decoded" in quick.notes[0]


def test_an_image_that_takes_too_long_is_a_bad_sample_to_all_readers(tmp_path: Path) -> None:
    members = [m for n in range(8) for m in sample_members(n)] + [("slow.jpg", of_scans(3600)), ("slow.txt", b"slow")]
    path, folder = write_tar(tmp_path / "a.tar", members), tmp_path / "images"
    folder.mkdir()
    (folder / "slow.jpg").write_bytes(of_scans(3600))
    result = check_shards(path, workers=1, quiet=True)
    (reason,) = [one.reason for one in result.examples]
    assert reason.startswith("too slow a picture: more than 100 scans of 64x64 pixels; ")
    assert result.problems == {"too slow a picture": 1}
    reader, config = open_reader(path), DataConfig(max_bad_fraction=1.0)
    batches = Stream(reader, 3, image=SPEC, config=config).forever()
    assert {one.reason for _ in range(6) for one in next(batches).bad} == {reason}
    (read,) = read_sequential(reader, SPEC, lambda texts: torch.zeros(len(texts), 1))
    assert [one.reason for one in read.bad] == [reason]
    with pytest.raises(BadSample, match=r"unreadable image: .*slow.jpg: too slow a picture"):  # mmrl embed, pack, eval
        ImageFolder(folder).read_image(0)


def test_max_bad_fraction_decides(tmp_path: Path, run: Command) -> None:
    write_tar(tmp_path / "a.tar", bad_members())
    code, out, _ = run(tmp_path)
    assert code == 1
    assert "Not OK to train on: 6 bad samples, 13.04% (limit 1.00%)." in out
    assert "6 bad samples, 13.04%; data.max_bad_fraction allows 1.00%: 1 " in out
    allowed = check_shards(DataConfig(train=str(tmp_path), max_bad_fraction=0.2), workers=1, quiet=True)
    assert allowed.ok
    assert allowed.bad_samples == 6


def damaged_set(folder: Path, shards: Path) -> None:
    """Six shards: a good one, a truncated one, a gzip file, an empty one, one with a repeated key, a broken link."""
    folder.mkdir()
    shutil.copy(shards / "part-0.tar", folder / "0-good.tar")
    (folder / "1-cut.tar").write_bytes((shards / "part-1.tar").read_bytes()[:20_000])
    (folder / "2-zip.tar").write_bytes(b"\x1f\x8b" + bytes(2000))
    write_tar(folder / "3-empty.tar", [])
    write_tar(folder / "4-twice.tar", [*sample_members(50), *sample_members(51), *sample_members(50)])
    (folder / "5-gone.tar").symlink_to(folder / "nowhere.tar")


def test_bad_shards_are_listed_and_the_check_goes_on(shards: Path, tmp_path: Path, run: Command) -> None:
    damaged_set(tmp_path / "set", shards)
    code, out, _ = run(tmp_path / "set", "--list", tmp_path / "bad.jsonl", "--json")
    assert code == 1
    result = json.loads(out)
    found = {(Path(one["shard"]).name, one["key"]): one["reason"] for one in problems(tmp_path / "bad.jsonl")}
    assert found[("2-zip.tar", "")].startswith("not a plain tar file: ")
    assert "decompress it first" in found[("2-zip.tar", "")]
    assert found[("3-empty.tar", "")] == "no sample in this shard"
    assert found[("4-twice.tar", "00050")] == "duplicate key: it occurs earlier in this shard; the first sample is used"
    assert found[("5-gone.tar", "")].startswith("shard out of reach: ")
    assert found[("1-cut.tar", "")].startswith("truncated tar")
    (unfinished,) = [reason for (shard, key), reason in found.items() if shard == "1-cut.tar" and key]
    assert unfinished.startswith("cut sample")
    assert len(found) == 6
    assert result["problems"] == {reason.partition(":")[0]: 1 for reason in found.values()}
    unusable, cut, bad = result["stops"]
    assert unusable.startswith("3 of 6 shards cannot be used")
    assert "1-cut.tar, truncated tar" in cut
    assert bad.startswith("2 bad samples, 7.41%; ")
    assert result["sets"][0]["samples_of_shard"]["largest"] == 20


def test_a_missing_shard_is_a_finding_a_missing_set_an_error(shards: Path, tmp_path: Path, run: Command) -> None:
    code, out, _ = run(shards / "part-{0..3}.tar")
    assert code == 1
    assert "1 of 4 shards cannot be used" in out
    (tmp_path / "list.txt").write_text(f"{shards}/part-0.tar\n{shards}/none.tar\n")
    assert run(f"@{tmp_path}/list.txt")[0] == 1
    for spec in (shards / "parts-{0..3}.tar", tmp_path / "none.tar"):
        code, _, err = run(spec)
        assert code == 2
        assert "not exist" in err


def test_duplicates(tmp_path: Path) -> None:
    one, other = sample_members(1), sample_members(2)
    again = [(name.replace("00001", "copy"), data) for name, data in one]
    without = [("lonely.png", one[0][1]), ("lonely.txt", b"the same image without a group")]
    a = write_tar(tmp_path / "a.tar", [*one, *other, *again])
    b = write_tar(tmp_path / "b.tar", [*other[1:], ("00002.png", encoded(drawing(7)[0])), *without])
    found = check_shards(tmp_path, workers=1, quiet=True).duplicates
    assert (found.pictures, found.pictures_apart) == (2, 1)
    assert found.picture_examples[0] == [f"{b}/lonely", f"{a}/00001"]
    assert sorted(found.picture_examples[1]) == [f"{a}/00001", f"{a}/copy"]


def test_json_has_the_printed_numbers(tmp_path: Path, shards: Path, run: Command, tiny_model: Path) -> None:
    write_tar(tmp_path / "set" / "a.tar", bad_members())
    options = (tmp_path / "set", "--batch-size", 10, "--tokenizer", tiny_model)
    code, out, _ = run(*options)
    again, as_json, _ = run(*options, "--json")
    assert code == again == 1
    facts = json.loads(as_json)
    (one,) = facts["sets"]
    assert f"1 shard, {one['samples']} samples, {one['bytes'] / 1e6:,.1f} MB" in out
    assert ", ".join(f"{kind} {count}" for kind, count in one["extensions"].items()) in out
    characters, tokens, plan = one["characters"], one["tokens"], facts["plan"]
    assert f"{characters['smallest']} to {characters['largest']} characters, median {characters['median']}" in out
    assert f"{tokens['cut']} texts are truncated to the model's context length of {tokens['context_length']}" in out
    assert tokens["context_length"] == 12
    assert f"{plan['steps_per_epoch']} steps per epoch with a batch size of {plan['batch_size']}," in out
    for kind, count in facts["problems"].items():
        assert f"problem     {count} {kind}\n" in out
    for example in facts["examples"]:
        assert f"{example['shard']} {example['key']}: {example['reason']}\n" in out
    for sentence in facts["stops"]:
        assert f"  - {sentence}\n" in out
    assert facts["bad_samples"] == 6


def test_tokens_are_counted_before_truncation(tiny_model: Path, hf_model: Path) -> None:
    long = "a red square " * 10
    for model, lengths in ((tiny_model, [5, 32]), (hf_model, [5, 32])):
        tokenise = registry.build_tokenizer(str(model))
        assert tokenise.lengths(["a red square", long]) == lengths
        assert tokenise(["a red square"]).count_nonzero() == 5
        assert tokenise.context_length == 12
    with pytest.raises(InputError, match="the nearest: ViT-B-32"):
        registry.build_tokenizer("ViT-B-33")


def test_image_sizes(tmp_path: Path) -> None:
    members = [
        (f"{n}.{kind}", data)
        for n, size in enumerate([(40, 300), (100, 90), (500, 400)])
        for kind, data in (("png", encoded(Image.new("RGB", size))), ("txt", b"one two three"))
    ]
    result = check_shards(
        write_tar(tmp_path / "a.tar", members), workers=1, tokens=TokenCounter(count_words, 2), quiet=True
    )
    (facts,) = result.sets
    assert facts.shorter_side == Spread(40, 90, 400)
    assert (facts.decoded, facts.small_pictures) == (3, 1)
    assert facts.smallest_picture is not None
    assert facts.largest_picture is not None
    assert (facts.smallest_picture.key, facts.largest_picture.key) == ("1", "2")
    assert (facts.largest_picture.width, facts.largest_picture.height) == (500, 400)
    assert facts.tokens is not None
    assert (facts.tokens.lengths, facts.tokens.cut) == (Spread(3, 3, 3), 3)


def test_the_result_does_not_depend_on_the_number_of_workers(tmp_path: Path, shards: Path) -> None:
    damaged_set(tmp_path / "set", shards)
    write_tar(tmp_path / "set" / "6-bad.tar", bad_members())
    one, three = (
        check_shards(tmp_path / "set", batch_size=8, tokens=TokenCounter(count_words, 4), workers=workers, quiet=True,
              list_file=tmp_path / f"{workers}.jsonl")
        for workers in (1, 3)
    )  # fmt: skip
    assert one == three
    assert (tmp_path / "1.jsonl").read_text() == (tmp_path / "3.jsonl").read_text()


def _kill_this_process(texts: list[str]) -> list[int]:
    os.kill(os.getpid(), signal.SIGKILL)
    return [len(texts)]


def test_a_killed_worker_is_reported_in_one_sentence(shards: Path) -> None:
    with pytest.raises(RunStopped, match=r"died .killed by the system, .* fewer --workers"):
        check_shards(shards, tokens=TokenCounter(_kill_this_process, 4), workers=2, quiet=True)


def test_too_few_samples_and_wrong_fields_are_findings(shards: Path, tmp_path: Path, run: Command) -> None:
    code, out, _ = run(shards, "--batch-size", 64)
    assert code == 1
    assert "the shards hold 48 samples, fewer than one global batch of 64" in out
    fields = DataConfig(train=str(shards), fields=FieldsConfig(captions="words", text="caption"))
    result = check_shards(fields, workers=1, quiet=True, sheet_file=tmp_path / "none.png")
    assert not result.ok
    assert result.stops[0].startswith("48 bad samples, 100.00%; ")
    assert "fields.text: no sample in 3 shards" in result.stops[1]
    assert not (tmp_path / "none.png").exists()


def test_indexes_are_written(shards: Path, tmp_path: Path, run: Command) -> None:
    copied = tmp_path / "set"
    shutil.copytree(shards, copied)
    assert run(copied, "--no-decode", "--index")[0] == 0
    written = sorted(copied.glob(f"*{SUFFIX}"))
    assert [len(load_index(path)) for path in written] == [20, 17, 11]
    cache = tmp_path / "cache"
    check_shards(
        DataConfig(train=str(shards), remote=RemoteConfig(folder=str(cache))), workers=1, decode=False, quiet=True
    )
    assert len(list((cache / "index").glob(f"*{SUFFIX}"))) == 3


def test_an_unwritable_index_is_an_error(shards: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no room")

    monkeypatch.setattr(shard, "store_index", refuse)
    result = check_shards(shards, workers=1, decode=False, index=True, quiet=True)
    assert result.stops == ["3 indexes could not be written next to their shards: no room."]
    # Not an error in the cache folder, where an index only saves time.
    assert check_shards(shards, workers=1, decode=False, quiet=True).ok


def test_a_list_that_cannot_be_written_is_said_with_all_that_was_found(shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(shards, folder)
    (folder / "shards.json").mkdir()
    result = check_shards(folder, workers=1, index=True, quiet=True)
    assert result.sets[0].samples == 48
    assert not result.ok
    assert re.search(r"^index: .*/shards\.json cannot be written \(.*directory", result.stops[0])


def test_the_contact_sheet(shards: Path, tmp_path: Path, run: Command) -> None:
    code, out, _ = run(shards, "--sheet", tmp_path / "sheet.png")
    assert code == 0
    assert f"Contact sheet: {tmp_path}/sheet.png" in out
    with Image.open(tmp_path / "sheet.png") as image:
        image.load()
        assert image.format == "PNG"
        assert image.width == 2 * 24 + 6 * 184 + 5 * 14
    first = (tmp_path / "sheet.png").read_bytes()
    run(shards, "--sheet", tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").read_bytes() == first  # the same samples in each run
    # Bad samples are skipped.
    members = [m for n in range(3) for m in sample_members(n)] + [("bad.png", b"x"), ("bad.txt", b"caption")]
    write_tar(tmp_path / "few.tar", members)
    assert run(tmp_path / "few.tar", "--sheet", tmp_path / "few.webp")[0] == 1
    with Image.open(tmp_path / "few.webp") as image:
        assert image.format == "WEBP"
    # A key that is not UTF-8.
    odd = [(name.replace("00000", "\udcff"), data) for name, data in sample_members(0)]
    assert run(write_tar(tmp_path / "odd.tar", odd), "--sheet", tmp_path / "odd.png")[0] == 0


def test_checking_the_data_of_a_config(
    write_config: Callable[..., Path], shards: Path, tmp_path: Path, run: Command
) -> None:
    code, out, _ = run("--config", write_config())
    assert code == 0
    assert "4 steps per epoch with a batch size of 12," in out
    assert "context length" in out
    assert "0 below 32" in out
    sources = [{"shards": str(shards), "name": "base"}, {"shards": str(shards / "part-0.tar"), "repeat": 2.0}]
    code, out, _ = run("--config", write_config(data={"sources": sources}), "--json")
    facts = json.loads(out)
    assert [(one["name"], one["samples"]) for one in facts["sets"]] == [("base", 48), ("1", 20)]
    assert facts["plan"]["samples_per_epoch"] == 88
    longer_than_a_name = f"data.captions=[{', '.join(['0.5'] * 80)}]"
    assert run(longer_than_a_name, "--config", write_config())[0] == 0
    code, out, _ = run(shards / "part-1.tar", "--config", write_config(), "--batch-size", 5)
    assert "1 shard, 17 samples" in out
    assert "3 steps per epoch with a batch size of 5, 2 samples dropped per epoch" in out


def test_remote_shards(shards: Path, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for path in shards.glob("*.tar"):
        memory.pipe(f"/checked/{path.name}", path.read_bytes())
    remote = RemoteConfig(folder=str(tmp_path / "memory"), retries=0)
    result = check_shards(DataConfig(train="memory://checked", remote=remote), workers=1, index=True, quiet=True)
    local = check_shards(shards, workers=1, quiet=True)
    assert result.ok
    assert result.sets[0].samples == local.sets[0].samples == 48
    assert result.sets[0].characters == local.sets[0].characters
    assert "only local shards have theirs next to them" in result.notes[0]

    server = Server(shards)
    try:
        store = RemoteConfig(folder=str(tmp_path / "http"), retries=0)
        spec = server.url + "/part-{0..3}.tar"
        result = check_shards(
            DataConfig(train=spec, remote=store), workers=1, list_file=tmp_path / "bad.jsonl", quiet=True
        )
        (gone,) = problems(tmp_path / "bad.jsonl")
        assert gone["shard"] == f"{server.url}/part-3.tar"
        assert gone["reason"].startswith("shard out of reach: ")
        assert result.sets[0].samples == 48
        assert len(result.stops) == 1
        # An error page is downloaded again, once the server has the shard.
        path, store = shards / "part-3.tar", RemoteConfig(folder=str(tmp_path / "busy"), retries=0)
        for data, is_ok in ((b"<html>busy</html>", False), ((shards / "part-0.tar").read_bytes(), True)):
            path.write_bytes(data)
            config = DataConfig(train=f"{server.url}/{path.name}", remote=store)
            assert check_shards(config, workers=1, quiet=True).ok == is_ok
        path.unlink()
        # A cache of one shard: shards evict each other, and none is missed.
        room = (shards / "part-0.tar").stat().st_size * 1.2 / 1e9
        small = RemoteConfig(folder=str(tmp_path / "small"), gigabytes=room)
        spec = server.url + "/part-{0..2}.tar"
        assert check_shards(DataConfig(train=spec, remote=small), workers=3, quiet=True).ok
    finally:
        server.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "shards: missing; give a tar"),
        (("SHARDS", "--batch-size", "10", "--world-size", "3"), "batch-size: 10 is not divisible by 3 processes"),
        (("SHARDS", "--world-size", "3"), "batch-size: missing; "),
        (("SHARDS", "--sheet", "sheet.txt"), "sheet: sheet.txt has no extension of an image format"),
        (("SHARDS", "--sheet", "sheet.psd"), "sheet: sheet.psd has no extension of an image format"),
        (("SHARDS", "--list", "/nowhere/bad.jsonl"), "list: /nowhere/bad.jsonl cannot be written"),
        (("SHARDS", "--tokenizer", "ViT-B-33"), "the nearest: ViT-B-32"),
        (("SHARDS", "--config", "none.yaml"), "config: the file none.yaml does not exist"),
        (("pipe:cat a.tar",), "would run a command"),
        (("SHARDS", "SHARDS"), "is named twice"),
    ],
)
def test_mistakes_are_one_sentence(options: tuple[str, ...], message: str, shards: Path, run: Command) -> None:
    code, _, err = run(*(str(shards) if option == "SHARDS" else option for option in options))
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


def test_control_characters_in_names_are_escaped(tmp_path: Path, run: Command) -> None:
    members = [*sample_members(0), ("a\x1b[2J.txt", b"no image"), ("\udcff.txt", b"none either")]
    code, out, _ = run(write_tar(tmp_path / "a.tar", members))
    assert code == 1
    assert "\x1b" not in out
    assert r"a\x1b[2J: no image" in out
    assert r"\xff: no image" in out


def test_members_that_training_does_not_use_are_read_too(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = [*sample_members(0), ("00000.npy", bytes(3_000_000)), *sample_members(1)]
    path = write_tar(tmp_path / "a.tar", members)
    broken = range(1_000_000, 2_000_000)
    pread = os.pread

    def failing(file: int, size: int, offset: int) -> bytes:
        if offset in broken:
            raise OSError(5, "Input/output error")
        return pread(file, size, offset)

    monkeypatch.setattr(os, "pread", failing)
    result = check_shards(path, workers=1, quiet=True)
    assert result.ok
    assert result.problems == {"unreadable member that training does not use": 1}
    assert result.examples[0].key == "00000"


def test_spreads() -> None:
    assert Spread.of({}) is None
    assert Spread.of({3: 1}) == Spread(3, 3, 3)
    assert Spread.of({1: 2, 5: 1, 9: 2}) == Spread(1, 5, 9)
    assert Spread.of({1: 1, 2: 1}) == Spread(1, 1, 2)


def test_a_set_without_a_usable_shard(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_text("no tar")
    result = check_shards(tmp_path, workers=1, quiet=True, sheet_file=tmp_path / "sheet.png")
    assert not result.ok
    assert "  members   none" in report.result_lines(result)
    assert check_shards(tmp_path, workers=1, batch_size=2, quiet=True).plan is None


def test_captions_of_which_the_end_is_not_read_are_told(tmp_path: Path, run: Command, tiny_model: Path) -> None:
    image, limit = encoded(drawing(0)[0]), 12 * BPE_CHARACTERS
    captions = ("a red square", "x" * limit, "x" * (limit + 1), "a red square " * 1000)
    members = [m for n, text in enumerate(captions) for m in ((f"{n}.png", image), (f"{n}.txt", text.encode()))]
    _, out, _ = run(write_tar(tmp_path / "a.tar", members), "--tokenizer", tiny_model)
    assert "3 texts are truncated to the model's context length of 12; 2 texts of more than 768 char" in out
