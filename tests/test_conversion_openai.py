"""OpenAI's checkpoints become model folders by the command line: the same embeddings, every bit kept, nothing left behind
by what goes wrong."""

import hashlib
import json
import os
import re
import resource
import shutil
import signal
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from conversion_utils import (
    HALF,
    ROOT,
    assert_same_tensors,
    openai_shapes,
    relative,
    run_script,
    save,
    save_torchscript,
    start_script,
)
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from test_auto import WITHOUT_HFCLIP
from test_auto import run as run_python
from test_key_maps import read_golden
from test_modeling import PUBLISHED_PARAMETERS
from transformers import AutoModel, AutoProcessor

from conversion.convert_openai import PUBLISHED
from hfclip import HFCLIPConfig, HFCLIPModel
from hfclip.foreign.key_maps import hfclip_items, openai_config


NUMBERS = {"input_resolution": 224, "context_length": 77, "vocab_size": 49408}
# Two float32 implementations of the same sums: 2e-5 is some hundred units in the last place.
FLOAT32 = 2e-5
OPENAI = ["openai_resnet_tiny", "openai_vit_tiny"]


@torch.no_grad()
def assert_computes(folder, tensors) -> None:
    """The folder's model gives the outputs that lie beside the golden weights."""
    model = AutoModel.from_pretrained(folder).eval()
    outputs = model(input_ids=tensors["inputs/input_ids"], pixel_values=tensors["inputs/pixel_values"])
    image = model.encode_image(tensors["inputs/pixel_values"], normalize=False)
    text = model.encode_text(tensors["inputs/input_ids"], normalize=False)
    assert relative(image, tensors["outputs/image_features"]) < FLOAT32
    assert relative(text, tensors["outputs/text_features"]) < FLOAT32
    assert relative(outputs.logits_per_image, tensors["outputs/logits_per_image"]) < FLOAT32


@pytest.fixture
def weights(data_dir):
    return read_golden(data_dir / "golden" / "openai_vit_tiny.safetensors")[0]


@pytest.fixture
def source(weights, tmp_path):
    return save(tmp_path / "model.safetensors", weights)


