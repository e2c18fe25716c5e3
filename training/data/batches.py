"""From raw samples to batches on each rank: decoding, crops, captions and their tokens, in the order of `order`.

StepSampler -> Place -> PairDataset: source, decode, crop -> Collate: tokens, counts -> batch
"""

import os
import signal
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from hfclip.data.samples import PROBLEMS, BadSample, Source, caption_id, decoding, not_blank
from hfclip.data.sources import open_source
from hfclip.data.streaming import StreamSource
from hfclip.errors import UsageError

from ..config import Config, DataConfig
from ..machine import num_workers
from ..phases import Phases
from ..state.stopping import SIGNALS
from .augment import augmented
from .loading import HandingOver
from .order import LaneOrder, Order, Place, StepSampler, rank_slice


# What batch["counts"] holds: how often each problem was met, and how many captions were cut.
COUNTED = (*(f"skipped: {problem}" for problem in PROBLEMS), "truncated captions")
MAX_BAD_IN_A_ROW = 50  # unusable samples in one place of the batch, one after the other, end the run
BYTES_AHEAD = 4 << 30  # of decoded images that the workers of a machine prepare


def open_data(name: str | dict[str, float], config: DataConfig, split: str | None, image_size: int) -> Source:
    """Opens what `data.train` or `eval.retrieval` names, as the settings have it; see `open_source`."""
    return open_source(
        name,
        split=split,
        image_key=config.image_key,
        caption_key=config.caption_key,
        max_samples=config.max_samples,
        image_size=image_size,
        disk=config.disk if name == config.train else None,
    )


def largest_batch(source: Source) -> int:
    """The most pairs that a batch can have: of a mixture, each source fills its share."""
    _, lengths, weights = source.parts("")
    return min(int(length * sum(weights) / weight) for length, weight in zip(lengths, weights, strict=True))


class PairDataset(Dataset):
    """Decoded, cropped pairs by `Place`.

    An unusable sample is replaced by its stand-in (`Order`): all batches stay full, on all ranks, and no batch holds a
    sample twice. It is counted where its own place comes up, not where it would have stood in for another, so that
    an epoch counts each unusable sample that has a place in it once, whatever the ranks and workers.
    """

    def __init__(self, source: Source, config: Config, image_size: int):
        self.source, self.image_size, self.seed = source, image_size, config.run.seed
        self.augment = config.data.augment
        batch_size = config.optim.batch_size
        self.steps_per_epoch = len(source) // batch_size
        if isinstance(source, StreamSource):
            counts = np.diff(source.starts.clip(max=len(source))).tolist()
            self.order, self.windows = LaneOrder(str(config.data.train), counts, batch_size, self.seed), set()
            _check_tokenizer(config)
        else:
            self.order = Order(*source.parts(str(config.data.train)), batch_size, self.seed)

    def __getitems__(self, places: list[Place]) -> list[dict]:
        """What `DataLoader` asks for: the examples of a batch."""
        if isinstance(self.source, StreamSource):
            self._prefetch(places)
        examples = []
        for place in places:
            examples.append(self[place])
            if "failure" in examples[-1]:  # the run ends: do not wait for what is not available again and again
                break
        return examples

    def _prefetch(self, places: list[Place]) -> None:
        """Begins to fetch the shards that these places read from, then those that their lanes go on with."""
        windows = {self.order.window(place.step, place.slot) for place in places}
        new = sorted(windows - self.windows)
        self.windows = windows
        for window in (*new, *map(self.order.next_window, new)):
            self.source.prefetch(self.order.shards_of(window))

    def __getitem__(self, place: Place) -> dict:
        """`image` (3, size, size) uint8, `caption`, `sample` (its index in the source), `text_length`, `problems`: index
        into `PROBLEMS` of what is wrong with the sample of this place, if anything; `lost`: what is gone (`BadSample`).

        A place with no usable sample within reach gives `failure`, a message, instead of an image: an exception in a
        worker process would end this rank alone, before the others can save.
        """
        place, found, lost = Place(*place), [], []
        for index, _ in zip(self.order(place.step, place.slot), range(MAX_BAD_IN_A_ROW), strict=False):
            try:
                example = self._load(index, place)
                about = {"sample": index, "text_length": place.text_length, "problems": found[:1], "lost": lost}
                return {**example, **about}
            except BadSample as bad:
                found.append(PROBLEMS.index(bad.kind))
                lost += [bad.lost] if bad.lost else []
            except UsageError as error:  # a shard that cannot be fetched
                return {"failure": str(error), "problems": found[:1]}
        kinds = ", ".join(sorted({PROBLEMS[problem] for problem in found}))
        failure = f"{self.source.name(index)} and the {len(found) - 1} tried before it are unusable ({kinds})"
        return {"failure": f"{failure}. Fix the data.", "problems": found[:1]}

    def _load(self, index: int, place: Place) -> dict:
        # Seeded by the place, not by the process: the same whatever the number of workers and ranks.
        rng = np.random.default_rng([self.seed, place.step, place.slot])
        image, captions, *_ = self.source[index]
        captions = not_blank(captions)
        if not captions:
            raise BadSample("empty caption")
        with decoding(image):
            caption = captions[rng.integers(len(captions))]
            pixels = augmented(image, place.image_size or self.image_size, self.augment, rng)
            return {"image": pixels, "caption": caption}


