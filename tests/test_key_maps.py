"""Reference weights of openai/CLIP and open_clip load strictly, compute the same, and go back bit for bit."""

import json

import pytest
import torch
from safetensors import safe_open

from hfclip import HFCLIPModel
from hfclip.foreign.key_maps import hfclip_items, openai_config, openai_items, openclip_config


GOLDEN = [
    "openai_resnet_tiny",
    "openai_vit_tiny",
    "openclip_resnet_tiny",
    "openclip_vit_gelu_tiny",
    "openclip_vit_quickgelu_tiny",
    "openclip_vit_siglip_head_tiny",
]


def read_golden(path):
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        settings = json.loads(file.metadata()["config"])
    weights = {name.removeprefix("weights/"): t for name, t in tensors.items() if name.startswith("weights/")}
    return weights, settings, tensors


def load(weights, settings) -> HFCLIPModel:
    config = openclip_config(weights, settings) if "vision_cfg" in settings else openai_config(weights)
    model = HFCLIPModel(config).eval()
    model.load_state_dict(dict(hfclip_items(weights)), strict=True)
    return model


def relative(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_weights_load_strictly_and_agree(name, data_dir):
    weights, settings, tensors = read_golden(data_dir / "golden" / f"{name}.safetensors")
    model = load(weights, settings)
    pixel_values, input_ids = tensors["inputs/pixel_values"], tensors["inputs/input_ids"]
    with torch.no_grad():
        image = model.encode_image(pixel_values, normalize=False)
        text = model.encode_text(input_ids, normalize=False)
        logits = model(input_ids=input_ids, pixel_values=pixel_values).logits_per_image
        full = model.get_image_features(pixel_values).pooler_output
    # Two float32 implementations of the same sums: 2e-5 is some hundred units in the last place.
    assert relative(image, tensors["outputs/image_features"]) < 2e-5
    assert relative(full, tensors["outputs/image_features"]) < 2e-5
    assert relative(text, tensors["outputs/text_features"]) < 2e-5
    assert relative(logits, tensors["outputs/logits_per_image"]) < 2e-5


@pytest.mark.parametrize("name", GOLDEN)
def test_round_trip_is_bit_exact(name, data_dir):
    weights, settings, _ = read_golden(data_dir / "golden" / f"{name}.safetensors")
    back = dict(openai_items(load(weights, settings).state_dict()))
    assert back.keys() == weights.keys()
    for key, tensor in weights.items():
        assert torch.equal(back[key], tensor), key


def test_rejects_unknown_names(data_dir):
    weights, _, _ = read_golden(data_dir / "golden" / "openai_vit_tiny.safetensors")
    with pytest.raises(ValueError, match="module.logit_scale"):
        prefixed = {f"module.{name}": tensor for name, tensor in weights.items()}
        dict(hfclip_items(prefixed | {"module.logit_scale": torch.ones(())}))
    with pytest.raises(ValueError, match="missing"):
        openai_config({"logit_scale": torch.ones(())})
