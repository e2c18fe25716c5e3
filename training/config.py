"""What a run is: its settings, typed and checked. `command.py` reads them from a YAML file and the command line.

A number that is null here follows the data and the model (`defaults.py`). Everything wrong with a run's settings is a
`UsageError` that names the setting, what was found and what was expected.
"""

import dataclasses
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from huggingface_hub.utils import HFValidationError, validate_repo_id

from hfclip_errors import MASK, UsageError, redact

from .typed import build, require


# Settings that name what lies somewhere: a file, a folder or a URL, some of them also something on the Hub.
PATHS = (
    "model.config",
    "model.checkpoint",
    "model.tokenizer",
    "data.train",
    "distill.teacher",
    "distill.embeddings",
    "run.output_dir",
    "eval.zero_shot",
    "eval.retrieval",
)
NO_PATHS = ("scenes", "train")  # words with a meaning of their own
CONFIG_FILE = "config.yaml"


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """Which model is trained. Exactly one of preset, config and checkpoint names it."""

    preset: str | None = None
    """A published architecture from scratch: "RN50" ... "RN50x64", "ViT-B/32", "ViT-B/16", "ViT-L/14"."""
    config: str | dict[str, Any] | None = None
    """Any architecture from scratch: a JSON or YAML file of `HFCLIPConfig`, or the mapping itself."""
    checkpoint: str | None = None
    """Weights to continue from: an hfclip or transformers CLIP folder, or its name on the Hub."""
    freeze: Literal["none", "vision", "text"] = "none"
    """A tower that keeps its weights and stays in eval mode ("vision" is LiT)."""
    tokenizer: str | None = None
    """null: the checkpoint's own. "train": a BPE trained on this run's captions. Else OpenAI's merges file (.txt.gz),
    or a folder or Hub name with a tokenizer."""
    vocab_size: int = 8192
    """Entries, at most, of a tokenizer that is trained."""
    patch_dropout: float | None = None
    """Share of ViT patches dropped in training, 0 to below 1 (FLIP). null: as the model's config says."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """Compile the model with torch.compile; captions are then padded to the full context length."""

    def __post_init__(self):
        origins = [name for name in ("preset", "config", "checkpoint") if getattr(self, name) is not None]
        if len(origins) != 1:
            raise UsageError(
                f"model: {' and '.join(origins) or 'nothing'} names the model, expected exactly one of preset, config and "
                "checkpoint. `--model.config null` unsets one."
            )
        if self.tokenizer is None and (self.preset is not None or self.config is not None):
            raise UsageError(
                'model.tokenizer: found null, but a model from scratch has none. Set it to "train", to OpenAI\'s '
                "merges file (bpe_simple_vocab_16e6.txt.gz) or to a folder or Hub name with a tokenizer."
            )
        require(self.vocab_size >= 514, "model.vocab_size", self.vocab_size, "at least 514 (512 bytes, start, end)")
        dropout = self.patch_dropout
        require(dropout is None or 0 <= dropout < 1, "model.patch_dropout", dropout, "null or 0 <= value < 1")


@dataclass(kw_only=True, slots=True)
class PhaseConfig:
    """A part of the run that is cheaper than the full model. null: as the model has it."""

    epochs: float
    image_size: int | None = None
    text_length: int | None = None
    patch_dropout: float | None = None

    def check(self, name: str) -> None:
        """Raises UsageError for what no model can have; `phases.py` compares with this one."""
        size, length, dropout = self.image_size, self.text_length, self.patch_dropout
        require(0 < self.epochs < math.inf, f"{name}.epochs", self.epochs, "a number above 0")
        require(size is None or size > 0, f"{name}.image_size", size, "null or pixels above 0")
        require(
            length is None or length >= 3, f"{name}.text_length", length, "null or at least 3: start, a token, end"
        )
        require(dropout is None or 0 <= dropout < 1, f"{name}.patch_dropout", dropout, "null or 0 <= value < 1")


@dataclass(kw_only=True, slots=True)
class AugmentConfig:
    """Random changes of training images. Without any, the paper's: a random square of the resized image."""

    scale: list[float] | None = None
    """Least and most share of an image's area that is seen, e.g. [0.9, 1.0]. null: the paper's square crop."""
    ratio: list[float] = field(default_factory=lambda: [3 / 4, 4 / 3])
    """Least and most width per height of that part, which is resized to the square."""
    rotation: float = 0.0
    """Most degrees that an image is turned, either way. Corners take the mean color of its border."""
    flip_prob: float = 0.0
    """Share of images that are mirrored, left and right."""
    sketch_prob: float = 0.0
    """Share of images that become a drawing: dark where a pixel is darker than those around it, else white."""
    color_jitter: list[float] | None = None
    """Most change of brightness, contrast, saturation and hue, e.g. [0.4, 0.4, 0.4, 0.1], as in torchvision."""
    color_jitter_prob: float = 0.8
    """Share of images whose colors change."""
    gray_scale_prob: float = 0.0
    """Share of images that become grey."""

    def __post_init__(self):
        for name, least, most in (("scale", 0, 1), ("ratio", 0, math.inf)):
            value, expected = getattr(self, name), f"two numbers in order, above {least} and up to {most}"
            fits = value is None or (len(value) == 2 and least < value[0] <= value[1] <= most)
            require(fits, f"data.augment.{name}", value, expected)
        require(0 <= self.rotation <= 180, "data.augment.rotation", self.rotation, "0 to 180 degrees")
        jitter = self.color_jitter
        fits = jitter is None or (len(jitter) == 4 and min(jitter) >= 0 and max(jitter[:3]) <= 1 and jitter[3] <= 0.5)
        require(fits, "data.augment.color_jitter", jitter, "four numbers: three in 0 to 1, and a hue in 0 to 0.5")
        for name in ("flip_prob", "sketch_prob", "color_jitter_prob", "gray_scale_prob"):
            require(0 <= getattr(self, name) <= 1, f"data.augment.{name}", getattr(self, name), "a share in 0 to 1")


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """The pairs to learn from, and how they are read."""

    train: str | dict[str, float] = "scenes"
    """The built-in "scenes"; WebDataset tars (`{0..7}.tar`, glob, folder; local, hf://, https://, s3://; several joined
    by `::`); images with texts beside them or metadata, class folders; csv, tsv, jsonl, parquet and zip files; or a data
    set's name on the Hub (docs/data.md). A mapping of such names to weights mixes them: each fills its share of every
    batch, and an epoch is as many pairs as all have together."""
    split: str = "train"
    """Split of a data set that `datasets` loads."""
    image_key: str | None = None
    """Column of the images in a table, or of their paths. null: "image", "filepath" or another usual name."""
    caption_key: str | None = None
    """Column, or key of .json members, of the captions (one or a list). null: .txt files, else the usual names."""
    max_samples: int | None = None
    """Use this number of samples at most, the first ones. null: all (50,000 built-in scenes)."""
    group_captions: bool = False
    """Pairs with the same caption are positives of each other, not negatives. (Where equal texts have equal embeddings,
    without dropout in the text tower, the contrastive loss and its gradient are the same either way.)"""
    num_workers: int | None = None
    """Processes per rank that read and decode. null: as many as the machine has cores for, divided among its ranks: all
    but one beside a GPU, a quarter where the CPU trains. 0: none, in the training process itself."""
    disk: float | None = None
    """Gigabytes of the remote tars of `train` that a machine keeps at a time; the rest are fetched while the run goes on.
    `python -m hfclip.training.index` must have counted them once. null: all are fetched before the run."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Random changes of images beyond the paper's crop: a mapping of `scale`, `rotation`, `flip_prob`, `color_jitter` and
    others (docs/training.md); null: none. They pay on small data, and for styles that are not in it."""
    phases: list[PhaseConfig] = field(default_factory=list)
    """Cheaper parts of the run that come before the full resolution (CLIPA, FLIP), each a mapping of `epochs` and of
    some of `image_size`, `text_length`, `patch_dropout`."""

    def __post_init__(self):
        require(bool(self.train), "data.train", self.train, "a path, a URL, a name on the Hub or 'scenes'")
        samples = self.max_samples
        require(samples is None or samples >= 1, "data.max_samples", samples, "null or at least 1")
        workers = self.num_workers
        require(workers is None or workers >= 0, "data.num_workers", workers, "null or 0 or more")
        disk = self.disk
        require(disk is None or 0 < disk < math.inf, "data.disk", disk, "null or above 0, in gigabytes")
        for i, phase in enumerate(self.phases):
            phase.check(f"data.phases[{i}]")


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """The objective, the batch and AdamW. Defaults are the paper's (Radford et al. 2021, tables 18 and 19)."""

    loss: str = "contrastive"
    """One of `hfclip.losses.LOSSES`: "contrastive", CLIP's symmetric cross-entropy, or "sigmoid", SigLIP's loss. They see
    the global batch."""
    batch_size: int | None = None
    """Pairs per step over all processes together (the paper: 32,768). null: 256, or as many as there are."""
    micro_batch_size: int | None = None
    """Pairs that a process embeds at a time. Fewer than its share of the batch: the towers run twice and the memory is
    that of so few pairs, with the gradient of the whole batch (gradient cache). null: all at once."""
    exchange: Literal["gather", "ring"] = "gather"
    """How processes see each other's embeddings: all at once, or passed round, never held together."""
    epochs: float | None = None
    """Passes over the data; each drops the last incomplete batch. null: 32, or 5 from a checkpoint; for little data as
    many as make 100 steps."""
    steps: int | None = None
    """Length of the run in optimizer steps instead of epochs."""
    lr: float | None = None
    """Peak learning rate. null: 5e-4, or 1e-5 from a checkpoint."""
    warmup_steps: int | None = None
    """Steps of linear warm-up; a cosine down to zero follows. null: a tenth of the run, 2,000 at most."""
    weight_decay: float = 0.2
    """Decoupled weight decay of matrices and embeddings; gains, biases and scalars have none."""
    beta2: float | None = None
    """Decay of the second moment. null: 0.98 for transformers, 0.999 for the ResNets."""
    eps: float | None = None
    """Adam's epsilon. null: 1e-6 for transformers, 1e-8 for the ResNets."""
    layer_decay: float = 1.0
    """Each block of a tower learns at this multiple of the rate of the block above it. 1: all at the same rate."""
    bfloat16: list[Literal["moments", "text_weights"]] = field(default_factory=list)
    """What is kept in half of float32's memory, rounded stochastically (the paper's memory savers): AdamW's "moments", the
    "text_weights" of the text tower, both, or nothing."""
    ema_decay: float | None = None
    """Keeps a moving average of the weights with this decay per step. It is what evaluations measure and what the final
    model is; checkpoints hold both. null: none."""
    max_grad_norm: float | None = None
    """Gradients are scaled down to this norm. null: not."""
    max_logit_scale: float = 100.0
    """exp(logit_scale) is clamped to this after each step."""

    def __post_init__(self):
        batch, micro = self.batch_size, self.micro_batch_size
        require(batch is None or batch >= 2, "optim.batch_size", batch, "at least 2: one pair has no negatives")
        require(micro is None or micro >= 1, "optim.micro_batch_size", micro, "null or at least 1")
        epochs, lr, warmup = self.epochs, self.lr, self.warmup_steps
        require(epochs is None or 0 < epochs < math.inf, "optim.epochs", epochs, "null or above 0")
        require(0 < self.layer_decay <= 1, "optim.layer_decay", self.layer_decay, "above 0, at most 1")
        ema = self.ema_decay
        require(ema is None or 0 < ema < 1, "optim.ema_decay", ema, "null or between 0 and 1")
        require(self.steps is None or self.steps >= 1, "optim.steps", self.steps, "null or at least 1")
        require(lr is None or 0 < lr < math.inf, "optim.lr", lr, "null or above 0")
        require(warmup is None or warmup >= 0, "optim.warmup_steps", warmup, "null or 0 or more")
        require(0 <= self.weight_decay < math.inf, "optim.weight_decay", self.weight_decay, "0 or more")
        require(self.beta2 is None or 0 < self.beta2 < 1, "optim.beta2", self.beta2, "null or between 0 and 1")
        require(self.eps is None or 0 < self.eps < math.inf, "optim.eps", self.eps, "null or above 0")
        norm = self.max_grad_norm
        require(norm is None or 0 < norm < math.inf, "optim.max_grad_norm", norm, "null or above 0")
        require(1 <= self.max_logit_scale < math.inf, "optim.max_logit_scale", self.max_logit_scale, "at least 1")


