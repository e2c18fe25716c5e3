"""OpenCLIP's checkpoints become model folders by the command line, with all settings of its towers that have a
counterpart; the others are refused by name."""

import io
import json
import re
from functools import partial

import pytest
import torch
from conversion_utils import assert_same_tensors, openai_shapes, relative, run_script, save, start_script
from hub_server import HubServer
from safetensors.torch import load_file
from test_conversion_openai import FLOAT32, assert_computes, assert_covers, left_in
from test_hub import TOKEN, environment
from test_key_maps import read_golden
from transformers import AutoModel, AutoProcessor

from hfclip import HFCLIPTokenizer
from hfclip.errors import UsageError
from hfclip.foreign.key_maps import hfclip_items, openclip_config
from hfclip.foreign.openclip_shapes import model_name, settings_from_shapes


OPENCLIP = ["openclip_resnet_tiny", "openclip_vit_gelu_tiny", "openclip_vit_quickgelu_tiny", "openclip_vit_siglip_head_tiny"]  # fmt: skip


def write_json(path, content):
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def golden(data_dir):
    """Weights, settings, and all tensors of the GELU ViT; its settings may be changed."""
    return read_golden(data_dir / "golden" / "openclip_vit_gelu_tiny.safetensors")


@pytest.mark.parametrize("name", OPENCLIP)
def test_golden_weights_agree_and_come_back_bit_for_bit(name, data_dir, tmp_path):
    weights, settings, tensors = read_golden(data_dir / "golden" / f"{name}.safetensors")
    source = save(tmp_path / "model.pt", weights)
    model_json = write_json(tmp_path / "model.json", settings)
    run_script("convert_openclip", source, tmp_path / "out", "--model", model_json)
    assert_computes(tmp_path / "out", tensors)
    run_script("export", tmp_path / "out", tmp_path / "back", "--to", "openclip")
    assert_same_tensors(load_file(tmp_path / "back" / "open_clip_model.safetensors"), weights)
    # Our own export is a folder as the Hub has them, and its settings make the same model.
    run_script("convert_openclip", tmp_path / "back", tmp_path / "again")
    configs = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("out", "again")]
    assert configs[0] == configs[1]
    assert_computes(tmp_path / "again", tensors)
    result = run_script("export", tmp_path / "out", tmp_path / "x.pt", "--to", "openai", status=2)
    assert "openai/CLIP would have" in result.error


# Sources


def test_training_checkpoint_gives_the_weights_that_are_chosen(golden, tmp_path):
    weights, settings, tensors = golden
    averaged = {name: tensor + 0.01 if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    checkpoint = {
        "epoch": 32,
        "name": "run",
        "state_dict": {f"module.{name}": tensor for name, tensor in weights.items()},
        "ema": {"state_dict": averaged, "decay": 0.99},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(4)}}, "param_groups": [{"lr": 0.1}]},
    }  # fmt: skip
    torch.save(checkpoint, tmp_path / "epoch_32.pt")
    model = write_json(tmp_path / "model.json", settings)
    convert = partial(run_script, "convert_openclip", tmp_path / "epoch_32.pt")
    result = convert(tmp_path / "out", "--model", model)
    assert "Taking the weights `state_dict`; ema.state_dict can be chosen" in result.out and "left aside" in result.out
    assert_computes(tmp_path / "out", tensors)
    convert(tmp_path / "ema", "--model", model, "--weights", "ema.state_dict")
    assert_same_tensors(load_file(tmp_path / "ema" / "model.safetensors"), dict(hfclip_items(averaged)))
    error = convert(tmp_path / "no", "--model", model, "--weights", "best", status=2).error
    assert "found best, expected one of ['ema.state_dict', 'state_dict']" in error


def test_rejects_a_choice_between_models_that_nobody_made(golden, tmp_path):
    weights, settings, _ = golden
    models = {f"models.{name}.{key}": tensor for name in ("student", "teacher") for key, tensor in weights.items()}
    source, model = save(tmp_path / "two.pt", models), write_json(tmp_path / "model.json", settings)
    error = run_script("convert_openclip", source, tmp_path / "out", "--model", model, status=2).error
    assert "expected one of ['models.student', 'models.teacher']" in error
    run_script("convert_openclip", source, tmp_path / "out", "--model", model, "--weights", "models.teacher")


