"""What the user did is said in one line, and by whom a file is read; what a program does wrong shows its traceback."""

import json
import tarfile
import zipfile

import pytest
import torch
from conversion_utils import run_script, save, save_torchscript
from test_key_maps import read_golden
from transformers import CLIPConfig, CLIPModel

from hfclip import HFCLIPConfig, HFCLIPModel


OPENAI, OPENCLIP = "OUT --from openai", "OUT --from openclip"
TRANSFORMERS, HFCLIP = "hfclip convert FOLDER OUT, with", "HFCLIPModel.from_pretrained(FOLDER)"
TEXT = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=100, bos_token_id=98, eos_token_id=99)  # fmt: skip
VISION = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8)  # fmt: skip


@pytest.mark.parametrize(
    "name, options",
    [
        ("convert_openai", ()),
        ("convert_openclip", ()),
        ("convert_transformers", ()),
        ("export", ("--to", "openai")),
        ("surgery", ("--image-size", 64)),
    ],
)
def test_a_fault_of_the_program_is_not_told_as_the_users(name, options, tmp_path, monkeypatch):
    def fault(*_):
        raise ValueError("too many values to unpack")

    for module in ("convert", name):
        monkeypatch.setattr(f"conversion.{module}.open_checkpoint", fault, raising=False)
    source = tmp_path / "source"
    if name not in ("convert_openai", "convert_openclip"):
        source.mkdir()
        (source / "config.json").write_text(json.dumps({"model_type": "clip"}))
    operation = ["resize"] if name == "surgery" else []
    with pytest.raises(ValueError, match="too many values to unpack"):
        run_script(name, *operation, source, tmp_path / "out.pt", *options)


@pytest.fixture
def files(data_dir, tmp_path):
    """One of everything that a converter may be given, by whose it is."""
    openai, _, _ = read_golden(data_dir / "golden" / "openai_vit_tiny.safetensors")
    openclip, settings, _ = read_golden(data_dir / "golden" / "openclip_vit_gelu_tiny.safetensors")
    save_torchscript(tmp_path / "archive.pt", openai, attributes=dict(input_resolution=32, context_length=16, vocab_size=600))  # fmt: skip
    torch.save({"epoch": 1, "name": "run", "state_dict": {f"module.{k}": v for k, v in openclip.items()}}, tmp_path / "epoch_1.pt")  # fmt: skip
    for name in ("hub", "theirs", "ours"):
        (tmp_path / name).mkdir()
    save(tmp_path / "hub" / "open_clip_model.safetensors", openclip)
    (tmp_path / "hub" / "open_clip_config.json").write_text(json.dumps({"model_cfg": settings}))
    CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16)).save_pretrained(tmp_path / "theirs")  # fmt: skip
    HFCLIPModel(HFCLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16)).save_pretrained(tmp_path / "ours")  # fmt: skip
    (tmp_path / "ours" / "trainer_state").mkdir()
    save(tmp_path / "ours" / "trainer_state" / "optimizer.pt", {"state": torch.ones(2)})
    return tmp_path


def test_each_converter_names_the_one_that_takes_the_file(files):
    expected = {
        "archive.pt": OPENAI,
        "epoch_1.pt": OPENCLIP,
        "hub": OPENCLIP,
        "theirs": TRANSFORMERS,
        "theirs/model.safetensors": TRANSFORMERS,
        "ours": HFCLIP,
        "ours/trainer_state": HFCLIP,
        "ours/trainer_state/optimizer.pt": HFCLIP,
    }
    own = {"convert_openai": OPENAI, "convert_openclip": OPENCLIP, "convert_transformers": TRANSFORMERS}
    for program, advice in own.items():
        for name, right in expected.items():
            if right != advice:
                error = run_script(program, files / name, files / "out", status=2).error
                assert right in error, (program, name, error)
    assert "with its folder" in run_script("convert_transformers", files / "theirs/model.safetensors", files / "out", status=2).error  # fmt: skip


def test_archives_and_other_files_are_named_by_every_converter(files):
    with zipfile.ZipFile(files / "any.zip", "w") as archive:
        archive.writestr("a.txt", "a")
    with tarfile.open(files / "any.tar", "w") as archive:
        archive.add(files / "hub" / "open_clip_config.json", "a.json")
    (files / "any.pt").write_text("<html>")
    for program in ("convert_openai", "convert_openclip", "convert_transformers"):
        for name, expected in (("any.zip", "a zip archive"), ("any.tar", "a tar file"), ("any.pt", "a web page")):
            assert expected in run_script(program, files / name, files / "out", status=2).error, (program, name)
