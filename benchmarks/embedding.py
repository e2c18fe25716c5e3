"""Photos embedded per second, beside a plain loop over transformers' CLIPModel: same weights, photos and cores.

    python benchmarks/embedding.py --data "$HFCLIP_TEST_DATA/cifar10/train"            # 10,000 photos, prints the table
    python benchmarks/embedding.py --data ... --photos 500 --write                      # stored in benchmarks/results/

Both run ViT-B/32 with one set of random weights on photos in tars. hfclip: `hfclip.embeddings.embed` into a new folder,
from the opened source to the mapped rows, in float32 and in the precision that it takes by itself. Plain: a DataLoader
of two workers that decode and preprocess by CLIPProcessor, batches of 32, `CLIPModel.get_image_features`, float32. They
take turns in parts, so that a drift of the machine's speed cancels; the ratio is that of the sums.
"""

import argparse
import os
import tempfile
import time
from datetime import date
from pathlib import Path

import torch
import transformers
from inference import RESULTS, build_folder, captions
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPModel, CLIPProcessor

import hfclip
from hfclip import HFCLIPModel, HFCLIPProcessor
from hfclip.data.samples import Sample, Source
from hfclip.data.sources import open_source
from hfclip.embeddings import embed
from hfclip.open_image_hfclip import open_image
from hfclip.precision import settled_precision


class Part(Source):
    """Some samples of a source."""

    def __init__(self, source: Source, indices: range):
        super().__init__()
        self.source, self.indices, self.length = source, indices, len(indices)

    def __getitem__(self, index: int) -> Sample:
        return self.source[self.indices[index]]


class Pixels(Dataset):
    """Photos as the plain loop's processor makes them."""

    def __init__(self, source: Source, processor: CLIPProcessor):
        self.source, self.processor = source, processor

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> torch.Tensor:
        image = open_image(self.source[index].image).convert("RGB")
        return self.processor(images=image, return_tensors="pt")["pixel_values"][0]


@torch.inference_mode()
def plain_loop(model: CLIPModel, processor: CLIPProcessor, source: Source) -> torch.Tensor:
    loader = DataLoader(Pixels(source, processor), batch_size=32, num_workers=2)
    rows = [model.get_image_features(pixel_values=pixels) for pixels in loader]
    return torch.cat([F.normalize(getattr(row, "pooler_output", row), dim=-1) for row in rows])


def run(data: str, num_photos: int, size_of_part: int, folder: Path) -> list[str]:
    """Rows of the table."""
    build_folder(str(folder), captions(4096), None)
    ours, theirs = HFCLIPModel.from_pretrained(folder).eval(), CLIPModel.from_pretrained(folder).eval()
    processor, their_processor = HFCLIPProcessor.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)
    source = open_source(data, max_samples=num_photos, cache_dir=folder / "cache")
    auto = settled_precision("auto", torch.device("cpu"))[0]
    precisions = ["fp32"] if auto == "fp32" else ["fp32", auto]
    seconds, worst = dict.fromkeys(["plain", *precisions], 0.0), 0.0
    for start in range(0, len(source), size_of_part):
        part = Part(source, range(start, min(start + size_of_part, len(source))))
        begin = time.perf_counter()
        expected = plain_loop(theirs, their_processor, part)
        seconds["plain"] += time.perf_counter() - begin
        for precision in precisions:
            begin = time.perf_counter()
            out = folder / f"{precision}-{start}"
            found = embed(ours, processor, part, folder=out, what=("images",), precision=precision)
            seconds[precision] += time.perf_counter() - begin
            # The processors differ in some pixels by design, so that the embeddings are close and not equal.
            worst = max(worst, (1 - (torch.from_numpy(found.image_embeds.copy()) * expected).sum(1)).max().item())
        speeds = ", ".join(f"{name} {(start + len(part)) / spent:.1f}/s" for name, spent in seconds.items())
        print(f"{start + len(part)} photos: {speeds}", flush=True)
    assert worst < 0.02, f"embeddings differ by a cosine distance of {worst}"
    rows = [("plain loop, fp32", "plain"), *((f"hfclip, {precision}", precision) for precision in precisions)]
    rows[-1] = (f"{rows[-1][0]} (auto)", rows[-1][1])
    return [
        f"| {name} | {len(source) / seconds[key]:.1f} | {seconds['plain'] / seconds[key]:.2f}x |" for name, key in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = os.environ.get("HFCLIP_TEST_DATA", ".")
    parser.add_argument("--data", default=f"{data}/cifar10/train", help="as data.train; default: %(default)s")
    parser.add_argument("--photos", type=int, default=10_000)
    parser.add_argument("--part", type=int, default=1_000, help="photos of a turn")
    parser.add_argument("--write", action="store_true", help="store the table in benchmarks/results/")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = run(arguments.data, arguments.photos, arguments.part, Path(folder))
    table = "\n".join(
        [
            f"# Embedding {arguments.photos:,} photos beside transformers' CLIPModel, {date.today().isoformat()}",
            "",
            f"ViT-B/32, {torch.get_num_threads()} threads, torch {torch.__version__}, transformers "
            f"{transformers.__version__}, hfclip {hfclip.__version__}. `python benchmarks/embedding.py --write`",
            "",
            "| | photos per second | ratio |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )
    print(table)
    if arguments.write:
        (RESULTS / f"{date.today().isoformat()}_embedding.md").write_text(table)


if __name__ == "__main__":
    main()
