"""Built-in demonstration data: images of colored shapes with captions, rendered on the fly.

Nothing is downloaded or stored. A random stream seeded by (seed, split, index) first plans a scene (what is where),
then words a caption that is true of it, then paints it: `_plan -> _caption -> _paint`. The train split never shows the
color-and-shape pairs in `HELD_OUT` and the test split shows nothing else, so that zero-shot accuracy on the test split
measures whether a model can put together a color and a shape that it has only met apart.
"""

import colorsys
import math
import operator
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image


# Hue in degrees, saturation and value in [0, 1].
COLORS = {
    "red": (0, 0.90, 0.88),
    "orange": (28, 0.95, 0.98),
    "yellow": (55, 0.92, 0.97),
    "green": (125, 0.80, 0.65),
    "cyan": (183, 0.80, 0.92),
    "blue": (225, 0.88, 0.85),
    "purple": (276, 0.75, 0.65),
    "pink": (335, 0.45, 1.00),
    "white": (0, 0.00, 1.00),
    "black": (0, 0.00, 0.04),
    "gray": (0, 0.00, 0.50),
    "brown": (24, 0.75, 0.45),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
# Radius as a fraction of the image side. Only lone objects are large: two of them would not fit beside each other.
SIZES = {"small": (0.175, 0.185), "medium": (0.200, 0.220), "large": (0.260, 0.280)}
BACKGROUNDS = ("plain", "gradient", "noisy", "striped", "checkered", "cloudy")
COUNTS = ("one", "two", "three", "four")
POSITIONS = {  # where a lone object may lie: (column, row) of a 3 x 3 grid, and how a caption says it
    "top left": ((0, 0), "in the top left corner"),
    "top": ((1, 0), "at the top"),
    "top right": ((2, 0), "in the top right corner"),
    "left": ((0, 1), "on the left"),
    "center": ((1, 1), "in the center"),
    "right": ((2, 1), "on the right"),
    "bottom left": ((0, 2), "in the bottom left corner"),
    "bottom": ((1, 2), "at the bottom"),
    "bottom right": ((2, 2), "in the bottom right corner"),
}
RELATIONS = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}  # with their inverses

PAIRS = tuple((color, shape) for color in COLORS for shape in SHAPES)
HELD_OUT = frozenset(
    [
        *(("red", "star"), ("orange", "circle"), ("yellow", "ring")),
        *(("green", "triangle"), ("blue", "square"), ("purple", "cross")),
    ]
)
_SPLIT_PAIRS = {"train": [pair for pair in PAIRS if pair not in HELD_OUT], "test": sorted(HELD_OUT)}

_MARGIN = 0.02  # between an object and the border, as a fraction of the image side
_GAP = 0.04  # between two objects
_MIN_SIZE = 32  # pixels; below, small shapes look alike
_MIN_CONTRAST = 110.0  # RGB distance between an object and either color of its background


class Scenes(Sequence):
    """Captioned scenes as a map-style dataset; scene `index` is a pure function of `(seed, split, index)`.

    Attributes and captions are the same everywhere; pixels may differ by rounding between versions of numpy or Pillow.

    Args:
        split: "train" (pairs outside `HELD_OUT`) or "test" (pairs in `HELD_OUT`).
        size: side of the square images in pixels, at least 32.
        seed: another seed gives other scenes with the same held-out pairs.
        num_scenes: length of the dataset. Scenes cost nothing until they are asked for.

    Raises:
        ValueError: for an unknown split, a size below 32 or fewer than one scene.
    """

    def __init__(self, split: str, size: int = 64, seed: int = 0, num_scenes: int = 50_000):
        if split not in _SPLIT_PAIRS:
            raise ValueError(f"Scenes has the splits {sorted(_SPLIT_PAIRS)}, but split={split!r} was asked for.")
        if size < _MIN_SIZE:
            raise ValueError(
                f"Scenes needs size >= {_MIN_SIZE} pixels for shapes to be told apart, found size={size}."
            )
        if num_scenes < 1:
            raise ValueError(f"Scenes needs num_scenes >= 1, found num_scenes={num_scenes}.")
        self.split, self.size, self.seed, self.num_scenes = split, size, seed, num_scenes

    def __len__(self) -> int:
        return self.num_scenes

    def __getitem__(self, index: int) -> dict:
        """`image` (PIL, RGB, size x size), `text` (a true caption) and `attributes` (see `attributes`).

        Raises:
            IndexError: for an index outside [0, num_scenes).
        """
        rng = self._stream(index)
        attributes = _plan(rng, self.split)
        text = _caption(rng, attributes)
        return {"image": _paint(rng, attributes, self.size), "text": text, "attributes": attributes}

    def attributes(self, index: int) -> dict:
        """What scene `index` shows, without painting it.

        Returns:
            `background` (of `BACKGROUNDS`), `relation` (of the first object to the second, or None) and `objects`, one
            entry for each kind of object: `color`, `shape`, `size`, `count`, `position` (of `POSITIONS` for a lone
            object, else None), `centers` ((x, y) from the top left, as fractions of the side) and `radius` (likewise).
        """
        return _plan(self._stream(index), self.split)

    def caption(self, index: int) -> str:
        """The `text` of scene `index`, without painting it: what a tokenizer is trained on."""
        rng = self._stream(index)
        return _caption(rng, _plan(rng, self.split))

    def _stream(self, index: int) -> random.Random:
        index = operator.index(index)
        if not 0 <= index < self.num_scenes:
            raise IndexError(f"Scene {index} was asked for, but there are scenes 0 to {self.num_scenes - 1}.")
        # A string seed goes through SHA-512: the same on every platform, whatever PYTHONHASHSEED says.
        return random.Random(f"{self.seed}/{self.split}/{index}")


