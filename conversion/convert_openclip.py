"""OpenCLIP's checkpoints -> model folders.

    hfclip convert CLIP-ViT-B-32-laion2B-s34B-b79K clip-b32-laion    # a folder from the Hub
    hfclip convert epoch_32.pt my-clip --merges bpe_simple_vocab_16e6.txt.gz
    hfclip convert epoch_32.pt my-clip --model ViT-B-32-quickgelu --merges ...

The source is a folder with open_clip_config.json and weights, or a training checkpoint (.pt, .bin, .safetensors). The
architecture of a ViT or ResNet of OpenCLIP follows from shapes (`openclip_shapes`); what no shape tells, such as
QuickGELU, from the name of the run or of `--model`. Others need the JSON of theirs: a file, or the name of one that an
installed open_clip knows. Prefixes such as `module.` are removed and optimizer states left aside; of several sets of
weights (EMA) `--weights` chooses one.

Converted are OpenCLIP's own ViT, ResNet and text towers with all their activations, masks, poolings, context lengths
and vocabularies, trained with the contrastive or the sigmoid loss; SigLIP, image towers of timm, and BERT-like text
towers of transformers (`foreign/towers.py`). Whatever has no counterpart is refused with its reason: CoCa, LayerScale,
other attention blocks, text towers with class tokens, projections of two layers. See docs/conversion.md.
"""

import importlib.util
from pathlib import Path
from typing import Any

from hfclip_errors import start_program


if __name__ == "__main__":
    start_program(__file__, __spec__, "convert")

import torch
from transformers import AutoTokenizer

from hfclip import HFCLIPConfig, HFCLIPImageProcessor, HFCLIPModel, HFCLIPProcessor, HFCLIPTokenizer
from hfclip.errors import UsageError, as_usage_error
from hfclip.foreign.checkpoints import Checkpoint, View
from hfclip.foreign.key_maps import CONSTANTS, hfclip_items, openclip_config, require_kinds
from hfclip.foreign.openclip_shapes import ASK, model_name, name_of_run, settings_from_shapes
from hfclip.foreign.processors import TOKENIZER_FILES, has_any, join, openai_tokenizer
from hfclip.foreign.towers import SIGLIP_PREPROCESS, foreign_plan, is_foreign
from hfclip.foreign.whose import OPENCLIP_CONFIG
from hfclip.hub.check import read_json

from .convert import Conversion, build_parser, convert, open_source, parse_options, run, say
from .reference_towers import openclip_features


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument(
        "--model",
        metavar="NAME",
        help=f"the architecture, where the source is no folder with {OPENCLIP_CONFIG}: OpenCLIP's name, or its JSON file "
        "(default: told by shapes)",
    )
    parser.add_argument("--weights", metavar="NAME", help="which weights of a training checkpoint, e.g. state_dict")
    parser.add_argument(
        "--merges", metavar="FILE", help="OpenAI's bpe_simple_vocab_16e6.txt.gz (default: from the Hub)"
    )
    parser.add_argument("--tokenizer", metavar="NAME", help="tokenizer of another vocabulary: a folder or a Hub name")
    parser.add_argument(
        "--text-model", metavar="NAME", help="config of a text tower of transformers: a folder or a Hub name"
    )
    options = parse_options(parser)
    convert(plan(open_source("openclip", options.source), options), options.out, options)


def plan(checkpoint: Checkpoint, options) -> Conversion:
    """Finds the model's weights among a checkpoint's and plans their conversion."""
    weights = View(checkpoint, weight_names(checkpoint, options.weights))
    settings, told = find_settings(checkpoint, weights, options)
    config, items, features, assumed = architecture(weights.on_meta(), settings["model_cfg"], options)
    processor, notes = build_processor(config, settings, options)
    notes = told + assumed + notes
    return Conversion(checkpoint, weights, items, HFCLIPModel, config, features, processor, notes)


