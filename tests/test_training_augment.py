"""Random changes of training images: deterministic by sample, off unless asked for, and what each of them does."""

import numpy as np
import pytest
from PIL import Image

from hfclip.errors import UsageError
from hfclip.image_processing_hfclip import random_square_crop
from training.config import AugmentConfig, Config
from training.data.augment import augmented


def photo(height: int = 40, width: int = 56) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def changed(seed: int = 0, image: Image.Image | None = None, **settings) -> np.ndarray:
    return augmented(image or photo(), 32, AugmentConfig(**settings), np.random.default_rng(seed))


EVERY = {
    "scale": [0.3, 1.0],
    "rotation": 30.0,
    "flip_prob": 0.5,
    "sketch_prob": 0.5,
    "color_jitter": [0.4, 0.4, 0.4, 0.1],
    "gray_scale_prob": 0.2,
}


def test_without_settings_it_is_the_papers_crop():
    for seed in range(5):
        assert np.array_equal(changed(seed), random_square_crop(photo(), 32, np.random.default_rng(seed)))


def test_an_image_follows_from_its_generator_alone():
    images = [changed(seed, **EVERY) for seed in range(20)]
    assert all(np.array_equal(image, changed(seed, **EVERY)) for seed, image in enumerate(images))
    assert len({image.tobytes() for image in images}) == 20
    assert {image.shape for image in images} == {(3, 32, 32)} and {image.dtype for image in images} == {
        np.dtype("uint8")
    }


def test_turned_images_are_cropped_as_the_paper_does():
    turned = changed(1, image=photo(32, 64), rotation=1e-9)
    rng = np.random.default_rng(1)
    rng.uniform()  # the angle
    expected = random_square_crop(photo(32, 64), 32, rng)
    assert np.abs(turned.astype(int) - expected.astype(int)).max() <= 1  # rounding of the rotation


def test_flipped_images_are_mirrored_crops():
    assert np.array_equal(changed(3, flip_prob=1.0)[:, :, ::-1], changed(3))


def test_grey_images_have_the_luma_of_their_colors():
    colors, grey = changed(1), changed(1, gray_scale_prob=1.0)
    assert np.array_equal(grey[0], grey[1]) and np.array_equal(grey[0], grey[2])
    expected = np.tensordot([0.299, 0.587, 0.114], colors.astype(float), axes=1)
    assert np.abs(grey[0] - expected).max() <= 0.51  # rounding


def test_each_color_change_is_that_of_its_name():
    """Of a grey image, brightness scales it, contrast scales it around its mean; saturation and hue leave it alone."""
    grey = Image.fromarray(np.random.default_rng(1).integers(60, 120, (32, 32), np.uint8)).convert("RGB")
    plain = np.asarray(grey).transpose(2, 0, 1).astype(float)
    change = lambda *jitter: changed(2, grey, color_jitter=list(jitter), color_jitter_prob=1.0).astype(float)
    assert np.abs(change(0, 0, 0.9, 0.5) - plain).max() <= 0.51
    brighter = change(0.5, 0, 0, 0)
    assert np.abs(brighter - plain * (brighter.sum() / plain.sum())).max() <= 1.1
    assert abs(brighter.sum() / plain.sum() - 1) > 0.05
    contrast = change(0, 0.5, 0, 0)
    assert abs(contrast.mean() - plain.mean()) < 0.51 and abs(contrast.std() / plain.std() - 1) > 0.05
    # A turn of hue keeps how bright a color is in the mean of its channels.
    flat = Image.new("RGB", (32, 32), (140, 100, 90))
    turned = changed(2, flat, color_jitter=[0, 0, 0, 0.5], color_jitter_prob=1.0)[:, 0, 0]
    assert abs(turned.mean() - 110) <= 1 and not np.array_equal(turned, [140, 100, 90])


def test_drawings_show_outlines_whatever_the_colors():
    square = np.full((32, 32, 3), 255, np.uint8)
    square[8:24, 8:24] = (160, 30, 30)
    drawn = changed(0, Image.fromarray(square), sketch_prob=1.0)
    outline = drawn[0] < 128
    assert outline.any()
    assert (drawn[0, 12:20, 12:20] == 255).all() and (drawn[0, :7] == 255).all()  # inside and outside of it
    square[8:24, 8:24] = (30, 30, 30)
    darker = changed(0, Image.fromarray(square), sketch_prob=1.0)[0] < 128
    assert darker[8:10, 10:22].all() and (outline <= darker).all()


def test_a_crop_shows_a_part_of_the_image():
    columns = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1))).convert("RGB")
    widths = [
        np.ptp(changed(seed, columns, scale=[0.25, 0.25], ratio=[1.0, 1.0])[0].astype(int)) for seed in range(20)
    ]
    assert all(110 <= width <= 128 for width in widths)  # half of the columns, 4 levels each


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"scale": [0.9]}, "data.augment.scale"),
        ({"scale": [0.9, 0.5]}, "data.augment.scale"),
        ({"color_jitter": [0.4, 0.4, 0.4]}, "data.augment.color_jitter"),
        ({"flip_prob": 1.5}, "data.augment.flip_prob"),
        ({"flip": 0.5}, "data.augment.flip"),
        ({"rotation": "much"}, "data.augment.rotation"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(settings, named):
    with pytest.raises(UsageError, match=named):
        Config.from_dict({"data": {"augment": settings}})
