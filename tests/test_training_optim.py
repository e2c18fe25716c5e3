"""Weight decay groups, AdamW's defaults, and the learning rate."""

import math

import pytest
import torch
from torch import nn
from transformers import BertConfig, Dinov2Config, get_cosine_schedule_with_warmup

from hfclip import HFCLIPConfig, HFCLIPModel
from hfclip.errors import UsageError
from training.config import OptimConfig
from training.optim import apply_learning_rate, build_optimizer, learning_rate, parameter_groups, total_steps


TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {**TOWER, "vocab_size": 600, "eos_token_id": 599}
RESNET = {
    "model_type": "hfclip_resnet",
    "depths": [1, 1, 1, 1],
    "stem_width": 8,
    "image_size": 32,
    "projection_dim": 8,
}


def model_with(vision, text=TEXT, **config):
    return HFCLIPModel(HFCLIPConfig(vision_config=vision, text_config=text, projection_dim=8, **config))


def vit(**config):
    return model_with({**TOWER, "image_size": 16, "patch_size": 8}, **config)


def test_gains_biases_and_scalars_do_not_decay():
    model = vit(logit_bias_init_value=-10.0)
    decaying, others = parameter_groups(model, 0.2)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decaying, others = ({names[id(p)] for p in group["params"]} for group in (decaying, others))
    assert decaying | others == set(names.values()) and not decaying & others
    assert {"logit_scale", "logit_bias", "vision_model.embeddings.class_embedding"} <= others
    assert {name for name in names.values() if name.endswith("bias")} <= others
    norms = {f"{module}.weight" for module, m in model.named_modules() if isinstance(m, nn.LayerNorm)}
    assert norms and norms <= others
    assert {"visual_projection.weight", "text_model.embeddings.token_embedding.weight"} <= decaying


def test_frozen_parameters_are_left_out():
    model = vit()
    model.freeze("vision")
    chosen = {id(p) for group in parameter_groups(model, 0.2) for p in group["params"]}
    assert chosen == {id(p) for p in model.parameters() if p.requires_grad}
    assert not chosen & {id(p) for p in model.vision_model.parameters()}


def test_adam_defaults_are_those_of_the_paper_for_each_family():
    transformer, resnet = (build_optimizer(model, OptimConfig(lr=1e-3)) for model in (vit(), model_with(RESNET)))
    assert (transformer.defaults["betas"], transformer.defaults["eps"]) == ((0.9, 0.98), 1e-6)
    assert (resnet.defaults["betas"], resnet.defaults["eps"]) == ((0.9, 0.999), 1e-8)
    assert [group["weight_decay"] for group in resnet.param_groups] == [0.2, 0.0]
    chosen = build_optimizer(vit(), OptimConfig(lr=1e-3, beta2=0.95, eps=1e-7)).defaults
    assert (chosen["betas"], chosen["eps"]) == ((0.9, 0.95), 1e-7)


def test_default_is_torchs_fused_adamw():
    optimizer = build_optimizer(vit(), OptimConfig(lr=1e-3))
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["fused"]
    assert [group["lr_scale"] for group in optimizer.param_groups] == [1.0, 1.0]


DEEP = {**TOWER, "num_hidden_layers": 3}


def deep(vision=None, text=None):
    vision = vision or {**DEEP, "image_size": 16, "patch_size": 8}
    return model_with(vision, text or {**DEEP, "num_hidden_layers": 2, "vocab_size": 600, "eos_token_id": 599})


def scales_of(model, layer_decay=0.5):
    """The factor of each trainable parameter, by name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, 0.2, layer_decay)
    return {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}


def assert_scales(model, expected):
    """`expected`: the start of parameters' names -> their factor; the first that fits counts. All are used."""
    used = set()
    for name, scale in scales_of(model).items():
        prefix = next(prefix for prefix in expected if name.startswith(prefix))
        used.add(prefix)
        assert scale == expected[prefix], name
    assert used == set(expected)


def test_each_block_learns_at_a_share_of_the_rate_of_the_block_above():
    expected = {
        "vision_model.embeddings": 0.125,
        "vision_model.pre_layrnorm": 0.125,
        "vision_model.encoder.layers.0": 0.25,
        "vision_model.encoder.layers.1": 0.5,
        "text_model.embeddings": 0.25,
        "text_model.encoder.layers.0": 0.5,
    }
    top = ("vision_model", "text_model", "visual_projection", "text_projection", "logit_scale")
    assert_scales(deep(), expected | dict.fromkeys(top, 1.0))


