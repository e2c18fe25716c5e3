"""What a run reports: a progress bar, `metrics.jsonl` in the run folder, and any Accelerate tracker beside it."""

import json
import math
import os
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

from hfclip.errors import UsageError, redact
from hfclip.evaluation import Result, all_metrics, headlines
from hfclip.flops import measured_peak
from hfclip.precision import PRECISIONS

from ..config import Config
from ..data.batches import COUNTED
from .curves import METRICS_FILE, draw_curves, read_metrics
from .timing import Stopwatch


SECONDS_BETWEEN_CURVES = 60  # a drawing takes about one
TELL_RUNS_BY = {"wandb": ("id", "name"), "trackio": ("name",)}  # what of a run makes its tracker find it again


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
    """Collects the metrics of steps and writes them every `run.log_every` steps and at the end.

    Losses and norms are means over the steps since the last line that were not skipped, other metrics the last ones;
    counts are totals of this process group and run. Times are seconds per step: `step_time` in all, of it `data_time`
    waiting for the batch and one for each phase that `watch` times ("forward": `forward_time`). Saving and evaluation
    are not in them.

    `tflops` is what the towers need (10**12 FLOP per second, see `flops.py`) of one process, the main one, and
    `share_of_peak` the same in parts of the matrix products that its device was measured to do at the start.

    `tracked` says as what wandb and trackio know the run, so that a resumed one goes on there and is no new one.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        config: Config,
        start: int,
        stop: int,
        watch: Stopwatch | None = None,
        counts: dict[str, int] | None = None,
        tracked: dict[str, dict[str, str]] | None = None,
    ):
        self.accelerator, self.every, self.batch_size = accelerator, config.run.log_every, config.optim.batch_size
        self.path, self.stop, self.drawn_at = Path(config.run.output_dir) / METRICS_FILE, stop, -math.inf
        self.bar = tqdm(
            initial=start,
            total=stop,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.1 if sys.stderr.isatty() else 10,  # a log file gets a line now and then
            disable=not accelerator.is_local_main_process,
        )
        # What a resumed run met before counts once, with the main process's.
        before = (counts or {}) if accelerator.is_main_process else {}
        self.counts = torch.tensor([before.get(name, 0) for name in COUNTED])
        if accelerator.is_main_process:
            _forget_after(self.path, start)
        self.tracked = _init_trackers(accelerator, config, start, tracked or {})
        # On all processes at once: on a CPU they share the cores, as they will in training.
        self.peak = measured_peak(accelerator.device, PRECISIONS[config.run.precision])
        self.watch = watch or Stopwatch(accelerator.device)
        self._reset()

    def start(self) -> None:
        """The first step begins: what came before it does not count as training."""
        self.bar.unpause()
        self._reset()

    def _reset(self) -> None:
        self.sums, self.steps, self.skipped, self.flops = Counter(), 0, 0, 0
        self.since = time.perf_counter()

    def step(self, step: int, metrics: dict, data_time: float, counts: torch.Tensor, flops: int | None = None) -> None:
        """Takes in one step. Collective where a line is due.

        Args:
            step: how many are done, this one included.
            metrics: `loss`, `grad_norm`, `skipped` and further numbers.
            data_time: seconds that the step waited for its batch.
            counts: of this process, see `COUNTED`.
            flops: of this process's pairs, by `ModelFlops.of_batch`; None if they are not known.
        """
        self.steps += 1
        self.counts += counts
        self.flops += math.nan if flops is None else flops
        self.sums["data_time"] += data_time
        if metrics["skipped"]:
            self.skipped += 1
        else:
            self.sums.update({name: metrics[name] for name in ("loss", "grad_norm")})
        self.watch.collect()
        self.bar.update()
        if step % self.every == 0 or step == self.stop:
            self._write_line(step, metrics)

    def _write_line(self, step: int, metrics: dict) -> None:
        good = self.steps - self.skipped
        line = {
            **{name: self.sums[name] / good if good else None for name in ("loss", "grad_norm")},
            **{name: float(value) for name, value in metrics.items() if name not in ("loss", "grad_norm", "skipped")},
            **self._speed(),
            "skipped_steps": self.skipped,
            **self.total_counts(),
        }
        self._show(line)
        self.write(step, line)
        self._reset()

    def _speed(self) -> dict[str, float]:
        """Where the time since the last line went, and what was done in it."""
        phases = self.watch.read()  # waits for the device, so before the clock is read
        elapsed = time.perf_counter() - self.since
        speed = {
            "samples_per_second": self.steps * self.batch_size / elapsed,
            "step_time": elapsed / self.steps,
            "data_time": self.sums["data_time"] / self.steps,
            **{f"{phase}_time": seconds / self.steps for phase, seconds in phases.items()},
        }
        if not math.isnan(self.flops):
            speed |= {"tflops": self.flops / elapsed / 1e12, "share_of_peak": self.flops / elapsed / self.peak}
        return speed

    def _show(self, line: dict) -> None:
        shown = {
            "loss": "skipped" if line["loss"] is None else f"{line['loss']:.3f}",
            "lr": f"{line['lr']:.1e}",
            "scale": f"{line['logit_scale']:.1f}",
            "samples/s": f"{line['samples_per_second']:.0f}",
        }
        if "share_of_peak" in line:
            shown["of peak"] = f"{line['share_of_peak']:.0%}"
        self.bar.set_postfix(shown)

    def total_counts(self) -> dict[str, int]:
        """What went wrong in the data so far, over all processes; collective."""
        totals = self.accelerator.reduce(self.counts.to(self.accelerator.device), "sum").tolist()
        return {name: total for name, total in zip(COUNTED, totals, strict=True) if total}

    def write(self, step: int, line: dict, **notes: list[str]) -> None:
        """One line of metrics.jsonl with its notes, and the numbers in it to the trackers."""
        if self.accelerator.is_main_process:
            try:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": step, **line, **notes}) + "\n")
            except OSError as error:
                raise UsageError(f"{self.path} cannot be written: {error}. Make room and resume.") from error
        self.accelerator.log({name: value for name, value in line.items() if value is not None}, step=step)

    def evaluation(self, step: int, results: dict[str, Result]) -> None:
        """Writes what was measured after a step, if anything, and shows the headlines."""
        if results:
            shown = headlines(results)
            self.write(step, all_metrics(results), headlines=list(shown))
            self.say(f"step {step}: {', '.join(f'{name} {value:.1%}' for name, value in shown.items())}")

    def draw(self, is_last: bool = False) -> None:
        """Draws the curves, unless they were drawn a moment ago and will be again."""
        if is_last or time.monotonic() - self.drawn_at > SECONDS_BETWEEN_CURVES:
            draw_curves(self.path.parent)
            self.drawn_at = time.monotonic()

    def has_evaluation(self, step: int) -> bool:
        """Whether metrics.jsonl has what was measured after `step`."""
        lines = read_metrics(self.path) if self.path.is_file() else []
        return any(line["step"] == step and "loss" not in line for line in lines)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time of this block (saving, evaluation) does not count as training."""
        start = time.perf_counter()
        yield
        self.since += time.perf_counter() - start

    def say(self, message: str) -> None:
        """A line above the progress bar, from the main process."""
        if self.accelerator.is_main_process:
            self.bar.write(redact(message))


