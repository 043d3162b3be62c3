"""Evaluation sets of every kind: from files to retrieval.json, in one process and in several."""

import json
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clip_benchmark.metrics.zeroshot_classification import zero_shot_classifier
from conftest import drawing, encoded, write_tar
from helpers.encoders import export_bundle, save_random_encoder
from helpers.labelled import CLASSES, TEMPLATES, labelled_members, write_labelled
from helpers.worlds import run_in_world
from rich.console import Console

from mmrl.config import load_config
from mmrl.data.sources import open_reader
from mmrl.distributed import comm
from mmrl.errors import InputError
from mmrl.evaluate import sets, zeroshot
from mmrl.evaluate.command import EvalOptions, evaluate_model
from mmrl.evaluate.degrade import KINDS, degrade_image, sample_rows
from mmrl.evaluate.directions import CROSS_MODAL, DIRECTIONS
from mmrl.evaluate.readers import draw_shards, open_set
from mmrl.evaluate.sets import Embedded
from mmrl.evaluate.zeroshot import class_embeddings, read_classes, score_classification, score_zero_shot
from mmrl.model import bundle, towers, two_tower
from mmrl.model.bundle import Bundle
from mmrl.model.towers import TowersConfig
from mmrl.model.two_tower import LogitScaleConfig
from mmrl.train.trainer import train


