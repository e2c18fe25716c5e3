"""OpenCLIP's checkpoints with towers of other libraries become model folders by the command line.

The sources are written here: models of transformers with random weights, under OpenCLIP's names by a table of this file,
and what they have to compute is computed by those models."""

import importlib.util
import json
import re
from functools import partial

import pytest
import torch
from conversion_utils import openai_shapes, relative, run_script, save
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoProcessor,
    BertConfig,
    BertModel,
    GPT2Config,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    SiglipTextConfig,
    SiglipTextModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from conversion.reference import Settings, image_features
from hfclip import HFCLIPModel
from hfclip.foreign import towers
from hfclip.foreign.towers import SIGLIP_TANH, SIGLIP_VITS


FLOAT64 = 1e-12  # relative: two orders of summation differ by about 1e-15
WIDTH, CONTEXT, VOCABULARY, PAD = 48, 10, 60, 1
TIMM_IS_INSTALLED = importlib.util.find_spec("timm") is not None


@pytest.fixture(autouse=True)
def small_siglip(monkeypatch):
    """SigLIP ViTs that timm does not have, small enough for a test; where timm is installed, it is taught them."""
    monkeypatch.setitem(SIGLIP_VITS, "tiny", (WIDTH, 12))
    monkeypatch.setitem(SIGLIP_VITS, "tinyopt", (WIDTH, 12))
    monkeypatch.setattr(towers, "SIGLIP_TANH", re.compile(f"vit_tinyopt.*|{SIGLIP_TANH.pattern}"))
    if TIMM_IS_INSTALLED:
        teach_timm("vit_tiny_patch16_siglip_50", torch.nn.GELU)
        teach_timm("vit_tinyopt_patch16_siglip_50", partial(torch.nn.GELU, approximate="tanh"))


def teach_timm(name, act_layer):
    from timm.models import is_model, register_model
    from timm.models.vision_transformer import VisionTransformer

    def build(num_classes=1000, global_pool="map", **_):
        options = {"num_classes": num_classes, "global_pool": global_pool}
        return VisionTransformer(img_size=50, patch_size=16, embed_dim=WIDTH, depth=2, num_heads=12, mlp_ratio=100 / WIDTH, class_token=False, act_layer=act_layer, **options)  # fmt: skip

    build.__name__ = name
    if not is_model(name):
        register_model(build)


