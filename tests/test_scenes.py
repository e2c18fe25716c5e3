"""The built-in scenes: pure functions of (seed, split, index), true captions, held-out pairs, consistent tasks."""

import colorsys
import hashlib
import itertools
import json
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from hfclip.data import Scenes, draw_predictions, retrieval_task, zero_shot_tasks
from hfclip.data.scenes import (
    BACKGROUNDS,
    COLORS,
    COUNTS,
    HELD_OUT,
    PAIRS,
    POSITIONS,
    SHAPES,
    SIZES,
    describe,
)


MANY = 3000  # scenes without pixels; a few tens of microseconds each


@pytest.fixture(scope="module", params=["train", "test"])
def scenes(request) -> Scenes:
    return Scenes(request.param, num_scenes=MANY)


def kinds(scenes: Scenes) -> list[dict]:
    return [kind for index in range(len(scenes)) for kind in scenes.attributes(index)["objects"]]


# ---------------------------------------------------------------------------------------------------------------------
# Determinism
# ---------------------------------------------------------------------------------------------------------------------


def digest(scenes: Scenes, indices) -> str:
    sha = hashlib.sha256()
    for index in sorted(indices, reverse=True):
        scene = scenes[index]
        sha.update(scene["image"].tobytes() + repr((scene["text"], scene["attributes"])).encode())
    return sha.hexdigest()


_DIGEST_ELSEWHERE = """
import hashlib
from hfclip.data import Scenes
scenes, sha = Scenes("train", size=48, seed=3), hashlib.sha256()
for index in reversed(range(60)):
    scene = scenes[index]
    sha.update(scene["image"].tobytes() + repr((scene["text"], scene["attributes"])).encode())
print(sha.hexdigest())
"""


@pytest.mark.parametrize("hash_seed", ["0", "4711"])
def test_scenes_are_the_same_in_every_process(hash_seed):
    scenes = Scenes("train", size=48, seed=3)
    scenes[17], scenes[4]  # an earlier access must leave no trace
    environment = os.environ | {"PYTHONHASHSEED": hash_seed}
    command = [sys.executable, "-c", _DIGEST_ELSEWHERE]
    elsewhere = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()
    assert elsewhere == digest(scenes, range(60))


def test_attributes_and_captions_are_those_of_every_release():
    # Pixels may change with numpy and Pillow. These may not: published numbers depend on them.
    said = [
        (scenes.caption(index), describe(scenes.attributes(index)), scenes.attributes(index))
        for scenes in (Scenes("train"), Scenes("test", seed=1))
        for index in range(500)
    ]
    assert (
        hashlib.sha256(json.dumps(said).encode()).hexdigest()
        == "faf9c44c3beededae867761af9cef19c18bd3e242391bb4268d03eb84db8a36f"
    )


def test_text_and_attributes_do_not_depend_on_painting(scenes):
    for index in range(50):
        for size in (32, 96):
            scene = Scenes(scenes.split, size=size)[index]
            assert scene["image"].size == (size, size) and scene["image"].mode == "RGB"
            assert scene["text"] == scenes.caption(index) and scene["attributes"] == scenes.attributes(index)


def test_seeds_and_splits_differ():
    variants = [Scenes("train"), Scenes("train", seed=1), Scenes("test"), Scenes("test", seed=1)]
    for one, other in itertools.combinations(variants, 2):
        same = sum(one[index]["image"].tobytes() == other[index]["image"].tobytes() for index in range(20))
        assert same == 0, (one.split, one.seed, other.split, other.seed)


def test_length_does_not_change_scenes_and_iteration_ends():
    assert [scene["text"] for scene in Scenes("train", num_scenes=5)] == [Scenes("train").caption(i) for i in range(5)]


# ---------------------------------------------------------------------------------------------------------------------
# What is shown
# ---------------------------------------------------------------------------------------------------------------------


def test_train_split_shows_all_pairs_but_the_held_out_ones():
    train, test = Scenes("train", num_scenes=MANY), Scenes("test", num_scenes=MANY)
    assert {(kind["color"], kind["shape"]) for kind in kinds(train)} == set(PAIRS) - HELD_OUT
    assert {(kind["color"], kind["shape"]) for kind in kinds(test)} == HELD_OUT
    named = re.compile(rf"\b({'|'.join(COLORS)}) ({'|'.join(SHAPES)})(?:s|es)?\b")
    said = {pair for index in range(MANY) for pair in named.findall(train.caption(index))}
    assert said == set(PAIRS) - HELD_OUT


