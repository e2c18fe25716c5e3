"""The recipes in training/configs: the nine published models as in the paper's tables, and the ones beyond it."""

import re

import pytest
import yaml

from hfclip import HFCLIPConfig
from hfclip.presets_hfclip import PRESETS
from training.command import CONFIG_FOLDER, load_yaml
from training.config import Config
from training.footprint import Towers
from training.model import build_architecture
from training.phases import Phase, Phases
from training.plan import DEVICES, PlannedRun, make_plan


# recipe: preset, learning rate, image size, joint dimensions (Radford et al. 2021, tables 19 and 20)
PAPER = {
    "rn50": ("RN50", 5e-4, 224, 1024),
    "rn101": ("RN101", 5e-4, 224, 512),
    "rn50x4": ("RN50x4", 5e-4, 288, 640),
    "rn50x16": ("RN50x16", 4e-4, 384, 768),
    "rn50x64": ("RN50x64", 3.6e-4, 448, 1024),
    "vit_b_32": ("ViT-B/32", 5e-4, 224, 512),
    "vit_b_16": ("ViT-B/16", 5e-4, 224, 512),
    "vit_l_14": ("ViT-L/14", 4e-4, 224, 768),
    "vit_l_14_336": ("ViT-L/14@336px", 2e-5, 336, 768),
}


def recipe(name: str) -> Config:
    return Config.from_dict(load_yaml(name))


def test_there_is_a_recipe_for_each_published_model():
    assert {preset for preset, *_ in PAPER.values()} == PRESETS.keys()


@pytest.mark.parametrize("name", PAPER)
def test_recipe_has_the_numbers_of_the_paper(name):
    preset, lr, image_size, projection_dim = PAPER[name]
    config, is_resnet = recipe(name), name.startswith("rn")
    optim = config.optim
    assert (optim.batch_size, optim.lr, optim.warmup_steps, optim.weight_decay) == (32768, lr, 2000, 0.2)
    assert (optim.beta2, optim.eps) == ((0.999, 1e-8) if is_resnet else (0.98, 1e-6))
    assert optim.epochs == (1 if name == "vit_l_14_336" else 32)
    assert (optim.loss, optim.max_logit_scale, optim.steps, optim.max_grad_norm) == ("contrastive", 100, None, None)
    assert (optim.layer_decay, optim.ema_decay, config.data.phases, config.distill.teacher) == (1, None, [], None)
    # The memory savers of section 2.5
    assert (config.model.gradient_checkpointing, optim.bfloat16) == (True, ["moments", "text_weights"])
    if name != "vit_l_14_336":
        assert config.model.preset == preset
        architecture = build_architecture(config)
        assert (architecture.image_size, architecture.projection_dim) == (image_size, projection_dim)


def test_the_epoch_at_336_pixels_continues_the_trained_model():
    config = recipe("vit_l_14_336")
    assert config.model.preset is None and config.model.tokenizer is None
    text = (CONFIG_FOLDER / "vit_l_14_336.yaml").read_text()
    trained = f"{recipe('vit_l_14').run.output_dir}/model"
    assert f"surgery.py resize {trained} {config.model.checkpoint} --image-size 336" in text


@pytest.mark.parametrize("name", PAPER)
def test_micro_batches_of_the_paper_recipes_fit_80_gb(name):
    config = recipe(name)
    if name == "vit_l_14_336":
        config.model.checkpoint, config.model.preset = None, "ViT-L/14@336px"
    config.run.precision = "bf16"
    towers = Towers(build_architecture(config), bfloat16=config.optim.bfloat16)
    plan = make_plan(PlannedRun(config=config, towers=towers, device=DEVICES["a100"], world=8))
    assert plan.micro_batch == config.optim.micro_batch_size
    assert plan.fits


def test_siglip_trains_a_bias_with_the_sigmoid_loss():
    config = recipe("siglip")
    architecture = build_architecture(config)
    assert config.optim.loss == "sigmoid" and config.optim.beta2 == 0.95
    assert architecture.logit_bias_init_value == -10
    assert architecture.logit_scale_init_value == pytest.approx(2.302585)  # ln(10)


def test_clipa_ends_at_full_resolution():
    config = recipe("clipa")
    architecture = build_architecture(config)
    steps_per_epoch = 400_000_000 // config.optim.batch_size
    full = Phase(architecture.image_size, architecture.text_config.max_position_embeddings, 0.0)
    phases = Phases(
        config.data.phases,
        full,
        stride=architecture.vision_config.patch_size,
        steps_per_epoch=steps_per_epoch,
        total_steps=round(config.optim.epochs * steps_per_epoch),
    )
    assert phases.at(0) == Phase(112, 16, 0.0)
    assert phases.at(6 * steps_per_epoch) == full


def test_lit_locks_the_image_tower():
    config = recipe("lit")
    assert config.model.freeze == "vision"
    text = (CONFIG_FOLDER / "lit.yaml").read_text()
    assert config.model.checkpoint in text[: text.index("model:")]  # the head says how it is made


def test_distillation_has_a_teacher_with_the_students_tokenizer():
    config = recipe("distill")
    assert config.distill.teacher and 0 < config.distill.weight <= 1
    assert HFCLIPConfig.from_preset(config.model.preset).text_config.vocab_size == 49408


@pytest.mark.parametrize("path", sorted(CONFIG_FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipe_says_what_it_is_and_how_to_start_it(path):
    text = path.read_text()
    head = text[: text.index("\nmodel:")]
    assert head.startswith("# ")
    assert path.stem == "quickstart" or re.search(rf"pretrain\.py --config (\S*/)?{path.stem}\b", head)


@pytest.mark.parametrize("path", sorted(CONFIG_FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipe_leaves_precision_and_workers_to_the_machine(path):
    config = recipe(path.stem)
    assert config.run.precision == "auto" and config.data.num_workers is None


@pytest.mark.parametrize("name", ["one_gpu", "eight_gpus", "nodes", "cpu_processes"])
def test_launch_file_is_read_by_accelerate(name):
    from accelerate.commands.config.config_args import load_config_from_file

    path = CONFIG_FOLDER.parent / "launch" / f"{name}.yaml"
    settings = load_config_from_file(str(path))
    assert settings.num_processes == yaml.safe_load(path.read_text())["num_processes"]
    assert settings.mixed_precision == "no"  # run.precision decides
    assert not settings.fsdp_config  # the trainer refuses it: run.shard_weights
    assert f"training/launch/{name}.yaml" in path.read_text()
