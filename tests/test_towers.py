"""A tower of a new kind: its class and its config, a row each in the tables, and everything else serves it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling

from hfclip import HFCLIPConfig, HFCLIPModel
from hfclip.configuration_hfclip import TOWER_CONFIGS, HFCLIPBaseConfig
from hfclip.hub import model_card
from hfclip.layers_hfclip import check_pixel_values, initialize_leaf, with_init_std
from hfclip.limits_hfclip import limited
from hfclip.towers_hfclip import TOWERS
from training.config import Config, OptimConfig
from training.footprint import Towers
from training.optim import build_optimizer
from training.parallel import fsdp_units
from training.phases import build_phases


@limited
class MixerConfig(HFCLIPBaseConfig):
    model_type = "test_mixer"
    kind = "mixer"
    base_config_key = "vision_config"
    pooler_is_projected = False

    hidden_size: int = 32
    projection_dim: int = 16
    num_hidden_layers: int = 3
    num_channels: int = 3
    image_size: int = 32
    patch_size: int = 8
    initializer_factor: float = 1.0

    @property
    def stride(self) -> int:
        return 2 * self.patch_size

    def validate_architecture(self):
        self._require(
            self.image_size % self.stride == 0, f"image_size={self.image_size}", "a multiple of 16", "Take 32."
        )


class MixerBlock(GradientCheckpointingLayer):
    def __init__(self, config: MixerConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size)
        self.linear = with_init_std(nn.Linear(config.hidden_size, config.hidden_size), 0.02)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states + F.gelu(self.linear(self.norm(states).cummax(dim=1).values))


class MixerModel(PreTrainedModel):
    config_class = MixerConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MixerBlock"]

    def __init__(self, config: MixerConfig):
        super().__init__(config)
        patches = nn.Conv2d(config.num_channels, config.hidden_size, config.patch_size, config.patch_size, bias=False)
        self.patch_embedding = with_init_std(patches, 0.02)
        self.layers = nn.ModuleList([MixerBlock(config) for _ in range(config.num_hidden_layers)])
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        initialize_leaf(module, self.config.initializer_factor)

    def forward(self, pixel_values, interpolate_pos_encoding=None, pooled_only=False, **kwargs):
        check_pixel_values(pixel_values, self.config, interpolate_pos_encoding)
        states = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        for layer in self.layers:
            states = layer(states)
        return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=states.mean(dim=1))


TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT |= {"vocab_size": 600, "eos_token_id": 599, "bos_token_id": 598, "max_position_embeddings": 20}


@pytest.fixture
def config(monkeypatch) -> HFCLIPConfig:
    monkeypatch.setitem(TOWER_CONFIGS, "test_mixer", MixerConfig)
    monkeypatch.setitem(TOWERS, "test_mixer", MixerModel)
    return HFCLIPConfig(vision_config={"model_type": "test_mixer"}, text_config=TEXT, projection_dim=16)


def test_it_is_saved_and_opened(config, tmp_path):
    model = HFCLIPModel(config)
    model.save_pretrained(tmp_path)
    again = HFCLIPModel.from_pretrained(tmp_path)
    pixel_values = torch.rand(2, 3, 32, 32)
    assert type(again.vision_model) is MixerModel
    assert torch.equal(again.encode_image(pixel_values), model.encode_image(pixel_values))
    with pytest.raises(ValueError, match="multiples of 16"):
        model.encode_image(torch.rand(2, 3, 24, 24))


def test_it_is_counted_and_planned(config):
    towers = Towers(config)
    forward = 2 * (16 * 8 * 8 * 3 * 32 + 3 * 16 * 32 * 32 + 32 * 16)
    assert towers.flops.of_image().forward == forward
    assert towers.flops.of_image().training == 3 * forward - 2 * 16 * 8 * 8 * 3 * 32  # no gradient of the pixels
    whole, checkpointed = (towers.kept(True, checkpointing, 20) for checkpointing in (False, True))
    assert 0 < whole.block < checkpointed.total < whole.total


def test_its_blocks_have_rates_of_their_own_and_are_split(config):
    model = HFCLIPModel(config)
    groups = build_optimizer(model, OptimConfig(lr=1e-3, layer_decay=0.5)).param_groups
    scales = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    assert [scales[id(block.linear.weight)] for block in model.vision_model.layers] == [0.25, 0.5, 1]
    assert scales[id(model.vision_model.patch_embedding.weight)] == 0.125
    assert {*model.vision_model.layers} < {*fsdp_units(model)}


def test_it_describes_itself(config):
    card = model_card(config, name="anna/clip-birds", provenance={}, results=[])
    assert "| mixer, patches of 8 x 8 pixels, images of 32 x 32 pixels, 3 layers, width 32 |" in card
    settings = {
        "model": {"preset": "RN50", "tokenizer": "train"},
        "data": {"phases": [{"epochs": 1, "image_size": 16}]},
    }
    tokenizer = type("Tokenizer", (), {"model_max_length": 20})
    phases = build_phases(Config.from_dict(settings), config, tokenizer, 10, 20)
    assert [phases.at(step).image_size for step in (0, 10)] == [16, 32] and not config.has_patches
