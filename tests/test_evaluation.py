"""Zero-shot accuracy and retrieval against counts made one by one; reading of labelled folders from real files."""

import io
import os
import random
import tarfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from hfclip import (
    HFCLIPConfig,
    HFCLIPForImageClassification,
    HFCLIPImageProcessor,
    HFCLIPModel,
    HFCLIPProcessor,
    HFCLIPTokenizer,
)
from hfclip.data import open_source
from hfclip.errors import UsageError
from hfclip.evaluation import metrics
from hfclip.evaluation.data import LabelledFolder
from hfclip.evaluation.retrieval import Pairs, retrieval, retrieval_ranks, retrieval_recall
from hfclip.evaluation.zero_shot import UndecodableImage, load_labelled_folder, zero_shot, zero_shot_accuracy
from hfclip.zero_shot import ZeroShotClassifier


LABELS = ["cat", "dog", "aircraft carrier", "tulip", "bus", "owl", "spoon"]
TEMPLATES = ["a photo of a {}.", "a blurry photo of the {c}"]


# ----------------------------------------------------------------------------------------------------------- zero-shot


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A saved random model with its processor."""
    torch.manual_seed(0)
    tower = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    text = dict(model_type="hfclip_text", vocab_size=524, bos_token_id=522, eos_token_id=523, **tower)
    vision = dict(model_type="hfclip_vit", image_size=32, patch_size=8, **tower)
    folder = tmp_path_factory.mktemp("model")
    HFCLIPModel(HFCLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    tokenizer = HFCLIPTokenizer.train_new_from_iterator(LABELS + TEMPLATES * 2, 524)
    HFCLIPProcessor(image_processor=HFCLIPImageProcessor(size=32), tokenizer=tokenizer).save_pretrained(folder)
    return folder


def load(folder):
    return HFCLIPModel.from_pretrained(folder), HFCLIPProcessor.from_pretrained(folder)


def labelled_photos():
    """23 photos of noise, each brightened in its own way; class 0 has most of them and class 5 none."""
    generator = np.random.default_rng(0)
    targets = [0] * 9 + [1, 2, 3, 4, 6] * 2 + [1, 2, 2, 3]
    photos = []
    for _ in targets:
        noise = generator.integers(0, 128, (32, 32, 3)) + generator.integers(0, 128, 3)
        photos.append((PIL.Image.fromarray(noise.astype(np.uint8)), targets[len(photos)]))
    random.Random(0).shuffle(photos)
    return photos


def counted_by_hand(model, processor, dataset, labels):
    """Accuracy from the classifier's answers, image by image."""
    classifier = ZeroShotClassifier(model, processor, labels, TEMPLATES)
    answers = [[entry["label"] for entry in classifier(image, top_k=len(labels))] for image, _ in dataset]
    targets = [labels[target] for _, target in dataset]
    top = {
        f"top{k}": sum(target in answer[:k] for target, answer in zip(targets, answers, strict=True)) / len(targets)
        for k in (1, 3, 5)
    }
    recalls = []
    for label in set(targets):
        found = [answer[0] == label for target, answer in zip(targets, answers, strict=True) if target == label]
        recalls.append(sum(found) / len(found))
    return {**top, "mean_per_class_recall": sum(recalls) / len(recalls), "num_samples": len(targets), "num_skipped": 0}


def test_accuracy_equals_counting_the_classifiers_answers(model_folder):
    model, processor = load(model_folder)
    dataset = labelled_photos()
    expected = counted_by_hand(model, processor, dataset, LABELS)
    assert 0 < expected["top1"] < expected["top3"] < expected["top5"] < 1  # else the test would prove little
    assert expected["mean_per_class_recall"] != expected["top1"]
    for batch_size, num_workers in ((4, 0), (64, 0), (5, 2)):
        found = zero_shot_accuracy(
            model,
            processor,
            dataset,
            LABELS,
            TEMPLATES,
            batch_size=batch_size,
            top_k=(1, 3, 5),
            num_workers=num_workers,
        )
        assert found == pytest.approx(expected, abs=1e-12)


def test_accuracy_leaves_the_model_in_its_mode(model_folder):
    model, processor = load(model_folder)
    zero_shot_accuracy(model.train(), processor, labelled_photos()[:2], LABELS)
    assert all(module.training for module in model.modules())