def left_in(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


# What is converted


@pytest.mark.parametrize("name", OPENAI)
@pytest.mark.parametrize("suffix", [".pt", ".bin", ".safetensors"])
def test_state_dict_agrees_and_comes_back_bit_for_bit(name, suffix, data_dir, tmp_path):
    weights, _, tensors = read_golden(data_dir / "golden" / f"{name}.safetensors")
    source = save(tmp_path / f"model{suffix}", weights)
    run_script("convert_openai", source, tmp_path / "out")
    assert_computes(tmp_path / "out", tensors)
    assert_same_tensors(load_file(tmp_path / "out" / "model.safetensors"), dict(hfclip_items(weights)))
    for back, load in (("back.pt", torch.load), ("back.safetensors", load_file)):
        run_script("export", tmp_path / "out", tmp_path / back, "--to", "openai")
        assert_same_tensors(load(tmp_path / back), weights)


@pytest.mark.parametrize("name", OPENAI)
def test_torchscript_archive_keeps_the_dtype_of_each_tensor(name, data_dir, tmp_path):
    weights, _, tensors = read_golden(data_dir / "golden" / f"{name}.safetensors")
    save_torchscript(tmp_path / "model.pt", weights, attributes=NUMBERS)
    stored = {key: tensor.half() if HALF.fullmatch(key) else tensor for key, tensor in weights.items()}
    run_script("convert_openai", tmp_path / "model.pt", tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert_same_tensors(found, dict(hfclip_items(stored)))
    assert {tensor.dtype for tensor in found.values() if tensor.ndim} == {torch.float16, torch.float32}
    # The embeddings of the rounded weights, by a model that was loaded without any conversion of files.
    plain = HFCLIPModel(openai_config(weights)).eval()
    plain.load_state_dict(dict(hfclip_items({key: tensor.float() for key, tensor in stored.items()})))
    converted = AutoModel.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        for method, inputs in (("encode_image", "inputs/pixel_values"), ("encode_text", "inputs/input_ids")):
            found, expected = (
                getattr(model, method)(tensors[inputs], normalize=False) for model in (converted, plain)
            )
            assert relative(found, expected) < FLOAT32
    run_script("export", tmp_path / "out", tmp_path / "back.safetensors", "--to", "openai")
    assert_same_tensors(load_file(tmp_path / "back.safetensors"), stored)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtype_rounds_every_floating_point_tensor(dtype, weights, source, tmp_path):
    result = run_script("convert_openai", source, tmp_path / "out", "--dtype", dtype)
    expected = {name: tensor.to(getattr(torch, dtype)) for name, tensor in hfclip_items(weights)}
    assert_same_tensors(load_file(tmp_path / "out" / "model.safetensors"), expected)
    assert "What rounding changes" in result.out
    assert AutoModel.from_pretrained(tmp_path / "out", dtype="auto").dtype == getattr(torch, dtype)


def test_record_and_card_tell_the_truth_and_no_path(source, tmp_path):
    run_script("convert_openai", source, tmp_path / "out")
    text = (tmp_path / "out" / "conversion.json").read_text()
    card = (tmp_path / "out" / "README.md").read_text()
    record = json.loads(text)
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (source, tmp_path / "out/model.safetensors")]
    assert record["source"] == {"file": "model.safetensors", "format": "safetensors", "sha256": digests[0]}
    assert record["result"] == {"model.safetensors": digests[1]}
    assert record["dtypes"] == ["float32"]
    assert record["differences"].keys() == {"image_features", "text_features"}
    # float64 on both sides: some units in the last place, and not the zero of a comparison with itself.
    assert all(0 < values["relative"] < 1e-12 for values in record["differences"].values())
    assert record["command"] == "convert_openai.py model.safetensors out"
    assert card.count("\n# out\n") == 1 and digests[0] in card and "Largest relative difference" in card
    assert str(tmp_path) not in text + card and str(ROOT) not in text + card


def test_openais_vocabulary_gets_openais_tokenizer(weights, data_dir, tmp_path):
    weights["token_embedding.weight"] = torch.randn(49408, 64) / 50
    source = save(tmp_path / "model.pt", weights)
    merges = data_dir / "bpe_simple_vocab_16e6.txt.gz"
    run_script("convert_openai", source, tmp_path / "out", "--merges", merges)
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert processor.tokenizer("a photo of a cat")["input_ids"] == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert processor.tokenizer.model_max_length == 16
    assert processor.image_processor.crop_size["height"] == 32

    error = run_script("convert_openai", source, tmp_path / "two", "--merges", tmp_path / "none.gz", status=2).error
    assert "--merges" in error and "none.gz" in error
    # Tests have no network, like many a machine that converts.
    error = run_script("convert_openai", source, tmp_path / "three", status=2).error
    assert "No tokenizer: OpenAI's cannot be fetched from the Hub" in error and "Pass --merges" in error
    assert not (tmp_path / "three").exists()


def test_merges_of_another_vocabulary_are_refused(source, data_dir, tmp_path):
    merges = data_dir / "bpe_simple_vocab_16e6.txt.gz"
    error = run_script("convert_openai", source, tmp_path / "out", "--merges", merges, status=2).error
    assert "--merges: found 49408 tokens, expected the model's 600" in error


def test_the_snippets_of_the_card_run_in_the_folder(weights, data_dir, tmp_path, monkeypatch):
    run_script("convert_openai", save(tmp_path / "small.pt", weights), tmp_path / "bare")
    weights["token_embedding.weight"] = torch.randn(49408, 64) / 50
    source, merges = save(tmp_path / "model.pt", weights), data_dir / "bpe_simple_vocab_16e6.txt.gz"
    run_script("convert_openai", source, tmp_path / "whole", "--merges", merges)
    for name, count in (("bare", 1), ("whole", 2)):
        monkeypatch.chdir(tmp_path / name)
        Image.new("RGB", (40, 50), "red").save("picture.jpg")
        card = ModelCard.load("README.md")
        snippets, found = re.findall("```python\n(.*?)```", card.text, flags=re.DOTALL), {}
        assert len(snippets) == count
        for snippet in snippets:
            exec(snippet, found)
        assert found.get("probabilities", found.get("image_embeds")).shape == ((1, 2) if name == "whole" else (1, 48))
        assert (card.data.pipeline_tag is None) == (name == "bare") == ("pipelines need both" in card.text)


def test_a_converted_folder_opens_where_hfclip_is_missing(data_dir, tmp_path):
    weights, _, tensors = read_golden(data_dir / "golden" / "openai_resnet_tiny.safetensors")
    save_torchscript(tmp_path / "model.pt", weights, attributes=NUMBERS)
    run_script("convert_openai", tmp_path / "model.pt", tmp_path / "out")
    inputs = {name.removeprefix("inputs/"): t.tolist() for name, t in tensors.items() if name.startswith("inputs/")}
    with torch.no_grad():
        model = AutoModel.from_pretrained(tmp_path / "out").eval()
        expected = model(**{name: torch.tensor(value) for name, value in inputs.items()}).logits_per_image.tolist()
    (tmp_path / "out" / "expected.json").write_text(json.dumps({"captions": [], "logits": expected[0], **inputs}))
    code = """
import torch
from transformers import AutoModel
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules")
inputs = {name: torch.tensor(expected[name]) for name in ("input_ids", "pixel_values")}
check(model(**inputs).logits_per_image[0].tolist())
"""
    run_python(WITHOUT_HFCLIP + code, tmp_path / "out")


# Full size, shapes only

PUBLISHED_NUMBERS = {
    "RN50": dict(dim=1024, text=(512, 8, 12), layers=(3, 4, 6, 3), width=64, size=224),
    "RN101": dict(dim=512, text=(512, 8, 12), layers=(3, 4, 23, 3), width=64, size=224),
    "RN50x4": dict(dim=640, text=(640, 10, 12), layers=(4, 6, 10, 6), width=80, size=288),
    "RN50x16": dict(dim=768, text=(768, 12, 12), layers=(6, 8, 18, 8), width=96, size=384),
    "RN50x64": dict(dim=1024, text=(1024, 16, 12), layers=(3, 15, 36, 10), width=128, size=448),
    "ViT-B/32": dict(dim=512, text=(512, 8, 12), layers=12, width=768, size=224, patch=32),
    "ViT-B/16": dict(dim=512, text=(512, 8, 12), layers=12, width=768, size=224, patch=16),
    "ViT-L/14": dict(dim=768, text=(768, 12, 12), layers=24, width=1024, size=224, patch=14),
    "ViT-L/14@336px": dict(dim=768, text=(768, 12, 12), layers=24, width=1024, size=336, patch=14),
}


def assert_covers(shapes, config) -> int:
    """The tensors of `shapes` become exactly those of a model of `config`; returns the number of its parameters."""
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    found = {name: tensor.shape for name, tensor in hfclip_items(tensors)}
    with torch.device("meta"):
        model = HFCLIPModel(config)
    assert found == {name: tensor.shape for name, tensor in model.state_dict().items()}
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", PUBLISHED_NUMBERS)
def test_published_model_is_covered_whole(name):
    shapes = openai_shapes(**PUBLISHED_NUMBERS[name])
    config = openai_config({key: torch.empty(shape, device="meta") for key, shape in shapes.items()})
    assert config.to_dict() == HFCLIPConfig.from_preset(name).to_dict()
    assert assert_covers(shapes, config) == PUBLISHED_PARAMETERS[name]
    trained = {key: shape for key, shape in shapes.items() if "running_" not in key and "num_batches" not in key}
    assert sum(torch.Size(shape).numel() for shape in trained.values()) == PUBLISHED_PARAMETERS[name]


# What is refused


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda w: w.pop("visual.proj"), "1 tensors missing, such as visual_projection.weight"),
        (lambda w: w.pop("ln_final.bias"), "text_model.final_layer_norm.bias"),
        (lambda w: w.pop("token_embedding.weight"), "'token_embedding.weight'] are missing"),
        (lambda w: w.pop("transformer.resblocks.1.mlp.c_fc.weight"), "1 tensors missing"),
        (lambda w: w.update({"visual.extra.weight": torch.ones(2)}), "visual.extra.weight"),
        (lambda w: w.update({"module.logit_scale": torch.ones(())}), "module.logit_scale"),
        (lambda w: w.update({"ln_final.weight": torch.ones(3)}), "[3] for [64]"),
        (lambda w: w.update({"visual.conv1.weight": torch.ones(3)}), "found shape (3,), expected 4 dimensions"),
        (lambda w: w.update({"token_embedding.weight": torch.ones(600, 128)}), "[16, 64] for [16, 128]"),
        (lambda w: w.update({"visual.positional_embedding": torch.ones(18, 128)}), "[18, 128] for [17, 128]"),
        (lambda w: w["token_embedding.weight"][3].fill_(float("nan")), "64 values that are not finite"),
        (lambda w: w["ln_final.bias"].fill_(float("inf")), "not finite"),
    ],
)
def test_rejects_weights_that_are_no_whole_model(change, expected, weights, tmp_path):
    change(weights)
    source = save(tmp_path / "model.pt", weights)
    assert expected in run_script("convert_openai", source, tmp_path / "out", status=2).error
    assert left_in(tmp_path) == {"model.pt"}


