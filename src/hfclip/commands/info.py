"""Says what a model folder holds: architecture, parameters, FLOPs, preprocessing, and where it came from.

hfclip info FOLDER
hfclip info openai/clip-vit-base-patch32 --json
"""

import argparse
import json
from pathlib import Path
from typing import Any

from transformers.utils import logging

from hfclip import HFCLIPConfig, HFCLIPModel
from hfclip.errors import as_usage_error, run
from hfclip.flops import ModelFlops
from hfclip.foreign_hfclip import is_foreign
from hfclip.hub.card import describe
from hfclip.names import opening
from hfclip.processing_hfclip import open_image_processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", help="a CLIP folder, or its name on the Hub")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    options = parser.parse_args()
    logging.disable_progress_bar()
    facts = collect(options.folder)
    if options.json:
        print(json.dumps(facts, ensure_ascii=False))
        return
    for name, value in facts.items():
        value = ", ".join(f"{key} {part}" for key, part in value.items()) if isinstance(value, dict) else value
        print(f"{name:<16}{value:,}" if isinstance(value, int) else f"{name:<16}{value}")


def collect(name: str) -> dict[str, Any]:
    """Facts about a model, from its files; of the weights only the scalars of the loss are kept."""
    with opening(name, "FOLDER"):
        config = HFCLIPConfig.from_pretrained(name)
        model = HFCLIPModel.from_pretrained(name)
    flops, tokens = ModelFlops(config), config.text_config.max_position_embeddings
    gflops, resolution = f"{flops.of_text(tokens).forward / 1e9:.3g} per text", "each in its own shape, as patches"
    if not config.is_naflex:
        gflops = f"{flops.of_image().forward / 1e9:.3g} per image, {gflops}"
        resolution = f"{config.image_size} x {config.image_size} pixels"
    facts = {
        "image tower": describe(config.vision_config),
        "text tower": describe(config.text_config),
        "embeddings": f"{config.projection_dim} dimensions",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "GFLOPs": gflops,
        "resolution": resolution,
        "tokens": tokens,
        "logit scale": f"{model.logit_scale.exp().item():.4g}",
    }
    if model.logit_bias is not None:
        facts["logit bias"] = f"{model.logit_bias.item():.4g}"
    return {**facts, "preprocessing": preprocessing(name), "origin": origin(Path(name))}


def preprocessing(name: str) -> str | dict[str, Any]:
    try:
        settings = open_image_processor(name).to_dict()
    except (OSError, ValueError):
        return "no image processor"
    fields = ("size", "crop_size", "resample", "image_mean", "image_std", "patch_size", "max_num_patches")
    return {field: settings[field] for field in fields if settings.get(field) is not None}


def origin(folder: Path) -> str:
    """What the converter or the trainer has left beside the weights."""
    if is_foreign(folder, {}):
        return "a checkpoint of OpenAI or OpenCLIP, opened as it is"
    for file, told in (
        ("conversion.json", _conversion),
        ("../config.yaml", lambda path: f"trained by {path.resolve()}"),
    ):
        if (folder / file).is_file():
            return told(folder / file)
    return "not recorded"


def _conversion(path: Path) -> str:
    with as_usage_error(path):
        source = json.loads(path.read_text(encoding="utf-8"))["source"]
        return f"converted from {source['file']} ({source['format']}), SHA-256 {source['sha256']}"


if __name__ == "__main__":
    run(main)