def test_repeated_labels_are_ranked_in_their_order(model_folder):
    model, processor = load(model_folder)
    dataset = labelled_photos()
    best = ZeroShotClassifier(model, processor, LABELS)([image for image, _ in dataset], top_k=1)
    winners = [LABELS.index(entries[0]["label"]) for entries in best]
    first = [(image, winner) for (image, _), winner in zip(dataset, winners, strict=True)]
    second = [(image, winner + len(LABELS)) for image, winner in first]
    assert zero_shot_accuracy(model, processor, first, LABELS * 2, top_k=(1,))["top1"] == 1
    found = zero_shot_accuracy(model, processor, second, LABELS * 2, top_k=(1, 2))
    assert found["top1"] == 0 and found["top2"] == 1


def evaluate_on_rank(rank, world, model_folder, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    model, processor = load(model_folder)
    model = DistributedDataParallel(model.train())
    results = [
        zero_shot_accuracy(model, processor, dataset, LABELS, TEMPLATES, batch_size=4, top_k=(1, 3, 5))
        for dataset in (labelled_photos(), labelled_photos()[:1])
    ]
    torch.save((results, model.training), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_ranks_share_the_work_and_agree_on_the_result(model_folder, tmp_path):
    model, processor = load(model_folder)
    dataset = labelled_photos()
    # 23 images on 2 ranks: uneven shares; 1 image: a rank without any.
    mp.spawn(evaluate_on_rank, args=(2, model_folder, tmp_path), nprocs=2)
    for rank in range(2):
        (whole, single), training = torch.load(tmp_path / f"{rank}.pt")
        assert whole == pytest.approx(counted_by_hand(model, processor, dataset, LABELS), abs=1e-12)
        assert single == pytest.approx(counted_by_hand(model, processor, dataset[:1], LABELS), abs=1e-12)
        assert training


def test_accuracy_rejects_what_it_cannot_measure(model_folder):
    model, processor = load(model_folder)
    image = labelled_photos()[0][0]
    with pytest.raises(ValueError, match="data set is empty"):
        zero_shot_accuracy(model, processor, [], LABELS)
    with pytest.raises(ValueError, match="found target 7: expected 0 to 6"):
        zero_shot_accuracy(model, processor, [(image, 7)], LABELS)
    with pytest.raises(ValueError, match=r"top_k is \(0,\)"):
        zero_shot_accuracy(model, processor, [(image, 0)], LABELS, top_k=(0,))
    with torch.no_grad():
        model.visual_projection.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="embeddings that are not finite"):
        zero_shot_accuracy(model, processor, [(image, 0)], LABELS)


# ------------------------------------------------------------------------------------------- zero-shot in every respect


def named(dataset, labels=LABELS, templates=TEMPLATES):
    return LabelledFolder(labels, templates, dataset)


@pytest.mark.parametrize("logit_bias", [None, -3.0])
def test_zero_shot_reports_what_the_classifier_answers(model_folder, logit_bias):
    config = HFCLIPModel.from_pretrained(model_folder).config
    config.logit_bias_init_value = logit_bias
    torch.manual_seed(0)
    model, processor = HFCLIPModel(config).eval(), HFCLIPProcessor.from_pretrained(model_folder)
    dataset = labelled_photos()
    result = zero_shot(model, processor, named(dataset), top_k=(3,))
    expected = counted_by_hand(model, processor, dataset, LABELS)
    assert result.headline == "top1"
    assert {name: result.metrics[name] for name in ("top1", "top3", "mean_per_class_recall")} == pytest.approx(
        {name: expected[name] for name in ("top1", "top3", "mean_per_class_recall")}, abs=1e-12
    )
    classifier = ZeroShotClassifier(model, processor, LABELS, TEMPLATES)
    best = [entries[0] for entries in classifier([image for image, _ in dataset], top_k=1)]
    assert [LABELS[number] for number in result.arrays["predictions"]] == [entry["label"] for entry in best]
    targets = np.array([target for _, target in dataset])
    confidence = [entry["score"] for entry in best]
    correct = [entry["label"] == LABELS[target] for entry, target in zip(best, targets, strict=True)]
    assert result.metrics["ece"] == pytest.approx(metrics.calibration_error(confidence, correct), abs=1e-5)
    assert result.metrics["selective_accuracy"] == pytest.approx(
        metrics.selective_accuracy(confidence, correct), abs=1e-2
    )
    matrix = result.arrays["confusion_matrix"]
    assert matrix.sum() == len(dataset) and matrix.trace() / len(dataset) == result.metrics["top1"]
    assert matrix.sum(axis=1).tolist() == np.bincount(targets, minlength=7).tolist()
    rows = result.tables["classes"]
    assert [row["class"] for row in rows] == LABELS and rows[5] == {
        "class": "owl", "images": 0, "accuracy": None, "mistaken_for": None
    }  # fmt: skip
    assert sum(row["images"] for row in result.tables["calibration"]) == len(dataset)
    assert result.tables["coverage"][-1] == {"coverage": 1.0, "accuracy": pytest.approx(result.metrics["top1"])}
    assert result.notes == ["1 of 7 classes have no image: means over classes leave them out."]


def test_each_template_is_measured_as_a_classifier_of_its_own(model_folder):
    model, processor = load(model_folder)
    dataset = labelled_photos()
    baseline = "{}"
    found = zero_shot(
        model, processor, named(dataset), metric="mean_per_class_recall", baseline=baseline, per_template=True
    )
    assert found.headline == "mean_per_class_recall"
    alone = [
        zero_shot_accuracy(model, processor, dataset, LABELS, [template])["mean_per_class_recall"]
        for template in [*TEMPLATES, baseline]
    ]
    assert [row["mean_per_class_recall"] for row in found.tables["templates"]] == pytest.approx(alone[:2], abs=1e-12)
    assert [row["template"] for row in found.tables["templates"]] == ["a photo of a {}.", "a blurry photo of the {}"]
    assert found.metrics["baseline"] == pytest.approx(alone[2], abs=1e-12)


def test_metrics_of_data_sets_with_rules_of_their_own(model_folder):
    model, processor = load(model_folder)
    dataset = labelled_photos()
    found = zero_shot(model, processor, named(dataset), metric="mean_top1_top5").metrics
    assert found["mean_top1_top5"] == pytest.approx((found["top1"] + found["top5"]) / 2)
    two = [(image, int(target > 0)) for image, target in dataset]
    found = zero_shot(model, processor, named(two, LABELS[:2]), metric="roc_auc")
    logits = ZeroShotClassifier(model, processor, LABELS[:2], TEMPLATES).logits([image for image, _ in two])
    scores = (logits[:, 1] - logits[:, 0]).tolist()
    wins = [(a > b) for a, (_, is_a) in zip(scores, two) if is_a for b, (_, is_b) in zip(scores, two) if not is_b]
    assert 0 < np.mean(wins) < 1 and found.metrics["roc_auc"] == pytest.approx(np.mean(wins), abs=1e-12)
    with pytest.raises(UsageError, match="'roc_auc' for 7 classes"):
        zero_shot(model, processor, named(dataset), metric="roc_auc")
    with pytest.raises(UsageError, match="'map_11_point' for data with one label per image"):
        zero_shot(model, processor, named(dataset), metric="map_11_point")


def npy(numbers):
    buffer = io.BytesIO()
    np.save(buffer, numbers)
    return buffer.getvalue()


def test_images_with_several_labels_are_measured_by_average_precision(model_folder, tmp_path):
    model, processor = load(model_folder)
    generator, images, files = np.random.default_rng(0), [], {}
    rows = generator.random((30, 7)) < 0.3
    rows[:, 5] = False  # no owl: left out of the mean
    for number, row in enumerate(rows):
        images.append(PIL.Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)))
        buffer = io.BytesIO()
        images[-1].save(buffer, "png")
        files |= {f"{number}.png": buffer.getvalue(), f"{number}.npy": npy(row.astype(np.float32))}
    write_tar(tmp_path / "0.tar", files)
    (tmp_path / "classnames.txt").write_text("\n".join(LABELS))
    folder = load_labelled_folder(tmp_path)
    assert np.array_equal(folder.samples.targets, rows)
    source = open_source(str(tmp_path))
    assert source.captions(3) == [label for label, is_there in zip(LABELS, rows[3]) if is_there]
    logits = ZeroShotClassifier(model, processor, LABELS).logits(images).T.numpy()
    expected = np.mean([metrics.average_precision_11_points(logits[c], rows[:, c]) for c in (0, 1, 2, 3, 4, 6)])
    found = zero_shot(model, processor, folder)
    assert found.headline == "map_11_point" and found.metrics["map_11_point"] == pytest.approx(expected, abs=1e-9)
    with pytest.raises(UsageError, match="'top1' for data with several labels per image"):
        zero_shot(model, processor, folder, metric="top1")
    write_tar(tmp_path / "0.tar", {**files, "3.npy": npy(np.ones(6))})
    with pytest.raises(
        UsageError, match=r"labels of sample 3 cannot be read: found float64 \(6,\), expected a number"
    ):
        load_labelled_folder(tmp_path)


