"""hfclip beside transformers' CLIP: the same weights, the same work, one process, in turns.

    python benchmarks/inference.py                 # prints the table
    python benchmarks/inference.py --write         # also stores it, dated, in benchmarks/results/

Both sides run ViT-B/32 with one set of random weights in float32. Times are medians over interleaved rounds, the ratio
is the median of the rounds' ratios (above 1: hfclip is faster), so that a drift of the machine's speed cancels.
OpenAI's merges give the real vocabulary; without them (`--merges`, or HFCLIP_TEST_DATA) both tokenizers share one
trained on the benchmark's captions.
"""

import argparse
import copy
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer, pipeline

import hfclip
from hfclip import (
    HFCLIPModel,
    HFCLIPProcessor,
    HFCLIPTokenizer,
    ZeroShotImageClassificationPipeline,
    optimize_for_inference,
)
from hfclip.data.scenes import Scenes, describe


RESULTS = Path(__file__).parent / "results"
Row = tuple[str, float, float, float, str]


def compare(name: str, ours: Callable[[], object], theirs: Callable[[], object], rounds: int, unit: float) -> Row:
    """Times both in turns. Returns (name, our seconds, their seconds, ratio, rate): per `unit` items of work."""
    ours(), theirs()  # warm-up: lazy imports, allocations, caches
    our_times, their_times = [], []
    for _ in range(rounds):
        for function, times in ((ours, our_times), (theirs, their_times)):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
    ratio = statistics.median(b / a for a, b in zip(our_times, their_times))
    row = (
        name,
        statistics.median(our_times),
        statistics.median(their_times),
        ratio,
        f"{unit / min(our_times):,.0f}/s",
    )
    print(f"{name}: {row[1] * 1e3:.1f} ms against {row[2] * 1e3:.1f} ms, {ratio:.2f}x", flush=True)
    return row


def captions(number: int) -> list[str]:
    """Captions of the built-in scenes, short and full ones, of about 13 tokens each with start and end."""
    scenes = Scenes("train", size=32, num_scenes=number)
    return [describe(scenes.attributes(i)) if i % 3 else scenes.caption(i) for i in range(number)]


def build_folder(folder: str, texts: list[str], merges: Path | None) -> None:
    """A folder that transformers' CLIP writes: random ViT-B/32 weights, tokenizer, image processor."""
    tokenizer = (
        HFCLIPTokenizer.from_openai_bpe(merges) if merges else HFCLIPTokenizer.train_new_from_iterator(texts, 2000)
    )
    backend = tokenizer.backend_tokenizer.model
    backend.save(folder)  # vocab.json and merges.txt
    theirs = CLIPTokenizer.from_pretrained(folder, model_max_length=77)
    CLIPProcessor(CLIPImageProcessorPil(), theirs).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.CLIPConfig()
    config.text_config.vocab_size = len(tokenizer)
    config.text_config.bos_token_id, config.text_config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    CLIPModel(config).save_pretrained(folder)


