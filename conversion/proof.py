"""The proof of a conversion: what source and result compute from the same inputs, in float64.

    fixed inputs -> the source's tensors, through `reference`              -> embeddings -> compare
                 -> the written files, through the model, block by block   -> embeddings ->

In float64 a difference that is more than rounding shows, whatever its size.
"""

import ctypes
import sys
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import cpu_offload, init_empty_weights
from torch import Tensor
from transformers import PreTrainedModel

from hfclip.configuration_hfclip import TOWER_CONFIGS
from hfclip.errors import UsageError


M_MMAP_THRESHOLD, MEGABYTE = -3, 1 << 20  # the first from malloc.h
TOLERANCE = 1e-9  # relative, in float64; two orders of summation differ by about 1e-15


def fixed_inputs(config: Any) -> tuple[Tensor | None, Tensor | None]:
    """An image of noise and three texts, the same on every run: (1, channels, side, side), (3, context).

    The texts have no, some and as many as possible tokens before their end. None for a tower that is not there.
    """
    generator = torch.Generator().manual_seed(0)
    vision = getattr(config, "vision_config", config if hasattr(config, "image_size") else None)
    text = getattr(config, "text_config", config if hasattr(config, "vocab_size") else None)
    pixel_values = input_ids = None
    if vision is not None:
        pixel_values = torch.randn(1, getattr(vision, "num_channels", 3), vision.image_size, vision.image_size, generator=generator)  # fmt: skip
    if text is not None:
        length, end = text.max_position_embeddings, text.eos_token_id
        words = range(end) if end is not None and end >= 4 else [token for token in (0, 1, 2, 3) if token != end]
        if text.model_type not in TOWER_CONFIGS:
            # RoBERTa has two positions more than places, BERT no end; both leave the padding out wherever it is.
            length, end = min(length, 64), text.vocab_size - 1 if end is None else end
            words = [token for token in words if token != text.pad_token_id]
        chosen = torch.randint(len(words), (3, length), generator=generator)
        input_ids = torch.tensor(words)[chosen]
        for row, position in zip(input_ids, (1, length // 2, length - 1)):
            row[position] = end
            row[position + 1 :] = getattr(text, "pad_token_id", 0) or 0
    return pixel_values, input_ids


def compare(
    found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = TOLERANCE
) -> dict[str, dict[str, float]]:
    """Prints and returns the differences of embeddings by name."""
    values = differences(found, expected)
    show("Source against result, embeddings of fixed inputs", values)
    wrong = [name for name in expected if not values[name]["relative"] <= tolerance]
    if wrong:
        raise UsageError(
            f"The result does not compute what the source does: {', '.join(wrong)} differ by more than {tolerance:g}. "
            "Nothing was written. The checkpoint's settings may not be what its config says."
        )
    return values


def differences(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    return {name: difference(found[name], expected[name]) for name in expected}


def show(title: str, values: dict[str, dict[str, float]]) -> None:
    print(f"\n{title}:")
    for name, numbers in values.items():
        print(f"  {name:<28} largest difference {numbers['absolute']:.1e}, relative {numbers['relative']:.1e}")
    sys.stdout.flush()


def difference(found: Tensor, expected: Tensor) -> dict[str, float]:
    """The largest absolute difference, and that as a share of the largest value; NaN where a value is not finite."""
    absolute = (found - expected).abs().max().item()
    return {"absolute": absolute, "relative": absolute / max(expected.abs().max().item(), 1e-30)}


def streamed(model_class: type[PreTrainedModel], config: Any, weights: Mapping[str, Tensor]) -> PreTrainedModel:
    """The model in float64, each block of which takes its weights when it computes and lets them go afterwards."""
    give_memory_back()
    if any(getattr(part, "model_type", None) == "timm_wrapper" for part in vars(config).values()):
        # timm computes while it builds, and keeps buffers where accelerate does not look: the whole model at once.
        model = model_class(config).double().eval()
        model.load_state_dict(weights)
        return model
    with init_empty_weights(include_buffers=False):  # what no file holds, such as position ids, has to be there
        model = model_class(config).double().eval()
    modules = list(model._no_split_modules)
    return cpu_offload(model, torch.device("cpu"), offload_buffers=True, state_dict=weights, preload_module_classes=modules)  # fmt: skip


def give_memory_back() -> None:
    """From now on a tensor that is freed goes back to the system at once.

    glibc keeps freed blocks up to 32 MB for later, and weights of many sizes leave it with as much as the model has.
    """
    try:
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MEGABYTE)
    except (AttributeError, OSError, TypeError):  # not glibc
        return


@torch.no_grad()
def compute_features(
    model: PreTrainedModel, pixel_values: Tensor | None, input_ids: Tensor | None
) -> dict[str, Tensor]:
    """Embeddings by an hfclip model, not normalised, named as `Conversion.features` names them."""
    features = {}
    if pixel_values is not None and hasattr(model, "get_image_features"):
        features["image_features"] = model.get_image_features(pixel_values.double()).pooler_output
    elif pixel_values is not None:
        outputs = model(pixel_values=pixel_values.double())
        features["image_features"] = outputs.get("image_embeds", outputs.get("pooler_output"))
    if input_ids is not None and hasattr(model, "get_text_features"):
        features["text_features"] = model.get_text_features(input_ids).pooler_output
    elif input_ids is not None:
        outputs = model(input_ids=input_ids)
        features["text_features"] = outputs.get("text_embeds", outputs.get("pooler_output"))
    return features
