"""The precision that a device computes in: asked for by name, or measured."""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn import functional as F


PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def autocast_for(precision: str, device: torch.device) -> AbstractContextManager:
    """Autocast to "bf16" or "fp16"; nothing for "fp32"."""
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, dtype=PRECISIONS[precision])


def settled_precision(asked: str, device: torch.device, before: str | None = None) -> tuple[str, str]:
    """The precision for what is asked, "auto" among it, and what to say about it; "" where nothing is to be said.

    Args:
        before: of the run that is resumed.
    """
    precision, said = asked, []
    if asked == "auto" and before is not None:
        precision, said = before, ["as the run began"]
    if precision in ("auto", "bf16"):
        in_hardware = computes_bfloat16(device)
        if precision == "auto":
            precision = "bf16" if in_hardware else "fp32"
            said = [
                f"auto: this {device.type} device {'has' if in_hardware else 'does not have'} bfloat16 in hardware"
            ]
        elif not in_hardware:
            said.append(f"WARNING: slow, as this {device.type} device only emulates bfloat16; fp32 would be faster")
    return precision, ", ".join(said)


def computes_bfloat16(device: torch.device) -> bool:
    """Whether the device has bfloat16 in hardware. Others emulate it: right, but on CPUs up to a hundred times slower.

    A CPU is measured: what matters is that matrix products and convolutions of this torch gain by it here, whatever
    the processor lists.
    """
    if device.type == "cpu":
        return all(_gains_by_bfloat16(product) for product in (_matrix_product, _convolution))
    if device.type in ("cuda", "xpu"):
        return torch.get_device_module(device).is_bf16_supported(including_emulation=False)
    return False


def _gains_by_bfloat16(product: Callable[[torch.dtype], Callable[[], torch.Tensor]]) -> bool:
    """Whether it takes less than 0.8 of its time in float32: about 0.5 in hardware, from 1 on where it is emulated.

    The best of many turns on one thread, so that other work on the machine does not decide.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        halved, full, best = product(torch.bfloat16), product(torch.float32), [math.inf, math.inf]
        for turn in range(30):
            best = [min(best[0], _seconds(halved)), min(best[1], _seconds(full))]
            if turn > 2 and best[0] > 3 * best[1]:  # emulated; each turn takes long
                break
    finally:
        torch.set_num_threads(threads)
    return best[0] < 0.8 * best[1]


def _matrix_product(dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    matrix = torch.ones(256, 256, dtype=dtype)
    return lambda: matrix @ matrix


def _convolution(dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    images, weight = torch.ones(8, 64, 16, 16, dtype=dtype), torch.ones(64, 64, 3, 3, dtype=dtype)
    return lambda: F.conv2d(images, weight, padding=1)


def _seconds(run: Callable[[], torch.Tensor]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
