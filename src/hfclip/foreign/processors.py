"""Tokenizers and image processors that go with a model."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, CLIPTokenizer

from ..configuration_hfclip import HFCLIPConfig
from ..errors import UsageError, as_usage_error
from ..image_processing_hfclip import HFCLIPImageProcessor
from ..processing_hfclip import HFCLIPProcessor, open_image_processor
from ..tokenization_hfclip import HFCLIPTokenizer


OPENAI_TOKENIZER = "openai/clip-vit-base-patch32"  # has the vocabulary of OpenAI's nine models
OPENAI_VOCABULARY = 49408
IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer_config.json")


def has_any(folder: Path, names: tuple[str, ...]) -> bool:
    return any((folder / name).is_file() for name in names)


def join(image_processor: HFCLIPImageProcessor | None, tokenizer: Any) -> Any:
    """A processor of both, the one that is there, or None."""
    if image_processor is not None and tokenizer is not None:
        return HFCLIPProcessor(image_processor, tokenizer)
    return tokenizer if image_processor is None else image_processor


def open_processor(folder: Path, tokenizer_class: type = AutoTokenizer) -> tuple[HFCLIPImageProcessor | None, Any]:
    """A model folder's image processor and tokenizer; None for what it has not."""
    image_processor = tokenizer = None
    with as_usage_error(folder):
        if has_any(folder, IMAGE_FILES):
            image_processor = open_image_processor(folder)
        if has_any(folder, TOKENIZER_FILES[:2]):
            tokenizer = tokenizer_class.from_pretrained(folder, trust_remote_code=False)
    return image_processor, tokenizer


def as_clip_tokenizer(tokenizer: Any) -> Any:
    """transformers' own tokenizer with the vocabulary and merges of hfclip's; others as they are."""
    if not isinstance(tokenizer, HFCLIPTokenizer):
        return tokenizer
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in model["merges"]]
    return CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=tokenizer.model_max_length)


def openai_tokenizer(config: HFCLIPConfig, merges: str | None) -> tuple[HFCLIPTokenizer | None, list[str]]:
    """OpenAI's tokenizer, with merges from a file or from the Hub; None, with a note, for another vocabulary."""
    text = config.text_config
    if merges is None and text.vocab_size != OPENAI_VOCABULARY:
        return None, [f"no tokenizer: OpenAI's has 49,408 tokens, this model {text.vocab_size}."]
    try:
        if merges is not None:
            tokenizer = HFCLIPTokenizer.from_openai_bpe(merges)
        else:
            tokenizer = HFCLIPTokenizer.from_pretrained(OPENAI_TOKENIZER)
    except (OSError, ValueError) as error:  # ValueError: without network, a folder without files
        if merges is not None:
            raise UsageError(f"--merges: {error}") from error
        raise UsageError(
            "No tokenizer: OpenAI's cannot be fetched from the Hub, and without it the model cannot be used. Pass --merges "
            "bpe_simple_vocab_16e6.txt.gz (it lies in OpenAI's repository, folder clip)."
        ) from error
    if len(tokenizer) != text.vocab_size:
        raise UsageError(
            f"--merges: found {len(tokenizer)} tokens, expected the model's {text.vocab_size}. Pass the merges that it "
            "was trained with, or leave --merges out."
        )
    tokenizer.model_max_length = text.max_position_embeddings
    return tokenizer, []