def test_images_and_classifiers_are_embedded_once_under_a_cache(model_folder, tmp_path):
    """Whatever is asked of them: by names, by groups, by captions; until a sentence or a weight changes."""
    model, processor = load(model_folder)
    write_shards(tmp_path / "data")
    (tmp_path / "data" / "classnames.txt").write_text("cat\ndog\n")
    folder, calls = load_labelled_folder(tmp_path / "data"), []
    model.vision_model.register_forward_hook(lambda *_: calls.append("image"))
    model.text_model.register_forward_hook(lambda *_: calls.append("text"))
    options = {"cache_dir": tmp_path / "cache", "num_workers": 0}
    first = zero_shot(model, processor, folder, **options)
    assert set(calls) == {"image", "text"}
    calls.clear()
    again = zero_shot(model, processor, folder, **options)
    assert calls == [] and again.metrics == first.metrics
    zero_shot(model, processor, folder._replace(labels=["animal", "pet"]), **options)
    assert set(calls) == {"text"}
    calls.clear()
    retrieval(model, processor, open_source(str(tmp_path / "data")), **options)
    assert set(calls) == {"text"}
    with torch.no_grad():
        model.text_projection.weight[0, 0] += 1
    calls.clear()
    zero_shot(model, processor, folder, **options)
    assert set(calls) == {"image", "text"}