def test_hub_folder_brings_its_transform_and_its_tokenizer(golden, tmp_path):
    weights, settings, tensors = golden
    tokenizer = HFCLIPTokenizer.train_new_from_iterator(["a photo of a cat"] * 2, vocab_size=530)
    for layout in ("plain", "custom"):
        folder = tmp_path / layout
        tokenizer.save_pretrained(folder)
        preprocess = {"mean": [0.5, 0.4, 0.3], "std": [0.1, 0.2, 0.3], "interpolation": "bilinear", "resize_mode": "squash"}  # fmt: skip
        write_json(folder / "open_clip_config.json", {"model_cfg": settings, "preprocess_cfg": preprocess})
        if layout == "custom":  # CustomTextCLIP
            weights = {name if name.startswith(("visual.", "logit_")) else f"text.{name}": t for name, t in weights.items()}  # fmt: skip
        save(folder / "open_clip_pytorch_model.bin", weights)
        run_script("convert_openclip", folder, tmp_path / f"{layout}-out")
        assert_computes(tmp_path / f"{layout}-out", tensors)
        processor = AutoProcessor.from_pretrained(tmp_path / f"{layout}-out")
        images = processor.image_processor
        assert (list(images.image_mean), list(images.image_std)) == ([0.5, 0.4, 0.3], [0.1, 0.2, 0.3])
        assert dict(images.size) == {"height": 32, "width": 32} and int(images.resample) == 2
        assert processor.tokenizer("a cat")["input_ids"] == tokenizer("a cat")["input_ids"]
        assert processor.tokenizer.model_max_length == 16
        run_script("export", tmp_path / f"{layout}-out", tmp_path / f"{layout}-back", "--to", "openclip")
        back = json.loads((tmp_path / f"{layout}-back" / "open_clip_config.json").read_text())
        assert back["preprocess_cfg"] == preprocess
    write_json(folder / "open_clip_config.json", {"model_cfg": settings, "preprocess_cfg": {"resize_mode": "longest"}})
    assert "resize_mode 'longest'" in run_script("convert_openclip", folder, tmp_path / "no", status=2).error


def test_rejects_a_tokenizer_that_is_too_large_and_says_one_that_is_not_there(golden, data_dir, tmp_path):
    weights, settings, _ = golden
    HFCLIPTokenizer.from_openai_bpe(data_dir / "bpe_simple_vocab_16e6.txt.gz").save_pretrained(tmp_path / "tokenizer")
    source, model = save(tmp_path / "model.pt", weights), write_json(tmp_path / "model.json", settings)
    convert = partial(run_script, "convert_openclip", source, tmp_path / "out", "--model", model)
    assert "the model's vocabulary 600" in convert("--tokenizer", tmp_path / "tokenizer", status=2).error
    assert "--tokenizer" in convert("--tokenizer", tmp_path / "none", status=2).error
    settings["text_cfg"]["hf_tokenizer_name"] = "nobody/no-tokenizer"
    write_json(model, settings)
    assert "No tokenizer: nobody/no-tokenizer is not available" in convert(status=2).error
    assert not (tmp_path / "out").exists()