def test_rejects_what_half_precision_cannot_hold(weights, tmp_path):
    weights["token_embedding.weight"][5, 7] = 70_000.0  # the fixed texts of the proof need not use this token
    source = save(tmp_path / "model.pt", weights)
    error = run_script("convert_openai", source, tmp_path / "out", "--dtype", "float16", status=2).error
    assert "'text_model.embeddings.token_embedding.weight' reaches 7e+04, more than torch.float16 holds" in error
    assert left_in(tmp_path) == {"model.pt"}
    run_script("convert_openai", source, tmp_path / "out", "--dtype", "bfloat16")


def test_rejects_another_file_under_a_published_name(weights, tmp_path):
    source = save(tmp_path / "RN50.pt", weights)
    error = run_script("convert_openai", source, tmp_path / "out", status=2).error
    assert PUBLISHED["RN50.pt"] in error and "--any-hash" in error and left_in(tmp_path) == {"RN50.pt"}
    run_script("convert_openai", source, tmp_path / "out", "--any-hash")


def test_rejects_sources_that_are_no_checkpoint(source, tmp_path):
    half = tmp_path / "half.safetensors"
    half.write_bytes(source.read_bytes()[:100_000])
    (tmp_path / "folder").mkdir()
    for path, expected in ((half, "no complete safetensors file"), (tmp_path / "folder", "no checkpoint"), (tmp_path / "no", "no such file")):  # fmt: skip
        assert expected in run_script("convert_openai", path, tmp_path / "out", status=2).error
    assert not (tmp_path / "out").exists()


