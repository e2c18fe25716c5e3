"""Weight decay groups, AdamW's defaults, and the learning rate."""

import math

import pytest
import torch
from torch import nn
from transformers import get_cosine_schedule_with_warmup

from hfclip import HFCLIPConfig, HFCLIPModel
from training.config import OptimConfig, UsageError
from training.optim import build_optimizer, learning_rate, parameter_groups, total_steps


TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {**TOWER, "vocab_size": 600, "eos_token_id": 599}
RESNET = {
    "model_type": "hfclip_resnet",
    "depths": [1, 1, 1, 1],
    "stem_width": 8,
    "image_size": 32,
    "projection_dim": 8,
}


def model_with(vision, **config):
    return HFCLIPModel(HFCLIPConfig(vision_config=vision, text_config=TEXT, projection_dim=8, **config))


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
    transformer, resnet = (build_optimizer(model, OptimConfig()) for model in (vit(), model_with(RESNET)))
    assert (transformer.defaults["betas"], transformer.defaults["eps"]) == ((0.9, 0.98), 1e-6)
    assert (resnet.defaults["betas"], resnet.defaults["eps"]) == ((0.9, 0.999), 1e-8)
    assert [group["weight_decay"] for group in resnet.param_groups] == [0.2, 0.0]
    chosen = build_optimizer(vit(), OptimConfig(beta2=0.95, eps=1e-7)).defaults
    assert (chosen["betas"], chosen["eps"]) == ((0.9, 0.95), 1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rejects_half_precision_weights(dtype):
    with pytest.raises(UsageError, match=rf"float32 weights.*{dtype}.*run.precision"):
        build_optimizer(vit().to(dtype), OptimConfig())


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
        total_steps(OptimConfig(epochs=2), steps_per_epoch=10)
