"""Checkpoints of OpenAI and OpenCLIP opened as they are: the same model as by way of a conversion, and nothing written."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conversion_utils import assert_same_tensors, run_script, save, save_torchscript, write_archive
from hub_server import HubServer
from safetensors.torch import load_file
from test_auto import WITHOUT_HFCLIP, save_folder
from test_auto import run as run_python
from test_conversion_foreign_towers import PAD, save_tokenizer, siglip_models, siglip_settings, siglip_source
from test_hub import TOKEN, environment
from test_key_maps import GOLDEN, read_golden
from training_utils import tiny_recipe
from transformers import CLIPConfig, CLIPModel

import hfclip_cli
from hfclip import HFCLIPConfig, HFCLIPImageProcessor, HFCLIPModel, HFCLIPProcessor, ZeroShotClassifier
from hfclip.errors import UsageError
from hfclip.foreign.towers import SIGLIP_VITS
from training.config import Config
from training.model import build_architecture, build_model, build_processor


CAPTIONS = ["a photo of a cat", "two small birds"]
TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}


def write_source(folder: Path, name: str, golden: Path) -> Path:
    """A golden model as its project publishes it: OpenAI's archive, or OpenCLIP's folder."""
    weights, settings, _ = read_golden(golden / f"{name}.safetensors")
    folder.mkdir()
    if name.startswith("openai"):
        numbers = {"input_resolution": 32, "context_length": 16, "vocab_size": 600}
        save_torchscript(folder / "ViT-tiny.pt", weights, attributes=numbers)
        return folder / "ViT-tiny.pt"
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": settings}))
    kind = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")["resnet" in name]
    save(folder / kind, weights)
    return folder


@pytest.fixture
def openclip(data_dir, tmp_path) -> Path:
    return write_source(tmp_path / "openclip", "openclip_vit_gelu_tiny", data_dir / "golden")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, Path]:
    """A model of hfclip with all that belongs to it, and the same as OpenCLIP's folder."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "ours").mkdir()
    save_folder(folder / "ours", "vit")
    run_script("export", folder / "ours", folder / "openclip", "--to", "openclip")
    return folder / "ours", folder / "openclip"


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


def fields(part: HFCLIPConfig | HFCLIPImageProcessor) -> dict:
    """What a config says but where it came from."""
    said = part.to_dict()
    return {name: said[name] for name in said if name not in ("auto_map", "architectures", "_name_or_path")}


# What is opened


@pytest.mark.parametrize("name", GOLDEN)
def test_is_the_converted_model_bit_for_bit_and_writes_nothing(name, data_dir, tokenizer, tmp_path):
    source = write_source(tmp_path / "source", name, data_dir / "golden")
    if name.startswith("openclip"):
        run_script("convert_openclip", source, tmp_path / "out", "--tokenizer", tokenizer)
    else:
        run_script("convert_openai", source, tmp_path / "out")
    before = contents(tmp_path)
    converted, opened = (HFCLIPModel.from_pretrained(path) for path in (tmp_path / "out", source))
    assert_same_tensors(opened.state_dict(), converted.state_dict())
    assert fields(opened.config) == fields(converted.config)
    assert opened.name_or_path == str(source) and not opened.training
    images = HFCLIPImageProcessor.from_pretrained(source)
    assert fields(images) == fields(HFCLIPImageProcessor.from_pretrained(tmp_path / "out"))
    if name.startswith("openclip"):
        found, expected = HFCLIPProcessor.from_pretrained(source, tokenizer=tokenizer), HFCLIPProcessor.from_pretrained(tmp_path / "out")  # fmt: skip
        assert found.image_processor.to_dict() == images.to_dict()
        texts = ["w5 w6", "w7 " * 40]
        assert found(text=texts)["input_ids"] == expected(text=texts)["input_ids"]
    assert contents(tmp_path) == before


@pytest.mark.parametrize("dtype", ["float16", torch.bfloat16])
def test_opens_in_the_precision_asked_for(dtype, openclip):
    exact = HFCLIPModel.from_pretrained(openclip)
    model, report = HFCLIPModel.from_pretrained(openclip, dtype=dtype, output_loading_info=True)
    assert not any(report.values())
    expected = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert_same_tensors(model.state_dict(), {name: tensor.to(expected) for name, tensor in exact.state_dict().items()})
    eager = HFCLIPModel.from_pretrained(openclip, attn_implementation="eager", device_map="cpu")
    assert eager.config._attn_implementation == "eager" and eager.dtype == torch.float32


