"""From raw samples to batches on each rank: order, decoding, crops, captions and their tokens.

The order is a pure function: step s of the run uses positions s * B ... s * B + B - 1 of an endless sequence of
epochs, `shuffled` says which sample lies at a position, and rank r of W takes the r-th slice of the batch. Nothing
else decides what a step sees, so a run continues at any step, with any number of workers or processes.

    StepSampler -> (epoch, position) -> PairDataset: source, decode, crop -> Collate: tokens, counts -> batch
"""

import hashlib
import os
import signal
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from hfclip.image_processing_hfclip import random_square_crop

from .config import Config, UsageError
from .sources import BadSample, Source


# What can be wrong with a sample; batch["counts"] holds how often each was met, and last how many captions were cut.
PROBLEMS = (
    "missing image",
    "missing caption",
    "empty caption",
    "unreadable image",
    "unreadable caption",
    "truncated shard",
)
COUNTED = (*(f"skipped: {problem}" for problem in PROBLEMS), "truncated captions")


def shuffled(position: int, length: int, seed: int, epoch: int) -> int:
    """The sample at `position` of an epoch: a bijection of range(length) that looks random.

    A Feistel network over the smallest even number of bits that holds `length`; values outside are sent round again.
    Unlike a stored permutation it costs no memory at any length, in any number of workers.
    """
    half = max((length - 1).bit_length() + 1, 2) // 2
    mask = (1 << half) - 1
    while True:
        left, right = position >> half, position & mask
        for key in _round_keys(seed, epoch):
            left, right = right, left ^ (_mix(right ^ key) & mask)
        position = left << half | right
        if position < length:
            return position


@lru_cache(maxsize=8)
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    digest = hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=48).digest()
    return tuple(int.from_bytes(digest[i : i + 8], "little") for i in range(0, 48, 8))


def _mix(x: int) -> int:
    """The finaliser of splitmix64: every bit of the result depends on every bit of `x`."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)


def rank_slice(batch_size: int, rank: int, num_ranks: int) -> range:
    """The slots of the global batch that a rank fills; slices differ by one where the batch does not divide."""
    return range(batch_size * rank // num_ranks, batch_size * (rank + 1) // num_ranks)


class StepSampler(Sampler[list[tuple[int, int]]]):
    """For each step from `start` to `stop`, this rank's places `(epoch, position)` in the data."""

    def __init__(self, start: int, stop: int, batch_size: int, steps_per_epoch: int, slots: range):
        self.start, self.stop = start, stop
        self.batch_size, self.steps_per_epoch, self.slots = batch_size, steps_per_epoch, slots

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.start, self.stop):
            epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
            yield [(epoch, step_of_epoch * self.batch_size + slot) for slot in self.slots]


class PairDataset(Dataset):
    """Decoded, cropped pairs by place `(epoch, position)`.

    In the place of an unusable sample comes the one that the following batch of the epoch has in the same slot, and so
    on round the epoch: all batches stay full, on all ranks, and no batch holds a sample twice.
    """

    def __init__(self, source: Source, config: Config, image_size: int):
        self.source, self.image_size = source, image_size
        self.batch_size, self.seed = config.optim.batch_size, config.run.seed
        self.max_bad = config.data.max_bad_in_a_row
        self.length = min(len(source), config.data.max_samples or len(source))
        if self.length < self.batch_size:
            raise UsageError(
                f"{config.data.train!r} has {self.length} usable pairs, expected at least one batch of "
                f"{self.batch_size}. Lower optim.batch_size or add data."
            )

    @property
    def steps_per_epoch(self) -> int:
        return self.length // self.batch_size

    def __getitem__(self, place: tuple[int, int]) -> dict:
        """`image` (3, size, size) uint8, `caption`, `problems`: indices into `PROBLEMS` met on the way here.

        A place with no usable sample within reach gives `failure`, a message, instead of an image: an exception in a
        worker process would end this rank alone, before the others can save.
        """
        epoch, position = place
        slots = range(position % self.batch_size, self.length, self.batch_size)
        column, problems = position // self.batch_size, []
        for attempt in range(min(self.max_bad, len(slots))):
            index = shuffled(slots[(column + attempt) % len(slots)], self.length, self.seed, epoch)
            try:
                return {**self._load(index, place), "problems": problems}
            except BadSample as bad:
                problems.append(PROBLEMS.index(bad.kind))
        kinds = {PROBLEMS[problem] for problem in problems}
        failure = (
            f"Sample {index} and the {len(problems) - 1} tried before it are unusable ({', '.join(sorted(kinds))})"
        )
        return {"failure": f"{failure}. Mend the data, or raise data.max_bad_in_a_row.", "problems": problems}

    def _load(self, index: int, place: tuple[int, int]) -> dict:
        # Seeded by the place, not by the process: the same whatever the number of workers and ranks.
        rng = np.random.default_rng([self.seed, *place])
        image, captions = self.source[index]
        captions = [caption.strip() for caption in captions if caption.strip()]
        if not captions:
            raise BadSample("empty caption")
        caption = captions[rng.integers(len(captions))]
        try:
            return {"image": random_square_crop(image, self.image_size, rng), "caption": caption}
        except ValueError as error:
            raise BadSample("unreadable image") from error