# ---------------------------------------------------------------------------------------------------------------------
# Plan: what is where
# ---------------------------------------------------------------------------------------------------------------------


def _plan(rng: random.Random, split: str) -> dict:
    background = rng.choice(BACKGROUNDS)
    relation, objects = _plan_two_kinds(rng, split) if rng.random() < 0.5 else (None, [_plan_one_kind(rng, split)])
    return {"background": background, "relation": relation, "objects": objects}


def _plan_one_kind(rng: random.Random, split: str) -> dict:
    color, shape = rng.choice(_SPLIT_PAIRS[split])
    count = rng.choice((1, 1, 1, 2, 3, 4))
    size = rng.choice({1: ("small", "medium", "large"), 2: ("small", "medium")}.get(count, ("small",)))
    radius = rng.uniform(*SIZES[size])
    position = rng.choice(list(POSITIONS)) if count == 1 else None
    centers = [_place(rng, position, radius)] if position else _scatter(rng, count, radius)
    return _kind(color, shape, size, radius, centers, position)


def _plan_two_kinds(rng: random.Random, split: str) -> tuple[str, list[dict]]:
    """Two lone objects, further apart along the axis of their relation than across it."""
    pairs = rng.sample(_SPLIT_PAIRS[split], 2)
    sizes = [rng.choice(("small", "medium")) for _ in pairs]
    radii = [rng.uniform(*SIZES[size]) for size in sizes]
    (low, high), apart = [_MARGIN + radius for radius in radii], sum(radii) + _GAP
    first = rng.uniform(low, 1 - high - apart)
    second = rng.uniform(first + apart, 1 - high)
    first_across = rng.uniform(low, 1 - low)
    slack = 0.6 * (second - first)
    second_across = rng.uniform(max(high, first_across - slack), min(1 - high, first_across + slack))
    relation = rng.choice(list(RELATIONS))
    centers = [(first, first_across), (second, second_across)]
    if relation in ("above", "below"):
        centers = [(across, along) for along, across in centers]
    placed = zip(pairs, sizes, radii, centers, strict=True)
    objects = [_kind(*pair, size, radius, [center], None) for pair, size, radius, center in placed]
    # The object with the smaller coordinate is the one on the left or above.
    return relation, objects if relation in ("left of", "above") else objects[::-1]


def _kind(color: str, shape: str, size: str, radius: float, centers: list, position: str | None) -> dict:
    kind = {"color": color, "shape": shape, "size": size, "count": len(centers), "position": position}
    return kind | {"centers": centers, "radius": radius}


def _place(rng: random.Random, position: str, radius: float) -> tuple[float, float]:
    bands = ((_MARGIN + radius, 0.35), (0.45, 0.55), (0.65, 1 - _MARGIN - radius))
    column, row = POSITIONS[position][0]
    return rng.uniform(*bands[column]), rng.uniform(*bands[row])


