"""Trains a CLIP model on pairs of images and captions.

    accelerate launch training/pretrain.py                                      # a demonstration, minutes on a CPU
    accelerate launch training/pretrain.py --config my.yaml --optim.lr 1e-3     # a YAML names a run, flags override it
    accelerate launch training/pretrain.py --config runs/my/config.yaml --resume auto

Read `main`, `build`, `train`, `train_step`, `finish`, in this order. A step is batch, forward, global loss, backward,
clip, AdamW, clamp of the scale. All that a step does follows from the settings, the weights and the step's number.
"""

import ctypes
import math
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path


if not __package__:  # run as a script, Python looks for modules in this folder; they are named from the one above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list, gather_object
from huggingface_hub import EvalResult, get_token
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hfclip import HFCLIPModel, HFCLIPProcessor, __version__, contrastive_loss, sigmoid_loss
from hfclip.hub import HubError, end_on_interrupt, model_card, push
from hfclip.modeling_hfclip import HFCLIPOutput
from training import checkpoint, optim
from training.config import Config, UsageError, parse_arguments
from training.data import Collate, PairDataset, build_loader
from training.evaluation import Evaluator
from training.model import build_architecture, build_model, build_processor, describe, resumed_from, suited_to
from training.sources import open_source
from training.tracking import Tracking, check_trackers


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


@dataclass(kw_only=True, slots=True)
class Run:
    """All that a run consists of. `model` is wrapped for several processes, `core` is the model itself."""

    config: Config
    accelerator: Accelerator
    model: nn.Module
    core: HFCLIPModel
    processor: HFCLIPProcessor
    optimizer: torch.optim.Optimizer
    loader: DataLoader
    evaluator: Evaluator
    tracking: Tracking
    steps_per_epoch: int
    start: int
    stop: int
    interrupted_at: list[float] = field(default_factory=list)
    """When signals to stop arrived, in seconds of `time.monotonic`."""

    @property
    def folder(self) -> Path:
        return Path(self.config.run.output_dir)


def main() -> None:
    try:
        config, resume = parse_arguments(sys.argv[1:])
        run = build(config, resume)
        done = train(run)
        results = finish(run, done)
        run.accelerator.end_training()
        if config.run.push_to_hub and results is not None and run.accelerator.is_main_process:
            publish(run, results)
    except UsageError as error:
        leave(f"error: {error}", status=2)
    except KeyboardInterrupt:
        leave("Stopped at once. Nothing is lost but what came after the last checkpoint.", status=130)