def randomized(model):
    """Every parameter drawn anew, so that none is zero or one, and nothing dropped."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return model.eval().requires_grad_(False)


def siglip_models(act="gelu", text_width=WIDTH):
    vision = SiglipVisionConfig(hidden_size=WIDTH, intermediate_size=100, num_hidden_layers=2, num_attention_heads=12, image_size=50, patch_size=16, hidden_act=act)  # fmt: skip
    text = SiglipTextConfig(vocab_size=VOCABULARY, hidden_size=text_width, intermediate_size=70, num_hidden_layers=2, num_attention_heads=3, max_position_embeddings=CONTEXT, projection_size=WIDTH, hidden_act=act)  # fmt: skip
    return randomized(SiglipVisionModel(vision)), randomized(SiglipTextModel(text))


def siglip_settings(kind="tiny", text_width=WIDTH, **text_cfg):
    text = {"context_length": CONTEXT, "vocab_size": VOCABULARY, "width": text_width, "heads": 3, "layers": 2}
    text |= {"no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}
    if kind == "tinyopt":
        text["act_kwargs"] = {"approximate": "tanh"}
    vision = {"image_size": 50, "timm_model_name": f"vit_{kind}_patch16_siglip_50", "timm_pool": "map", "timm_proj": "none"}  # fmt: skip
    return {"embed_dim": WIDTH, "custom_text": True, "vision_cfg": vision, "text_cfg": {**text, **text_cfg}}


def timm_names(state):
    """timm's SigLIP ViT, from transformers'."""
    trunk = {}
    for n in {name.split(".")[2] for name in state if name.startswith("encoder.layers.")}:
        layer, block = f"encoder.layers.{n}.", f"blocks.{n}."
        for kind in ("weight", "bias"):
            trunk[f"{block}attn.qkv.{kind}"] = torch.cat([state[f"{layer}self_attn.{p}_proj.{kind}"] for p in "qkv"])
            trunk[f"{block}attn.proj.{kind}"] = state[f"{layer}self_attn.out_proj.{kind}"]
            for ours, theirs in (("norm1", "layer_norm1"), ("norm2", "layer_norm2"), ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2")):  # fmt: skip
                trunk[f"{block}{ours}.{kind}"] = state[f"{layer}{theirs}.{kind}"]
    for kind in ("weight", "bias"):
        fused = state[f"head.attention.in_proj_{kind}"]
        trunk[f"attn_pool.q.{kind}"], trunk[f"attn_pool.kv.{kind}"] = fused[:WIDTH], fused[WIDTH:]
        trunk[f"attn_pool.proj.{kind}"] = state[f"head.attention.out_proj.{kind}"]
        trunk[f"attn_pool.norm.{kind}"] = state[f"head.layernorm.{kind}"]
        trunk[f"attn_pool.mlp.fc1.{kind}"] = state[f"head.mlp.fc1.{kind}"]
        trunk[f"attn_pool.mlp.fc2.{kind}"] = state[f"head.mlp.fc2.{kind}"]
        trunk[f"norm.{kind}"] = state[f"post_layernorm.{kind}"]
        trunk[f"patch_embed.proj.{kind}"] = state[f"embeddings.patch_embedding.{kind}"]
    trunk["attn_pool.latent"] = state["head.probe"]
    trunk["pos_embed"] = state["embeddings.position_embedding.weight"][None]
    return {f"visual.trunk.{name}": tensor.clone() for name, tensor in trunk.items()}


def openclip_text_names(state, layers=2):
    """CustomTextCLIP's text tower, from SiglipTextModel."""
    text = {"token_embedding.weight": state["embeddings.token_embedding.weight"]}
    text["positional_embedding"] = state["embeddings.position_embedding.weight"]
    pairs = (("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"), ("attn.out_proj", "self_attn.out_proj"))
    for kind in ("weight", "bias"):
        text[f"ln_final.{kind}"] = state[f"final_layer_norm.{kind}"]
        text[f"text_projection.{kind}"] = state[f"head.{kind}"]
        for n in range(layers):
            block, layer = f"transformer.resblocks.{n}.", f"encoder.layers.{n}."
            text[f"{block}attn.in_proj_{kind}"] = torch.cat(
                [state[f"{layer}self_attn.{p}_proj.{kind}"] for p in "qkv"]
            )
            for ours, theirs in (*pairs, ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2")):
                text[f"{block}{ours}.{kind}"] = state[f"{layer}{theirs}.{kind}"]
    return {f"text.{name}": tensor.clone() for name, tensor in text.items()}


SCALES = {"logit_scale": torch.tensor(2.0), "logit_bias": torch.tensor(-9.0)}


def siglip_source(folder, vision, text, settings, **weights):
    state = {**timm_names(vision.state_dict()), **openclip_text_names(text.state_dict()), **SCALES, **weights}
    (folder / "model.json").write_text(json.dumps(settings))
    return save(folder / "model.safetensors", {name: tensor for name, tensor in state.items() if tensor is not None})


def convert(folder, source, *options, status=0):
    arguments = (source, folder / "out", "--model", folder / "model.json", *options)
    result = run_script("convert_openclip", *arguments, status=status)
    return result if status else HFCLIPModel.from_pretrained(folder / "out", dtype=torch.float64).eval()


def texts():
    """Ids of three texts, padded to the context length."""
    ids = torch.randint(2, VOCABULARY, (3, CONTEXT), generator=torch.Generator().manual_seed(1))
    ids[0, 3:] = ids[1, 7:] = PAD
    return ids


def save_tokenizer(folder, **special):
    """A tokenizer of words `w5` ... that adds an end token, id 2."""
    vocabulary = {"<unk>": 0, "<pad>": PAD, "</s>": 2, **{f"w{n}": n for n in range(3, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 2)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="</s>")
    fast.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind, act, text_width", [("tiny", "gelu", WIDTH), ("tinyopt", "gelu_pytorch_tanh", 36)])
def test_siglip_computes_what_transformers_does(kind, act, text_width, tmp_path):
    vision, text = siglip_models(act, text_width)
    model = convert(tmp_path, siglip_source(tmp_path, vision, text, siglip_settings(kind, text_width)))
    assert model.config.vision_config.model_type == "siglip_vision_model"
    assert model.config.text_config.model_type == "siglip_text_model"
    assert model.logit_bias.item() == -9
    pixels = torch.randn(2, 3, 50, 50, dtype=torch.float64)
    with torch.no_grad():
        assert relative(model.encode_image(pixels, normalize=False), vision.double()(pixels).pooler_output) < FLOAT64
        assert relative(model.encode_text(texts(), normalize=False), text.double()(texts()).pooler_output) < FLOAT64


def test_siglip_reads_its_padding_however_texts_come(tmp_path):
    vision, text = siglip_models()
    source = siglip_source(tmp_path, vision, text, siglip_settings())
    model = convert(tmp_path, source, "--tokenizer", save_tokenizer(tmp_path / "tokenizer"))
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    sentences = ["w5 w6", "w7", " ".join(f"w{n}" for n in range(10, 40))]
    full = processor(text=sentences, padding="max_length", return_tensors="pt")
    assert full["input_ids"].shape == (3, CONTEXT)  # the long one is cut
    with torch.no_grad():
        expected = text.double()(full["input_ids"]).pooler_output
        masked = text(**full).pooler_output
        short = processor(text=sentences[:2], return_tensors="pt")
        assert short["input_ids"].shape == (2, 3)
        assert relative(masked[:2], expected[:2]) > 0.01  # a mask would change what it computes
        assert relative(model.encode_text(**full, normalize=False), expected) < FLOAT64
        assert relative(model.encode_text(**short, normalize=False), expected[:2]) < FLOAT64
        assert relative(model.get_text_features(**short).pooler_output, expected[:2]) < FLOAT64


def test_siglip_without_text_projection(tmp_path):
    vision, text = siglip_models()
    settings = siglip_settings(proj_bias=False, proj_type="none")
    none = {f"text.text_projection.{kind}": None for kind in ("weight", "bias")}
    model = convert(tmp_path, siglip_source(tmp_path, vision, text, settings, **none))
    with torch.no_grad():
        expected = text.double()(texts()).last_hidden_state[:, -1]
        assert relative(model.encode_text(texts(), normalize=False), expected) < FLOAT64


def test_siglip_has_its_own_pixels(tmp_path):
    source = siglip_source(tmp_path, *siglip_models(), siglip_settings())
    convert(tmp_path, source)
    written = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert written["image_mean"] == written["image_std"] == [0.5] * 3
    assert written["size"] == {"height": 50, "width": 50}


@pytest.mark.parametrize(
    "vision_cfg, text_cfg, expected",
    [
        ({}, dict(no_causal_mask=False), "Only SigLIP's text tower has it"),
        ({}, dict(pool_type="first"), "Only SigLIP's text tower has it"),
        ({}, dict(embed_cls=True), "embed_cls: a class token after a text that is not causal"),
        (dict(timm_window=7), {}, "timm_window: an unknown setting"),
        (dict(timm_pool="abs_attn"), {}, "timm_pool 'abs_attn'"),
        (dict(timm_pool="rot_attn"), {}, "timm_pool 'rot_attn'"),
        (dict(timm_model_name="vit_huge_patch16_siglip_224"), {}, "'vit_huge_patch16_siglip_224'"),
        (dict(timm_model_name="vit_base_patch16_siglip_224"), {}, "has a width of 768, and 48 in the weights"),
        (dict(image_size=64), {}, "make 4 rows, and 3 in the weights"),
    ],
)
def test_rejects_siglip_towers_without_a_counterpart(vision_cfg, text_cfg, expected, tmp_path):
    settings = siglip_settings()
    settings["vision_cfg"] |= vision_cfg
    settings["text_cfg"] |= text_cfg
    source = siglip_source(tmp_path, *siglip_models(), settings)
    assert expected in convert(tmp_path, source, status=2).error
    assert not (tmp_path / "out").exists()


def test_rejects_tensors_that_siglip_does_not_have(tmp_path):
    extra = {"visual.trunk.blocks.0.attn.q_norm.weight": torch.ones(4)}
    source = siglip_source(tmp_path, *siglip_models(), siglip_settings(), **extra)
    assert "not those of timm's" in convert(tmp_path, source, status=2).error


@pytest.mark.skipif(not TIMM_IS_INSTALLED, reason="needs timm")
@pytest.mark.parametrize("kind", ["base", "large", "so400m", "giantopt"])
def test_siglip_sizes_are_timms(kind):
    import timm

    name = next(name for name in timm.list_models("vit_*_siglip_*") if name.startswith(f"vit_{kind}_") and "gap" not in name)  # fmt: skip
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    width, heads, activation = towers.siglip_kind(name)
    act = model.blocks[0].mlp.act
    is_tanh = getattr(act, "approximate", "none") == "tanh" or "Tanh" in type(act).__name__
    assert (width, heads) == (model.embed_dim, model.blocks[0].attn.num_heads)
    assert heads == model.attn_pool.num_heads and is_tanh == (activation == "gelu_tanh")
    assert model.norm.eps == model.attn_pool.norm.eps == 1e-6


# Text towers of transformers


TEXT_MODELS = {
    "bert": (BertConfig, BertModel),
    "roberta": (RobertaConfig, RobertaModel),
    "xlm-roberta": (XLMRobertaConfig, XLMRobertaModel),
}
POOLERS = {"mean_pooler": "mean", "cls_pooler": "pooler", "cls_last_hidden_state_pooler": "cls"}
IMAGE = {"image_size": 32, "layers": 1, "width": 48, "head_width": 12, "patch_size": 8}


def text_tower(model_type, pooler):
    make_config, make_model = TEXT_MODELS[model_type]
    special = {"pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": 2}
    config = make_config(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40, max_position_embeddings=80, **special)  # fmt: skip
    return randomized(make_model(config, add_pooling_layer=pooler == "cls_pooler"))


def hugging_face_source(folder, tower, pooler, projection, embed_dim=24):
    """A checkpoint with OpenCLIP's ViT and `tower`; `embed_dim` is the tower's width if there is no projection."""
    generator = torch.Generator().manual_seed(2)
    shapes = openai_shapes(embed_dim, (48, 4, 1), 1, 48, 32, patch=8)
    state = {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items() if name.startswith("visual.")}  # fmt: skip
    state |= {f"text.transformer.{name}": tensor for name, tensor in tower.state_dict().items()}
    # Older versions of transformers wrote this counter.
    state["text.transformer.embeddings.position_ids"] = torch.arange(80)[None]
    if projection == "linear":
        state["text.proj.weight"] = 0.2 * torch.randn(embed_dim, 32, generator=generator)
    elif projection == "mlp":
        state["text.proj.0.weight"] = 0.2 * torch.randn((32 + embed_dim) // 2, 32, generator=generator)
        state["text.proj.2.weight"] = 0.2 * torch.randn(embed_dim, (32 + embed_dim) // 2, generator=generator)
    tower.config.save_pretrained(folder / "text")
    text = {"hf_model_name": "a/name", "hf_pooler_type": pooler, "hf_proj_type": projection}  # fmt: skip
    settings = {"embed_dim": embed_dim, "vision_cfg": IMAGE, "text_cfg": text}
    (folder / "model.json").write_text(json.dumps(settings))
    return save(folder / "model.pt", {**state, "logit_scale": SCALES["logit_scale"]}), state


@pytest.mark.parametrize("model_type", TEXT_MODELS)
@pytest.mark.parametrize("pooler", POOLERS)
def test_text_towers_of_transformers_compute_what_they_did(model_type, pooler, tmp_path):
    tower = text_tower(model_type, pooler)
    source, state = hugging_face_source(tmp_path, tower, pooler, "linear")
    model = convert(tmp_path, source, "--text-model", tmp_path / "text")
    assert model.config.text_config.model_type == model_type and model.config.text_pooling == POOLERS[pooler]
    pixels, ids = torch.randn(2, 3, 32, 32), texts()
    settings = Settings(vision_heads=4, activation="gelu")
    expected = image_features(state, pixels, settings, dtype=torch.float64)
    with torch.no_grad():
        assert relative(model.encode_image(pixels.double(), normalize=False), expected) < FLOAT64
        # By hand: each text alone and without its padding, so that no mask takes part.
        for row, length in zip(ids, (3, 7, CONTEXT)):
            outputs = tower.double()(row[None, :length])
            states = outputs.last_hidden_state
            pooled = {"mean": states.mean(1), "cls": states[:, 0], "pooler": outputs.pooler_output}[POOLERS[pooler]]
            expected = pooled @ state["text.proj.weight"].double().t()
            assert relative(model.encode_text(row[None], normalize=False), expected) < FLOAT64


def test_text_tower_without_projection(tmp_path):
    tower = text_tower("roberta", "mean_pooler")
    source, _ = hugging_face_source(tmp_path, tower, "mean_pooler", None, embed_dim=32)
    model = convert(tmp_path, source, "--text-model", tmp_path / "text")
    with torch.no_grad():
        expected = tower.double()(texts()[2:]).last_hidden_state.mean(1)
        assert relative(model.encode_text(texts()[2:], normalize=False), expected) < FLOAT64


def test_text_tower_with_a_projection_of_two_layers(tmp_path):
    tower = text_tower("roberta", "mean_pooler")
    source, state = hugging_face_source(tmp_path, tower, "mean_pooler", "mlp")
    model = convert(tmp_path, source, "--text-model", tmp_path / "text")
    with torch.no_grad():
        hidden = tower.double()(texts()[2:]).last_hidden_state.mean(1) @ state["text.proj.0.weight"].double().t()
        expected = torch.nn.functional.gelu(hidden) @ state["text.proj.2.weight"].double().t()
        assert relative(model.encode_text(texts()[2:], normalize=False), expected) < FLOAT64


def test_text_tower_gets_its_tokenizer(tmp_path):
    source, _ = hugging_face_source(tmp_path, text_tower("roberta", "mean_pooler"), "mean_pooler", "linear")
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    convert(tmp_path, source, "--text-model", tmp_path / "text", "--tokenizer", tokenizer)
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    # OpenCLIP's context of 77 tokens holds, not the 80 positions of the tower.
    assert processor(text="w5 " * 200, return_tensors="pt")["input_ids"].shape == (1, 77)


def test_rejects_poolers_of_text_towers_without_a_counterpart(tmp_path):
    source, _ = hugging_face_source(tmp_path, text_tower("bert", "mean_pooler"), "max_pooler", "linear")
    error = convert(tmp_path, source, "--text-model", tmp_path / "text", status=2).error
    assert "hf_pooler_type 'max_pooler': none of" in error


def test_rejects_other_text_towers(tmp_path):
    source, _ = hugging_face_source(tmp_path, text_tower("bert", "mean_pooler"), "mean_pooler", "linear")
    GPT2Config().save_pretrained(tmp_path / "gpt")
    error = convert(tmp_path, source, "--text-model", tmp_path / "gpt", status=2).error
    assert "a text tower gpt2; expected bert, roberta, xlm-roberta, mt5, m2m_100" in error


def test_rejects_a_text_tower_without_config(tmp_path):
    source, _ = hugging_face_source(tmp_path, text_tower("bert", "mean_pooler"), "mean_pooler", "linear")
    assert "Pass --text-model FOLDER" in convert(tmp_path, source, status=2).error
    assert "Pass --text-model FOLDER" in convert(tmp_path, source, "--text-model", tmp_path, status=2).error


# Other towers of timm


@pytest.mark.skipif(TIMM_IS_INSTALLED, reason="timm is installed")
def test_says_that_other_image_towers_need_timm(tmp_path):
    settings = siglip_settings()
    settings["vision_cfg"] |= dict(timm_model_name="convnext_base", timm_pool="", timm_proj="linear")
    source = siglip_source(tmp_path, *siglip_models(), settings)
    assert "'convnext_base': it needs timm" in convert(tmp_path, source, status=2).error


@pytest.mark.skipif(not TIMM_IS_INSTALLED, reason="needs timm")
@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_vit_relpos", "test_resnet"])
def test_towers_of_timm_compute_what_they_did(name, tmp_path):
    import timm

    trunk = timm.create_model(name)
    trunk.reset_classifier(0)
    trunk = randomized(trunk).double()
    _, text = siglip_models()
    projection = torch.randn(WIDTH, trunk.num_features)
    settings = siglip_settings()
    settings["vision_cfg"] = dict(image_size=160, timm_model_name=name, timm_pool="", timm_proj="linear")
    (tmp_path / "model.json").write_text(json.dumps(settings))
    state = {f"visual.trunk.{key}": tensor for key, tensor in trunk.float().state_dict().items()}
    state |= {"visual.head.proj.weight": projection, **openclip_text_names(text.state_dict()), **SCALES}
    model = convert(tmp_path, save(tmp_path / "model.pt", state))
    assert model.config.vision_config.model_type == "timm_wrapper"
    pixels = torch.randn(2, 3, 160, 160, dtype=torch.float64)
    with torch.no_grad():
        expected = trunk.double()(pixels) @ projection.double().t()
        assert relative(model.encode_image(pixels, normalize=False), expected) < FLOAT64


@pytest.mark.skipif(not TIMM_IS_INSTALLED, reason="needs timm")
@pytest.mark.parametrize("name, pool", [("test_vit", "token"), ("test_vit", "avg"), ("test_convnext", "avg")])
def test_the_classifier_of_a_timm_tower_becomes_the_projection(name, pool, tmp_path):
    import timm

    trunk = randomized(timm.create_model(name, num_classes=WIDTH, global_pool=pool))
    _, text = siglip_models()
    settings = siglip_settings()
    settings["vision_cfg"] = dict(image_size=160, timm_model_name=name, timm_pool=pool, timm_proj=None)
    (tmp_path / "model.json").write_text(json.dumps(settings))
    rest = {**openclip_text_names(text.state_dict()), **SCALES}
    state = {f"visual.trunk.{key}": tensor for key, tensor in trunk.state_dict().items()}
    model = convert(tmp_path, save(tmp_path / "model.pt", {**state, **rest}))
    pixels = torch.randn(2, 3, 160, 160, dtype=torch.float64)
    with torch.no_grad():
        assert relative(model.encode_image(pixels, normalize=False), trunk.double()(pixels)) < FLOAT64