@pytest.fixture(scope="module")
def model_folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of random weights, nested at 4, 8 and 16."""
    torch.manual_seed(2)
    built = towers.build(TowersConfig(name=str(tiny_model)))
    model = two_tower.from_towers(built, LogitScaleConfig(), 3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    one = bundle.make_bundle(model, built, (4, 8, 16))
    folder = tmp_path_factory.mktemp("encoder")
    bundle.save(one, folder, one.state(), {})
    return folder


@pytest.fixture(scope="module")
def encoder(model_folder: Path) -> Bundle:
    return bundle.load(model_folder)


def evaluate(model: Path, *shards: str | Path, out: Path | None = None, **options: Any) -> dict[str, Any]:
    return evaluate_model(str(model), [str(one) for one in shards], EvalOptions(**options), out, quiet=True)


def embedded_of(groups: Sequence[int], captions: Sequence[str], image_of_text: Sequence[int]) -> Embedded:
    rng = torch.Generator().manual_seed(0)
    return Embedded(
        keys=[str(number) for number in range(len(groups))],
        captions=list(captions),
        image_ND=torch.randn(len(groups), 8, generator=rng),
        text_MD=torch.randn(len(captions), 8, generator=rng),
        image_of_text_M=torch.tensor(image_of_text),
        image_group_N=torch.tensor(groups),
        bad=[],
        sample_indices=list(range(len(groups))),
    )


def test_a_direction_without_positives_is_left_out() -> None:
    one_each = embedded_of([-2, -3, -4], ["a", "b", "c"], [0, 1, 2])
    assert set(sets.score(one_each, [8], directions=DIRECTIONS)["chance"]) == set(CROSS_MODAL)
    with pytest.raises(InputError, match="directions: this set has no positives in text_to_text"):
        sets.score(one_each, [8], directions=["text_to_text"])
    paraphrased = embedded_of([-2, -3, -4], ["a", "b", "c", "d"], [0, 1, 2, 2])
    assert set(sets.score(paraphrased, [8], directions=DIRECTIONS)["chance"]) == {*CROSS_MODAL, "text_to_text"}
    products = embedded_of([7, 7, -4], ["a", "a", "c"], [0, 1, 2])
    assert set(sets.score(products, [8], directions=DIRECTIONS)["chance"]) == {*CROSS_MODAL, "image_to_image"}


@pytest.mark.parametrize("side", ["text", "image"])
@pytest.mark.parametrize("folds", [1, 2])
def test_second_members_are_the_gallery(side: str, folds: int) -> None:
    """The oracle: the same vectors as the images of text→image."""
    pairs = embedded_of([7, 7, 9, 4], ["a", "b", "c", "d"], [0, 1, 2, 3])
    expected = sets.score(pairs, [8, 3], directions=["text_to_image"], folds=folds)
    seconds, none = (pairs.image_ND, torch.arange(4)), torch.zeros(4, 0)
    own = {"image_ND": none} if side == "text" else {"image_ND": pairs.text_MD, "text_MD": none}
    alone = replace(pairs, second={side: seconds}, **own)
    found = sets.score(alone, [8, 3], directions=DIRECTIONS, folds=folds)
    for name in ("chance", "num_queries"):
        assert found[name] == {f"{side}_to_{side}": expected[name]["text_to_image"]}
    for dim, scores in found["dims"].items():
        assert scores == {f"{side}_to_{side}": expected["dims"][dim]["text_to_image"]}
    assert "ceiling" not in found


def test_a_verbatim_copy_of_a_caption_is_not_a_positive() -> None:
    repeated = embedded_of([7, 7, 9, 9], ["a", "b", "a", "x", "y"], [0, 0, 1, 2, 3])
    without = embedded_of([7, 7, 9, 9], ["a", "b", "x", "y"], [0, 0, 2, 3])
    without = replace(without, text_MD=repeated.text_MD[[0, 1, 3, 4]])
    one, other = (sets.score(e, [8], directions=["text_to_text"])["dims"] for e in (repeated, without))
    assert one == other


def test_captions_that_a_tokenizer_makes_equal_are_no_positives() -> None:
    """Otherwise random weights would score 100 %."""
    cased = embedded_of([7, 7, 9], ["A red  hat", "a Red hat", "b"], [0, 1, 2])
    with pytest.raises(InputError, match="no positives in text_to_text"):
        sets.score(cased, [8], directions=["text_to_text"])


def test_no_embedding_exceeds_the_ceiling_and_a_perfect_one_reaches_it() -> None:
    """Captions: x is shared by groups 1 and 2, y by 2 and 3 (twice), each of 1 and 4 has one of its own."""
    captions, image_of_text = ["x", "own", "x", "y", "y", "y", "mine"], [0, 0, 1, 1, 2, 3, 4]
    one = embedded_of([1, 2, 3, 3, 4], captions, image_of_text)
    expected = {"image_to_text": 2 / 5, "text_to_image": (1 + 1 + 2 + 1) / 7}
    names = sorted(set(captions))

    def scores(caption_CD: torch.Tensor, image_ND: torch.Tensor) -> dict[str, float]:
        text_MD = caption_CD[[names.index(caption) for caption in captions]]
        result = sets.score(replace(one, text_MD=text_MD, image_ND=image_ND), [8])
        assert {direction: found["R@1"] for direction, found in result["ceiling"].items()} == pytest.approx(expected)
        return {direction: found["R@1"] for direction, found in result["dims"]["8"].items()}

    caption_CD = torch.eye(8)[: len(names)]
    won = {0: ["x", "own"], 1: [], 2: ["y"], 3: ["y"], 4: ["mine"]}  # the captions that find each image
    image_ND = torch.stack([sum((caption_CD[names.index(c)] for c in won[n]), torch.eye(8)[7]) for n in range(5)])
    image_ND[0] += caption_CD[names.index("own")]
    assert scores(caption_CD, image_ND) == pytest.approx(expected)
    rng = torch.Generator().manual_seed(1)
    for _ in range(100):
        found = scores(torch.randn(len(names), 8, generator=rng), torch.randn(5, 8, generator=rng))
        assert all(found[direction] <= expected[direction] for direction in expected)


def test_eval_prints_the_ceiling(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = [
        (f"{n}.{kind}", data)
        for n in range(4)
        for kind, data in (("png", encoded(drawing(n)[0])), ("txt", b"same" if n < 3 else b"other"))
    ]
    shard = write_tar(tmp_path / "a.tar", members)
    result = evaluate_model(str(model_folder), [str(shard)], EvalOptions())
    every = {"R@5": 1.0, "R@10": 1.0}
    assert result["ceiling"] == {"image_to_text": {"R@1": 0.25, **every}, "text_to_image": {"R@1": 0.5, **every}}
    shown = " ".join(capsys.readouterr().out.split())
    assert "equal captions, so no model can exceed image→text R@1 25.0 %; text→image" in shown
    assert "limit │ 25.0 │ 100.0 │ 100.0 │ 50.0 │ 100.0 │ 100.0" in shown


def test_equal_passages_of_other_groups_limit_the_recall(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Questions 0 and 1 have one passage, 2 its own. The passages of 3 and 4 are equal too, but of one group."""
    encoder = save_random_encoder(str(tiny_model), tmp_path / "encoder", towers="text")
    passages = [("same", ""), ("same", ""), ("other", ""), ("third", "g"), ("third", "g"), ("", "g")]
    members = [
        (f"{n}.json", json.dumps({"captions": f"question {n}", "second_text": text, "group": group or None}).encode())
        for n, (text, group) in enumerate(passages)
    ]
    shard = write_tar(tmp_path / "a.tar", members)
    result = evaluate_model(str(encoder), [str(shard)], EvalOptions())
    assert result["num_queries"] == {"text_to_text": 6}
    assert result["ceiling"]["text_to_text"] == {"R@1": 4 / 6, "R@5": 1.0, "R@10": 1.0}
    shown = " ".join(capsys.readouterr().out.split())
    assert "equal texts, so no model can exceed text→text R@1 66.7 %" in shown


