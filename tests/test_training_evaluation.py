"""The trainer's evaluations: held-out pairs with damage, scenes, and a model left as it was."""

import json
import multiprocessing
import time

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.utils.data import DataLoader
from training_utils import caption, image_bytes, pairs, tiny_recipe, write_tar

from hfclip.errors import UsageError
from hfclip.evaluation import all_metrics
from hfclip.evaluation.retrieval import retrieval_recall
from training import evaluation as evaluations
from training.config import Config
from training.data.batches import open_data as open_source
from training.data.loading import Batches, raise_if_a_reader_is_killed
from training.evaluation import Evaluator
from training.model import build_architecture, build_model, build_processor


def built(folder, **evaluation):
    """A random model and the evaluator of a recipe."""
    AcceleratorState._reset_state(reset_partial_state=True)
    data = {"train": "scenes", "max_samples": 300}
    config = Config.from_dict(tiny_recipe(folder, data=data, eval=evaluation))
    architecture = build_architecture(config)
    source = open_source("scenes", config.data, "train", 32)
    architecture, processor = build_processor(config, architecture, source)
    model = build_model(config, architecture)
    return model, processor, Evaluator(config, Accelerator(cpu=True), processor, 32)


def test_retrieval_leaves_damaged_pairs_out_and_equals_the_definition(tmp_path):
    several = [("m.jpg", image_bytes(50)), ("m.json", b'{"captions": ["a red cat", "a blue dog"]}')]
    damaged = [("x.jpg", b"no picture"), ("x.txt", b"a cat"), ("y.jpg", image_bytes(1)), ("y.txt", b"  ")]
    write_tar(tmp_path / "test.tar", [*pairs(range(3)), *damaged, *several, *pairs(range(3, 9))])
    model, processor, evaluator = built(tmp_path, retrieval=str(tmp_path / "test.tar"))
    found = all_metrics(evaluator(model))

    seeds = [0, 1, 2, 50, *range(3, 9)]
    texts = [[caption(seed)] if seed != 50 else ["a red cat", "a blue dog"] for seed in seeds]
    inputs = processor(
        images=[image_bytes(seed) for seed in seeds], text=sum(texts, []), return_tensors="pt", padding=True
    )
    model.eval()
    with torch.no_grad():
        images = model.encode_image(inputs["pixel_values"])
        embeds = model.encode_text(inputs["input_ids"], inputs["attention_mask"])
    owner = [i for i, captions in enumerate(texts) for _ in captions]
    expected = {f"retrieval/{name}": value for name, value in retrieval_recall(images, embeds, owner).items()}
    assert found == {**expected, "retrieval/unreadable_images": 1}


@pytest.mark.parametrize(
    ("splits", "held_out"),
    [
        (["train", "validation"], 1),
        (["train", "validation", "test"], 2),
        (["train"], 0),
        (["train", "dev", "extra"], 1),
    ],
)
def test_retrieval_takes_the_split_that_is_held_out(splits, held_out, tmp_path):
    for number, split in enumerate(splits):
        folder = tmp_path / "photos" / split
        folder.mkdir(parents=True)
        names = [f"{seed}.jpg" for seed in range(10 * number, 10 * number + 3)]
        lines = [json.dumps({"file_name": name, "text": caption(int(name[:-4]))}) for name in names]
        (folder / "metadata.jsonl").write_text("\n".join(lines))
        for name in names:
            (folder / name).write_bytes(image_bytes(int(name[:-4])))
    config = Config.from_dict(tiny_recipe(tmp_path)).data
    source = open_source(str(tmp_path / "photos"), config, None, 32)
    found = sorted(source.captions(index)[0] for index in range(len(source)))
    assert found == sorted(caption(10 * held_out + seed) for seed in range(3))


def test_rejects_retrieval_without_a_split_that_is_held_out(tmp_path):
    folder = tmp_path / "photos"
    for split in ("train", "extra"):
        (folder / split).mkdir(parents=True)
        (folder / split / "metadata.jsonl").write_text(json.dumps({"file_name": "0.jpg", "text": "a cat"}))
        (folder / split / "0.jpg").write_bytes(image_bytes(0))
    files = [{"split": split, "path": f"{split}/*"} for split in ("train", "extra")]
    header = yaml.safe_dump({"configs": [{"config_name": "default", "data_files": files}]})
    (folder / "README.md").write_text(f"---\n{header}---\n")
    with pytest.raises(UsageError, match=r"eval.retrieval: .*'extra'.*expected test or validation or val or dev"):
        built(tmp_path, retrieval=str(folder))