def test_class_names_that_repeat_are_reported(model_folder):
    model, processor = load(model_folder)
    result = zero_shot(model, processor, named(labelled_photos(), [*LABELS[:6], "cat"]))
    assert "1 class names repeat (cat)" in result.notes[0]


def test_models_without_text_are_refused(model_folder):
    model, processor = load(model_folder)
    model = HFCLIPForImageClassification.from_pretrained(model_folder)
    with pytest.raises(UsageError, match="found a HFCLIPForImageClassification, which has no text tower"):
        zero_shot(model, processor, named(labelled_photos()))
    with pytest.raises(UsageError, match="no text tower"):
        retrieval(model, processor, Pairs([image for image, _ in labelled_photos()[:2]], ["a", "b"]))


# ----------------------------------------------------------------------------------------------------- labelled folder


def png(value):
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (8, 8), (value, value, value)).save(buffer, "png")
    return buffer.getvalue()


def write_tar(path, files):
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_shards(folder, num_shards=11, **files_of_last):
    """Shards 0.tar ... of two samples each; the grey of an image is its place in the data set."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(num_shards):
        files = {}
        for i in (2 * shard, 2 * shard + 1):
            files.update({f"s{i}.png": png(i), f"s{i}.cls": str(i % 2).encode(), f"s{i}.txt": b"a caption"})
        write_tar(folder / f"{shard}.tar", files)
    (folder / "nshards.txt").write_text(str(num_shards))


def test_reads_shards_with_names_from_the_folder_above(tmp_path):
    write_shards(tmp_path / "test")
    (tmp_path / "classnames.txt").write_text("cat \ndog\r\n \n")
    (tmp_path / "zeroshot_classification_templates.txt").write_text("\n a photo of a {c}.\n\nthe {c}\n")
    labels, templates, samples = load_labelled_folder(tmp_path / "test")
    assert labels == ["cat", "dog"] and templates == ["a photo of a {c}.", "the {c}"]
    assert sorted((image.getpixel((0, 0))[0], target) for image, target in samples) == [(i, i % 2) for i in range(22)]


def test_reads_class_folders_in_alphabetical_order(tmp_path):
    for i, name in enumerate(["golden_retriever/b.PNG", "golden_retriever/a/c.png", "cat/a.png", "zebra/notes.txt"]):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png(i))
    labels, templates, samples = load_labelled_folder(tmp_path)
    assert labels == ["cat", "golden retriever", "zebra"] and templates == ["a photo of a {}."]
    assert [(image.getpixel((0, 0))[0], target) for image, target in samples] == [(2, 0), (1, 1), (0, 1)]
    (tmp_path / "classnames.txt").write_text("tabby\nretriever\nzebra\n")
    assert load_labelled_folder(str(tmp_path)).labels == ["tabby", "retriever", "zebra"]


@pytest.mark.skipif("HFCLIP_TEST_DATA" not in os.environ, reason="HFCLIP_TEST_DATA names the folder of test data")
def test_reads_cifar10_as_published():
    folder = Path(os.environ["HFCLIP_TEST_DATA"]) / "cifar10" / "test"
    labels, templates, samples = load_labelled_folder(folder)
    assert labels[0] == "airplane" and len(labels) == 10 and len(samples) == 2000
    assert templates[1] == "a picture of the {c}."
    with tarfile.open(folder / "1.tar") as tar:
        members = tar.getmembers()
        keys = [member.name.removesuffix(".jpg") for member in members if member.name.endswith(".jpg")]
        for place in (0, 517, 999):
            image, target = samples[1000 + place]
            expected = PIL.Image.open(tar.extractfile(f"{keys[place]}.jpg"))
            assert np.array_equal(np.asarray(image), np.asarray(expected)) and image.size == (32, 32)
            assert target == int(tar.extractfile(f"{keys[place]}.cls").read())
            assert labels[target] in tar.extractfile(f"{keys[place]}.txt").read().decode()


def test_accuracy_leaves_undecodable_images_out_and_counts_them(model_folder, tmp_path):
    model, processor = load(model_folder)
    files = {"a.png": png(0)[:40], "a.cls": b"0", "b.png": png(9), "b.cls": b"1", "c.png": b"", "c.cls": b"1"}
    write_tar(tmp_path / "0.tar", files)
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    labels, templates, samples = load_labelled_folder(tmp_path)
    expected = zero_shot_accuracy(model, processor, [samples[1]], labels, templates)
    for batch_size in (1, 3):
        found = zero_shot_accuracy(model, processor, samples, labels, templates, batch_size=batch_size)
        assert found == {**expected, "num_skipped": 2}
    write_tar(tmp_path / "0.tar", {"a.png": b"", "a.cls": b"0"})
    with pytest.raises(ValueError, match="none of 1 samples that were tried can be used. The first one: empty image"):
        load_labelled_folder(tmp_path)


def test_samples_are_upright_and_of_the_formats_of_photographs(tmp_path):
    """As the processor reads a file: an EPS file named jpg would start Ghostscript."""
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    PIL.Image.new("RGB", (4, 8)).save(tmp_path / "cat" / "b.jpg", exif=exif)
    PIL.Image.fromarray(np.full((4, 4), 51200, np.uint16)).save(tmp_path / "cat" / "c.png")
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "a.png").write_bytes(png(0))
    samples = load_labelled_folder(tmp_path).samples
    with pytest.raises(UndecodableImage, match="a.jpg cannot be decoded: .*its format is EPS"):
        samples[0]
    assert samples[1][0].size == (8, 4)
    assert samples[2][0].getpixel((0, 0)) == 200


def test_rejects_names_that_cannot_be_used(tmp_path):
    write_shards(tmp_path, num_shards=1)
    (tmp_path / "classnames.txt").write_text("cat\n\ndog\n")  # without the empty line, dogs were cats
    with pytest.raises(ValueError, match=r"labels at \[1\] are empty"):
        load_labelled_folder(tmp_path)
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a photo\n")
    with pytest.raises(ValueError, match="'a photo' has no place for the label"):
        load_labelled_folder(tmp_path)


def test_rejects_folders_of_no_layout(tmp_path):
    with pytest.raises(ValueError, match="found neither a file nor a folder"):
        load_labelled_folder(tmp_path / "absent")
    with pytest.raises(ValueError, match="is empty"):
        load_labelled_folder(tmp_path)
    write_shards(tmp_path / "test", num_shards=1)
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "0.tar").write_bytes(b"")
    with pytest.raises(ValueError, match="has the labels None, expected two or more: .* a classnames.txt"):
        load_labelled_folder(tmp_path)
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    assert len(load_labelled_folder(tmp_path).samples) == 2  # the split that is held out
    (tmp_path / "images" / "cat").mkdir(parents=True)
    (tmp_path / "images" / "cat" / "a.png").write_bytes(png(0))
    with pytest.raises(ValueError, match="1 images without captions.*class folders, two or more"):
        load_labelled_folder(tmp_path / "images")
    (tmp_path / "one").mkdir()
    write_tar(tmp_path / "one" / "0.tar", {"a.png": png(0), "a.cls": b"0"})
    (tmp_path / "one" / "classnames.txt").write_text("cat\n")
    with pytest.raises(ValueError, match="has the labels .'cat'., expected two or more"):
        load_labelled_folder(tmp_path / "one")
    for name in ("dog", "fox"):
        (tmp_path / "images" / name).mkdir()
    (tmp_path / "images" / "dog" / "a.png").write_bytes(png(0))
    with pytest.raises(ValueError, match="classnames.txt has 2 lines but .* 3 subfolders"):
        load_labelled_folder(tmp_path / "images")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.png": png(0)}, "not whole: 1 with missing caption .0.tar/a.png"),
        ({"b.cls": b"1"}, "not whole: 1 with missing image"),
        ({"a.png": png(0), "a.cls": b"2"}, "sample 1 has class 2, expected 0 to 1"),
        ({"a.png": png(0), "a.cls": b"cat"}, "not whole: 1 with missing caption .0.tar/a.png"),
    ],
)
def test_rejects_shards_that_do_not_fit_together(tmp_path, files, message):
    write_tar(tmp_path / "0.tar", {"c.png": png(1), "c.cls": b"0", **files})
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    with pytest.raises(ValueError, match=message):
        load_labelled_folder(tmp_path)


def test_rejects_damaged_shards_and_images(tmp_path):
    write_shards(tmp_path, num_shards=2)
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    (tmp_path / "nshards.txt").write_text("3\n")
    with pytest.raises(ValueError, match="has 2 shards, but nshards.txt says 3"):
        load_labelled_folder(tmp_path)
    (tmp_path / "nshards.txt").write_text("2\n")
    whole = (tmp_path / "1.tar").read_bytes()
    # A member is a header of 512 bytes and data in blocks of 512: cut in data, in a header, between two samples.
    for size in (700, 1300, 6 * 512):
        (tmp_path / "1.tar").write_bytes(whole[:size])
        with pytest.raises(ValueError, match="not whole: 1 with truncated shard .1.tar"):
            load_labelled_folder(tmp_path)
    write_tar(tmp_path / "1.tar", {"a.png": png(0)[:40], "a.cls": b"0"})
    samples = load_labelled_folder(tmp_path).samples
    with pytest.raises(ValueError, match="1.tar/a.png cannot be decoded"):
        samples[2]


# ----------------------------------------------------------------------------------------------------------- retrieval


def recall_by_sorting(images, texts, image_of_text, k):
    """The definition, query by query. Random scores have no ties."""
    scores = images @ texts.T
    text_hits = [
        any(image_of_text[j] == i for j in scores[i].argsort(descending=True)[:k].tolist()) for i in range(len(images))
    ]
    image_hits = [image_of_text[j] in scores[:, j].argsort(descending=True)[:k].tolist() for j in range(len(texts))]
    return sum(text_hits) / len(images), sum(image_hits) / len(texts)


def pairs(num_images=40):
    """Embeddings with one to five captions an image, in random order, a little nearer to their image than chance."""
    generator = torch.Generator().manual_seed(0)
    image_of_text = [i for i in range(num_images) for _ in range(1 + i % 5)]
    random.Random(0).shuffle(image_of_text)
    images = torch.randn(num_images, 16, generator=generator, dtype=torch.float64)
    noise = torch.randn(len(image_of_text), 16, generator=generator, dtype=torch.float64)
    return F.normalize(images, dim=-1), F.normalize(images[image_of_text] + 2 * noise, dim=-1), image_of_text


@pytest.mark.parametrize("chunk_size", [1, 7, 1024])
def test_recall_equals_sorting(chunk_size):
    images, texts, image_of_text = pairs()
    found = retrieval_recall(images, texts, image_of_text, ks=(1, 2, 5), chunk_size=chunk_size)
    for k in (1, 2, 5):
        text_recall, image_recall = recall_by_sorting(images, texts, image_of_text, k)
        assert 0 < image_recall < 1 and 0 < text_recall < 1 and image_recall != text_recall
        assert found[f"text_retrieval_recall@{k}"] == pytest.approx(text_recall, abs=1e-12)
        assert found[f"image_retrieval_recall@{k}"] == pytest.approx(image_recall, abs=1e-12)


@pytest.mark.parametrize("chunk_size", [5, 1024])
def test_equal_embeddings_earn_nothing(chunk_size):
    embeds = F.normalize(torch.randn(1, 37, generator=torch.Generator().manual_seed(0)), dim=-1).expand(12, -1)
    found = retrieval_recall(embeds, embeds, range(12), ks=(1, 5, 12), chunk_size=chunk_size)
    assert list(found.values()) == [0, 0, 1, 0, 0, 1]


def test_captions_of_one_image_do_not_push_each_other_out():
    images = torch.eye(2)
    texts = images[[0, 0, 0, 1]]
    found = retrieval_recall(images, texts, torch.tensor([0, 0, 0, 1]), ks=(1,))
    assert found == {"text_retrieval_recall@1": 1, "image_retrieval_recall@1": 1}


def test_captions_are_lines_and_follow_the_prefix(model_folder, tmp_path):
    """In the layout of clip-benchmark; the ranks are those of the sentences that are meant."""
    model, processor = load(model_folder)
    colors, files = [(200, 0, 0), (0, 200, 0), (0, 0, 200)], {}
    captions = [["a cat", "the owl"], ["a dog"], ["a bus", "the tulip", "spoon"]]
    for number, (color, lines) in enumerate(zip(colors, captions, strict=True)):
        buffer = io.BytesIO()
        PIL.Image.new("RGB", (32, 32), color).save(buffer, "png")
        files |= {f"{number}.png": buffer.getvalue(), f"{number}.txt": "\n".join([*lines, ""]).encode()}
    write_tar(tmp_path / "0.tar", files)
    assert len(open_source(str(tmp_path)).captions(0)) == 1  # elsewhere a text is one caption
    (tmp_path / "nshards.txt").write_text("1")
    found = retrieval(model, processor, open_source(str(tmp_path)), prefix="a photo of", ks=(1, 2))
    texts = [f"a photo of {caption}" for lines in captions for caption in lines]
    images = [PIL.Image.new("RGB", (32, 32), color) for color in colors]
    inputs = processor(images=images, text=texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        embeds = model.encode_image(inputs["pixel_values"]), model.encode_text(inputs["input_ids"])
    owner = [0, 0, 1, 2, 2, 2]
    text_ranks, image_ranks = retrieval_ranks(*embeds, owner)
    expected = {
        **(recalls := retrieval_recall(*embeds, owner, ks=(1, 2))),
        **{f"mean_recall@{k}": sum(v for n, v in recalls.items() if n.endswith(f"@{k}")) / 2 for k in (1, 2)},
        "text_retrieval_median_rank": metrics.median_rank(text_ranks),
        "image_retrieval_median_rank": metrics.median_rank(image_ranks),
    }
    assert found.metrics == expected and found.protocol == {"images": 3, "captions": 6, "prefix": "a photo of"}


def test_bfloat16_embeddings_are_compared_in_float32():
    """Under autocast, too, where an evaluation during a run stands."""
    images, texts, image_of_text = pairs(200)
    images, texts = images.bfloat16(), texts.bfloat16()
    expected = retrieval_recall(images.float(), texts.float(), image_of_text)
    assert retrieval_recall(images, texts, image_of_text) == expected
    with torch.autocast("cpu", torch.bfloat16):
        assert retrieval_recall(images, texts, image_of_text) == expected
        assert retrieval_recall(images.float(), texts.float(), image_of_text) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(image_embeds=torch.ones(3, 5)), r"\(3, 5\) and text_embeds \(4, 4\)"),
        (dict(image_of_text=[0, 1, 2]), r"image_of_text is \(3,\)"),
        (dict(image_of_text=[0.0, 1.0, 2.0, 2.0]), "expected one integer"),
        (dict(image_of_text=[0, 1, 2, 3]), "names image 3: expected 0 to 2"),
        (dict(image_of_text=[0, 0, 2, 2]), "1 images have no text, the first is 1"),
        (dict(ks=(0, 1)), r"ks \(0, 1\)"),
        (dict(chunk_size=0), "chunk_size 0"),
        (dict(text_embeds=torch.full((4, 4), torch.nan)), "text_embeds holds values that are not finite"),
    ],
)
def test_rejects_embeddings_that_do_not_fit(change, message):
    inputs = dict(image_embeds=torch.ones(3, 4), text_embeds=torch.ones(4, 4), image_of_text=[0, 1, 2, 2])
    assert retrieval_recall(**inputs)
    with pytest.raises(ValueError, match=message):
        retrieval_recall(**{**inputs, **change})