def test_a_query_is_not_its_own_positive() -> None:
    """Two images per group: without the query itself, one positive."""
    pairs = embedded_of([5, 5, 6, 6], ["a", "b", "c", "d"], [0, 1, 2, 3])
    rows_ND = torch.eye(8)[:4]
    rows_ND[1] = rows_ND[0] + 0.1 * rows_ND[2]
    result = sets.score(replace(pairs, image_ND=rows_ND), [8], (1,), directions=["image_to_image"])
    assert result["dims"]["8"]["image_to_image"]["R@1"] == 0.5  # the second pair is orthogonal
    assert result["chance"]["image_to_image"]["R@1"] == pytest.approx(1 / 3)


def test_nan_embeddings_are_reported() -> None:
    broken = embedded_of([1, 2], ["a", "b"], [0, 1])
    broken.text_MD[1, 3] = torch.nan
    with pytest.raises(InputError, match="texts: contains values that are not finite"):
        sets.score(broken, [8])


def test_every_direction_from_shards(model_folder: Path, shards: Path, tmp_path: Path) -> None:
    result = evaluate(model_folder, f"val={shards}", out=tmp_path, ks=(3,))
    assert json.loads((tmp_path / "retrieval.json").read_text()) == result
    assert result["dims"] == result["sets"]["val"]["dims"]
    assert list(result["dims"]) == ["16", "8", "4"]
    assert set(result["dims"]["4"]) == set(result["chance"]) == set(DIRECTIONS)
    assert {"R@1", "R@3", "R@5", "R@10", "mAP", "mAP@R", "nDCG@10", "MRR", "median_rank", "mean_rank"} == set(
        result["dims"]["16"]["image_to_image"]
    )
    some = evaluate(model_folder, shards, directions=["text_to_image"], dims=[8], ks=(3,))
    assert some["dims"]["8"]["text_to_image"] == result["dims"]["8"]["text_to_image"]


def test_an_exported_encoder_scores_as_its_source(model_folder: Path, shards: Path, tmp_path: Path) -> None:
    export_bundle(str(model_folder), tmp_path / "small", 8)
    source, exported = (evaluate(folder, shards, dims=[8, 4]) for folder in (model_folder, tmp_path / "small"))
    for dim in ("8", "4"):
        for way, scores in source["dims"][dim].items():
            # The projections are truncated: rounding may swap two nearly equal scores.
            assert exported["dims"][dim][way] == pytest.approx(scores, abs=1e-4)


def test_a_folder_of_images_is_an_evaluation_set(model_folder: Path, shards: Path, tmp_path: Path) -> None:
    for number in range(48):
        image, caption, group = drawing(number)
        (tmp_path / f"{number:05}.png").write_bytes(encoded(image))
        (tmp_path / f"{number:05}.txt").write_text(caption)
        (tmp_path / f"{number:05}.json").write_text(
            json.dumps({"captions": [caption, f"{caption}, again"], "group": group})
        )
    (tmp_path / "alone.txt").write_text("no image")
    (tmp_path / "uncaptioned.png").write_bytes(encoded(drawing(1)[0]))
    (tmp_path / "zz.png").write_bytes(b"not an image")
    (tmp_path / "zz.txt").write_text("damaged")
    result, packed = evaluate(model_folder, tmp_path), evaluate(model_folder, shards)
    assert result["num_bad"] == 3
    assert result["dims"] == packed["dims"]


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    return write_labelled(tmp_path / "wds_colours")


