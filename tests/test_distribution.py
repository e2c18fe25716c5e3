"""The wheel and the source distribution, built and installed into an empty folder: what works there without the clone."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from PIL import Image
from training_utils import ROOT, write_recipe


pytest.importorskip("hatchling")
TRAINING = ["pretrain", "plan", "embed", "index", "curves"]
CONVERSION = [
    "convert_any",
    "convert_openai",
    "convert_openclip",
    "convert_transformers",
    "export",
    "surgery",
    "push_to_hub",
]


def run(*line: object, folder: Path, packages: Path, timeout: float = 120) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(packages), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, *map(str, line)]
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> tuple[Path, Path]:
    """The wheel, and the source distribution that it was built from."""
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build"]
    subprocess.run([*build, "-t", "sdist", "-d", folder], cwd=ROOT, check=True, timeout=60)
    (source,) = folder.glob("*.tar.gz")
    with tarfile.open(source) as tar:
        tar.extractall(folder, filter="data")
    unpacked = folder / source.name.removesuffix(".tar.gz")
    subprocess.run([*build, "-t", "wheel", "-d", folder], cwd=unpacked, check=True, timeout=60)
    return next(folder.glob("*.whl")), source


@pytest.fixture(scope="module")
def installed(distributions, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    line = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", folder]
    subprocess.run([*line, distributions[0]], check=True, timeout=60)
    return folder


def test_wheel_holds_the_library_the_trainer_the_converters_and_nothing_else(distributions):
    def files(folder: str) -> set[str]:
        tracked = subprocess.run(["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True, check=True)
        return set(tracked.stdout.split())

    if not files("src"):
        pytest.skip("no git repository")
    expected = {name.removeprefix("src/") for name in files("src")}
    expected |= {f"hfclip/{name}" for name in files("training") | files("conversion")}
    with zipfile.ZipFile(distributions[0]) as wheel:
        found = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert {"hfclip/training/configs/vit_b_32.yaml", "hfclip/training/launch/nodes.yaml"} < expected & found
    # A file that is not committed yet may be in either.
    assert found >= expected and all(Path(ROOT, "src", n).exists() or Path(ROOT, n[7:]).exists() for n in found)
    assert not [name for name in found if "test" in name or "__pycache__" in name or name.endswith(".pyc")]
    with tarfile.open(distributions[1]) as source:
        names = {name.partition("/")[2] for name in source.getnames()}
    assert {"tests/test_readme.py", "docs/training.md", "pyproject.toml", "training/pretrain.py"} < names


def test_help_of_each_program_is_shown_without_the_clone(installed, tmp_path):
    modules = [f"hfclip.training.{name}" for name in TRAINING] + [f"hfclip.conversion.{name}" for name in CONVERSION]
    code = f"""
import runpy, sys
for module in {modules}:
    sys.argv = [module, "--help"]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        print("ended", module, end.code, sys.modules["hfclip"].__file__)
"""
    done = run("-c", code, folder=tmp_path, packages=installed)
    assert done.returncode == 0, done.stderr
    ends = [line.split() for line in done.stdout.splitlines() if line.startswith("ended ")]
    assert ends == [["ended", module, "0", str(installed / "hfclip" / "__init__.py")] for module in modules]
    assert done.stdout.count("usage: ") == len(modules)


@pytest.mark.parametrize(
    "program, extra", [("training/pretrain.py", "train"), ("conversion/convert_openai.py", "convert")]
)
def test_missing_packages_are_one_line_with_the_command_that_helps(program, extra, installed, tmp_path):
    done = run("-S", installed / "hfclip" / program, folder=tmp_path, packages=installed)  # -S: no other package
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: found no package accelerate") and len(done.stderr.splitlines()) == 1
    assert done.stderr.endswith(f"pip install 'hfclip[{extra}]'\n")


def test_programs_of_a_clone_run_by_their_path_from_any_folder(tmp_path):
    done = run(ROOT / "training" / "curves.py", "--help", folder=tmp_path, packages=ROOT / "src")
    assert done.returncode == 0 and done.stdout.startswith("usage: curves.py"), done.stderr


@pytest.mark.slow
def test_command_of_the_wheel_trains_the_built_in_run_changes_classifies_and_embeds(installed, tmp_path):
    def hfclip(*words: object) -> str:
        done = run(installed / "bin" / "hfclip", *words, folder=tmp_path, packages=installed)
        assert done.returncode == 0, done.stderr
        return done.stdout

    recipe = write_recipe(tmp_path, data={"train": "scenes", "max_samples": 48}, optim={"steps": 3})
    hfclip("train", "--num_processes", 1, "--", "--config", recipe)
    hfclip("export", "run/model", "exported", "--to", "transformers")
    hfclip("convert", "exported", "converted")
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (48, 48), "red").save(tmp_path / "photos" / "red.png")
    (tmp_path / "photos" / "red.txt").write_text("a red square")
    assert hfclip("classify", "photos", "--model", "converted", "--labels", "a").startswith("photos/red.png\ta 1.000")
    assert "converted from" in hfclip("info", "converted")
    hfclip("embed", "--model", "run/model", "--data", "photos", "--out", "embeddings")
    assert (tmp_path / "embeddings" / "image_embeds.npy").is_file()
