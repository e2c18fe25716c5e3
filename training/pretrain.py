"""Trains a CLIP model on pairs of images and captions.

    accelerate launch training/pretrain.py                                      # a demonstration, minutes on a CPU
    accelerate launch training/pretrain.py --config my.yaml --optim.lr 1e-3     # a YAML names a run, flags override it
    accelerate launch training/pretrain.py --config runs/my/config.yaml --resume auto

Read `main`, `build`, `train`, `save`, `finish`, in this order; a single step is in step.py. All that a step does
follows from the settings, the weights and the step's number, so a run that was resumed is the run that was not
interrupted, bit for bit.
"""

# ruff: noqa: E402 - mistakes are told before torch is imported
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from hfclip_errors import UsageError, redact, start_program


if __name__ == "__main__":
    start_program(__file__, __spec__, "train")

from . import launcher
from .command import Command, parse_arguments
from .config import CONFIG_FILE, Config
from .state import checkpoint, resuming
from .threads import let_waiting_threads_sleep


@launcher.program
def read_command_line() -> tuple[Config, Command]:
    """Returns the run that is asked for and how it starts, unless settings, launcher or folder rule it out."""
    config, command = parse_arguments(sys.argv[1:])
    launcher.check_settings(config)
    resuming.check_free(Path(config.run.output_dir), command.resume)
    return config, command


if __name__ == "__main__":
    read_command_line()  # what follows takes seconds
    launcher.end_on_interrupt()
    let_waiting_threads_sleep()

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from filelock import FileLock
from torch.utils.data import DataLoader

from hfclip import HFCLIPModel, HFCLIPProcessor
from hfclip.evaluation import Result

from . import optim, parallel
from .data.batches import Collate, PairDataset, build_loader, largest_batch, open_data
from .data.loading import Batches, raise_if_a_reader_is_killed
from .defaults import fill_numbers, keep_numbers
from .evaluation import Evaluator
from .machine import build_accelerator, check_settings, num_workers, on_main_process
from .model import adapt_to_device, build_architecture, build_model, build_processor, describe, resumed_from
from .objectives import build_objective
from .phases import build_phases
from .report.publish import check_token, example_labels, print_summary, publish, write_card
from .report.timing import Stopwatch, trace
from .report.tracking import Tracking, check_trackers
from .state.heartbeat import Heartbeat
from .state.stopping import Stopping
from .step import TrainingStep, build_step, num_micro_batches


MAX_SILENCE = 45.0  # seconds without a sign of life from any process, after which all of them end
MAX_BAD_STEPS = 20  # in a row with a non-finite loss or gradient, which end the run; each is skipped
SECONDS_BETWEEN_LOOKS = 1.0  # for signals and the deadline, while a step waits for its batch
SECONDS_TO_SAY_SO = 60  # that it waits


@dataclass(slots=True)
class Run:
    """All that a run consists of."""

    config: Config
    accelerator: Accelerator
    step: TrainingStep
    processor: HFCLIPProcessor
    loader: DataLoader
    evaluator: Evaluator
    tracking: Tracking
    stopping: Stopping
    lock: FileLock | None  # of the run's folder, held by the main process
    start: int
    stop: int
    saved: int  # step of the newest checkpoint
    whole_at: int | None = None  # step whose weights, moments and all else are there; None while one is under way
    lost: list[str] = field(default_factory=list)  # what is gone of the data since the run began

    @property
    def core(self) -> HFCLIPModel:
        """The model itself, its weights split if `run.shard_weights` says so."""
        return self.step.core

    @property
    def folder(self) -> Path:
        return Path(self.config.run.output_dir)

    @property
    def dataset(self) -> PairDataset:
        return self.loader.dataset


@launcher.program
def main() -> None:
    launcher.raise_on_interrupt()
    config, command = read_command_line()
    launcher.prefix()
    sys.argv[1:] = map(redact, sys.argv[1:])  # trackers look at them
    stopping = Stopping(command.stop_after)
    check_trackers(config.run.trackers)
    check_token(config)
    accelerator = build_accelerator(config, command.resume)
    folder, is_main = Path(config.run.output_dir), accelerator.is_main_process
    with (
        Heartbeat(accelerator.process_index, accelerator.num_processes, MAX_SILENCE),
        resuming.undo_if_start_fails(folder, is_main),
    ):
        run = build(config, command.resume, accelerator, stopping)
        with save_on_failure(run):
            done = train(run, command.profile)
        results = finish(run, done)
        accelerator.end_training()
        if run.lock is not None:
            run.lock.release()
    if config.run.push_to_hub and results is not None and is_main:
        publish(config, run.core.config, run.stop, results)