def test_classification_equals_clip_benchmarks(model_folder: Path, encoder: Bundle, labelled: Path) -> None:
    result = evaluate(model_folder, labelled, dims=[16, 5])
    images = torch.stack([encoder.image_spec.pixels(drawing(n)[0]) for n in range(40)])
    label_N = torch.arange(40) % 4
    templates = (labelled / TEMPLATES).read_text().splitlines()
    with torch.no_grad():
        image_ND = encoder.model.encode_image(images)
    for dim in (16, 5):

        class Truncated:
            """The exported encoder of that dim."""

            def encode_text(self, tokens: torch.Tensor, dim: int = dim) -> torch.Tensor:
                return encoder.model.encode_text(tokens)[:, :dim]

        weights_dC = zero_shot_classifier(Truncated(), encoder.tokenise, CLASSES, templates, "cpu", amp=False)
        logits_NC = torch.nn.functional.normalize(image_ND[:, :dim], dim=-1) @ weights_dC
        scores = result["dims"][str(dim)]["classification"]
        assert scores["top1"] == pytest.approx((logits_NC.argmax(1) == label_N).double().mean().item(), abs=1e-6)
        by_class = [(logits_NC.argmax(1) == c)[label_N == c].double().mean().item() for c in range(4)]
        assert scores["mean_per_class"] == pytest.approx(np.mean(by_class), abs=1e-6)
        assert scores["top5"] == 1
    assert result["num_classes"] == 4
    assert result["chance"]["classification"]["top1"] == 0.25


def test_labels_out_of_range_are_bad_samples(encoder: Bundle, tmp_path: Path) -> None:
    labels = ["0", "3", "4", "-1", "red", "9" * 5000]
    members = [m for n, label in enumerate(labels) for m in labelled_members(n, label)]
    one = open_set(str(write_tar(tmp_path / "a.tar", members)), read_classes_of(tmp_path, CLASSES))
    assert one.classes is not None
    scores, bad = score_zero_shot(one.reader, one.classes, encoder, [16])
    assert (scores["num_images"], scores["num_bad"]) == (2, 4)
    assert [problem.kind for problem in bad] == ["no class from 0 to 3"] * 4


def read_classes_of(folder: Path, names: Sequence[str]) -> zeroshot.Classes:
    (folder / "names.txt").write_text("\n".join(names))
    return read_classes(str(folder / "names.txt"))


def test_with_a_single_class_accuracy_is_1(encoder: Bundle, tmp_path: Path) -> None:
    classes = read_classes_of(tmp_path, ["thing"])
    vectors, labels = class_embeddings(classes, encoder, [16]), torch.zeros(3, dtype=torch.int64)
    assert score_classification(torch.randn(3, 16), labels, vectors)["dims"]["16"]["classification"]["top1"] == 1


def test_imagenet_names_and_templates_are_built_in(tmp_path: Path) -> None:
    classes = read_classes("imagenet", "imagenet")
    assert len(classes.names) == 1000
    assert len(classes.prompts(0)) == 80
    assert classes.prompts(0)[0] == "a bad photo of a tench."
    assert len(read_classes("imagenet").templates) == 7
    (tmp_path / "t.txt").write_text("a photo of a {}\nno place\n")
    with pytest.raises(InputError, match=r"'no place' in .* has no \{c\}"):
        read_classes("imagenet", str(tmp_path / "t.txt"))
    with pytest.raises(InputError, match="classes: the file nowhere"):
        read_classes("nowhere.txt")


def test_clip_benchmark_captions_are_one_per_line(encoder: Bundle, tmp_path: Path) -> None:
    members = [("a.png", encoded(drawing(0)[0])), ("a.txt", b"one\ntwo\n\nthree"), ("b.png", encoded(drawing(1)[0]))]
    write_tar(tmp_path / "test" / "0.tar", [*members, ("b.txt", b"four")])
    (tmp_path / "dataset_type.txt").write_text("retrieval")
    one = open_set(str(tmp_path))
    found = sets.embed(one.reader, encoder)
    assert found.captions == ["one", "two", "three", "four"]
    assert found.image_of_text_M.tolist() == [0, 0, 0, 1]


