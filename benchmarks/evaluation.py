"""Zero-shot classification and retrieval beside CLIP_benchmark: same model, data, cores, batch and workers, nothing cached.

    pip install clip_benchmark open_clip_torch
    python benchmarks/evaluation.py --data "$HFCLIP_TEST_DATA/cifar10" --images 400         # ViT-B/32, prints the table
    python benchmarks/evaluation.py --model runs/emoji/model --data "$HFCLIP_TEST_DATA/emoji/unseen" --write
    python benchmarks/evaluation.py --memory --write                                         # of both tasks by images

A folder in clip-benchmark's layout is cut to `--images`, and the model, ours or a ViT-B/32 of random weights, exported for
OpenCLIP. Each round evaluates by `hfclip.evaluation` and by CLIP_benchmark's own command (`--no_amp`), each from the
folder of weights to the numbers; the ratio is the median of the rounds' ratios, above 1: hfclip is faster. The numbers
must be equal, which retrieval is where no caption repeats: a caption as similar as the match counts as better for hfclip, for
CLIP_benchmark whichever torch.topk has first. hfclip's parts are timed once more alone: classifier, images.

Memory is the peak of a process of its own beyond its embeddings, which are synthetic: retrieval with one caption per image,
and a classifier of 1,000 classes x 80 templates.
"""

import argparse
import contextlib
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from inference import RESULTS

import hfclip
from hfclip import HFCLIPConfig, HFCLIPImageProcessor, HFCLIPModel, HFCLIPProcessor, HFCLIPTokenizer
from hfclip.data import open_source
from hfclip.embeddings import Embeddings
from hfclip.evaluation.data import load_labelled_folder
from hfclip.evaluation.retrieval import retrieval, retrieval_ranks
from hfclip.evaluation.shared import Embedded, Prompts, embed_labelled, embed_prompts
from hfclip.evaluation.zero_shot import measure, zero_shot


ROOT = Path(__file__).resolve().parents[1]
TASKS = ("classification", "retrieval")
DIM, NUM_CLASSES, NUM_TEMPLATES = 64, 1_000, 80


# -------------------------------------------------------------------------------------------------- beside CLIP_benchmark


def build(folder: Path) -> None:
    """ViT-B/32 of random weights with OpenAI's words, if their merges are there."""
    torch.manual_seed(0)
    HFCLIPModel(HFCLIPConfig.from_preset("ViT-B/32")).save_pretrained(folder)
    tokenizer = HFCLIPTokenizer.from_openai_bpe(Path(os.environ["HFCLIP_TEST_DATA"], "bpe_simple_vocab_16e6.txt.gz"))
    HFCLIPProcessor(image_processor=HFCLIPImageProcessor(), tokenizer=tokenizer).save_pretrained(folder)


def cut(data: Path, num_images: int, num_classes: int | None, kind: str, out: Path) -> Path:
    """Images spread over the held-out split, of the first classes, in the layout of clip-benchmark, in two tars."""
    samples: dict[str, dict[str, bytes]] = {}
    for shard in sorted((data / "test").glob("*.tar"), key=lambda path: int(path.stem)):
        with tarfile.open(shard) as tar:
            for member in tar:
                key, _, ending = member.name.partition(".")
                samples.setdefault(f"{shard.stem}-{key}", {})[ending] = tar.extractfile(member).read()
    names = (data / "classnames.txt").read_text().splitlines()[:num_classes]
    samples = {key: sample for key, sample in samples.items() if int(sample["cls"]) < len(names)}
    kept = [
        list(samples)[i]
        for i in np.linspace(0, len(samples), min(num_images, len(samples)), endpoint=False).astype(int)
    ]
    (out / "test").mkdir(parents=True)
    for number, keys in enumerate(np.array_split(kept, 2)):
        with tarfile.open(out / "test" / f"{number}.tar", "w") as tar:
            for name, content in (
                (f"{key}.{ending}", samples[key][ending]) for key in keys for ending in samples[key]
            ):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    (out / "classnames.txt").write_text("\n".join(names) + "\n")
    shutil.copy(data / "zeroshot_classification_templates.txt", out)
    (out / "dataset_type.txt").write_text(kind)
    (out / "test" / "nshards.txt").write_text("2")
    return out


