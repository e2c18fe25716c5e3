"""One training step: batch -> objective -> gradients -> AdamW -> clamp of the scale.

    plain    embed the batch, loss, one backward pass
    cached   with optim.micro_batch_size below a process's share of the batch: hfclip.grad_cache, the same gradients
    summed   likewise, where the loss of a pair depends on no other: the gradients of micro-batches add up

All that a step does follows from the settings, the weights and the step's number. Processes run the same code on
their own pairs; the loss and the gradient norm are the same two numbers on each of them.
"""

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hfclip import HFCLIPConfig, HFCLIPImageProcessor, HFCLIPModel
from hfclip.errors import UsageError
from hfclip.flops import ModelFlops
from hfclip.grad_cache import cached_backward
from hfclip.packing_hfclip import pooled_positions

from . import optim, parallel
from .config import Config, OptimConfig
from .data.order import rank_slice
from .ema import EMA
from .objectives import Objective
from .phases import Phases
from .report.timing import Stopwatch


MOST_ON_DEVICE = 2 << 30  # bytes of the images of a batch that lie there while it is embedded in micro-batches


@dataclass(kw_only=True, slots=True)
class TrainingStep:
    """Updates the weights by the gradient of the objective on the global batch.

    `model` is wrapped for several processes, `core` is the model itself; `pixel_mean` and `pixel_std` are (3, 1, 1), of
    values 0..1, on the device.
    """

    config: Config
    accelerator: Accelerator
    model: nn.Module
    core: HFCLIPModel
    objective: Objective
    optimizer: torch.optim.Optimizer
    pixel_mean: Tensor
    pixel_std: Tensor
    total_steps: int
    watch: Stopwatch
    phases: Phases
    flops: ModelFlops
    ema: EMA | None = None

    def __call__(self, batch: dict[str, Tensor], step: int) -> dict[str, float]:
        """One step on this process's part of the batch. Collective.

        Returns:
            `loss`, `grad_norm`, `lr`, `skipped`: whether loss or gradient was not finite, so that nothing changed, and
            `flops` that this process's pairs need, None if they are not known.
        """
        self._seed(step)
        buffers = [buffer.clone() for buffer in self.core.buffers()]  # of BatchNorm: small
        dropped = self.phases.at(step).patch_dropout
        with patch_dropout(self.core, dropped):
            loss = self._backward(batch)
        flops = self.flops.of_batch(batch, dropped)  # while the device computes
        with self.watch.time("update"):
            if parallel.is_sharded(self.model):
                parallel.average_scalars(self.core)
            max_norm = self.config.optim.max_grad_norm or math.inf
            grad_norm = self.accelerator.clip_grad_norm_(self.core.parameters(), max_norm)
            loss, grad_norm = loss.item(), float(grad_norm)
            skipped = not (math.isfinite(loss) and math.isfinite(grad_norm))
            lr = optim.learning_rate(step, self.total_steps, self.config.optim)
            self._update(step, lr, skipped, buffers)
        return {"loss": loss, "grad_norm": grad_norm, "lr": lr, "skipped": skipped, "flops": flops}

    def state(self) -> dict[str, dict]:
        """What beside the weights the next steps depend on, whole, on the main process; collective."""
        keep, scaler = self.accelerator.is_main_process, self.accelerator.scaler
        state = {"optimizer": parallel.full_optimizer_state(self.core, self.optimizer, keep)}
        if scaler is not None:
            state["scaler"] = scaler.state_dict()
        if self.ema is not None:
            state["ema"] = parallel.full_tensors(self.ema.state_dict(), keep)
        return state

    def load_state(self, state: dict[str, dict]) -> None:
        """Restores what `state` gave; each process takes its part.

        Raises:
            UsageError: if a moving average is asked for in the middle of a run.
        """
        parallel.load_optimizer_state(self.core, self.optimizer, state["optimizer"])
        if self.accelerator.scaler is not None and "scaler" in state:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            if "ema" not in state:
                raise UsageError("optim.ema_decay: the checkpoint has no moving average. Set it to null.")
            self.ema.load_state_dict(state["ema"])

    def _seed(self, step: int) -> None:
        """Dropout follows from (seed, step, rank): a resumed run needs no random state."""
        key = np.random.SeedSequence([self.config.run.seed, step, self.accelerator.process_index])
        torch.manual_seed(int(key.generate_state(1, np.uint64)[0] >> 1))

    def _backward(self, batch: dict[str, Tensor]) -> Tensor:
        """The loss; the gradients of all weights are in their `grad` then.

        What depends on the texts' lengths is decided here, on the host, where they are known: it then queues the work of
        all micro-batches without waiting for the device.
        """
        count = num_micro_batches(self.config.optim, self.accelerator.num_processes)
        # A compiled graph is for one length; lengths given as numbers would make one for each batch.
        lengths = None if self.config.model.compile else text_lengths(batch, self.core.config)
        on_device = {
            name: values if waits_on_host(values) else self._on_device(values) for name, values in batch.items()
        }
        parts = split({**on_device, "text_lengths": lengths}, count)
        scalars = [getattr(self.core, name) for name in self.objective.scalars]
        if not self.objective.couples_pairs:
            return self._summed_backward(parts, scalars)
        loss = partial(self._loss, inputs=self.objective.loss_inputs(parts))
        if count == 1:
            value = loss(*self._embed(parts[0]), *scalars)
            with self.watch.time("backward"):
                self.accelerator.backward(value)
            return value.detach()
        # What is inside and has a name of its own (both forward passes, the loss) does not count as backward.
        with self.watch.time("backward"):
            return cached_backward(
                self._embed,
                parts,
                loss,
                scalars,
                buffers=list(self.core.buffers()),
                weights=self.core.parameters(),
                no_sync=partial(parallel.no_sync, self.model),
                first_pass=self.accelerator.autocast,
                backward=self.accelerator.backward,
            )

    def _on_device(self, values: Tensor) -> Tensor:
        return values.to(self.accelerator.device, non_blocking=True)

    def _summed_backward(self, parts: list[dict], scalars: list[Tensor]) -> Tensor:
        """Backward of a loss that is a mean over pairs: gradients summed over parts, then averaged over processes."""
        total = 0.0
        for part in parts:
            with nullcontext() if part is parts[-1] else parallel.no_sync(self.model):
                # The mean over processes then counts each pair once.
                share = len(part["pixel_values"]) * self.accelerator.num_processes / self.config.optim.batch_size
                inputs = self.objective.loss_inputs([part])
                value = share * self._loss(*self._embed(part), *scalars, inputs=inputs)
                with self.watch.time("backward"):
                    self.accelerator.backward(value)
            total = total + value.detach()
        return self.accelerator.reduce(total, "mean")

    def _embed(self, part: dict) -> tuple[Tensor, ...]:
        inputs = {name: self._on_device(v) if isinstance(v, Tensor) else v for name, v in part.items()}
        with self.watch.time("forward"), self.accelerator.autocast():
            inputs["pixel_values"] = normalized(inputs["pixel_values"], self.pixel_mean, self.pixel_std)
            return self.objective.embed(self.model, inputs)

    def _loss(self, *tensors: Tensor, inputs: dict) -> Tensor:
        """The objective's loss of embeddings, followed by its scalars."""
        first = len(tensors) - len(self.objective.scalars)
        scalars = dict(zip(self.objective.scalars, tensors[first:], strict=True))
        with self.watch.time("loss"):
            return self.objective.loss(tensors[:first], scalars, inputs)

    def _update(self, step: int, lr: float, skipped: bool, buffers: list[Tensor]) -> None:
        """AdamW and the clamp; or, for a step that is skipped, all as it was."""
        optim.apply_learning_rate(self.optimizer, lr)
        # A gradient scaler skips the update itself, and lowers its scale.
        if not skipped or self.accelerator.scaler is not None:
            self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            if "logit_scale" in self.objective.scalars:
                self.core.logit_scale.clamp_(max=math.log(self.config.optim.max_logit_scale))
            if skipped:
                for buffer, before in zip(self.core.buffers(), buffers, strict=True):
                    buffer.copy_(before)
        if self.ema is not None and not skipped:
            self.ema.update(step)


