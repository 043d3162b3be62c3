"""Sets of every kind, from what lies on disk to what retrieval.json says."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clip_benchmark.metrics.zeroshot_classification import zero_shot_classifier
from conftest import drawing, encoded, write_tar
from helpers.worlds import run_in_world
from rich.console import Console

from mmrl import config as configs
from mmrl.data.sources import open_reader
from mmrl.errors import InputError
from mmrl.evaluate import sets, zeroshot
from mmrl.evaluate.command import Asked, evaluate_model
from mmrl.evaluate.degrade import KINDS, chosen_rows, degraded
from mmrl.evaluate.readers import FolderReader, draw_shards, open_set
from mmrl.evaluate.sets import Embedded
from mmrl.evaluate.zeroshot import class_vectors, embed_labelled, read_classes, score_labelled
from mmrl.export.bundles import export_bundle
from mmrl.model import bundle, towers, two_tower
from mmrl.model.bundle import Bundle
from mmrl.model.towers import TowersConfig
from mmrl.model.two_tower import LogitScaleConfig
from mmrl.train.trainer import train

CLASSES = ["red", "green", "blue", "grey"]


@pytest.fixture(scope="module")
def model_folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of random weights, nested at 4, 8 and 16."""
    torch.manual_seed(2)
    built = towers.build(TowersConfig(name=str(tiny_model)))
    model = two_tower.from_towers(built, LogitScaleConfig(), 3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    one = bundle.of_towers(model, built, (4, 8, 16))
    folder = tmp_path_factory.mktemp("encoder")
    bundle.save(one, folder, one.state(), {})
    return folder


@pytest.fixture(scope="module")
def encoder(model_folder: Path) -> Bundle:
    return bundle.load(model_folder)


def evaluate(model: Path, *shards: str | Path, out: Path | None = None, **asked: Any) -> dict[str, Any]:
    return evaluate_model(str(model), [str(one) for one in shards], Asked(**asked), out, quiet=True)


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
        numbers=list(range(len(groups))),
    )


def test_a_direction_without_right_answers_is_left_out() -> None:
    one_each = embedded_of([-2, -3, -4], ["a", "b", "c"], [0, 1, 2])
    assert set(sets.score(one_each, [8], directions=sets.DIRECTIONS)["chance"]) == set(sets.CROSS)
    with pytest.raises(InputError, match="directions: the set has no right answers in text_to_text"):
        sets.score(one_each, [8], directions=["text_to_text"])
    paraphrased = embedded_of([-2, -3, -4], ["a", "b", "c", "d"], [0, 1, 2, 2])
    assert set(sets.score(paraphrased, [8], directions=sets.DIRECTIONS)["chance"]) == {*sets.CROSS, "text_to_text"}
    products = embedded_of([7, 7, -4], ["a", "a", "c"], [0, 1, 2])
    assert set(sets.score(products, [8], directions=sets.DIRECTIONS)["chance"]) == {*sets.CROSS, "image_to_image"}


def test_the_same_words_are_no_paraphrase() -> None:
    repeated = embedded_of([7, 7, 9, 9], ["a", "b", "a", "x", "y"], [0, 0, 1, 2, 3])
    without = embedded_of([7, 7, 9, 9], ["a", "b", "x", "y"], [0, 0, 2, 3])
    without = replace(without, text_MD=repeated.text_MD[[0, 1, 3, 4]])
    one, other = (sets.score(e, [8], directions=["text_to_text"])["dims"] for e in (repeated, without))
    assert one == other


def test_a_query_is_no_answer_to_itself() -> None:
    """Two pictures of each group: the query left out, one right answer among the others."""
    twins = embedded_of([5, 5, 6, 6], ["a", "b", "c", "d"], [0, 1, 2, 3])
    rows_ND = torch.eye(8)[:4]
    rows_ND[1] = rows_ND[0] + 0.1 * rows_ND[2]
    result = sets.score(replace(twins, image_ND=rows_ND), [8], (1,), directions=["image_to_image"])
    assert result["dims"]["8"]["image_to_image"]["R@1"] == 0.5  # the second twins are at right angles
    assert result["chance"]["image_to_image"]["R@1"] == pytest.approx(1 / 3)


def test_nan_embeddings_are_one_sentence() -> None:
    broken = embedded_of([1, 2], ["a", "b"], [0, 1])
    broken.text_MD[1, 3] = torch.nan
    with pytest.raises(InputError, match="texts: holds numbers that are not finite"):
        sets.score(broken, [8])


def test_every_direction_from_shards(model_folder: Path, shards: Path, tmp_path: Path) -> None:
    result = evaluate(model_folder, f"val={shards}", out=tmp_path, ks=(3,))
    assert json.loads((tmp_path / "retrieval.json").read_text()) == result
    assert result["dims"] == result["sets"]["val"]["dims"]
    assert list(result["dims"]) == ["16", "8", "4"]
    assert set(result["dims"]["4"]) == set(result["chance"]) == set(sets.DIRECTIONS)
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
            # The projections are cut: vectors differ by rounding, which may swap two that come that near.
            assert exported["dims"][dim][way] == pytest.approx(scores, abs=1e-4)