def ours(
    folder: Path, data: Path, kind: str, options: argparse.Namespace, precision: str = "fp32"
) -> dict[str, float]:
    model, processor = HFCLIPModel.from_pretrained(folder), HFCLIPProcessor.from_pretrained(folder)
    task, source = (
        (retrieval, open_source(str(data))) if kind == "retrieval" else (zero_shot, load_labelled_folder(data))
    )
    embedding = {"batch_size": options.batch_size, "num_workers": options.workers, "precision": precision}
    return task(model, processor, source, **embedding).metrics


def theirs(folder: Path, data: Path, kind: str, options: argparse.Namespace) -> dict[str, float]:
    """CLIP_benchmark's command, with what it says kept off the screen."""
    out = data / "theirs.json"
    sys.argv = ["clip_benchmark", "eval", "--dataset", "wds/cut", "--dataset_root", str(data), "--no_amp", "--quiet"]
    sys.argv += [
        "--model",
        f"local-dir:{folder}",
        "--pretrained",
        "",
        "--task",
        f"zeroshot_{kind}",
        "--output",
        str(out),
    ]
    sys.argv += [
        "--batch_size",
        str(options.batch_size),
        "--num_workers",
        str(options.workers),
        "--recall_k",
        "1",
        "5",
        "10",
    ]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        import_module("clip_benchmark.cli").main()
    return json.loads(out.read_text())["metrics"]


NAMES = {"acc1": "top1", "acc5": "top5", "mean_per_class_recall": "mean_per_class_recall"}


def check_equal(found: dict[str, float], expected: dict[str, float]) -> None:
    """Ends with the numbers if they differ by more than the float32 that CLIP_benchmark keeps recall in."""
    for name, value in expected.items():
        if abs(found[NAMES.get(name, name)] - value) > 1e-7:
            raise SystemExit(f"{name}: hfclip {found[NAMES.get(name, name)]}, CLIP_benchmark {value}")


def timed(function: Callable, *arguments) -> tuple[float, dict[str, float]]:
    start = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - start, result


def beside_clip_benchmark(options: argparse.Namespace) -> list[str]:
    """Rows of the table, one per task."""
    rows = ["| task | hfclip | CLIP_benchmark | ratio | hfclip, auto precision | ratio | numbers |", "|---" * 7 + "|"]
    said = []
    import_module("clip_benchmark.cli")  # its imports are not timed, nor are hfclip's
    with tempfile.TemporaryDirectory() as temporary:
        folder, exported = options.model or Path(temporary, "model"), Path(temporary, "openclip")
        if not options.model:
            build(folder)
        subprocess.run(
            [sys.executable, ROOT / "conversion" / "export.py", folder, exported, "--to", "openclip"], check=True
        )
        for kind in options.tasks:
            data = cut(options.data, options.images, options.classes, kind, Path(temporary, kind))
            times = []
            for _ in range(options.rounds):
                (own, found), (peer, expected) = (
                    timed(ours, folder, data, kind, options),
                    timed(theirs, exported, data, kind, options),
                )
                check_equal(found, expected)
                auto, _ = timed(ours, folder, data, kind, options, "auto")
                times.append((own, peer, auto))
                print(f"{kind}: hfclip {own:.1f} s (auto {auto:.1f} s), CLIP_benchmark {peer:.1f} s", flush=True)
            own, peer, auto = (statistics.median(of_one) for of_one in zip(*times, strict=True))
            ratio, ratio_auto = (statistics.median(t[1] / t[n] for t in times) for n in (0, 2))
            numbers = ", ".join(f"{name} {value:.4f}" for name, value in expected.items())
            rows.append(
                f"| {kind} | {own:.1f} s | {peer:.1f} s | {ratio:.2f}x | {auto:.1f} s | {ratio_auto:.2f}x | {numbers} |"
            )
            if kind == "classification":
                said = ["", parts(folder, data, options)]
    return rows + said


def parts(folder: Path, data: Path, options: argparse.Namespace) -> str:
    """Where hfclip's time goes."""
    model, processor, found = (
        HFCLIPModel.from_pretrained(folder),
        HFCLIPProcessor.from_pretrained(folder),
        load_labelled_folder(data),
    )
    embedding = {"batch_size": options.batch_size, "num_workers": options.workers, "precision": "fp32"}
    start = time.perf_counter()
    embed_prompts(model, processor, found.labels, found.templates, **embedding)
    classifier = time.perf_counter() - start
    embed_labelled(model, processor, found.samples, found.labels, **embedding)
    images = time.perf_counter() - start - classifier
    number = len(found.labels) * len(found.templates)
    return f"hfclip's classifier of {number:,} sentences {classifier:.1f} s, {len(found.samples):,} images {images:.1f} s."