def find_settings(checkpoint: Checkpoint, weights: View, options) -> tuple[dict[str, Any], list[str]]:
    """`model_cfg` and `preprocess_cfg` of a checkpoint, and notes on what was assumed.

    They come from a JSON file where there is one, else from shapes and from what `--model`, or the run, is named.
    """
    path = options.source / OPENCLIP_CONFIG if options.model is None else Path(options.model)
    name = options.model and model_name(options.model)
    if name and not path.is_file() and (spec := importlib.util.find_spec("open_clip")):
        path = Path(spec.origin).parent / "model_configs" / f"{name}.json"
    if path.is_file():
        return read_settings(path), []
    model_cfg, note = settings_from_shapes(weights.on_meta(), name or name_of_run(checkpoint.scalars))
    return {"model_cfg": model_cfg}, [note]


def read_settings(path: Path) -> dict[str, Any]:
    """`model_cfg` and `preprocess_cfg` in a file, each setting of the kind that OpenCLIP gives it."""
    settings = read_json(path)
    settings = settings if "model_cfg" in settings else {"model_cfg": settings}
    model_cfg = settings["model_cfg"]
    lacking = [key for key in ("vision_cfg", "text_cfg") if not (isinstance(model_cfg, dict) and isinstance(model_cfg.get(key), dict))]  # fmt: skip
    if lacking:
        raise UsageError(f"{path} describes no dual encoder: {', '.join(lacking)} missing. {ASK}")
    if not isinstance(settings.get("preprocess_cfg") or {}, dict):
        raise UsageError(f"{path}: preprocess_cfg: found {settings['preprocess_cfg']!r}, expected an object.")
    require_kinds(path, model_cfg)
    return settings


def architecture(weights: dict[str, torch.Tensor], model_cfg: dict[str, Any], options) -> tuple:
    """Config, items and features of `Conversion`, and notes; `weights` are on the meta device."""
    if is_foreign(model_cfg):
        config, items = foreign_plan(weights, model_cfg, options.text_model)
    else:
        config, items = openclip_config(weights, model_cfg), hfclip_items
    return config, items, *openclip_features(model_cfg, config.text_config)


def weight_names(checkpoint: Checkpoint, chosen: str | None) -> dict[str, str]:
    """OpenCLIP's names of one model's tensors -> the checkpoint's."""
    prefixes = [name.removesuffix("logit_scale") for name in checkpoint if name.endswith("logit_scale")]
    prefixes = [prefix for prefix in prefixes if any(name.startswith(f"{prefix}visual.") for name in checkpoint)]
    if not prefixes:
        raise UsageError(
            f"{checkpoint.path}: found no CLIP model among {len(checkpoint)} tensors such as {list(checkpoint)[:3]}, "
            "expected `logit_scale` and `visual. ...`."
        )
    by_name = {prefix.removesuffix("module.").rstrip(".") or "weights": prefix for prefix in prefixes}
    if chosen is None and len(by_name) > 1 and "state_dict" in by_name:
        chosen = "state_dict"
        others = sorted(by_name.keys() - {chosen})
        say(f"Taking the weights `state_dict`; {', '.join(others)} can be chosen with --weights.")
    if chosen is not None and chosen not in by_name or chosen is None and len(by_name) > 1:
        raise UsageError(f"--weights: found {chosen}, expected one of {sorted(by_name)}.")
    prefix = by_name[chosen] if chosen else prefixes[0]
    names = {name.removeprefix(prefix): name for name in checkpoint if name.startswith(prefix)}
    if left := len(checkpoint) - len(names):
        say(f"{left} tensors beside the weights (such as optimizer states) are left aside.")
    # CustomTextCLIP keeps the text tower below `text.`
    names = {new.removeprefix("text."): old for new, old in names.items()}
    names = {new: old for new, old in names.items() if not new.startswith("text_decoder.")}
    return {new: old for new, old in names.items() if new not in CONSTANTS and not new.endswith(".position_ids")}