def _scatter(rng: random.Random, count: int, radius: float) -> list[tuple[float, float]]:
    """`count` centers whose objects neither touch each other nor the border, by rejection."""
    low, high, apart = _MARGIN + radius, 1 - _MARGIN - radius, 2 * radius + _GAP
    while True:
        centers = []
        for _ in range(50):  # then start afresh: the first ones may have left no room
            # `rng.uniform` would take three times as long.
            center = low + (high - low) * rng.random(), low + (high - low) * rng.random()
            for other in centers:
                if math.dist(center, other) < apart:
                    break
            else:
                centers.append(center)
                if len(centers) == count:
                    return centers


# ---------------------------------------------------------------------------------------------------------------------
# Caption: words that are true of the plan
# ---------------------------------------------------------------------------------------------------------------------

_OPENINGS = ("a photo of", "a picture of", "an image of", "a scene with", "this image shows")
_FRAMES = (
    *["{}"] * 14,  # captions are short more often than not
    *(f"{opening} {{}}." for opening in _OPENINGS),
    "there {be} {}.",
)
_SIZE_WORDS = {"small": ("small", "little"), "medium": ("medium-sized",), "large": ("large", "big")}
_RELATION_WORDS = {side: (side, f"to the {side}") for side in ("left of", "right of")}
_RELATION_WORDS |= {"above": ("above", "over"), "below": ("below", "under")}


def _caption(rng: random.Random, attributes: dict) -> str:
    """A caption that mentions most of the attributes, worded at random."""
    first, *others = attributes["objects"]
    frame = rng.choice(_FRAMES).replace("{be}", "is" if first["count"] == 1 else "are")
    text = _noun_phrase(rng, first)
    if others:
        relation = attributes["relation"]
        other = _noun_phrase(rng, others[0])
        if rng.random() < 0.5:  # the same said from the other side
            text, other, relation = other, text, RELATIONS[relation]
        joint = rng.choice(_RELATION_WORDS[relation]) if rng.random() < 0.75 else "and"
        text = f"{text} {joint} {other}"
    elif first["position"] and rng.random() < 0.3:
        text += " " + POSITIONS[first["position"]][1]
    if rng.random() < 0.06:
        text += f" on a {attributes['background']} background"
    return frame.format(text)


def _noun_phrase(rng: random.Random, kind: dict) -> str:
    # Captions that leave the color out make shapes be learned apart from colors, for pairs never seen as well.
    names_color = rng.random() < 0.6
    names_shape = not names_color or rng.random() < 0.97
    adjectives = [rng.choice(_SIZE_WORDS[kind["size"]])] if rng.random() < 0.12 else []
    adjectives += [kind["color"]] if names_color else []
    noun = kind["shape"] if names_shape else rng.choice(("shape", "object"))
    return _count_noun(kind["count"], adjectives, noun, vague=rng.random() < 0.15)


def _count_noun(count: int, adjectives: list[str], noun: str, vague: bool = False) -> str:
    """ "two small red circles"; `vague` leaves the number out: "small red circles"."""
    plural = "" if count == 1 else "es" if noun.endswith("s") else "s"
    words = " ".join([*adjectives, noun + plural])
    if count == 1:
        return f"one {words}" if vague else _with_article(words)
    return words if vague else f"{COUNTS[count - 1]} {words}"


def _with_article(words: str) -> str:
    return ("an " if words[0] in "aeio" else "a ") + words  # no adjective or noun here starts with "u"


def describe(attributes: dict) -> str:
    """The full caption: every attribute, always in the same words."""
    phrases = [
        _count_noun(kind["count"], [_SIZE_WORDS[kind["size"]][0], kind["color"]], kind["shape"])
        for kind in attributes["objects"]
    ]
    if attributes["relation"]:
        text = f" {_RELATION_WORDS[attributes['relation']][0]} ".join(phrases)
    else:
        position = attributes["objects"][0]["position"]
        text = " ".join(phrases + ([POSITIONS[position][1]] if position else []))
    return f"{text} on a {attributes['background']} background"


# ---------------------------------------------------------------------------------------------------------------------
# Paint: the plan in pixels
# ---------------------------------------------------------------------------------------------------------------------


