"""transformers' CLIP folders, old and new, whole and in parts, become hfclip's by the command line and go back: equal
outputs both ways, and what CLIPModel does not have is refused."""

import json
import shutil

import pytest
import torch
from conversion_utils import assert_same_tensors, relative, run_script, save, start_script
from safetensors.torch import load_file, save_file
from test_conversion_openai import FLOAT32, left_in
from test_conversion_openclip import CLIPA
from test_key_maps import read_golden
from transformers import (
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    BertConfig,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    RobertaConfig,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    ViTConfig,
)

from hfclip import (
    HFCLIPModel,
    HFCLIPTextModel,
    HFCLIPTextModelWithProjection,
    HFCLIPVisionModel,
    HFCLIPVisionModelWithProjection,
)


TEXT = dict(
    hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=3, max_position_embeddings=12
)
TEXT |= dict(vocab_size=49408, bos_token_id=49406, eos_token_id=49407, projection_dim=24)
VISION = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=32)
VISION |= dict(patch_size=8, projection_dim=24)
CONFIG = dict(text_config=TEXT, vision_config=VISION, projection_dim=24)
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
IDS = torch.tensor([[49406, 320, 2368, 49407, 0, 0], [49406, 5, 6, 7, 8, 49407]])
TEXTS = ["a photo of a cat", "Two dogs, don't they?", "a red car & 3 birds", "café"]


@pytest.fixture(scope="module")
def theirs(data_dir, tmp_path_factory):
    """A CLIPModel with its processor, as transformers saves them."""
    folder = tmp_path_factory.mktemp("theirs") / "clip"
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(**CONFIG)).eval()
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)  # no bias is zero, no norm is one
    model.save_pretrained(folder)
    # Written by hfclip, whose ids are OpenAI's, in the form that transformers' own tokenizer reads.
    from hfclip import HFCLIPTokenizer

    HFCLIPTokenizer.from_openai_bpe(data_dir / "bpe_simple_vocab_16e6.txt.gz").save_pretrained(folder / "bpe")
    parts = json.loads((folder / "bpe" / "tokenizer.json").read_text())["model"]
    tokenizer = CLIPTokenizer(
        vocab=parts["vocab"], merges=[tuple(pair) for pair in parts["merges"]], model_max_length=12
    )
    shutil.rmtree(folder / "bpe")
    CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32), tokenizer).save_pretrained(folder)
    return folder


@torch.no_grad()
def embeddings(model) -> list[torch.Tensor]:
    """Image and text embeddings of any of the classes, theirs or ours; those that it has."""
    found, kind = [], type(model).__name__
    if "Text" not in kind:
        outputs = (
            model.get_image_features(PIXELS) if hasattr(model, "get_image_features") else model(pixel_values=PIXELS)
        )
        found.append(outputs.get("image_embeds", outputs.get("pooler_output")))
    if "Vision" not in kind:
        outputs = model.get_text_features(IDS) if hasattr(model, "get_text_features") else model(input_ids=IDS)
        found.append(outputs.get("text_embeds", outputs.get("pooler_output")))
    return found


def assert_equal_embeddings(found, expected) -> None:
    found, expected = embeddings(found.eval()), embeddings(expected.eval())
    assert len(found) == len(expected) and all(relative(a, b) < FLOAT32 for a, b in zip(found, expected))


# Into hfclip


def test_clip_model_converts_and_goes_back(theirs, tmp_path):
    expected = CLIPModel.from_pretrained(theirs)
    run_script("convert_transformers", theirs, tmp_path / "out")
    assert_equal_embeddings(AutoModel.from_pretrained(tmp_path / "out"), expected)
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert type(processor).__name__ == "HFCLIPProcessor" and processor.image_processor.crop_size["height"] == 32

    run_script("export", tmp_path / "out", tmp_path / "back", "--to", "transformers")
    back, info = CLIPModel.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info.values()), info
    assert_equal_embeddings(back, expected)
    with torch.no_grad():
        logits = [m(input_ids=IDS, pixel_values=PIXELS).logits_per_image for m in (back.eval(), expected.eval())]
    assert relative(*logits) < FLOAT32
    returned = AutoProcessor.from_pretrained(tmp_path / "back")
    assert type(returned).__name__ == "CLIPProcessor"
    original = CLIPTokenizer.from_pretrained(theirs)
    for text in TEXTS:
        assert returned.tokenizer(text)["input_ids"] == original(text)["input_ids"]
        assert processor.tokenizer(text)["input_ids"] == original(text)["input_ids"]
    assert returned.tokenizer.model_max_length == 12
    assert returned.image_processor.crop_size["height"] == 32
    assert load_file(tmp_path / "back" / "model.safetensors").keys() == expected.state_dict().keys()


