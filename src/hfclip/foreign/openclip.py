"""OpenCLIP's checkpoints: folders with open_clip_config.json, and training checkpoints.

names of one model's tensors -> settings, from JSON or shapes -> architecture -> image processor, tokenizer
"""

import importlib.util
import re
import string
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Regex, normalizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ..configuration_hfclip import HFCLIPConfig
from ..errors import UsageError, as_usage_error
from ..foreign_hfclip import OPENCLIP_CONFIG
from ..hub.check import read_json
from ..image_processing_hfclip import HFCLIPImageProcessor
from ..tokenization_hfclip import HFCLIPTokenizer
from .checkpoints import Checkpoint, View
from .key_maps import CONSTANTS, hfclip_items, openclip_config, require_kinds
from .openclip_shapes import ASK, model_name, name_of_run, settings_from_shapes
from .plan import Choices, Plan
from .processors import TOKENIZER_FILES, has_any, openai_tokenizer
from .towers import SIGLIP_PREPROCESS, foreign_plan, has_foreign_tower


def plan_openclip(checkpoint: Checkpoint, choices: Choices) -> Plan:
    """Finds the model's weights among a checkpoint's, and what they make."""
    names, left = weight_names(checkpoint, choices.weights)
    weights = View(checkpoint, names)
    settings, told = find_settings(checkpoint, weights, choices)
    model_cfg = settings["model_cfg"]
    if has_foreign_tower(model_cfg):
        config, items = foreign_plan(weights.on_meta(), model_cfg, choices.text_model)
    else:
        config, items = openclip_config(weights.on_meta(), model_cfg), hfclip_items
    with as_usage_error("preprocess_cfg"):
        image_processor = build_image_processor(config, settings.get("preprocess_cfg") or {})
    tokenizer = partial(build_tokenizer, config, model_cfg["text_cfg"], choices)
    return Plan(checkpoint, weights, items, config, image_processor, tokenizer, left + told, model_cfg)


def weight_names(checkpoint: Checkpoint, chosen: str | None) -> tuple[dict[str, str], list[str]]:
    """OpenCLIP's names of one model's tensors -> the checkpoint's; notes for the user."""
    notes = []
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
        notes.append(f"Taking the weights `state_dict`; {', '.join(others)} can be chosen with --weights.")
    if chosen is not None and chosen not in by_name or chosen is None and len(by_name) > 1:
        raise UsageError(f"--weights: found {chosen}, expected one of {sorted(by_name)}.")
    prefix = by_name[chosen] if chosen else prefixes[0]
    names = {name.removeprefix(prefix): name for name in checkpoint if name.startswith(prefix)}
    if left := len(checkpoint) - len(names):
        notes.append(f"{left} tensors beside the weights (such as optimizer states) are left aside.")
    # CustomTextCLIP keeps the text tower below `text.`
    names = {new.removeprefix("text."): old for new, old in names.items()}
    if decoder := [name for name in names if name.startswith("text_decoder.")]:
        notes.append(f"{len(decoder)} tensors of CoCa's decoder, which writes captions, are left aside.")
    names = {new: old for new, old in names.items() if new not in decoder}
    names = {new: old for new, old in names.items() if new not in CONSTANTS and not new.endswith(".position_ids")}
    return names, notes


def find_settings(checkpoint: Checkpoint, weights: View, choices: Choices) -> tuple[dict[str, Any], list[str]]:
    """`model_cfg` and `preprocess_cfg` of a checkpoint, and notes on what was assumed.

    They come from a JSON file where there is one, else from shapes and the architecture's name, which the user or the
    run says.
    """
    name = choices.architecture and model_name(choices.architecture)
    path = Path(choices.architecture) if name else choices.folder and choices.folder / OPENCLIP_CONFIG
    if name and not path.is_file() and (spec := importlib.util.find_spec("open_clip")):
        path = Path(spec.origin).parent / "model_configs" / f"{name}.json"
    if path and path.is_file():
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


def build_image_processor(config: HFCLIPConfig, preprocess: dict[str, Any]) -> HFCLIPImageProcessor:
    """OpenCLIP's evaluation transform."""
    if not preprocess and config.vision_config.model_type == "siglip_vision_model":
        preprocess = SIGLIP_PREPROCESS  # OpenCLIP has it beside the name of the weights, not in the architecture
    image_size = config.image_size
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


def build_tokenizer(config: HFCLIPConfig, text_cfg: dict[str, Any], choices: Choices) -> tuple[Any, list[str]]:
    """The checkpoint's tokenizer, None where none is known; notes for the user."""
    name = choices.tokenizer or text_cfg.get("hf_tokenizer_name")
    folder = choices.folder
    has_tokenizer = folder is not None and has_any(folder, TOKENIZER_FILES)
    if not name and not has_tokenizer:
        return openai_tokenizer(config, choices.merges)
    try:
        if choices.tokenizer or not has_tokenizer:
            tokenizer = AutoTokenizer.from_pretrained(hub_name(name, choices.tokenizer), trust_remote_code=False)
        elif name:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        else:
            tokenizer = HFCLIPTokenizer.from_pretrained(folder)
    except Exception as error:  # tokenizers' own errors have no other class
        if choices.tokenizer:
            raise UsageError(f"--tokenizer: found {choices.tokenizer!r}: {error}") from error
        raise UsageError(
            f"No tokenizer: {name or folder} is not available ({error}), and without it the model cannot be used. Pass "
            "--tokenizer FOLDER."
        ) from error
    if len(tokenizer) > config.text_config.vocab_size:
        raise UsageError(
            f"The tokenizer has {len(tokenizer)} tokens, the model's vocabulary {config.text_config.vocab_size}. Pass the "
            "one that belongs to it with --tokenizer."
        )
    how = {**(text_cfg.get("tokenizer_kwargs") or {}), "tokenizer_mode": text_cfg.get("tokenizer_mode")}
    if not isinstance(tokenizer, HFCLIPTokenizer):
        tokenizer = cleaning(tokenizer, how)
    fit_tokenizer(tokenizer, config, text_cfg)
    if left := {key: value for key, value in how.items() if value and key != "clean"}:
        return tokenizer, [f"OpenCLIP changes texts before or after this tokenizer: {left}. Do the same."]
    return tokenizer, []


def cleaning(tokenizer: Any, how: dict[str, Any]) -> Any:
    """A tokenizer of transformers that treats texts as OpenCLIP does with it; takes out of `how` what it can express.

    OpenCLIP also repairs encodings (ftfy) and HTML entities, for which a tokenizer's file has no words. The class is the
    general one, which keeps in its file what is changed here.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # SigLIP's of sentencepiece, which cleans by itself
        return tokenizer
    steps = [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    if how.get("clean") == "canonicalize":
        punctuation = normalizers.Replace(Regex(f"[{re.escape(string.punctuation)}]"), "")
        steps = [normalizers.Replace("_", " "), punctuation, normalizers.Lowercase(), *steps]
    elif how.get("clean") == "lower":
        steps = [normalizers.Lowercase(), *steps]
    backend.normalizer = normalizers.Sequence([*steps, *filter(None, [backend.normalizer])])
    if how.get("strip_sep_token") and tokenizer.pad_token_id == 0:  # zeros in its place
        ends = (tokenizer.cls_token, tokenizer.pad_token)
        backend.post_processor = processors.TemplateProcessing(
            single="{} $A {}".format(*ends), special_tokens=[(token, backend.token_to_id(token)) for token in ends]
        )
        how.pop("strip_sep_token")
    kept = {name: getattr(tokenizer, name) for name in ("padding_side", "model_max_length")}
    kept |= {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=names, **kept)


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
