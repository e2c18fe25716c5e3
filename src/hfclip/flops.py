"""How much arithmetic a step needs, and how much this machine can do: the two sides of a run's share of peak.

    HFCLIPConfig -> its towers run once without memory, under torch's counter -> FLOPs of an image, of a text
    -> of a batch, forward and backward -> / seconds / measured peak

Counted is what the model needs: matrix products and convolutions, a multiplication and an addition as two. Not counted
are what computes them again (gradient checkpointing, gradient cache), padding that the tower does not read,
element-wise work, the loss, a teacher and the optimizer; so a share of peak is comparable between settings, and is the
"model FLOPs utilization" of arXiv:2204.02311.
"""

import copy
import logging
import math
import time
from collections.abc import Callable
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel

from .configuration_hfclip import HFCLIPConfig
from .towers_hfclip import pooled_by


logger = logging.getLogger(__name__)


class Flops(NamedTuple):
    forward: int
    training: int
    """Forward and backward."""


class ModelFlops:
    """FLOPs of images and texts up to the joint space, of any towers: measured once for each image size.

    Attention counts whole, as is usual, also where it is causal: kernels differ in what they leave out.

    Args:
        freeze: "none", "vision" or "text", a tower without backward pass. It is in eval mode: all patches count.
    """

    def __init__(self, config: HFCLIPConfig, freeze: str = "none"):
        with torch.device("meta"):  # attention written out, since the counter does not know every fused kernel
            self.model = AutoModel.from_config(copy.deepcopy(config), attn_implementation="eager")
        if freeze != "none":
            self.model.freeze(freeze)
        self.config, self.images, self.runs = self.model.train().config, {}, True
        self.patch_dropout = getattr(self.config.vision_config, "patch_dropout", 0.0)

    def of_image(self, image_size: int | None = None, patch_dropout: float | None = None) -> Flops:
        """FLOPs of one image of `image_size` pixels a side, with a share of its patches dropped; default the config's."""
        vision = self.config.vision_config
        size = vision.image_size if image_size is None else image_size
        key = size, self.patch_dropout if patch_dropout is None else patch_dropout
        if key not in self.images:
            _, vision.patch_dropout = key
            pixels = torch.zeros(2, getattr(vision, "num_channels", 3), size, size, device="meta")
            self.images[key] = _measure(partial(self.model.encode_image, pixels))
        return self.images[key]

    def of_text(self, num_tokens: int) -> Flops:
        """FLOPs of one text of `num_tokens`, start and end included."""
        return self.of_texts(torch.tensor([num_tokens]))

    def of_texts(self, lengths: torch.Tensor) -> Flops:
        """FLOPs of texts of these lengths together; `lengths` is on the CPU, lest the host wait for a device."""
        before = lengths.long() - 1
        terms = (len(lengths), int(before.sum()), int((before * (before - 1) // 2).sum()))
        return Flops(*(sum(map(math.prod, zip(terms, kind, strict=True))) for kind in self._of_tokens))

    @cached_property
    def _of_tokens(self) -> list[tuple[int, int, int]]:
        """Forward and training FLOPs of a text of n tokens, a + b (n - 1) + c (n - 1)(n - 2) / 2, as (a, b, c).

        Linear layers cost the same for each token, attention for each pair of tokens: three lengths say it all. A tower
        that reads its padding always computes its whole context.
        """
        if self.config.text_reads_padding:
            return [(flops, 0, 0) for flops in self._measured_text(self.config.text_config.max_position_embeddings)]
        one, two, three = map(self._measured_text, (1, 2, 3))
        return [(a, b - a, c - 2 * b + a) for a, b, c in zip(one, two, three, strict=True)]

    def _measured_text(self, length: int) -> Flops:
        def encode() -> torch.Tensor:  # without a mask, since without memory there are no values to look at
            outputs = self.model.text_model(input_ids=torch.zeros(2, length, dtype=torch.long, device="meta"))
            return self.model.text_projection(pooled_by(self.config.text_pooling, outputs).pooler_output)

        return _measure(encode)

    def of_batch(self, batch: dict[str, torch.Tensor], patch_dropout: float | None = None) -> int | None:
        """Forward and backward FLOPs of `pixel_values` (images, 3, size, size) and `attention_mask` (texts, length).

        None for a tower whose code does not run without values, which is said once.
        """
        num_images, _, _, image_size = batch["pixel_values"].shape
        try:
            if self.runs:
                of_image = self.of_image(image_size, patch_dropout).training
                return num_images * of_image + self.of_texts(batch["attention_mask"].sum(dim=1)).training
        except Exception as error:  # whatever the code of others' towers raises: a run goes on without this number
            logger.warning("FLOPs are not counted: a tower does not run on the meta device (%s).", error)
            self.runs = False
        return None


def _measure(encode: Callable[[], torch.Tensor]) -> Flops:
    """FLOPs for one input of what encodes two; BatchNorm refuses one."""
    formulas = {torch.ops.aten.convolution_backward: _convolution_backward}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter, sdpa_kernel(SDPBackend.MATH):
        embeds = encode()
        forward = counter.get_total_flops()
        if embeds.requires_grad:
            embeds.sum().backward()
    return Flops(forward // 2, counter.get_total_flops() // 2)


def _convolution_backward(grad_shape, x_shape, weight_shape, *arguments, out_shape=None, **options) -> int:
    """For the gradients of input and weight, what the convolution costs itself; torch's formula overlooks groups."""
    *_, transposed, _, _, output_mask = arguments
    batch_and_places = x_shape[:1] + x_shape[2:] if transposed else grad_shape[:1] + grad_shape[2:]
    return 2 * math.prod(batch_and_places) * math.prod(weight_shape) * sum(output_mask[:2])


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
        pixels = torch.randn(images, channels, side, side, device=device).to(kind)
        weight = torch.randn(channels, channels, 3, 3, device=device).to(kind)
        products = (
            (2 * size**3, partial(torch.mm, left, right, out=torch.empty_like(left))),
            (2 * images * (3 * side * channels) ** 2, partial(F.conv2d, pixels, weight, padding=1)),
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