def build_processor(config: HFCLIPConfig, settings: dict[str, Any], options) -> tuple[Any, list[str]]:
    """Image processor by `preprocess_cfg`, and the checkpoint's tokenizer; notes for the user."""
    text_cfg = settings["model_cfg"]["text_cfg"]
    preprocess = settings.get("preprocess_cfg") or {}
    if not preprocess and config.vision_config.model_type == "siglip_vision_model":
        preprocess = SIGLIP_PREPROCESS  # OpenCLIP has it beside the name of the weights, not in the architecture
    with as_usage_error("preprocess_cfg"):
        image_processor = build_image_processor(config.image_size, preprocess)
    name = options.tokenizer or text_cfg.get("hf_tokenizer_name")
    folder = options.source if options.source.is_dir() else None
    has_tokenizer = folder is not None and has_any(folder, TOKENIZER_FILES)
    if not name and not has_tokenizer:
        tokenizer, notes = openai_tokenizer(config, options.merges)
        return join(image_processor, tokenizer), notes
    try:
        if options.tokenizer or not has_tokenizer:
            tokenizer = AutoTokenizer.from_pretrained(hub_name(name, options.tokenizer), trust_remote_code=False)
        elif name:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        else:
            tokenizer = HFCLIPTokenizer.from_pretrained(folder)
    except Exception as error:  # tokenizers' own errors have no other class
        if options.tokenizer:
            raise UsageError(f"--tokenizer: {error}") from error
        raise UsageError(
            f"No tokenizer: {name or folder} is not available ({error}), and without it the model cannot be used. Pass "
            "--tokenizer FOLDER."
        ) from error
    if len(tokenizer) > config.text_config.vocab_size:
        raise UsageError(
            f"The tokenizer has {len(tokenizer)} tokens, the model's vocabulary {config.text_config.vocab_size}. Pass the "
            "one that belongs to it with --tokenizer."
        )
    fit_tokenizer(tokenizer, config, text_cfg)
    notes = []
    if text_cfg.get("tokenizer_kwargs"):
        notes.append(
            f"OpenCLIP changes texts before or after this tokenizer: {text_cfg['tokenizer_kwargs']}. Do the same."
        )
    return HFCLIPProcessor(image_processor, tokenizer), notes


def hub_name(name: str, asked_for: str | None) -> str:
    """A name that the user gave, or one in the checkpoint's settings, which may not point at files of this machine."""
    if asked_for is None and Path(name).expanduser().exists():
        raise UsageError("it is a path in the checkpoint's settings, not a name on the Hub")
    return name


def fit_tokenizer(tokenizer, config: HFCLIPConfig, text_cfg: dict[str, Any]) -> None:
    """Texts are cut at the context length; a tower that reads its padding is told the tokenizer's."""
    is_own = not text_cfg.get("hf_model_name")
    tokenizer.model_max_length = config.text_config.max_position_embeddings if is_own else text_cfg.get("context_length", 77)  # fmt: skip
    if not isinstance(tokenizer, HFCLIPTokenizer):
        tokenizer.init_kwargs["truncation"] = True
    if config.text_config.model_type == "siglip_text_model":
        config.text_config.pad_token_id = tokenizer.pad_token_id


def build_image_processor(image_size: int, preprocess: dict[str, Any]) -> HFCLIPImageProcessor:
    """OpenCLIP's evaluation transform."""
    mode, interpolation = preprocess.get("resize_mode", "shortest"), preprocess.get("interpolation", "bicubic")
    resample = {"bicubic": 3, "bilinear": 2, "random": 3}.get(interpolation)
    if mode not in ("shortest", "squash") or resample is None:
        raise UsageError(
            f"preprocess_cfg: found resize_mode {mode!r} and interpolation {interpolation!r}, expected 'shortest' or "
            "'squash', and 'bicubic' or 'bilinear'."
        )
    size = {"height": image_size, "width": image_size} if mode == "squash" else image_size
    statistics = {f"image_{name}": list(preprocess[name]) for name in ("mean", "std") if name in preprocess}
    return HFCLIPImageProcessor(size=size, crop_size=image_size, resample=resample, **statistics)


if __name__ == "__main__":
    run(main)