def build_step(
    core: HFCLIPModel, config: Config, accelerator: Accelerator, image_processor: HFCLIPImageProcessor, **others
) -> TrainingStep:
    """The step of a model that is ready to train: wrapped for several processes or split over them, with AdamW.

    Args:
        others: the fields of `TrainingStep` that are not made here.
    """
    _check_batch_norm(core, config.optim, accelerator.num_processes)
    model = parallel.shard(core, accelerator) if config.run.shard_weights else accelerator.prepare(core)
    optimizer = optim.build_optimizer(core, config.optim, config.run.seed)
    return TrainingStep(
        config=config,
        accelerator=accelerator,
        model=model,
        core=core,
        optimizer=accelerator.prepare(optimizer),
        **pixel_statistics(image_processor, accelerator.device),
        flops=ModelFlops(core.config, config.model.freeze),
        ema=None if config.optim.ema_decay is None else EMA(core, config.optim.ema_decay),
        **others,
    )


@contextmanager
def patch_dropout(core: HFCLIPModel, share: float) -> Iterator[None]:
    """The image tower drops this share of its patches, in training, inside of a `with` block."""
    config = core.vision_model.config
    before = getattr(config, "patch_dropout", 0.0)
    if share != before:
        config.patch_dropout = share
    try:
        yield
    finally:
        if share != before:
            config.patch_dropout = before


