"""Image search: a query beside one product of the machine, exact beside approximate search, updates, and indexing.

    python benchmarks/search.py queries      # 100,000 rows: a query by words, and the product it is made of
    python benchmarks/search.py graph        # a million rows: exact, and usearch's graph of them (minutes)
    python benchmarks/search.py update       # ten new files among 50,000
    python benchmarks/search.py indexing     # images per second of an index, and of `embed` alone
    python benchmarks/search.py queries --write     # also adds the table, dated, to benchmarks/results/

Rows are random mixtures, since a graph of rows without neighbours would measure nothing. Times are medians.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import hfclip
from hfclip import HFCLIPConfig, HFCLIPImageProcessor, HFCLIPModel, HFCLIPProcessor, HFCLIPTokenizer
from hfclip.data.image_list import ImageList
from hfclip.embeddings import embed
from hfclip.search import ImageIndex, Query
from hfclip.search.store import Manifest, Record, Store


RESULTS = Path(__file__).parent / "results"
DIM = 512


def mixture(count: int, seed: int, spread: float = 0.6) -> torch.Tensor:
    """(count, DIM) unit rows around a thousand centres."""
    generator = torch.Generator().manual_seed(seed)
    centres = F.normalize(torch.randn(1000, DIM, generator=torch.Generator().manual_seed(0)), dim=1)
    rows = torch.empty(count, DIM, dtype=torch.float16)
    for start in range(0, count, 20_000):
        some = rows[start : start + 20_000]
        noise = torch.randn(len(some), DIM, generator=generator) * spread / DIM**0.5
        some.copy_(F.normalize(centres[torch.randint(1000, (len(some),), generator=generator)] + noise, dim=1))
    return rows


def write_store(folder: Path, rows: torch.Tensor, dim: int = DIM) -> ImageIndex:
    records = [Record(f"/photos/{i}.jpg", 1, 1, i.to_bytes(16, "big"), 1, 1) for i in range(len(rows))]
    store = Store(folder)
    with store.locked():
        store.commit(Manifest({"name": "none", "dim": dim}), records, [], list(rows.numpy()))
    return ImageIndex.open(folder)


def milliseconds(run: Callable[[], object], times: int = 15) -> float:
    run()
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds)


def queries(folder: Path, count: int) -> list[str]:
    rows = mixture(count, 1)
    index = write_store(folder, rows)
    tensor, wide, query = index.snapshot().tensor, rows.float(), mixture(1, 2)[0]
    products = {
        "one product, float16 rows as they are mapped": lambda: tensor @ query,
        "one product, float32 rows in memory": lambda: wide @ query.float(),
        "a search, 50 hits": lambda: index.search(Query(((1, query),))),
        "a search with a condition": lambda: index.search(Query(((1, query),)), where="width>0"),
        "a search, hits 1,000 to 1,050": lambda: index.search(Query(((1, query),)), offset=1000),
    }
    times = {name: milliseconds(run) for name, run in products.items()}
    first = next(iter(times.values()))
    lines = [f"| {count:,} rows of 512 | ms | in products |", "|---|---|---|"]
    return lines + [f"| {name} | {ms:.1f} | {ms / first:.2f} |" for name, ms in times.items()]


def graph(folder: Path, count: int) -> list[str]:
    from usearch.index import Index

    rows, asked = mixture(count, 1), mixture(100, 2)
    index = write_store(folder, rows)
    exact_ms = milliseconds(lambda: index.search(Query(((1, asked[0]),))), 7)
    best = [{hit.id for hit in index.search(Query(((1, query),)), top_k=10).hits} for query in asked]
    lines = [f"| {count:,} rows of 512 | build, s | ms per query, 10 hits | recall@10 | GB |", "|---|---|---|---|---|"]
    lines += [f"| exact, float16 | 0 | {exact_ms:.1f} | 1 | {rows.numel() * 2 / 1e9:.2f} |"]
    tree = Index(ndim=DIM, metric="ip", dtype="f16")
    start = time.perf_counter()
    tree.add(np.arange(len(rows)), rows.numpy(), threads=os.cpu_count())
    built = time.perf_counter() - start
    for expansion in (64, 256, 1024):
        tree.expansion_search = expansion
        found = [set(tree.search(query.numpy(), 10).keys.tolist()) for query in asked]
        recall = statistics.mean(len(a & b) / 10 for a, b in zip(found, best, strict=True))
        ms = milliseconds(lambda: tree.search(asked[0].numpy(), 10), 50)
        size = tree.serialized_length / 1e9
        lines.append(f"| usearch, {expansion} candidates | {built:.0f} | {ms:.2f} | {recall:.3f} | {size:.2f} |")
    return lines


def tiny_model(width: int = 64, layers: int = 2) -> tuple[HFCLIPModel, HFCLIPProcessor]:
    tokenizer = HFCLIPTokenizer.train_new_from_iterator(["a photo of a cat"] * 300, 520, show_progress=False)
    tower = dict(hidden_size=width, intermediate_size=4 * width, num_attention_heads=width // 64 or 1)
    tower |= dict(num_hidden_layers=layers)
    words = dict(vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    size = 224 if width > 64 else 32
    config = HFCLIPConfig(
        projection_dim=DIM,
        vision_config={**tower, "image_size": size, "patch_size": 32 if width > 64 else 16},
        text_config={**tower, **words, "max_position_embeddings": 77},
    )
    return HFCLIPModel(config).eval(), HFCLIPProcessor(HFCLIPImageProcessor(size=size), tokenizer)


def write_image(path: Path, seed: int, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (size // 8, size // 8, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((size, size)).save(path, quality=85)


def update(folder: Path, count: int) -> list[str]:
    """Rows of real files, whose embeddings are made up; the ten new ones are embedded."""
    photos, model = folder / "photos", tiny_model()
    write_image(folder / "one.jpg", 0, 32)
    data = (folder / "one.jpg").read_bytes()
    records = []
    for number in range(count):
        path = photos / f"{number // 500}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        found = path.stat()
        records.append(Record(str(path), found.st_size, found.st_mtime_ns, number.to_bytes(16, "big"), 32, 32))
    manifest = ImageIndex(Store(folder / "new"), *model).new_manifest()
    manifest = Manifest(manifest.model, (str(photos),))
    store = Store(folder / "store")
    with store.locked():
        store.commit(manifest, records, [], list(mixture(len(records), 1).numpy()))
    for number in range(10):
        write_image(photos / "new" / f"{number}.jpg", 100 + number, 32)
    seen = []
    model[0].vision_model.register_forward_hook(lambda module, inputs, output: seen.append(len(output.pooler_output)))
    index = ImageIndex.open(folder / "store", *model)
    lines = [f"| {count:,} files | s | embeddings |", "|---|---|---|"]
    for what in ("10 new ones", "nothing new"):
        seen.clear()
        start = time.perf_counter()
        index.update()
        lines.append(f"| {what} | {time.perf_counter() - start:.2f} | {sum(seen)} |")
    return lines


def indexing(folder: Path, count: int) -> list[str]:
    """JPEGs of 640 x 640 pixels by a ViT of the width and layers of ViT-S/32."""
    model, processor = tiny_model(384, 12)
    for number in range(count):
        write_image(folder / "photos" / f"{number}.jpg", number, 640)
    images = ImageList(folder / "photos")
    seconds = {"embedding alone": [], "indexing": []}
    for turn in range(3):
        start = time.perf_counter()
        embed(model, processor, images, what=("images",))
        seconds["embedding alone"].append(time.perf_counter() - start)
        start = time.perf_counter()
        ImageIndex.build(folder / "photos", model, processor, folder / f"store{turn}")
        seconds["indexing"].append(time.perf_counter() - start)
    lines = [f"| {count} JPEGs of 640 x 640, ViT-S/32 | images/s |", "|---|---|"]
    return lines + [f"| {name} | {count / min(values):.1f} |" for name, values in seconds.items()]


PARTS = {queries: 100_000, graph: 1_000_000, update: 50_000, indexing: 256}  # rows or images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {part.__name__: part for part in PARTS}
    parser.add_argument("part", choices=parts)
    parser.add_argument("--rows", type=int, help="rows, or images; else as above")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="add the table to benchmarks/results/")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        part = parts[options.part]
        lines = part(Path(folder), options.rows or PARTS[part])
    text = "\n".join(lines) + "\n"
    print(text)
    if options.write:
        path = RESULTS / f"{date.today().isoformat()}_search.md"
        if not path.exists():
            about = f"torch {torch.__version__}, hfclip {hfclip.__version__}, {options.threads} threads of {platform.machine()}"
            path.write_text(
                f"# Image search, {date.today().isoformat()}\n\n{about}. `python benchmarks/search.py PART --write`\n"
            )
        with open(path, "a") as file:
            file.write(f"\n{text}")


if __name__ == "__main__":
    main()