def test_code_beside_a_tokenizer_is_not_run(golden, tmp_path, monkeypatch):
    weights, settings, _ = golden
    folder, canary = tmp_path / "evil", tmp_path / "ran"
    folder.mkdir()
    save(folder / "open_clip_model.safetensors", weights)
    settings = {**settings, "text_cfg": {**settings["text_cfg"], "hf_tokenizer_name": "someone/tokenizer"}}
    write_json(folder / "open_clip_config.json", {"model_cfg": settings})
    write_json(
        folder / "tokenizer_config.json", {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["tok.T", None]}}
    )
    (folder / "tok.py").write_text(f"open({str(canary)!r}, 'w')\nclass T: pass\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 10))
    assert "No tokenizer:" in run_script("convert_openclip", folder, tmp_path / "out", status=2).error
    assert not canary.exists()
    # Nor are files of this machine read because a checkpoint's settings name them.
    settings["text_cfg"]["hf_tokenizer_name"] = str(folder)
    model = write_json(tmp_path / "model.json", settings)
    source = folder / "open_clip_model.safetensors"
    error = run_script("convert_openclip", source, tmp_path / "x", "--model", model, status=2).error
    assert "it is a path in the checkpoint's settings" in error and not canary.exists()


def test_push_to_hub_publishes_and_says_how_to_go_on_when_refused(golden, data_dir, tmp_path):
    weights, settings, tensors = golden
    tokenizer = HFCLIPTokenizer.train_new_from_iterator(["a photo of a cat"], vocab_size=520)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    source, model = save(tmp_path / "model.pt", weights), write_json(tmp_path / "model.json", settings)
    arguments = (source, tmp_path / "out", "--model", model, "--tokenizer", tmp_path / "tokenizer", "--overwrite")
    with HubServer(tmp_path / "hub", users={TOKEN: "anna"}) as server:
        settings = environment(server.url, tmp_path, HF_HUB_OFFLINE="0")
        # What fails for good is not repeated, so nothing waits here.
        fault = server.fail("POST /api/repos/create", status=403, times=1000)
        process = start_script("convert_openclip", *arguments, "--push-to-hub", "anna/clip", **settings)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 1 and "Traceback" not in err and TOKEN not in out + err
        assert "HTTP 403" in err and f"hfclip push {tmp_path / 'out'} anna/clip" in err
        assert_computes(tmp_path / "out", tensors)
        fault.times = 0
        process = start_script("convert_openclip", *arguments, "--push-to-hub", "anna/clip", "--private", **settings)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0 and f"Published: {server.url}/anna/clip" in out, err
        assert server.repositories["anna/clip"].private
        files = server.files("anna/clip")
    sent = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.name != "README.md"}
    assert sent.items() <= files.items() and b'name = "anna/clip"' in files["README.md"]
    assert files["README.md"] == (tmp_path / "out" / "README.md").read_bytes()
    error = run_script("convert_openclip", *arguments, "--push-to-hub", "no//name", status=2).error
    assert "no//name" in error
    arguments = arguments[:4]  # without a tokenizer the folder is no model to publish, and stays
    (tmp_path / "out").rename(tmp_path / "first")
    error = run_script("convert_openclip", *arguments, "--push-to-hub", "anna/clip", status=2).error
    assert "found no tokenizer.json" in error and f"{tmp_path / 'out'} holds the model" in error


# Settings

CLIPA = dict(
    vision_cfg=dict(no_ln_pre=True, pool_type="avg", final_ln_after_pool=True),
    text_cfg=dict(pool_type="last", no_causal_mask=True),
)


@pytest.mark.parametrize(
    "changes, fields",
    [
        (CLIPA, dict(vision=dict(pre_layer_norm=False, pooling="norm_of_mean"), text=dict(causal=False, pooling="last"))),
        (dict(vision_cfg=dict(pool_type="avg")), dict(vision=dict(pooling="mean"))),
        (dict(text_cfg=dict(pool_type="eos", eos_id=300)), dict(text=dict(pooling="eos", eos_token_id=300))),
        (dict(text_cfg=dict(pool_type="eos")), dict(text=dict(pooling="eos", eos_token_id=2))),
        (dict(text_cfg=dict(pool_type="first", no_causal_mask=True, pad_id=1)), dict(text=dict(pooling="first", pad_token_id=1))),
        (dict(text_cfg=dict(pool_type="last")), dict(text=dict(pooling="last", causal=True))),
        (dict(vision_cfg=dict(act_kwargs={"approximate": "tanh"}, norm_kwargs={"eps": 1e-3})), dict(vision=dict(hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-3))),
        (dict(text_cfg=dict(act_kwargs={"approximate": "tanh"}, norm_kwargs={"eps": 1e-4})), dict(text=dict(hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-4))),
        (dict(custom_text=True, vision_cfg=dict(patch_dropout=0.5, ls_init_value=None)), {}),
        (dict(vision_cfg=dict(ls_init_value=0.1)), dict(vision=dict(layer_scale_init_value=0.1))),
    ],
)  # fmt: skip
def test_settings_convert_and_come_back(changes, fields, golden, tmp_path):
    weights, settings, _ = golden
    for part, values in changes.items():
        settings[part] = {**settings[part], **values} if isinstance(values, dict) else values
    if settings["vision_cfg"].get("no_ln_pre"):
        weights = {name: tensor for name, tensor in weights.items() if "ln_pre" not in name}
    if settings["vision_cfg"].get("ls_init_value"):
        biases = {name: tensor for name, tensor in weights.items() if re.match(r"visual\..*\.ln_[12]\.bias", name)}
        weights |= {re.sub(r"ln_(.)\.bias", r"ls_\1.gamma", name): tensor + 0.5 for name, tensor in biases.items()}
    source, model = save(tmp_path / "model.pt", weights), write_json(tmp_path / "model.json", settings)
    # The script itself proves that the result computes what `reference` does with these settings.
    run_script("convert_openclip", source, tmp_path / "out", "--model", model)
    config = AutoModel.from_pretrained(tmp_path / "out").config
    for part, expected in fields.items():
        found = getattr(config, f"{part}_config")
        assert expected == {name: getattr(found, name) for name in expected}
    run_script("export", tmp_path / "out", tmp_path / "back", "--to", "openclip")
    assert_same_tensors(load_file(tmp_path / "back" / "open_clip_model.safetensors"), weights)
    run_script("convert_openclip", tmp_path / "back", tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text()) == json.loads((tmp_path / "out/config.json").read_text())  # fmt: skip