@pytest.mark.parametrize(
    "their_class, our_class",
    [
        (CLIPTextModel, HFCLIPTextModel),
        (CLIPTextModelWithProjection, HFCLIPTextModelWithProjection),
        (CLIPVisionModel, HFCLIPVisionModel),
        (CLIPVisionModelWithProjection, HFCLIPVisionModelWithProjection),
    ],
)
@pytest.mark.parametrize("layout", ["new", "old", "unnamed"])
def test_lone_towers_convert(their_class, our_class, layout, tmp_path):
    torch.manual_seed(0)
    config = CLIPConfig(**CONFIG)
    model = their_class(config.text_config if "Text" in their_class.__name__ else config.vision_config).eval()
    model.save_pretrained(tmp_path / "theirs")
    if layout == "unnamed":
        path = tmp_path / "theirs" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": None}))
    if layout == "old":  # transformers before version 5: one prefix more, position ids, pickled
        prefix = "" if "Projection" in their_class.__name__ else ("text_model." if "Text" in their_class.__name__ else "vision_model.")  # fmt: skip
        weights = {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}
        tower = "text_model" if "Text" in their_class.__name__ else "vision_model"
        weights[f"{tower}.embeddings.position_ids"] = torch.arange(12)[None]
        save(tmp_path / "theirs" / "pytorch_model.bin", weights)
        (tmp_path / "theirs" / "model.safetensors").unlink()
    result = run_script("convert_transformers", tmp_path / "theirs", tmp_path / "out")
    assert "was written: the source has none" in result.out
    found = AutoModel.from_pretrained(tmp_path / "out") if "Projection" not in our_class.__name__ else None
    found = our_class.from_pretrained(tmp_path / "out") if found is None else found
    assert type(found) is our_class
    assert_equal_embeddings(found, model)


def test_shards_and_old_eos_convert(tmp_path):
    torch.manual_seed(0)
    legacy = CLIPConfig(**{**CONFIG, "text_config": {**TEXT, "eos_token_id": 2, "bos_token_id": 0}})
    model = CLIPModel(legacy).eval()
    model.save_pretrained(tmp_path / "theirs", max_shard_size="1MB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").is_file()
    result = run_script("convert_transformers", tmp_path / "theirs", tmp_path / "out")
    assert "eos_token_id 2 of an old config was repaired: 49407" in result.out
    converted = AutoModel.from_pretrained(tmp_path / "out")
    assert converted.config.text_config.eos_token_id == 49407
    assert_equal_embeddings(converted, model)
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert record["notes"] and record["source"]["file"] == "model.safetensors.index.json"


def test_pickled_shards_convert(theirs, tmp_path):
    model = CLIPModel.from_pretrained(theirs)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="1MB")
    for file in (tmp_path / "theirs").glob("*.safetensors"):
        save(file.with_suffix(".bin"), load_file(file))
        file.unlink()
    index = tmp_path / "theirs" / "model.safetensors.index.json"
    (tmp_path / "theirs" / "pytorch_model.bin.index.json").write_text(
        index.read_text().replace(".safetensors", ".bin")
    )
    index.unlink()
    run_script("convert_transformers", tmp_path / "theirs", tmp_path / "out")
    assert_same_tensors(load_file(tmp_path / "out" / "model.safetensors"), model.state_dict())