@dataclass(kw_only=True, slots=True)
class DistillConfig:
    """A trained CLIP as teacher: the student's similarities learn to follow the teacher's (arXiv:2311.17049)."""

    teacher: str | None = None
    """An hfclip or transformers CLIP folder or Hub name, run beside the student. null: none."""
    embeddings: str | None = None
    """Stored embeddings of the teacher instead, made by `hfclip embed` for data.train. null: none."""
    weight: float = 1.0
    """Share of the loss that follows the teacher, 0 to 1; the rest is optim.loss."""

    def __post_init__(self):
        if self.teacher is not None and self.embeddings is not None:
            raise UsageError("distill: teacher and embeddings are both set, expected one of them. Unset the other.")
        require(0 <= self.weight <= 1, "distill.weight", self.weight, "0 to 1")
        if self.weight != 1 and self.teacher is None and self.embeddings is None:
            raise UsageError("distill.weight is set without a teacher. Set distill.teacher or distill.embeddings too.")


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """Where the run is kept, how it computes and what it reports."""

    output_dir: str = "runs/clip"
    """The run's folder: config.yaml, metrics.jsonl, checkpoint-<step>/ and, at the end, model/. That of a config.yaml
    which lies in a run's folder is this folder, wherever it was moved."""
    seed: int = 0
    """Initial weights, order of the data, crops, choice of captions and dropout follow from it."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Of the computation. auto: bf16 where the device has it in hardware, else fp32; a resumed run keeps its own. Weights and optimizer state are float32, but for optim.bfloat16."""
    log_every: int | None = None
    """Steps between lines of metrics.jsonl. null: 20, or fewer for twenty lines."""
    save_every: int | None = None
    """Steps between checkpoints. null: after each epoch, or after some that make 100 steps. 0: at the end only."""
    shard_weights: bool = False
    """Weights, gradients and moments are split over the processes (FSDP2) instead of held by each; for models that do
    not fit. The same numbers, more traffic."""
    keep_checkpoints: int = 3
    """How many are kept, the newest ones."""
    trackers: list[str] = field(default_factory=list)
    """Accelerate trackers beside metrics.jsonl: tensorboard, wandb, trackio ..."""
    push_to_hub: str | None = None
    """Repository ("user/name") that gets the trained model. A new one is as visible as your account's default says:
    create it first to choose."""

    def __post_init__(self):
        require(bool(self.output_dir), "run.output_dir", self.output_dir, "a folder")
        require(0 <= self.seed < 2**32, "run.seed", self.seed, "0 to 2**32 - 1")
        log, save = self.log_every, self.save_every
        require(log is None or log >= 1, "run.log_every", log, "null or at least 1")
        require(save is None or save >= 0, "run.save_every", save, "null or 0 or more")
        require(self.keep_checkpoints >= 1, "run.keep_checkpoints", self.keep_checkpoints, "at least 1")
        if self.push_to_hub is not None:
            try:
                validate_repo_id(self.push_to_hub)
            except HFValidationError as error:
                raise UsageError(f"run.push_to_hub: {error}") from error


