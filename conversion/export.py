"""Model folders -> the forms that other libraries read.

    hfclip export clip-rn50 RN50.pt --to openai             # a state dict in OpenAI's names
    hfclip export clip-b32 clip-b32-openclip --to openclip  # open_clip.create_model("local-dir:...")
    hfclip export clip-b32 clip-b32-hf --to transformers    # transformers' CLIPModel (SiglipModel ...)
    hfclip export clip-b32 clip-b32-onnx --to onnx          # both towers for onnxruntime

What the other library cannot express is refused, field by field. Each export is proven: the written file is computed
anew, by plain PyTorch or by onnxruntime, and compared with the model. ONNX towers take any batch and, for texts, any
length; their `image_embeds` and `text_embeds` are not normalised.
"""

import argparse
import importlib.util
import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hfclip_errors import start_program


if __name__ == "__main__":
    start_program(__file__, __spec__, "convert")

import torch
from transformers import CLIPConfig, CLIPImageProcessorPil, PreTrainedConfig

from hfclip import HFCLIPConfig, HFCLIPImageProcessor, HFCLIPModel, HFCLIPTokenizer
from hfclip.errors import UsageError
from hfclip.foreign.checkpoints import View, open_checkpoint
from hfclip.foreign.key_maps import UNCHANGED, openai_config, openai_items, openclip_config
from hfclip.foreign.openclip import weight_names
from hfclip.foreign.processors import as_clip_tokenizer, join, open_processor
from hfclip.foreign_hfclip import OPENCLIP_CONFIG
from hfclip.translation_hfclip import TRANSFORMERS_MODEL_TYPES

from .convert import add_paths, open_model, run, say
from .export_families import OURS_ALONE, family_of_towers, to_family
from .folder import new_folder, partial_folder, require_free
from .proof import compare, compute_features, fixed_inputs, streamed
from .reference_settings import (
    compute_source_features,
    openai_features,
    openclip_settings,
    transformers_features,
)
from .safetensors_files import write_weights


