"""The command `hfclip`: each verb on real folders, its exit codes, and help without torch."""

import json
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from test_readme import save_what_is_read

import hfclip_cli
from hfclip import HFCLIPModel


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    save_what_is_read(folder)
    return folder / "runs/quickstart/model"


@pytest.fixture
def hfclip(capsys, monkeypatch):
    """Runs the command in this process: exit code, output, messages."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hfclip", *map(str, words)])
        status = 0
        try:
            hfclip_cli.main()
        except SystemExit as end:
            status = end.code or 0
        return status, *capsys.readouterr()

    return run


def test_help_shows_an_example_of_each_verb_before_torch_could_be_imported():
    code = "import sys, hfclip_cli; hfclip_cli.main(); print('torch' in sys.modules, 'transformers' in sys.modules)"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)  # of the processor, which others cannot lengthen
    *lines, imported = done.stdout.splitlines()
    assert imported == "False False" and after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.3
    for verb in hfclip_cli.VERBS:
        assert any(line.startswith(f"  {verb} ") for line in lines)
        assert any(line.startswith(f"             $ hfclip {verb} ") for line in lines)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_that_comes_before_the_trainer_has_begun_ends_its_launcher(number):
    code = f"""
import os, signal, hfclip_cli
signal.signal({number:d}, lambda number, frame: hfclip_cli._pass_on(number, []))
hfclip_cli.run(lambda: os.kill(os.getpid(), {number:d}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 128 + number and done.stderr.strip() == ("Stopped." if number == signal.SIGINT else "")


@pytest.mark.parametrize("verb", ["classifyy", "dream", "--verbose"])
def test_unknown_verb_is_one_line(verb, hfclip):
    status, out, err = hfclip(verb)
    assert (status, out) == (2, "") and err.startswith(f"error: found no verb {verb!r}, expected one of train, plan")
    assert ("Did you mean 'classify'?" in err) == (verb == "classifyy")


def test_classify_takes_files_folders_and_patterns(hfclip, model, tmp_path):
    photos = tmp_path / "photos"
    (photos / "more").mkdir(parents=True)
    for place in (tmp_path / "one.jpg", photos / "two.jpg", photos / "more" / "three.png"):
        Image.new("RGB", (40, 32), "red").save(place)
    status, out, err = hfclip(
        "classify", tmp_path / "*.jpg", photos, "--model", model, "--labels", "cat, dog,red circle", "--top-k", 2
    )
    assert status == 0, err
    rows = [line.split("\t") for line in out.splitlines()]
    names = [tmp_path / "one.jpg", photos / "more" / "three.png", photos / "two.jpg"]
    assert [row[0] for row in rows] == [str(name) for name in names] and {len(row) for row in rows} == {3}


def test_classify_names_images_that_cannot_be_read_and_ends_with_1(hfclip, model, tmp_path):
    Image.new("RGB", (40, 32), "red").save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    (tmp_path / "labels.txt").write_text("cat\n\ndog\n")
    words = ("classify", tmp_path, "--model", model, "--labels-file", tmp_path / "labels.txt", "--json")
    status, out, err = hfclip(*words, "--templates", "a photo of a {}.", "a {}")
    assert status == 1 and "1 of 2 images cannot be read:\n" in err and "bad.png: " in err
    bad, good = map(json.loads, out.splitlines())
    assert bad["image"].endswith("bad.png") and bad["error"]
    assert {entry["label"] for entry in good["labels"]} == {"cat", "dog"}
    assert sum(entry["score"] for entry in good["labels"]) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    "words, message",
    [
        (["nothing.jpg", "--labels", "a,b"], "found no file 'nothing.jpg'"),
        (["good.png", "--labels", " , "], "--labels: found none"),
        (["good.png", "--labels", "a,a"], "labels repeat"),
        (["good.png", "--labels", "a", "--templates", "a photo"], "a photo"),
        (["good.png"], "one of the arguments --labels --labels-file is required"),
    ],
)
def test_wrong_usage_of_classify_ends_with_2(words, message, hfclip, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 32), "red").save("good.png")
    status, out, err = hfclip("classify", *words, "--model", model)
    assert (status, out) == (2, "") and message in err and "Traceback" not in err