class Collate:
    """Examples -> batch: `pixel_values` uint8 (local_batch, 3, size, size), `input_ids` and `attention_mask` padded to
    the longest caption, `group_id` where captions are grouped, and `counts` (see `COUNTED`); or `failure`, a message.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, pad_to_max: bool, group: bool):
        self.tokenizer, self.group = tokenizer, group
        self.padding = "max_length" if pad_to_max else "longest"

    def __call__(self, examples: list[dict]) -> dict:
        counts = torch.zeros(len(COUNTED), dtype=torch.long)
        for example in examples:
            for problem in example["problems"]:
                counts[problem] += 1
        failures = [example["failure"] for example in examples if "failure" in example]
        if failures:
            return {"failure": failures[0], "counts": counts}
        captions = [example["caption"] for example in examples]
        tokens = self.tokenizer(captions, truncation=True, padding=self.padding, return_tensors="pt")
        counts[-1] = self._num_truncated(captions, tokens["attention_mask"])
        batch = {
            "pixel_values": torch.from_numpy(np.stack([example["image"] for example in examples])),
            "input_ids": tokens["input_ids"],
            "attention_mask": tokens["attention_mask"],
            "counts": counts,
        }
        if self.group:
            batch["group_id"] = torch.tensor([caption_id(caption) for caption in captions])
        return batch

    def _num_truncated(self, captions: list[str], attention_mask: torch.Tensor) -> int:
        limit = self.tokenizer.model_max_length
        full = (attention_mask.sum(dim=1) == limit).nonzero().flatten().tolist()
        if not full:
            return 0
        whole = self.tokenizer([captions[i] for i in full], truncation=False, verbose=False)["input_ids"]
        return sum(len(ids) > limit for ids in whole)


def caption_id(caption: str) -> int:
    """63 bits that are the same for the same caption, in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(caption.encode(), digest_size=8).digest(), "little") >> 1


def build_loader(
    dataset: PairDataset, collate: Collate, config: Config, *, start: int, stop: int, rank: int, num_ranks: int
) -> DataLoader:
    """Batches of this rank for the steps from `start` to `stop`, read ahead across epochs by worker processes.

    Built here and not prepared by Accelerate, whose loaders repeat samples to fill the last batch and may read
    everything on the first rank (https://github.com/huggingface/accelerate/pull/2325).
    """
    slots = rank_slice(config.optim.batch_size, rank, num_ranks)
    workers = config.data.num_workers
    return DataLoader(
        dataset,
        batch_sampler=StepSampler(start, stop, config.optim.batch_size, dataset.steps_per_epoch, slots),
        collate_fn=collate,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_start_worker,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # its own, so that starting to read leaves the global random state alone
    )


def _start_worker(worker: int) -> None:
    """Ctrl-C and SIGTERM reach the whole process group; the run, not its workers, decides when to stop reading."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
