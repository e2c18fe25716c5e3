"""From raw samples to batches on each rank: order, decoding, crops, captions and their tokens.

The order is a pure function: `Order` says which sample lies in which slot of which step, and rank r of W fills the
r-th slice of the slots. Nothing else decides what a step sees, so a run continues at any step, with any number of
workers or processes. Every sample is read by its index, whichever shard it lies in: no rank has shards of its own that
could run out before another's, all ranks have the same number of steps, and one shard is enough for all.

    StepSampler -> Place -> PairDataset: source, decode, crop -> Collate: tokens, counts -> batch
"""

import bisect
import hashlib
import os
import signal
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from hfclip.image_processing_hfclip import random_square_crop

from .config import Config, UsageError
from .phases import Phases
from .sources import BadSample, MixtureSource, Source


if TYPE_CHECKING:
    from .distillation import StoredEmbeddings


# What can be wrong with a sample; batch["counts"] holds how often each was met, and last how many captions were cut.
PROBLEMS = (
    "missing image",
    "missing caption",
    "empty image",
    "empty caption",
    "not an image",
    "unreadable image",
    "too large image",
    "unreadable caption",
    "truncated shard",
    "unreadable shard",
)
SIGNATURES = (b"\xff\xd8", b"\x89PNG", b"RIFF", b"GIF8")  # of image files, damaged ones too
COUNTED = (*(f"skipped: {problem}" for problem in PROBLEMS), "truncated captions")


def shuffled(position: int, length: int, *key: int) -> int:
    """What comes to `position` in the order that `key` names: a bijection of range(length) that looks random.

    A Feistel network over the smallest even number of bits that holds `length`; values outside are sent round again.
    Unlike a stored permutation it costs no memory at any length, in any number of workers.
    """
    half = max((length - 1).bit_length() + 1, 2) // 2
    mask = (1 << half) - 1
    while True:
        left, right = position >> half, position & mask
        for round_key in _round_keys(key):
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        position = left << half | right
        if position < length:
            return position


@lru_cache(maxsize=64)
def _round_keys(key: tuple[int, ...]) -> tuple[int, ...]:
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=48).digest()
    return tuple(int.from_bytes(digest[i : i + 8], "little") for i in range(0, 48, 8))