def import_time(code: str) -> float:
    """Seconds of a fresh interpreter that runs `code`."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start


@torch.inference_mode()
def run(rounds: int, merges: Path | None) -> list[Row]:
    texts = captions(4096)
    rng = np.random.default_rng(0)
    photos = [Image.fromarray(rng.integers(0, 256, (480, 640, 3), dtype=np.uint8)) for _ in range(8)]
    with tempfile.TemporaryDirectory() as folder:
        build_folder(folder, texts, merges)
        ours, theirs = HFCLIPModel.from_pretrained(folder).eval(), CLIPModel.from_pretrained(folder).eval()
        our_processor = HFCLIPProcessor.from_pretrained(folder)
        their_processor = CLIPProcessor.from_pretrained(folder, backend="pil")
        our_folder = f"{folder}/ours"
        ours.save_pretrained(our_folder)
        our_processor.save_pretrained(our_folder)
        our_pipeline = pipeline(
            "zero-shot-image-classification", model=our_folder, pipeline_class=ZeroShotImageClassificationPipeline
        )
        plain_pipeline = pipeline("zero-shot-image-classification", model=our_folder)
        their_pipeline = pipeline("zero-shot-image-classification", model=folder, backend="pil")

    pixels = torch.randn(32, 3, 224, 224)
    padded = our_processor.tokenizer(texts[:256], padding="max_length", return_tensors="pt")["input_ids"]
    length = (padded == ours.config.text_config.eos_token_id).int().argmax(1).float().mean().item() + 1
    labels = list(dict.fromkeys(texts))[:200]
    optimized = optimize_for_inference(copy.deepcopy(ours))
    rows = [
        compare("image embedding, batch 32", lambda: ours.encode_image(pixels, normalize=False),
                lambda: theirs.get_image_features(pixels), rounds, 32),
        compare("the same, optimize_for_inference", lambda: optimized.encode_image(pixels, normalize=False),
                lambda: theirs.get_image_features(pixels), rounds, 32),
        compare("image features with hidden state, batch 32", lambda: ours.get_image_features(pixels),
                lambda: theirs.get_image_features(pixels), rounds, 32),
        compare(f"text embedding, 256 captions of {length:.1f} tokens padded to 77", lambda: ours.encode_text(padded, normalize=False),
                lambda: theirs.get_text_features(padded), max(3, rounds // 4), 256),
        compare("the same, optimize_for_inference", lambda: optimized.encode_text(padded, normalize=False),
                lambda: theirs.get_text_features(padded), max(3, rounds // 4), 256),
        compare("tokenizer, 4,096 captions", lambda: our_processor.tokenizer(texts),
                lambda: their_processor.tokenizer(texts), rounds, 4096),
        compare("image processor, 8 images of 640x480", lambda: our_processor.image_processor(photos, return_tensors="pt"),
                lambda: their_processor.image_processor(photos, return_tensors="pt"), rounds, 8),
    ]  # fmt: skip
    for name, ours in (
        ("ZeroShotImageClassificationPipeline", our_pipeline),
        ("the standard pipeline", plain_pipeline),
    ):
        check_pipelines(ours, their_pipeline, photos, labels)
        rows.append(pipeline_row(name, ours, their_pipeline, photos, labels))
    return rows


def check_pipelines(ours, theirs, photos, labels) -> None:
    """The same scores, label by label. The processors' pixels differ (ours are OpenAI's), so one serves both."""
    kept, theirs.image_processor = theirs.image_processor, ours.image_processor
    for photo in photos[:2]:
        found, expected = ({r["label"]: r["score"] for r in p(photo, candidate_labels=labels)} for p in (ours, theirs))
        worst = max(abs(found[label] - expected[label]) for label in labels)
        assert worst < 1e-5, f"scores differ by {worst}"
    theirs.image_processor = kept


def pipeline_row(kind: str, ours, theirs, photos, labels, num_images: int = 100, their_images: int = 5) -> Row:
    """`num_images` through our class; as many as patience allows where the time of each image is the same."""
    images = [photos[i % len(photos)] for i in range(num_images)]
    our_images = num_images if isinstance(ours, ZeroShotImageClassificationPipeline) else their_images
    start = time.perf_counter()
    ours(images[:our_images], candidate_labels=labels)
    our_time = (time.perf_counter() - start) * num_images / our_images
    start = time.perf_counter()
    theirs(images[:their_images], candidate_labels=labels)
    their_time = (time.perf_counter() - start) * num_images / their_images
    name = f"{kind}, {len(labels)} labels, {num_images} images (each image alike: {their_images} of them, scaled)"
    row = (name, our_time, their_time, their_time / our_time, f"{num_images / our_time:,.1f}/s")
    print(f"{name}: {our_time:.2f} s against {their_time:.2f} s, {row[3]:.1f}x", flush=True)
    return row


def import_rows() -> list[str]:
    rounds = [(import_time("import transformers"), import_time("import transformers, hfclip")) for _ in range(9)]
    extra = statistics.median(both - alone for alone, both in rounds)
    alone = statistics.median(alone for alone, _ in rounds)
    return [f"`import hfclip` costs {extra:.3f} s beyond `import transformers` ({alone:.2f} s)."]


def report(rows: list[Row], notes: list[str]) -> str:
    lines = [
        f"# Inference beside transformers' CLIPModel, {date.today().isoformat()}",
        "",
        f"ViT-B/32, float32, {torch.get_num_threads()} threads of {platform.machine()} ({os.cpu_count()} cores), torch "
        f"{torch.__version__}, transformers {transformers.__version__}, hfclip {hfclip.__version__}. Medians of "
        "interleaved rounds; ratio above 1: hfclip is faster. `python benchmarks/inference.py --write`",
        "",
        "| work | hfclip | transformers | ratio | hfclip's rate |",
        "|---|---|---|---|---|",
    ]
    for name, ours, theirs, ratio, rate in rows:
        lines.append(f"| {name} | {ours * 1e3:,.1f} ms | {theirs * 1e3:,.1f} ms | {ratio:.2f}x | {rate} |")
    return "\n".join([*lines, "", *notes, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds of each comparison")
    parser.add_argument("--merges", type=Path, help="OpenAI's bpe_simple_vocab_16e6.txt.gz")
    parser.add_argument("--write", action="store_true", help="store the table in benchmarks/results/")
    arguments = parser.parse_args()
    merges = arguments.merges
    if merges is None and os.environ.get("HFCLIP_TEST_DATA"):
        merges = Path(os.environ["HFCLIP_TEST_DATA"]) / "bpe_simple_vocab_16e6.txt.gz"
    table = report(run(arguments.rounds, merges), import_rows())
    print(table)
    if arguments.write:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{date.today().isoformat()}_inference.md").write_text(table)


if __name__ == "__main__":
    main()