# ---------------------------------------------------------------------------------------------------------------------
# Build: whatever is wrong is found here, before the first step
# ---------------------------------------------------------------------------------------------------------------------


def build(config: Config, resume: str | None, accelerator: Accelerator, stopping: Stopping) -> Run:
    """Opens the data, makes the model and restores what is resumed."""
    folder, main = Path(config.run.output_dir), accelerator.is_main_process
    lock = resuming.lock_run_folder(folder) if main and folder.exists() else None
    resumed, state = on_main_process(accelerator, resuming.find_resumed, folder, resume) or (None, {"step": 0})
    changes = []
    if resumed:
        before = resuming.settings_of(state)
        keep_numbers(config, before)
        changes = resuming.check_settings(before, config)

    origin = resumed_from(config, resumed)
    architecture = build_architecture(origin)
    with accelerator.local_main_process_first():  # one process fetches and indexes, the others find it done
        source = open_data(config.data.train, config.data, config.data.split, architecture.image_size)
    filled = fill_numbers(config, len(source), largest_batch(source))
    check_settings(config, accelerator.num_processes, accelerator.device.type)
    dataset = PairDataset(source, config, architecture.image_size)
    start, stop = state["step"], optim.total_steps(config.optim, dataset.steps_per_epoch)
    resuming.check_data(state, list(dataset.order.lengths), stop)
    architecture, processor = on_main_process(accelerator, build_processor, origin, architecture, source)
    with accelerator.local_main_process_first():
        evaluator = Evaluator(config, accelerator, processor, architecture.image_size)

    core = adapt_to_device(accelerator, build_model(origin, architecture), config)
    step, loader = build_step_and_loader(core, config, accelerator, processor, dataset, start, stop)
    if resumed:
        step.load_state(checkpoint.load_states(resumed))
        changes += resuming.changes_of_processes(core, state.get("num_processes"), accelerator.num_processes)
    if main and lock is None:
        lock = resuming.lock_run_folder(folder)
    counts, trackers = state.get("counts", {}), state.get("trackers", {})
    tracking = Tracking(accelerator, config, start, stop, step.watch, counts, trackers)
    parts = (config, accelerator, step, processor, loader, evaluator, tracking, stopping, lock)
    run = Run(*parts, start=start, stop=stop, saved=start)
    log_run_summary(run, resumed, filled, changes)
    return run


def build_step_and_loader(
    core: HFCLIPModel,
    config: Config,
    accelerator: Accelerator,
    processor: HFCLIPProcessor,
    dataset: PairDataset,
    start: int,
    stop: int,
) -> tuple[TrainingStep, DataLoader]:
    """Builds what a step computes, and the loader of its batches, which share phases and objective."""
    tokenizer = processor.tokenizer
    phases = build_phases(config, core.config, tokenizer, dataset.steps_per_epoch, stop)
    objective = build_objective(config, tokenizer, dataset.source, accelerator.device)
    collate = Collate(
        tokenizer,
        pad_to_max=config.model.compile,
        group=config.data.group_captions,
        sort_by_length=num_micro_batches(config.optim, accelerator.num_processes) > 1,
        targets=objective.targets,
    )
    ranks = {"rank": accelerator.process_index, "num_ranks": accelerator.num_processes}
    step = build_step(
        core,
        config,
        accelerator,
        processor.image_processor,
        objective=objective,
        total_steps=stop,
        watch=Stopwatch(accelerator.device),
        phases=phases,
    )
    return step, build_loader(dataset, collate, config, start=start, stop=stop, **ranks, phases=phases)


def log_run_summary(run: Run, resumed: Path | None, filled: list[str], changes: list[str]) -> None:
    """Says what is going to happen."""
    config, accelerator, say = run.config, run.accelerator, run.tracking.say
    batch, processes, per_epoch = config.optim.batch_size, accelerator.num_processes, run.dataset.steps_per_epoch
    say(describe(run.core))
    say(
        f"{run.stop} steps ({run.stop / per_epoch:.4g} epochs of {per_epoch}) of {batch} pairs, "
        f"{config.run.precision} on {processes} x {accelerator.device.type}, "
        f"{num_workers(config.data.num_workers)} worker(s) each, run folder {run.folder}"
    )
    for line in filled:
        say(line)
    if left_out := run.dataset.source.describe_skipped():
        say(f"Left out of the data: {left_out}")
    if resumed:
        say(f"Going on from {resumed}, step {run.start}")
    for change in changes:
        say(f"WARNING: not as before: {change}")


