"""What a run reports: a progress bar, `metrics.jsonl` in the run folder, and any Accelerate tracker beside it."""

import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from tqdm import tqdm

from .config import Config, UsageError
from .data import COUNTED


METRICS_FILE = "metrics.jsonl"


def check_trackers(names: list[str]) -> None:
    """Raises UsageError for a tracker that Accelerate does not know or that is not installed."""
    known = [str(name) for name in LOGGER_TYPE_TO_CLASS]
    installed = [str(getattr(name, "value", name)) for name in get_available_trackers()]
    for name in names:
        if name not in known:
            raise UsageError(f"run.trackers: found {name!r}, expected some of {', '.join(known)}.")
        if name not in installed:
            raise UsageError(f"run.trackers: {name!r} is not installed. `pip install {name}`, or leave it out.")


class Tracking:
    """Collects the metrics of steps and writes them every `run.log_every` steps.

    Times are seconds per step: `data_time` waiting for the batch, `step_time` everything else. Losses and norms are
    means over the steps since the last line that were not skipped; counts are totals of this process group and run.
    """

    def __init__(self, accelerator: Accelerator, config: Config, start: int, stop: int):
        self.accelerator, self.every, self.batch_size = accelerator, config.run.log_every, config.optim.batch_size
        self.path = Path(config.run.output_dir) / METRICS_FILE
        self.bar = tqdm(
            initial=start,
            total=stop,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.1 if sys.stderr.isatty() else 10,  # a log file gets a line now and then
            disable=not accelerator.is_local_main_process,
        )
        self.counts = torch.zeros(len(COUNTED), dtype=torch.long)
        self._reset()
        if accelerator.is_main_process:
            _forget_after(self.path, start)
        accelerator.init_trackers("hfclip", config=_flat(config.to_dict()))

    def _reset(self) -> None:
        self.sums, self.steps, self.skipped = Counter(), 0, 0
        self.since = time.perf_counter()

    def step(self, step: int, metrics: dict, data_time: float, counts: torch.Tensor) -> None:
        """Takes in one step; `step` counts those done, this one included. Collective every `run.log_every` steps."""
        self.steps += 1
        self.counts += counts
        self.sums["data_time"] += data_time
        if metrics.pop("skipped"):
            self.skipped += 1
        else:
            self.sums.update({name: metrics[name] for name in ("loss", "grad_norm")})
        self.bar.update()
        if step % self.every == 0:
            self._write_line(step, metrics)

    def _write_line(self, step: int, metrics: dict) -> None:
        elapsed = time.perf_counter() - self.since
        good = self.steps - self.skipped
        data_time = self.sums["data_time"] / self.steps
        line = {
            "loss": self.sums["loss"] / good if good else None,
            "grad_norm": self.sums["grad_norm"] / good if good else None,
            **{name: float(metrics[name]) for name in ("lr", "logit_scale", "epoch")},
            "samples_per_second": self.steps * self.batch_size / elapsed,
            "data_time": data_time,
            "step_time": elapsed / self.steps - data_time,
            "skipped_steps": self.skipped,
            **self.total_counts(),
        }
        shown = {"lr": f"{line['lr']:.1e}", "scale": f"{line['logit_scale']:.1f}"}
        loss = "skipped" if line["loss"] is None else f"{line['loss']:.3f}"
        self.bar.set_postfix({"loss": loss, **shown, "samples/s": f"{line['samples_per_second']:.0f}"})
        self.write(step, line)
        self._reset()

    def total_counts(self) -> dict[str, int]:
        """What went wrong in the data so far, over all processes; collective."""
        totals = self.accelerator.reduce(self.counts.to(self.accelerator.device), "sum").tolist()
        return {name: total for name, total in zip(COUNTED, totals, strict=True) if total}

    def write(self, step: int, line: dict) -> None:
        """One line of metrics.jsonl, and the numbers in it to the trackers."""
        if self.accelerator.is_main_process:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **line}) + "\n")
        self.accelerator.log({name: value for name, value in line.items() if value is not None}, step=step)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time of this block (saving, evaluation) does not count as training."""
        start = time.perf_counter()
        yield
        self.since += time.perf_counter() - start

    def say(self, message: str) -> None:
        """A line above the progress bar, from the main process."""
        if self.accelerator.is_main_process:
            self.bar.write(message)


def _forget_after(path: Path, step: int) -> None:
    """Drops lines of steps that a resumed run does again."""
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        path.write_text("".join(kept), encoding="utf-8")


def _flat(config: dict) -> dict:
    return {f"{section}.{key}": str(value) for section, values in config.items() for key, value in values.items()}