def test_every_color_and_shape_is_met_in_training_and_every_shape_in_testing():
    trained = set(PAIRS) - HELD_OUT
    assert {color for color, _ in trained} == set(COLORS) and {shape for _, shape in trained} == set(SHAPES)
    assert {shape for _, shape in HELD_OUT} == set(SHAPES) and len({color for color, _ in HELD_OUT}) == len(HELD_OUT)


def test_every_value_of_every_attribute_occurs(scenes):
    found = kinds(scenes)
    assert {kind["size"] for kind in found} == set(SIZES)
    assert {kind["count"] for kind in found} == {1, 2, 3, 4}
    assert {kind["position"] for kind in found} == {*POSITIONS, None}
    assert {scenes.attributes(index)["background"] for index in range(MANY)} == set(BACKGROUNDS)


def test_objects_lie_inside_apart_and_where_their_position_says(scenes):
    for index in range(MANY):
        placed = [
            (*center, kind["radius"]) for kind in scenes.attributes(index)["objects"] for center in kind["centers"]
        ]
        for x, y, radius in placed:
            assert radius < min(x, y) and max(x, y) < 1 - radius
        for a, b in itertools.combinations(placed, 2):
            assert math.dist(a[:2], b[:2]) > a[2] + b[2]
        for kind in scenes.attributes(index)["objects"]:
            assert len(kind["centers"]) == kind["count"]
            if kind["position"]:
                (x, y), (column, row) = kind["centers"][0], POSITIONS[kind["position"]][0]
                assert column == (x > 0.4) + (x > 0.6) and row == (y > 0.4) + (y > 0.6)


def test_relations_are_clear_to_the_eye(scenes):
    seen = set()
    for index in range(MANY):
        attributes = scenes.attributes(index)
        if attributes["relation"]:
            (x1, y1), (x2, y2) = (kind["centers"][0] for kind in attributes["objects"])
            dx, dy = x2 - x1, y2 - y1
            along, across = (dx, dy) if abs(dx) > abs(dy) else (dy, dx)
            assert abs(across) < 0.7 * abs(along)
            horizontal = abs(dx) > abs(dy)
            expected = ("left of" if dx > 0 else "right of") if horizontal else ("above" if dy > 0 else "below")
            assert attributes["relation"] == expected
            seen.add(expected)
    assert seen == {"left of", "right of", "above", "below"}


def test_painted_colors_are_the_named_ones(scenes):
    """Light scales a color but keeps its direction in RGB space; brightness tells black, gray and brown."""
    darker = {"gray": "white", "brown": "orange"}
    names = [name for name in COLORS if name not in {"black", *darker}]
    rgb = np.array([colorsys.hsv_to_rgb(hue / 360, s, v) for hue, s, v in (COLORS[name] for name in names)])
    directions = rgb / np.linalg.norm(rgb, axis=1, keepdims=True)
    for index in range(400):
        scene = scenes[index]
        pixels = np.asarray(scene["image"], dtype=np.float64)
        for kind in scene["attributes"]["objects"]:
            for x, y in kind["centers"]:
                x += 0.76 * kind["radius"] if kind["shape"] == "ring" else 0  # its middle is background
                pixel = pixels[int(y * 64), int(x * 64)]
                nearest = "black" if pixel.max() < 40 else names[np.argmax(directions @ pixel)]
                assert nearest == darker.get(kind["color"], kind["color"]), (index, kind, pixel)
                if nearest in darker.values():
                    assert (pixel.max() < 180) == (kind["color"] in darker), (index, kind, pixel)


# ---------------------------------------------------------------------------------------------------------------------
# What is said
# ---------------------------------------------------------------------------------------------------------------------

ADJECTIVES = {"little": "small", "small": "small", "medium-sized": "medium", "big": "large", "large": "large"}
PLURALS = {shape: re.sub("ss$", "sse", shape) + "s" for shape in (*SHAPES, "shape", "object")}
NOUNS = {**{plural: noun for noun, plural in PLURALS.items()}, **{noun: noun for noun in PLURALS}}
PHRASE = re.compile(
    rf"(?:\b(?P<count>an?|{'|'.join(COUNTS)}) )?"
    rf"(?:(?P<size>{'|'.join(ADJECTIVES)}) )?(?:(?P<color>{'|'.join(COLORS)}) )?(?P<noun>{'|'.join(NOUNS)})\b"
)
RELATIONS_SAID = {"over": "above", "under": "below", "to the left of": "left of", "to the right of": "right of"}
JOINT = re.compile(r" (?P<joint>and|above|over|below|under|(?:to the )?(?:left|right) of) (?=an? |one )")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
FRAME_WORDS = set("a an photo picture image drawing scene of with this shows you can see there is are".split())