def test_degradation_depends_on_the_key_only() -> None:
    image = torch.from_numpy(np.array(drawing(3, 96)[0])).permute(2, 0, 1)
    for kind, (_, _, amounts) in KINDS.items():
        worse = [degrade_image(image, kind, amount, "a") for amount in amounts]
        assert all(
            torch.equal(one, degrade_image(image, kind, amount, "a"))
            for one, amount in zip(worse, amounts, strict=True)
        )
        resized = [torch.nn.functional.interpolate(one[None].float(), (96, 96))[0] for one in worse]
        distances = [float((one - image).abs().mean()) for one in resized]
        assert kind == "crop" or distances == sorted(distances)
    crop = degrade_image(image, "crop", 0.25, "a")
    assert crop.shape == (3, 48, 48)
    assert not torch.equal(crop, degrade_image(image, "crop", 0.25, "b"))
    keys = [str(number) for number in range(50)]
    assert sample_rows(keys, 10) == sorted(keys.index(key) for key in [keys[row] for row in sample_rows(keys, 10)])
    assert len(sample_rows(keys, 100)) == 50


def test_degraded_images_as_queries_for_their_originals(model_folder: Path, shards: Path) -> None:
    found = evaluate(model_folder, shards, dims=[16], degrade=9)["degraded"]
    assert found["num_queries"] == 9
    assert set(found) == {"num_queries", *KINDS}
    # The images have 32 pixels: downscaling to 96 changes nothing.
    assert found["downscale"]["severities"]["96"]["16"]["R@1"] == 1
    assert found["blur"]["severities"]["0.06"]["16"]["mean_rank"] > 1


def test_a_large_set_is_subsampled_by_shard(shards: Path) -> None:
    reader = open_reader(str(shards))
    assert draw_shards(reader, None) is draw_shards(reader, 48) is reader
    drawn = draw_shards(reader, 12)
    assert len(drawn) in (17, 20, 31, 28)
    assert len(drawn) == len(draw_shards(open_reader(str(shards)), 12))


@pytest.mark.parametrize("stage", [0, 3])
def test_training_scores_a_subsampled_set_like_mmrl_eval(write_config: Callable[..., Path], stage: int) -> None:
    overrides = ["evaluation.most_samples=12", "train.duration=2 steps", f"engine.zero_stage={stage}"]
    config = load_config(write_config(), overrides)
    folder = train(config, Console(quiet=True))
    found = json.loads((folder / "retrieval.json").read_text())["sets"]["val"]
    reader = draw_shards(open_reader(config.evaluation.sets["val"].shards), 12)
    assert found["drawn"] == {"samples": len(reader), "of": 48}
    last = bundle.load(folder / "checkpoints" / "last")
    embedded = sets.embed(reader, last, captions=1)
    again = sets.score(embedded, [16, 4, 8])
    assert found["dims"].keys() == again["dims"].keys()
    for dim, ways in again["dims"].items():
        for way, scores in ways.items():
            assert found["dims"][dim][way] == pytest.approx(scores, abs=1e-4)


def _evaluate_in_a_world(folder: Path) -> None:
    torch.set_num_threads(1)
    model, shards, labelled = (folder / "paths").read_text().split("\n")
    evaluate(Path(model), shards, out=folder / "shared", degrade=5)
    evaluate(Path(model), labelled, out=folder / "classes")


def test_two_processes_score_like_one(model_folder: Path, shards: Path, labelled: Path, tmp_path: Path) -> None:
    (tmp_path / "paths").write_text(f"{model_folder}\n{shards}\n{labelled}")
    run_in_world(2, _evaluate_in_a_world, tmp_path)
    for name, expected in (
        ("shared", evaluate(model_folder, shards, degrade=5)),
        ("classes", evaluate(model_folder, labelled)),
    ):
        found = json.loads((tmp_path / name / "retrieval.json").read_text())
        for one in (found, *found["sets"].values()):
            one.pop("analysis", None)  # only with a report
        assert found == expected


def _launcher_variables(launcher: str, rank: int) -> dict[str, str]:
    """What the launcher sets for each of two processes on this host."""
    if launcher == "srun":
        variables = {"SLURM_STEP_NUM_TASKS": 2, "SLURM_PROCID": rank, "SLURM_LOCALID": rank}
        return {"SLURM_STEP_NODELIST": "localhost", **{name: str(value) for name, value in variables.items()}}
    variables = {"RANK": rank, "SIZE": 2, "LOCAL_RANK": rank, "LOCAL_SIZE": 2}
    return {f"OMPI_COMM_WORLD_{name}": str(value) for name, value in variables.items()}