def test_old_config_dicts_replace_the_configs(theirs, tmp_path):
    source = shutil.copytree(theirs, tmp_path / "theirs")
    config = json.loads((source / "config.json").read_text())
    config["text_config_dict"] = {**TEXT, "num_attention_heads": 6}
    config["vision_config_dict"] = {**VISION, "hidden_act": "gelu"}
    (source / "config.json").write_text(json.dumps(config))
    run_script("convert_transformers", source, tmp_path / "out")
    converted = AutoModel.from_pretrained(tmp_path / "out")
    assert converted.config.text_config.num_attention_heads == 6
    assert_equal_embeddings(converted, CLIPModel.from_pretrained(source))


def test_diffusers_text_encoder_takes_the_tokenizer_beside_it(theirs, tmp_path):
    model = CLIPTextModel.from_pretrained(theirs)
    model.save_pretrained(tmp_path / "pipe" / "text_encoder")
    CLIPTokenizer.from_pretrained(theirs).save_pretrained(tmp_path / "pipe" / "tokenizer")
    process = start_script("convert_transformers", tmp_path / "pipe" / "text_encoder", tmp_path / "out")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "Traceback" not in err, err
    assert_equal_embeddings(AutoModel.from_pretrained(tmp_path / "out"), model)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a cat")["input_ids"] == [49406, 320, 2368, 49407]


def test_rejects_folders_that_are_no_clip(theirs, tmp_path):
    def changed(**fields):
        folder = tmp_path / f"copy{len(left_in(tmp_path))}"
        shutil.copytree(theirs, folder)
        config = json.loads((folder / "config.json").read_text())
        for key, value in fields.items():
            config[key] = {**config[key], **value} if isinstance(value, dict) else value
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    cut = changed()
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:50_000])
    bare = changed()
    (bare / "config.json").unlink()
    for source, expected in (
        (changed(architectures=["BertModel"]), "found a BertModel, expected one of CLIPModel"),
        (changed(model_type="siglip"), "found a model of type 'siglip', which needs no conversion"),
        (changed(model_type="bert"), "found a model of type 'bert', expected one of clip, clip_text_model"),
        (changed(architectures=3), "found a 3, expected one of CLIPModel"),
        (changed(dtype="float33"), "config.json: HFCLIPConfig: found dtype='float33', expected one of float64"),
        (changed(text_config={"hidden_act": "relu"}), "hidden_act: found 'relu'"),
        (changed(text_config={"num_hidden_layers": 3}), "missing"),
        (changed(vision_config={"hidden_size": 64}), "do not fit the architecture"),
        (changed(vision_config={"patch_size": 7}), "a multiple of the patch"),
        (changed(text_config={"hidden_size": "wide"}), "hidden_size"),
        (cut, "no complete safetensors file"),
        (bare, "found no config.json, expected a folder that transformers wrote"),
        (theirs / "model.safetensors", "hfclip convert FOLDER OUT, with its folder"),
        (tmp_path / "nothing", "is neither a folder here nor a name on the Hub"),
        ("nobody/nothing", "cannot be fetched from the Hub"),
    ):
        error = run_script("convert_transformers", source, tmp_path / "out", status=2).error
        assert expected in error, (source, error)
    assert not (tmp_path / "out").exists()


# Out of hfclip


def convert_openclip(data_dir, folder, name, changes):
    weights, settings, _ = read_golden(data_dir / "golden" / f"{name}.safetensors")
    for part, values in changes.items():
        settings[part] = {**settings[part], **values}
    if settings["vision_cfg"].get("no_ln_pre"):
        weights = {key: tensor for key, tensor in weights.items() if "ln_pre" not in key}
    (folder / "model.json").write_text(json.dumps(settings))
    source = save(folder / "model.pt", weights)
    run_script("convert_openclip", source, folder / "ours", "--model", folder / "model.json")
    return folder / "ours"


