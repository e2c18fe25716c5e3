"""What is trained: the model, and the tokenizer and image processor that travel with it.

First the architecture, from the settings alone; then the tokenizer, which may be trained on the captions; then the
weights: of a pretrained model, or random. They are float32 wherever they come from. A
resumed run goes on from its checkpoint as from any pretrained model.
"""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase, set_seed

from hfclip import (
    HFCLIPConfig,
    HFCLIPImageProcessor,
    HFCLIPModel,
    HFCLIPProcessor,
    HFCLIPTokenizer,
)
from hfclip.configuration_hfclip import TOWER_CONFIGS
from hfclip.data.samples import Source, usable_captions
from hfclip.errors import UsageError
from hfclip.losses import LOSSES
from hfclip.names import opening
from hfclip.processing_hfclip import open_image_processor

from .command import load_yaml
from .config import SECTIONS, Config, ModelConfig
from .low_precision import halve_text_weights


MAX_TOKENIZER_SAMPLES = 500_000


def resumed_from(config: Config, checkpoint: Path | None) -> Config:
    """The settings with `checkpoint` as the origin of model, tokenizer and image processor, unless it is None."""
    if checkpoint is None:
        return config
    origin = {"checkpoint": str(checkpoint), "preset": None, "config": None, "tokenizer": None}
    return replace(config, model=replace(config.model, **origin))


def build_architecture(config: Config) -> HFCLIPConfig:
    """The config of the model to train; its vocabulary still that of the settings.

    Raises:
        UsageError: for an unknown preset or field, a folder that is none, or towers that do not fit.
    """
    model = config.model
    try:
        architecture = _architecture(model)
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise UsageError(f"model: {error}") from error
    if model.patch_dropout is not None:
        if not architecture.has_patches:
            raise UsageError(
                f"model.patch_dropout: a {architecture.vision_config.model_type} tower has no patches to drop."
            )
        architecture.vision_config.patch_dropout = model.patch_dropout
    if architecture.is_naflex:
        raise UsageError("model: NaFlex takes images each in its own shape, and training cuts squares of them.")
    if not isinstance(getattr(architecture.vision_config, "image_size", None), int):
        raise UsageError(
            f"model: the {architecture.vision_config.model_type} tower's config has no image_size; add it."
        )
    _fit_scalars(architecture, config)
    return architecture


def _fit_scalars(architecture: HFCLIPConfig, config: Config) -> None:
    """Gives a new model the learnable scalars that its loss reads.

    Raises:
        UsageError: for an unknown loss, a checkpoint without its scalars, or scalars that it would leave untrained.
    """
    name = config.optim.loss
    if name not in LOSSES:
        raise UsageError(f"optim.loss: found {name!r}, expected one of {', '.join(map(repr, LOSSES))}.")
    known = {scalar for loss in LOSSES.values() for scalar in loss.scalars}
    present = {scalar for scalar in known if getattr(architecture, f"{scalar}_init_value") is not None}
    needed = LOSSES[name].scalars
    fitting = " or ".join(other for other, loss in LOSSES.items() if present == set(loss.scalars))
    for scalar in sorted(present - set(needed)):
        raise UsageError(f"optim.loss: {name} leaves the model's {scalar} untrained. Use {fitting}.")
    for scalar in sorted(set(needed) - present):
        if config.model.checkpoint is not None:
            raise UsageError(f"optim.loss: {name} needs a {scalar}, which this checkpoint has not. Use {fitting}.")
        architecture.update({f"{other}_init_value": value for other, value in needed.items()})


def _architecture(model: ModelConfig) -> HFCLIPConfig:
    if model.preset is not None:
        return HFCLIPConfig.from_preset(model.preset)
    if model.checkpoint is not None:
        with opening(model.checkpoint, "checkpoint"):
            return HFCLIPConfig.from_pretrained(model.checkpoint)
    fields = model.config if isinstance(model.config, dict) else load_yaml(model.config)
    sections = [name for name in fields if name in SECTIONS]
    if sections:
        raise UsageError(
            f"config holds {', '.join(sections)}, the sections of a run; expected fields of HFCLIPConfig such as "
            "vision_config. Give the file to `--config`, or take what stands below model.config in it."
        )
    return HFCLIPConfig(**fields)


def build_processor(
    config: Config, architecture: HFCLIPConfig, source: Source
) -> tuple[HFCLIPConfig, HFCLIPProcessor]:
    """Image processor and tokenizer, and the architecture with the vocabulary of a tokenizer that was trained.

    Raises:
        UsageError: if there is no tokenizer, or tokenizer or image processor do not fit the model.
    """
    model, text = config.model, architecture.text_config
    try:
        image_processor = _image_processor(model, architecture.image_size)
        tokenizer = _tokenizer(config, source)
    except (OSError, ValueError) as error:
        raise UsageError(f"model: no tokenizer or image processor: {error}") from error
    own = text.model_type in TOWER_CONFIGS
    if own and model.tokenizer == "train":
        words = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        architecture.text_config = type(text)(**{**text.to_dict(), "vocab_size": len(tokenizer), **words})
    # Towers of other families may round their vocabulary up; ours has exactly the tokenizer's.
    elif len(tokenizer) > text.vocab_size or own and len(tokenizer) != text.vocab_size:
        raise UsageError(
            f"model.tokenizer has {len(tokenizer)} tokens, but the model's text_config.vocab_size is "
            f"{text.vocab_size}. Use the tokenizer that belongs to the checkpoint, or set vocab_size."
        )
    elif own and tokenizer.eos_token_id != text.eos_token_id:
        raise UsageError(
            f"model.tokenizer ends texts with id {tokenizer.eos_token_id}, but the model's text_config.eos_token_id, "
            f"where it pools, is {text.eos_token_id}. Set it to the tokenizer's."
        )
    size = image_processor.crop_size if image_processor.do_center_crop else image_processor.size
    crop = (size.get("height"), size.get("width"))
    if crop != (architecture.image_size, architecture.image_size):
        raise UsageError(
            f"model: the image processor cuts {crop[0]} x {crop[1]} pixels, but the model takes squares of "
            f"{architecture.image_size}. Fix the checkpoint's preprocessor_config.json."
        )
    # What both the text tower and the tokenizer allow, start and end included.
    tokenizer.model_max_length = min(text.max_position_embeddings, tokenizer.model_max_length)
    return architecture, HFCLIPProcessor(image_processor, tokenizer)


