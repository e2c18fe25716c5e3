"""The kinds of ImageNet-C (Hendrycks and Dietterich 2019, arXiv:1903.12261), with their five parameters each.

Read in hendrycks/robustness, `imagenet_c/corruptions.py`: eighteen of its nineteen. The other one, frost, lays photographs
of frost over an image, which are not here.

A kind takes (height, width, 3) in 0..1, a parameter and a random generator, and gives the same; what leaves 0..1 is clipped
afterwards. The parameters are meant for 224 pixels a side.
"""

import io
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ..errors import UsageError


GREY = (0.299, 0.587, 0.114)
WATER, MUD = (175 / 255, 238 / 255, 238 / 255), (63 / 255, 42 / 255, 20 / 255)


def _impulse_noise(x: np.ndarray, amount: float, random: np.random.Generator) -> np.ndarray:
    drawn = random.random(x.shape)
    return np.where(drawn < amount, drawn < amount / 2, x)


def _blurred(x: np.ndarray, sigma: float, axes: tuple[int, ...] = (0, 1), **options) -> np.ndarray:
    """A Gaussian blur, cut off at four standard deviations if `options` do not say otherwise."""
    return _ndimage().gaussian_filter(x, sigma, axes=axes, **{"mode": "nearest", **options})


def _defocus_blur(x: np.ndarray, level: tuple[int, float], random: np.random.Generator) -> np.ndarray:
    radius, softness = level
    offsets = np.arange(-max(radius, 8) - 1, max(radius, 8) + 2)
    disk = (np.add.outer(offsets**2, offsets**2) <= radius**2).astype(float)
    reach = 1 if radius <= 8 else 2
    line = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * softness**2))
    return _convolved(x, _convolved(disk[..., None], np.outer(line, line), "edge")[..., 0], "reflect")


def _convolved(x: np.ndarray, kernel: np.ndarray, border: str) -> np.ndarray:
    """Each channel convolved with a square kernel, which is made to sum to 1."""
    reach, (height, width, _) = len(kernel) // 2, x.shape
    padded = np.pad(x, ((reach, reach), (reach, reach), (0, 0)), border)
    spectrum = np.fft.rfft2(padded, axes=(0, 1)) * np.fft.rfft2(kernel / kernel.sum(), padded.shape[:2])[..., None]
    return np.fft.irfft2(spectrum, padded.shape[:2], axes=(0, 1))[2 * reach :, 2 * reach :][:height, :width]


def _glass_blur(x: np.ndarray, level: tuple[float, int, int], random: np.random.Generator) -> np.ndarray:
    """Pixels replaced by others near them, one after the other, between two blurs."""
    sigma, reach, times = level
    height, width, channels = x.shape
    rows, columns = np.meshgrid(
        np.arange(height - reach, reach, -1), np.arange(width - reach, reach, -1), indexing="ij"
    )
    places, pixels = (rows * width + columns).ravel().tolist(), list(range(height * width))
    for _ in range(times):
        right, down = random.integers(-reach, reach, (2, len(places)))
        for place, offset in zip(places, (down * width + right).tolist(), strict=True):
            pixels[place] = pixels[place + offset]
    shuffled = np.floor(_blurred(x, sigma) * 255).reshape(-1, channels)[pixels] / 255
    return _blurred(shuffled.reshape(x.shape), sigma)


def _motion_blur(x: np.ndarray, level: tuple[int, float], random: np.random.Generator) -> np.ndarray:
    return _moved(x, *level, random.uniform(-45, 45))


def _moved(x: np.ndarray, radius: int, sigma: float, degrees: float) -> np.ndarray:
    """Half a Gaussian along a line from each pixel, as ImageMagick's motion blur."""
    steps, angle, (height, width) = np.arange(2 * radius + 1), math.radians(degrees), x.shape[:2]
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    down, right = (np.ceil(steps * along - 0.5).astype(int) for along in (math.sin(angle), math.cos(angle)))
    reach = len(steps)
    padded = np.pad(x, ((reach, reach), (reach, reach), (0, 0)), "edge")
    parts = (
        weight * padded[reach + row : reach + row + height, reach + column : reach + column + width]
        for weight, row, column in zip(weights / weights.sum(), down, right, strict=True)
    )
    return sum(parts)


def _zoom_blur(x: np.ndarray, level: tuple[float, float], random: np.random.Generator) -> np.ndarray:
    image, (height, width, _) = to_image(x), x.shape
    zoomed = [x]
    for zoom in np.arange(1, *level):
        left, top = (width - width / zoom) / 2, (height - height / zoom) / 2
        box = (left, top, width - left, height - top)
        zoomed.append(to_array(image.resize((width, height), Image.Resampling.BILINEAR, box)))
    return np.mean(zoomed, axis=0)


