"""Sizes and settings that no model has, refused before a config is built.

Every limit lies tenfold and more above all published models: 1,000 layers, a width of 100,000, a vocabulary of ten
million, images of 16,384 pixels, 200 billion parameters in a tower of ours. They hold for our towers and for those of
AutoModel alike, so that what a config asks for, by accident or on purpose, costs bounded time and memory.
"""

import functools
import re
from typing import Any

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers.activations import ACT2FN


# Lowest and highest value of a size, by the field's name; of each item where a field holds several.
LIMITS = {
    "hidden_size": (1, 100_000),
    "intermediate_size": (1, 500_000),
    "num_hidden_layers": (1, 1_000),
    "num_attention_heads": (1, 10_000),
    "projection_dim": (1, 100_000),
    "vocab_size": (1, 10_000_000),
    "max_position_embeddings": (1, 100_000_000),
    "image_size": (1, 16_384),
    "patch_size": (1, 16_384),
    "num_channels": (1, 10_000),
    "stem_width": (1, 3_000),
    "depths": (0, 400),
    "num_labels": (0, 1_000_000),
}
# What numbers of blocks are called elsewhere: depth, n_layer, encoder_layers ...
BLOCKS, MAX_BLOCKS = re.compile(r"(^|_)(layers?|depths?|blocks|stages)$"), 1_000
MAX_NUMBER = 10**9
MAX_PARAMETERS = 2 * 10**11
MAX_NESTING = 30
DTYPES = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")


def refuse_absurd(owner: str, fields: dict[str, Any], nesting: int = 0) -> None:
    """Raises ValueError for settings of a config, nested ones included, that no model has; see the module."""
    if nesting > MAX_NESTING:
        raise ValueError(
            f"{owner}: found settings nested deeper than {MAX_NESTING} levels, expected a model's config. Fetch "
            "config.json again, or write it anew."
        )
    for key, value in fields.items():
        highest = MAX_BLOCKS if BLOCKS.search(str(key)) else MAX_NUMBER
        low, high = LIMITS.get(key, (-highest, highest))
        for item in value if isinstance(value, list | tuple) else [value]:
            if isinstance(item, dict | list | tuple):
                refuse_absurd(owner, item if isinstance(item, dict) else {key: item}, nesting + 1)
            elif isinstance(item, int) and not low <= item <= high or isinstance(item, bool) and key in LIMITS:
                expected = f"a positive number, at most {high}" if low == 1 else f"a number from {low} to {high}"
                raise ValueError(
                    f"{owner}: found {key}={shown(value)}, expected {expected}. Correct {key}, or leave it out."
                )
    act = fields.get("hidden_act")
    if isinstance(act, str) and act not in ACT2FN:
        raise ValueError(
            f"{owner}: found hidden_act={shown(act)}, expected an activation that transformers knows. OpenAI's weights "
            "need 'quick_gelu', most OpenCLIP weights 'gelu'."
        )


def shown(value: Any) -> str:
    """A value in an error, however long; str() refuses integers of thousands of digits."""
    if isinstance(value, int) and abs(value) > 10**30:
        return f"a number of {value.bit_length()} bits"
    return f"{value!r:.80}" if not isinstance(value, list | tuple | dict) else f"{str(value)[:80]}"


def limited(cls: type) -> type:
    """`strict`, for our configs: limits first, and one kind of error, ValueError."""
    cls = strict(cls)
    build = cls.__init__

    @functools.wraps(build)
    def __init__(self, *args, **kwargs):
        refuse_absurd(cls.__name__, kwargs)
        _refuse_unusable(cls, kwargs)
        try:
            build(self, *args, **kwargs)
        except StrictDataclassError as error:
            raise ValueError(f"{cls.__name__}: {error} Correct the field, or leave it out.") from error

    cls.__init__ = __init__
    return cls


def _refuse_unusable(cls: type, fields: dict[str, Any]) -> None:
    """What transformers takes for granted in the fields of every config, and fails at later without saying of what."""

    def require(holds: bool, key: str, expected: str) -> None:
        if not holds:
            raise ValueError(
                f"{cls.__name__}: found {key}={shown(fields[key])}, expected {expected}. Correct {key}, or leave it out."
            )

    for key, value in fields.items():
        inherited = getattr(cls, key, None)
        is_code = callable(inherited) or isinstance(inherited, property) and inherited.fset is None
        require(not (is_code or key.startswith("__")), key, "no field of this name: it is one of the class itself")
        if isinstance(inherited, dict) or key.startswith("base_model_"):
            require(value is None or isinstance(value, dict), key, "an object of names and values")
        if key in ("dtype", "torch_dtype") and value is not None:
            require(str(value).removeprefix("torch.") in DTYPES, key, f"one of {', '.join(DTYPES)}")
        elif key in ("id2label", "label2id", "quantization_config") and value is not None:
            require(isinstance(value, dict) or hasattr(value, "quant_method"), key, "an object of names and values")
        elif key == "num_labels":
            require(value is None or type(value) is int, key, "a whole number")
        elif key in ("attn_implementation", "_attn_implementation"):
            require(_is_attention(value), key, "'eager', 'sdpa' or another attention that transformers knows")
    if isinstance(fields.get("id2label"), dict):
        require(all(str(key).isdecimal() for key in fields["id2label"]), "id2label", "numbers as its names")
    if isinstance(quantization := fields.get("quantization_config"), dict):
        reason = _against_quantization(quantization)
        require(reason is None, "quantization_config", f"settings that transformers reads ({reason})")


def _is_attention(value: Any) -> bool:
    """None, a name that transformers has registered, one of a kernel on the Hub, or such values by sub-config."""
    if value is None or isinstance(value, dict):
        return all(_is_attention(part) for part in (value or {}).values())
    if not isinstance(value, str):
        return False
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = value.rpartition("|")[2]
    return name in ("", "eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()) or bool(re.match(r"\w[\w.-]*/\w", name))


def _against_quantization(settings: dict[str, Any]) -> str | None:
    """Why quantisation settings make no sense. Whether their library is installed is asked when a model is loaded."""
    from transformers.quantizers.auto import AutoQuantizationConfig

    try:
        AutoQuantizationConfig.from_dict(dict(settings))
    except ImportError:
        return None
    except Exception as error:  # each of the twenty libraries' configs fails in its own way
        return f"{type(error).__name__}: {error}"[:200]
    return None
