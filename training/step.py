"""One training step: batch -> towers -> global loss -> gradients -> AdamW -> clamp of the scale.

    plain    embed the batch, loss, one backward pass
    cached   with optim.micro_batch_size below a process's share of the batch: hfclip.grad_cache, the same gradients

All that a step does follows from the settings, the weights and the step's number. Processes run the same code on
their own pairs; the loss and the gradient norm are the same two numbers on each of them.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hfclip import HFCLIPImageProcessor, HFCLIPModel, contrastive_loss, sigmoid_loss
from hfclip.grad_cache import cached_backward

from . import optim, parallel
from .config import Config, OptimConfig, UsageError
from .data import rank_slice
from .distillation import Teacher, distillation_loss
from .ema import EMA
from .flops import batch_flops
from .phases import Phases
from .timing import Stopwatch


@dataclass(kw_only=True, slots=True)
class TrainingStep:
    """Updates the weights by the gradient of the global batch's loss.

    `model` is wrapped for several processes, `core` is the model itself; `teacher_scale` is the teacher's factor on
    cosines, and `teacher` embeds live, or is None where the batch brings stored embeddings.
    """

    config: Config
    accelerator: Accelerator
    model: nn.Module
    core: HFCLIPModel
    optimizer: torch.optim.Optimizer
    image_processor: HFCLIPImageProcessor
    total_steps: int
    watch: Stopwatch
    phases: Phases
    ema: EMA | None = None
    teacher: Teacher | None = None
    teacher_scale: float | None = None

    def __call__(self, batch: dict[str, Tensor], step: int) -> dict[str, float]:
        """One step on this process's part of the batch. Collective.

        Returns:
            `loss`, `grad_norm`, `lr`, `skipped`: whether loss or gradient was not finite, so that nothing changed, and
            `flops` that this process's pairs need, None if they are not known.
        """
        self._seed(step)
        buffers = [buffer.clone() for buffer in self.core.buffers()]  # of BatchNorm: small
        with patch_dropout(self.core, self.phases.at(step).patch_dropout):
            flops = batch_flops(self.core.config, batch, freeze=self.config.model.freeze)
            batch = {name: values.to(self.accelerator.device, non_blocking=True) for name, values in batch.items()}
            loss = self._backward(batch)
        with self.watch.time("update"):
            if parallel.is_sharded(self.model):
                parallel.average_scalars(self.core)
            max_norm = self.config.optim.max_grad_norm or math.inf
            grad_norm = self.accelerator.clip_grad_norm_(self.core.parameters(), max_norm)
            # The one moment of a step when the host waits for the device.
            loss, grad_norm = loss.item(), float(grad_norm)
            skipped = not (math.isfinite(loss) and math.isfinite(grad_norm))
            lr = optim.learning_rate(step, self.total_steps, self.config.optim)
            self._update(step, lr, skipped, buffers)
        return {"loss": loss, "grad_norm": grad_norm, "lr": lr, "skipped": skipped, "flops": flops}

    def state(self) -> dict[str, dict]:
        """What beside the weights the next steps depend on, whole, on the main process; collective."""
        keep, scaler = self.accelerator.is_main_process, self.accelerator.scaler
        state = {"optimizer": parallel.whole_optimizer_state(self.core, self.optimizer, keep)}
        if scaler is not None:
            state["scaler"] = scaler.state_dict()
        if self.ema is not None:
            state["ema"] = {name: parallel.whole(value).cpu() for name, value in self.ema.state_dict().items()}
        return state

    def load_state(self, state: dict[str, dict]) -> None:
        """Puts back what `state` gave; each process takes its part.

        Raises:
            UsageError: if a moving average is asked for in the middle of a run.
        """
        parallel.load_optimizer_state(self.core, self.optimizer, state["optimizer"])
        if self.accelerator.scaler is not None and "scaler" in state:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            if "ema" not in state:
                raise UsageError("optim.ema_decay: the checkpoint has no moving average. Set it to null.")
            own = self.ema.state_dict()
            self.ema.load_state_dict({n: parallel.part_of(v, own.get(n, v)) for n, v in state["ema"].items()})

    def _seed(self, step: int) -> None:
        """Dropout follows from (seed, step, rank): a resumed run needs no random state."""
        key = np.random.SeedSequence([self.config.run.seed, step, self.accelerator.process_index])
        torch.manual_seed(int(key.generate_state(1, np.uint64)[0] >> 1))

    def _backward(self, batch: dict[str, Tensor]) -> Tensor:
        """The loss; the gradients of all weights are in their `grad` then."""
        count = num_micro_batches(self.config.optim, self.accelerator.num_processes)
        loss = partial(self._loss, group_id=batch.pop("group_id", None), teacher=self._teacher_embeds(batch, count))
        parameters = parallel.scalars(self.core)
        if count == 1:
            value = loss(*self._embed(batch), *parameters)
            with self.watch.time("backward"):
                self.accelerator.backward(value)
            return value.detach()
        # What is inside and has a name of its own (both forward passes, the loss) does not count as backward.
        with self.watch.time("backward"):
            return cached_backward(
                self._embed,
                split(batch, count),
                loss,
                parameters,
                buffers=list(self.core.buffers()),
                no_sync=partial(parallel.no_sync, self.model),
                first_pass=self.accelerator.autocast,
                backward=self.accelerator.backward,
            )

    def _embed(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Pixels, ids and mask -> unit embeddings (size, dim) of images and texts."""
        with self.watch.time("forward"), self.accelerator.autocast():
            output = self.model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                pixel_values=normalized(batch["pixel_values"], self.image_processor),
                embeds_only=True,
            )
        # Under autocast in half precision; the loss, and the gradients that the cache keeps, are not.
        images, texts = output.image_embeds, output.text_embeds
        dtype = torch.promote_types(images.dtype, torch.float32)
        return images.to(dtype), texts.to(dtype)

    def _loss(
        self,
        images: Tensor,
        texts: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        *,
        group_id: Tensor | None,
        teacher: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """The loss of the batch of all processes; its gradients, averaged over the processes, are exact."""
        with self.watch.time("loss"):
            scale, how = logit_scale.exp(), {"group_id": group_id, "exchange": self.config.optim.exchange}
            if logit_bias is None:
                value = contrastive_loss(images, texts, scale, **how)
            else:
                value = sigmoid_loss(images, texts, scale, logit_bias, **how)
            if teacher is None:
                return value
            weight = self.config.distill.weight
            return (1 - weight) * value + weight * distillation_loss(
                images, texts, scale, *teacher, self.teacher_scale
            )

    def _teacher_embeds(self, batch: dict[str, Tensor], count: int) -> tuple[Tensor, Tensor] | None:
        if self.teacher_scale is None:
            return None
        if self.teacher is None:
            return batch.pop("teacher_image_embeds"), batch.pop("teacher_text_embeds")
        parts = [
            self.teacher.embed(part["pixel_values"], part["input_ids"], part["attention_mask"])
            for part in split(batch, count)
        ]
        images, texts = (torch.cat(embeds) for embeds in zip(*parts, strict=True))
        return images, texts

    def _update(self, step: int, lr: float, skipped: bool, buffers: list[Tensor]) -> None:
        """AdamW and the clamp; or, for a step that is skipped, all as it was."""
        optim.apply_learning_rate(self.optimizer, lr)
        # A gradient scaler skips the update itself, and lowers its scale.
        if not skipped or self.accelerator.scaler is not None:
            self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            self.core.logit_scale.clamp_(max=math.log(self.config.optim.max_logit_scale))
            if skipped:
                for buffer, before in zip(self.core.buffers(), buffers, strict=True):
                    buffer.copy_(before)
        if self.ema is not None and not skipped:
            self.ema.update(step)


def build_step(core: HFCLIPModel, config: Config, accelerator: Accelerator, **others) -> TrainingStep:
    """The step of a model that is ready to train: wrapped for several processes or split over them, with AdamW.

    Args:
        others: the fields of `TrainingStep` that are not made here.
    """
    model = parallel.shard(core, accelerator) if config.run.shard_weights else accelerator.prepare(core)
    optimizer = optim.build_optimizer(core, config.optim, config.run.seed)
    return TrainingStep(
        config=config,
        accelerator=accelerator,
        model=model,
        core=core,
        optimizer=accelerator.prepare(optimizer),
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


def num_micro_batches(config: OptimConfig, num_ranks: int) -> int:
    """Micro-batches of a step: as many on each process, none above optim.micro_batch_size, none empty."""
    shares = [len(rank_slice(config.batch_size, rank, num_ranks)) for rank in range(num_ranks)]
    size = config.micro_batch_size or max(shares)
    return min(math.ceil(max(shares) / size), min(shares))


def split(batch: dict[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """`count` parts of a batch, their captions padded to the longest of each."""
    parts = [
        dict(zip(batch, values, strict=True))
        for values in zip(*(values.tensor_split(count) for values in batch.values()), strict=True)
    ]
    return [_trimmed(part) for part in parts] if count > 1 else parts


def _trimmed(part: dict[str, Tensor]) -> dict[str, Tensor]:
    longest = int(part["attention_mask"].sum(dim=1).max())
    return {**part, **{name: part[name][:, :longest] for name in ("input_ids", "attention_mask")}}


def normalized(pixels: Tensor, image_processor: HFCLIPImageProcessor) -> Tensor:
    """(batch, 3, height, width) uint8 on the device -> float32 `pixel_values`."""
    mean, std = (
        pixels.new_tensor(v, dtype=torch.float32) for v in (image_processor.image_mean, image_processor.image_std)
    )
    return (pixels.float() / 255 - mean[:, None, None]) / std[:, None, None]