def leave(message: str, status: int) -> None:
    """Ends this process without traceback; the first one of each machine speaks."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"\n{message}", file=sys.stderr, flush=True)
    sys.exit(status)


# ---------------------------------------------------------------------------------------------------------------------
# Build: whatever is wrong is found here, before the first step
# ---------------------------------------------------------------------------------------------------------------------


def build(config: Config, resume: str | None) -> Run:
    """Opens the data, makes the model and restores what is resumed."""
    check_trackers(config.run.trackers)
    if config.run.push_to_hub and os.environ.get("RANK", "0") == "0" and get_token() is None:
        raise UsageError("run.push_to_hub: found no token. Log in with `hf auth login`, or set HF_TOKEN.")
    accelerator = build_accelerator(config)
    folder = Path(config.run.output_dir)
    resumed, state = on_main_process(accelerator, checkpoint.find_resumed, folder, resume) or (None, {"step": 0})
    changes = checkpoint.check_settings(state["config"], config) if resumed else []

    origin = resumed_from(config, resumed)
    architecture = build_architecture(origin)
    with accelerator.local_main_process_first():  # one process fetches and indexes, the others find it done
        source = open_source(config.data.train, config.data, config.data.split, architecture.image_size)
    dataset = PairDataset(source, config, architecture.image_size)
    start, stop = state["step"], optim.total_steps(config.optim, dataset.steps_per_epoch)
    if start > stop:
        raise UsageError(
            f"{resumed} is at step {start}, beyond the {stop} steps of the run. Raise optim.epochs or steps."
        )
    architecture, processor = on_main_process(accelerator, build_processor, origin, architecture, source)
    with accelerator.local_main_process_first():
        evaluator = Evaluator(config, accelerator, processor, architecture.image_size)

    core = suited_to(accelerator, build_model(origin, architecture), config)
    model, optimizer = accelerator.prepare(core, optim.build_optimizer(core, config.optim))
    if resumed:
        checkpoint.restore(resumed, optimizer, accelerator.scaler)

    collate = Collate(processor.tokenizer, pad_to_max=config.model.compile, group=config.data.group_captions)
    rank, num_ranks = accelerator.process_index, accelerator.num_processes
    loader = build_loader(dataset, collate, config, start=start, stop=stop, rank=rank, num_ranks=num_ranks)
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        config.save(folder / "config.yaml")
    run = Run(
        config=config,
        accelerator=accelerator,
        model=model,
        core=core,
        processor=processor,
        optimizer=optimizer,
        loader=loader,
        evaluator=evaluator,
        tracking=Tracking(accelerator, config, start, stop),
        steps_per_epoch=dataset.steps_per_epoch,
        start=start,
        stop=stop,
    )
    introduce(run, source.skipped, resumed, changes)
    return run


def build_accelerator(config: Config) -> Accelerator:
    """Accelerate as the launcher set it up, on the CPU where there is nothing else."""
    precision = config.run.precision
    try:
        accelerator = Accelerator(
            # Not told so, Accelerate leaves each of several processes on a machine without GPU to itself.
            cpu=not torch.accelerator.is_available(),
            mixed_precision="no" if precision == "fp32" else precision,
            log_with=config.run.trackers or None,
            project_dir=config.run.output_dir,
            kwargs_handlers=[
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
                InitProcessGroupKwargs(timeout=timedelta(hours=2)),  # others wait while one fetches the data
            ],
        )
    except ValueError as error:
        raise UsageError(f"run.precision: {error} Use bf16 or fp32.") from error
    if config.optim.batch_size < accelerator.num_processes:
        raise UsageError(
            f"optim.batch_size: found {config.optim.batch_size}, expected a pair for each of "
            f"{accelerator.num_processes} processes at least."
        )
    if accelerator.device.type == "cpu":
        if precision == "fp16":  # Accelerate would say nothing and compute in float32
            raise UsageError("run.precision: fp16 needs a GPU, found none. Use bf16 or fp32.")
        make_the_most_of_the_cpu()
    return accelerator


def make_the_most_of_the_cpu() -> None:
    """All cores for the processes of this machine, and no memory given back to the system between two layers."""
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "LOCAL_WORLD_SIZE" in os.environ
    if launched and os.environ.get("OMP_NUM_THREADS") == "1":  # which launchers set where the user says nothing
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1))
    try:
        mallopt = ctypes.CDLL(None).mallopt  # of glibc; a training step takes about 30 % less time with it
    except (AttributeError, OSError, TypeError):
        return
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(M_MMAP_THRESHOLD, 2**30)


def on_main_process(accelerator: Accelerator, function, *arguments):
    """The result of `function` on the main process, sent to all."""
    result = [function(*arguments) if accelerator.is_main_process else None]
    return broadcast_object_list(result)[0]


def introduce(run: Run, left_out: dict[str, int], resumed: Path | None, changes: list[str]) -> None:
    """Says what is going to happen."""
    config, accelerator, say = run.config, run.accelerator, run.tracking.say
    batch, processes = config.optim.batch_size, accelerator.num_processes
    say(describe(run.core))
    say(
        f"{run.stop} steps ({run.stop / run.steps_per_epoch:.4g} epochs of {run.steps_per_epoch}) of {batch} pairs, "
        f"{config.run.precision} on {processes} x {accelerator.device.type}, run folder {run.folder}"
    )
    if left_out:
        say("Left out of the data: " + ", ".join(f"{count} with {kind}" for kind, count in left_out.items()))
    if resumed:
        say(f"Going on from {resumed}, step {run.start}")
    for change in changes:
        say(f"WARNING: not as before: {change}")


# ---------------------------------------------------------------------------------------------------------------------
# Train
# ---------------------------------------------------------------------------------------------------------------------


def train(run: Run) -> int:
    """Runs the steps that are left. Returns how many of the run are done, which is fewer if it was interrupted."""
    catch_signals(run)
    save_every = run.steps_per_epoch if run.config.run.save_every is None else run.config.run.save_every
    eval_every = run.steps_per_epoch if run.config.eval.every is None else run.config.eval.every
    bad_in_a_row, waiting_since = 0, time.perf_counter()
    for step, batch in enumerate(run.loader, run.start):
        data_time = time.perf_counter() - waiting_since
        if is_to_stop(run, step, batch.get("failure")):
            return step
        counts = batch.pop("counts")
        metrics = train_step(run, batch, step)

        done = step + 1
        about = {"epoch": done / run.steps_per_epoch, "logit_scale": run.core.logit_scale.detach().exp()}
        run.tracking.step(done, metrics | about, data_time, counts)
        bad_in_a_row = bad_in_a_row + 1 if metrics["skipped"] else 0
        if bad_in_a_row >= run.config.run.max_bad_steps:
            save(run, done)
            raise UsageError(
                f"The loss or the gradient was not finite in {bad_in_a_row} steps in a row, up to step {done}. Those "
                "steps changed nothing, and the weights are saved. Resume with a lower optim.lr, optim.max_grad_norm, "
                "or run.precision bf16 or fp32."
            )
        if done < run.stop:
            if save_every and done % save_every == 0:
                save(run, done)
            if eval_every and done % eval_every == 0:
                evaluate(run, done)
        waiting_since = time.perf_counter()
    return run.stop


def train_step(run: Run, batch: dict[str, Tensor], step: int) -> dict[str, float]:
    """One update of the weights by the gradient of the global batch's loss."""
    config, accelerator = run.config.optim, run.accelerator
    # Dropout follows from (seed, step, rank): a resumed run needs no random state.
    key = np.random.SeedSequence([run.config.run.seed, step, accelerator.process_index])
    torch.manual_seed(int(key.generate_state(1, np.uint64)[0] >> 1))

    batch = {name: values.to(accelerator.device, non_blocking=True) for name, values in batch.items()}
    buffers = [buffer.clone() for buffer in run.core.buffers()]  # of BatchNorm: small
    pixel_values = normalized(batch["pixel_values"], run.processor.image_processor)
    embeds = run.model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        pixel_values=pixel_values,
        embeds_only=True,
    )
    loss = global_loss(run.core, embeds, batch.get("group_id"))
    accelerator.backward(loss)

    grad_norm = accelerator.clip_grad_norm_(run.model.parameters(), config.max_grad_norm or math.inf)
    # The one moment of a step when the host waits for the device. Every process has the same two numbers here.
    loss, grad_norm = loss.item(), float(grad_norm)
    skipped = not (math.isfinite(loss) and math.isfinite(grad_norm))
    lr = optim.learning_rate(step, run.stop, config)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    if not skipped or accelerator.scaler is not None:  # the scaler skips the update itself, and lowers its scale
        run.optimizer.step()
    run.optimizer.zero_grad()
    with torch.no_grad():
        run.core.logit_scale.clamp_(max=math.log(config.max_logit_scale))
        if skipped:
            for buffer, before in zip(run.core.buffers(), buffers, strict=True):
                buffer.copy_(before)
    return {"loss": loss, "grad_norm": grad_norm, "lr": lr, "skipped": skipped}


