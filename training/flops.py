"""How much arithmetic a step needs, and how much this machine can do: the two sides of a run's share of peak.

    HFCLIPConfig -> FLOPs of one image, of one text -> of a batch, forward and backward -> / seconds / measured peak

Counted is what the model needs: matrix products and convolutions, a multiplication and an addition as two. Not counted
are what computes them again (gradient checkpointing, gradient cache), element-wise work, the loss, a teacher and the
optimizer; so a share of peak is comparable between settings, and is the "model FLOPs utilization" of arXiv:2204.02311.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch.nn import functional as F
from transformers import PreTrainedConfig

from hfclip import HFCLIPConfig


class Flops(NamedTuple):
    """Forward FLOPs of a tower for one input. The parts differ in what their backward pass costs."""

    first: int
    """The layer that reads the input itself, for which there is no gradient."""
    rest: int
    projection: int
    """Into the joint space; trained when the tower is frozen. 0 for a tower that ends there itself."""

    @property
    def forward(self) -> int:
        return sum(self)

    def training(self, frozen: bool) -> int:
        """Forward and backward: each product of the forward pass has one for its weights and one for its input."""
        if frozen:
            return self.first + self.rest + 2 * self.projection
        return 2 * self.first + 3 * (self.rest + self.projection)


def tower_flops(
    config: HFCLIPConfig,
    *,
    image_size: int | None = None,
    patch_dropout: float | None = None,
    text_tokens: int | None = None,
    all_positions: bool = False,
) -> dict[str, int | None]:
    """Forward FLOPs of one image, "image", and of one text, "text", up to the joint space.

    Args:
        image_size: side in pixels; default the config's.
        patch_dropout: share of patches left out behind the patch embedding; default the config's, as in training.
        text_tokens: real tokens of the text, start and end included, since padding costs nothing; default, and always
            for towers that read their padding, the whole context.
        all_positions: the last ViT block and the ResNets' attention pool compute every position, as in published
            figures, and not the one that is read.

    Returns:
        None in the place of a tower that is not ours.
    """
    image = _image_flops(config, image_size, patch_dropout, all_positions)
    text = _text_flops(config, text_tokens)
    return {"image": image and image.forward, "text": text and text.forward}


def training_flops(
    config: HFCLIPConfig,
    *,
    image_size: int | None = None,
    patch_dropout: float | None = None,
    text_tokens: int | None = None,
    freeze: str = "none",
) -> dict[str, int | None]:
    """As `tower_flops`, forward and backward.

    `freeze` ("none", "vision", "text") names a tower without backward pass. It is in eval mode: all patches count.
    """
    image = _image_flops(config, image_size, 0.0 if freeze == "vision" else patch_dropout, all_positions=False)
    text = _text_flops(config, text_tokens)
    return {
        "image": image and image.training(frozen=freeze == "vision"),
        "text": text and text.training(frozen=freeze == "text"),
    }


def batch_flops(config: HFCLIPConfig, batch: dict[str, torch.Tensor], *, freeze: str = "none") -> int | None:
    """Forward and backward FLOPs of a batch with `pixel_values` (images, 3, size, size) and `attention_mask`
    (texts, length), on the CPU lest the host wait for a device; None if a tower is not ours.
    """
    num_images, _, _, image_size = batch["pixel_values"].shape
    lengths = batch["attention_mask"].sum(dim=1)
    image = _image_flops(config, image_size, 0.0 if freeze == "vision" else None, all_positions=False)
    text = _text_flops(config, lengths)
    if image is None or text is None:
        return None
    of_texts = torch.as_tensor(text.training(frozen=freeze == "text")).expand(len(lengths)).sum()
    return num_images * image.training(frozen=freeze == "vision") + int(of_texts)


# ---------------------------------------------------------------------------------------------------------------------
# Towers
# ---------------------------------------------------------------------------------------------------------------------


def _image_flops(
    config: HFCLIPConfig, image_size: int | None, patch_dropout: float | None, all_positions: bool
) -> Flops | None:
    tower = config.vision_config
    if tower.model_type not in ("hfclip_vit", "hfclip_resnet"):
        return None
    image_size = tower.image_size if image_size is None else image_size
    if tower.model_type == "hfclip_resnet":
        return _resnet(tower, image_size, all_positions)
    patch_dropout = tower.patch_dropout if patch_dropout is None else patch_dropout
    num_patches = (image_size // tower.patch_size) ** 2
    num_tokens = 1 + (max(1, round(num_patches * (1 - patch_dropout))) if patch_dropout else num_patches)
    num_last = num_tokens if all_positions or tower.pooling != "cls" else 1
    blocks = (tower.num_hidden_layers - 1) * _block(tower, num_tokens, num_tokens)
    return Flops(
        first=_matmul(num_patches, tower.num_channels * tower.patch_size**2, tower.hidden_size),
        rest=blocks + _block(tower, num_tokens, num_last),
        projection=_matmul(1, tower.hidden_size, config.projection_dim),
    )


def _text_flops(config: HFCLIPConfig, num_tokens: int | torch.Tensor | None) -> Flops | None:
    """Of a text of so many tokens, or of each of several."""
    tower = config.text_config
    if tower.model_type not in ("hfclip_text", "hfclip_bag_of_words"):
        return None
    if num_tokens is None or tower.reads_padding:
        num_tokens = tower.max_position_embeddings
    projection = _matmul(1, tower.hidden_size, config.projection_dim)
    if tower.model_type == "hfclip_bag_of_words":  # the mean, a product with weights that have no gradient
        return Flops(_matmul(1, num_tokens, tower.hidden_size), 0, projection)
    return Flops(0, tower.num_hidden_layers * _block(tower, num_tokens, num_tokens), projection)


def _block(tower: PreTrainedConfig, num_tokens: int | torch.Tensor, num_queries: int | torch.Tensor) -> int:
    """A transformer block. Causal attention counts whole, as is usual: kernels differ in what they leave out."""
    width = tower.hidden_size
    keys_and_values = 2 * _matmul(num_tokens, width, width)
    queries_and_output = 2 * _matmul(num_queries, width, width)
    attention = 2 * _matmul(num_queries, width, num_tokens)
    mlp = 2 * _matmul(num_queries, width, tower.intermediate_size)
    return keys_and_values + queries_and_output + attention + mlp


def _resnet(tower: PreTrainedConfig, image_size: int, all_positions: bool) -> Flops:
    width, side = tower.stem_width, image_size // 2
    first = _convolution(side, 3, tower.num_channels, width // 2)
    rest = _convolution(side, 3, width // 2, width // 2) + _convolution(side, 3, width // 2, width)
    side, incoming = side // 2, width
    for stage, depth in enumerate(tower.depths):
        channels = width * 2**stage
        for number in range(depth):
            before, side = side, side // 2 if stage and not number else side  # pooled in front of the third one
            rest += _convolution(before, 1, incoming, channels) + _convolution(before, 3, channels, channels)
            rest += _convolution(side, 1, channels, 4 * channels)
            if not number:
                rest += _convolution(side, 1, incoming, 4 * channels)  # of the shortcut
            incoming = 4 * channels
    num_tokens = side**2 + 1
    num_queries = num_tokens if all_positions else 1
    rest += _matmul(2 * num_tokens + num_queries, incoming, incoming)
    rest += 2 * _matmul(num_queries, incoming, num_tokens) + _matmul(num_queries, incoming, tower.projection_dim)
    return Flops(first, rest, projection=0)


def _matmul(rows: int, inner: int, columns: int) -> int:
    return 2 * rows * inner * columns


def _convolution(side: int, kernel: int, incoming: int, outgoing: int) -> int:
    """`side`: of the square result, in pixels."""
    return _matmul(side**2, kernel**2 * incoming, outgoing)


# ---------------------------------------------------------------------------------------------------------------------
# The machine
# ---------------------------------------------------------------------------------------------------------------------


def measured_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """FLOP/s of the fastest of the matrix products and convolutions that `device` computes within `seconds` each.

    In `dtype`, or in float32 where that is faster: a device that has no such hardware computes in float32 itself.
    Measured with torch's present settings (threads, TF32). Several processes of one machine get, at the same time,
    each what the others leave.
    """
    on_cpu, fastest = device.type == "cpu", 0.0
    size = 1024 if on_cpu else 8192  # large enough for the device's best, and 400 MB at most
    images, channels, side = (8, 256, 16) if on_cpu else (64, 256, 56)
    for kind in {torch.float32, dtype}:
        left, right = torch.randn(2, size, size, device=device).to(kind)
        pictures = torch.randn(images, channels, side, side, device=device).to(kind)
        weight = torch.randn(channels, channels, 3, 3, device=device).to(kind)
        products = (
            (_matmul(size, size, size), partial(torch.mm, left, right, out=torch.empty_like(left))),
            (images * _convolution(side, 3, channels, channels), partial(F.conv2d, pictures, weight, padding=1)),
        )
        fastest = max([fastest, *(flops / _shortest(run, device, seconds) for flops, run in products)])
    return fastest


def _shortest(run: Callable[[], torch.Tensor], device: torch.device, seconds: float) -> float:
    """Seconds of the fastest of the runs within `seconds`."""
    fastest, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or fastest == float("inf"):
        _finish(device)
        start = time.perf_counter()
        run()
        _finish(device)
        fastest = min(fastest, time.perf_counter() - start)
    return fastest


def _finish(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