@dataclass(kw_only=True, slots=True)
class EvalConfig:
    """What is measured during the run and at its end."""

    zero_shot: str | None = None
    """A labelled folder (clip-benchmark layout or one folder a class), or "scenes": zero-shot accuracy."""
    retrieval: str | None = None
    """Held-out pairs, named as data.train is: recall of images and texts. Of a data set that `datasets` loads, its split
    "test", "validation", "val" or "dev", the first that is there, or its only one."""
    every: int | None = None
    """Steps between evaluations. null: as run.save_every by default. 0: at the end only."""

    def __post_init__(self):
        require(self.every is None or self.every >= 0, "eval.every", self.every, "null or 0 or more")


@dataclass(kw_only=True, slots=True)
class Config:
    """A run."""

    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    distill: DistillConfig
    run: RunConfig
    eval: EvalConfig

    def __post_init__(self):
        for name in PATHS:
            section, key = name.split(".")
            settings = getattr(self, section)
            setattr(settings, key, _in_names(_expanded, getattr(settings, key)))

    @classmethod
    def from_dict(cls, values: dict) -> "Config":
        """Builds and checks a config.

        Raises:
            UsageError: for an unknown section or key, a wrong type or choice, or a value out of range.
        """
        return build(cls, values)

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    def record(self) -> dict:
        """What is written of the settings: paths of what is here from the root, and no credentials."""
        return {
            section: {key: recorded(f"{section}.{key}", value) for key, value in settings.items()}
            for section, settings in self.to_dict().items()
        }

    def value(self, name: str) -> Any:
        """The value of `section.key`."""
        section, key = name.split(".")
        return getattr(getattr(self, section), key)

    def masked(self) -> dict[str, str]:
        """Settings with credentials, which are masked, as the command line gives them."""
        values = {name: self.value(name) for name in PATHS}
        masked = {name: _without_credentials(value) for name, value in values.items()}
        return {name: as_text(value) for name, value in masked.items() if MASK in str(value)}

    def save(self, path: Path) -> None:
        """Writes the YAML file of this run, whole or not at all."""
        temporary = path.with_name(f".tmp-{path.name}")
        temporary.write_text(yaml.safe_dump(self.record(), sort_keys=False, allow_unicode=True), encoding="utf-8")
        temporary.replace(path)