def _mix(x: int) -> int:
    """The finaliser of splitmix64: every bit of the result depends on every bit of `x`."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)


class Order:
    """Which sample lies in a slot of a step, and which ones stand in for it if it cannot be used.

    Samples are numbered through all sources, one source after the other. One source is a mixture of one.

    - Shares: of a batch of B, source i fills B * w_i slots, rounded up or down and never further away, where w_i is its
      share of all weights. Whether up or down goes in rounds of 4,096 steps, spread evenly over them; over a round the
      shares are exact to the nearest sample.
    - Epochs: each source goes round epochs of its own, each in another order, whatever the others do. An epoch is as
      many steps as are sure to have a sample for each slot; the few samples that are left over then wait, as those of
      the last incomplete batch do where there is one source. So no batch holds a sample twice.
    - Stand-ins: a slot takes the source's p-th sample of the epoch, and if that is unusable the one m places further on,
      where m is the most that the source has in a batch, and so on round the epoch. The slots of a batch differ in
      p modulo m, so that no batch holds a sample twice here either.

    Raises:
        UsageError: if a source has fewer samples than it must give to one batch, or gives less than one to a round.
    """

    ROUND = 4096

    def __init__(self, names: list[str], lengths: list[int], weights: list[float], batch_size: int, seed: int):
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
        self.starts = np.cumsum([0, *lengths]).tolist()
        # The points slot * ROUND + phase, with another phase in each step of a round, sample the line 0 ... B * ROUND,
        # which is cut up among the sources. Bit-reversed, phases are spread evenly however many steps are looked at.
        phases = np.array([int(f"{i:012b}"[::-1], 2) for i in range(self.ROUND)])
        cuts = np.rint(np.cumsum([0, *weights]) / sum(weights) * batch_size * self.ROUND).astype(np.int64)
        self.cuts = -((phases[:, None] - cuts) // self.ROUND)  # (step of the round, source + 1): first slot of each
        counts = np.diff(self.cuts, axis=1)
        self.taken = np.concatenate([np.zeros_like(counts[:1]), counts.cumsum(axis=0)])
        self.most = counts.max(axis=0).tolist()
        for name, length, most in zip(names, lengths, self.most, strict=True):
            self._check(name, length, most)
        self.epoch_steps = [self._epoch_steps(source) for source in range(len(lengths))]

    def _check(self, name: str, length: int, most: int) -> None:
        if most == 0:
            raise UsageError(
                f"data.train: {name!r} has so small a share of the weights that it would give less than one pair to "
                f"{self.ROUND} batches. Raise its weight or leave it out."
            )
        if length < most:
            raise UsageError(
                f"{name!r} has {length} usable pairs, expected at least {most}, its part of one batch of "
                f"{self.batch_size}. Lower optim.batch_size, or its weight in a mixture, or add data."
            )

    def _epoch_steps(self, source: int) -> int:
        """The most steps in a row that never take more than the source has, wherever they begin."""

        def most_taken(steps: int) -> int:
            return int((self._taken(np.arange(self.ROUND) + steps, source) - self.taken[:-1, source]).max())

        length = self.lengths[source]
        enough = (length // int(self.taken[-1, source]) + 1) * self.ROUND  # these take more than there is
        return bisect.bisect_right(range(enough + 1), length, key=most_taken) - 1

    def _taken(self, step, source: int):
        """How many samples of a source all steps before `step` have."""
        return step // self.ROUND * self.taken[-1, source] + self.taken[step % self.ROUND, source]

    def __call__(self, step: int, slot: int) -> Iterator[int]:
        """The sample of a slot, then its stand-ins, each once."""
        slot = shuffled(slot, self.batch_size, self.seed, step)  # else each rank would have sources of its own
        cuts = self.cuts[step % self.ROUND]
        source = int(np.searchsorted(cuts, slot, side="right")) - 1
        epoch = step // self.epoch_steps[source]
        before = self._taken(step, source) - self._taken(epoch * self.epoch_steps[source], source)
        position, most, length = int(before + slot - cuts[source]), self.most[source], self.lengths[source]
        row = range(position % most, length, most)
        for attempt in range(len(row)):
            place = row[(position // most + attempt) % len(row)]
            yield self.starts[source] + shuffled(place, length, self.seed, epoch, source)


def rank_slice(batch_size: int, rank: int, num_ranks: int) -> range:
    """The slots of the global batch that a rank fills; slices differ by one where the batch does not divide."""
    return range(batch_size * rank // num_ranks, batch_size * (rank + 1) // num_ranks)


class Place(NamedTuple):
    """A slot of a step, and the size and length that its phase asks for; None: as the model has them."""

    step: int
    slot: int
    image_size: int | None = None
    text_length: int | None = None


class StepSampler(Sampler[list[Place]]):
    """For each step from `start` to `stop`, the places that this rank fills."""

    def __init__(self, start: int, stop: int, slots: range, phases: Phases | None = None):
        self.start, self.stop, self.slots, self.phases = start, stop, slots, phases

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[Place]]:
        for step in range(self.start, self.stop):
            phase = self.phases and self.phases.at(step)
            sizes = (phase.image_size, phase.text_length) if phase else ()
            yield [Place(step, slot, *sizes) for slot in self.slots]


class PairDataset(Dataset):
    """Decoded, cropped pairs by `Place`.

    An unusable sample is replaced by its stand-in (`Order`): all batches stay full, on all ranks, and no batch holds a
    sample twice. It is counted where its own place comes up, not where it would have stood in for another, so that
    an epoch counts each unusable sample that has a place in it once, whatever the ranks and workers.
    """

    def __init__(self, source: Source, config: Config, image_size: int):
        self.source, self.image_size, self.seed = source, image_size, config.run.seed
        self.max_bad, batch_size = config.data.max_bad_in_a_row, config.optim.batch_size
        if isinstance(source, MixtureSource):
            names, lengths, weights = source.names, source.lengths, source.weights
        else:
            names, weights = [str(config.data.train)], [1.0]
            lengths = [min(len(source), config.data.max_samples or len(source))]
        self.order = Order(names, lengths, weights, batch_size, self.seed)
        self.steps_per_epoch = sum(lengths) // batch_size

    def __getitem__(self, place: Place) -> dict:
        """`image` (3, size, size) uint8, `caption`, `sample` (its index in the source), `text_length`, `problems`: index
        into `PROBLEMS` of what is wrong with the sample of this place, if anything.

        A place with no usable sample within reach gives `failure`, a message, instead of an image: an exception in a
        worker process would end this rank alone, before the others can save.
        """
        place, found = Place(*place), []
        for index, _ in zip(self.order(place.step, place.slot), range(self.max_bad), strict=False):
            try:
                example = self._load(index, place)
                return {**example, "sample": index, "text_length": place.text_length, "problems": found[:1]}
            except BadSample as bad:
                found.append(PROBLEMS.index(bad.kind))
        kinds = ", ".join(sorted({PROBLEMS[problem] for problem in found}))
        failure = f"Sample {index} and the {len(found) - 1} tried before it are unusable ({kinds})"
        return {"failure": f"{failure}. Mend the data, or raise data.max_bad_in_a_row.", "problems": found[:1]}

    def _load(self, index: int, place: Place) -> dict:
        # Seeded by the place, not by the process: the same whatever the number of workers and ranks.
        rng = np.random.default_rng([self.seed, place.step, place.slot])
        image, captions = self.source[index]
        captions = [caption.strip() for caption in captions if caption.strip()]
        if not captions:
            raise BadSample("empty caption")
        if image == b"":
            raise BadSample("empty image")
        caption = captions[rng.integers(len(captions))]
        try:
            return {"image": random_square_crop(image, place.image_size or self.image_size, rng), "caption": caption}
        except ValueError as error:
            raise BadSample(_image_problem(image, error)) from error


def _image_problem(image: bytes, error: ValueError) -> str:
    if isinstance(error.__cause__, UnidentifiedImageError) and not image.startswith(SIGNATURES):
        return "not an image"
    return "too large image" if "PIL.Image.MAX_IMAGE_PIXELS" in str(error) else "unreadable image"


class Collate:
    """Examples -> batch: `pixel_values` uint8 (local_batch, 3, size, size), `input_ids` and `attention_mask` padded to
    the longest caption, `group_id` where captions are grouped, and `counts` (see `COUNTED`); or `failure`, a message.

    Args:
        pad_to_max: Pad to the context, or to the phase's text length, instead.
        group: Give `group_id`.
        sort_by_length: Pairs with the longest captions first, so that micro-batches hold texts of similar length. The
            pairs of a batch are a set: neither the loss nor its gradient depends on their order.
        stored: A teacher's embeddings of the data (`StoredEmbeddings`): the batch gets `teacher_image_embeds` and
            `teacher_text_embeds`, (local_batch, teacher_dim).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        pad_to_max: bool,
        group: bool,
        sort_by_length: bool = False,
        stored: "StoredEmbeddings | None" = None,
    ):
        self.tokenizer, self.group, self.sort_by_length, self.stored = tokenizer, group, sort_by_length, stored
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
        limit = examples[0].get("text_length") or self.tokenizer.model_max_length
        tokens = self.tokenizer(captions, truncation=True, max_length=limit, padding=self.padding, return_tensors="pt")
        counts[-1] = self._num_truncated(captions, tokens["attention_mask"], limit)
        batch = {
            "pixel_values": torch.from_numpy(np.stack([example["image"] for example in examples])),
            "input_ids": tokens["input_ids"],
            "attention_mask": tokens["attention_mask"],
        }
        if self.group:
            batch["group_id"] = torch.tensor([caption_id(caption) for caption in captions])
        if self.stored is not None:
            try:
                embeds = self.stored.lookup([example["sample"] for example in examples], captions)
            except UsageError as error:  # as for samples: let all ranks end together
                return {"failure": str(error), "counts": counts}
            batch["teacher_image_embeds"], batch["teacher_text_embeds"] = embeds
        if self.sort_by_length:
            longest_first = batch["attention_mask"].sum(dim=1).argsort(descending=True, stable=True)
            batch = {name: values[longest_first] for name, values in batch.items()}
        return {**batch, "counts": counts}

    def _num_truncated(self, captions: list[str], attention_mask: torch.Tensor, limit: int) -> int:
        full = (attention_mask.sum(dim=1) == limit).nonzero().flatten().tolist()
        if not full:
            return 0
        whole = self.tokenizer([captions[i] for i in full], truncation=False, verbose=False)["input_ids"]
        return sum(len(ids) > limit for ids in whole)


def caption_id(caption: str) -> int:
    """63 bits that are the same for the same caption, in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(caption.encode(), digest_size=8).digest(), "little") >> 1


def build_loader(
    dataset: PairDataset,
    collate: Collate,
    config: Config,
    *,
    start: int,
    stop: int,
    rank: int,
    num_ranks: int,
    phases: Phases | None = None,
) -> DataLoader:
    """Batches of this rank for the steps from `start` to `stop`, read ahead across epochs by worker processes.

    Built here and not prepared by Accelerate, whose loaders repeat samples to fill the last batch and may read
    everything on the first rank (https://github.com/huggingface/accelerate/pull/2325).

    Args:
        phases: None: images and texts of the model's size all the way.
    """
    slots = rank_slice(config.optim.batch_size, rank, num_ranks)
    workers = config.data.num_workers
    return DataLoader(
        dataset,
        batch_sampler=StepSampler(start, stop, slots, phases),
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