def test_model_that_is_no_folder_here_is_not_asked_for_at_the_hub(hfclip, model, tmp_path, monkeypatch):
    """Which would take half a minute; and what is meant is named."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 32), "red").save("good.png")
    (tmp_path / "runs" / "my-model").mkdir(parents=True)
    for name, hint in (
        ("./my-modl", "'.' is there and holds good.png, runs."),
        ("runs/my-modl", "Did you mean 'runs/my-model'?"),
        ("runs/my-model/final", "'runs/my-model' is there and holds nothing."),
        ("rums/x/final", "Did you mean 'runs'?"),
    ):
        status, _, err = hfclip("classify", "good.png", "--model", name, "--labels", "a")
        assert (status, err) == (2, f"error: --model: found no folder {name!r}. {hint}\n")


def test_hub_that_cannot_be_reached_is_one_line(hfclip, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    status, _, err = hfclip("info", "nobody/nothing")
    assert status == 2 and err.count("\n") == 1 and "found no folder 'nobody/nothing' here, and the Hub" in err


@pytest.mark.parametrize("part", ["image processor", "tokenizer"])
def test_folder_of_weights_alone_is_refused_in_one_line(part, hfclip, model, tmp_path):
    gone = {"image processor": ("*processor_config.json",), "tokenizer": ("token*", "vocab*", "merges*")}[part]
    shutil.copytree(model, tmp_path / "model", ignore=shutil.ignore_patterns(*gone))
    Image.new("RGB", (40, 32), "red").save(tmp_path / "good.png")
    status, _, err = hfclip("classify", tmp_path / "good.png", "--model", tmp_path / "model", "--labels", "a")
    assert status == 2 and err.count("\n") == 1 and f"holds no {part} (found none of" in err


def test_export_refuses_a_file_for_a_folder_and_a_folder_for_a_file(hfclip, model, tmp_path):
    status, _, err = hfclip("export", model, tmp_path / "out", "--to", "openai")
    assert status == 2 and err.count("\n") == 1 and "expected a file, whose name ends with .pt or .safetensors" in err
    status, _, err = hfclip("export", model, tmp_path / "out.pt", "--to", "openclip")
    assert status == 2 and err.count("\n") == 1 and "expected the name of a folder" in err


def test_info_says_what_a_folder_holds(hfclip, model):
    status, out, err = hfclip("info", model, "--json")
    facts = json.loads(out)
    assert status == 0 and facts["origin"] == "not recorded" and facts["resolution"] == "32 x 32 pixels"
    assert facts["tokens"] == 77 and facts["logit scale"] == "14.28" and "per image" in facts["GFLOPs"]
    assert facts["parameters"] == sum(p.numel() for p in HFCLIPModel.from_pretrained(model).parameters())
    status, out, err = hfclip("info", model)
    assert status == 0 and [line[:16].strip() for line in out.splitlines()] == list(facts)
    status, out, err = hfclip("info", model.parent / "nothing")
    assert status == 2 and err.startswith("error: ") and "nothing" in err


def test_convert_finds_the_converter_and_info_tells_the_source(hfclip, model, tmp_path):
    source = tmp_path / "clip"
    shutil.copytree(model.parents[2] / "openai/clip-vit-base-patch32", source)
    status, out, err = hfclip("convert", source, tmp_path / "out")
    assert status == 0 and f"Written: {tmp_path / 'out'}" in out, err
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert record["command"].startswith("hfclip convert clip out")
    status, out, err = hfclip("info", tmp_path / "out")
    assert status == 0 and "converted from" in out
    status, out, err = hfclip("export", tmp_path / "out", tmp_path / "back", "--to", "transformers")
    assert status == 0 and (tmp_path / "back" / "model.safetensors").is_file(), err


def test_convert_says_what_it_cannot_know(hfclip, model, tmp_path):
    status, _, err = hfclip("convert", model, tmp_path / "out")
    assert status == 2 and "a model of hfclip, which needs no conversion" in err
    status, _, err = hfclip("convert", "--dtype", "float16", model, tmp_path / "out")
    assert status == 2 and "expected SOURCE and OUT" in err
    status, out, _ = hfclip("convert", "--help")
    assert status == 0 and "--from {openai,openclip,transformers}" in out
    status, out, _ = hfclip("convert", "--help", "--from", "openclip")
    assert status == 0 and "usage: hfclip convert" in out and "--merges" in out


@pytest.mark.parametrize("verb", ["plan", "embed", "evaluate", "report", "export", "push"])
def test_help_of_a_verb_is_its_own(verb, hfclip):
    status, out, err = hfclip(verb, "--help")
    assert status == 0 and out.startswith(f"usage: hfclip {verb}"), err
