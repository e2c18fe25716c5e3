"""What a run is: typed, checked settings that a YAML file names and the command line overrides.

`parse_arguments` turns argv into a `Config`: YAML file -> command-line overrides -> types, choices and ranges checked.
Everything wrong with a run's settings is a `UsageError` that names the setting, what was found and what was expected.
"""

import argparse
import ast
import dataclasses
import difflib
import inspect
import math
import os
import re
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from huggingface_hub.utils import HFValidationError, validate_repo_id

from hfclip_errors import MASK, UsageError, redact


CONFIG_FOLDER = Path(__file__).parent / "configs"
QUICKSTART = "quickstart"
# Flags that say what is trained, or on what: a run that is not the quickstart any more.
NAMES_A_RUN = ("data.train",) + tuple(
    f"model.{origin}" for origin in ("preset", "config", "checkpoint", "vision_checkpoint", "text_checkpoint")
)
# Settings that name what lies somewhere: a file, a folder or a URL, some of them also something on the Hub. (The cache,
# data.cache_dir, is each machine's own: `~` in it stays as it is until it is used.)
PATHS = tuple(
    f"model.{name}" for name in ("config", "checkpoint", "vision_checkpoint", "text_checkpoint", "tokenizer")
) + (
    "data.train",
    "distill.teacher",
    "distill.embeddings",
    "run.output_dir",
    "eval.zero_shot",
    "eval.retrieval",
)
NO_PATHS = ("scenes", "train")  # words with a meaning of their own
CONFIG_FILE = "config.yaml"
SHORT_FLAGS = {"run.stop_after": ("--stop-after",), "run.profile": ("--profile",)}
# Asked for out of habit. The answer is why there is none.
ACCUMULATION = ("gradient_accumulation_steps", "accumulation_steps", "gradient_accumulation", "accum_freq")
NO_ACCUMULATION = (
    " The gradients of small contrastive batches do not add up to that of the large one: each pair would meet only the "
    "negatives of its own small batch. optim.micro_batch_size saves the same memory and is exact."
)