def _paint(rng: random.Random, attributes: dict, size: int) -> Image.Image:
    colors = [_vary(rng, *COLORS[kind["color"]]) for kind in attributes["objects"]]
    # Pixel centers as fractions of the side, seen from the middle: (size,), broadcast as columns and rows.
    axis = ((np.arange(size) + 0.5) / size - 0.5).astype(np.float32)
    x, y = axis[None, :], axis[:, None]

    base, second = (np.array(color, np.float32)[:, None, None] for color in _background_colors(rng, colors))
    mix = _texture(rng, attributes["background"], x, y)
    canvas = base + (second - base) * mix  # (3, size, size)
    for kind, color in zip(attributes["objects"], colors, strict=True):
        for center in kind["centers"]:
            _stamp(rng, canvas, kind["shape"], center, kind["radius"], color)

    angle, strength = rng.uniform(0, 2 * math.pi), rng.uniform(0.0, 0.2)
    canvas *= rng.uniform(0.88, 1.0) + x * (strength * math.cos(angle)) + y * (strength * math.sin(angle))
    return Image.fromarray(np.clip(canvas, 0, 255, out=canvas).astype(np.uint8).transpose(1, 2, 0))


def _rgb(hue: float, saturation: float, value: float) -> tuple[float, float, float]:
    red, green, blue = colorsys.hsv_to_rgb(hue % 360 / 360, min(max(saturation, 0), 1), min(max(value, 0), 1))
    return 255 * red, 255 * green, 255 * blue


def _vary(rng: random.Random, hue: float, saturation: float, value: float) -> tuple[float, float, float]:
    """A shade of the color that nobody would name differently: RGB in [0, 255]."""
    return _rgb(hue + rng.uniform(-5, 5), saturation * rng.uniform(0.9, 1.05), value + rng.uniform(-0.05, 0.03))


def _background_colors(rng: random.Random, colors: list[tuple]) -> tuple[tuple, tuple]:
    """Two muted colors, both well apart from every object's."""
    while True:
        hue, saturation, value = rng.uniform(0, 360), rng.uniform(0.05, 0.4), rng.uniform(0.2, 0.95)
        shift = rng.choice((-1, 1)) * rng.uniform(0.1, 0.3)
        pair = _rgb(hue, saturation, value), _rgb(hue + rng.uniform(-40, 40), saturation, value + shift)
        if all(math.dist(color, other) >= _MIN_CONTRAST for color in colors for other in pair):
            return pair