@pytest.mark.parametrize(
    "name, changes, expected",
    [
        ("openclip_resnet_tiny", {}, "no tower of type hfclip_resnet"),
        ("openclip_vit_siglip_head_tiny", {}, "no logit_bias"),
        ("openclip_vit_gelu_tiny", CLIPA, "text_config.causal is False, and transformers' CLIPModel would have True"),
        ("openclip_vit_gelu_tiny", dict(vision_cfg=dict(pool_type="avg")), "vision_config.pooling is mean"),
    ],
)
def test_rejects_what_transformers_cannot_express(name, changes, expected, data_dir, tmp_path):
    ours = convert_openclip(data_dir, tmp_path, name, changes)
    error = run_script("export", ours, tmp_path / "out", "--to", "transformers", status=2).error
    assert expected in error
    assert left_in(tmp_path) == {"model.json", "model.pt", "ours"}


def test_openclips_models_open_in_transformers(data_dir, tmp_path):
    ours = convert_openclip(data_dir, tmp_path, "openclip_vit_gelu_tiny", {})
    _, _, tensors = read_golden(data_dir / "golden" / "openclip_vit_gelu_tiny.safetensors")
    run_script("export", ours, tmp_path / "out", "--to", "transformers")
    model = CLIPModel.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        outputs = model(input_ids=tensors["inputs/input_ids"], pixel_values=tensors["inputs/pixel_values"])
    assert relative(outputs.logits_per_image, tensors["outputs/logits_per_image"]) < FLOAT32


# transformers' VisionTextDualEncoderModel

TOWER = dict(hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4)
TEXT_TOWERS = {
    "bert": BertConfig(vocab_size=60, max_position_embeddings=40, **TOWER),
    "roberta": RobertaConfig(vocab_size=60, max_position_embeddings=40, **TOWER),
    "clip": CLIPTextConfig(vocab_size=60, max_position_embeddings=40, bos_token_id=58, eos_token_id=59, **TOWER),
}
IMAGE_TOWERS = {
    "vit": ViTConfig(image_size=32, patch_size=8, **TOWER),
    "clip": CLIPVisionConfig(image_size=32, patch_size=8, **TOWER),
    "dinov2": Dinov2Config(image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
}


@pytest.mark.parametrize("image, text", [("vit", "bert"), ("clip", "bert"), ("vit", "roberta"), ("dinov2", "clip")])
def test_dual_encoders_are_pooled_by_their_own_poolers(image, text, tmp_path):
    config = VisionTextDualEncoderConfig.from_vision_text_configs(IMAGE_TOWERS[image], TEXT_TOWERS[text], projection_dim=16)  # fmt: skip
    theirs, generator = VisionTextDualEncoderModel(config).eval(), torch.Generator().manual_seed(0)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    theirs.save_pretrained(tmp_path / "theirs")
    ids = torch.randint(4, 58, (3, 12), generator=generator)
    mask = torch.ones_like(ids)
    ids[:, -1] = ids[1, 6] = 59
    mask[1, 7:] = 0
    inputs = dict(input_ids=ids, attention_mask=mask, pixel_values=torch.randn(2, 3, 32, 32, generator=generator))
    HFCLIPModel.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    with torch.no_grad():
        expected = theirs(**inputs)
        for folder in ("theirs", "ours"):
            found = HFCLIPModel.from_pretrained(tmp_path / folder).eval()(**inputs)
            for name in ("logits_per_image", "text_embeds", "image_embeds"):
                assert relative(found[name], expected[name]) < FLOAT32, (folder, name)
    error = run_script("convert_transformers", tmp_path / "theirs", tmp_path / "out", status=2).error
    assert "HFCLIPModel.from_pretrained opens it as it is" in error


def test_dual_encoders_of_transformers_4_open_whole(tmp_path):
    """They held the towers of CLIP one level deeper."""
    config = VisionTextDualEncoderConfig.from_vision_text_configs(IMAGE_TOWERS["clip"], TEXT_TOWERS["clip"], projection_dim=16)  # fmt: skip
    VisionTextDualEncoderModel(config).save_pretrained(tmp_path)
    expected = HFCLIPModel.from_pretrained(tmp_path).state_dict()
    towers = ("vision_model.", "text_model.")
    deeper = {name.split(".")[0] + "." + name if name.startswith(towers) else name: t for name, t in load_file(tmp_path / "model.safetensors").items()}  # fmt: skip
    save_file(deeper, tmp_path / "model.safetensors", {"format": "pt"})
    model, info = HFCLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
