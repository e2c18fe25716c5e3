"""Stores a teacher's embeddings of training data, for runs with `distill.embeddings`.

    python training/embed.py --model TEACHER --data 'shards/{0000..0099}.tar' --out teacher-embeddings

All images and all captions are embedded once, with the teacher's own image processor and tokenizer; images are whole
central squares. The captions are read first. An interrupted command goes on where it was when it is given again; the
folder has its name when it is complete. `training/objectives/stored.py` says what is in it.
"""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path


if not __package__:  # run as a script, Python looks for modules in this folder; they are named from the one above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
import yaml
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from hfclip import HFCLIPModel, HFCLIPProcessor
from hfclip.data.samples import BadSample, Source, caption_id, decoding, usable_captions
from hfclip.errors import UsageError, redact
from training.config import DataConfig
from training.data.batches import open_data
from training.machine import PRECISIONS, autocast_for, num_workers, settled_precision
from training.objectives.stored import ARRAYS, HEADER
from training.objectives.teacher import load_teacher


SAVE_EVERY = 60  # seconds


def main() -> None:
    try:
        arguments = parse_arguments(sys.argv[1:])
        out = embed(arguments)
        print(f"The embeddings are in {out}. Train with\n    --distill.embeddings {out}")
    except UsageError as error:
        print(f"error: {redact(str(error))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on from here.", file=sys.stderr)
        sys.exit(130)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Stores a teacher's embeddings of training data.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", required=True, help="an hfclip or transformers CLIP folder, or its name on the Hub")
    add("--data", required=True, help="what data.train will be; a mixture as {name: weight, ...}")
    add("--out", required=True, type=Path, help="the folder to make")
    defaults = DataConfig()
    add("--split", default=defaults.split, help="as data.split")
    add("--image_key", help="as data.image_key")
    add("--caption_key", help="as data.caption_key")
    add("--max_samples", type=int, help="as data.max_samples")
    add("--cache_dir", default=defaults.cache_dir, help="as data.cache_dir")
    add("--num_workers", type=int, help="processes that read and decode; else as many as the machine has cores for")
    add("--batch_size", type=int, default=256, help="images, or captions, at a time")
    add("--precision", choices=["auto", *PRECISIONS], default="auto", help="as run.precision")
    return parser.parse_args(argv)


def embed(arguments: argparse.Namespace) -> Path:
    """Makes the folder `out`, going on with what an interrupted command left.

    Raises:
        UsageError: if it exists, or the data or the teacher do not, or the interrupted one had others.
    """
    out, names = arguments.out.expanduser(), ("split", "image_key", "caption_key", "max_samples", "cache_dir")
    if out.exists():
        raise UsageError(f"--out: {out} exists. Remove it or choose another folder.")
    arguments.num_workers = num_workers(arguments.num_workers)
    if arguments.batch_size < 1 or arguments.num_workers < 0:
        raise UsageError("--batch_size must be at least 1, and --num_workers at least 0.")
    try:
        name = yaml.safe_load(arguments.data) if arguments.data.startswith("{") else arguments.data
    except yaml.YAMLError as error:
        raise UsageError(f"--data: found {arguments.data!r}, expected a name or {{name: weight, ...}}.") from error
    config = DataConfig(train=name, **{key: getattr(arguments, key) for key in names})
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    model, processor = load_teacher(os.path.expanduser(arguments.model), device)
    source = open_data(name, config, config.split, model.config.image_size)
    writer = Writer(out, source, len(source), model, arguments.model)
    precision = settled_precision(arguments.precision, device)[0]
    with autocast_for(precision, device):
        embed_samples(model, processor, source, writer, arguments)
    writer.finish()
    return out


def embed_samples(
    model: HFCLIPModel, processor: HFCLIPProcessor, source: Source, writer: "Writer", arguments: argparse.Namespace
) -> None:
    """Embeds what the writer does not have yet, batch by batch in the order of the source."""
    samples = range(writer.header["done"], writer.header["num_samples"])
    loader = DataLoader(
        Samples(source, processor, samples),
        batch_size=arguments.batch_size,
        num_workers=arguments.num_workers,
        collate_fn=list,
        worker_init_fn=_ignore_interrupts,
        prefetch_factor=2 if arguments.num_workers else None,
    )
    bar = tqdm(
        total=writer.header["num_samples"], initial=samples.start, desc="embedding", unit="sample", disable=None
    )
    try:
        for batch in loader:
            embed_batch(model, processor, batch, writer, arguments.batch_size)
            bar.update(len(batch))
    finally:
        bar.close()
        writer.save()