# ---------------------------------------------------------------------------------------------------------------------
# Train
# ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def save_on_failure(run: Run) -> Iterator[None]:
    """Saves what was done if it can be trusted: no step is under way, and no other process is needed to save."""
    try:
        yield
    except Exception as error:
        if run.accelerator.num_processes == 1 and run.whole_at is not None and run.whole_at > run.saved:
            try:
                save(run, run.whole_at)
                run.tracking.say(f"Saved after step {run.saved}, since the run ends: {error}")
            except Exception as too:  # the first error is the one to be told at the end
                run.tracking.say(f"What was done since step {run.saved} could not be saved: {too}")
        raise


def train(run: Run, num_traced: int = 0) -> int:
    """Runs the steps that are left. Returns the number of steps done, fewer than `run.stop` if it was interrupted."""
    run.stopping.catch_signals()
    per_epoch = run.dataset.steps_per_epoch
    save_every, eval_every = run.config.run.save_every, run.config.eval.every
    traced = (num_traced if run.accelerator.is_main_process else 0, run.folder / "profile", run.tracking.say)
    if 0 < run.start < run.stop and eval_every and run.start % eval_every == 0:
        if not on_main_process(run.accelerator, run.tracking.has_evaluation, run.start):
            evaluate(run, run.start)  # the run was killed between saving and this
    run.tracking.start()
    bad_in_a_row, waiting_since = 0, time.perf_counter()
    with trace(*traced) as step_ended, Batches(run.loader) as batches:
        for step in range(run.start, run.stop):
            batch = next_batch(run, batches, step)
            if batch is None:
                return step
            data_time = time.perf_counter() - waiting_since
            counts = batch.pop("counts")
            run.whole_at = None
            metrics = run.step(batch, step)
            flops = metrics.pop("flops")

            run.whole_at = done = step + 1
            if step == run.start:
                keep_settings(run)
            about = {"epoch": done / per_epoch, "logit_scale": run.core.logit_scale.detach().exp()}
            run.tracking.step(done, metrics | about, data_time, counts, flops)
            bad_in_a_row = bad_in_a_row + 1 if metrics["skipped"] else 0
            if bad_in_a_row >= MAX_BAD_STEPS:
                abort_after_bad_steps(run, done, bad_in_a_row, batch)
            if done < run.stop:
                if save_every and done % save_every == 0:
                    save(run, done)
                if eval_every and done % eval_every == 0:
                    evaluate(run, done)
            with run.tracking.paused():
                step_ended()
            waiting_since = time.perf_counter()
    return run.stop


def next_batch(run: Run, batches: Batches, step: int) -> dict | None:
    """Returns this process's batch of a step once all have theirs; None if the run is to stop, after saving. Collective.

    Whoever still waits for data says so to the others each second: none of them sits in a collective meanwhile, where
    it would hear no signal.

    Raises:
        UsageError: on all processes, if the data of one ended.
    """
    batch, since, is_said = None, time.monotonic(), False
    while True:
        batch = batch or batches.wait(SECONDS_BETWEEN_LOOKS)
        failure = batch and batch.get("failure")
        news = [message for message in (batch or {}).get("lost", ()) if message not in run.lost]
        flags = [run.stopping.requested, failure is not None, batch is None, bool(news)]
        flags = torch.tensor(flags, dtype=torch.int, device=run.accelerator.device)
        interrupted, failed, waiting, told = run.accelerator.reduce(flags, "sum").tolist()
        for message in dict.fromkeys(gather_object(news) if told else ()):  # the same on all processes
            run.lost.append(message)
            run.tracking.say(f"WARNING: {message}: other pairs stand in for its own, and each is counted")
        if interrupted or failed:
            run.tracking.say(f"Stopping after step {step} ...")
            if step > run.saved:
                save(run, step)
            if failed:
                raise UsageError(next(message for message in gather_object([failure]) if message))
            return None
        if not waiting:
            batch.pop("lost", None)
            return batch
        if not is_said and time.monotonic() - since > SECONDS_TO_SAY_SO:
            run.tracking.say(f"Step {step + 1} has waited {SECONDS_TO_SAY_SO} s for data in {waiting} processes ...")
            is_said = True


