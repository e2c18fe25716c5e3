"""The plain reference of CLIP agrees with openai/CLIP, open_clip, transformers and torch's own layers, reads lazily, and
refuses what it does not understand."""

import json
import subprocess
import sys
import weakref
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from test_key_maps import GOLDEN
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
)

from conversion.reference import Recorder, Settings, image_features, text_features, unread


# Two float32 implementations of the same sums: 2e-5 is some hundred units in the last place.
FLOAT32 = 2e-5
# The same in float64, with more than a thousandfold margin; a wrong formula is off by far more than 1e-3.
FLOAT64 = 1e-12


def relative(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


def randomize(module: nn.Module) -> nn.Module:
    """Every parameter random, biases and norms too, so that none can be left out unnoticed."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        noise = 0.2 * torch.randn(parameter.shape, generator=generator)
        is_norm = parameter.ndim == 1 and name.endswith("weight")
        parameter.data = (1.0 + noise if is_norm else noise).to(parameter.dtype)
    return module.eval()


# OpenAI and OpenCLIP, from files


def read_golden(path: Path):
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        config = json.loads(file.metadata()["config"])
    weights = {name.removeprefix("weights/"): t for name, t in tensors.items() if name.startswith("weights/")}
    return weights, golden_settings(config), tensors


def golden_settings(config) -> Settings:
    if "vision_cfg" not in config:
        return Settings()
    vision = config["vision_cfg"]
    width = vision["width"] * (32 if isinstance(vision["layers"], list) else 1)
    return Settings(
        text_heads=config["text_cfg"]["heads"],
        vision_heads=width // vision["head_width"],
        activation="quick_gelu" if config["quick_gelu"] else "gelu",
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", GOLDEN)
def test_agrees_with_golden_outputs_and_reads_every_tensor(name, dtype, data_dir):
    weights, settings, tensors = read_golden(data_dir / "golden" / f"{name}.safetensors")
    recorder = Recorder(weights)
    image = image_features(recorder, tensors["inputs/pixel_values"], settings, dtype=dtype)
    text = text_features(recorder, tensors["inputs/input_ids"], settings, dtype=dtype)
    assert image.dtype == text.dtype == dtype
    assert relative(image, tensors["outputs/image_features"]) < FLOAT32
    assert relative(text, tensors["outputs/text_features"]) < FLOAT32
    assert unread(recorder) == []


def test_half_precision_weights_are_computed_in_float32(data_dir):
    weights, settings, tensors = read_golden(data_dir / "golden" / "openai_vit_tiny.safetensors")
    half = {name: tensor.half() for name, tensor in weights.items()}
    upcast = {name: tensor.float() for name, tensor in half.items()}
    image, text = tensors["inputs/pixel_values"], tensors["inputs/input_ids"]
    assert torch.equal(image_features(half, image, settings), image_features(upcast, image, settings))
    assert torch.equal(text_features(half, text, settings), text_features(upcast, text, settings))


# transformers

TEXT_CONFIG = dict(
    hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=80, vocab_size=100, bos_token_id=98
) | dict(max_position_embeddings=12, eos_token_id=90, projection_dim=24, pad_token_id=0)
VISION_CONFIG = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=16, patch_size=4
) | dict(projection_dim=24)
CLIP_SETTINGS = Settings(text_heads=3, vision_heads=2, text_pooling="eos", eos_token_id=90)
PIXELS = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
# The highest id (99) lies behind an end (90), and one text has two ends: the poolings differ.
IDS = torch.tensor([[98, 5, 7, 90, 99, 3], [98, 90, 8, 4, 90, 99], [98, 5, 99, 7, 7, 90]])


@pytest.fixture(scope="module")
def clip() -> CLIPModel:
    return randomize(CLIPModel(CLIPConfig(text_config=TEXT_CONFIG, vision_config=VISION_CONFIG, projection_dim=24)))


def to_openai_names(state):
    """transformers' tensors in OpenAI's names: fused query, key and value; projections as matrices."""
    renamed = {
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "vision_model.embeddings.class_embedding": "visual.class_embedding",
        "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
        "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
        "logit_scale": "logit_scale",
    }
    tensors = {theirs: state[ours] for ours, theirs in renamed.items()}
    tensors["text_projection"] = state["text_projection.weight"].T
    tensors["visual.proj"] = state["visual_projection.weight"].T
    for kind in ("weight", "bias"):
        tensors[f"ln_final.{kind}"] = state[f"text_model.final_layer_norm.{kind}"]
        tensors[f"visual.ln_pre.{kind}"] = state[f"vision_model.pre_layrnorm.{kind}"]
        tensors[f"visual.ln_post.{kind}"] = state[f"vision_model.post_layernorm.{kind}"]
        for ours, theirs in (("text_model", ""), ("vision_model", "visual.")):
            for n in range(2):
                source, target = f"{ours}.encoder.layers.{n}", f"{theirs}transformer.resblocks.{n}"
                qkv = [state[f"{source}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
                tensors[f"{target}.attn.in_proj_{kind}"] = torch.cat(qkv)
                tensors[f"{target}.attn.out_proj.{kind}"] = state[f"{source}.self_attn.out_proj.{kind}"]
                tensors[f"{target}.mlp.c_fc.{kind}"] = state[f"{source}.mlp.fc1.{kind}"]
                tensors[f"{target}.mlp.c_proj.{kind}"] = state[f"{source}.mlp.fc2.{kind}"]
                tensors[f"{target}.ln_1.{kind}"] = state[f"{source}.layer_norm1.{kind}"]
                tensors[f"{target}.ln_2.{kind}"] = state[f"{source}.layer_norm2.{kind}"]
    return tensors


def to_custom_text_names(tensors):
    """OpenAI's names in the form of open_clip's CustomTextCLIP."""
    apart = ("visual.", "logit_scale")
    return {name if name.startswith(apart) else f"text.{name}": tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("names", ["transformers", "openai", "custom text"])
def test_agrees_with_transformers_in_all_styles_of_names(names, clip):
    state = clip.state_dict()
    if names != "transformers":
        state = to_openai_names(state)
    if names == "custom text":
        state = to_custom_text_names(state)
    recorder = Recorder(state)
    with torch.no_grad():
        expected_image = clip.get_image_features(PIXELS).pooler_output
        expected_text = clip.get_text_features(IDS).pooler_output
    assert relative(image_features(recorder, PIXELS, CLIP_SETTINGS), expected_image) < FLOAT32
    assert relative(text_features(recorder, IDS, CLIP_SETTINGS), expected_text) < FLOAT32
    assert unread(recorder) == []


def test_agrees_with_old_transformers_configs_that_pool_at_the_highest_id(clip):
    old = randomize(CLIPTextModelWithProjection(CLIPTextConfig(**TEXT_CONFIG | {"eos_token_id": 2})))
    with torch.no_grad():
        expected = old(IDS).text_embeds
    assert relative(text_features(old.state_dict(), IDS, Settings(text_heads=3)), expected) < FLOAT32
    assert relative(text_features(old.state_dict(), IDS, CLIP_SETTINGS), expected) > 0.1


@pytest.mark.parametrize("kind", ["text", "text with projection", "vision", "vision with projection"])
@pytest.mark.parametrize("prefixed", [False, True])
def test_agrees_with_single_towers_of_transformers(kind, prefixed):
    text, vision = CLIPTextConfig(**TEXT_CONFIG), CLIPVisionConfig(**VISION_CONFIG)
    model, output = {
        "text": (CLIPTextModel(text), "pooler_output"),
        "text with projection": (CLIPTextModelWithProjection(text), "text_embeds"),
        "vision": (CLIPVisionModel(vision), "pooler_output"),
        "vision with projection": (CLIPVisionModelWithProjection(vision), "image_embeds"),
    }[kind]
    state, tower = randomize(model).state_dict(), "text_model." if kind.startswith("text") else "vision_model."
    if prefixed and "projection" not in kind:
        # As transformers 4 saved towers without projection.
        state = {tower + name: tensor for name, tensor in state.items()}
        state[tower + "embeddings.position_ids"] = torch.arange(12)[None]
    encode, inputs = (text_features, IDS) if kind.startswith("text") else (image_features, PIXELS)
    recorder = Recorder(state)
    with torch.no_grad():
        expected = model(inputs)[output]
    assert relative(encode(recorder, inputs, CLIP_SETTINGS), expected) < FLOAT32
    assert unread(recorder) == []


# Variants, against torch's own layers in float64


ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


class TorchTower(nn.Module):
    """Blocks and norms of torch; the subclasses put embeddings in front and a pooling behind."""

    def __init__(self, width, heads, activation, norm_name, eps=1e-5):
        super().__init__()
        self.norm_name = norm_name
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 2 * width, 0.0, ACTIVATIONS[activation], eps, batch_first=True, norm_first=True
            )
            for _ in range(2)
        )
        self.final_norm = nn.LayerNorm(width, eps)

    def tensors(self):
        """In OpenAI's names, without prefix."""
        pieces = {
            "blocks.": "transformer.resblocks.",
            "self_attn.": "attn.",
            "linear1.": "mlp.c_fc.",
            "linear2.": "mlp.c_proj.",
            "norm1.": "ln_1.",
            "norm2.": "ln_2.",
            "final_norm.": f"{self.norm_name}.",
        }
        tensors = {}
        for name, tensor in self.state_dict().items():
            for piece, openai_piece in pieces.items():
                name = name.replace(piece, openai_piece)
            tensors[name] = tensor
        return tensors


class TorchText(TorchTower):
    def __init__(self, activation="gelu", causal=True, projection="matrix", eps=1e-5):
        super().__init__(40, 5, activation, "ln_final", eps)
        self.causal = causal
        self.token_embedding = nn.Embedding(100, 40)
        self.positional_embedding = nn.Parameter(torch.empty(6, 40))
        if projection == "matrix":
            self.text_projection = nn.Parameter(torch.empty(40, 24))
        elif projection == "linear":
            self.text_projection = nn.Linear(40, 24)

    def forward(self, input_ids, rows):
        x = self.token_embedding(input_ids) + self.positional_embedding
        mask = nn.Transformer.generate_square_subsequent_mask(6, dtype=x.dtype) if self.causal else None
        for block in self.blocks:
            x = block(x, mask)
        pooled = self.final_norm(x)[torch.arange(len(x)), rows]
        projection = getattr(self, "text_projection", None)
        if isinstance(projection, nn.Linear):
            return projection(pooled)
        return pooled if projection is None else pooled @ projection


class TorchVit(TorchTower):
    def __init__(self, activation="gelu", width=48, heads=3, pre_norm=True):
        super().__init__(width, heads, activation, "ln_post")
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(17, width))
        self.conv1 = nn.Conv2d(3, width, 4, 4, bias=False)
        self.ln_pre = nn.LayerNorm(width) if pre_norm else nn.Identity()
        self.proj = nn.Parameter(torch.empty(width, 24))

    def forward(self, pixel_values, pooling="tok", norm_first=True):
        x = self.conv1(pixel_values).flatten(2).mT
        x = torch.cat([self.class_embedding.repeat(len(x), 1, 1), x], 1) + self.positional_embedding
        x = self.ln_pre(x)
        for block in self.blocks:
            x = block(x)
        if norm_first:
            x = self.final_norm(x)
        x = x[:, 0] if pooling == "tok" else x[:, 1:].mean(1)
        return (x if norm_first else self.final_norm(x)) @ self.proj