def test_sigmoid_head_keeps_its_bias(data_dir, tmp_path):
    weights, settings, tensors = read_golden(data_dir / "golden" / "openclip_vit_siglip_head_tiny.safetensors")
    source, model = save(tmp_path / "model.pt", weights), write_json(tmp_path / "model.json", settings)
    run_script("convert_openclip", source, tmp_path / "out", "--model", model)
    converted = AutoModel.from_pretrained(tmp_path / "out")
    assert torch.equal(converted.logit_bias, weights["logit_bias"])
    run_script("export", tmp_path / "out", tmp_path / "back", "--to", "openclip")
    assert "init_logit_bias" in json.loads((tmp_path / "back" / "open_clip_config.json").read_text())["model_cfg"]


@pytest.mark.parametrize(
    "changes, expected",
    [
        (dict(vision_cfg=dict(attentional_pool="parallel")), "attentional_pool: a pooling by learned queries other than CoCa's"),
        (dict(vision_cfg=dict(attentional_pool=True, pool_type="avg")), "attentional_pool: a pooling by learned queries other than CoCa's"),
        (dict(text_cfg=dict(embed_cls=True, no_causal_mask=True)), "embed_cls: a class token after a text that is not causal"),
        (dict(text_cfg=dict(qk_norm=True)), "qk_norm: an attention block"),
        (dict(vision_cfg=dict(pool_type="none")), "vision_cfg.pool_type 'none': none of tok, avg"),
        (dict(text_cfg=dict(pool_type="mean")), "text_cfg.pool_type 'mean'"),
        (dict(vision_cfg=dict(global_average_pool=True)), "global_average_pool: an unknown setting"),
        (dict(embed_dim=512), "embed_dim is 512, and 48 in the weights"),
        (dict(vision_cfg=dict(layers=12, patch_size=16)), "vision_cfg.layers is 12, and 3 in the weights; vision_cfg.patch_size"),
        (dict(vision_cfg=dict(layers=[3, 4, 6, 3])), "vision_cfg.layers is [3, 4, 6, 3], and 3 in the weights"),
        (dict(text_cfg=dict(heads=3)), "num_attention_heads=3"),
        (dict(text_cfg=dict(no_causal_mask=False, pool_type="first")), "pooling='first' in a causal tower"),
        (dict(vision_cfg=dict(head_width="wide")), "model.json has a setting that makes no sense: vision_cfg.head_width: found 'wide', expected a positive number"),
        (dict(vision_cfg=None), "describes no dual encoder: vision_cfg missing"),
    ],
)  # fmt: skip
def test_rejects_settings_without_a_counterpart(changes, expected, golden, tmp_path):
    weights, settings, _ = golden
    for part, values in changes.items():
        settings[part] = {**settings[part], **values} if isinstance(values, dict) and part in settings else values
    source, model = save(tmp_path / "model.pt", weights), write_json(tmp_path / "model.json", settings)
    assert expected in run_script("convert_openclip", source, tmp_path / "out", "--model", model, status=2).error
    assert left_in(tmp_path) == {"model.pt", "model.json"}


def test_rejects_a_text_tower_without_a_plain_projection(golden, tmp_path):
    weights, settings, _ = golden
    weights["text_projection.weight"] = weights.pop("text_projection").t()
    source, model = save(tmp_path / "model.pt", weights), write_json(tmp_path / "model.json", settings)
    error = run_script("convert_openclip", source, tmp_path / "out", "--model", model, status=2).error
    assert "a text tower without projection, or with a bias" in error


def test_the_activation_is_what_the_settings_say(golden, tmp_path):
    """No shape tells it: with the wrong one, the result computes something else."""
    weights, settings, tensors = golden
    source = save(tmp_path / "model.pt", weights)
    model = write_json(tmp_path / "model.json", {**settings, "quick_gelu": True})
    run_script("convert_openclip", source, tmp_path / "out", "--model", model)
    converted = AutoModel.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        image = converted.encode_image(tensors["inputs/pixel_values"], normalize=False)
    assert relative(image, tensors["outputs/image_features"]) > 100 * FLOAT32