# Text towers of transformers whose ONNX graph torch gets wrong.
NOT_TRACED = {"align_text_model", "altclip_text_model", "chinese_clip_text_model", "flava_text_model"}
ONNX_TOLERANCE = 1e-4  # relative, of float32 against float32
# Fields that have no bearing on what a trained model computes.
OF_TRAINING = {"initializer_factor", "attention_dropout", "patch_dropout", "zero_init_residual", "bos_token_id"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_paths(parser, out="what to write: a file (.pt or .safetensors) for openai, a folder for the others")
    parser.add_argument("--to", required=True, choices=sorted(EXPORTS), help="for whom")
    options = parser.parse_args()
    is_file = options.to == "openai"
    if is_file != (options.out.suffix in (".pt", ".safetensors")):
        kind = "a file, whose name ends with .pt or .safetensors" if is_file else "the name of a folder"
        raise UsageError(f"--to {options.to}: found {str(options.out)!r}, expected {kind}.")
    require_free(options.out, options.source, options.overwrite, is_file)
    EXPORTS[options.to](options, *open_model(options.source))


def to_openai(options: argparse.Namespace, config: HFCLIPConfig, weights: View) -> None:
    """A state dict in OpenAI's names, as a file."""
    layout = dict(openai_items(weights.on_meta()))
    require_same(config, openai_config(layout), "openai/CLIP")
    with partial_folder(options.out) as folder:
        require_free(options.out, options.source, options.overwrite, is_file=True)
        (written,) = write_weights(folder, layout, openai_items(weights), max_shard_bytes=sys.maxsize)
        if options.out.suffix == ".pt":
            torch.save(dict(open_checkpoint(written)), folder / "weights.pt")
            written = folder / "weights.pt"
        prove(config, weights, openai_features(open_checkpoint(written), *fixed_inputs(config)))
        written.replace(options.out)
    say(f"Written: {options.out}")


def to_openclip(options: argparse.Namespace, config: HFCLIPConfig, weights: View) -> None:
    """A folder as OpenCLIP keeps them on the Hub."""
    model_cfg = openclip_model_cfg(config)
    require_same(config, openclip_config(dict(openai_items(weights.on_meta())), model_cfg), "OpenCLIP")
    items = custom_text_items if "custom_text" in model_cfg else openai_items
    with new_folder(options.out, options.source, options.overwrite) as folder:
        layout = dict(items(weights.on_meta()))
        (written,) = write_weights(folder, layout, items(weights), max_shard_bytes=sys.maxsize)
        checkpoint = open_checkpoint(written)
        tensors = View(checkpoint, weight_names(checkpoint, None)[0])
        prove(config, weights, compute_source_features(*openclip_settings(model_cfg), tensors, *fixed_inputs(config)))
        written.rename(folder / "open_clip_model.safetensors")
        image_processor, tokenizer = open_processor(options.source)
        if tokenizer is not None and not isinstance(tokenizer, HFCLIPTokenizer):
            model_cfg["text_cfg"]["hf_tokenizer_name"] = options.out.name  # OpenCLIP takes what lies beside it
        settings = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_settings(image_processor)}
        (folder / OPENCLIP_CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
        if tokenizer is not None:
            as_clip_tokenizer(tokenizer).save_pretrained(folder)
    say(f"Written: {options.out}")


def custom_text_items(weights: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """OpenCLIP's names and tensors of a model whose text tower is a module of its own."""
    for name, tensor in openai_items(weights):
        yield name if name.startswith(("visual.", *UNCHANGED)) else f"text.{name}", tensor


def to_transformers(options: argparse.Namespace, config: HFCLIPConfig, weights: View) -> None:
    """A folder of transformers' CLIPModel, or of another family whose towers these are."""
    if (name := family_of_towers(config)) is not None:
        return to_family(options, config, name)
    theirs = transformers_config(config)
    require_same(
        config, HFCLIPConfig.from_dict({**theirs.to_dict(), "model_type": "hfclip"}), "transformers' CLIPModel"
    )
    if config.logit_bias_init_value is not None:
        raise UsageError("transformers' CLIPModel has no logit_bias, which this model was trained with.")
    features = transformers_features(theirs.vision_config.to_dict(), theirs.text_config.to_dict())
    with new_folder(options.out, options.source, options.overwrite) as folder:
        write_weights(folder, weights.on_meta(), weights.items())
        prove(config, weights, features(open_checkpoint(folder), *fixed_inputs(config)))
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
    if config.is_naflex:
        raise UsageError(
            "Cannot export: NaFlex takes patches of images in their own shapes, an ONNX tower one of squares."
        )
    if config.text_config.model_type in NOT_TRACED:
        raise UsageError(
            f"Cannot export: {config.text_config.model_type} of transformers, exported by torch, takes one batch size or "
            "other positions. Use the model as it is."
        )
    model = HFCLIPModel.from_pretrained(options.source, dtype=torch.float32).eval()
    with new_folder(options.out, options.source, options.overwrite) as folder:
        (folder / "onnx").mkdir()
        for is_text, inputs in enumerate(fixed_inputs(config)):
            tower = Tower(model, bool(is_text)).eval()
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
        if (processor := join(*open_processor(options.source))) is not None:
            processor.save_pretrained(folder)
    say(f"Written: {options.out}")


EXPORTS = {"openai": to_openai, "openclip": to_openclip, "transformers": to_transformers, "onnx": to_onnx}


# What the other library can express


def require_same(config: HFCLIPConfig, reread: HFCLIPConfig, library: str) -> None:
    """Raises UsageError, field by field, unless what `library` reads from the export is the architecture of `config`."""
    differences = []
    for part in ("vision_config", "text_config"):
        ours, theirs = getattr(config, part), getattr(reread, part)
        fields = type(ours).__dataclass_fields__.keys() - PreTrainedConfig.__dataclass_fields__.keys() - OF_TRAINING
        fields -= set() if getattr(ours, "reads_padding", False) else {"pad_token_id"}
        for name in ("model_type", *sorted(fields)):
            found, expected = getattr(ours, name), getattr(theirs, name, None)
            if found != expected:
                differences.append(f"{part}.{name} is {found}, and {library} would have {expected}")
    if differences:
        raise UsageError(f"Cannot export: {'; '.join(differences)}.")


def openclip_model_cfg(config: HFCLIPConfig) -> dict[str, Any]:
    """OpenCLIP's `model_cfg` for an architecture of ours."""
    vision, text = config.vision_config, config.text_config
    if vision.model_type == "hfclip_resnet":
        vision_cfg = {"layers": list(vision.depths), "width": vision.stem_width, "patch_size": None}
    elif vision.model_type == "hfclip_vit":
        by_query = {"attentional_pool": True, "attn_pooler_queries": 1, "attn_pooler_heads": vision.pooling_heads}
        pooling = {"cls": {}, "mean": {"pool_type": "avg"}, "attention": by_query}
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
    elif text.pooling == "class":
        pool = {"embed_cls": True}
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
        **({"custom_text": True} if "embed_cls" in pool else {}),
        **({"quick_gelu": True} if text.hidden_act == "quick_gelu" else {}),
        **({} if config.logit_bias_init_value is None else {"init_logit_bias": config.logit_bias_init_value}),
    }


def mlp_ratio(tower: Any) -> float:
    """The smallest ratio from which OpenCLIP, which cuts off decimals, computes the tower's intermediate size."""
    ratio = tower.intermediate_size / tower.hidden_size
    return ratio if int(tower.hidden_size * ratio) == tower.intermediate_size else math.nextafter(ratio, math.inf)


def _layer_settings(tower: Any) -> dict[str, Any]:
    settings = {} if tower.layer_norm_eps == 1e-5 else {"norm_kwargs": {"eps": tower.layer_norm_eps}}
    settings |= {} if tower.layer_scale_init_value is None else {"ls_init_value": tower.layer_scale_init_value}
    return settings | ({"act_kwargs": {"approximate": "tanh"}} if tower.hidden_act == "gelu_pytorch_tanh" else {})


def transformers_config(config: HFCLIPConfig) -> CLIPConfig:
    """transformers' config for an architecture of ours."""
    types = {ours: theirs for theirs, ours in TRANSFORMERS_MODEL_TYPES.items()}
    towers = {}
    for key in ("text_config", "vision_config"):
        fields = getattr(config, key).to_dict()
        if fields["model_type"] not in types:
            raise UsageError(f"transformers' CLIPModel has no tower of type {fields['model_type']}.")
        towers[key] = {name: value for name, value in fields.items() if name not in OURS_ALONE}
        towers[key]["model_type"] = types[fields["model_type"]]
    return CLIPConfig(
        **towers,
        projection_dim=config.projection_dim,
        logit_scale_init_value=config.logit_scale_init_value,
        architectures=["CLIPModel"],
        dtype=config.dtype,
    )


def image_settings(processor: Any) -> dict[str, Any]:
    """What other libraries' image processors are told."""
    steps = ["do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"]
    if is_squashed := None not in (processor.size.get("height"), processor.size.get("width")):
        steps.remove("do_center_crop")  # where nothing is left to be cut
    unusual = [f"{step}=False" for step in steps if getattr(processor, step, True) is False]
    if abs(processor.rescale_factor - 1 / 255) > 1e-9:
        unusual.append(f"rescale_factor={processor.rescale_factor}")
    if unusual:
        raise UsageError(f"Cannot export: the image processor has {', '.join(unusual)}.")
    names = ("size", "crop_size", "resample", "image_mean", "image_std")
    settings = {name: getattr(processor, name) for name in names}
    return settings | ({"crop_size": processor.size} if is_squashed and not processor.do_center_crop else {})


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


# Proof


def prove(config: HFCLIPConfig, weights: Mapping[str, torch.Tensor], found: dict[str, torch.Tensor]) -> None:
    """Raises UsageError unless the export computes what the model does."""
    model = streamed(HFCLIPModel, config, weights)
    compare(found, compute_features(model, *fixed_inputs(config)))


class Tower(torch.nn.Module):
    """Images or texts -> embeddings (batch, projection_dim), not normalised."""

    def __init__(self, model: HFCLIPModel, is_text: bool):
        super().__init__()
        self.model, self.is_text = model, is_text
        names = (
            ("text_model", "input_ids", "text_embeds") if is_text else ("vision_model", "pixel_values", "image_embeds")
        )
        self.file, self.input_name, self.output_name = names
        self.takes_any_length = is_text and not model.config.text_reads_padding

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return (self.model.encode_text if self.is_text else self.model.encode_image)(inputs, normalize=False)


def export_tower(tower: Tower, inputs: torch.Tensor, path: Path) -> None:
    """Writes a tower that takes any batch and, where it does not read its padding, any length of texts."""
    dynamic = {0: torch.export.Dim("batch", min=1)}
    if tower.takes_any_length:
        dynamic[1] = torch.export.Dim("length", min=2, max=inputs.shape[1])
        # An example of the largest size would be taken for a constant.
        inputs = inputs[:-3, : inputs.shape[1] // 2 + 1]
    try:
        program = torch.onnx.export(
            tower,
            (inputs,),
            dynamo=True,
            dynamic_shapes=(dynamic,),
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
def prove_tower(tower: Tower, inputs: torch.Tensor, path: Path) -> None:
    """Runs the file on batches and lengths other than the one it was recorded with."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    shorter = max(3, inputs.shape[1] // 4) if tower.takes_any_length else None  # the first texts end early
    others = inputs[:1, :shorter] if tower.is_text else torch.cat([inputs, -inputs, inputs / 2])
    for batch in (inputs, others):
        (found,) = session.run(None, {tower.input_name: batch.numpy()})
        name = f"{tower.file} {'x'.join(map(str, batch.shape))}"
        compare({name: torch.from_numpy(found)}, {name: tower(batch)}, ONNX_TOLERANCE)


if __name__ == "__main__":
    run(main)