@torch.no_grad()
def embed_batch(
    model: HFCLIPModel, processor: HFCLIPProcessor, batch: list[tuple], writer: "Writer", batch_size: int
) -> None:
    """Embeds some samples, as `Samples` gives them, and writes what comes out."""
    readable = [(index, pixels) for index, pixels, _ in batch if pixels is not None]
    if readable:
        indices, pixels = zip(*readable, strict=True)
        writer.write_images(list(indices), model.encode_image(torch.from_numpy(np.stack(pixels)).to(model.device)))
    captions = [caption for _, _, captions in batch for caption in captions]
    for start in range(0, len(captions), batch_size):
        texts = captions[start : start + batch_size]
        tokens = processor(text=texts, padding=True, truncation=True, return_tensors="pt").to(model.device)
        writer.write_texts(model.encode_text(tokens["input_ids"], tokens["attention_mask"]))
    writer.advance(len(batch))


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches all processes; the first one saves and ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Samples(Dataset):
    """`(index, pixel_values or None if unreadable, captions)` of some samples of a source. The pixels are arrays, which
    workers send through a pipe: tensors would go through /dev/shm, of which containers have 64 MB."""

    def __init__(self, source: Source, processor: HFCLIPProcessor, indices: range):
        self.source, self.processor, self.indices = source, processor, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> tuple[int, np.ndarray | None, list[str]]:
        index, pixels = self.indices[place], None
        try:
            image, *_ = self.source[index]
            with decoding(image):
                pixels = self.processor(images=image, return_tensors="pt")["pixel_values"][0].numpy()
        except BadSample:
            pass  # its row stays zero; training meets the same sample, and counts it
        return index, pixels, usable_captions(self.source, index)


class Writer:
    """The arrays of a folder of embeddings, filled from the first sample to the last.

    They grow in `.<name>.partial` beside the folder. Its header says how many samples are done, and says it only when
    they are on the disk.
    """

    def __init__(self, out: Path, source: Source, length: int, model: HFCLIPModel, name: str):
        self.out, self.folder = out, out.with_name(f".{out.name}.partial")
        header = {
            "model": redact(name),
            "scale": model.logit_scale.exp().item(),
            "dim": model.config.projection_dim,
            "num_samples": length,
        }
        if (self.folder / HEADER).exists():
            self.header = json.loads((self.folder / HEADER).read_text(encoding="utf-8"))
            different = [key for key, value in header.items() if self.header.get(key) != value]
            if different:
                key = different[0]
                raise UsageError(
                    f"{self.folder} was begun with {key} {self.header.get(key)!r}, found {header[key]!r}. Remove it to "
                    "begin anew."
                )
        else:
            self._begin(header, source)
        for array in ARRAYS:
            setattr(self, array, np.load(self.folder / f"{array}.npy", mmap_mode="r+"))
        self.text_row = int(self.offsets[self.header["done"]])
        self.saved_at = time.monotonic()

    def _begin(self, header: dict, source: Source) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        offsets, ids = np.zeros(header["num_samples"] + 1, np.int64), []
        for index in tqdm(range(header["num_samples"]), desc="reading captions", unit="sample", disable=None):
            ids.extend(caption_id(caption) for caption in usable_captions(source, index))
            offsets[index + 1] = len(ids)
        np.save(self.folder / "offsets.npy", offsets)
        np.save(self.folder / "caption_ids.npy", np.array(ids, np.int64))
        for name, rows in (("image_embeds", header["num_samples"]), ("text_embeds", len(ids))):
            path, shape = self.folder / f"{name}.npy", (rows, header["dim"])
            np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
        self.header = {**header, "num_captions": len(ids), "done": 0}
        self._write_header()

    def write_images(self, indices: list[int], embeds: Tensor) -> None:
        self.image_embeds[indices] = _as_half(embeds)

    def write_texts(self, embeds: Tensor) -> None:
        self.text_embeds[self.text_row : self.text_row + len(embeds)] = _as_half(embeds)
        self.text_row += len(embeds)

    def advance(self, num_samples: int) -> None:
        """Counts samples that are written, and saves now and then.

        Raises:
            UsageError: if their captions are not those that were read at first.
        """
        done = self.header["done"] + num_samples
        if self.text_row != self.offsets[done]:
            raise UsageError(f"The data has changed while it was embedded. Remove {self.folder} and begin anew.")
        self.header["done"] = done
        if time.monotonic() > self.saved_at + SAVE_EVERY:
            self.save()

    def save(self) -> None:
        self.image_embeds.flush()
        self.text_embeds.flush()
        self._write_header()
        self.saved_at = time.monotonic()

    def finish(self) -> None:
        os.replace(self.folder, self.out)

    def _write_header(self) -> None:
        temporary = self.folder / f"{HEADER}.tmp"
        temporary.write_text(json.dumps(self.header, indent=1), encoding="utf-8")
        os.replace(temporary, self.folder / HEADER)


def _as_half(embeds: Tensor) -> np.ndarray:
    return F.normalize(embeds.float(), dim=1).half().cpu().numpy()


if __name__ == "__main__":
    main()
