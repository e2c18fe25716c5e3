"""Where model, tokenizer and image processor of a run come from, and what does not fit together."""

import math
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from training_utils import ROOT, caption, tiny_recipe
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig, ViTConfig, ViTModel

from hfclip import HFCLIPImageProcessor, HFCLIPModel, HFCLIPProcessor, HFCLIPTokenizer
from hfclip.errors import UsageError
from hfclip.losses import LOSSES, Loss
from training.config import Config
from training.data.batches import open_data as open_source
from training.model import adapt_to_device, build_architecture, build_model, build_processor, resumed_from
from training.objectives.contrastive import Contrastive


SCENES = {"train": "scenes", "max_samples": 200}


def recipe(folder, **sections):
    return Config.from_dict(tiny_recipe(folder, **{"data": SCENES, **sections}))


def build(config):
    architecture = build_architecture(config)
    source = open_source("scenes", config.data, "train", architecture.image_size)
    architecture, processor = build_processor(config, architecture, source)
    return build_model(config, architecture), processor


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A saved model from scratch, with everything that belongs to it."""
    folder = tmp_path_factory.mktemp("trained")
    model, processor = build(recipe(folder))
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return folder / "model"


def test_scratch_model_gets_the_trained_tokenizers_vocabulary(tmp_path):
    model, processor = build(recipe(tmp_path))
    text, tokenizer = model.config.text_config, processor.tokenizer
    assert len(tokenizer) == text.vocab_size == model.text_model.embeddings.token_embedding.num_embeddings < 49408
    assert (text.eos_token_id, text.bos_token_id) == (tokenizer.eos_token_id, tokenizer.bos_token_id)
    assert tokenizer.model_max_length == text.max_position_embeddings == 16
    assert processor.image_processor.crop_size == {"height": 32, "width": 32}
    assert model.training


def test_model_is_built_without_warnings(tmp_path, caplog):
    """Of fewer tokens than model.vocab_size allows, and of a ResNet, which has no attention to choose."""
    model = tiny_recipe(tmp_path)["model"]
    model["config"]["vision_config"] = {"model_type": "hfclip_resnet", "depths": [1, 1, 1, 1], "stem_width": 8}
    config = recipe(tmp_path, model=model, run={"precision": "bf16"})
    AcceleratorState._reset_state(reset_partial_state=True)
    transformers.utils.logging.get_logger().addHandler(caplog.handler)
    try:
        model, _ = build(config)
        model = adapt_to_device(Accelerator(cpu=True), model, config)
    finally:
        transformers.utils.logging.get_logger().removeHandler(caplog.handler)
    assert not [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert model.text_model.config._attn_implementation == "eager"


def test_seed_decides_the_initial_weights(tmp_path):
    weights = [build(recipe(tmp_path, run={"seed": seed}))[0].visual_projection.weight for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_checkpoint_brings_weights_tokenizer_and_image_processor(trained, tmp_path):
    origin = {"config": None, "checkpoint": str(trained), "tokenizer": None, "freeze": "vision", "patch_dropout": 0.25}
    model, processor = build(recipe(tmp_path, model=origin))
    expected = HFCLIPModel.from_pretrained(trained)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    assert len(processor.tokenizer) == expected.config.text_config.vocab_size
    assert not any(p.requires_grad for p in model.vision_model.parameters())
    assert not model.vision_model.training and model.text_model.training
    assert model.config.vision_config.patch_dropout == 0.25


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_checkpoint_is_trained_in_float32(dtype, trained, tmp_path):
    HFCLIPModel.from_pretrained(trained).to(dtype).save_pretrained(tmp_path / "half")
    HFCLIPProcessor.from_pretrained(trained).save_pretrained(tmp_path / "half")
    assert load_file(tmp_path / "half" / "model.safetensors")["visual_projection.weight"].dtype == dtype
    origin = {"config": None, "checkpoint": str(tmp_path / "half"), "tokenizer": None}
    model, _ = build(recipe(tmp_path, model=origin))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_folder_of_transformers_clip_is_continued(tmp_path):
    tokenizer = HFCLIPTokenizer.train_new_from_iterator(map(caption, range(99)), 600, show_progress=False)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = CLIPTextConfig(**tower, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, bos_token_id=0)
    vision = CLIPVisionConfig(**tower, image_size=32, patch_size=8)
    theirs = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16))
    theirs.save_pretrained(tmp_path / "clip")
    HFCLIPProcessor(HFCLIPImageProcessor(size=32), tokenizer).save_pretrained(tmp_path / "clip")
    model, _ = build(recipe(tmp_path, model={"config": None, "checkpoint": str(tmp_path / "clip"), "tokenizer": None}))
    ours, expected = model.state_dict(), theirs.state_dict()
    assert all(torch.equal(ours[name], expected[name]) for name in ours)


def test_two_pretrained_towers_make_a_model(trained, tmp_path, monkeypatch):
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vit = ViTModel(ViTConfig(**tower, image_size=32, patch_size=16))
    vit.save_pretrained(tmp_path / "vit")
    HFCLIPImageProcessor(size=32, image_mean=[0.5] * 3, image_std=[0.25] * 3).save_pretrained(tmp_path / "vit")
    HFCLIPModel.from_pretrained(trained).text_model.save_pretrained(tmp_path / "text")
    HFCLIPTokenizer.from_pretrained(trained).save_pretrained(tmp_path / "text")
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "training.md").read_text(), flags=re.S)[1]
    for word, replacement in {r"google/vit[\w-]+": "vit", r"google-bert/[\w-]+": "text", "=1024": "=8"}.items():
        code, count = re.subn(word, replacement, code)
        assert count == 1
    exec(code, {})
    origin = {"config": None, "checkpoint": "data/two-towers", "tokenizer": None}
    model, processor = build(recipe(tmp_path, model=origin))
    assert torch.equal(model.vision_model.embeddings.cls_token, vit.embeddings.cls_token)
    assert model.visual_projection.weight.shape == (8, 32)
    assert list(processor.image_processor.image_std) == [0.25] * 3


def test_sigmoid_loss_gets_siglips_initial_logits(tmp_path):
    model, _ = build(recipe(tmp_path, optim={"loss": "sigmoid"}))
    assert model.logit_scale.exp().item() == pytest.approx(10) and model.logit_bias.item() == -10
    assert build(recipe(tmp_path))[0].logit_bias is None


def test_loss_needs_no_more_than_a_line_of_the_table(tmp_path, monkeypatch):
    def matched(images, texts, scale, bias, *, group_id, exchange):
        return -scale * (images * texts).sum(dim=1).mean() + bias

    monkeypatch.setitem(LOSSES, "matched", Loss(matched, {"logit_scale": 0.5, "logit_bias": -1.0}))
    config = recipe(tmp_path, optim={"loss": "matched"})
    model, _ = build(config)
    objective, embeds = Contrastive(config), 2 * (torch.eye(3),)
    value = objective.loss(embeds, {name: getattr(model, name) for name in objective.scalars}, {})
    assert value.item() == pytest.approx(-math.exp(0.5) - 1)
    value.backward()
    assert model.logit_scale.grad.item() == pytest.approx(-math.exp(0.5)) and model.logit_bias.grad == 1


@pytest.mark.parametrize(
    ("model", "optim", "words"),
    [
        ({"config": None, "preset": "ViT-B/31"}, {}, ["ViT-B/31", "Did you mean"]),
        ({"config": {"projection_dimm": 8}}, {}, ["projection_dim"]),
        ({"config": {"vision_config": {"patch_size": 7, "image_size": 32}}}, {}, ["patch_size=7"]),
        ({"config": {"vision_config": {"model_type": "vitt"}}}, {}, ["vitt", "vit"]),
        ({"config": "quickstart"}, {}, ["model, data, optim, run, eval", "sections of a run", "--config"]),
        ({"config": "no_such_file.yaml"}, {}, ["no_such_file.yaml"]),
        ({"config": None, "checkpoint": "/no/such/folder"}, {}, ["/no/such/folder"]),
        ({"tokenizer": None}, {}, ["model.tokenizer", "merges file"]),
        ({"tokenizer": "/no/such/merges.txt.gz"}, {}, ["tokenizer", "/no/such/merges.txt.gz"]),
        ({"patch_dropout": 0.5, "config": {"vision_config": {"model_type": "hfclip_resnet"}}}, {}, ["patch_dropout"]),
        ({"config": {"logit_bias_init_value": -1}}, {}, ["contrastive", "logit_bias", "sigmoid"]),
        ({}, {"loss": "hinge"}, ["optim.loss", "'hinge'", "one of 'contrastive', 'sigmoid'"]),
    ],
)
def test_rejects_models_that_cannot_be_built(model, optim, words, tmp_path):
    with pytest.raises(UsageError) as error:
        build(recipe(tmp_path, model=model, optim=optim))
    assert all(word in str(error.value) for word in words), str(error.value)


def copied(folder, to):
    shutil.copytree(folder, to / "copy")
    return to / "copy"


def test_rejects_checkpoints_that_do_not_fit(trained, tmp_path):
    folder = copied(trained, tmp_path)
    origin = {"config": None, "checkpoint": str(folder), "tokenizer": None}
    with pytest.raises(UsageError, match="logit_bias, which this checkpoint has not"):
        build(recipe(tmp_path, model=origin, optim={"loss": "sigmoid"}))
    bigger = HFCLIPTokenizer.from_pretrained(folder)
    bigger.add_tokens(["<new>"])
    bigger.save_pretrained(tmp_path / "bigger")
    with pytest.raises(UsageError, match="tokens, but the model's text_config.vocab_size"):
        build(recipe(tmp_path, model={**origin, "tokenizer": str(tmp_path / "bigger")}))
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match="lacks 1 weights.*visual_projection.weight"):
        build(recipe(tmp_path, model=origin))


def test_resume_wins_over_every_other_origin(trained, tmp_path):
    config = recipe(tmp_path, run={"seed": 5})
    assert resumed_from(config, None) is config
    model, processor = build(resumed_from(config, Path(trained)))
    assert torch.equal(model.visual_projection.weight, HFCLIPModel.from_pretrained(trained).visual_projection.weight)
    assert processor.tokenizer.get_vocab() == HFCLIPTokenizer.from_pretrained(trained).get_vocab()
