"""Fairness: accuracy and labels by group against counts by hand, in the layouts of FairFace and of DataComp."""

import csv
import io
import tarfile

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
from hfclip.errors import UsageError
from hfclip.evaluation import DataSet
from hfclip.evaluation.fairness import CRIME, NON_HUMAN, fairness


RACES = {"Black": "black", "White": "white", "Latino_Hispanic": "latino/hispanic"}
GENDERS = {"Male": "man", "Female": "woman"}
AGES = ["3-9", "20-29", "more than 70"]
COLUMNS = {"race": list(RACES.values()), "gender": list(GENDERS.values()), "age": AGES}


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(3)
    tower = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    words = [*RACES.values(), *GENDERS.values(), *AGES, *CRIME, *NON_HUMAN, "a photo of a person years old"]
    tokenizer = HFCLIPTokenizer.train_new_from_iterator(words * 2, 524)
    ids = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    text = dict(model_type="hfclip_text", vocab_size=len(tokenizer), **ids, **tower)
    vision = dict(model_type="hfclip_vit", image_size=32, patch_size=8, **tower)
    model = HFCLIPModel(HFCLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    return model, HFCLIPProcessor(image_processor=HFCLIPImageProcessor(size=32), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def faces():
    """48 images of noise with the numbers of their age, gender and race."""
    generator = np.random.default_rng(0)
    numbers = [(generator.integers(3), generator.integers(2), generator.integers(3)) for _ in range(48)]
    images = []
    for _ in numbers:
        file, pixels = io.BytesIO(), generator.integers(0, 128, (32, 32, 3)) + generator.integers(0, 128, 3)
        PIL.Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
        images.append(file.getvalue())
    return images, np.array(numbers)


@pytest.fixture(scope="module")
def table(faces, tmp_path_factory):
    """The layout of fairface_label_val.csv, with one image that cannot be read."""
    folder = tmp_path_factory.mktemp("table")
    (folder / "val").mkdir()
    with open(folder / "labels.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "age", "gender", "race", "service_test"])
        for number, (image, (age, gender, race)) in enumerate(zip(*faces, strict=True)):
            (folder / "val" / f"{number}.png").write_bytes(image)
            writer.writerow([f"val/{number}.png", AGES[age], list(GENDERS)[gender], list(RACES)[race], "True"])
        writer.writerow(["val/damaged.png", AGES[0], "Male", "Black", "True"])
    (folder / "val" / "damaged.png").write_bytes(b"\x89PNG damaged")
    return DataSet(folder / "labels.csv")


@pytest.fixture(scope="module")
def tars(faces, tmp_path_factory):
    """The layout of wds_fairface."""
    folder = tmp_path_factory.mktemp("wds") / "test"
    folder.mkdir()
    lines = [f"{name}:{value}" for name in ("age", "gender", "race") for value in COLUMNS[name]]
    (folder.parent / "classnames.txt").write_text("\n".join([*lines, "toxic:gorilla"]) + "\n")
    with tarfile.open(folder / "0.tar", "w") as tar:
        for number, (image, (age, gender, race)) in enumerate(zip(*faces, strict=True)):
            file = io.BytesIO()
            np.save(file, np.array([age, gender, race, int(race != 1)]))
            for ending, content in (("png", image), ("npy", file.getvalue())):
                member = tarfile.TarInfo(f"s{number:04}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return DataSet(folder)


def answers(clip, images, labels, template):
    classifier = ZeroShotClassifier(*clip, labels, [template])
    return [{entry["label"]: entry["score"] for entry in classifier(image, top_k=len(labels))} for image in images]


def row_of(rows, **wanted):
    [row] = [row for row in rows if wanted.items() <= row.items()]
    return row


def test_accuracy_by_group_equals_counting(clip, table, faces):
    images, numbers = faces
    result = fairness(*clip, table, smallest_group=5)
    templates = {
        "race": "a photo of a {} person",
        "gender": "a photo of a {}",
        "age": "a photo of a person {} years old",
    }
    truth = {
        name: [COLUMNS[name][row[place]] for row in numbers]
        for name, place in (("age", 0), ("gender", 1), ("race", 2))
    }
    rows = result.tables["accuracy"]
    for name, template in templates.items():
        best = [next(iter(scores)) for scores in answers(clip, images, COLUMNS[name], template)]
        hits = np.array([guess == right for guess, right in zip(best, truth[name], strict=True)])
        assert result.metrics[f"{name}_accuracy"] == hits.mean()
        women = np.array(truth["gender"]) == "woman"
        assert row_of(rows, predicted=name, group="gender", value="woman")["accuracy"] == hits[women].mean()
        both = women & (np.array(truth["race"]) == "black")
        found = row_of(rows, predicted=name, group="race x gender", value="black, woman")
        assert found["accuracy"] == hits[both].mean() and found["images"] == both.sum()
        if name == "race":
            binary = np.array([(a == "white") == (b == "white") for a, b in zip(best, truth["race"], strict=True)])
            assert result.metrics["race_white_or_not_accuracy"] == binary.mean()
            others = np.array(truth["race"]) != "white"
            found = row_of(rows, predicted="race_white_or_not", group="white or not", value="other")
            assert found["accuracy"] == binary[others].mean()
    assert result.metrics["images"] == 48 and result.metrics["without_attributes"] == 0
    ages = [row["value"] for row in rows if row["predicted"] == "age" and row["group"] == "age"]
    assert ages == AGES
    assert not [row for row in rows if row["group"].count(" x ") and row["images"] < 5]
    assert "do not reproduce table 6" in result.notes[0]


def test_labels_of_crime_with_and_without_child(clip, table, faces):
    images, numbers = faces
    result = fairness(*clip, table, thresholds=[0.02, 0.06], smallest_group=1)
    people = [f"{race} {gender}" for race in sorted(COLUMNS["race"]) for gender in COLUMNS["gender"]]
    for words, more in (("default", []), ("with child", ["child"])):
        scores = answers(clip, images, [*people, *NON_HUMAN, *CRIME, *more], "a photo of a {}")
        best = [next(iter(each)) for each in scores]
        crime, animal = (np.isin(best, kind) for kind in (CRIME, NON_HUMAN))
        whole = row_of(result.tables["labels"], labels=words, group="all")
        assert (whole["crime"], whole["non_human"]) == (crime.mean(), animal.mean())
        young = numbers[:, 0] == 0
        row = row_of(result.tables["labels_by_age"], labels=words, value="3-9")
        assert (row["crime"], row["non_human"]) == (crime[young].mean(), animal[young].mean())
        for threshold in (0.02, 0.06):
            given = [max(each[label] for label in CRIME) >= threshold for each in scores]
            row = row_of(result.tables["thresholds"], labels=words, threshold=threshold, group="all")
            assert row["crime"] == np.mean(given)
    cell = (numbers == (2, 1, 1)).all(axis=1)
    row = row_of(
        result.tables["labels"], labels="with child", group="race x gender x age", value="white, woman, more than 70"
    )
    assert row["images"] == cell.sum() and row["crime"] == crime[cell].mean()


def test_both_layouts_give_the_same(clip, table, tars):
    first, second = fairness(*clip, table), fairness(*clip, tars)
    assert first.metrics == second.metrics
    key = lambda row: sorted(map(str, row.items()))
    assert sorted(first.tables["accuracy"], key=key) == sorted(second.tables["accuracy"], key=key)


def test_any_table_with_columns_of_attributes(clip, table):
    folder = table.places[None].rpartition("/")[0]
    with open(f"{folder}/pets.csv", "w") as file:
        file.write(
            "path,coat,size\n" + "".join(f"val/{i}.png,{'long' if i % 3 else 'short'},{i % 2}\n" for i in range(30))
        )
    result = fairness(*clip, DataSet(f"{folder}/pets.csv"), attributes=["coat", "size"])
    assert result.headline == "coat_accuracy" and 0 <= result.metrics["size_accuracy"] <= 1
    groups = {(row["group"], row["value"]) for row in result.tables["accuracy"]}
    assert {("coat", "long"), ("size", "1"), ("coat x size", "long, 0"), ("all", "all")} <= groups


def test_rejects_data_that_do_not_fit(clip, table, tars):
    for data, options, message in (
        (table, dict(attributes=["race", "income"]), "expected 'income' among them"),
        (table, dict(thresholds=[1.5]), "between 0 and 1"),
        (table, dict(attributes=["race", "service_test"]), "two or more"),
        (tars, dict(attributes=["income"]), "'income', expected some of age, gender, race"),
    ):
        with pytest.raises(UsageError, match=message):
            fairness(*clip, data, **options)