def normalized(pixels: Tensor, image_processor) -> Tensor:
    """(batch, 3, height, width) uint8 on the device -> float32 `pixel_values`."""
    mean, std = (
        pixels.new_tensor(v, dtype=torch.float32) for v in (image_processor.image_mean, image_processor.image_std)
    )
    return (pixels.float() / 255 - mean[:, None, None]) / std[:, None, None]


def global_loss(core: HFCLIPModel, embeds: HFCLIPOutput, group_id: Tensor | None) -> Tensor:
    """The loss of the batch of all processes; its gradients, averaged over the processes, are exact."""
    scale = core.logit_scale.exp()
    if core.logit_bias is None:
        return contrastive_loss(embeds.image_embeds, embeds.text_embeds, scale, group_id=group_id)
    return sigmoid_loss(embeds.image_embeds, embeds.text_embeds, scale, core.logit_bias, group_id=group_id)


# ---------------------------------------------------------------------------------------------------------------------
# Save, evaluate, stop
# ---------------------------------------------------------------------------------------------------------------------


def save(run: Run, done: int) -> None:
    with run.tracking.paused():
        if run.accelerator.is_main_process:
            about = {"config": run.config.to_dict(), "num_processes": run.accelerator.num_processes}
            keep, scaler = run.config.run.keep_checkpoints, run.accelerator.scaler
            checkpoint.save_checkpoint(run.folder, done, run.core, run.processor, run.optimizer, scaler, about, keep)
        run.accelerator.wait_for_everyone()


def evaluate(run: Run, done: int) -> dict[str, float]:
    with run.tracking.paused():
        results = run.evaluator(run.core)
    if results:
        run.tracking.write(done, results)
        shown = [f"{name} {value:.1%}" for name, value in results.items() if name.endswith(("top1", "recall@1"))]
        run.tracking.say(f"step {done}: {', '.join(shown)}")
    return results