def _check_tokenizer(config: Config) -> None:
    if config.model.tokenizer == "train":
        raise UsageError(
            "model.tokenizer: found 'train', which reads captions of all shards; with data.disk they are not here. "
            "Name a tokenizer, or train one in a run of one step on a few of the shards and name its folder."
        )


class Collate:
    """Examples -> batch: `pixel_values` uint8 (local_batch, 3, size, size), `input_ids` and `attention_mask` padded to
    the longest caption, `group_id` where captions are grouped, `counts` (see `COUNTED`), and `lost` where
    something is found to be gone; or `failure`, a message.

    Args:
        pad_to_max: Pad to the context, or to the phase's text length, instead.
        group: Give `group_id`.
        sort_by_length: Pairs with the longest captions first, so that micro-batches hold texts of similar length. The
            pairs of a batch are a set: neither the loss nor its gradient depends on their order.
        targets: Places of samples in the source and their captions -> further columns of the batch.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        pad_to_max: bool,
        group: bool,
        sort_by_length: bool = False,
        targets: Callable[[list[int], list[str]], dict[str, torch.Tensor]] | None = None,
    ):
        self.tokenizer, self.group, self.sort_by_length, self.targets = tokenizer, group, sort_by_length, targets
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
        if self.targets is not None:
            try:
                batch |= self.targets([example["sample"] for example in examples], captions)
            except UsageError as error:  # as for samples: let all ranks end together
                return {"failure": str(error), "counts": counts}
        if self.sort_by_length:
            longest_first = batch["attention_mask"].sum(dim=1).argsort(descending=True, stable=True)
            batch = {name: values[longest_first] for name, values in batch.items()}
        lost = sorted({lost for example in examples for lost in example.get("lost", ())})
        return {**batch, "counts": counts, **({"lost": lost} if lost else {})}

    def _num_truncated(self, captions: list[str], attention_mask: torch.Tensor, limit: int) -> int:
        full = (attention_mask.sum(dim=1) == limit).nonzero().flatten().tolist()
        if not full:
            return 0
        whole = self.tokenizer([captions[i] for i in full], truncation=False, verbose=False)["input_ids"]
        return sum(len(ids) > limit for ids in whole)


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

    Raises:
        UsageError: if `data.disk` is too small for what these ranks read at a time, or too large for the disk, or
            ranks have counted other shards.
    """
    if isinstance(dataset.source, StreamSource):
        _check_stream(dataset.source, dataset.order, num_ranks)
    slots = rank_slice(config.optim.batch_size, rank, num_ranks)
    workers = num_workers(config.data.num_workers)
    bytes_ahead = BYTES_AHEAD // min(int(os.environ.get("LOCAL_WORLD_SIZE", 1)), num_ranks)
    in_a_batch = 3 * dataset.image_size**2 * len(slots)
    return DataLoader(
        dataset,
        batch_sampler=StepSampler(start, stop, slots, phases),
        collate_fn=HandingOver(collate) if workers else collate,
        num_workers=workers,
        # Batches that are ready wait in memory: a large one must not wait in many copies.
        prefetch_factor=max(1, min(4, bytes_ahead // (in_a_batch * workers))) if workers else None,
        worker_init_fn=start_worker,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # its own, so that starting to read leaves the global random state alone
    )


def _check_stream(source: StreamSource, order: LaneOrder, num_ranks: int) -> None:
    if dist.is_available() and dist.is_initialized():
        fingerprints: list[str | None] = [None] * num_ranks
        dist.all_gather_object(fingerprints, source.fingerprint)
        if len(set(fingerprints)) > 1:
            raise UsageError(
                "data.disk: the machines have different counts of the shards. Put one file beside the shards, where "
                f"all find it: `{source.count_again}`."
            )
    cache, local = source.cache, min(int(os.environ.get("LOCAL_WORLD_SIZE", 1)), num_ranks)
    firsts = range(0, num_ranks, local)
    machines = [
        [order.batch_size * min(r, num_ranks) // num_ranks for r in (first, first + local)] for first in firsts
    ]
    lanes = max(order.lanes_of(range(*slots)) for slots in machines)
    # Two windows may be read at a time, or one while the next is fetched; each may begin and end within a shard.
    each = 2 * order.WINDOW + 2
    sizes = [size for _, size in cache.shards]
    needed = min(max(lanes * each * sum(sizes) // len(sizes), each * max(sizes)), sum(sizes))
    if cache.limit < needed:
        raise UsageError(
            f"data.disk: found {cache.limit / 1e9:g} GB, expected at least {needed / 1e9:.3g}. A machine reads "
            f"{lanes} of the {order.num_lanes} lanes, each from {each} shards at a time of "
            f"{sum(sizes) / len(sizes) / 1e9:.3g} GB on average. More machines read fewer lanes each."
        )
    cache.check_disk()


def start_worker(worker: int) -> None:
    """Signals reach the whole process group; the run, not its workers, decides when to stop reading."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