def is_true_of(phrase: re.Match, kind: dict) -> bool:
    count, plural = phrase["count"], phrase["noun"] in PLURALS.values()
    noun = NOUNS[phrase["noun"]]
    return (
        plural == (kind["count"] > 1)
        and (count is None or kind["count"] == (1 if count in ("a", "an") else COUNTS.index(count) + 1))
        and (phrase["size"] is None or ADJECTIVES[phrase["size"]] == kind["size"])
        and (phrase["color"] in (None, kind["color"]))
        and (noun in ("shape", "object", kind["shape"]))
    )


def check_caption(text: str, attributes: dict) -> set[str]:
    """Asserts that every claim of `text` is true, and that nothing in it is left unread; returns what it mentions."""
    mentions = set()
    rest = text.removesuffix(".")
    for background in re.findall(r" on a (\w+) background$", rest):
        assert background == attributes["background"], text
        rest = rest.removesuffix(f" on a {background} background")
        mentions.add("background")
    for position, (_, said) in POSITIONS.items():
        if rest.endswith(said):
            assert attributes["objects"][0]["position"] == position, text
            rest = rest.removesuffix(said).rstrip()
            mentions.add("position")
    phrases = list(PHRASE.finditer(rest))
    assert len(phrases) == len(attributes["objects"]), text
    orders = list(itertools.permutations(attributes["objects"]))
    true = [order for order in orders if all(is_true_of(*pair) for pair in zip(phrases, order, strict=True))]
    assert true, text
    mentions |= {name for phrase in phrases for name, value in phrase.groupdict().items() if value}
    joint = JOINT.search(rest)
    assert (joint is not None) == (len(phrases) == 2), text
    if joint and joint["joint"] != "and":
        said = RELATIONS_SAID.get(joint["joint"], joint["joint"])
        forth = said == attributes["relation"]
        assert forth or said == OPPOSITE[attributes["relation"]], text
        assert tuple(attributes["objects"] if forth else attributes["objects"][::-1]) in true, text
        mentions.add("relation")
    left_over = PHRASE.sub("", JOINT.sub(" ", rest)).split()
    assert set(left_over) <= FRAME_WORDS, text
    return mentions


def test_every_caption_is_true_of_its_scene(scenes):
    mentions = [check_caption(scenes.caption(index), scenes.attributes(index)) for index in range(MANY)]
    counts = {name: sum(name in mentioned for mentioned in mentions) for name in set().union(*mentions)}
    assert set(counts) == {"background", "position", "count", "size", "color", "noun", "relation"}
    assert min(counts.values()) > MANY / 20


def test_descriptions_are_true_and_say_everything(scenes):
    for index in range(MANY):
        attributes = scenes.attributes(index)
        expected = {"background", "count", "size", "color", "noun"}
        expected |= {"relation"} if attributes["relation"] else set()
        expected |= {"position"} if attributes["objects"][0]["position"] else set()
        assert check_caption(describe(attributes), attributes) == expected


def test_articles_fit_their_words(scenes):
    for index in range(MANY):
        assert not re.search(r"\b(a [aeio]|an [^aeio])", scenes.caption(index)), scenes.caption(index)


# ---------------------------------------------------------------------------------------------------------------------
# Tasks
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shown() -> dict[bytes, dict]:
    """Attributes of the first test scenes by their pixels."""
    scenes = Scenes("test", size=32)
    return {scene["image"].tobytes(): scene["attributes"] for scene in (scenes[index] for index in range(500))}


def test_zero_shot_targets_agree_with_what_the_images_show(shown):
    tasks = {task.name: task for task in zero_shot_tasks(size=32, num_images=60)}
    label_of = {
        "color and shape": lambda kind: (
            f"{'an' if kind['color'] == 'orange' else 'a'} {kind['color']} {kind['shape']}"
        ),
        "color": lambda kind: kind["color"],
        "shape": lambda kind: f"a {kind['shape']}",
        "count": lambda kind: "a shape" if kind["count"] == 1 else f"{COUNTS[kind['count'] - 1]} shapes",
        "position": lambda kind: POSITIONS[kind["position"]][1],
    }
    assert set(tasks) == set(label_of)
    for name, task in tasks.items():
        assert len(task.images) == len(task.targets) == 60 and len(set(task.labels)) == len(task.labels)
        assert all(template.count("{}") == 1 for template in task.templates)
        for image, target in zip(task.images, task.targets, strict=True):
            (kind,) = shown[image.tobytes()]["objects"]
            assert task.labels[target] == label_of[name](kind)