def _check_batch_norm(core: HFCLIPModel, config: OptimConfig, num_ranks: int) -> None:
    """Raises UsageError where BatchNorm would see one pair at a time, whose statistics are those of no batch."""
    norms = [module for module in core.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    smallest = config.batch_size // num_ranks // num_micro_batches(config, num_ranks)
    if smallest < 2 and norms and not isinstance(norms[0], nn.SyncBatchNorm):
        raise UsageError(
            f"optim.micro_batch_size, optim.batch_size: they leave BatchNorm {smallest} pair at a time, expected at least "
            "2, and better many more. Raise them."
        )


def num_micro_batches(config: OptimConfig, num_ranks: int) -> int:
    """Micro-batches of a step: as many on each process, none above optim.micro_batch_size, none empty."""
    shares = [len(rank_slice(config.batch_size, rank, num_ranks)) for rank in range(num_ranks)]
    size = config.micro_batch_size or max(shares)
    return min(math.ceil(max(shares) / size), min(shares))


def text_lengths(batch: dict[str, Tensor], config: HFCLIPConfig) -> list[int] | None:
    """Tokens of each text of a batch on the host that the text tower reads; None for texts padded on the left."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    if not mask[:, 0].all():
        return None
    if config.packs_texts:
        return (1 + pooled_positions(ids, mask, config.text_config.eos_token_id)).tolist()
    return mask.sum(dim=1).tolist()


def waits_on_host(values: Tensor) -> bool:
    """Whether a tensor of the batch is too large to lie on the device beside a micro-batch: very many images."""
    return values.nbytes > MOST_ON_DEVICE


def split(batch: dict, count: int) -> list[dict]:
    """`count` parts of a batch, as views: nothing is copied.

    With the batch's `text_lengths`, a list, the texts of each part are cut at its longest, and it has theirs: so no
    device is waited for.
    """
    tensors = {name: values for name, values in batch.items() if name != "text_lengths"}
    parts = [
        dict(zip(tensors, values, strict=True))
        for values in zip(*(values.tensor_split(count) for values in tensors.values()), strict=True)
    ]
    if batch.get("text_lengths"):
        lengths = iter(batch["text_lengths"])
        for part in parts:
            part["text_lengths"] = list(itertools.islice(lengths, len(part["input_ids"])))
            part |= {name: part[name][:, : max(part["text_lengths"])] for name in ("input_ids", "attention_mask")}
    return parts


def pixel_statistics(image_processor: HFCLIPImageProcessor, device: torch.device) -> dict[str, Tensor]:
    """`pixel_mean` and `pixel_std`, (3, 1, 1) in float32, made once: each copy to a device makes the host wait."""
    values = {"pixel_mean": image_processor.image_mean, "pixel_std": image_processor.image_std}
    return {name: torch.tensor(value, device=device)[:, None, None] for name, value in values.items()}


def normalized(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(batch, 3, height, width) uint8 on the device -> float32 `pixel_values`."""
    return (pixels.float() / 255 - mean) / std
