"""Surgery changes what it says and nothing else; processors follow, and what does not fit is refused."""

import json
import shutil

import pytest
import torch
from conversion_utils import assert_same_tensors, relative, run_script, save, start_script
from safetensors.torch import load_file
from test_conversion_openai import FLOAT32, left_in
from test_key_maps import read_golden
from transformers import AutoModel, AutoProcessor, AutoTokenizer

from hfclip import HFCLIPConfig, HFCLIPImageProcessor, HFCLIPModel, HFCLIPProcessor, HFCLIPTokenizer


POSITIONS = "text_model.embeddings.position_embedding.weight"
TEXTS = ["a photo of a cat", "two small birds on a branch"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model with a context of 77 tokens and its processor."""
    path = tmp_path_factory.mktemp("model") / "clip"
    tokenizer = HFCLIPTokenizer.train_new_from_iterator(TEXTS, vocab_size=540)
    text = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=len(tokenizer)
    )
    text |= dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32)
    torch.manual_seed(0)
    model = HFCLIPModel(HFCLIPConfig(text_config=text, vision_config={**vision, "patch_size": 8}, projection_dim=16))
    model.save_pretrained(path)
    HFCLIPProcessor(HFCLIPImageProcessor(size=32), tokenizer).save_pretrained(path)
    return path


@torch.no_grad()
def image_embeds(folder, pixels):
    return AutoModel.from_pretrained(folder).eval().encode_image(pixels, normalize=False)


@torch.no_grad()
def text_embeds(folder, ids):
    return AutoModel.from_pretrained(folder).eval().encode_text(ids, normalize=False)


@pytest.mark.parametrize("name, size", [("openai_vit_tiny", 48), ("openai_resnet_tiny", 128)])
def test_resize_bakes_in_what_the_model_interpolates(name, size, data_dir, tmp_path):
    weights, _, tensors = read_golden(data_dir / "golden" / f"{name}.safetensors")
    run_script("convert_openai", save(tmp_path / "model.pt", weights), tmp_path / "old")
    run_script("surgery", "resize", tmp_path / "old", tmp_path / "new", "--image-size", size)
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    assert relative(image_embeds(tmp_path / "new", pixels), image_embeds(tmp_path / "old", pixels)) < FLOAT32
    model = AutoModel.from_pretrained(tmp_path / "new").eval()
    assert model.config.image_size == size
    with torch.no_grad():
        model.get_image_features(pixels, interpolate_pos_encoding=False)  # refused where anything is interpolated
    assert HFCLIPImageProcessor.from_pretrained(tmp_path / "new").crop_size["height"] == size
    old, new = (load_file(tmp_path / part / "model.safetensors") for part in ("old", "new"))
    assert {key for key in old if old[key].shape != new[key].shape or not torch.equal(old[key], new[key])} == {
        key for key in old if "vision" in key and "position" in key
    }


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_resize_keeps_the_stored_precision(dtype, data_dir, tmp_path):
    weights, _, _ = read_golden(data_dir / "golden" / "openai_vit_tiny.safetensors")
    run_script("convert_openai", save(tmp_path / "model.pt", weights), tmp_path / "old", "--dtype", dtype)
    run_script("surgery", "resize", tmp_path / "old", tmp_path / "new", "--image-size", 64)
    stored = load_file(tmp_path / "new" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {getattr(torch, dtype)}
    assert AutoModel.from_pretrained(tmp_path / "new", dtype="auto").dtype == getattr(torch, dtype)


@pytest.mark.parametrize(
    "operation",
    [("resize", "--image-size", 64), ("stretch", "--length", 24, "--keep", 5), ("activation", "--to", "gelu")],
)
def test_a_source_of_two_precisions_keeps_both(operation, data_dir, tmp_path):
    weights, _, _ = read_golden(data_dir / "golden" / "openai_vit_tiny.safetensors")
    weights |= {name: weights[name].half() for name in weights if "visual" in name or name == "positional_embedding"}
    run_script("convert_openai", save(tmp_path / "model.pt", weights), tmp_path / "old")
    name, *settings = operation
    run_script("surgery", name, tmp_path / "old", tmp_path / "new", *settings)
    old, new = (load_file(tmp_path / part / "model.safetensors") for part in ("old", "new"))
    assert {tensor.dtype for tensor in old.values()} == {torch.float16, torch.float32}
    assert {key: tensor.dtype for key, tensor in new.items()} == {key: tensor.dtype for key, tensor in old.items()}
    changed = {key for key in old if old[key].shape != new[key].shape}
    assert len(changed) == (name != "activation")
    assert_same_tensors(*({k: v for k, v in part.items() if k not in changed} for part in (new, old)))
    configs = [json.loads((tmp_path / part / "config.json").read_text())["dtype"] for part in ("old", "new")]
    assert configs == ["float32", "float32"]


def test_stretch_follows_long_clip(folder, tmp_path):
    process = start_script("surgery", "stretch", folder, tmp_path / "long")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "Traceback" not in err, err
    old, new = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "long"))
    expected = list(old[POSITIONS][:20])
    for i in range(20, 77):  # four places for each of the others; the last ones continue the line
        here = old[POSITIONS][i]
        step = old[POSITIONS][i + 1] - here if i < 76 else here - old[POSITIONS][i - 1]
        expected += [here + j / 4 * step for j in range(4)]
    assert new[POSITIONS].shape == (248, 32)
    # Rounding of float32 to float32, on values of order 0.01.
    torch.testing.assert_close(new[POSITIONS], torch.stack(expected), rtol=0, atol=1e-8)
    assert_same_tensors(*({k: v for k, v in part.items() if k != POSITIONS} for part in (new, old)))

    short = torch.tensor([[538, *range(18), 539], [538, 5, 539, *[0] * 17]])
    end = AutoModel.from_pretrained(folder).config.text_config.eos_token_id
    short[short >= 538] = end
    assert relative(text_embeds(tmp_path / "long", short), text_embeds(folder, short)) < FLOAT32
    longer = torch.cat([torch.full((1, 200), 5), torch.tensor([[end]])], dim=1)
    assert text_embeds(tmp_path / "long", longer).isfinite().all()
    processor = AutoProcessor.from_pretrained(tmp_path / "long")
    assert processor.tokenizer.model_max_length == 248
    assert processor.tokenizer("cat " * 300, truncation=True)["input_ids"][-1] == end


def test_activation_swap_warns_and_changes(folder, tmp_path):
    result = run_script("surgery", "activation", folder, tmp_path / "gelu", "--to", "gelu")
    assert "WARNING: text_config: quick_gelu -> gelu; vision_config: quick_gelu -> gelu" in result.out
    assert "cosine with the old ones at least" in result.out
    model, old = AutoModel.from_pretrained(tmp_path / "gelu"), AutoModel.from_pretrained(folder)
    assert model.config.text_config.hidden_act == model.config.vision_config.hidden_act == "gelu"
    assert_same_tensors(model.state_dict(), old.state_dict())
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert relative(image_embeds(tmp_path / "gelu", pixels), image_embeds(folder, pixels)) > 10 * FLOAT32
    error = run_script("surgery", "activation", tmp_path / "gelu", tmp_path / "no", "--to", "gelu", status=2).error
    assert "both towers have gelu already" in error
    ids = AutoTokenizer.from_pretrained(tmp_path / "gelu")(TEXTS[0])["input_ids"]
    assert ids == AutoTokenizer.from_pretrained(folder)(TEXTS[0])["input_ids"]


def test_resize_keeps_a_squashing_processor(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "old")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    images = HFCLIPImageProcessor(size={"height": 32, "width": 32}, crop_size=32, image_mean=[0.5] * 3)
    HFCLIPProcessor(images, tokenizer).save_pretrained(tmp_path / "old")
    run_script("surgery", "resize", tmp_path / "old", tmp_path / "new", "--image-size", 40)
    found = AutoProcessor.from_pretrained(tmp_path / "new").image_processor
    assert (
        dict(found.size) == dict(found.crop_size) == {"height": 40, "width": 40}
        and list(found.image_mean) == [0.5] * 3
    )


def test_rejects_what_does_not_fit(folder, tmp_path):
    text = dict(model_type="hfclip_bag_of_words", hidden_size=32, vocab_size=100, eos_token_id=99)
    vision = dict(model_type="hfclip_resnet", depths=(1, 1, 1, 1), stem_width=8, image_size=32)
    other = HFCLIPModel(HFCLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    other.save_pretrained(tmp_path / "other")
    cut = shutil.copytree(folder, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:5000])
    (tmp_path / "exists").mkdir()
    negative = shutil.copytree(folder, tmp_path / "negative")
    config = json.loads((negative / "config.json").read_text())
    config["vision_config"]["initializer_factor"] = -1.0
    (negative / "config.json").write_text(json.dumps(config))
    for *arguments, expected in (
        ("resize", folder, tmp_path / "out", "--image-size", 50, "a multiple of the patch"),
        ("resize", folder, tmp_path / "out", "--image-size", 0, "found image_size=0, expected a positive number"),
        ("resize", tmp_path / "other", tmp_path / "out", "--image-size", 40, "a multiple of the total stride"),
        ("resize", folder, tmp_path / "exists", "--image-size", 64, "exists already"),
        ("resize", folder, folder, "--image-size", 64, "--overwrite", "holds the source"),
        ("resize", cut, tmp_path / "out", "--image-size", 64, "no complete safetensors file"),
        ("resize", tmp_path / "none", tmp_path / "out", "--image-size", 64, "found no config.json"),
        (
            "resize",
            negative,
            tmp_path / "out",
            "--image-size",
            64,
            "HFCLIPVisionConfig: found initializer_factor=-1.0, expected a",
        ),
        ("stretch", folder, tmp_path / "out", "--length", 77, "more than 77 in all"),
        ("stretch", folder, tmp_path / "out", "--keep", 0, "1 to 75 positions to keep"),
        ("stretch", folder, tmp_path / "out", "--keep", 76, "1 to 75 positions to keep"),
        ("stretch", tmp_path / "other", tmp_path / "out", "expected a causal hfclip_text tower"),
    ):
        assert expected in run_script("surgery", *arguments, status=2).error
    assert left_in(tmp_path) == {"other", "cut", "exists", "negative"}