@pytest.mark.parametrize("prefix", ["", "text."])
@pytest.mark.parametrize("projection", ["matrix", "linear", "none"])
@pytest.mark.parametrize("causal", [True, False])
def test_text_variants_agree_with_torch_layers(causal, projection, prefix):
    tower = randomize(TorchText(causal=causal, projection=projection).double())
    rows = {"argmax": [4, 5, 2], "eos": [3, 1, 5], "first": [0, 0, 0], "last": [5, 5, 5]}
    tensors = Recorder({prefix + name: tensor for name, tensor in tower.tensors().items()})
    for pooling, positions in rows.items():
        settings = Settings(text_heads=5, activation="gelu", causal=causal, text_pooling=pooling, eos_token_id=90)
        with torch.no_grad():
            expected = tower(IDS, positions)
        assert relative(text_features(tensors, IDS, settings, dtype=torch.float64), expected) < FLOAT64, pooling
    assert unread(tensors) == []


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_epsilon_agree_with_torch_layers(activation):
    # An epsilon so large that taking another would show.
    tower = randomize(TorchText(activation, eps=0.05).double())
    settings = Settings(text_heads=5, activation=activation, layer_norm_eps=0.05)
    with torch.no_grad():
        expected = tower(IDS, [4, 5, 2])
    found = text_features(tower.tensors(), IDS, settings, dtype=torch.float64)
    assert relative(found, expected) < FLOAT64
    others = [
        Settings(text_heads=5, activation=name, layer_norm_eps=0.05) for name in ACTIVATIONS if name != activation
    ]
    for other in [*others, Settings(text_heads=5, activation=activation)]:
        assert relative(text_features(tower.tensors(), IDS, other, dtype=torch.float64), expected) > 1e-6