def _snow(x: np.ndarray, level: tuple, random: np.random.Generator) -> np.ndarray:
    """Flakes that the wind has drawn out, from both sides, on a scene that is paler and brighter."""
    mean, deviation, zoom, threshold, radius, sigma, kept = level
    height, width, _ = x.shape
    flakes = random.normal(mean, deviation, (math.ceil(height / zoom), math.ceil(width / zoom)))
    rows, columns = (np.linspace(0, n - 1, m) for n, m in zip(flakes.shape, (height, width), strict=True))
    flakes = _ndimage().map_coordinates(flakes, np.meshgrid(rows, columns, indexing="ij"), order=1)
    flakes = np.floor(np.clip(np.where(flakes < threshold, 0, flakes), 0, 1) * 255) / 255
    flakes = _moved(flakes[..., None], radius, sigma, random.uniform(-135, -45))
    grey = x @ np.array(GREY)
    return kept * x + (1 - kept) * np.maximum(x, 1.5 * grey[..., None] + 0.5) + flakes + flakes[::-1, ::-1]


def _fog(x: np.ndarray, level: tuple[float, float], random: np.random.Generator) -> np.ndarray:
    thickness, decay = level
    height, width, _ = x.shape
    fog = _plasma(1 << (max(height, width) - 1).bit_length(), decay, random)[:height, :width, None]
    return (x + thickness * fog) * x.max() / max(x.max() + thickness, 1e-9)


def _plasma(size: int, decay: float, random: np.random.Generator) -> np.ndarray:
    """Clouds by the diamond-square algorithm on a torus, (size, size) in 0..1; `size` is a power of two."""
    heights, step, amplitude = np.zeros((size, size)), size, 100.0

    def middle(*corners: np.ndarray) -> np.ndarray:
        return sum(corners) / 4 + random.uniform(-(amplitude**2), amplitude**2, corners[0].shape)

    while step >= 2:
        half = step // 2
        corners = heights[::step, ::step]
        below, beside = np.roll(corners, -1, 0), np.roll(corners, -1, 1)
        centres = heights[half::step, half::step] = middle(corners, below, beside, np.roll(below, -1, 1))
        heights[::step, half::step] = middle(corners, beside, centres, np.roll(centres, 1, 0))
        heights[half::step, ::step] = middle(corners, below, centres, np.roll(centres, 1, 1))
        step, amplitude = half, amplitude / decay
    heights -= heights.min()
    return heights / heights.max()


def _spatter(x: np.ndarray, level: tuple, random: np.random.Generator) -> np.ndarray:
    """Drops of water or mud. The edges of drops are those of their mask, where the published images have Canny's."""
    mean, deviation, sigma, threshold, strength, liquid = level
    drops = _blurred(random.normal(mean, deviation, x.shape[:2]), sigma)
    drops = np.where(drops < threshold, 0, drops)
    if liquid == "mud":
        mask = _blurred((drops > threshold).astype(float), strength)[..., None]
        mask = np.where(mask < 0.8, 0, mask)
        return x * (1 - mask) + mask * np.array(MUD)
    ndimage, drops = _ndimage(), np.floor(drops * 255)
    edges = (drops > 0) & ~ndimage.binary_erosion(drops > 0, border_value=1)
    if not edges.any():
        return x
    distance = np.floor(ndimage.uniform_filter(np.minimum(ndimage.distance_transform_edt(~edges), 20), 3))
    # Levels of equal shares, then an emboss.
    counts = np.bincount(distance.astype(int).ravel()).cumsum()
    first = counts[counts > 0][0]
    distance = np.round((counts[distance.astype(int)] - first) / max(counts[-1] - first, 1) * 255)
    distance = np.clip(ndimage.correlate(distance, [[-2, -1, 0], [-1, 1, 1], [0, 1, 2]], mode="mirror"), 0, 255)
    light = drops * ndimage.uniform_filter(distance, 3, mode="mirror")
    return x + strength * (light / max(light.max(), 1e-9))[..., None] * np.array(WATER)


def _brightness(x: np.ndarray, more: float, random: np.random.Generator) -> np.ndarray:
    """A higher value at the same hue and saturation."""
    value = x.max(axis=2, keepdims=True)
    brighter = np.minimum(value + more, 1)
    return np.where(value > 0, x * brighter / np.maximum(value, 1e-9), brighter)


def _contrast(x: np.ndarray, factor: float, random: np.random.Generator) -> np.ndarray:
    mean = x.mean(axis=(0, 1))
    return (x - mean) * factor + mean


def _saturate(x: np.ndarray, level: tuple[float, float], random: np.random.Generator) -> np.ndarray:
    """Another saturation at the same hue and value; grey has the hue of red, as in skimage's HSV."""
    value = x.max(axis=2, keepdims=True)
    saturation = (value - x.min(axis=2, keepdims=True)) / np.maximum(value, 1e-9)
    new = np.clip(saturation * level[0] + level[1], 0, 1)
    reddish = value * (1 - new * (0, 1, 1))
    return np.where(saturation > 0, value - (value - x) * new / np.maximum(saturation, 1e-9), reddish)


