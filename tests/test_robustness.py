"""Robustness: restricted classifiers and class maps against counts by hand, fits against known lines, corruptions."""

import colorsys
import json

import numpy as np
import PIL.Image
import pytest
import torch

from hfclip import (
    HFCLIPConfig,
    HFCLIPImageProcessor,
    HFCLIPModel,
    HFCLIPProcessor,
    HFCLIPTokenizer,
    ZeroShotClassifier,
)
from hfclip.data.sources import open_source
from hfclip.errors import UsageError
from hfclip.evaluation import DataSet
from hfclip.evaluation.corruptions import CORRUPTIONS, Corrupted, Typographic, corrupt, corruptions, typographic
from hfclip.evaluation.data import Part
from hfclip.evaluation.frames import frames, pm_accuracy
from hfclip.evaluation.robustness import (
    FITS,
    PAPER_ROWS,
    PAPER_SETS,
    effective_robustness,
    fit_line,
    fit_of,
    members_by_map,
    read_class_map,
    relative_robustness,
    robustness,
    robustness_plot,
)
from hfclip.evaluation.running import OpenModel, evaluate
from hfclip.evaluation.shared import embed_readable


LABELS = ["cat", "dog", "bus", "owl", "spoon", "tulip"]
TEMPLATE = "a photo of a {}."


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(0)
    tower = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    tokenizer = HFCLIPTokenizer.train_new_from_iterator(LABELS + [TEMPLATE] * 2, 524)
    ids = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    text = dict(model_type="hfclip_text", vocab_size=len(tokenizer), **ids, **tower)
    vision = dict(model_type="hfclip_vit", image_size=32, patch_size=8, **tower)
    model = HFCLIPModel(HFCLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    return model, HFCLIPProcessor(image_processor=HFCLIPImageProcessor(size=32), tokenizer=tokenizer)


def write_images(folder, labels, count, seed):
    """Class folders of noise, each image brightened in its own way."""
    generator = np.random.default_rng(seed)
    for label in labels:
        (folder / label).mkdir(parents=True)
        for number in range(count):
            pixels = generator.integers(0, 128, (32, 32, 3)) + generator.integers(0, 128, 3)
            PIL.Image.fromarray(pixels.astype(np.uint8)).save(folder / label / f"{number}.png")
    return DataSet(folder)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    return {
        "reference": write_images(folder / "reference", LABELS, 4, 0),
        "subset": write_images(folder / "subset", ["bus", "cat", "owl"], 5, 1),
        "animals": write_images(folder / "animals", ["Animal_(any)", "thing", "unknown"], 6, 2),
    }


def answers(clip, dataset, labels):
    """The order in which a classifier of `labels` ranks them for each image, and the image's own class."""
    classifier = ZeroShotClassifier(*clip, labels, [TEMPLATE])
    source = dataset.labelled().samples.source
    ranked = [[entry["label"] for entry in classifier(source[i].image, top_k=len(labels))] for i in range(len(source))]
    return ranked, [source.labels[source.label(i)] for i in range(len(source))]


# ------------------------------------------------------------------------------------------------------------- subsets


def test_classifier_restricted_to_a_subset_equals_counting(clip, sets):
    result = robustness(*clip, [sets["reference"], sets["subset"]])
    ranked, truth = answers(clip, sets["subset"], LABELS)
    inside = [[label for label in order if label in ("bus", "cat", "owl")][0] for order in ranked]
    assert result.metrics["subset_top1"] == np.mean([a == b for a, b in zip(inside, truth)])
    ranked, truth = answers(clip, sets["reference"], LABELS)
    assert result.metrics["reference_top1"] == np.mean([order[0] == label for order, label in zip(ranked, truth)])
    kept = [([x for x in order if x in ("bus", "cat", "owl")][0], label) for order, label in zip(ranked, truth)]
    kept = [guess == label for guess, label in kept if label in ("bus", "cat", "owl")]
    [row] = result.tables["robustness"]
    assert row["reference_top1_of_its_classes"] == np.mean(kept)
    assert row["images"] == 15 and row["classes"] == 3 and "own_names_top1" not in row
    assert result.metrics[result.headline] == row["top1"]
    assert "subset" in result.notes[0] and "effective_robustness" not in row


def test_class_of_several_members_scores_as_its_best(clip, sets, tmp_path):
    mapping = {"animal_(any)": ["cat", "dog", 3], "thing": "spoon"}
    (tmp_path / "animals.json").write_text(json.dumps(mapping))
    result = robustness(*clip, [sets["reference"], sets["animals"]], class_maps=str(tmp_path))
    owner = {"cat": "Animal (any)", "dog": "Animal (any)", "owl": "Animal (any)", "spoon": "thing"}
    ranked, truth = answers(clip, sets["animals"], LABELS)
    guesses = [owner[next(label for label in order if label in owner)] for order in ranked]
    hits = [guess == label for guess, label in zip(guesses, truth) if label != "unknown"]
    assert result.metrics["animals_top1"] == np.mean(hits)
    assert result.metrics["animals_left_out"] == 6
    own, truth = answers(clip, sets["animals"], ["Animal (any)", "thing", "unknown"])
    assert result.metrics["animals_own_names_top1"] == np.mean([order[0] == label for order, label in zip(own, truth)])


def test_public_metadata_is_read_as_it_is(tmp_path):
    objectnet, vid = tmp_path / "objectnet", tmp_path / "vid"
    files = {
        objectnet / "folder_to_objectnet_label.json": {
            "alarm_clock": "Alarm clock",
            "dress_shoe_men": "Dress shoe (men)",
        },
        objectnet / "objectnet_to_imagenet_1k.json": {
            "Alarm clock": "analog clock; digital clock",
            "Dress shoe (men)": "Loafer",
        },
        objectnet / "pytorch_to_imagenet_2012_id.json": {"409": 0, "530": 2, "630": 1},
        vid / "rev_wnid_map.json": {"n02958343": ["n03100240", "n03594945"]},
        vid / "imagenet_class_index.json": {"511": ["n03100240", "convertible"], "609": ["n03594945", "jeep"]},
        vid / "imagenet_vid_class_index.json": {"7": ["n02958343", "car"]},
    }
    for path, content in files.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    (objectnet / "imagenet_to_label_2012_v2").write_text("analog clock\nLoafer\ndigital clock\n")
    mapping = read_class_map(objectnet)
    reference = [str(number) for number in range(1000)]
    for names in (["alarm_clock", "dress shoe men"], ["Alarm clock", "Dress shoe (men)"]):
        assert members_by_map("objectnet", names, reference, mapping) == [[409, 530], [630]]
    assert read_class_map(vid) == {"7": [511, 609]}
    assert members_by_map("vid", [str(n) for n in range(8)], reference, read_class_map(vid)) == [[]] * 7 + [[511, 609]]


def test_frames_count_an_anchor_only_with_all_that_are_near(clip, sets, tmp_path):
    best = {"a": 1, "a1": 1, "b": 0, "b1": 2, "c": 2, "c1": 2}
    labels, near = {"a": [1, 4], "b": [0], "c": [1], "b1": [2]}, {"a": ["a1"], "b": ["b1"], "c": ["c1"]}
    assert pm_accuracy(best, labels, near) == (2 / 3, 2 / 3)
    assert pm_accuracy(best, {**labels, "b1": [0]}, near) == (2 / 3, 1 / 3)

    source = sets["subset"].labelled().samples.source
    folder = tmp_path / "frames"
    (folder / "metadata").mkdir(parents=True)
    ranked, _ = answers(clip, sets["subset"], LABELS)
    for number in range(4):
        (folder / f"{number}.png").write_bytes(source[number].image)
    right = [sorted(LABELS).index(order[0]) for order in ranked[:4]]
    (folder / "metadata" / "labels.json").write_text(json.dumps({"0.png": [right[0]], "2.png": [right[2]]}))
    (folder / "metadata" / "pmsets.json").write_text(json.dumps({"0.png": ["1.png"], "2.png": ["3.png"]}))
    (tmp_path / "map.json").write_text(json.dumps({str(number): [number] for number in range(6)}))
    found = frames(*clip, [sets["reference"], DataSet(folder)], class_map=str(tmp_path / "map.json"))
    assert found.metrics["pm0"] == 1
    assert found.metrics["pmk"] == np.mean([right[1] == right[0], right[3] == right[2]])
    with pytest.raises(UsageError, match="no pmsets.json"):
        (folder / "metadata" / "pmsets.json").unlink()
        frames(*clip, [sets["reference"], DataSet(folder)], class_map=str(tmp_path / "map.json"))


@pytest.mark.parametrize(
    "mapping, message",
    [
        (None, "class_maps"),
        ({"thing": ["fork"]}, "'fork', which the reference has not"),
        ({"thing": [6]}, "6, which the reference has not"),
        ({"sofa": ["cat"]}, "'sofa', expected classes such as 'Animal"),
        ("{", "animals.json"),
    ],
)
def test_rejects_classes_that_do_not_fit(clip, sets, tmp_path, mapping, message):
    if mapping is not None:
        (tmp_path / "animals.json").write_text(mapping if isinstance(mapping, str) else json.dumps(mapping))
    with pytest.raises(UsageError, match=message):
        robustness(*clip, [sets["reference"], sets["animals"]], class_maps=str(tmp_path))


def test_rejects_one_set_alone_and_embeddings_that_are_not_finite(clip, sets):
    with pytest.raises(UsageError, match="a reference and shifted sets"):
        robustness(*clip, [sets["reference"]])
    model, processor = clip
    broken = HFCLIPModel(model.config)
    broken.visual_projection.weight.data.fill_(torch.nan)
    with pytest.raises(UsageError, match="not finite"):
        robustness(broken, processor, [sets["reference"], sets["subset"]])


# ---------------------------------------------------------------------------------------------------------------- fits


def test_fits_of_other_models():
    zero_shot = dict(zip(PAPER_SETS, PAPER_ROWS["zero-shot CLIP (paper)"][1:]))
    resnet = dict(zip(PAPER_SETS, PAPER_ROWS["ResNet-101"][1:]))
    expected = {"imagenetv2": 0.641, "imagenet-sketch": 0.246, "imagenet-r": 0.368, "imagenet-a": 0.042}
    for name, value in expected.items():
        assert FITS[name](0.762) == pytest.approx(value, abs=5e-4)
        assert abs(resnet[name] - value) < 0.02 and zero_shot[name] - value > 0.05
    assert FITS["imagenet-a"](0.85) == pytest.approx(1 / (1 + np.exp(-(5.166 * np.log(0.85 / 0.15) - 9.07))))
    assert fit_of("clip-benchmark/wds_imagenet_sketch") is FITS["imagenet-sketch"]
    assert fit_of("objectnet") is None
    assert effective_robustness(FITS["imagenetv2"], 0.762, 0.701) == pytest.approx(0.06, abs=1e-3)
    assert relative_robustness(0.701, 0.759) == pytest.approx(0.058)
    for wrong in (-0.1, 1.2, np.nan):
        with pytest.raises(UsageError, match="a fraction from 0 to 1"):
            FITS["imagenetv2"](wrong)


def test_line_through_own_baseline(clip, sets, tmp_path):
    x = np.array([0.3, 0.5, 0.6, 0.8, 1.0])
    y = 1 / (1 + np.exp(-(0.9 * np.log(x[:4] / (1 - x[:4])) - 0.5)))
    fit = fit_line(x, [*y, 0.9])
    assert fit.pieces[0][1:] == pytest.approx((0.9, -0.5)) and fit.n == 4
    assert fit.r2 == pytest.approx(1) and fit.sd == pytest.approx(0, abs=1e-12)
    table = tmp_path / "baseline.csv"
    table.write_text("file,reference,subset\n" + "".join(f"m{i},{a},{b}\n" for i, (a, b) in enumerate(zip(x, y))))
    result = robustness(*clip, [sets["reference"], sets["subset"]], baseline=str(table))
    reference, shifted = result.metrics["reference_top1"], result.metrics["subset_top1"]
    assert result.metrics["subset_effective_robustness"] == pytest.approx(shifted - fit(reference))
    with pytest.raises(UsageError, match="three or more"):
        fit_line([0.5, 0.6], [0.4, 0.5])


def test_results_belong_to_what_a_table_holds(clip, sets, tmp_path):
    table, opened = tmp_path / "models.csv", OpenModel(*clip, "tiny")
    table.write_text("reference,subset\n0.5,0.3\n0.6,0.4\n0.7,0.5\n")
    several, options = [sets["reference"], sets["subset"]], {"baseline": str(table), "out": tmp_path / "results"}
    first = evaluate("robustness", opened, several, **options)
    assert evaluate("robustness", opened, several, **options).run["date"] == first.run["date"]
    table.write_text("reference,subset\n0.5,0.2\n0.6,0.3\n0.7,0.4\n")
    other = evaluate("robustness", opened, several, **options)
    assert other.metrics["subset_effective_robustness"] > first.metrics["subset_effective_robustness"]


def test_points_of_any_origin_on_one_plot(clip, sets, tmp_path):
    result = robustness(*clip, [sets["reference"], sets["subset"]])
    stored = {"task": "robustness", "model": {"name": "runs/tiny"}, "tables": result.tables}
    (tmp_path / "probes.csv").write_text("set,origin,reference_top1,top1\nimagenet-r,probe,0.854,0.842\n")
    found = robustness_plot(
        None, None, [stored, {"task": "other"}], points=str(tmp_path / "probes.csv"), paper=True, before="ResNet-101"
    )
    rows = {(row["origin"], row["set"]): row for row in found.tables["points"]}
    assert rows["tiny", "subset"]["top1"] == result.metrics["subset_top1"]
    assert rows["probe", "imagenet-r"]["relative_robustness"] == pytest.approx(0.842 - 0.377)
    zero_shot = rows["zero-shot CLIP (paper)", "imagenet-r"]
    assert zero_shot["effective_robustness"] == pytest.approx(0.889 - FITS["imagenet-r"](0.762))
    assert len(rows) == found.metrics["points"] == 27 and found.metrics["origins"] == 7
    for options, message in ((dict(before="other"), "other among them"), ({}, "no points")):
        with pytest.raises(UsageError, match=message):
            robustness_plot(None, None, [], **options)


def test_plot_has_lines_of_other_models_and_percent_ticks(tmp_path):
    found = robustness_plot(None, None, [], paper=True, figure=str(tmp_path / "plot.svg"))
    text = (tmp_path / "plot.svg").read_text()
    for words in ("accuracy on the reference", "equal", "ResNet-101", "imagenet-a", ">75%<", ">90%<"):
        assert words in text
    lines = {name: [row for row in found.tables["fits"] if row["set"] == name] for name in PAPER_SETS}
    assert [name for name in PAPER_SETS if not lines[name]] == ["objectnet"]  # of which there is no fit
    for row in lines["imagenet-a"]:
        assert row["top1"] == pytest.approx(FITS["imagenet-a"](row["reference_top1"]))
        assert row["low"] < row["top1"] < row["high"]
    robustness_plot(None, None, [], paper=True, figure=str(tmp_path / "plot.png"))
    assert PIL.Image.open(tmp_path / "plot.png").size[0] > 500
    (tmp_path / "probes.csv").write_text("set,origin,reference_top1,top1\nimagenet-r,probe,0.9,1\n")
    with pytest.raises(UsageError, match="no point"):
        robustness_plot(None, None, [], points=str(tmp_path / "probes.csv"), figure=str(tmp_path / "none.png"))


# --------------------------------------------------------------------------------------------------------- corruptions


@pytest.fixture(scope="module")
def photo(data_dir):
    source = open_source(str(data_dir / "imagenet_sample"), require_captions=False)
    image = Corrupted(source, "contrast", 1)
    image.alter = lambda image, sample: image
    return image[3].image


RANDOM = ("glass_blur", "motion_blur", "snow", "fog", "spatter", "elastic_transform")


def test_corruptions_are_deterministic_and_grow(photo):
    clean = np.asarray(photo, float)
    for kind in CORRUPTIONS:
        first = corrupt(photo, kind, 1, "a.jpg")
        assert first.tobytes() == corrupt(photo, kind, 1, "a.jpg").tobytes() != photo.tobytes()
        assert first.size == photo.size and first.mode == "RGB"
        distances = [
            np.abs(np.asarray(corrupt(photo, kind, severity), float) - clean).mean() for severity in (1, 3, 5)
        ]
        grows = distances[0] < distances[-1] and (kind == "saturate" or distances[0] < distances[1])
        assert grows or kind == "elastic_transform", kind  # whose first levels move all, and the others each pixel
        is_random = kind.endswith("noise") or kind in RANDOM
        assert (corrupt(photo, kind, 1, "b.jpg").tobytes() != first.tobytes()) == is_random
        assert (corrupt(photo, kind, 1, "a.jpg", seed=1).tobytes() != first.tobytes()) == is_random


def test_colours_are_those_of_hsv(photo):
    pixels = np.asarray(photo)[::37, ::41].reshape(1, -1, 3)
    pixels = np.concatenate([pixels, [[[90, 90, 90], [0, 0, 0]]]], axis=1).astype(np.uint8)
    image = PIL.Image.fromarray(pixels)
    more = CORRUPTIONS["brightness"].levels[2]
    scale, shift = CORRUPTIONS["saturate"].levels[3]
    for number, rgb in enumerate(pixels[0] / 255):
        hue, saturation, value = colorsys.rgb_to_hsv(*rgb)
        brighter = colorsys.hsv_to_rgb(hue, saturation, min(value + more, 1))
        assert np.abs(np.asarray(corrupt(image, "brightness", 3))[0, number] - 255 * np.array(brighter)).max() <= 1
        vivid = colorsys.hsv_to_rgb(hue, min(saturation * scale + shift, 1), value)
        assert np.abs(np.asarray(corrupt(image, "saturate", 4))[0, number] - 255 * np.array(vivid)).max() <= 1


def test_blur_is_a_mean_weighted_as_its_name_says():
    dot = np.zeros((61, 61, 3), np.uint8)
    dot[30, 30] = 255
    blurred = np.asarray(corrupt(PIL.Image.fromarray(dot), "gaussian_blur", 1), float)[..., 0] / 255
    along = np.exp(-(np.arange(-4, 5) ** 2) / 2)
    expected = np.outer(along, along) / along.sum() ** 2
    assert np.abs(blurred[26:35, 26:35] - expected).max() <= 1 / 255 and blurred[:26].max() == 0
    disk = np.asarray(corrupt(PIL.Image.fromarray(np.full((61, 61, 3), 200, np.uint8)), "defocus_blur", 5))
    assert (disk == 200).all()  # a plain image stays as it is, at its borders too
    edge = np.zeros((61, 61, 3), np.uint8)
    edge[:, 31:] = 255
    profile = np.asarray(corrupt(PIL.Image.fromarray(edge), "defocus_blur", 2), float)[30, :, 0]
    assert profile[25] == 0 and profile[36] == 255 and (np.diff(profile) >= 0).all()


def test_rejects_corruptions_that_are_none(photo, sets):
    with pytest.raises(UsageError, match="'frost'.*expected one of gaussian_noise"):
        corrupt(photo, "frost", 1)
    with pytest.raises(UsageError, match="severity 6"):
        Corrupted(sets["subset"].labelled().samples.source, "contrast", 6)


def test_accuracy_on_corrupted_images(clip, sets):
    folder = sets["subset"].labelled()
    result = corruptions(*clip, folder, kinds=["contrast", "gaussian_noise"], severities=[2, 5])
    classifier = ZeroShotClassifier(*clip, folder.labels, folder.templates)
    source = Corrupted(folder.samples.source, "gaussian_noise", 5)
    hits = [classifier(source[i].image)[0]["label"] == folder.labels[source[i].label] for i in range(len(source))]
    [row] = [
        row for row in result.tables["corruptions"] if row == {**row, "corruption": "gaussian_noise", "severity": 5}
    ]
    assert row["top1"] == np.mean(hits)
    by_row = [row["top1"] for row in result.tables["corruptions"]]
    assert result.metrics["corrupted_top1"] == pytest.approx(np.mean(by_row)) and len(by_row) == 4


def test_images_that_are_made_are_made_once(clip, sets, tmp_path):
    class Counted(Corrupted):
        made = 0

        def alter(self, image, sample):
            Counted.made += 1
            return super().alter(image, sample)

    source, options = sets["subset"].labelled().samples.source, {"cache_dir": tmp_path, "num_workers": 0}
    first = embed_readable(*clip, Counted(source, "contrast", 5), **options)
    assert Counted.made == len(source) and first.keys == [source[i].key for i in range(len(source))]
    again = embed_readable(*clip, Counted(Part(source, range(len(source))), "contrast", 5), **options)
    assert Counted.made == len(source) and np.array_equal(again.embeds, first.embeds)
    other = embed_readable(*clip, Counted(source, "contrast", 4), **options)
    assert Counted.made == 2 * len(source) and not np.array_equal(other.embeds, first.embeds)


def test_typographic_attack_writes_wrong_names(clip, sets):
    folder = sets["subset"].labelled()
    attacked, plain = Typographic(folder.samples.source), folder.samples.source
    written = []
    for index in range(len(plain)):
        sample = attacked[index]
        assert sample.image.tobytes() == attacked[index].image.tobytes()
        name = folder.labels[attacked.written(sample.key, sample.label)]
        assert name != folder.labels[sample.label]
        assert (np.asarray(sample.image) == 255).all(axis=2).sum() > 50  # white letters
        written.append(name)
    assert len(set(written)) > 1
    classifier = ZeroShotClassifier(*clip, folder.labels, folder.templates)
    after = [classifier(attacked[index].image)[0]["label"] for index in range(len(plain))]
    result = typographic(*clip, folder)
    assert result.metrics["attack_rate"] == np.mean([a == b for a, b in zip(after, written)])
    plain.labels, labels = ["same", "same", "same"], plain.labels
    with pytest.raises(UsageError, match="two different ones"):
        Typographic(plain)
    plain.labels = labels