def _image_processor(model: ModelConfig, image_size: int) -> HFCLIPImageProcessor:
    if model.checkpoint is not None:
        with opening(model.checkpoint, "checkpoint"):
            found = open_image_processor(model.checkpoint)
        if not isinstance(found, HFCLIPImageProcessor):
            raise ValueError(
                f"found a {type(found).__name__}, expected an image processor whose pixels hfclip's gives: training cuts "
                "random squares of them."
            )
        return found
    return HFCLIPImageProcessor(size=image_size)


def _tokenizer(config: Config, source: Source) -> PreTrainedTokenizerBase:
    model = config.model
    if model.tokenizer == "train":
        return _trained_tokenizer(config, source)
    if model.tokenizer is None and model.checkpoint is not None:
        with opening(model.checkpoint, "checkpoint"):
            return HFCLIPProcessor.from_pretrained(model.checkpoint).tokenizer
    if model.tokenizer.endswith((".gz", ".txt")):
        return HFCLIPTokenizer.from_openai_bpe(model.tokenizer)
    with opening(model.tokenizer, "tokenizer"):
        return AutoTokenizer.from_pretrained(model.tokenizer)


def _trained_tokenizer(config: Config, source: Source) -> HFCLIPTokenizer:
    chosen = np.linspace(0, len(source) - 1, min(len(source), MAX_TOKENIZER_SAMPLES)).astype(int)
    bar = tqdm(chosen.tolist(), desc="captions for the tokenizer", unit="sample", disable=None, leave=False)
    texts = (caption for index in bar for caption in usable_captions(source, index))
    log = logging.getLogger(HFCLIPTokenizer.__module__)
    level = log.level
    log.setLevel(logging.ERROR)  # `model.vocab_size` is a limit: that few captions give fewer tokens is no news
    try:
        return HFCLIPTokenizer.train_new_from_iterator(texts, config.model.vocab_size, show_progress=False)
    finally:
        log.setLevel(level)


def build_model(config: Config, architecture: HFCLIPConfig) -> HFCLIPModel:
    """The model in float32, with towers frozen and checkpointing enabled as the settings say.

    Raises:
        UsageError: if weights are missing or cannot be read.
    """
    set_seed(config.run.seed)  # the same initial weights on every rank, and in every run with this seed
    try:
        if config.model.checkpoint is not None:
            model = load_model(config.model.checkpoint, config=architecture)
        else:
            model = HFCLIPModel(architecture)
    except (OSError, ValueError) as error:
        raise UsageError(f"model: {error}") from error
    if "text_weights" in config.optim.bfloat16:
        halve_text_weights(model)
    if config.model.freeze != "none":
        model.freeze(config.model.freeze)
    if config.model.gradient_checkpointing:
        checkpoint_activations(model)
    return model.train()


def checkpoint_activations(model: nn.Module) -> None:
    """Has the backward pass compute activations again, by the name that the installed transformers has for that."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def load_model(name: str, **options) -> HFCLIPModel:
    """The model of a folder or of the Hub in float32, whatever it is stored in.

    Raises:
        UsageError: if weights are missing.
    """
    model, report = HFCLIPModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True, **options)
    missing = sorted(report["missing_keys"])
    if missing:
        raise UsageError(f"{name} lacks {len(missing)} weights of the model, first {missing[0]!r}.")
    return model


def adapt_to_device(accelerator: Accelerator, model: HFCLIPModel, config: Config) -> HFCLIPModel:
    """The same model, changed to compute well on this device and in this number of processes."""
    device, several = accelerator.device.type, accelerator.num_processes > 1
    if device == "cpu" and config.run.precision == "bf16":
        # torch's fused attention has a slow bfloat16 backward on CPUs: written out, a step takes half the time.
        for tower in (model.vision_model, model.text_model):
            if tower._supports_sdpa:
                tower.set_attn_implementation("eager")
    if several and any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        if device == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        else:
            accelerator.print(
                "BatchNorm uses the statistics of each process's own pairs: torch has nothing else here."
            )
    if config.model.compile:
        model.compile()
    return model


def describe(model: HFCLIPModel) -> str:
    """One line for the start of the run."""
    total, trained = (
        sum(p.numel() for p in model.parameters() if p.requires_grad or everything) for everything in (True, False)
    )
    config = model.config
    towers = (
        f"{config.vision_config.model_type} at {config.vision_config.image_size} px + {config.text_config.model_type}"
    )
    return f"{towers}: {total / 1e6:.1f}M parameters, {trained / 1e6:.1f}M trained"
