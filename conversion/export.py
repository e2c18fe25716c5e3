"""Model folders -> the forms that other libraries read.

    python conversion/export.py clip-rn50 RN50.pt --to openai             # a state dict in OpenAI's names
    python conversion/export.py clip-b32 clip-b32-openclip --to openclip  # open_clip.create_model("local-dir:...")
    python conversion/export.py clip-b32 clip-b32-hf --to transformers    # transformers' CLIPModel and its processor
    python conversion/export.py clip-b32 clip-b32-onnx --to onnx          # both towers for onnxruntime

What the other library cannot express is refused, field by field. Each export is proven: the written file is computed
anew, by plain PyTorch or by onnxruntime, and compared with the model. ONNX towers take any batch and, for texts, any
length; their `image_embeds` and `text_embeds` are not normalised.
"""

import argparse
import importlib.util
import json
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPTokenizer

from conversion.checkpoints import View, open_checkpoint
from conversion.convert import as_path, open_model, open_processor, run, save_processor, say
from conversion.convert_openai import features as openai_features
from conversion.convert_openclip import CONFIG
from conversion.convert_openclip import features as openclip_features
from conversion.convert_transformers import defaults_of
from conversion.convert_transformers import features as transformers_features
from conversion.errors import UsageError
from conversion.folder import WrittenWeights, new_folder, partial_folder, require_free, write_weights
from conversion.key_maps import openai_config, openai_items, openclip_config
from conversion.proof import compare, features_of, fixed_inputs, streamed
from hfclip import HFCLIPConfig, HFCLIPImageProcessor, HFCLIPModel
from hfclip.configuration_hfclip import TRANSFORMERS_MODEL_TYPES


ONNX_TOLERANCE = 1e-4  # relative, of float32 against float32
# Fields that have no bearing on what a trained model computes.
OF_TRAINING = {"initializer_factor", "attention_dropout", "patch_dropout", "zero_init_residual", "bos_token_id"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=as_path, help="a folder of an HFCLIPModel (or of transformers' CLIPModel)")
    parser.add_argument("out", type=as_path, help="the folder to write; for `openai` the file, .pt or .safetensors")
    parser.add_argument("--to", required=True, choices=sorted(EXPORTS), help="for whom")
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    options = parser.parse_args()
    require_free(options.out, options.source, options.overwrite, is_file=options.to == "openai")
    EXPORTS[options.to](options, *open_model(options.source))


def to_openai(options: argparse.Namespace, config: HFCLIPConfig, weights: View) -> None:
    """A state dict in OpenAI's names, as a file."""
    if options.out.suffix not in (".pt", ".safetensors"):
        raise UsageError(f"{options.out}: found the suffix {options.out.suffix!r}, expected .pt or .safetensors.")
    layout = dict(openai_items(weights.on_meta()))
    require_same(config, openai_config(layout), "openai/CLIP")
    with partial_folder(options.out) as folder:
        require_free(options.out, options.source, options.overwrite, is_file=True)
        (written,) = write_weights(folder, layout, openai_items(weights), max_shard_bytes=math.inf)
        if options.out.suffix == ".pt":
            torch.save(dict(WrittenWeights([written])), folder / "weights.pt")
            written = folder / "weights.pt"
        prove(config, weights, openai_features(open_checkpoint(written), *fixed_inputs(config)))
        written.replace(options.out)
    say(f"Written: {options.out}")