def _evaluate_under(rank: int, launcher: str, folder: Path, port: int) -> None:
    torch.set_num_threads(1)
    comm.stop()  # a process group inherited from a test of the parent process
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **_launcher_variables(launcher, rank)}
    model, shards = (folder / "paths").read_text().split("\n")
    evaluate(Path(model), shards, out=folder / f"rank{rank}")
    assert (comm.world().rank, comm.world().size) == (rank, 2)
    comm.stop()


@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
def test_eval_divides_the_work_under_slurm_and_mpi(
    model_folder: Path, shards: Path, tmp_path: Path, launcher: str
) -> None:
    (tmp_path / "paths").write_text(f"{model_folder}\n{shards}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(  # pyright: ignore[reportPrivateImportUsage]
        _evaluate_under, (launcher, tmp_path, port), nprocs=2, start_method="fork"
    )
    found = json.loads((tmp_path / "rank0" / "retrieval.json").read_text())
    assert found["dims"] == evaluate(model_folder, shards)["dims"]
    assert not (tmp_path / "rank1").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"directions": ["image_to_txt"]}, "unknown direction 'image_to_txt'. Did you mean 'image_to_text'"),
        ({"templates": "imagenet"}, "templates: given without classes"),
        ({"ks": (0,)}, "ks: "),
        ({"dims": [32]}, "32 is out of range"),
        ({"folds": 7}, "folds: 48 images cannot be divided"),
        ({"classes": "imagenet"}, "fields.text: no sample .* has .cls"),
    ],
)
def test_invalid_options_are_reported(model_folder: Path, shards: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        evaluate(model_folder, shards, **options)


def test_second_members_are_read_only_where_they_are_scored(encoder: Bundle, tmp_path: Path) -> None:
    """A damaged second image makes a sample bad for image→image alone; zero-shot labels have none."""
    (image, _, _), (other, _, _) = drawing(0), drawing(1)
    members = [
        (f"{name}.{kind}", data)
        for name, second in (("a", encoded(other)), ("b", b"damaged"))
        for kind, data in (
            ("png", encoded(image)),
            ("json", b'{"captions": ["one"], "second_text": "two"}'),
            ("second.png", second),
        )
    ]
    reader = open_reader(str(write_tar(tmp_path / "a.tar", members)))
    for directions, keys, sides in (
        (None, ["a", "b"], set()),
        (CROSS_MODAL, ["a", "b"], set()),
        (["text_to_text"], ["a", "b"], {"text"}),
        (DIRECTIONS, ["a"], {"image", "text"}),
    ):
        found = sets.embed(reader, encoder, directions=directions)
        assert [key.rpartition("/")[2] for key in found.keys] == keys
        assert set(found.second) == sides
        assert len(found.bad) == 2 - len(keys)
    assert not sets.embed(reader, encoder, texts=False).second


def test_pixels_are_freed_after_each_batch(encoder: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = write_tar(tmp_path / "a.tar", [("a.png", encoded(drawing(0)[0])), ("a.txt", b"one")])
    kept: list[int] = []

    def gathered(of_rank: Any) -> list[Any]:
        batches = [batch for batch, *_ in of_rank[0]]
        kept.append(sum(x.untyped_storage().nbytes() for one in batches for x in (one.image_BCHW, one.text_ML)))
        return [of_rank]

    monkeypatch.setattr(comm, "all_gather_objects", gathered)
    sets.embed(open_reader(str(shard)), encoder)
    assert kept == [0]


def test_one_tower_says_what_cannot_be_measured(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = save_random_encoder(str(tiny_model), tmp_path / "encoder", towers="image")
    members = [
        (f"{n}.{kind}", data)
        for n in range(4)
        for kind, data in (("png", encoded(drawing(n)[0])), ("json", b'{"group": "one item"}'))
    ]
    shards = [str(write_tar(tmp_path / "a.tar", members))]
    result = evaluate_model(str(encoder), shards, EvalOptions(budget="recall_drop=1%"))
    assert result["num_queries"] == {"image_to_image": 4}
    said = " ".join(capsys.readouterr().out.split())
    assert "a: not analysed, since no sample has a second image (fields.second_image)." in said
    with pytest.raises(InputError, match=r"^directions: the model has images alone; allowed: image_to_image"):
        evaluate_model(str(encoder), shards, EvalOptions(directions=["text_to_image"]))