def catch_signals(run: Run) -> None:
    """Ctrl-C and SIGTERM let the step end; Ctrl-C again, after a moment, does not."""
    owner = os.getpid()

    def handle(number, frame):
        now = time.monotonic()
        if os.getpid() != owner:  # forked workers inherit the handler
            return
        # Launchers pass on a signal that the terminal has sent us too: no second wish to stop.
        if run.interrupted_at and now - run.interrupted_at[0] > 3 and number == signal.SIGINT:
            raise KeyboardInterrupt
        run.interrupted_at.append(now)

    signal.signal(signal.SIGINT, handle)
    signal.signal(signal.SIGTERM, handle)


def is_to_stop(run: Run, step: int, failure: str | None) -> bool:
    """Whether any process was told to stop or has no data, agreed upon by all; saves if so.

    Raises:
        UsageError: on all processes, if the data of one ended.
    """
    flags = torch.tensor(
        [bool(run.interrupted_at), failure is not None], dtype=torch.int, device=run.accelerator.device
    )
    interrupted, failed = run.accelerator.reduce(flags, "sum").tolist()
    if interrupted or failed:
        run.tracking.say(f"Stopping after step {step} ...")
        if step > run.start:
            save(run, step)
    if failed:
        raise UsageError(next(message for message in gather_object([failure]) if message))
    return bool(interrupted)


def finish(run: Run, done: int) -> dict[str, float] | None:
    """Saves and evaluates the trained model and says how to use it, or how to go on with an interrupted run.

    Returns what was measured; None for an interrupted run.
    """
    if done < run.stop:
        run.tracking.bar.close()
        command = f"accelerate launch {sys.argv[0]} --config {run.folder / 'config.yaml'} --resume auto"
        run.accelerator.print(f"Stopped after step {done} of {run.stop}. Go on with:\n    {command}")
        return None
    if done > run.start:
        save(run, done)
    model_folder = run.folder / "model"
    if run.accelerator.is_main_process:
        checkpoint.save_model(model_folder, run.core, run.processor)
    results = evaluate(run, done)
    problems = run.tracking.total_counts()
    run.tracking.bar.close()
    if run.accelerator.is_main_process:
        picture = run.evaluator.draw(run.core, run.folder / "predictions.png")
        print_summary(results, problems, model_folder, picture)
    run.accelerator.wait_for_everyone()
    return results


def print_summary(
    results: dict[str, float], problems: dict[str, int], model_folder: Path, picture: Path | None
) -> None:
    shown = {name: value for name, value in results.items() if name.endswith(("top1", "recall@1", "recall@5"))}
    width = max(map(len, shown), default=0)
    for name, value in shown.items():
        print(f"  {name:<{width}}  {value:>6.1%}")
    for name, count in problems.items():
        print(f"  {name}: {count}")
    print(f"\nThe model is in {model_folder}" + (f", a picture of predictions in {picture}." if picture else "."))
    print(
        "Use it:\n\n"
        "    import hfclip, transformers\n"
        f'    classify = transformers.pipeline("zero-shot-image-classification", "{model_folder}")\n'
        '    classify("picture.png", candidate_labels=["a red circle", "a blue star"])'
    )


def publish(run: Run, results: dict[str, float]) -> None:
    """Pushes the trained model with a card of settings and results. Comes last: no other process waits for it."""
    config, folder, repo_id = run.config, run.folder / "model", run.config.run.push_to_hub
    again = f"{folder} holds the trained model. Publish it:\n    python conversion/push_to_hub.py {folder} {repo_id}"
    end_on_interrupt(f"Stopped. {again}")
    provenance = {
        "Trained with": f"hfclip {__version__}",
        "Steps": run.stop,
        "Pairs a step": config.optim.batch_size,
        "Loss": config.optim.loss,
        "Peak learning rate": config.optim.lr,
        "Precision": config.run.precision,
    }
    try:
        card = model_card(run.core.config, name=repo_id, provenance=provenance, results=as_eval_results(run, results))
        (folder / "README.md").write_text(card, encoding="utf-8")
        push(folder, repo_id)
    except (HubError, ValueError, OSError) as error:
        leave(f"error: {error}\n{again}", status=1)


def as_eval_results(run: Run, results: dict[str, float]) -> list[EvalResult]:
    """What `evaluate` measured, in the form of model cards."""
    names = {"zero_shot": Path(run.config.eval.zero_shot or "").name, "retrieval": "held-out pairs"}
    rows = []
    for key, value in results.items():
        source, metric = key.rsplit("/", 1)
        task = "zero-shot-retrieval" if source == "retrieval" else "zero-shot-image-classification"
        name = names.get(source, source)
        if metric != "unreadable_images":
            rows.append(EvalResult(task, name, name, metric, round(value, 4)))
    return rows


if __name__ == "__main__":
    main()