def _elastic_transform(x: np.ndarray, level: tuple[float, float, float], random: np.random.Generator) -> np.ndarray:
    """A random affine map, after which each pixel is moved along a smooth random field."""
    reach, sigma, corner = level
    ndimage, (height, width, _) = _ndimage(), x.shape
    middle, size = np.array([height // 2, width // 2]), min(height, width) // 3
    before = middle + size * np.array([[1, 1], [1, -1], [-1, -1]])
    after = before + random.uniform(-corner, corner, (3, 2))
    # Rows of (row, column, 1) of what is seen -> where it comes from.
    back = np.linalg.solve(np.column_stack([after, np.ones(3)]), before)
    places = np.moveaxis(np.indices((height, width)), 0, -1)
    affine = np.moveaxis(places @ back[:2] + back[2], -1, 0)
    x = np.stack(
        [ndimage.map_coordinates(channel, affine, order=1, mode="mirror") for channel in np.moveaxis(x, 2, 0)]
    )
    fields = random.uniform(-1, 1, (2, height, width))
    fields = reach * _blurred(fields, sigma, axes=(1, 2), mode="reflect", truncate=3)
    moved = np.moveaxis(places, -1, 0) + fields
    return np.stack([ndimage.map_coordinates(channel, moved, order=1, mode="reflect") for channel in x], axis=2)


def _pixelate(x: np.ndarray, share: float, random: np.random.Generator) -> np.ndarray:
    height, width, _ = x.shape
    small = to_image(x).resize((max(int(width * share), 1), max(int(height * share), 1)), Image.Resampling.BOX)
    return to_array(small.resize((width, height), Image.Resampling.BOX))


def _jpeg_compression(x: np.ndarray, quality: int, random: np.random.Generator) -> np.ndarray:
    file = io.BytesIO()
    to_image(x).save(file, "JPEG", quality=quality)
    return to_array(Image.open(file))


def to_image(x: np.ndarray) -> Image.Image:
    return Image.fromarray((np.clip(x, 0, 1) * 255).round().astype(np.uint8))


def to_array(image: Image.Image) -> np.ndarray:
    return np.asarray(image, np.float64) / 255


def _ndimage() -> Any:
    try:
        from scipy import ndimage
    except ImportError as error:
        raise UsageError("Images are corrupted by scipy: `pip install 'hfclip[evaluate]'`.") from error
    return ndimage


class Corruption(NamedTuple):
    apply: Callable[[np.ndarray, Any, np.random.Generator], np.ndarray]
    levels: tuple
    """The parameter at each severity."""


CORRUPTIONS = {
    "gaussian_noise": Corruption(
        lambda x, c, random: x + random.normal(0, c, x.shape), (0.08, 0.12, 0.18, 0.26, 0.38)
    ),
    "shot_noise": Corruption(lambda x, c, random: random.poisson(x * c) / c, (60, 25, 12, 5, 3)),
    "impulse_noise": Corruption(_impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27)),
    "speckle_noise": Corruption(
        lambda x, c, random: x + x * random.normal(0, c, x.shape), (0.15, 0.2, 0.35, 0.45, 0.6)
    ),
    "gaussian_blur": Corruption(lambda x, c, random: _blurred(x, c), (1, 2, 3, 4, 6)),
    "glass_blur": Corruption(_glass_blur, ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))),
    "defocus_blur": Corruption(_defocus_blur, ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))),
    "motion_blur": Corruption(_motion_blur, ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))),
    "zoom_blur": Corruption(_zoom_blur, ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))),
    "snow": Corruption(
        _snow,
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
    ),
    "fog": Corruption(_fog, ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))),
    "spatter": Corruption(
        _spatter,
        (
            (0.65, 0.3, 4, 0.69, 0.6, "water"),
            (0.65, 0.3, 3, 0.68, 0.6, "water"),
            (0.65, 0.3, 2, 0.68, 0.5, "water"),
            (0.65, 0.3, 1, 0.65, 1.5, "mud"),
            (0.67, 0.4, 1, 0.65, 1.5, "mud"),
        ),
    ),
    "brightness": Corruption(_brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": Corruption(_contrast, (0.4, 0.3, 0.2, 0.1, 0.05)),
    "saturate": Corruption(_saturate, ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2))),
    "elastic_transform": Corruption(
        _elastic_transform,
        ((488, 170.8, 24.4), (488, 19.52, 48.8), (12.2, 2.44, 4.88), (17.08, 2.44, 4.88), (29.28, 2.44, 4.88)),
    ),
    "pixelate": Corruption(_pixelate, (0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg_compression": Corruption(_jpeg_compression, (25, 18, 15, 10, 7)),
}
