"""Each mistake, as a user makes it: one sentence on the error stream, exit code 2, before any training."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import encoded, sample_members, write_tar
from helpers.worlds import run_programs
from PIL import Image

from mmrl import cli

WriteConfig = Callable[..., Path]


def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> str:
    """Runs `mmrl …` in this process; returns its one sentence."""
    monkeypatch.setattr(sys, "argv", ["mmrl", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    error = capsys.readouterr().err
    assert end.value.code == 2, error
    assert error.startswith("mmrl: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    "command", ["check", "pack", "train", "train --data", "plan", "eval", "embed", "index", "export"]
)
def test_a_path_that_cannot_be_one_is_a_sentence(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    words = {"pack": ["out"], "eval": ["s"], "embed": ["s", "o"], "index": ["o"], "export": ["o", "--dim", "8"]}
    for path, says in (("a" * 300, "'aaa"), ("file/config.yaml", "file/config.yaml")):
        assert says in said(capsys, monkeypatch, *command.split(), path, *words.get(command, ()))


def test_an_empty_argument_is_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments in (
        ("check", ""),
        ("pack", "", "out"),
        ("eval", "", "starter:val-concepts"),
        ("embed", "run", "", "o"),
    ):
        assert "is empty, as of a shell variable that is not set" in said(capsys, monkeypatch, *arguments)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("nesting.dims=[16,32]", "dims: 32 is out of range; this embedding has dims 1 to 16"),
        ("nesting.dims=[8,8]", "dims: 8 is given twice"),
        ("nesting.weights=[1]", "weights: 1 given for 3 dims"),
        ("nesting.dims_per_step=2", "dims_per_step was removed: all dims are trained in every step"),
        ("nesting.start=1", "instead of start: 1 nesting.rotate_at_end: true; else remove the key.\n"),
        (
            "nesting.prefix_gradient=1.5",
            "nesting.prefix_gradient.end: Input should be less than or equal to 1; got 1.5",
        ),
        ("nesting={dims: [8], rotation: false, prefix_gradient: 0.5}", "use 1 or remove the key"),
        ("nesting.dims=[8,4]", "[8, 4] must include the full dim, 16, which a rotation preserves; add it, or set"),
        (
            "nesting={dims: [16, 8, 4], weights: [1, 0, 2]}",
            "nesting.weights: [8] have weight 0 and would not be trained; remove them from nesting.dims",
        ),
        ("nesting={dims: [16], rotate_at_end: true}", "rotate_at_end: serves dims below 16, and nesting.dims has none"),
        ("loss.name=sigmoid", "sigmoid trains without a learnable rotation; set nesting.rotation: false"),
        ("model.towers=text", "config.yaml: model.towers: text trains by loss.text_text alone"),
        ("engine.deepspeed={gradient_clipping: {x: 3}}", "deepspeed.gradient_clipping: {'x': 3} contradicts 0.0"),
        ("loss.name=siglip", "loss.name: Input should be 'infonce' or 'sigmoid'; got 'siglip'"),
        ("loss={name: sigmoid, label_smoothing: 0.1}", "label_smoothing and distillation require name: infonce"),
        ("train.batchsize=4", "unknown key 'train.batchsize'. Did you mean 'batch_size'?"),
        ("evaluation.sets.val.caption=1", "unknown key 'evaluation.sets.val.caption'. Did you mean 'captions'?"),
        ("optim.lr=fast", "optim.lr: Input should be a valid number; got 'fast'"),
        ("train.duration=2 weeks", "train.duration: '2 weeks' is not a duration; write '2000 steps'"),
        ("train.batch_size=1000", "hold 48 samples, fewer than one global batch of 1000"),
        ("data.train=missing.tar", "shards: missing.tar does not exist"),
        ("data.train=x-{0..9}.tar", "names 10 files and 10 of them do not exist, such as x-0.tar"),
        ("data.fields.image=[tif]", "fields.image: no sample"),
        ("data.fields.captions=texts", "fields.captions: none of 48 samples"),
        ("evaluation.best={set: test, dim: 8}", "there is no evaluation set 'test'. Allowed: val"),
        ("evaluation.best={set: val, dim: 32}", "evaluation.best.dim: 32 is not evaluated"),
        ("evaluation.best={set: val, dim: 8, metric: r10}", "'r10' is not measured; allowed: R@1"),
        ("model.name=ViT-B-33", "open_clip has no model 'ViT-B-33'; the nearest: ViT-B-32"),
        ("optim.betas=[0.9,1.5]", "optim.betas.1: Input should be less than 1; got 1.5"),
        ("data.captions=[0,0]", "data.captions: probabilities must be finite, not negative and not all zero"),
        ("data.augment.zoom=[1.2,0.8]", "data.augment.zoom: must be [minimum, maximum]"),
        ("data.augment.random_resized_crop=[0,1]", "data.augment.random_resized_crop: must be [minimum, maximum]"),
        ("data.augment.jpeg=[0,90]", "data.augment.jpeg: must be [minimum, maximum], both above 0 and at most 100"),
        ("data.augment.blur=0.1", "data.augment.blur: Input should be a valid list; got 0.1"),
        ("data.augment.second.degrade=2", "data.augment.second.degrade: Input should be less than or equal to 1"),
        ("data.augment.second.second.flip=1", "data.augment.second: second images have no second image of their own"),
        ("resume=always", "resume: String should match pattern '^auto$'; got 'always'"),
        ("batch_size", "write KEY=VALUE"),
    ],
)
def test_a_wrong_value_is_named_with_its_remedy(
    write_config: WriteConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    override: str,
    says: str,
) -> None:
    assert says in said(capsys, monkeypatch, "train", write_config(), override)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_compiling_without_a_compiler_is_refused_before_the_run(
    write_config: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "")
    said_so = said(capsys, monkeypatch, "train", write_config(), "engine.compile=true")
    assert "engine.compile: torch.compile needs a C++ compiler, and none is in PATH" in said_so


def test_a_config_that_is_not_there_or_no_yaml(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "nothing.yaml does not exist" in said(capsys, monkeypatch, "train", "nothing.yaml")
    path = tmp_path / "bad.yaml"
    for text, says in (("a: [1", "not valid YAML"), ("run: a\nrun: b", "'run' is given twice"), ("", "holds no keys")):
        path.write_text(text)
        assert says in said(capsys, monkeypatch, "train", path)
    path.write_text("run: x")
    assert "the key 'model' is missing" in said(capsys, monkeypatch, "train", path)


def test_eval_and_export_name_what_is_wrong(
    tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = "open_clip:mmrl-starter"
    out = tmp_path / "out"
    for command in (("eval", shards), ("rotate", shards, out), ("embed", shards, out), ("export", out, "--dim=8")):
        assert "its towers would be random" in said(capsys, monkeypatch, command[0], model, *command[1:])
    assert "none does not exist" in said(capsys, monkeypatch, "eval", model, "none", "--random-weights")
    model = f"{model}:random"
    assert "model: nowhere does not exist" in said(capsys, monkeypatch, "eval", "nowhere", shards)
    assert "dims: 300 is out of range" in said(capsys, monkeypatch, "eval", model, shards, "--dims", "300")
    assert "'big' is not a list of integers" in said(capsys, monkeypatch, "eval", model, shards, "--dims", "big")
    assert "two sets are called" in said(capsys, monkeypatch, "eval", model, shards, shards)
    export = ("export", model, tmp_path / "out", "--dim", "8")
    assert "format: 'open-clip' is unknown. Did you mean 'open_clip'?" in said(
        capsys, monkeypatch, *export, "--format", "open-clip"
    )
    assert "quantize: the format bundle has float32" in said(capsys, monkeypatch, *export, "--quantize", "int8")
    assert "this model has vision_cfg.timm_model_name" in said(capsys, monkeypatch, *export, "--format", "transformers")
    assert "dim: 0 is out of range" in said(capsys, monkeypatch, "export", model, tmp_path / "out", "--dim", "0")


def test_a_batch_that_the_processes_cannot_share(write_config: WriteConfig, tmp_path: Path) -> None:
    results = run_programs(2, cli.main, ["train", str(write_config()), "train.batch_size=15"], tmp_path)
    assert [code for code, _, _ in results] == [2, 2]
    assert "train.batch_size: 15 cannot be divided over 2 processes; use a multiple of 2, e.g. 16." in results[0][2]
    assert "mmrl/train/" not in results[0][2]


def damaged(folder: Path, bad: int) -> Path:
    """Two shards of 40 samples, `bad` of them damaged in various ways, the second one cut short."""
    picture = encoded(Image.new("RGB", (32, 32)))
    members = []
    for number in range(40):
        if number < bad:
            kinds = [(picture[:50], b"a caption"), (picture, b" "), (b"", b"a caption")]
            data, caption = kinds[number % 3]
            members += [(f"bad{number}.png", data), (f"bad{number}.txt", caption)]
        else:
            members += sample_members(number)
    write_tar(folder / "a.tar", [*members, ("00039.cls", b"3")])
    whole = write_tar(folder / "b.tar", [m for n in range(40, 80) for m in sample_members(n)]).read_bytes()
    (folder / "b.tar").write_bytes(whole[: len(whole) * 3 // 4])
    return folder


def test_a_few_bad_samples_are_listed_and_training_goes_on(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"train": str(damaged(tmp_path / "data", bad=3)), "max_bad_fraction": 0.07}
    path = write_config(data=data, evaluation={}, train={"batch_size": 12, "duration": "2 epochs"})
    monkeypatch.setattr(sys, "argv", ["mmrl", "train", str(path)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    listed = [json.loads(line) for line in (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()]
    reasons = {line["key"]: line["reason"] for line in listed}
    assert reasons[""].startswith("truncated tar")
    assert {"bad0", "bad1", "bad2"} <= reasons.keys()
    assert "caption" in reasons["bad1"]
    printed = " ".join(capsys.readouterr().out.split())
    assert "1 problems in the shards (1 truncated tar), e.g. " in printed
    assert "1 members that no field uses: .cls 1." in printed


def test_too_many_bad_samples_stop_the_run(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"train": str(damaged(tmp_path / "data", bad=30)), "max_bad_fraction": 0.01}
    path = write_config(data=data, evaluation={}, train={"batch_size": 12, "duration": "20 epochs"})
    monkeypatch.setattr(sys, "argv", ["mmrl", "train", str(path)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    error = capsys.readouterr().err
    assert end.value.code == 1
    assert "of the samples are bad, more than data.max_bad_fraction 1.00% allows" in error
    assert "bad_samples.jsonl lists them" in error
    assert (tmp_path / "run" / "bad_samples.jsonl").stat().st_size > 500
