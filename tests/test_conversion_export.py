"""ONNX towers compute what the model does, for every batch and length; exports refuse bad folders and keep what exists."""

import json
import shutil

import numpy as np
import pytest
import torch
from conversion_utils import relative, run_script, save, start_script
from test_conversion_openai import left_in
from test_conversion_openclip import CLIPA
from test_conversion_transformers import convert_openclip
from test_key_maps import read_golden
from transformers import AutoImageProcessor

from hfclip import HFCLIPConfig, HFCLIPModel


# float32 by two libraries whose kernels sum in different orders
ONNX = 1e-4


def onnx_session(path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module", params=["openai_resnet_tiny", "openai_vit_tiny"])
def ours(request, data_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    weights, _, tensors = read_golden(data_dir / "golden" / f"{request.param}.safetensors")
    run_script("convert_openai", save(folder / "model.pt", weights), folder / "ours")
    return folder / "ours", tensors


def test_onnx_takes_any_batch_and_any_length(ours, tmp_path):
    pytest.importorskip("onnxscript"), pytest.importorskip("onnxruntime")
    folder, tensors = ours
    if "vit" in folder.parent.name:
        run_script("export", folder, tmp_path / "out", "--to", "onnx")
    else:
        process = start_script("export", folder, tmp_path / "out", "--to", "onnx")
        _, err = process.communicate(timeout=180)
        assert process.returncode == 0 and "Traceback" not in err, err
    pixels, ids = tensors["inputs/pixel_values"], tensors["inputs/input_ids"]
    image = onnx_session(tmp_path / "out" / "onnx" / "vision_model.onnx")
    for batch in (pixels, pixels[:1], torch.cat([pixels, pixels])):
        (found,) = image.run(["image_embeds"], {"pixel_values": batch.numpy()})
        assert relative(torch.from_numpy(found[: len(pixels)]), tensors["outputs/image_features"][: len(found)]) < ONNX
    text = onnx_session(tmp_path / "out" / "onnx" / "text_model.onnx")
    longest = int((ids == 599).int().argmax(dim=1).max()) + 1
    assert longest < ids.shape[1]
    for batch in (ids, ids[:1], ids[:, :longest], torch.cat([ids, ids])):
        (found,) = text.run(["text_embeds"], {"input_ids": batch.numpy()})
        assert relative(torch.from_numpy(found[: len(ids)]), tensors["outputs/text_features"][: len(found)]) < ONNX
    assert AutoImageProcessor.from_pretrained(tmp_path / "out").crop_size["height"] == pixels.shape[-1]
    assert "auto_map" not in (tmp_path / "out" / "config.json").read_text()  # there are no weights to open
    config = HFCLIPConfig.from_pretrained(tmp_path / "out")
    assert abs(config.logit_scale_init_value - tensors["weights/logit_scale"].item()) < 1e-6
    for file in (tmp_path / "out" / "onnx").iterdir():
        assert b"/conversion/" not in file.read_bytes()  # no path of this machine


def test_onnx_of_a_tower_that_reads_its_padding(data_dir, tmp_path):
    pytest.importorskip("onnxscript"), pytest.importorskip("onnxruntime")
    ours = convert_openclip(data_dir, tmp_path, "openclip_vit_gelu_tiny", CLIPA)
    run_script("export", ours, tmp_path / "out", "--to", "onnx")
    session = onnx_session(tmp_path / "out" / "onnx" / "text_model.onnx")
    ids = np.random.default_rng(0).integers(0, 600, (5, 16))
    (found,) = session.run(None, {"input_ids": ids})
    with torch.no_grad():
        expected = HFCLIPModel.from_pretrained(ours).eval().encode_text(torch.from_numpy(ids), normalize=False)
    assert relative(torch.from_numpy(found), expected) < ONNX


def test_onnx_of_a_bag_of_words(tmp_path):
    text = dict(model_type="hfclip_bag_of_words", hidden_size=32, vocab_size=100, eos_token_id=99)
    vision = dict(model_type="hfclip_resnet", depths=(1, 1, 1, 1), stem_width=8, image_size=32, projection_dim=16)
    model = HFCLIPModel(HFCLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    model.save_pretrained(tmp_path / "ours")
    run_script("export", tmp_path / "ours", tmp_path / "out", "--to", "onnx")
    ids = np.array([[5, 7, 99], [1, 99, 0]])
    (found,) = onnx_session(tmp_path / "out" / "onnx" / "text_model.onnx").run(None, {"input_ids": ids})
    with torch.no_grad():
        assert relative(torch.from_numpy(found), model.encode_text(torch.from_numpy(ids), normalize=False)) < ONNX


@pytest.mark.parametrize("to", ["openai", "openclip", "transformers", "onnx"])
def test_rejects_folders_that_are_no_whole_model(to, data_dir, tmp_path):
    weights, _, _ = read_golden(data_dir / "golden" / "openai_vit_tiny.safetensors")
    run_script("convert_openai", save(tmp_path / "model.pt", weights), tmp_path / "ours")
    cut, lacking, empty = (tmp_path / name for name in ("cut", "lacking", "empty"))
    shutil.copytree(tmp_path / "ours", cut)
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:100_000])
    shutil.copytree(tmp_path / "ours", lacking)
    config = json.loads((lacking / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 3
    (lacking / "config.json").write_text(json.dumps(config))
    siglip = shutil.copytree(lacking, tmp_path / "siglip")
    (siglip / "config.json").write_text(json.dumps({**config, "model_type": "siglip"}))
    empty.mkdir()
    before = left_in(tmp_path)
    for source, expected in (
        (cut, "no complete safetensors file"),
        (lacking, "16 tensors missing, such as text_model.encoder.layers.2."),
        (siglip, "found a model of type 'siglip', "),
        (empty, "found no config.json"),
        (tmp_path / "nowhere", "found no config.json"),
    ):
        out = tmp_path / ("out.pt" if to == "openai" else "out")
        assert expected in run_script("export", source, out, "--to", to, status=2).error
    assert left_in(tmp_path) == before


def test_rejects_outputs_that_exist_and_suffixes_that_are_no_file(ours, tmp_path):
    folder, _ = ours
    (tmp_path / "out.pt").write_text("mine")
    assert "exists already" in run_script("export", folder, tmp_path / "out.pt", "--to", "openai", status=2).error
    assert "ends with .pt or" in run_script("export", folder, tmp_path / "out.zip", "--to", "openai", status=2).error
    assert (
        "holds the source" in run_script("export", folder, folder, "--to", "openclip", "--overwrite", status=2).error
    )
    weights = folder / "model.safetensors"
    error = run_script("export", folder, weights, "--to", "openai", "--overwrite", status=2).error
    assert "holds the source or a part of it" in error
    assert left_in(tmp_path) == {"out.pt"} and (tmp_path / "out.pt").read_text() == "mine"
    run_script("export", folder, tmp_path / "out.pt", "--to", "openai", "--overwrite")
    assert "logit_scale" in torch.load(tmp_path / "out.pt")


@pytest.mark.parametrize("to, library", [("openai", "openai/CLIP would have"), ("transformers", "no tower of type")])
def test_rejects_towers_of_other_kinds(to, library, tmp_path):
    """A bag of words, or a head width that OpenAI's code does not have."""
    text = dict(model_type="hfclip_bag_of_words", hidden_size=32, vocab_size=100, eos_token_id=99)
    if to == "openai":
        text = dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=1, vocab_size=100, bos_token_id=98, eos_token_id=99)  # fmt: skip
    vision = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, image_size=32, patch_size=8)  # fmt: skip
    HFCLIPModel(HFCLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(
        tmp_path / "ours"
    )
    out = tmp_path / ("out.pt" if to == "openai" else "out")
    assert library in run_script("export", tmp_path / "ours", out, "--to", to, status=2).error