def test_training_checkpoint_opens_with_the_weights_that_are_chosen(data_dir, tmp_path, caplog):
    weights, settings, tensors = read_golden(data_dir / "golden" / "openclip_vit_gelu_tiny.safetensors")
    averaged = {name: tensor + 1 for name, tensor in weights.items()}
    checkpoint = {"epoch": 1, "name": "run", "state_dict": {f"module.{n}": t for n, t in weights.items()}, "ema": averaged}  # fmt: skip
    torch.save(checkpoint, tmp_path / "epoch_1.pt")
    (tmp_path / "model.json").write_text(json.dumps(settings))
    told = {"architecture": str(tmp_path / "model.json")}
    found = HFCLIPModel.from_pretrained(tmp_path / "epoch_1.pt", **told).eval()
    text = found.encode_text(tensors["inputs/input_ids"], normalize=False)
    assert torch.allclose(text, tensors["outputs/text_features"], rtol=1e-4, atol=1e-5)
    assert "Taking the weights `state_dict`; ema can be chosen with weights=..." in caplog.text
    other = HFCLIPModel.from_pretrained(tmp_path / "epoch_1.pt", weights="ema", **told)
    assert other.logit_scale == found.logit_scale + 1
    # Shapes alone tell another model's heads and activation, and say what was assumed.
    HFCLIPModel.from_pretrained(tmp_path / "epoch_1.pt")
    assert "with GELU, 64 units a head" in caplog.text and "converted with architecture=" in caplog.text


def test_siglip_pads_with_the_tokenizers_id(tmp_path, monkeypatch):
    monkeypatch.setitem(SIGLIP_VITS, "tiny", (48, 12))
    source = siglip_source(tmp_path, *siglip_models(), siglip_settings(hf_tokenizer_name="a/name")).rename(
        tmp_path / "open_clip_model.safetensors"
    )
    (tmp_path / "model.json").rename(tmp_path / "open_clip_config.json")
    save_tokenizer(source.parent)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": "</s>"}))
    model, processor = HFCLIPModel.from_pretrained(tmp_path), HFCLIPProcessor.from_pretrained(tmp_path)
    assert model.config.text_config.pad_token_id == processor.tokenizer.pad_token_id == 2 != PAD


# Folders in both formats


def test_a_folder_in_both_formats_is_transformers_where_its_side_is_whole(openclip, tmp_path):
    CLIPModel(CLIPConfig(text_config=TOWER, vision_config=TOWER, projection_dim=8)).save_pretrained(openclip)
    assert HFCLIPModel.from_pretrained(openclip).config.projection_dim == 8
    run_script("convert_openclip", openclip, tmp_path / "out")  # which is asked for OpenCLIP's side
    weights = (openclip / "model.safetensors").rename(openclip / "other.safetensors")
    theirs = HFCLIPModel.from_pretrained(openclip)
    assert theirs.config.projection_dim == HFCLIPModel.from_pretrained(tmp_path / "out").config.projection_dim != 8
    weights = weights.rename(openclip / "model.safetensors")
    (openclip / "config.json").write_text('{"architecture": "vit_base_patch32_clip_224"}')  # timm's
    assert HFCLIPModel.from_pretrained(openclip).config.projection_dim == theirs.config.projection_dim


OPEN_FROM_HUB = """
import sys
from hfclip import HFCLIPModel, HFCLIPProcessor
for options in ({}, {"local_files_only": True}):
    model, processor = (kind.from_pretrained(sys.argv[1], **options) for kind in (HFCLIPModel, HFCLIPProcessor))
    print(len(processor.tokenizer), model.name_or_path, model.logit_scale.item())
for kind in (HFCLIPModel, HFCLIPProcessor, HFCLIPModel):
    kind.from_pretrained(sys.argv[2])
"""


def test_opens_names_of_the_hub_from_its_cache(whole, tmp_path):
    """OpenCLIP's files as well as hfclip's, whose commit is asked for once an opening."""
    ours, folder = whole
    with HubServer(tmp_path / "hub", users={TOKEN: "anna"}) as server:
        for name, place in {"anna/clip": folder, "anna/ours": ours}.items():
            files = {path.name: server.store(path.read_bytes(), large=path.suffix == ".safetensors") for path in place.iterdir()}  # fmt: skip
            files["open_clip_pytorch_model.bin"] = server.store(b"not to be fetched", large=True)
            server.create(name).commit("main", files, "first")
        settings = environment(server.url, tmp_path / "home", HF_HUB_OFFLINE="0")
        done = subprocess.run([sys.executable, "-c", OPEN_FROM_HUB, "anna/clip", "anna/ours"], env=settings, capture_output=True, text=True)  # fmt: skip
        assert done.returncode == 0, done.stderr
        length, scale = (
            len(HFCLIPProcessor.from_pretrained(ours).tokenizer),
            HFCLIPModel.from_pretrained(ours).logit_scale,
        )
        assert done.stdout.splitlines() == 2 * [f"{length} anna/clip {scale.item()}"]
        assert not server.asked(r"GET .*\.bin") and len(server.asked(r"GET /anna/clip/.*safetensors")) == 1
        of_config = server.asked(r"/anna/ours/resolve/.*/config\.json")
        assert len(of_config) == 4 and [asked.split()[0] for asked in of_config].count("GET") == 1, of_config
        assert not server.asked(r"ours/resolve/main/(?!config\.json)"), server.asked("ours/resolve/main")


@pytest.mark.parametrize("name", ["./runs/x", "runs/last/model", "/nothing", "two words"])
@pytest.mark.parametrize("opener", [HFCLIPModel, HFCLIPProcessor, HFCLIPConfig, HFCLIPImageProcessor])
def test_a_path_at_which_nothing_is_is_not_asked_for_on_the_hub(opener, name):
    with pytest.raises(
        FileNotFoundError, match=f"{name}: found nothing there, expected a folder or file here, or a name"
    ):
        opener.from_pretrained(name)