def abort_after_bad_steps(run: Run, done: int, bad_in_a_row: int, batch: dict[str, torch.Tensor]) -> None:
    """Ends a run whose steps are not finite by a UsageError, after saving its state and the batch at hand."""
    save(run, done)
    path = checkpoint.save_offending_batch(run.folder, done, run.accelerator.process_index, batch)
    raise UsageError(
        f"The loss or the gradient was not finite in {bad_in_a_row} steps in a row, up to step {done}. Those steps "
        f"changed nothing; the weights are saved, and the last batch in {path.parent}. Resume with a lower optim.lr, "
        "optim.max_grad_norm, or run.precision bf16 or fp32."
    )


# ---------------------------------------------------------------------------------------------------------------------
# Save, evaluate, end
# ---------------------------------------------------------------------------------------------------------------------


def keep_settings(run: Run) -> None:
    """Writes config.yaml: from now on the folder holds a run, which others do not begin in."""
    if run.accelerator.is_main_process:
        run.config.save(run.folder / CONFIG_FILE)


def save(run: Run, done: int) -> None:
    """Writes `checkpoint-<done>`. Collective."""
    with run.tracking.paused():
        main = run.accelerator.is_main_process
        states, counts = run.step.state(), run.tracking.total_counts()
        weights = parallel.full_state_dict(run.core, main) if parallel.is_sharded(run.core) else None
        if main:
            metadata = {"config": run.config.record(), "num_processes": run.accelerator.num_processes}
            metadata |= {"samples": list(run.dataset.order.lengths)}
            metadata |= {"counts": counts, "trackers": run.tracking.tracked}
            model, keep = (run.core, run.processor), run.config.run.keep_checkpoints
            checkpoint.save_checkpoint(run.folder, done, *model, states, metadata, keep=keep, state_dict=weights)
            run.tracking.draw()
        run.accelerator.wait_for_everyone()
    run.saved = done


def evaluate(run: Run, done: int) -> dict[str, Result]:
    """Measures the model, or the moving average of its weights where there is one. Collective."""
    if not run.evaluator.measures_anything:
        return {}
    with run.tracking.paused(), measured_model(run) as model:
        return measure(run, done, model)


def measure(run: Run, done: int, model: HFCLIPModel) -> dict[str, Result]:
    with raise_if_a_reader_is_killed():
        results = run.evaluator(model)
    run.tracking.evaluation(done, results)
    return results


@contextmanager
def measured_model(run: Run) -> Iterator[HFCLIPModel]:
    """Gives a whole model on each process, with the moving average for weights where there is one. Collective."""
    with run.step.ema.swapped_in() if run.step.ema else nullcontext():
        if run.accelerator.num_processes > 1:
            for buffer in run.core.buffers():  # BatchNorm's statistics may be those of each process's own pairs
                torch.distributed.broadcast(buffer, src=0)
        yield parallel.replica(run.core) if parallel.is_sharded(run.core) else run.core


def finish(run: Run, done: int) -> dict[str, Result] | None:
    """Saves and evaluates the trained model and says how to use it, or how to go on with an interrupted run.

    Returns what was measured; None for an interrupted run.
    """
    say = run.accelerator.print
    for message in run.lost:
        say(f"WARNING: not all pairs were used: {message}")
    if done < run.stop:
        run.tracking.bar.close()
        keep_settings(run)
        say(f"Stopped after step {done} of {run.stop}. Go on with:\n    {resuming.command(run.config)}")
        return None
    if done > run.saved:
        save(run, done)
    run.core.float()  # text weights that trained in half precision: no number changes
    problems = run.tracking.total_counts()
    with measured_model(run) as model:
        results = measure(run, done, model)
        run.tracking.bar.close()
        if run.accelerator.is_main_process:
            model_folder = run.folder / checkpoint.MODEL_FOLDER
            checkpoint.save_model(model_folder, model, run.processor)
            title = run.folder.resolve().name
            write_card(model_folder, run.config, model.config, run.stop, results, name=".", title=title)
            labels = example_labels(run.evaluator.labelled, run.dataset.source)
            picture = run.evaluator.draw(model, run.folder / "predictions.png")
            run.tracking.draw(is_last=True)
            print_summary(results, problems, model_folder, picture, labels)
    run.accelerator.wait_for_everyone()
    return results


if __name__ == "__main__":
    main()
