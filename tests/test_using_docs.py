"""The snippets of docs/using.md, docs/evaluation.md and docs/search.md, run one after the other as they stand there."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from test_readme import save_what_is_read
from training_utils import ROOT

import hfclip_cli


COMMAND = [sys.executable, "-c", "import hfclip_cli; hfclip_cli.main()"]


def snippets(language: str, page: str = "using.md") -> list[str]:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    found = re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    assert found
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with the quickstart's model, and photos with captions."""
    folder = tmp_path_factory.mktemp("using")
    save_what_is_read(folder)
    (folder / "photos").mkdir()
    for index in range(16):
        Image.new("RGB", (40, 32), (16 * index, 0, 200)).save(folder / "photos" / f"{index}.png")
        (folder / "photos" / f"{index}.txt").write_text("a red circle" if index % 2 else "a blue square")
    for label in ("red circle", "blue square"):
        (folder / "classes" / label).mkdir(parents=True)
        shutil.copy(folder / "photos" / "0.png", folder / "classes" / label)
    return folder


def test_python_runs(place, monkeypatch):
    monkeypatch.chdir(place)
    names = {}
    for snippet in snippets("python"):
        exec(compile(snippet, "docs/using.md", "exec"), names)
    assert names["images"].shape[0] == 16 == len(names["found"].keys) and not names["found"].problems


@pytest.mark.slow
def test_commands_run(place):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for line in "".join(snippets("bash")).splitlines():
        program, *words = shlex.split(line)
        assert program == "hfclip"
        done = subprocess.run(
            [*COMMAND, *words], cwd=place, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
    assert "trained by" in done.stdout  # of `info` on what was fine-tuned


def test_evaluation_runs(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    for line in "".join(snippets("bash", "evaluation.md")).splitlines():
        monkeypatch.setattr(sys, "argv", shlex.split(line))
        hfclip_cli.main()
    assert "zero-shot\tclasses\t" in capsys.readouterr().out and Path("results/report/report.html").is_file()
    names = {}
    for snippet in snippets("python", "evaluation.md"):
        if "data/emoji" in snippet:
            continue  # tests/test_emoji.py runs it, on a cut of the pack
        exec(compile(snippet, "docs/evaluation.md", "exec"), names)
    assert names["record"].path.is_file() and names["record"].metrics["top1"] == 0.5


def test_search_runs(place, monkeypatch, capsys, tmp_path):
    pytest.importorskip("pathspec")
    monkeypatch.chdir(place)
    (place / "labels.txt").write_text("red circle\nblue square\n")
    monkeypatch.setenv("HFCLIP_CACHE", str(tmp_path / "cache"))
    text, names = (ROOT / "docs" / "search.md").read_text(encoding="utf-8"), {}
    for language, snippet in re.findall(r"^```(bash|python)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
        if language == "python":
            exec(compile(snippet, "docs/search.md", "exec"), names)
            continue
        for line in snippet.splitlines():
            words = shlex.split(os.path.expandvars(line), comments=True)
            if words[:1] == ["hfclip"] and words[1] not in ("serve", "space"):
                monkeypatch.setattr(sys, "argv", words)
                hfclip_cli.main()
    assert "16 images in" in capsys.readouterr().out and names["rows"].shape[0] == 16
