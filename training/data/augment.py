"""Random changes of training images beyond the paper's square crop, for small data and for robustness to style.

image -> turned -> crop of random area and shape, resized to the square -> mirrored -> drawn -> colors -> uint8

Settings carry the names of OpenCLIP's `aug_cfg` where it has them. Brightness, contrast, saturation, hue and greyness
are linear in RGB, so one 3 x 3 matrix and one offset per image stand for all of them. Everything random is drawn from
the generator of the sample's place, as the paper's crop is.
"""

import math

import numpy as np
import PIL.Image
import PIL.ImageFilter

from hfclip.image_processing_hfclip import random_square_crop
from hfclip.open_image_hfclip import ImageSource, open_image

from ..config import AugmentConfig


LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def augmented(source: ImageSource, size: int, config: AugmentConfig, rng: np.random.Generator) -> np.ndarray:
    """A training image, (3, size, size) uint8, RGB; raises as `random_square_crop`, which it is without changes."""
    image = open_image(source)
    if config.rotation:
        image, angle = image.convert("RGB"), rng.uniform(-config.rotation, config.rotation)
        image = image.rotate(angle, PIL.Image.Resampling.BILINEAR, fillcolor=_color_of_border(image))
    if config.scale is None:
        pixels = random_square_crop(image, size, rng)
    else:
        pixels = _crop(image.convert("RGB"), size, config, rng)
        pixels = pixels.transpose(2, 0, 1)  # (size, size, 3) -> (3, size, size)
    if rng.random() < config.flip_prob:
        pixels = pixels[:, :, ::-1]
    is_drawn = rng.random() < config.sketch_prob
    matrix = _color_matrix(config, rng)
    if not is_drawn and matrix is None:
        return np.ascontiguousarray(pixels)
    values = pixels.reshape(3, -1).astype(np.float32)
    if is_drawn:
        values = np.tile(_drawing(pixels, 255 * rng.uniform(0.1, 0.5)), (3, 1))
    if matrix is not None:
        factor, contrast = matrix
        values = factor @ values
        values = contrast * values + (1 - contrast) * values.mean()
    return values.round().clip(0, 255).astype(np.uint8).reshape(pixels.shape)


def _crop(image: PIL.Image.Image, size: int, config: AugmentConfig, rng: np.random.Generator) -> np.ndarray:
    """A part of random area, shape and place, resized to (size, size, 3) by bicubic resizing."""
    area = image.width * image.height * rng.uniform(*config.scale)
    ratio = math.exp(rng.uniform(*np.log(config.ratio)))
    width, height = min(math.sqrt(area * ratio), image.width), min(math.sqrt(area / ratio), image.height)
    left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - height)
    box = (left, top, left + width, top + height)
    return np.asarray(image.resize((size, size), PIL.Image.Resampling.BICUBIC, box=box))


def _drawing(pixels: np.ndarray, depth: float) -> np.ndarray:
    """(3, size, size) -> (size * size,): white, and black where a pixel is darker by `depth` than one near it."""
    brightest = PIL.Image.fromarray(pixels.max(axis=0))
    around = np.asarray(brightest.filter(PIL.ImageFilter.MaxFilter(5)), np.float32)
    return (255 - (around - np.asarray(brightest, np.float32)) * (255 / depth)).clip(0, 255).reshape(-1)


def _color_of_border(image: PIL.Image.Image) -> tuple[int, ...]:
    width, height = image.size
    sides = (0, 0, width, 1), (0, height - 1, width, height), (0, 0, 1, height), (width - 1, 0, width, height)
    border = np.concatenate([np.asarray(image.crop(side)).reshape(-1, 3) for side in sides])
    return tuple(border.mean(axis=0).round().astype(int).tolist())


def _color_matrix(config: AugmentConfig, rng: np.random.Generator) -> tuple[np.ndarray, float] | None:
    """The map of RGB that stands for all changes of color, (3, 3), and the contrast; None without a change."""
    matrix, contrast = np.eye(3, dtype=np.float32), 1.0
    changes = config.color_jitter is not None and rng.random() < config.color_jitter_prob
    if changes:
        brightness, contrast, saturation = (rng.uniform(1 - most, 1 + most) for most in config.color_jitter[:3])
        grey = np.broadcast_to(LUMA, (3, 3))
        matrix = (
            brightness * (saturation * np.eye(3) + (1 - saturation) * grey) @ _turn_hue(config.color_jitter[3], rng)
        )
    is_grey = rng.random() < config.gray_scale_prob
    if is_grey:
        matrix = np.broadcast_to(LUMA, (3, 3)) @ matrix
    return (matrix.astype(np.float32), contrast) if changes or is_grey else None


def _turn_hue(most: float, rng: np.random.Generator) -> np.ndarray:
    """(3, 3): a turn around the axis of grey, by at most `most` of a full one."""
    angle = 2 * math.pi * rng.uniform(-most, most)
    axis = np.full(3, 1 / math.sqrt(3))
    cross = np.cross(np.eye(3), axis)  # Rodrigues' formula
    return math.cos(angle) * np.eye(3) + (1 - math.cos(angle)) * np.outer(axis, axis) + math.sin(angle) * cross