def test_rejects_sources_that_tell_no_architecture_or_hold_no_model(golden, tmp_path):
    weights, settings, _ = golden
    source = save(tmp_path / "model.pt", weights)
    model, broken = write_json(tmp_path / "model.json", settings), tmp_path / "broken.json"
    broken.write_text("{")
    other = save(tmp_path / "other.pt", {"linear.weight": torch.ones(2, 2)})
    (tmp_path / "folder").mkdir()
    for arguments, expected in (
        ((tmp_path / "folder", tmp_path / "out"), "no checkpoint in this folder"),
        (
            (source, tmp_path / "out", "--model", tmp_path / "no.json"),
            "no.json: no file, and no name of OpenCLIP's own",
        ),
        ((source, tmp_path / "out", "--model", broken), "found no readable JSON file"),
        ((source, tmp_path / "out", "--model", write_json(tmp_path / "list.json", [1])), "expected an object"),
        ((other, tmp_path / "out", "--model", model), "found no CLIP model among 1 tensors"),
    ):
        error = run_script("convert_openclip", *arguments, status=2).error
        assert expected.lower() in error.lower()
    assert not (tmp_path / "out").exists()


# Full size, shapes only. Facts of OpenCLIP's model_configs, with the totals of its own models (open_clip 3.3).

FULL_SIZE = {
    "ViT-B-32": (dict(dim=512, text=(512, 8, 12), layers=12, width=768, size=224, patch=32), 64, 151_277_313),
    "ViT-L-14": (dict(dim=768, text=(768, 12, 12), layers=24, width=1024, size=224, patch=14), 64, 427_616_513),
    "ViT-H-14": (dict(dim=1024, text=(1024, 16, 24), layers=32, width=1280, size=224, patch=14), 80, 986_109_441),
    "ViT-g-14": (dict(dim=1024, text=(1024, 16, 24), layers=40, width=1408, size=224, patch=14, mlp=6144), 88, 1_366_678_273),
    "ViT-bigG-14": (dict(dim=1280, text=(1280, 20, 32), layers=48, width=1664, size=224, patch=14, mlp=8192), 104, 2_539_567_105),
}  # fmt: skip


@pytest.mark.parametrize("name", FULL_SIZE)
def test_large_models_are_covered_whole(name):
    numbers, head_width, total = FULL_SIZE[name]
    shapes, (width, heads, layers) = openai_shapes(**numbers), numbers["text"]
    vision = {"layers": numbers["layers"], "width": numbers["width"], "head_width": head_width, "patch_size": numbers["patch"]}  # fmt: skip
    settings = {"embed_dim": numbers["dim"], "vision_cfg": vision, "text_cfg": {"width": width, "heads": heads, "layers": layers}}  # fmt: skip
    config = openclip_config({key: torch.empty(shape, device="meta") for key, shape in shapes.items()}, settings)
    assert config.vision_config.num_attention_heads == numbers["width"] // head_width == 16 or name == "ViT-B-32"
    assert config.text_config.num_attention_heads == heads and config.vision_config.hidden_act == "gelu"
    assert assert_covers(shapes, config) == total


# Training checkpoints without settings


