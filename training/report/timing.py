"""Where the time of a step goes: a stopwatch over its phases in every run, and a profiler's trace of a few steps.

with stopwatch.time("forward"): ...            -> seconds per phase, summed until they are read
with trace(5, ...) as step: step() after each  -> profile/trace.json.gz, profile/operators.txt
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import profiler


WARM_UP = 3  # steps before the traced ones: compiling, allocating, choosing kernels


class Stopwatch:
    """Seconds spent in named phases. A phase may be entered many times, and inside another, whose time it is not then.

    On CUDA the phases are measured on the device's own clock, by events in its stream: the host neither waits for them
    in a step nor counts the time in which it only queues work. `read` waits, so call it now and then. On other devices
    it is the host's clock, which is the same thing on a CPU.
    """

    def __init__(self, device: torch.device):
        self.on_cuda, self.phase, self.since, self.seconds = device.type == "cuda", None, None, Counter()
        self.pending: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def time(self, phase: str) -> Iterator[None]:
        """Counts the time of this block as `phase`, under whose name it also stands in a profiler's trace."""
        outer = self.phase
        with profiler.record_function(phase):
            self._enter(phase)
            try:
                yield
            finally:
                self._enter(outer)

    def _enter(self, phase: str | None) -> None:
        """The phase until now ends, and `phase` begins or goes on."""
        if self.on_cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
            if self.phase is not None:
                self.pending.append((self.phase, self.since, now))
        else:
            now = time.perf_counter()
            if self.phase is not None:
                self.seconds[self.phase] += now - self.since
        self.phase, self.since = phase, now

    def collect(self) -> None:
        """Adds up what the device has finished, without waiting: keeps the events in flight few."""
        while self.pending and self.pending[0][2].query():
            phase, start, end = self.pending.popleft()
            self.seconds[phase] += start.elapsed_time(end) / 1000

    def read(self) -> dict[str, float]:
        """Seconds of each phase since the last call, in order of first use; waits for the device."""
        if self.pending:
            self.pending[-1][2].synchronize()
            self.collect()
        seconds, self.seconds = dict(self.seconds), Counter()
        return seconds


@contextmanager
def trace(num_steps: int, folder: Path, say: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Traces `num_steps` steps, after three to warm up, into `folder`, and gives what to call after each step.

    Writes trace.json.gz, for https://ui.perfetto.dev or chrome://tracing, and operators.txt, a table of the operators
    that took the most time. A run that ends within the traced steps leaves those that it did. `say` is told of it.
    """
    if num_steps == 0:
        yield lambda: None
        return

    def write(profile: profiler.profile) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(folder / "trace.json.gz"))
        spent_on = "self_cpu_time_total" if profile.use_device is None else "self_device_time_total"
        operators = profile.key_averages().table(sort_by=spent_on, row_limit=40, max_name_column_width=80)
        (folder / "operators.txt").write_text(operators, encoding="utf-8")
        written.append(folder)
        say(f"Traced steps in {folder}: operators.txt, trace.json.gz (for https://ui.perfetto.dev)")

    written: list[Path] = []
    # The last step to warm up is traced and thrown away: starting to trace takes time itself.
    schedule = profiler.schedule(wait=WARM_UP - 1, warmup=1, active=num_steps, repeat=1)
    with profiler.profile(schedule=schedule, on_trace_ready=write) as profile:
        yield profile.step
    if not written:
        say(f"No step was traced: the run ended within the {WARM_UP} steps to warm up.")