def _require(condition: bool, name: str, found: Any, expected: str) -> None:
    if not condition:
        raise UsageError(f"{name}: found {found!r}, expected {expected}.")


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """Which model is trained. Exactly one of preset, config, checkpoint or the two tower checkpoints names it."""

    preset: str | None = None
    """A published architecture from scratch: "RN50" ... "RN50x64", "ViT-B/32", "ViT-B/16", "ViT-L/14"."""
    config: str | dict | None = None
    """Any architecture from scratch: a JSON or YAML file of `HFCLIPConfig`, or the mapping itself."""
    checkpoint: str | None = None
    """Weights to continue from: an hfclip or transformers CLIP folder, or its name on the Hub."""
    vision_checkpoint: str | None = None
    """A pretrained vision tower, folder or Hub name; goes with text_checkpoint."""
    text_checkpoint: str | None = None
    """A pretrained text tower, folder or Hub name; its tokenizer is used."""
    projection_dim: int = 512
    """Width of the joint space when two pretrained towers are put together."""
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
        towers = [name for name in ("vision_checkpoint", "text_checkpoint") if getattr(self, name) is not None]
        if len(towers) == 1:
            raise UsageError(
                f"model.{towers[0]} is set alone. Two pretrained towers make a model: set model.vision_checkpoint and "
                "model.text_checkpoint, or continue from a whole model with model.checkpoint."
            )
        origins += [" + ".join(towers)] if towers else []
        if len(origins) != 1:
            raise UsageError(
                f"model: {' and '.join(origins) or 'nothing'} names the model, expected exactly one of preset, "
                "config, checkpoint or the two tower checkpoints. `--model.config null` unsets one."
            )
        if self.tokenizer is None and (self.preset is not None or self.config is not None):
            raise UsageError(
                'model.tokenizer: found null, but a model from scratch has none. Set it to "train", to OpenAI\'s '
                "merges file (bpe_simple_vocab_16e6.txt.gz) or to a folder or Hub name with a tokenizer."
            )
        _require(self.projection_dim >= 1, "model.projection_dim", self.projection_dim, "at least 1")
        _require(self.vocab_size >= 514, "model.vocab_size", self.vocab_size, "at least 514 (512 bytes, start, end)")
        dropout = self.patch_dropout
        _require(dropout is None or 0 <= dropout < 1, "model.patch_dropout", dropout, "null or 0 <= value < 1")


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """The pairs to learn from, and how they are read."""

    train: str | dict = "scenes"
    """The built-in "scenes"; WebDataset tars (`{0..7}.tar`, glob, folder; local, hf://, https://, s3://; several joined
    by `::`); images with texts beside them or metadata, class folders; csv, tsv, jsonl, parquet and zip files; or a data
    set's name on the Hub (docs/data.md). A mapping of such names to weights mixes them: each fills its share of every
    batch, and an epoch is as many pairs as all have together."""
    split: str = "train"
    """Split of a data set that `datasets` loads."""
    image_key: str | None = None
    """Column of the images in a table, or of their paths. null: "image", "filepath" or another usual name."""
    caption_key: str | None = None
    """Column, or key of .json members, of the captions (one or a list). null: .txt members, else "text", "caption",
    "captions", "texts" or "sentences"."""
    max_samples: int | None = None
    """Use only the first so many samples. null: all (50,000 built-in scenes)."""
    group_captions: bool = False
    """Pairs with the same caption are positives of each other, not negatives. (Where equal texts have equal embeddings,
    without dropout in the text tower, the contrastive loss and its gradient are the same either way.)"""
    num_workers: int | None = None
    """Processes per rank that read and decode. null: as many as the machine has cores for, divided among its ranks: all
    but one beside a GPU, a quarter where the CPU trains. 0: none, in the training process itself."""
    cache_dir: str = "~/.cache/hfclip"
    """Where remote shards and the indices of shards are kept."""
    disk: float | None = None
    """Gigabytes of the remote tars of `train` that a machine keeps at a time; the rest are fetched while the run goes on.
    `training/index.py` must have counted them once. null: all are fetched before the run."""
    max_bad_in_a_row: int = 50
    """So many unusable samples in one place of the batch, one after the other, end the run."""
    phases: list[dict] = field(default_factory=list)
    """Cheaper parts of the run that come before the full resolution (CLIPA, FLIP), each a mapping of `epochs` and of
    some of `image_size`, `text_length`, `patch_dropout`."""

    def __post_init__(self):
        _require(bool(self.train), "data.train", self.train, "a path, a URL, a name on the Hub or 'scenes'")
        samples = self.max_samples
        _require(samples is None or samples >= 1, "data.max_samples", samples, "null or at least 1")
        workers = self.num_workers
        _require(workers is None or workers >= 0, "data.num_workers", workers, "null or 0 or more")
        disk = self.disk
        _require(disk is None or 0 < disk < math.inf, "data.disk", disk, "null or above 0, in gigabytes")
        _require(self.max_bad_in_a_row >= 1, "data.max_bad_in_a_row", self.max_bad_in_a_row, "at least 1")


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """The objective, the batch and AdamW. Defaults are the paper's (Radford et al. 2021, tables 18 and 19)."""

    loss: str = "contrastive"
    """One of `hfclip.losses.LOSSES`: "contrastive", CLIP's symmetric cross-entropy, or "sigmoid", SigLIP's loss. They see
    the global batch."""
    batch_size: int = 256
    """Pairs per step over all processes together (the paper: 32,768)."""
    micro_batch_size: int | None = None
    """Pairs that a process embeds at a time. Fewer than its share of the batch: the towers run twice and the memory is
    that of so few pairs, with the gradient of the whole batch (gradient cache). null: all at once."""
    exchange: Literal["gather", "ring"] = "gather"
    """How processes see each other's embeddings: all at once, or passed round, never held together."""
    epochs: float = 32.0
    """Passes over the data; each drops the last incomplete batch."""
    steps: int | None = None
    """Length of the run in optimizer steps instead of epochs."""
    lr: float = 5e-4
    """Peak learning rate."""
    warmup_steps: int = 2000
    """Steps of linear warm-up; a cosine down to zero follows."""
    weight_decay: float = 0.2
    """Decoupled weight decay of matrices and embeddings; gains, biases and scalars have none."""
    beta2: float | None = None
    """Decay of the second moment. null: 0.98 for transformers, 0.999 for the ResNets."""
    eps: float | None = None
    """Adam's epsilon. null: 1e-6 for transformers, 1e-8 for the ResNets."""
    layer_decay: float = 1.0
    """Each block of a tower learns at so many times the rate of the block above it. 1: all at the same rate."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """Of AdamW's two moments. bfloat16 halves them, rounded stochastically (the paper's half-precision statistics)."""
    text_weights: Literal["float32", "bfloat16"] = "float32"
    """Of the text tower while it trains. bfloat16 halves them, rounded stochastically after each step (the paper)."""
    ema_decay: float | None = None
    """Keeps a moving average of the weights with this decay per step. It is what evaluations measure and what the final
    model is; checkpoints hold both. null: none."""
    max_grad_norm: float | None = None
    """Gradients are scaled down to this norm. null: not."""
    max_logit_scale: float = 100.0
    """exp(logit_scale) is clamped to this after each step."""

    def __post_init__(self):
        _require(self.batch_size >= 2, "optim.batch_size", self.batch_size, "at least 2: one pair has no negatives")
        micro = self.micro_batch_size
        _require(micro is None or micro >= 1, "optim.micro_batch_size", micro, "null or at least 1")
        _require(0 < self.epochs < math.inf, "optim.epochs", self.epochs, "above 0")
        _require(0 < self.layer_decay <= 1, "optim.layer_decay", self.layer_decay, "above 0, at most 1")
        ema = self.ema_decay
        _require(ema is None or 0 < ema < 1, "optim.ema_decay", ema, "null or between 0 and 1")
        _require(self.steps is None or self.steps >= 1, "optim.steps", self.steps, "null or at least 1")
        _require(0 < self.lr < math.inf, "optim.lr", self.lr, "above 0")
        _require(self.warmup_steps >= 0, "optim.warmup_steps", self.warmup_steps, "0 or more")
        _require(0 <= self.weight_decay < math.inf, "optim.weight_decay", self.weight_decay, "0 or more")
        _require(self.beta2 is None or 0 < self.beta2 < 1, "optim.beta2", self.beta2, "null or between 0 and 1")
        _require(self.eps is None or 0 < self.eps < math.inf, "optim.eps", self.eps, "null or above 0")
        norm = self.max_grad_norm
        _require(norm is None or 0 < norm < math.inf, "optim.max_grad_norm", norm, "null or above 0")
        _require(1 <= self.max_logit_scale < math.inf, "optim.max_logit_scale", self.max_logit_scale, "at least 1")


@dataclass(kw_only=True, slots=True)
class DistillConfig:
    """A trained CLIP as teacher: the student's similarities learn to follow the teacher's (arXiv:2311.17049)."""

    teacher: str | None = None
    """An hfclip or transformers CLIP folder or Hub name, run beside the student. null: none."""
    embeddings: str | None = None
    """Stored embeddings of the teacher instead, made by `training/embed.py` for data.train. null: none."""
    weight: float = 1.0
    """Share of the loss that follows the teacher, 0 to 1; the rest is optim.loss."""

    def __post_init__(self):
        if self.teacher is not None and self.embeddings is not None:
            raise UsageError("distill: teacher and embeddings are both set, expected one of them. Unset the other.")
        _require(0 <= self.weight <= 1, "distill.weight", self.weight, "0 to 1")
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
    """Of the computation. auto: bf16 where the device has it in hardware, else fp32; a resumed run keeps its own. Weights and optimizer state are float32, but for optim.moments and optim.text_weights."""
    log_every: int = 20
    """Steps between lines of metrics.jsonl."""
    save_every: int | None = None
    """Steps between checkpoints. null: one after each epoch. 0: at the end only."""
    shard_weights: bool = False
    """Weights, gradients and moments are split over the processes (FSDP2) instead of held by each; for models that do
    not fit. The same numbers, more traffic."""
    keep_checkpoints: int = 3
    """The newest so many are kept."""
    keep_every_hours: float | None = None
    """Beside the newest, one checkpoint of every so many hours is kept for good. null: none."""
    stop_after: float | None = None
    """Minutes after which the run saves and ends with status 0, to be resumed: for jobs with a time limit."""
    profile: int = 0
    """Steps that are traced, after three to warm up, into profile/ of the run folder."""
    max_silence: float = 45.0
    """Seconds without a sign of life from any process after which all of them end."""
    trackers: list[str] = field(default_factory=list)
    """Accelerate trackers beside metrics.jsonl: tensorboard, wandb, trackio ..."""
    max_bad_steps: int = 20
    """So many steps in a row with a non-finite loss or gradient (each is skipped) end the run."""
    push_to_hub: str | None = None
    """Repository ("user/name") that gets the trained model. A new one is as visible as your account's default says:
    create it first to choose."""

    def __post_init__(self):
        _require(bool(self.output_dir), "run.output_dir", self.output_dir, "a folder")
        _require(0 <= self.seed < 2**32, "run.seed", self.seed, "0 to 2**32 - 1")
        _require(self.log_every >= 1, "run.log_every", self.log_every, "at least 1")
        _require(
            self.save_every is None or self.save_every >= 0, "run.save_every", self.save_every, "null or 0 or more"
        )
        _require(self.keep_checkpoints >= 1, "run.keep_checkpoints", self.keep_checkpoints, "at least 1")
        hours, minutes = self.keep_every_hours, self.stop_after
        _require(hours is None or 0 < hours < math.inf, "run.keep_every_hours", hours, "null or above 0")
        _require(minutes is None or 0 < minutes < math.inf, "run.stop_after", minutes, "null or above 0, in minutes")
        _require(self.profile >= 0, "run.profile", self.profile, "0 or more")
        _require(5 <= self.max_silence < math.inf, "run.max_silence", self.max_silence, "5 or more, in seconds")
        _require(self.max_bad_steps >= 1, "run.max_bad_steps", self.max_bad_steps, "at least 1")
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
    """Steps between evaluations. null: one after each epoch. 0: at the end only."""
    batch_size: int = 256
    """Images or texts at a time on each process."""
    max_samples: int = 5000
    """Held-out pairs, at most, of the retrieval evaluation (more pairs make recall harder)."""

    def __post_init__(self):
        _require(self.every is None or self.every >= 0, "eval.every", self.every, "null or 0 or more")
        _require(self.batch_size >= 1, "eval.batch_size", self.batch_size, "at least 1")
        _require(self.max_samples >= 2, "eval.max_samples", self.max_samples, "at least 2")


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
        _check_names(values, SECTIONS, "section")
        settings = {}
        for name, section in SECTIONS.items():
            given = values.get(name) or {}
            _require(isinstance(given, dict), name, given, "a mapping of settings")
            hints = typing.get_type_hints(section)
            _check_names(given, hints, "setting", prefix=f"{name}.")
            settings[name] = {key: _cast(value, hints[key], f"{name}.{key}") for key, value in given.items()}
        return cls(**{name: section(**settings[name]) for name, section in SECTIONS.items()})

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
        return {name: _as_text(value) for name, value in masked.items() if MASK in str(value)}

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


def _check_credentials(config: Config) -> None:
    """Raises UsageError for a URL out of a file of a run, where its credentials are masked."""
    for name, value in config.masked().items():
        if value == _as_text(config.value(name)):
            raise UsageError(
                f"{name}: {value!r} has lost its credentials, which no file of a run keeps. Give it again on the "
                f"command line: `--{name} URL`."
            )


def _as_text(value: Any) -> str:
    """The value of a setting as the command line gives it."""
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf).strip() if isinstance(value, dict) else value


def run_folder_of(config_file: str) -> Path | None:
    """The folder in which a saved config.yaml lies beside what a run has left there; None for any other file."""
    path = Path(config_file).expanduser()
    is_of_run = any(path.parent.glob("checkpoint-*")) or (path.parent / "metrics.jsonl").exists()
    return path.parent if path.name == CONFIG_FILE and path.is_file() and is_of_run else None


class _EachKeyOnce(yaml.SafeLoader):
    """Refuses a key that is given twice in a mapping, of which YAML would drop the first."""

    def compose_mapping_node(self, anchor):
        node, lines = super().compose_mapping_node(anchor), {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # which yaml refuses itself
            if (before := lines.setdefault(key.value, key.start_mark)) is not key.start_mark:
                place = f"lines {before.line + 1} and {key.start_mark.line + 1}"
                raise yaml.YAMLError(f"{key.value!r} is given twice, in {place}. Join them into one.")
        return node


def load_yaml(name: str) -> dict:
    """Reads a config file, given as a path or as the name of a recipe in `training/configs`."""
    path = Path(name).expanduser()
    if not path.is_file():
        path = CONFIG_FOLDER / f"{name}.yaml"
    if not path.is_file():
        recipes = ", ".join(sorted(p.stem for p in CONFIG_FOLDER.glob("*.yaml")))
        raise UsageError(f"--config: found no file {name!r}, expected a YAML file or one of the recipes: {recipes}.")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _EachKeyOnce)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"--config: {path} is not a YAML file: {error}") from error
    _require(isinstance(values or {}, dict), f"--config {path}", values, "a mapping of sections")
    return values or {}


def parse_arguments(argv: list[str]) -> tuple[Config, str | None]:
    """The run that the command line asks for, and what to resume from ("auto", a checkpoint folder or None)."""
    arguments, unknown = _parser().parse_known_args(argv)
    if unknown:
        flag = unknown[0].split("=")[0]
        raise UsageError(f"Unknown argument {flag!r}.{_nearest(flag, [f'--{name}' for name in _settings()])}")
    for name in ("config", "resume"):
        if getattr(arguments, name) == "":
            raise UsageError(f"--{name}: found an empty word, expected a path. Is a variable of the shell not set?")
    named = any(getattr(arguments, name) is not None for name in NAMES_A_RUN)
    recipe = arguments.config or (None if named else QUICKSTART)
    values = load_yaml(recipe) if recipe else {}
    if recipe and (folder := run_folder_of(recipe)) is not None and isinstance(values.get("run") or {}, dict):
        values["run"] = {**(values.get("run") or {}), "output_dir": str(folder)}
    for name, (hint, _) in _settings().items():
        text = getattr(arguments, name)
        if text is not None:
            section, key = name.split(".")
            _require(
                isinstance(values.get(section) or {}, dict), section, values.get(section), "a mapping of settings"
            )
            values[section] = (values.get(section) or {}) | {key: _from_command_line(text, hint, name)}
    config = Config.from_dict(values)
    _check_credentials(config)
    return config, arguments.resume and os.path.expanduser(arguments.resume)


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UsageError(f"{message[:1].upper()}{message[1:]}. `--help` lists all arguments.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="training/pretrain.py",
        usage="%(prog)s [--config FILE] [--resume WHERE] [--section.setting VALUE ...]",
        description="Trains a CLIP model. Without arguments: a small one on built-in pictures, minutes on a CPU.",
        epilog="Paths: `~` is the home folder, and relative paths are taken from where the command is run. The config.yaml "
        "of a run's folder has them from the root, and goes on in the folder where it lies. Credentials in URLs are "
        "never written: give such a URL again with --resume. Several processes: accelerate launch training/pretrain.py "
        "... (see training/launch).",
        allow_abbrev=False,
    )
    recipe = (
        "a YAML file, or a recipe in training/configs; the arguments below override it. Default: quickstart, if none "
        f"of them names data or a model ({', '.join('--' + name for name in NAMES_A_RUN)}); else no recipe, and what "
        "is not given has the default that is shown below"
    )
    parser.add_argument("--config", metavar="FILE", help=recipe)
    resume = (
        '"auto": the newest whole checkpoint of the run folder; where there is none, the run starts anew and says so. '
        "Or a checkpoint folder"
    )
    parser.add_argument("--resume", metavar="WHERE", help=resume)
    groups = {name: parser.add_argument_group(name, section.__doc__) for name, section in SECTIONS.items()}
    for name, (hint, text) in _settings().items():
        options = {"nargs": "?", "const": "true"} if hint is bool else {}
        choices = typing.get_args(hint) if typing.get_origin(hint) is Literal else None
        metavar = "{" + ",".join(choices) + "}" if choices else _describe(hint).upper()
        flags = [f"--{name}", *SHORT_FLAGS.get(name, ())]
        groups[name.split(".")[0]].add_argument(*flags, dest=name, metavar=metavar, help=text, **options)
    return parser


def _settings() -> dict[str, tuple[Any, str]]:
    """`section.key` -> (type, help with the default). The help is the docstring under the field."""
    settings = {}
    for name, section in SECTIONS.items():
        hints, texts = typing.get_type_hints(section), _field_docstrings(section)
        for f in dataclasses.fields(section):
            default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
            shown = "null" if default is None else str(default).lower() if isinstance(default, bool) else default
            settings[f"{name}.{f.name}"] = (hints[f.name], f"{texts[f.name]} (default: {shown})".replace("%", "%%"))
    return settings


def _field_docstrings(section: type) -> dict[str, str]:
    body = ast.parse(inspect.getsource(section)).body[0].body
    return {
        node.target.id: " ".join(text.value.value.split())
        for node, text in zip(body, body[1:], strict=False)
        if isinstance(node, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


def _from_command_line(text: str, hint: Any, name: str) -> Any:
    """Text of an argument -> the value that YAML would give; words stay text for settings that take text."""
    takes_text = str in (hint, *typing.get_args(hint)) or hint == list[str]
    if takes_text and text != "null" and not (dict in typing.get_args(hint) and re.fullmatch(r"\{.*\}", text, re.S)):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{name}: found {text!r}, which is not a YAML value: {error}") from error


def _cast(value: Any, hint: Any, name: str) -> Any:
    """`value` as `hint`; only changes of form that lose nothing (1 -> 1.0, "1e-3" -> 0.001, "a,b" -> ["a", "b"])."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        if typing.get_origin(option) is Literal and value in typing.get_args(option):
            return value
        if option == list[str] and isinstance(value, str):
            return [word.strip() for word in value.split(",") if word.strip()]
        if option == list[str] and isinstance(value, list) and all(isinstance(word, str) for word in value):
            return value
        if option == list[dict] and isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
            return value
        if option is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
            try:  # YAML reads 1e-3 as text
                return float(value)
            except ValueError:
                continue
        # bool is a kind of int in Python, but `batch_size: true` is a mistake.
        if isinstance(option, type) and isinstance(value, option) and (option is bool or not isinstance(value, bool)):
            return value
    raise UsageError(f"{name}: found {value!r}, expected {_describe(hint)}.")


def _describe(hint: Any) -> str:
    if isinstance(hint, types.UnionType):
        return " or ".join(_describe(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(choice) for choice in typing.get_args(hint))
    names = {type(None): "null", str: "text", int: "int", float: "number", bool: "true or false", dict: "mapping"}
    return names.get(hint, "list of mappings" if hint == list[dict] else "list of text")


def _check_names(given: dict, known: dict, what: str, prefix: str = "") -> None:
    for name in given:
        if name not in known:
            raise UsageError(f"Unknown {what} {prefix + str(name)!r}.{_nearest(str(name), list(known), prefix)}")


def _nearest(name: str, known: list[str], prefix: str = "") -> str:
    """The hint that follows an unknown name."""
    if name.lstrip("-").rsplit(".", 1)[-1].replace("-", "_") in ACCUMULATION:
        return NO_ACCUMULATION
    close = [k for k in known if k.endswith("." + name.lstrip("-"))] or difflib.get_close_matches(name, known, n=1)
    return (
        f" Did you mean {prefix + close[0]!r}?"
        if close
        else f" Expected one of: {', '.join(prefix + k for k in known)}."
    )