def test_blocks_of_a_resnet_are_stem_stages_and_pool():
    stages = {f"vision_model.layer{stage}": 0.5 ** (5 - stage) for stage in (1, 2, 3, 4)}
    stem = {f"vision_model.{name}": 0.5**5 for name in ("conv", "bn")}
    expected = {**stages, **stem, "vision_model.attnpool": 1.0, "text_model.embeddings": 0.25}
    expected |= {"text_model.encoder.layers.0": 0.5, "text": 1.0, "logit_scale": 1.0}
    assert_scales(deep(RESNET), expected)


def test_blocks_of_other_towers_are_found():
    vision = Dinov2Config(**TOWER | {"num_hidden_layers": 3}, image_size=16, patch_size=8)
    text = BertConfig(**TOWER | {"num_hidden_layers": 2}, vocab_size=600, max_position_embeddings=16)
    model = deep(vision, text)
    expected = {
        "vision_model.embeddings": 0.125,
        "vision_model.encoder.layer.0": 0.25,
        "vision_model.encoder.layer.1": 0.5,
        "vision_model.encoder.layer.2": 1.0,
        "vision_model.layernorm": 1.0,
        "text_model.embeddings": 0.25,
        "text_model.encoder.layer.0": 0.5,
        "text_model.encoder.layer.1": 1.0,
    }
    assert_scales(model, expected | dict.fromkeys(("visual_projection", "text_projection", "logit_scale"), 1.0))


def test_bag_of_words_has_no_blocks():
    words = {"model_type": "hfclip_bag_of_words", "hidden_size": 16, "vocab_size": 600, "eos_token_id": 599}
    scales = scales_of(deep(text=words))
    assert {scale for name, scale in scales.items() if name.startswith("text")} == {1.0}


def test_rejects_layer_decay_without_list_of_blocks():
    model = deep()
    model.vision_model.encoder.layers = nn.Sequential(*model.vision_model.encoder.layers)
    with pytest.raises(UsageError, match="optim.layer_decay: found no list of blocks in the hfclip_vit"):
        parameter_groups(model, 0.2, 0.5)
    parameter_groups(model, 0.2, 1.0)
    model.freeze("vision")
    parameter_groups(model, 0.2, 0.5)


def test_groups_of_equal_settings_are_merged_and_come_in_one_order():
    first, second = (
        [(group["lr_scale"], group["weight_decay"]) for group in parameter_groups(deep(), 0.2, 0.5)] for _ in range(2)
    )
    assert first == second == [(scale, decay) for scale in (1.0, 0.5, 0.25, 0.125) for decay in (0.2, 0.0)]


def test_learning_rate_is_applied_by_layer():
    optimizer = build_optimizer(deep(), OptimConfig(lr=1e-3, layer_decay=0.5))
    apply_learning_rate(optimizer, 0.01)
    assert [group["lr"] for group in optimizer.param_groups] == [
        0.01 * scale for scale in (1, 1, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125)
    ]
    assert all(group["lr"] == 0.01 * group["lr_scale"] for group in optimizer.param_groups)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rejects_half_precision_weights(dtype):
    with pytest.raises(UsageError, match=rf"float32 weights.*{dtype}.*run.precision"):
        build_optimizer(vit().to(dtype), OptimConfig(lr=1e-3))


@pytest.mark.parametrize("warmup", [0, 7])
def test_learning_rate_is_warm_up_and_cosine(warmup):
    config = OptimConfig(lr=0.5, warmup_steps=warmup)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=0.5)
    reference = get_cosine_schedule_with_warmup(optimizer, warmup, 50)
    rates = []
    for _ in range(50):
        rates.append(reference.get_last_lr()[0])
        optimizer.step()
        reference.step()
    ours = [learning_rate(step, 50, config) for step in range(50)]
    # transformers warms up from rate 0, a step that does nothing; ours from the first step on.
    assert ours[warmup:] == pytest.approx(rates[warmup:], rel=1e-12)
    assert ours[:warmup] == pytest.approx([0.5 * (step + 1) / 7 for step in range(warmup)], rel=1e-12)
    assert learning_rate(50, 50, config) == pytest.approx(0, abs=1e-12)
    assert all(math.isfinite(rate) and rate > 0 for rate in ours)


def test_length_of_a_run():
    assert total_steps(OptimConfig(epochs=2.5, warmup_steps=0), steps_per_epoch=10) == 25
    assert total_steps(OptimConfig(epochs=2.5, steps=7, warmup_steps=0), steps_per_epoch=10) == 7
    assert total_steps(OptimConfig(epochs=0.01, warmup_steps=0), steps_per_epoch=10) == 1
    with pytest.raises(UsageError, match="found 2000.*fewer than the 20 steps"):
        total_steps(OptimConfig(epochs=2, warmup_steps=2000), steps_per_epoch=10)