def to_openclip(options: argparse.Namespace, config: HFCLIPConfig, weights: View) -> None:
    """A folder as OpenCLIP keeps them on the Hub."""
    layout, model_cfg = dict(openai_items(weights.on_meta())), openclip_settings(config)
    require_same(config, openclip_config(layout, model_cfg), "OpenCLIP")
    with new_folder(options.out, options.source, options.overwrite) as folder:
        (written,) = write_weights(folder, layout, openai_items(weights), max_shard_bytes=math.inf)
        prove(config, weights, openclip_features(model_cfg, WrittenWeights([written]), *fixed_inputs(config)))
        written.rename(folder / "open_clip_model.safetensors")
        image_processor, tokenizer = open_processor(options.source)
        settings = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_settings(image_processor)}
        (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
        if tokenizer is not None:
            as_clip_tokenizer(tokenizer).save_pretrained(folder)
    say(f"Written: {options.out}")


def to_transformers(options: argparse.Namespace, config: HFCLIPConfig, weights: View) -> None:
    """A folder of transformers' CLIPModel."""
    theirs = transformers_config(config)
    require_same(
        config, HFCLIPConfig.from_dict({**theirs.to_dict(), "model_type": "hfclip"}), "transformers' CLIPModel"
    )
    if config.logit_bias_init_value is not None:
        raise UsageError("transformers' CLIPModel has no logit_bias, which this model was trained with.")
    towers = {key: defaults_of(key) | getattr(theirs, key).to_dict() for key in ("text_config", "vision_config")}
    with new_folder(options.out, options.source, options.overwrite) as folder:
        written = write_weights(folder, weights.on_meta(), weights.items())
        prove(config, weights, transformers_features(towers, WrittenWeights(written), *fixed_inputs(config)))
        theirs.save_pretrained(folder)
        image_processor, tokenizer = open_processor(options.source)
        if tokenizer is not None:
            as_clip_tokenizer(tokenizer).save_pretrained(folder)
        if image_processor is not None:
            CLIPImageProcessorPil(**image_settings(image_processor)).save_pretrained(folder)
    say(
        "NOTE: transformers' tokenizer and image processor differ from OpenAI's in some ids and pixels; hfclip's do not."
    )
    say(f"Written: {options.out}")


def to_onnx(options: argparse.Namespace, config: HFCLIPConfig, weights: View) -> None:
    """A folder with both towers as ONNX, tokenizer and image processor beside them."""
    if importlib.util.find_spec("onnxruntime") is None:
        raise UsageError("ONNX needs packages that are not here. pip install 'hfclip[onnx]'.")
    model = HFCLIPModel.from_pretrained(options.source, dtype=torch.float32).eval()
    with new_folder(options.out, options.source, options.overwrite) as folder:
        (folder / "onnx").mkdir()
        for tower, inputs in zip((ImageTower(model).eval(), TextTower(model).eval()), fixed_inputs(config)):
            path = folder / "onnx" / f"{tower.file}.onnx"
            export_tower(tower, torch.cat([inputs, inputs]), path)
            prove_tower(tower, inputs, path)
        # Scores need the trained scale and bias, which belong to neither tower.
        config.logit_scale_init_value = model.logit_scale.item()
        config.logit_bias_init_value = None if model.logit_bias is None else model.logit_bias.item()
        # The folder has no weights that code could open; save_pretrained would bring it and name it in auto_map.
        for part in (config, config.text_config, config.vision_config):
            vars(part).pop("auto_map", None)
        config.to_json_file(folder / "config.json")
        save_processor(*open_processor(options.source), folder)
    say(f"Written: {options.out}")


EXPORTS = {"openai": to_openai, "openclip": to_openclip, "transformers": to_transformers, "onnx": to_onnx}


# ---------------------------------------------------------------------------------------------------------------------
# What the other library can express
# ---------------------------------------------------------------------------------------------------------------------


def require_same(config: HFCLIPConfig, reread: HFCLIPConfig, library: str) -> None:
    """Raises UsageError, field by field, unless what `library` reads from the export is the architecture of `config`."""
    differences = []
    for part in ("vision_config", "text_config"):
        ours, theirs = getattr(config, part), getattr(reread, part)
        fields = {"model_type", *getattr(type(ours), "__dataclass_fields__", {})} - OF_TRAINING
        if not getattr(ours, "reads_padding", False):
            fields -= {"pad_token_id"}
        fields = {name for name in fields if name in ours.to_dict() and not name.startswith("_")} & _architectural(
            ours
        )
        for name in sorted(fields):
            found, expected = getattr(ours, name), getattr(theirs, name, None)
            if found != expected:
                differences.append(f"{part}.{name} is {found}, and {library} would have {expected}")
    if differences:
        raise UsageError(f"Cannot export: {'; '.join(differences)}.")


def _architectural(config: Any) -> set[str]:
    """Fields of the class itself, without those of every transformers config."""
    inherited = set(getattr(type(config).__mro__[1], "__dataclass_fields__", {}))
    return ({*type(config).__dataclass_fields__} - inherited) | {"model_type"}


def openclip_settings(config: HFCLIPConfig) -> dict[str, Any]:
    """OpenCLIP's `model_cfg` for an architecture of ours."""
    vision, text = config.vision_config, config.text_config
    if vision.model_type == "hfclip_resnet":
        vision_cfg = {"layers": list(vision.depths), "width": vision.stem_width, "patch_size": None}
    elif vision.model_type == "hfclip_vit":
        pooling = {"cls": {}, "mean": {"pool_type": "avg"}}
        average_first = {"pool_type": "avg", "final_ln_after_pool": True}
        vision_cfg = {
            "layers": vision.num_hidden_layers,
            "width": vision.hidden_size,
            "mlp_ratio": mlp_ratio(vision),
            "patch_size": vision.patch_size,
            **({} if vision.pre_layer_norm else {"no_ln_pre": True}),
            **pooling.get(vision.pooling, average_first),
            **_layer_settings(vision),
        }
    if vision.model_type not in ("hfclip_resnet", "hfclip_vit") or text.model_type != "hfclip_text":
        raise UsageError(
            f"OpenCLIP has no towers {vision.model_type} and {text.model_type} with these weights' names."
        )
    vision_cfg |= {"image_size": vision.image_size, "head_width": vision.hidden_size // vision.num_attention_heads}
    if text.pooling == "eos" and text.eos_token_id == text.vocab_size - 1:
        pool = {}  # OpenCLIP's default, the highest id
    else:
        pool = {"pool_type": text.pooling} | ({"eos_id": text.eos_token_id} if text.pooling == "eos" else {})
    text_cfg = {
        "context_length": text.max_position_embeddings,
        "vocab_size": text.vocab_size,
        "width": text.hidden_size,
        "heads": text.num_attention_heads,
        "layers": text.num_hidden_layers,
        "mlp_ratio": mlp_ratio(text),
        "pad_id": text.pad_token_id or 0,
        **({} if text.causal else {"no_causal_mask": True}),
        **pool,
        **_layer_settings(text),
    }
    return {
        "embed_dim": config.projection_dim,
        "vision_cfg": vision_cfg,
        "text_cfg": text_cfg,
        **({"quick_gelu": True} if text.hidden_act == "quick_gelu" else {}),
        **({} if config.logit_bias_init_value is None else {"init_logit_bias": config.logit_bias_init_value}),
    }


def mlp_ratio(tower: Any) -> float:
    """The smallest ratio from which OpenCLIP, which cuts off decimals, computes the tower's intermediate size."""
    ratio = tower.intermediate_size / tower.hidden_size
    return ratio if int(tower.hidden_size * ratio) == tower.intermediate_size else math.nextafter(ratio, math.inf)


def _layer_settings(tower: Any) -> dict[str, Any]:
    settings = {} if tower.layer_norm_eps == 1e-5 else {"norm_kwargs": {"eps": tower.layer_norm_eps}}
    return settings | ({"act_kwargs": {"approximate": "tanh"}} if tower.hidden_act == "gelu_pytorch_tanh" else {})


def transformers_config(config: HFCLIPConfig) -> CLIPConfig:
    """transformers' config for an architecture of ours."""
    types = {ours: theirs for theirs, ours in TRANSFORMERS_MODEL_TYPES.items()}
    towers = {}
    for key in ("text_config", "vision_config"):
        fields = getattr(config, key).to_dict()
        if fields["model_type"] not in types:
            raise UsageError(f"transformers' CLIPModel has no tower of type {fields['model_type']}.")
        if fields.get("eos_token_id") == 2:
            raise UsageError("text_config.eos_token_id is 2, for which transformers pools at the highest id instead.")
        ours_alone = {"causal", "pooling", "pre_layer_norm", "patch_dropout", "auto_map", "architectures"}
        towers[key] = {name: value for name, value in fields.items() if name not in ours_alone}
        towers[key]["model_type"] = types[fields["model_type"]]
    return CLIPConfig(
        **towers,
        projection_dim=config.projection_dim,
        logit_scale_init_value=config.logit_scale_init_value,
        architectures=["CLIPModel"],
        dtype=config.dtype,
    )


def as_clip_tokenizer(tokenizer: Any) -> CLIPTokenizer:
    """transformers' own tokenizer with the same vocabulary and merges."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in model["merges"]]
    return CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=tokenizer.model_max_length)


def image_settings(processor: Any) -> dict[str, Any]:
    """What other libraries' image processors are told.

    Raises:
        UsageError: a step that is left out, or another scale of the pixels.
    """
    steps = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")
    unusual = [f"{step}=False" for step in steps if getattr(processor, step, True) is False]
    if abs(processor.rescale_factor - 1 / 255) > 1e-9:
        unusual.append(f"rescale_factor={processor.rescale_factor}")
    if unusual:
        raise UsageError(f"Cannot export: the image processor has {', '.join(unusual)}.")
    names = ("size", "crop_size", "resample", "image_mean", "image_std")
    return {name: getattr(processor, name) for name in names}


def preprocess_settings(image_processor: HFCLIPImageProcessor | None) -> dict[str, Any]:
    """OpenCLIP's `preprocess_cfg`."""
    if image_processor is None:
        return {}
    settings = image_settings(image_processor)
    interpolation = {3: "bicubic", 2: "bilinear"}.get(int(settings["resample"]))
    sizes = {*dict(settings["size"]).values(), *dict(settings["crop_size"]).values()} - {None}
    if interpolation is None or len(sizes) > 1:
        raise UsageError(
            f"Cannot export: the image processor resizes to {settings['size']} by resampling {settings['resample']} and "
            f"crops {settings['crop_size']}; OpenCLIP knows one size, bicubic (3) and bilinear (2)."
        )
    return {
        "mean": list(settings["image_mean"]),
        "std": list(settings["image_std"]),
        "interpolation": interpolation,
        "resize_mode": "shortest" if "shortest_edge" in settings["size"] else "squash",
    }


# ---------------------------------------------------------------------------------------------------------------------
# Proof
# ---------------------------------------------------------------------------------------------------------------------


def prove(config: HFCLIPConfig, weights: Mapping[str, torch.Tensor], found: dict[str, torch.Tensor]) -> None:
    """Raises UsageError unless the export computes what the model does."""
    model = streamed(HFCLIPModel, config, weights)
    compare(found, features_of(model, *fixed_inputs(config)))


class ImageTower(torch.nn.Module):
    """pixel_values (batch, channels, side, side) -> image_embeds (batch, projection_dim), not normalised"""

    file, input_name, output_name = "vision_model", "pixel_values", "image_embeds"

    def __init__(self, model: HFCLIPModel):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model.encode_image(pixel_values, normalize=False)


class TextTower(torch.nn.Module):
    """input_ids (batch, length) -> text_embeds (batch, projection_dim), not normalised"""

    file, input_name, output_name = "text_model", "input_ids", "text_embeds"

    def __init__(self, model: HFCLIPModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.encode_text(input_ids, normalize=False)


def export_tower(tower: ImageTower | TextTower, inputs: torch.Tensor, path: Path) -> None:
    dynamic = {0: torch.export.Dim("batch", min=1)}
    if isinstance(tower, TextTower) and not getattr(tower.model.config.text_config, "reads_padding", False):
        dynamic[1] = torch.export.Dim("length", min=2, max=inputs.shape[1])
        inputs = inputs[
            :-3, : inputs.shape[1] // 2 + 1
        ]  # an example of the largest size would be taken for a constant
    try:
        program = torch.onnx.export(
            tower,
            (inputs,),
            dynamo=True,
            dynamic_shapes={tower.input_name: dynamic},
            input_names=[tower.input_name],
            output_names=[tower.output_name],
            verbose=False,
        )
    except ImportError as error:
        raise UsageError(f"ONNX needs packages that are not here ({error}). pip install 'hfclip[onnx]'.") from error
    for graph in (program.model.graph, *program.model.functions.values()):
        for node in graph:
            node.metadata_props.clear()  # stack traces, with paths of this machine
    program.save(path)


@torch.no_grad()
def prove_tower(tower: ImageTower | TextTower, inputs: torch.Tensor, path: Path) -> None:
    """Runs the file on batches and lengths other than the one it was recorded with."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for batch in variants(tower, inputs):
        (found,) = session.run(None, {tower.input_name: batch.numpy()})
        shape = "x".join(map(str, batch.shape))
        compare(
            {f"{tower.file} {shape}": torch.from_numpy(found)}, {f"{tower.file} {shape}": tower(batch)}, ONNX_TOLERANCE
        )


def variants(tower: ImageTower | TextTower, inputs: torch.Tensor) -> Iterable[torch.Tensor]:
    if isinstance(tower, TextTower):
        # The first texts end early.
        yield from (
            inputs,
            inputs[:1, : max(3, inputs.shape[1] // 4)]
            if not getattr(tower.model.config.text_config, "reads_padding", False)
            else inputs[:1],
        )
    else:
        yield from (inputs, torch.cat([inputs, -inputs, inputs / 2]))


if __name__ == "__main__":
    run(main)