def test_held_out_pairs_have_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluations, "MAX_PAIRS", 7)
    write_tar(tmp_path / "test.tar", pairs(range(20)))
    _, _, evaluator = built(tmp_path, retrieval=str(tmp_path / "test.tar"))
    assert [evaluator.pairs.captions(index) for index in range(len(evaluator.pairs))] == [
        [caption(seed)] for seed in range(7)
    ]


def test_scenes_are_measured_and_drawn_and_the_model_goes_on_training(tmp_path):
    model, _, evaluator = built(tmp_path, zero_shot="scenes", retrieval="scenes")
    evaluator.labelled = evaluator.labelled[:2]  # enough, and quicker
    results = all_metrics(evaluator(model))
    assert {"zero_shot/color and shape/top1", "zero_shot/color/top1", "retrieval/text_retrieval_recall@1"} <= set(
        results
    )
    assert all(0 <= value <= 1 for value in results.values())
    assert model.training and model.vision_model.training
    assert (
        evaluator.draw(model, tmp_path / "x.png") == tmp_path / "x.png" and (tmp_path / "x.png").stat().st_size > 1000
    )


def test_undecodable_labelled_images_are_left_out_and_counted(tmp_path):
    for label, data in {"cat": image_bytes(0), "dog": image_bytes(1)[:100]}.items():
        (tmp_path / "classes" / label).mkdir(parents=True)
        (tmp_path / "classes" / label / "0.jpg").write_bytes(data)
    model, _, evaluator = built(tmp_path, zero_shot=str(tmp_path / "classes"))
    assert evaluator(model)["zero_shot"].metrics["unreadable_images"] == 1
    assert evaluator.draw(model, tmp_path / "x.png").is_file()


def test_class_of_which_nothing_can_be_read_is_named(tmp_path, capsys):
    for number, label in enumerate(("cat", "dog", "owl")):
        (tmp_path / "classes" / label).mkdir(parents=True)
        (tmp_path / "classes" / label / "0.jpg").write_bytes(image_bytes(number) if label != "dog" else b"no image")
    model, _, evaluator = built(tmp_path, zero_shot=str(tmp_path / "classes"))
    result = evaluator(model)["zero_shot"]
    assert result.headline == "top1" and result.metrics["unreadable_images"] == 1
    assert "none of their images can be read: dog." in capsys.readouterr().err


def test_rejects_templates_without_place_for_the_label(tmp_path):
    for label in ("cat", "dog"):
        (tmp_path / "classes" / label).mkdir(parents=True)
        (tmp_path / "classes" / label / "0.jpg").write_bytes(image_bytes(0))
    (tmp_path / "classes" / "zeroshot_classification_templates.txt").write_text("a photo")
    with pytest.raises(UsageError, match="eval.zero_shot: template 'a photo' has no place"):
        built(tmp_path, zero_shot=str(tmp_path / "classes"))


def test_nothing_asked_for_is_nothing_measured(tmp_path):
    model, _, evaluator = built(tmp_path)
    assert evaluator(model) == {} and evaluator.draw(model, tmp_path / "x.png") is None


def test_rejects_held_out_data_without_pairs(tmp_path):
    write_tar(tmp_path / "test.tar", [("a.jpg", image_bytes(0)), ("a.txt", b" ")])
    with pytest.raises(UsageError, match="eval.retrieval: .*no usable pair.* Left out: 1 with empty caption"):
        built(tmp_path, retrieval=str(tmp_path / "test.tar"))


def test_rejects_labelled_images_of_which_none_can_be_read(tmp_path):
    for label in ("cat", "dog"):
        (tmp_path / "classes" / label).mkdir(parents=True)
        (tmp_path / "classes" / label / "0.jpg").write_bytes(b"no image")
    with pytest.raises(
        UsageError, match="eval.zero_shot: .*none of 2 samples.* can be used. The first one: not an im"
    ):
        built(tmp_path, zero_shot=str(tmp_path / "classes"))


def large(batch: list) -> bytes:
    return bytes(1 << 20)


def test_killed_reader_ends_the_evaluation_that_waits_for_it():
    """Of a batch that it was sending, half has come; without a word to the contrary the other half is waited for."""
    with Batches(DataLoader(range(2), num_workers=1)):  # a run's, which takes torch's own handler off
        others = multiprocessing.active_children()
        with pytest.raises(UsageError, match="was killed by SIGKILL.*num_workers"), raise_if_a_reader_is_killed():
            batches = iter(DataLoader(range(64), num_workers=2, collate_fn=large))
            next(batches)
            time.sleep(0.5)  # until a reader has filled the pipe
            for reader in set(multiprocessing.active_children()) - set(others):
                reader.kill()
            list(batches)