def test_a_folder_of_pictures_is_a_set(model_folder: Path, shards: Path, tmp_path: Path) -> None:
    for number in range(48):
        image, caption, group = drawing(number)
        (tmp_path / f"{number:05}.png").write_bytes(encoded(image))
        (tmp_path / f"{number:05}.txt").write_text(caption)
        (tmp_path / f"{number:05}.json").write_text(
            json.dumps({"captions": [caption, f"{caption}, again"], "group": group})
        )
    (tmp_path / "alone.txt").write_text("no picture")
    (tmp_path / "uncaptioned.png").write_bytes(encoded(drawing(1)[0]))
    (tmp_path / "zz.png").write_bytes(b"no picture either")
    (tmp_path / "zz.txt").write_text("damaged")
    result, packed = evaluate(model_folder, tmp_path), evaluate(model_folder, shards)
    assert result["num_bad"] == 3
    assert result["dims"] == packed["dims"]


def test_a_folder_without_captions_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(drawing(1)[0]))
    with pytest.raises(InputError, match=r"none of 1 pictures in .* has a caption beside it"):
        FolderReader(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no picture"):
        open_set(str(tmp_path / "empty"))


def labelled_members(number: int, label: str) -> list[tuple[str, bytes]]:
    return [(f"s{number:04}.png", encoded(drawing(number)[0])), (f"s{number:04}.cls", label.encode())]


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """A classification set of CLIP_benchmark's form."""
    folder = tmp_path / "wds_colours"
    for shard in range(2):
        members = [m for n in range(20) for m in labelled_members(20 * shard + n, str(n % 4))]
        write_tar(folder / "test" / f"{shard}.tar", members)
    (folder / "test" / "nshards.txt").write_text("2")
    (folder / "classnames.txt").write_text("\n".join(CLASSES))
    (folder / "zeroshot_classification_templates.txt").write_text("a {c} thing\n{c}, seen from afar\n")
    return folder


def test_classification_equals_clip_benchmarks(model_folder: Path, encoder: Bundle, labelled: Path) -> None:
    result = evaluate(model_folder, labelled, dims=[16, 5])
    pictures = torch.stack([encoder.image_spec.pixels(drawing(n)[0]) for n in range(40)])
    label_N = torch.arange(40) % 4
    templates = (labelled / "zeroshot_classification_templates.txt").read_text().splitlines()
    with torch.no_grad():
        image_ND = encoder.model.encode_image(pictures)
    for dim in (16, 5):

        class Cut:
            """What an exported encoder of that dim gives."""

            def encode_text(self, tokens: torch.Tensor, dim: int = dim) -> torch.Tensor:
                return encoder.model.encode_text(tokens)[:, :dim]

        weights_dC = zero_shot_classifier(Cut(), encoder.tokenise, CLASSES, templates, "cpu", amp=False)
        logits_NC = torch.nn.functional.normalize(image_ND[:, :dim], dim=-1) @ weights_dC
        scores = result["dims"][str(dim)]["classification"]
        assert scores["top1"] == pytest.approx((logits_NC.argmax(1) == label_N).double().mean().item(), abs=1e-6)
        by_class = [(logits_NC.argmax(1) == c)[label_N == c].double().mean().item() for c in range(4)]
        assert scores["mean_per_class"] == pytest.approx(np.mean(by_class), abs=1e-6)
        assert scores["top5"] == 1
    assert result["num_classes"] == 4
    assert result["chance"]["classification"]["top1"] == 0.25


def test_a_label_that_is_no_class_is_counted(encoder: Bundle, tmp_path: Path) -> None:
    members = [m for n, label in enumerate(["0", "3", "4", "-1", "red"]) for m in labelled_members(n, label)]
    one = open_set(str(write_tar(tmp_path / "a.tar", members)), read_classes_of(tmp_path, CLASSES))
    found = embed_labelled(one.reader, encoder.model, encoder.image_spec, 4)
    assert found.label_N.tolist() == [0, 3]
    assert [problem.kind for problem in found.bad] == ["no class from 0 to 3"] * 3


def read_classes_of(folder: Path, names: Sequence[str]) -> zeroshot.Classes:
    (folder / "names.txt").write_text("\n".join(names))
    return read_classes(str(folder / "names.txt"))


def test_a_single_class_is_always_right(encoder: Bundle, tmp_path: Path) -> None:
    classes = read_classes_of(tmp_path, ["thing"])
    found = zeroshot.Labelled(torch.randn(3, 16), torch.zeros(3, dtype=torch.int64), [])
    vectors = class_vectors(classes, encoder.model, encoder.tokenise, [16])
    assert score_labelled(found, vectors)["dims"]["16"]["classification"]["top1"] == 1


def test_imagenets_names_and_templates_are_at_hand(tmp_path: Path) -> None:
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


def test_benchmarks_captions_are_lines(encoder: Bundle, tmp_path: Path) -> None:
    members = [("a.png", encoded(drawing(0)[0])), ("a.txt", b"one\ntwo\n\nthree"), ("b.png", encoded(drawing(1)[0]))]
    write_tar(tmp_path / "test" / "0.tar", [*members, ("b.txt", b"four")])
    (tmp_path / "dataset_type.txt").write_text("retrieval")
    one = open_set(str(tmp_path))
    found = sets.embed(one.reader, encoder.model, encoder.image_spec, encoder.tokenise)
    assert found.captions == ["one", "two", "three", "four"]
    assert found.image_of_text_M.tolist() == [0, 0, 0, 1]


def test_degrading_is_a_function_of_the_name() -> None:
    picture = torch.from_numpy(np.array(drawing(3, 96)[0])).permute(2, 0, 1)
    for kind, (_, _, amounts) in KINDS.items():
        worse = [degraded(picture, kind, amount, "a") for amount in amounts]
        assert all(
            torch.equal(one, degraded(picture, kind, amount, "a")) for one, amount in zip(worse, amounts, strict=True)
        )
        resized = [torch.nn.functional.interpolate(one[None].float(), (96, 96))[0] for one in worse]
        distances = [float((one - picture).abs().mean()) for one in resized]
        assert kind == "crop" or distances == sorted(distances)
    crop = degraded(picture, "crop", 0.25, "a")
    assert crop.shape == (3, 48, 48)
    assert not torch.equal(crop, degraded(picture, "crop", 0.25, "b"))
    keys = [str(number) for number in range(50)]
    assert chosen_rows(keys, 10) == sorted(keys.index(key) for key in [keys[row] for row in chosen_rows(keys, 10)])
    assert len(chosen_rows(keys, 100)) == 50


def test_degraded_pictures_look_for_their_originals(model_folder: Path, shards: Path) -> None:
    found = evaluate(model_folder, shards, dims=[16], degrade=9)["degraded"]
    assert found["num_queries"] == 9
    assert set(found) == {"num_queries", *KINDS}
    # The pictures are of 32 pixels: to make them 96 changes nothing.
    assert found["downscale"]["severities"]["96"]["16"]["R@1"] == 1
    assert found["blur"]["severities"]["0.06"]["16"]["mean_rank"] > 1


def test_large_sets_are_sampled_by_shard(shards: Path) -> None:
    reader = open_reader(str(shards))
    assert draw_shards(reader, None) is draw_shards(reader, 48) is reader
    drawn = draw_shards(reader, 12)
    assert len(drawn) in (17, 20, 31, 28)
    assert len(drawn) == len(draw_shards(open_reader(str(shards)), 12))


@pytest.mark.parametrize("stage", [0, 3])
def test_a_run_is_judged_by_some_shards_as_mmrl_eval_would(write_config: Callable[..., Path], stage: int) -> None:
    overrides = ["evaluation.most_samples=12", "train.duration=2 steps", f"engine.zero_stage={stage}"]
    config = configs.load(write_config(), overrides)
    folder = train(config, Console(quiet=True))
    found = json.loads((folder / "retrieval.json").read_text())["sets"]["val"]
    reader = draw_shards(open_reader(config.evaluation.sets["val"].shards), 12)
    assert found["drawn"] == {"samples": len(reader), "of": 48}
    last = bundle.load(folder / "checkpoints" / "last")
    embedded = sets.embed(reader, last.model, last.image_spec, last.tokenise, captions=1)
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


def test_two_processes_find_what_one_does(model_folder: Path, shards: Path, labelled: Path, tmp_path: Path) -> None:
    (tmp_path / "paths").write_text(f"{model_folder}\n{shards}\n{labelled}")
    run_in_world(2, _evaluate_in_a_world, tmp_path)
    for name, expected in (
        ("shared", evaluate(model_folder, shards, degrade=5)),
        ("classes", evaluate(model_folder, labelled)),
    ):
        found = json.loads((tmp_path / name / "retrieval.json").read_text())
        for one in (found, *found["sets"].values()):
            one.pop("analysis", None)  # which comes with a report
        assert found == expected


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"directions": ["image_to_txt"]}, "there is no 'image_to_txt'. Did you mean 'image_to_text'"),
        ({"templates": "imagenet"}, "templates: given without classes"),
        ({"ks": (0,)}, "ks: "),
        ({"dims": [32]}, "32 is out of range"),
        ({"folds": 7}, "folds: 48 images cannot be divided"),
        ({"classes": "imagenet"}, "fields.text: no sample .* has .cls"),
    ],
)
def test_mistakes_are_one_sentence(model_folder: Path, shards: Path, asked: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        evaluate(model_folder, shards, **asked)