def test_pairs_are_told_apart_from_all_others_and_only_held_out_ones_are_shown():
    task = zero_shot_tasks(size=32, num_images=300)[0]
    assert len(task.labels) == len(PAIRS)
    assert {PAIRS[target] for target in task.targets} == HELD_OUT


def test_tasks_hold_as_many_images_as_asked_for():
    # The rarest scenes, a lone object, must suffice.
    for seed in range(3):
        assert all(len(task.images) == len(task.targets) == 7 for task in zero_shot_tasks(32, seed, num_images=7))


def test_retrieval_pairs_each_image_with_its_own_full_caption(shown):
    task = retrieval_task(size=32, num_images=200)
    assert len(task.images) == len(set(task.texts)) == 200
    for image, text in zip(task.images, task.texts, strict=True):
        assert text == describe(shown[image.tobytes()])


# ---------------------------------------------------------------------------------------------------------------------
# Errors, and the picture of predictions
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "valid"}, r"splits \['test', 'train'\].*'valid'"),
        ({"split": "train", "size": 31}, "size >= 32.*size=31"),
        ({"split": "train", "num_scenes": 0}, "num_scenes >= 1.*num_scenes=0"),
    ],
)
def test_rejects_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Scenes(**arguments)


@pytest.mark.parametrize("index", [-1, 10, 10**9])
def test_rejects_an_index_out_of_range(index):
    with pytest.raises(IndexError, match=f"Scene {index} .* 0 to 9"):
        Scenes("train", num_scenes=10)[index]


def test_rejects_an_index_that_is_no_integer():
    with pytest.raises(TypeError):
        Scenes("train")[0.5]


@pytest.mark.parametrize(("size", "shown"), [((400, 100), (192, 48)), ((10, 40), (48, 192)), ((2000, 1), (192, 1))])
def test_contact_sheet_shows_images_whole_and_in_their_proportions(size, shown, tmp_path):
    image = Image.new("RGB", size, (255, 0, 255))
    draw_predictions(tmp_path / "sheet.png", [image], ["a"], [[{"label": "a", "score": 1.0}]])
    pixels = np.asarray(Image.open(tmp_path / "sheet.png"), int)
    ys, xs = (abs(pixels - (255, 0, 255)).sum(axis=-1) < 30).nonzero()
    assert (np.ptp(xs) + 1, np.ptp(ys) + 1) == shown


def test_contact_sheet_shows_images_upright(tmp_path):
    image = Image.new("RGB", (40, 20), (255, 0, 255))
    image.getexif()[0x0112] = 6  # the camera was turned
    draw_predictions(tmp_path / "sheet.png", [image], ["a"], [[{"label": "a", "score": 1.0}]])
    pixels = np.asarray(Image.open(tmp_path / "sheet.png"), int)
    ys, xs = (abs(pixels - (255, 0, 255)).sum(axis=-1) < 30).nonzero()
    assert (np.ptp(xs) + 1, np.ptp(ys) + 1) == (96, 192)


def test_predictions_are_drawn_green_if_right_and_red_if_wrong(tmp_path):
    images = [Scenes("test")[index]["image"] for index in range(2)]
    ranked = [{"label": "a star", "score": 0.7}, {"label": "a ring", "score": 0.2}, {"label": "a heart", "score": 0.1}]
    draw_predictions(tmp_path / "sheet.png", images, ["a star", "a ring"], [ranked, ranked], title="Zero-shot")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB")).astype(int)
    frames = [
        sheet[len(sheet) // 2, column] for column in (13, sheet.shape[1] - 13)
    ]  # left and right edge of the cards
    assert [frame.tolist() for frame in frames] == [[47, 158, 91], [214, 69, 69]]


def test_rejects_predictions_that_do_not_fit_their_images(tmp_path):
    image = Image.new("RGB", (8, 8))
    with pytest.raises(ValueError, match="2 images, 1 truths and 2 predictions"):
        draw_predictions(tmp_path / "sheet.png", [image] * 2, ["a"], [[{"label": "a", "score": 1.0}]] * 2)
    with pytest.raises(ValueError, match="0 images"):
        draw_predictions(tmp_path / "sheet.png", [], [], [])
    assert not (tmp_path / "sheet.png").exists()