SECTIONS = {f.name: f.type for f in dataclasses.fields(Config)}


# ---------------------------------------------------------------------------------------------------------------------
# Paths and URLs
# ---------------------------------------------------------------------------------------------------------------------


def recorded(name: str, value: Any) -> Any:
    """The value of a setting as it is written, see `Config.record`."""
    return _without_credentials(_in_names(_from_root, value) if name in PATHS else value)


def _in_names(function: Callable[[str], str], value: Any) -> Any:
    """Applies `function` to a name, or to each name of a mixture."""
    if isinstance(value, dict):
        return {function(name) if isinstance(name, str) else name: weight for name, weight in value.items()}
    return function(value) if isinstance(value, str) else value


def _expanded(path: str) -> str:
    """A path, or several that "::" joins, with the home folder in the place of `~`."""
    return "::".join(map(os.path.expanduser, path.split("::")))


def _from_root(path: str) -> str:
    """An absolute path if something is there now; others (URLs, names on the Hub) as they are."""
    if "::" in path:
        return "::".join(map(_from_root, path.split("::")))
    if path in NO_PATHS or "://" in path:
        return path
    fixed = re.split(r"[*?\[{]", path)[0]  # of a pattern, what comes before it
    there = fixed if fixed == path else os.path.dirname(fixed) or os.curdir
    return os.path.abspath(path) if os.path.exists(there) else path


def _without_credentials(value: Any) -> Any:
    if isinstance(value, dict):
        return {_without_credentials(key): _without_credentials(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_without_credentials(entry) for entry in value]
    # A path of this machine has none, whatever its folders are called.
    return redact(value) if isinstance(value, str) and "://" in value else value


def as_text(value: Any) -> str:
    """The value of a setting as the command line gives it."""
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf).strip() if isinstance(value, dict) else value
