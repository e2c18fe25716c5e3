"""Which sample lies in which slot of which step: a pure function of the seed.

`Order` says which sample lies in which slot of which step, and rank r of W fills the r-th slice of the slots. Nothing
else decides what a step sees, so a run continues at any step, with any number of workers or processes. Every sample is
read by its index, whichever shard it lies in: no rank has shards of its own that could run out before another's, all
ranks have the same number of steps, and one shard is enough for all.

Of remote shards that are fetched while the run goes on, each rank reads few at a time (`LaneOrder`).
"""

import bisect
import hashlib
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from hfclip.errors import UsageError

from ..phases import Phases


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


@lru_cache(maxsize=1024)
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
      p modulo m, so that no batch holds a sample twice here either. Only where all of these are unusable, as in data of
      a batch or two, those of the next slots follow, which the batch may hold already.

    Raises:
        UsageError: if a source has fewer samples than it must give to one batch, or gives less than one to a round.
    """

    ROUND = 4096
    COLUMNS = 4  # slots whose samples a slot may take: mostly damaged data must not train on what little is left

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
        """The sample of a slot, then its stand-ins, then those of the next slots; each once."""
        slot = shuffled(slot, self.batch_size, self.seed, step)  # else each rank would have sources of its own
        cuts = self.cuts[step % self.ROUND]
        source = int(np.searchsorted(cuts, slot, side="right")) - 1
        epoch = step // self.epoch_steps[source]
        before = self._taken(step, source) - self._taken(epoch * self.epoch_steps[source], source)
        position, most, length = int(before + slot - cuts[source]), self.most[source], self.lengths[source]
        for column in range(min(self.COLUMNS, most)):
            row = range((position + column) % most, length, most)
            for attempt in range(len(row)):
                place = row[(position // most + attempt) % len(row)]
                yield self.starts[source] + shuffled(place, length, self.seed, epoch, source)


class Window(NamedTuple):
    """Neighbouring samples of an epoch's line from which one lane takes its samples for a while."""

    epoch: int
    lane: int
    number: int
    start: int
    stop: int


class LaneOrder:
    """As `Order`, for shards that a rank has only some of at a time.

    - Lines: each epoch puts its shards, in an order of its own, end to end into one line of samples.
    - Lanes: the line is cut into `num_lanes` pieces. A lane fills the same slots of every batch, and its piece is as
      long as these are many: all lanes end with the same step, whatever the shards hold, and what is left over of the
      line is less than a batch. A rank reads the lanes of its slots, so that a shard goes to about one of them. The
      number of lanes follows from data and batch, not from the ranks; shards that lie across a cut are read twice.
    - Windows: a lane is cut into windows about as long as `WINDOW` shards, and goes through each in a random order. So a
      batch is drawn from `num_lanes` x `WINDOW` shards.
    - Stand-ins: what the same slot has in the following steps, round the epoch. No batch holds a sample twice here
      either, and the shards are at hand or come next.

    Args:
        name: of the data, for messages.
        counts: usable samples of each shard.

    Raises:
        UsageError: if there are fewer samples than a batch has.
    """

    WINDOW = 2
    MAX_LANES = 64
    SHARDS_PER_LANE = 16  # at least

    def __init__(self, name: str, counts: list[int], batch_size: int, seed: int):
        self.counts, self.batch_size, self.seed = np.array(counts, np.int64), batch_size, seed
        self.starts = np.concatenate([[0], self.counts.cumsum()])
        total = int(self.starts[-1])
        self.lengths = [total]
        if total < batch_size:
            raise UsageError(
                f"{name!r} has {total} usable pairs, expected at least optim.batch_size, {batch_size}. Lower it, or add "
                "data."
            )
        self.epoch_steps = total // batch_size
        self.num_lanes = max(min(self.MAX_LANES, len(counts) // self.SHARDS_PER_LANE, batch_size), 1)
        self.window_length = self.WINDOW * total / len(counts)
        self.lines: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __call__(self, step: int, slot: int) -> Iterator[int]:
        """The sample of a slot, then its stand-ins, each once."""
        epoch, step = divmod(step, self.epoch_steps)
        for attempt in range(self.epoch_steps):
            yield self._sample(epoch, (step + attempt) % self.epoch_steps, slot)

    def _sample(self, epoch: int, step: int, slot: int) -> int:
        window, position = self._find(epoch, step, slot)
        length = window.stop - window.start
        place = shuffled(position - window.start, length, self.seed, epoch, window.lane, window.number)
        shards, ends = self._line(epoch)
        number = int(np.searchsorted(ends, window.start + place, side="right"))
        shard = shards[number]
        return int(self.starts[shard] + window.start + place - (ends[number] - self.counts[shard]))

    def window(self, step: int, slot: int) -> Window:
        epoch, step = divmod(step, self.epoch_steps)
        return self._find(epoch, step, slot)[0]

    def next_window(self, window: Window) -> Window:
        """The one that the lane goes on with, in the next epoch if need be."""
        epoch, lane, number = window.epoch, window.lane, window.number + 1
        if number == self._num_windows(lane):
            epoch, number = epoch + 1, 0
        return self._window(epoch, lane, number)

    def shards_of(self, window: Window) -> list[int]:
        shards, ends = self._line(window.epoch)
        first, last = np.searchsorted(ends, [window.start, window.stop - 1], side="right")
        return shards[first : last + 1].tolist()

    def lanes_of(self, slots: range) -> int:
        """How many lanes fill these slots."""
        return self._lane_of(slots[-1]) - self._lane_of(slots[0]) + 1

    def _find(self, epoch: int, step: int, slot: int) -> tuple[Window, int]:
        """The window of a step's slot, and its place in the line before the window is shuffled."""
        lane = self._lane_of(slot)
        slots = self._slots_of(lane)
        position = step * len(slots) + slot - slots.start
        number = ((position + 1) * self._num_windows(lane) - 1) // (self.epoch_steps * len(slots))
        return self._window(epoch, lane, number), self.epoch_steps * slots.start + position

    def _window(self, epoch: int, lane: int, number: int) -> Window:
        slots, count = self._slots_of(lane), self._num_windows(lane)
        start, length = self.epoch_steps * slots.start, self.epoch_steps * len(slots)
        return Window(epoch, lane, number, start + length * number // count, start + length * (number + 1) // count)

    def _num_windows(self, lane: int) -> int:
        return max(round(self.epoch_steps * len(self._slots_of(lane)) / self.window_length), 1)

    def _lane_of(self, slot: int) -> int:
        return slot * self.num_lanes // self.batch_size

    def _slots_of(self, lane: int) -> range:
        first, end = (-(-number * self.batch_size // self.num_lanes) for number in (lane, lane + 1))
        return range(first, end)

    def _line(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards of an epoch in their order, and where in the line each ends."""
        if epoch not in self.lines:
            self.lines = {near: line for near, line in self.lines.items() if abs(near - epoch) == 1}
            length = len(self.counts)
            shards = np.array([shuffled(place, length, self.seed, epoch) for place in range(length)])
            self.lines[epoch] = shards, self.counts[shards].cumsum()
        return self.lines[epoch]


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