# What is made of it


@pytest.fixture
def hfclip(capsys, monkeypatch):
    def run(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["hfclip", *map(str, words)])
        hfclip_cli.main()
        return capsys.readouterr().out

    return run


def test_programs_take_it_as_they_take_a_folder_of_hfclip(whole, hfclip, tmp_path):
    ours, openclip = whole
    photo = ours / "photo.png"
    lines = [hfclip("classify", photo, "--model", folder, "--labels", "cat,dog") for folder in whole]
    assert lines[0] == lines[1] and lines[0].startswith(f"{photo}\t")
    facts = [json.loads(hfclip("info", folder, "--json")) for folder in whole]
    assert facts[1].pop("origin") == "a checkpoint of OpenAI or OpenCLIP, opened as it is"
    assert facts[0].pop("origin") == "not recorded"
    assert facts[0] == facts[1]


def test_classifier_and_trainer_start_from_it(whole, tmp_path):
    ours, openclip = whole
    models = [HFCLIPModel.from_pretrained(folder) for folder in whole]
    weights = [ZeroShotClassifier(model, HFCLIPProcessor.from_pretrained(folder), ["cat", "dog"]).label_embeds for model, folder in zip(models, whole)]  # fmt: skip
    assert torch.equal(*weights)
    recipe = tiny_recipe(tmp_path)
    config = Config.from_dict({**recipe, "model": {"checkpoint": str(openclip)}})
    architecture, processor = build_processor(config, build_architecture(config), None)
    assert_same_tensors(build_model(config, architecture).state_dict(), models[0].state_dict())
    assert processor(text=CAPTIONS)["input_ids"] == HFCLIPProcessor.from_pretrained(ours)(text=CAPTIONS)["input_ids"]


# What is refused


def test_says_what_a_file_is_that_it_does_not_open(data_dir, tmp_path):
    weights, _, _ = read_golden(data_dir / "golden" / "openai_vit_tiny.safetensors")
    CLIPModel(CLIPConfig(text_config=TOWER, vision_config=TOWER, projection_dim=8)).save_pretrained(tmp_path)
    (tmp_path / "page.pt").write_text("<html>404</html>")
    files = {
        save(tmp_path / "bare.pt", weights): 'both write; .* Pass architecture="ViT-B-32-quickgelu"',
        tmp_path / "model.safetensors": "found weights of transformers alone. Open the folder",
        save(tmp_path / "other.pt", {"weight": torch.ones(2)}): "found no tensors of a CLIP that is known",
        tmp_path / "page.pt": "this is a web page",
        write_archive(tmp_path / "forged.pt", b"\x80\x02cposix\nsystem\nX\x05\x00\x00\x00touch\x85R."): "forged",
    }
    for path, message in files.items():
        for opener in (HFCLIPModel, HFCLIPProcessor, HFCLIPConfig):
            with pytest.raises(UsageError, match=message):
                opener.from_pretrained(path)


def test_says_how_to_pass_what_is_missing(openclip, tmp_path):
    with pytest.raises(UsageError, match='OpenAI\'s has 49,408 tokens, this model 600. Pass tokenizer="FOLDER"'):
        HFCLIPProcessor.from_pretrained(openclip)
    with pytest.raises(UsageError, match="^tokenizer=...: found 'nothing': "):
        HFCLIPProcessor.from_pretrained(openclip, tokenizer="nothing")
    with pytest.raises(UsageError, match="found variant, which only files of transformers have"):
        HFCLIPModel.from_pretrained(openclip, variant="fp16")
    with pytest.raises(UsageError, match='architecture="ViT-B-32": its weights are'):
        HFCLIPModel.from_pretrained(openclip, architecture="ViT-B-32")
    settings = json.loads((openclip / "open_clip_config.json").read_text())
    settings["model_cfg"]["vision_cfg"]["patch_embed_type"] = "v1"
    (openclip / "open_clip_config.json").write_text(json.dumps(settings))
    with pytest.raises(UsageError, match="patch_embed_type: a patch embedding"):
        HFCLIPModel.from_pretrained(openclip)


def test_tensors_that_do_not_fit_are_an_error_before_any_is_read(openclip):
    weights = load_file(openclip / "open_clip_model.safetensors")
    del weights["ln_final.bias"]
    save(openclip / "open_clip_model.safetensors", weights)
    with pytest.raises(UsageError, match="1 tensors missing, such as text_model.final_layer_norm.bias"):
        HFCLIPModel.from_pretrained(openclip)


def test_code_that_came_with_a_model_says_that_hfclip_is_needed(whole, openclip, tmp_path):
    folder = shutil.copytree(whole[0], tmp_path / "ours")
    code = f"""
from transformers import AutoModel
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
try:
    type(model).from_pretrained({str(openclip)!r})
except ImportError as error:
    assert "Install hfclip" in str(error), error
else:
    raise AssertionError("opened without hfclip")
"""
    run_python(WITHOUT_HFCLIP + code, folder)