def test_an_output_that_exists_is_kept_unless_overwrite_is_asked_for(weights, source, tmp_path):
    run_script("convert_openai", source, tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    other = save(tmp_path / "other.pt", {name: 2 * tensor for name, tensor in weights.items()})
    assert "exists already" in run_script("convert_openai", other, tmp_path / "out", status=2).error
    nan = save(tmp_path / "nan.pt", {**weights, "logit_scale": torch.tensor(float("nan"))})
    assert "not finite" in run_script("convert_openai", nan, tmp_path / "out", "--overwrite", status=2).error
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    run_script("convert_openai", other, tmp_path / "out", "--overwrite")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != before
    assert left_in(tmp_path) == {"model.safetensors", "other.pt", "nan.pt", "out"}


def test_the_output_is_looked_at_before_the_source(tmp_path):
    """None of these sources could be read."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out.pt").write_text("mine")
    absent, out = tmp_path / "absent", tmp_path / "out"
    for script, *arguments in (
        ("convert_openai", absent, out),
        ("convert_openclip", absent, out),
        ("convert_transformers", absent, out),
        ("surgery", "resize", absent, out, "--image-size", 64),
        ("export", absent, out, "--to", "onnx"),
        ("export", absent, tmp_path / "out.pt", "--to", "openai"),
    ):
        result = run_script(script, *arguments, status=2)
        assert "exists already" in result.error and result.out == ""


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs POSIX permissions")
def test_a_place_where_nothing_can_be_written_is_called_so(source, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o555)
    user = os.geteuid()
    if user == 0:  # root may write everywhere
        os.seteuid(65534)
    try:
        for out in ("out", "more/out"):
            error = run_script("convert_openai", source, tmp_path / "closed" / out, status=2).error
            assert "is not writable (Permission denied). Choose another place" in error
    finally:
        os.seteuid(user)
    assert not any((tmp_path / "closed").iterdir())


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder in which nobody can make files")
def test_a_file_system_without_new_files_is_not_taken_for_a_lock(source):
    assert "/proc is not writable" in run_script("convert_openai", source, "/proc/out", status=2).error


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--private"], "Found --private without --push-to-hub"),
        (["--revision", "v1"], "Found --revision without --push-to-hub"),
        (["--private", "--revision", "v1"], "Found --private and --revision without --push-to-hub"),
        (["--push-to-hub", "no//name"], "no//name"),
        (["--push-to-hub", ""], "Repo id must use"),
        (["--push-to-hub", "me/clip", "--revision", "a b"], "revision: found 'a b'"),
    ],
)
def test_rejects_settings_of_the_hub_that_make_no_sense_before_any_work(arguments, expected, source, tmp_path):
    result = run_script("convert_openai", source, tmp_path / "out", *arguments, status=2)
    assert expected in result.error and result.out == "" and left_in(tmp_path) == {"model.safetensors"}


def test_overwrite_deletes_no_file_no_foreign_folder_and_no_source(source, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("mine")
    inside = shutil.copytree(tmp_path / "photos", tmp_path / "models") / source.name
    shutil.copyfile(source, inside)
    (tmp_path / "models" / "config.json").write_text("{}")
    (tmp_path / "project" / ".git").mkdir(parents=True)
    (tmp_path / "project" / "config.json").write_text("{}")
    for start, out, expected in (
        (source, tmp_path / "file", "is a file"),
        (source, tmp_path / "photos", "is no folder of a model"),
        (source, tmp_path / "project", "holds other folders"),
        (inside, tmp_path / "models", "holds the source"),
        (source, tmp_path / "file" / "out", "file is not writable (Not a directory)"),
    ):
        assert expected in run_script("convert_openai", start, out, "--overwrite", status=2).error
    assert left_in(tmp_path) == {"file", "photos", "project", "models", "model.safetensors"}
    assert inside.exists() and (tmp_path / "photos" / "cat.jpg").exists()


def test_a_full_disk_is_said_before_and_while_writing(source, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10**6))
    assert "0.00 GB free" in run_script("convert_openai", source, tmp_path / "out", status=2).error
    monkeypatch.undo()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limit[1]))  # what a full disk does, for files of this process
    try:
        error = run_script("convert_openai", source, tmp_path / "out", status=2).error
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "File too large" in error and left_in(tmp_path) == {"model.safetensors"}


# A conversion that stops when the folder is nearly complete.
HANGING = """
import time, conversion.convert as convert
def hang(*_):
    print("writing", flush=True)
    time.sleep(600)
convert.compare = hang
"""


def test_one_process_at_a_time_and_a_killed_one_leaves_nothing_that_matters(source, tmp_path):
    process = start_script("convert_openai", source, tmp_path / "out", patch=HANGING)
    while "writing" not in process.stdout.readline():
        assert process.poll() is None, process.stderr.read()
    assert "Another process is writing" in run_script("convert_openai", source, tmp_path / "out", status=2).error
    assert (tmp_path / ".out.hfclip-partial" / "model.safetensors").is_file()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert ".out.hfclip-partial" in left_in(tmp_path) and "out" not in left_in(tmp_path)
    run_script("convert_openai", source, tmp_path / "out")
    assert left_in(tmp_path) == {"model.safetensors", "out"}


def test_ctrl_c_leaves_nothing_and_says_so(source, tmp_path):
    process = start_script("convert_openai", source, tmp_path / "out", patch=HANGING)
    while "writing" not in process.stdout.readline():
        assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Interrupted; nothing was written" in err and "Traceback" not in err
    assert left_in(tmp_path) == {"model.safetensors"}


def test_rejects_what_openais_checkpoints_never_hold(weights, tmp_path):
    for changes, expected in (
        (
            {"logit_bias": torch.tensor(-10.0)},
            "found a checkpoint of OpenCLIP, expected a checkpoint of OpenAI's CLIP. Use hfclip convert FILE_OR_FOLDER OUT --from openclip",
        ),
        ({"ln_final.weight": torch.ones(64, dtype=torch.int64)}, "1 of whole numbers, such as"),
    ):
        start = save(tmp_path / "changed.safetensors", {**weights, **changes})
        assert expected in run_script("convert_openai", start, tmp_path / "out", status=2).error
    assert left_in(tmp_path) == {"changed.safetensors"}


def test_files_beside_the_output_stay(source, tmp_path):
    for name in ("out.partial", "out.replaced", "out.lock"):
        (tmp_path / name).write_text("mine")
    run_script("convert_openai", source, tmp_path / "out")
    run_script("convert_openai", source, tmp_path / "out", "--overwrite")
    assert left_in(tmp_path) == {"model.safetensors", "out", "out.partial", "out.replaced", "out.lock"}


def test_a_link_to_a_folder_stays_one(source, tmp_path):
    run_script("convert_openai", source, tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    run_script("convert_openai", source, tmp_path / "link", "--overwrite")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "model.safetensors").is_file()