# ------------------------------------------------------------------------------------------------------------------ memory


def unit(num_rows: int, seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((num_rows, DIM), np.float32)
    rows /= np.sqrt(np.einsum("ij,ij->i", rows, rows))[:, None]  # without a temporary of its size
    return rows


def peak_beyond(embeddings: Callable[[], list], task: Callable) -> float:
    """MB that a task takes at its peak beyond its inputs."""
    inputs = embeddings()
    before = resident("VmRSS")
    task(*inputs)
    return resident("VmHWM") - before


def resident(name: str) -> float:
    """MB of memory of this process, now or at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024 / 1e6


def measure_retrieval(num_images: int) -> float:
    def embeddings() -> list:
        of_image = torch.arange(num_images)
        return [torch.from_numpy(unit(num_images, 0)), torch.from_numpy(unit(num_images, 1)), of_image]

    return peak_beyond(embeddings, retrieval_ranks)


def measure_classifier(num_images: int) -> float:
    tower = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 1, "num_hidden_layers": 1}
    model = HFCLIPModel(HFCLIPConfig(vision_config=dict(tower), text_config=dict(tower), projection_dim=DIM))
    labels = [f"class {number}" for number in range(NUM_CLASSES)]

    def embeddings() -> list:
        rows = np.arange(NUM_TEMPLATES * NUM_CLASSES).reshape(NUM_TEMPLATES, NUM_CLASSES)
        prompts = Prompts(unit(NUM_TEMPLATES * NUM_CLASSES, 2), rows, labels, ["{}"] * NUM_TEMPLATES)
        targets = np.random.default_rng(3).integers(0, NUM_CLASSES, num_images)
        arrays = {"image_embeds": unit(num_images, 4), "offsets": np.arange(num_images + 1)}
        return [model, Embedded(Embeddings({"scale": 1.0}, arrays), np.arange(num_images), targets), prompts, labels]

    return peak_beyond(embeddings, measure)


MEASURES = {"retrieval": measure_retrieval, "classifier": measure_classifier}


def memory() -> list[str]:
    """Rows of the table; each number is of a process of its own."""
    rows = ["| peak beyond the embeddings | 10,000 images | 100,000 images |", "|---|---|---|"]
    names = {
        "retrieval": "retrieval, a caption per image",
        "classifier": f"{NUM_CLASSES:,} classes x {NUM_TEMPLATES} templates",
    }
    for task, name in names.items():
        found = []
        for number in (10_000, 100_000):
            child = [sys.executable, __file__, "--measure", task, "--images", str(number)]
            found.append(float(subprocess.run(child, check=True, capture_output=True, text=True).stdout))
        rows.append(f"| {name} | {found[0]:.0f} MB | {found[1]:.0f} MB |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder in clip-benchmark's layout")
    parser.add_argument("--model", type=Path, help="folder of a model; default: ViT-B/32 of random weights")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["classification"])
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--classes", type=int, help="the first ones alone; images and sentences keep their ratio")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", action="store_true", help="measure memory instead")
    parser.add_argument("--measure", choices=MEASURES, help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help="add the table to benchmarks/results/")
    options = parser.parse_args()
    if options.measure:
        print(MEASURES[options.measure](options.images))
        return
    if options.memory:
        title, rows = "Memory of evaluations", memory()
    else:
        name = options.model.name if options.model else "ViT-B/32"
        what = f"{options.data.name}" + (f", {options.classes} classes" if options.classes else "")
        title = f"{name} on {options.images} images of {what} beside CLIP_benchmark {version('clip_benchmark')}"
        rows = beside_clip_benchmark(options)
    where = f"{torch.get_num_threads()} threads, torch {torch.__version__}, hfclip {hfclip.__version__}, float32"
    where += "" if options.memory else f", batch {options.batch_size}, {options.workers} workers"
    text = "\n".join([f"# {title}, {date.today().isoformat()}", "", f"{where}.", "", *rows, ""])
    print(text)
    if options.write:
        with open(RESULTS / f"{date.today().isoformat()}_evaluation.md", "a") as file:
            file.write(f"{text}\n")


if __name__ == "__main__":
    main()