def _init_trackers(
    accelerator: Accelerator, config: Config, start: int, tracked: dict[str, dict[str, str]]
) -> dict[str, dict[str, str]]:
    """Starts the trackers, where they know a run from before in that one. Returns as what each of them knows it.

    Raises:
        UsageError: for one that does not start (no login, no network), with the reason it gives.
    """
    folder = Path(config.run.output_dir).resolve()
    options = {
        "wandb": {"name": folder.name, "dir": str(folder)},
        "trackio": {"name": folder.name},
        # What was written after the checkpoint is written again.
        "tensorboard": {"purge_step": start + 1} if start else {},
    }
    for tracker, known in tracked.items():
        options[tracker] = {**options.get(tracker, {}), **known, "resume": "allow"}
    try:
        accelerator.init_trackers("hfclip", config=_flat(config.record()), init_kwargs=options)
    except Exception as error:  # each tracker has its own
        raise UsageError(f"run.trackers: {error}") from error
    if not accelerator.is_main_process:
        return {}
    named = {tracker.name: tracker.tracker for tracker in accelerator.trackers if tracker.name in TELL_RUNS_BY}
    now = {name: {key: getattr(run, key) for key in TELL_RUNS_BY[name]} for name, run in named.items()}
    return {**tracked, **now}


def _forget_after(path: Path, step: int) -> None:
    """Drops lines of steps that a resumed run does again."""
    if path.is_file():
        kept = [json.dumps(line) + "\n" for line in read_metrics(path) if line["step"] <= step]
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        beside.write_text("".join(kept), encoding="utf-8")
        beside.replace(path)  # whole before or whole after, also if the run is killed here


def _flat(settings: dict, prefix: str = "") -> dict[str, int | float | bool | str]:
    """Nested settings as `section.key` -> value, in the types that all trackers take."""
    flat = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, int | float | str) else json.dumps(value)
    return flat
