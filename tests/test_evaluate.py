"""The command `hfclip evaluate` and `hfclip.evaluation.running`, on real folders, in real processes."""

import csv
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from test_evaluation import write_tar
from training_utils import ROOT

from hfclip import HFCLIPConfig, HFCLIPImageProcessor, HFCLIPModel, HFCLIPProcessor, HFCLIPTokenizer
from hfclip.commands import evaluate as command
from hfclip.commands import report as report_command
from hfclip.errors import UsageError
from hfclip.evaluation import DataSet, Plot, registry
from hfclip.evaluation.adapter import adapt, adapt_transformers
from hfclip.evaluation.records import Record
from hfclip.evaluation.running import evaluate, open_model


LABELS = ["cat", "dog", "bus"]
TEMPLATES = ["a photo of a {c}.", "the {c}"]


def save_model(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    tower = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    text = dict(model_type="hfclip_text", vocab_size=524, bos_token_id=522, eos_token_id=523, **tower)
    vision = dict(model_type="hfclip_vit", image_size=32, patch_size=16, **tower)
    HFCLIPModel(HFCLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    tokenizer = HFCLIPTokenizer.train_new_from_iterator(LABELS + TEMPLATES * 2, 524)
    HFCLIPProcessor(image_processor=HFCLIPImageProcessor(size=32), tokenizer=tokenizer).save_pretrained(folder)
    return folder


def noise(index: int) -> bytes:
    values = np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    path = Path(os.environ["PYTEST_TMP"]) / "noise.png"
    Image.fromarray(values).save(path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two models, and a data set in the layout of clip-benchmark with train and test."""
    folder = tmp_path_factory.mktemp("evaluate")
    os.environ["PYTEST_TMP"] = str(folder)
    save_model(folder / "small"), save_model(folder / "other", seed=1)
    for split, number in (("train", 30), ("test", 601)):
        (folder / "pets" / split).mkdir(parents=True)
        files = {}
        for i in range(number):
            files |= {
                f"{i:04}.png": noise(i),
                f"{i:04}.cls": str(i % 3).encode(),
                f"{i:04}.txt": LABELS[i % 3].encode(),
            }
        write_tar(folder / "pets" / split / "0.tar", files)
    (folder / "pets" / "classnames.txt").write_text("\n".join(LABELS))
    (folder / "pets" / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES))
    return folder


@pytest.fixture
def unused_port() -> str:
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        return str(listening.getsockname()[1])


@pytest.fixture
def hfclip(place, monkeypatch, capsys):
    """Runs `hfclip evaluate` in this process: output, and messages."""
    monkeypatch.chdir(place)

    def run(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["hfclip evaluate", *map(str, words)])
        command.main()
        return capsys.readouterr().out

    return run


def start(*words: object, **environment: str) -> subprocess.Popen:
    program = [sys.executable, "-m", "hfclip.commands.evaluate", *map(str, words)]
    settings = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(program, env=settings, stderr=subprocess.PIPE, start_new_session=True, text=True)


def stored(folder: Path) -> dict[str, str]:
    """The part of each result that does not depend on when it was computed, as text."""
    records = {path.relative_to(folder): json.loads(path.read_text()) for path in folder.rglob("*.json")}
    return {str(path): json.dumps(record["result"]) for path, record in records.items()}


def test_result_tells_all_that_it_depends_on(hfclip, place, tmp_path):
    out = tmp_path / "results"
    line = hfclip("zero-shot", "--model", "small", "--data", "pets", "--out", out, "--limit", 40, "--top-k", 1, 2)
    assert line.startswith("zero-shot\tpets\tsmall\ttop1 ")
    path = out / "small" / "pets" / "zero-shot-limit=40-top_k=1_2.json"
    record = json.loads(path.read_text())
    result = record["result"]
    assert result["options"]["top_k"] == [1, 2] and result["data"][0]["limit"] == 40
    assert {"top1", "top2", "mean_per_class_recall"} <= set(result["metrics"]) and result["headline"] == "top1"
    assert result["versions"]["torch"] == torch.__version__ and len(result["model"]["fingerprint"]) == 64
    assert record["run"]["processes"] == 1 and record["run"]["seconds"] > 0
    before = path.stat().st_mtime_ns
    assert (
        hfclip("zero-shot", "--model", "small", "--data", "pets", "--out", out, "--limit", 40, "--top-k", 1, 2) == line
    )
    assert path.stat().st_mtime_ns == before  # not computed again
    save_model(place / "small", seed=2)
    hfclip("zero-shot", "--model", "small", "--data", "pets", "--out", out, "--limit", 40, "--top-k", 1, 2)
    assert json.loads(path.read_text())["result"]["model"]["fingerprint"] != result["model"]["fingerprint"]
    save_model(place / "small")


def test_two_processes_give_the_numbers_of_one(place, tmp_path, unused_port):
    launcher = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": unused_port}
    words = ["zero-shot", "--model", place / "small", "--data", place / "pets", "--out", tmp_path / "two"]
    both = [start(*words, "--cache-dir", tmp_path / "cache", RANK=rank, **launcher) for rank in "01"]
    evaluate("zero-shot", str(place / "small"), str(place / "pets"), out=tmp_path / "one")
    for process in both:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    assert stored(tmp_path / "two") == stored(tmp_path / "one") != {}


def test_killed_and_resumed_gives_the_same_result(place, tmp_path):
    words = ["zero-shot", "--model", place / "small", "--data", place / "pets", "--batch-size", 8]
    killed = start(*words, "--out", tmp_path / "out", "--cache-dir", tmp_path / "cache")
    while killed.poll() is None and not list(tmp_path.rglob("chunk-*.safetensors")):
        time.sleep(0.002)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL and not stored(tmp_path / "out")
    model, data = str(place / "small"), str(place / "pets")
    evaluate("zero-shot", model, data, out=tmp_path / "out", cache_dir=tmp_path / "cache", batch_size=8)
    evaluate("zero-shot", model, data, out=tmp_path / "whole")
    assert stored(tmp_path / "out") == stored(tmp_path / "whole") != {}


def test_suite_runs_each_model_on_each_data_set(hfclip, tmp_path):
    suite = tmp_path / "suite.yaml"
    runs = [
        {"task": "zero-shot", "data": ["pets", "pets/train"]},
        {"task": "retrieval", "data": "pets", "models": ["other"]},
    ]
    suite.write_text(yaml.safe_dump({"models": ["small", "other"], "defaults": {"limit": 20}, "runs": runs}))
    assert hfclip(suite, "--out", tmp_path, "--dry-run").count("to do\t") == 5 and not list(tmp_path.rglob("*.json"))
    results = [json.loads(line) for line in hfclip(suite, "--out", tmp_path, "--json").splitlines()]
    found = [(result["model"]["name"], result["data"][0]["name"], result["task"]) for result in results]
    assert found == [
        ("small", "pets", "zero-shot"),
        ("small", "pets/train", "zero-shot"),
        ("other", "pets", "zero-shot"),
        ("other", "pets/train", "zero-shot"),
        ("other", "pets", "retrieval"),
    ]
    assert hfclip(suite, "--out", tmp_path, "--dry-run").count("kept\t") == 5


def test_a_suite_goes_on_after_a_data_set_that_cannot_be_read(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(place)
    (tmp_path / "empty").mkdir()
    words = ["zero-shot", "--model", "small", "--data", str(tmp_path / "empty"), "pets", "--limit", "9"]
    monkeypatch.setattr(sys, "argv", ["hfclip evaluate", *words, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as end:
        command.main()
    out, err = capsys.readouterr()
    assert end.value.code == 1 and out.startswith("zero-shot\tpets\t") and "error: zero-shot on empty: " in err


@pytest.mark.parametrize(
    "words, message",
    [
        (["--model", "small"], "found no task"),
        (["zeroshot"], "found no task 'zeroshot', expected one of zero-shot, retrieval"),
        (["zero-shot", "--data", "pets"], "zero-shot: found no --model"),
        (["zero-shot", "--model", "small", "--data", "pets", "--limit", "0"], "limit is 0"),
        (["zero-shot", "--model", "small", "--data", "pets", "--top-q", "1"], "Unrecognized arguments: --top-q"),
        (["zero-shot", "--model", "small", "--data", "./nowhere"], "neither a file nor a folder"),
        (["zero-shot", "--model", "pets", "--data", "pets"], "model pets"),
        (["zero-shot", "--model", "small", "--data", "{train: pets}"], "found the splits train, expected test"),
        (["suite.yaml"], "suite.yaml: "),
    ],
)
def test_wrong_usage_is_told(words, message, place, monkeypatch, tmp_path):
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["hfclip evaluate", *words, "--out", str(tmp_path)])
    with pytest.raises(UsageError) as error:
        command.main()
    assert message in str(error.value)


def test_a_split_that_is_not_there_is_not_replaced_by_another(place):
    assert len(DataSet(place / "pets").labelled("train").samples) == 30
    assert len(DataSet(place / "pets").labelled().samples) == 601
    with pytest.raises(UsageError, match="expected one named 'validation'"):
        DataSet(place / "pets").labelled("validation")
    with pytest.raises(UsageError, match="expected one named 'train'"):
        DataSet(place / "pets" / "test").labelled("train")
    apart = DataSet({"train": str(place / "pets/train"), "test": str(place / "pets/test")}, limit=7)
    assert apart.has("train") and not apart.has("validation") and len(apart.labelled("train").samples) == 7
    assert {target for _, target in apart.labelled().samples} == {0, 1, 2}  # spread over the classes


# ------------------------------------------------------------------------------------------------------------ registry


def test_page_of_data_sets_is_the_registry():
    assert (ROOT / "docs/datasets.md").read_text(encoding="utf-8") == registry.as_markdown() + "\n"


def test_registry_has_what_the_paper_measures():
    sets = registry.registered()
    assert sum(row.group == "paper" for row in sets.values()) == 27
    assert all(row.why for row in sets.values() if row.same_protocol is False)
    for name in ("sun397", "eurosat", "resisc45", "clevr_counts", "pcam", "caltech101"):
        assert sets[name].same_protocol is False
    means = {
        task: np.mean([registry.published(task, name, "ViT-L/14@336px")[0].value for name in list(sets)[:27]])
        for task in ("zero-shot", "linear-probe")
    }
    assert means == pytest.approx({"zero-shot": 0.6758, "linear-probe": 0.8506}, abs=1e-4)
    (paper, released) = registry.published("zero-shot", "imagenet1k", "ViT-B/32")
    assert (paper.value, released.value) == (0.632, 0.6332) and paper.verified


def test_registered_data_are_measured_by_the_papers_metric_beside_its_numbers(hfclip, place, tmp_path):
    os.rename(place / "pets", place / "wds_vtab-pets")
    os.symlink(place / "wds_vtab-pets", place / "pets")
    words = ["zero-shot", "--model", "small", "--data", "pets", "--data-root", place, "--expect", "ViT-B/32"]
    out = hfclip(*words, "--out", tmp_path / "out")
    assert "NOT the paper's protocol: 601 images, the paper has 3,669" in out
    (path,) = (tmp_path / "out").rglob("*.json")
    result = json.loads(path.read_text())["result"]
    assert result["headline"] == result["options"]["metric"] == "mean_per_class_recall"
    recall = result["metrics"]["mean_per_class_recall"]
    line = f"mean_per_class_recall {recall:.2%}, paper 87.00% (Table 11): {100 * recall - 87:+.2f} points"
    assert line in out and "released weights 87.00%" in out
    with pytest.raises(UsageError, match="expected one of ViT-L/14@336px"):
        hfclip(*words[:-1], "ViT-B/33")


# ------------------------------------------------------------------------------------------- models of other libraries


def test_a_model_of_transformers_is_measured_as_ours_is(place, tmp_path):
    model, processor, _ = open_model(str(place / "small"))
    ours = evaluate("zero-shot", str(place / "small"), str(place / "pets"), limit=60)
    adapted = adapt_transformers(model, processor, name="other library")
    theirs = evaluate("zero-shot", adapted, str(place / "pets"), limit=60, out=tmp_path)
    assert theirs.metrics == pytest.approx(ours.metrics) and theirs.path.parts[-3] == "other_library"
    both = [evaluate("retrieval", one, str(place / "pets"), limit=60) for one in (str(place / "small"), adapted)]
    assert both[0].metrics == pytest.approx(both[1].metrics)


@pytest.mark.peers
def test_a_model_of_open_clip_is_measured_as_it_classifies(place, data_dir):
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    config = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1},
    }
    model = open_clip.CLIP(**config).eval()
    preprocess = open_clip.image_transform(32, is_train=False)
    adapted = adapt(model, preprocess, open_clip.tokenize, name="open_clip")
    found = evaluate("zero-shot", adapted, str(place / "pets"), limit=60)
    labels, templates, samples = DataSet(place / "pets", limit=60).labelled()[:3]
    with torch.no_grad():
        prompts = [[template.replace("{c}", label) for template in templates] for label in labels]
        sides = [model.encode_text(open_clip.tokenize(texts), normalize=True).mean(0) for texts in prompts]
        classes = torch.nn.functional.normalize(torch.stack(sides), dim=-1)
        images, targets = zip(*samples, strict=True)
        logits = model.encode_image(torch.stack([preprocess(image) for image in images]), normalize=True) @ classes.T
    assert found.metrics["top1"] == (logits.argmax(1) == torch.tensor(targets)).double().mean().item()


# -------------------------------------------------------------------------------------------------------------- report


def test_report_shows_results_beside_published_numbers(hfclip, place, tmp_path, monkeypatch, capsys):
    root = tmp_path / "data"
    root.mkdir()
    os.symlink(place / "pets", root / "mnist"), os.symlink(place / "pets", root / "flickr30k")
    shared = ["--data-root", root, "--out", tmp_path / "results", "--limit", 50]
    hfclip("zero-shot", "--model", "small", "other", "--data", "mnist", *shared)
    hfclip("retrieval", "--model", "small", "--data", "flickr30k", *shared)
    record = Record.read(tmp_path / "results/small/mnist/zero-shot-limit=50.json")
    record.result["model"]["architecture"] = "ViT-B/32"
    record.result["tables"]["curve"] = [
        {"shots": 1, "accuracy": 0.2, "seed": "a"},
        {"shots": 2, "accuracy": 0.4, "seed": "b"},
    ]
    record.result["plots"] = [dataclasses.asdict(Plot("curve", "shots", "accuracy", series="seed", x_scale="log"))]
    record.arrays = {"confusion": np.eye(3)}
    record.write(record.path)
    (place / "small" / "README.md").write_text("---\nlicense: mit\n---\n# Small\n")
    out = tmp_path / "report"
    monkeypatch.setattr(
        sys, "argv", ["hfclip report", str(tmp_path / "results"), "--out", str(out), "--card", "small"]
    )
    report_command.main()
    text = (out / "report.md").read_text()
    assert "| data | metric | other | small | paper ViT-B/32 | released ViT-B/32 | protocol |" in text
    assert f"{100 * record.headline:.2f} | 51.90 | 48.39 | NOT the paper's protocol: only 50 images |" in text
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 7 and not re.search('(src|href)="(?!#|data:)', page)
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids)) and set(re.findall(r"url\(#([^)]+)\)", page)) <= set(ids)
    assert len(list((out / "plots").glob("*.png"))) == len(list((out / "plots").glob("*.svg"))) == 7
    columns, *rows = csv.reader((out / "openclip.csv").open())
    wide = dict(zip(columns, rows[[row[0] for row in rows].index("small")], strict=True))
    assert float(wide["MNIST"]) == record.headline and float(wide["Flickr"]) >= 0 and wide["ImageNet 1k"] == ""
    report_command.main()  # again: no row comes twice
    card = ModelCard.load(place / "small" / "README.md")
    assert card.data.license == "mit" and {(r.dataset_type, r.metric_type) for r in card.data.eval_results} == {
        ("mnist", "top1"),
        ("flickr30k", "text_retrieval_recall@1"),
    }
    assert len(card.data.eval_results) == 2
    monkeypatch.setattr(sys, "argv", ["hfclip report", str(tmp_path / "nothing")])
    with pytest.raises(UsageError, match="found no results"):
        report_command.main()
