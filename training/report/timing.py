"""Where the time of a step goes: a stopwatch over its phases in every run, and a profiler's trace of a few steps.

with stopwatch.time("forward"): ...  -> seconds a phase, summed until they are read
trace.step() after each step         -> profile/trace.json.gz, profile/operators.txt
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import profiler


WARM_UP = 3  # steps in front of the traced ones: compiling, allocating, choosing kernels


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


class Trace:
    """Traces `num_steps` steps, after three to warm up, into `folder`; with 0 it does nothing.

        with Trace(num_steps, folder, say) as trace:
            for batch in loader:
                ...
                trace.step()

    Writes trace.json.gz, for https://ui.perfetto.dev or chrome://tracing, and operators.txt, a table of the operators
    that took the most time. A run that ends within the traced steps leaves those that it did.

    Args:
        say: is told where the trace lies.
    """

    def __init__(self, num_steps: int, folder: Path, say: Callable[[str], None]):
        self.num_steps, self.folder, self.say, self.profiler = num_steps, folder, say, None
        self.written = False

    def __enter__(self) -> "Trace":
        if self.num_steps:
            # The last step to warm up is traced and thrown away: starting to trace takes time itself.
            schedule = profiler.schedule(wait=WARM_UP - 1, warmup=1, active=self.num_steps, repeat=1)
            self.profiler = profiler.profile(schedule=schedule, on_trace_ready=self._write)
            self.profiler.start()
        return self

    def step(self) -> None:
        """A step of the run has ended."""
        if self.profiler is not None:
            self.profiler.step()
            if self.profiler.step_num == WARM_UP + self.num_steps:
                self._stop()

    def __exit__(self, *exception) -> None:
        if self.profiler is not None:
            self._stop()
            if not self.written:
                self.say(f"No step was traced: the run ended within the {WARM_UP} steps to warm up.")

    def _stop(self) -> None:
        self.profiler.stop()
        self.profiler = None

    def _write(self, profile: profiler.profile) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(self.folder / "trace.json.gz"))
        spent_on = "self_cpu_time_total" if profile.use_device is None else "self_device_time_total"
        operators = profile.key_averages().table(sort_by=spent_on, row_limit=40, max_name_column_width=80)
        (self.folder / "operators.txt").write_text(operators, encoding="utf-8")
        self.written = True
        self.say(f"Traced steps in {self.folder}: operators.txt, trace.json.gz (for https://ui.perfetto.dev)")