def training_checkpoint(path, shapes, name="run"):
    """As OpenCLIP's trainer saves it: the model in `state_dict` behind `module.`, beside it what else the run needs."""
    generator = torch.Generator().manual_seed(0)
    weights = {key: 0.05 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    weights |= {key: value.abs() + 0.5 for key, value in weights.items() if key.endswith("running_var")}
    state = {f"module.{key}": tensor for key, tensor in weights.items()}
    torch.save({"epoch": 1, "name": name, "state_dict": state, "optimizer": {"state": {}}}, path)
    return path


SMALL = openai_shapes(dim=64, text=(64, 1, 2), layers=2, width=128, size=32, patch=8, vocabulary=49408)


@pytest.fixture
def merges(data_dir):
    return "--merges", data_dir / "bpe_simple_vocab_16e6.txt.gz"


def test_a_training_checkpoint_needs_no_settings(merges, tmp_path):
    source = training_checkpoint(tmp_path / "epoch_1.pt", SMALL)
    result = run_script("convert_openclip", source, tmp_path / "out", *merges)
    assert "taken for a ViT of 2 layers of 128 by its shapes, with GELU, 64 units a head" in result.out
    assert "--model and a name in -quickgelu" in result.out
    config = AutoModel.from_pretrained(tmp_path / "out").config
    assert (config.vision_config.hidden_act, config.vision_config.num_attention_heads) == ("gelu", 2)
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert processor.tokenizer("a cat")["input_ids"] == [49406, 320, 2368, 49407]
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert any("which no shape tells" in note for note in record["notes"])


def test_a_run_that_is_named_after_its_model_tells_the_activation(merges, tmp_path):
    shapes = openai_shapes(dim=32, text=(64, 1, 1), layers=12, width=768, size=64, patch=32, mlp=64, vocabulary=49408)
    run = "2026_01_01-00_00_00-model_ViT-B-32-quickgelu-lr_0.001-b_64-j_4-p_amp"
    result = run_script("convert_openclip", training_checkpoint(tmp_path / "epoch_1.pt", shapes, run), tmp_path / "out", *merges)  # fmt: skip
    assert "taken for ViT-B-32-quickgelu by its shapes, with QuickGELU" in result.out
    assert AutoModel.from_pretrained(tmp_path / "out").config.text_config.hidden_act == "quick_gelu"


def test_without_a_tokenizer_nothing_is_written(tmp_path):
    source = training_checkpoint(tmp_path / "epoch_1.pt", SMALL)
    assert "Pass --merges" in run_script("convert_openclip", source, tmp_path / "out", status=2).error
    assert left_in(tmp_path) == {"epoch_1.pt"}


def architecture_of(shapes, name=None):
    weights = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    settings, note = settings_from_shapes(weights, name and model_name(name))
    return openclip_config(weights, settings), note


@pytest.mark.parametrize("name", FULL_SIZE)
def test_shapes_tell_published_architectures(name):
    numbers, head_width, _ = FULL_SIZE[name]
    config, note = architecture_of(openai_shapes(**numbers))
    assert f"taken for {name} by its shapes, with GELU, {head_width} units a head" in note.replace(" in the image tower", "")  # fmt: skip
    assert config.vision_config.num_attention_heads == numbers["width"] // head_width
    assert config.text_config.num_attention_heads == numbers["text"][1]
    quick, _ = architecture_of(openai_shapes(**numbers), f"{name}-quickgelu")
    assert quick.vision_config.hidden_act == quick.text_config.hidden_act == "quick_gelu"
    if name == "ViT-B-32":
        assert architecture_of(openai_shapes(**numbers), "ViT-B/32")[0].to_dict() == config.to_dict()


def test_shapes_tell_resnets():
    shapes = openai_shapes(dim=512, text=(512, 8, 12), layers=(3, 4, 23, 3), width=64, size=224)
    config, note = architecture_of(shapes)
    assert "taken for RN101 " in note and config.vision_config.depths == [3, 4, 23, 3]
    assert architecture_of(shapes, "RN101-quickgelu")[0].vision_config.num_attention_heads == 32


def test_shapes_tell_coca_and_layer_scale():
    changes = {"visual.attn_pool.query": (256, 512), "cls_emb": (512,), "transformer.resblocks.0.ls_1.gamma": (512,)}
    config, _ = architecture_of({**openai_shapes(**FULL_SIZE["ViT-B-32"][0]), **changes})
    vision, text = config.vision_config, config.text_config
    assert (vision.pooling, vision.pooling_heads, vision.layer_scale_init_value) == ("attention", 8, None)
    assert (text.pooling, text.max_position_embeddings, text.layer_scale_init_value) == ("class", 76, 1e-4)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("ViT-L-14", "its weights are ViT-B-32"),
        ("RN50", "its weights are ViT-B-32"),
        ("ViT-B-32-CLIPA", "its weights are ViT-B-32"),
        ("ViT-B-33x", "no file, and no name of OpenCLIP's own"),
        ("convnext_base", "no file, and no name of OpenCLIP's own"),
    ],
)
def test_a_name_that_is_another_models_is_refused(name, expected):
    with pytest.raises(UsageError, match=expected):
        architecture_of(openai_shapes(**FULL_SIZE["ViT-B-32"][0]), name)


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"visual.trunk.pos_embed": (1, 2, 3)}, "one of timm"),
        ({"transformer.embeddings.word_embeddings.weight": (2, 3)}, "one of transformers"),
        ({"visual.conv1.weight": (3, 3)}, "visual.conv1.weight missing, or of unknown form"),
    ],
)
def test_shapes_that_tell_too_little_are_said(change, expected):
    with pytest.raises(UsageError, match=expected):
        architecture_of({**SMALL, **change})