def _texture(rng: random.Random, background: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """How much of the second color each pixel takes, in [0, 1]: (size, size)."""
    size = len(y)
    if background == "noisy":
        return np.frombuffer(rng.randbytes(size * size), np.uint8).reshape(size, size) / np.float32(255)
    if background == "cloudy":
        seeds = Image.frombytes("L", (6, 6), rng.randbytes(36))
        return np.asarray(seeds.resize((size, size), Image.Resampling.BICUBIC)) / np.float32(255)
    angle, frequency, phase = rng.uniform(0, 2 * math.pi), rng.uniform(3, 7), rng.uniform(0, 2 * math.pi)
    along = x * math.cos(angle) + y * math.sin(angle)
    across = y * math.cos(angle) - x * math.sin(angle)
    if background == "plain":
        return np.zeros_like(along)
    if background == "gradient":
        return np.clip(along + 0.5, 0, 1)
    wave = np.sin(2 * math.pi * frequency * along + phase)
    if background == "checkered":
        wave *= np.sin(2 * math.pi * frequency * across)
    # A steep ramp around zero, about a pixel wide: antialiased edges.
    return np.clip(wave * (size / (2 * math.pi * frequency)) + 0.5, 0, 1)


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Five points of 1.15, with 0.48 between them: distance to the edge next to the nearest point."""
    v = v - 0.08
    angle = np.abs((np.arctan2(u, -v) + math.pi / 5) % (2 * math.pi / 5) - math.pi / 5)
    along, across = 1.15 - 0.48 * math.cos(math.pi / 5), 0.48 * math.sin(math.pi / 5)
    length = math.hypot(along, across)
    across_point, along_point = np.hypot(u, v) * np.stack([np.sin(angle), np.cos(angle)])
    return (across_point * along + (along_point - 1.15) * across) / length


# How far a place lies outside of a shape (negative: inside), as a fraction of the radius; u to the right, v downwards.
_OUTSIDE = {
    "circle": lambda u, v: np.hypot(u, v) - 0.95,
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) - 0.81,
    "triangle": lambda u, v: np.maximum(v - 0.25, math.sqrt(3) / 2 * np.abs(u) - (v - 0.25) / 2) - 0.6,
    "star": _star,
    "cross": lambda u, v: np.maximum(np.maximum(np.abs(u), np.abs(v)) - 1, np.minimum(np.abs(u), np.abs(v)) - 0.42),
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.76) - 0.24,
}


def _stamp(rng: random.Random, canvas: np.ndarray, shape: str, center: tuple, radius: float, color: tuple):
    """Paints one object onto `canvas` (3, size, size), turned by up to 12 degrees, with edges a pixel wide."""
    size = canvas.shape[-1]
    left, top = (max(int((c - 1.25 * radius) * size), 0) for c in center)
    right, bottom = (min(math.ceil((c + 1.25 * radius) * size), size) for c in center)
    angle = math.radians(rng.uniform(-12, 12))
    x, y = (
        ((np.arange(start, stop, dtype=np.float32) + 0.5) / size - c) / radius
        for start, stop, c in zip((left, top), (right, bottom), center, strict=True)
    )
    cosine, sine = math.cos(angle), math.sin(angle)
    u, v = cosine * x + sine * y[:, None], cosine * y[:, None] - sine * x
    cover = np.clip(0.5 - _OUTSIDE[shape](u, v) * (radius * size), 0, 1)
    patch = canvas[:, top:bottom, left:right]
    patch += (np.array(color, np.float32)[:, None, None] - patch) * cover


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation on the test split
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ZeroShotTask:
    """`labels` to be filled into `templates`; `targets[i]` is the index of the label of `images[i]`."""

    name: str
    labels: list[str]
    templates: list[str]
    images: list[Image.Image]
    targets: list[int]


@dataclass(frozen=True)
class RetrievalTask:
    """`texts[i]` is the one caption of `images[i]`, and no two captions are the same."""

    name: str
    images: list[Image.Image]
    texts: list[str]


_PHOTO_TEMPLATES = [f"{opening} {{}}." for opening in _OPENINGS]


def zero_shot_tasks(size: int = 64, seed: int = 0, num_images: int = 500) -> list[ZeroShotTask]:
    """Five tasks on scenes of the test split, each of `num_images` images.

    The first, "color and shape", has all pairs for labels though its images show only held-out ones: a model that has
    merely memorised the pairs of its training data gets none right. Then "color", "shape", "count" and "position".
    """
    scenes = Scenes("test", size, seed, num_scenes=10 * num_images + 100)  # about 7 in 20 show a lone object
    attributes = [scenes.attributes(index) for index in range(len(scenes))]
    kinds = {index: scene["objects"][0] for index, scene in enumerate(attributes) if len(scene["objects"]) == 1}
    any_count = list(kinds)[:num_images]
    lone = [index for index in kinds if kinds[index]["count"] == 1][:num_images]
    images = {index: scenes[index]["image"] for index in sorted({*any_count, *lone})}

    def task(name: str, labels: dict, templates: list[str], indices: list[int], value) -> ZeroShotTask:
        keys = list(labels)
        targets = [keys.index(value(kinds[index])) for index in indices]
        return ZeroShotTask(name, list(labels.values()), templates, [images[index] for index in indices], targets)

    pairs = {pair: _with_article(" ".join(pair)) for pair in PAIRS}
    shapes = {shape: _with_article(shape) for shape in SHAPES}
    counts = {count: _count_noun(count, [], "shape") for count in range(1, 5)}
    positions = {position: place for position, (_, place) in POSITIONS.items()}
    color_templates = ["{} shapes", "a photo of {} objects.", "there are {} objects.", "one {} shape"]
    position_templates = ["a shape {}", "an object {}", "a photo of an object {}.", "there is a shape {}."]
    return [
        task("color and shape", pairs, _PHOTO_TEMPLATES, any_count, lambda kind: (kind["color"], kind["shape"])),
        task("color", {color: color for color in COLORS}, color_templates, any_count, lambda kind: kind["color"]),
        task("shape", shapes, _PHOTO_TEMPLATES, any_count, lambda kind: kind["shape"]),
        task("count", counts, _PHOTO_TEMPLATES, any_count, lambda kind: kind["count"]),
        task("position", positions, position_templates, lone, lambda kind: kind["position"]),
    ]


def retrieval_task(size: int = 64, seed: int = 0, num_images: int = 500) -> RetrievalTask:
    """The first scenes of the test split whose full captions (`describe`) differ."""
    scenes = Scenes("test", size, seed, num_scenes=2 * num_images + 100)
    first_of = {}
    for index in range(len(scenes)):
        first_of.setdefault(describe(scenes.attributes(index)), index)
    texts = list(first_of)[:num_images]
    return RetrievalTask("retrieval", [scenes[first_of[text]]["image"] for text in texts], texts)