# The last three are OpenCLIP's head widths of H/14 (80), g/14 (88) and bigG/14 (104).
@pytest.mark.parametrize("width, heads", [(48, 3), (128, None), (160, 2), (176, 2), (208, 2)])
@pytest.mark.parametrize("pooling", ["tok", "avg"])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("pre_norm", [True, False])
def test_vit_variants_agree_with_torch_layers(width, heads, pooling, norm_first, pre_norm):
    tower = randomize(TorchVit("gelu", width, heads or width // 64, pre_norm).double())
    tensors = Recorder({"visual." + name: tensor for name, tensor in tower.tensors().items()})
    settings = Settings(vision_heads=heads, activation="gelu", vision_pooling=pooling, norm_before_pooling=norm_first)
    with torch.no_grad():
        expected = tower(PIXELS.double(), pooling, norm_first)
    assert relative(image_features(tensors, PIXELS, settings, dtype=torch.float64), expected) < FLOAT64
    assert unread(tensors) == []


def test_layer_scale_equals_scaled_output_projections():
    tensors = randomize(TorchText().double()).tensors()
    scales = {f"{name}.gamma": torch.rand(40).double() + 0.5 for name in ("ls_1", "ls_2")}
    scaled, folded = dict(tensors), dict(tensors)
    for n in range(2):
        block = f"transformer.resblocks.{n}"
        scaled.update({f"{block}.{name}": scale for name, scale in scales.items()})
        for name, layer in (("ls_1", "attn.out_proj"), ("ls_2", "mlp.c_proj")):
            scale = scales[f"{name}.gamma"]
            folded[f"{block}.{layer}.weight"] = scale[:, None] * tensors[f"{block}.{layer}.weight"]
            folded[f"{block}.{layer}.bias"] = scale * tensors[f"{block}.{layer}.bias"]
    encode = partial(text_features, input_ids=IDS, settings=Settings(text_heads=5), dtype=torch.float64)
    recorder = Recorder(scaled)
    assert relative(encode(recorder), encode(folded)) < FLOAT64
    assert unread(recorder) == []
    assert relative(encode(tensors), encode(folded)) > 1e-3


# Variants, against open_clip


VIT_CFG = dict(layers=2, width=64, head_width=32, patch_size=4, image_size=16)
TEXT_CFG = dict(context_length=6, vocab_size=100, width=48, heads=3, layers=2)
OPEN_CLIP_VARIANTS = {
    "plain": ({}, {}, {}),
    "avg": (dict(pool_type="avg"), {}, dict(vision_pooling="avg")),
    "avg, norm after": (
        dict(pool_type="avg", final_ln_after_pool=True),
        {},
        dict(vision_pooling="avg", norm_before_pooling=False),
    ),
    "no ln_pre, sin_cos_2d": (dict(no_ln_pre=True, pos_embed_type="sin_cos_2d"), {}, {}),
    "CLIPA": (
        dict(no_ln_pre=True, pool_type="avg", final_ln_after_pool=True),
        dict(no_causal_mask=True, pool_type="last", act_kwargs={"approximate": "tanh"}),
        dict(vision_pooling="avg", norm_before_pooling=False, causal=False, text_pooling="last"),
    ),
    "first": ({}, dict(no_causal_mask=True, pool_type="first"), dict(causal=False, text_pooling="first")),
    "eos": ({}, dict(pool_type="eos", eos_id=90), dict(text_pooling="eos", eos_token_id=90)),
    "LayerScale": (dict(ls_init_value=0.5), dict(ls_init_value=0.5), {}),
    "projection with bias": ({}, dict(proj_bias=True), {}),
    "no projection": ({}, dict(proj_type="none"), {}),
}


@pytest.mark.peers
@pytest.mark.parametrize("class_name", ["CLIP", "CustomTextCLIP"])
@pytest.mark.parametrize("variant", OPEN_CLIP_VARIANTS)
def test_variants_agree_with_open_clip(variant, class_name):
    open_clip = pytest.importorskip("open_clip", reason="needs open_clip_torch")
    vision, text, changes = OPEN_CLIP_VARIANTS[variant]
    model_class = getattr(open_clip, class_name)
    model = randomize(model_class(48 if variant == "no projection" else 24, VIT_CFG | vision, TEXT_CFG | text))
    recorder = Recorder(model.state_dict())
    with torch.no_grad():
        expected_image, expected_text = model.encode_image(PIXELS), model.encode_text(IDS)
    settings = Settings(**dict(text_heads=3, vision_heads=2, activation="gelu") | changes)
    text_settings = settings
    if "act_kwargs" in text:
        text_settings = Settings(**dict(text_heads=3, activation="gelu_tanh") | changes)
    assert relative(image_features(recorder, PIXELS, settings), expected_image) < FLOAT32
    assert relative(text_features(recorder, IDS, text_settings), expected_text) < FLOAT32
    assert unread(recorder) == []


# How tensors are read


class LazyTensors(Mapping):
    """Loads a tensor anew at every request, as from a file, and counts those that are still alive."""

    def __init__(self, tensors):
        self.arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        self.requests = Counter()
        self.alive = self.most_alive = 0

    def __getitem__(self, name):
        array = self.arrays[name].copy()
        self.requests[name] += 1
        self.alive += 1
        self.most_alive = max(self.most_alive, self.alive)
        # The array lives as long as any tensor or view upon it.
        weakref.finalize(array, self._release)
        return torch.from_numpy(array)

    def _release(self):
        self.alive -= 1

    def __iter__(self):
        return iter(self.arrays)

    def __len__(self):
        return len(self.arrays)


@pytest.mark.parametrize("name", ["openai_resnet_tiny", "openai_vit_tiny"])
def test_tensors_are_read_once_and_let_go(name, data_dir):
    weights, settings, tensors = read_golden(data_dir / "golden" / f"{name}.safetensors")
    lazy = LazyTensors(weights)
    image_features(lazy, tensors["inputs/pixel_values"], settings)
    text_features(lazy, tensors["inputs/input_ids"], settings)
    assert set(lazy.requests.values()) == {1}
    assert len(lazy.requests) > 50
    assert lazy.alive == 0
    # A normalisation's weight, bias, mean and variance.
    assert lazy.most_alive <= 4


class CastShapes(TorchDispatchMode):
    """Collects the shapes of all tensors that are cast."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default:
            self.shapes.add(tuple(result.shape))
        return result


def test_token_embeddings_are_cast_after_indexing():
    tensors = randomize(TorchText()).half().tensors()
    with CastShapes() as casts:
        text_features(tensors, IDS, Settings(text_heads=5))
    assert (3, 6, 40) in casts.shapes
    assert (100, 40) not in casts.shapes


def test_unread_lists_what_took_no_part(data_dir):
    weights, settings, tensors = read_golden(data_dir / "golden" / "openclip_vit_siglip_head_tiny.safetensors")
    constants = ("input_resolution", "context_length", "vocab_size", "attn_mask")
    recorder = Recorder(weights | dict.fromkeys(constants, torch.ones(())) | {"visual.left_over": torch.ones(2)})
    text_features(recorder, tensors["inputs/input_ids"], settings)
    of_images = [name for name in weights if name.startswith("visual.")]
    assert unread(recorder) == sorted([*of_images, "visual.left_over"])


def test_is_independent_of_the_library():
    script = "import sys, conversion.reference; print([n for n in ('hfclip', 'transformers') if n in sys.modules])"
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Errors


@pytest.fixture(scope="module")
def openai_tensors(clip):
    return to_openai_names(clip.state_dict())


@pytest.mark.parametrize(
    "name",
    [
        "cls_embedding",
        "transformer.resblocks.1.attn.ln_q.weight",
        "transformer.resblocks.0.attn.logit_scale",
        "extra.weight",
    ],
)
def test_rejects_unknown_text_tensors_by_name(name, openai_tensors):
    with pytest.raises(ValueError, match=f"'{name}'"):
        text_features(openai_tensors | {name: torch.ones(1)}, IDS, CLIP_SETTINGS)
    with pytest.raises(ValueError, match=f"'text.{name}'"):
        text_features(to_custom_text_names(openai_tensors | {name: torch.ones(1)}), IDS, CLIP_SETTINGS)


@pytest.mark.parametrize("name", ["attn_pool.q", "transformer.resblocks.0.ln_attn.weight", "conv1.bias"])
def test_rejects_unknown_image_tensors_by_name(name, openai_tensors):
    with pytest.raises(ValueError, match=f"'visual.{name}'"):
        image_features(openai_tensors | {f"visual.{name}": torch.ones(1)}, PIXELS, CLIP_SETTINGS)


def test_rejects_unknown_resnet_tensors_by_name(data_dir):
    weights, settings, tensors = read_golden(data_dir / "golden" / "openai_resnet_tiny.safetensors")
    with pytest.raises(ValueError, match="'visual.layer1.0.se.weight'"):
        image_features(
            weights | {"visual.layer1.0.se.weight": torch.ones(1)}, tensors["inputs/pixel_values"], settings
        )


def test_rejects_unknown_transformers_tensors_by_name(clip):
    with pytest.raises(ValueError, match="'text_model.encoder.layers.0.self_attn.q_norm.weight'"):
        name = "text_model.encoder.layers.0.self_attn.q_norm.weight"
        text_features(clip.state_dict() | {name: torch.ones(1)}, IDS, CLIP_SETTINGS)


@pytest.mark.parametrize(
    "missing", ["ln_final.bias", "positional_embedding", "transformer.resblocks.0.mlp.c_fc.weight"]
)
def test_rejects_missing_tensors_by_name(missing, openai_tensors):
    tensors = {name: tensor for name, tensor in openai_tensors.items() if name != missing}
    with pytest.raises(ValueError, match=f"'{missing}'"):
        text_features(tensors, IDS, CLIP_SETTINGS)


def test_rejects_a_gap_between_blocks(openai_tensors):
    tensors = {
        name: tensor for name, tensor in openai_tensors.items() if "visual.transformer.resblocks.0." not in name
    }
    with pytest.raises(ValueError, match=r"transformer\.resblocks\.0\.ln_1\.weight"):
        image_features(tensors, PIXELS, CLIP_SETTINGS)


def test_rejects_checkpoints_without_a_tower_or_with_two(openai_tensors):
    with pytest.raises(ValueError, match="found none.*module."):
        text_features({f"module.{name}": tensor for name, tensor in openai_tensors.items()}, IDS, CLIP_SETTINGS)
    with pytest.raises(ValueError, match="found none"):
        image_features({"visual.trunk.patch_embed.proj.weight": torch.ones(1)}, PIXELS, CLIP_SETTINGS)
    with pytest.raises(ValueError, match="'token_embedding.weight', 'text.token_embedding.weight'"):
        text_features(openai_tensors | to_custom_text_names(openai_tensors), IDS, CLIP_SETTINGS)


def test_rejects_inputs_that_do_not_fit(openai_tensors):
    with pytest.raises(ValueError, match=r"\(16, 20\) pixels give 20 patches.*positions for 16"):
        image_features(openai_tensors, torch.zeros(1, 3, 16, 20), CLIP_SETTINGS)
    with pytest.raises(ValueError, match="13 tokens.*context length of 12"):
        text_features(openai_tensors, torch.full((1, 13), 90), CLIP_SETTINGS)
    for wrong in (-1, 100):
        with pytest.raises(ValueError, match=f"{wrong}.*100 tokens"):
            text_features(openai_tensors, torch.tensor([[wrong, 90]]), CLIP_SETTINGS)
    with pytest.raises(ValueError, match=r"No end-of-text token 90 in the texts \[1\]"):
        text_features(openai_tensors, torch.tensor([[1, 90], [1, 2]]), CLIP_SETTINGS)


def test_rejects_images_of_another_size_for_a_resnet(data_dir):
    weights, settings, _ = read_golden(data_dir / "golden" / "openai_resnet_tiny.safetensors")
    with pytest.raises(ValueError, match="16 patches.*positions for 9"):
        image_features(weights, torch.zeros(1, 3, 128, 128), settings)


def test_rejects_heads_that_do_not_fit(openai_tensors):
    with pytest.raises(ValueError, match="width of 48 is no multiple of 64"):
        text_features(openai_tensors, IDS, Settings())
    with pytest.raises(ValueError, match="3 heads do not divide a width of 32"):
        image_features(openai_tensors, PIXELS, Settings(vision_heads=3))


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(activation="relu"), "activation is 'relu'"),
        (dict(text_pooling="mean"), "text_pooling is 'mean'"),
        (dict(vision_pooling="none"), "vision_pooling is 'none'"),
        (dict(text_pooling="eos"), "needs eos_token_id"),
    ],
)
def test_rejects_unknown_settings(wrong, message):
    with pytest.raises(ValueError, match=message):
        Settings(**wrong)
