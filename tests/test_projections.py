"""The kinds of projections into the joint space: what they compute, how they are saved, counted and refused."""

import pytest
import torch
from torch.nn import functional as F

from hfclip import HFCLIPConfig, HFCLIPModel, optimize_for_inference
from hfclip.flops import ModelFlops
from hfclip.modeling_hfclip_heads import HFCLIPTextModelWithProjection, HFCLIPVisionModelWithProjection


VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 16, "patch_size": 8}
TEXT = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT |= {"vocab_size": 90, "bos_token_id": 88, "eos_token_id": 89, "max_position_embeddings": 12}
RESNET = {
    "model_type": "hfclip_resnet",
    "depths": (1, 1, 1, 1),
    "stem_width": 8,
    "image_size": 32,
    "projection_dim": 16,
}
SIZES = {  # of a tower of width 32 in a space of 16
    "linear": {"weight": (16, 32)},
    "linear_bias": {"weight": (16, 32), "bias": (16,)},
    "mlp": {"fc1.weight": (24, 32), "fc2.weight": (16, 24)},
    "mlp_bias": {"fc1.weight": (32, 32), "fc1.bias": (32,), "fc2.weight": (16, 32)},
}


def build(vision=VISION, text=TEXT, **fields):
    torch.manual_seed(0)
    return HFCLIPModel(HFCLIPConfig(vision_config=vision, text_config=text, **{"projection_dim": 16, **fields})).eval()


def inputs():
    ids = torch.randint(1, 88, (2, 8), generator=torch.Generator().manual_seed(0))
    ids[:, -1] = 89
    return ids, torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", SIZES)
def test_each_kind_computes_what_its_name_says(kind, tmp_path):
    model = build(vision_projection_type=kind)
    weights = {name: p for name, p in model.visual_projection.state_dict().items()}
    assert {name: tuple(p.shape) for name, p in weights.items()} == SIZES[kind]
    for name, parameter in weights.items():
        if name.endswith("bias"):
            assert not parameter.any()
            parameter.normal_()
        else:
            assert parameter.std() == pytest.approx(parameter.shape[1] ** -0.5, rel=0.15)
    _, pixels = inputs()
    with torch.no_grad():
        pooled = model.vision_model(pixels).pooler_output
        found = model.encode_image(pixels, normalize=False)
        if kind.startswith("linear"):
            expected = F.linear(pooled, weights["weight"], weights.get("bias"))
        else:
            hidden = F.gelu(F.linear(pooled, weights["fc1.weight"], weights.get("fc1.bias")))
            expected = F.linear(hidden, weights["fc2.weight"])
        torch.testing.assert_close(found, expected)
        model.save_pretrained(tmp_path)
        for again in (HFCLIPModel, HFCLIPVisionModelWithProjection):
            opened = again.from_pretrained(tmp_path)
            embeds = opened(pixels).image_embeds if again is not HFCLIPModel else opened.encode_image(pixels, False)
            torch.testing.assert_close(embeds, found)
        faster = optimize_for_inference(HFCLIPModel.from_pretrained(tmp_path))
        torch.testing.assert_close(faster.encode_image(pixels, False), found)


def test_the_text_tower_has_its_own_kind(tmp_path):
    model = build(text_projection_type="mlp")
    assert {*model.text_projection.state_dict()} == {"fc1.weight", "fc2.weight"}
    assert {*model.visual_projection.state_dict()} == {"weight"}
    model.save_pretrained(tmp_path)
    ids, _ = inputs()
    tower = HFCLIPTextModelWithProjection.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(tower(ids).text_embeds, model.get_text_features(ids).pooler_output)


def test_identity_adds_nothing_to_a_tower_as_wide_as_the_space(tmp_path):
    model = build(projection_dim=32, vision_projection_type="identity")
    assert not [name for name in model.state_dict() if name.startswith("visual_projection")]
    _, pixels = inputs()
    with torch.no_grad():
        assert torch.equal(model.get_image_features(pixels).pooler_output, model.vision_model(pixels).pooler_output)
        model.save_pretrained(tmp_path)
        assert torch.equal(HFCLIPModel.from_pretrained(tmp_path).encode_image(pixels), model.encode_image(pixels))


def test_it_is_trained_and_counted():
    model = build(vision_projection_type="mlp", text_projection_type="linear_bias")
    ids, pixels = inputs()
    model.train()(input_ids=ids, pixel_values=pixels, return_loss=True).loss.backward()
    for projection in (model.visual_projection, model.text_projection):
        assert all(p.grad.abs().sum() > 0 for p in projection.parameters())
    flops = ModelFlops(model.config).of_image().forward - ModelFlops(build().config).of_image().forward
    assert flops == 2 * (32 * 24 + 24 * 16 - 32 * 16)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"vision_projection_type": "identity"}, "identity' with a tower of width 32 and projection_dim=16"),
        ({"text_projection_type": "cosine"}, "text_projection_type"),
        ({"vision_projection_type": "mlp", "vision": RESNET}, "this tower ends in the joint space"),
    ],
)
def test_what_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        build(**fields)
