"""What all converters share: from a checkpoint's tensors to a model folder that is proven, recorded and publishable.

    checkpoint -> weights (the source's names, read one at a time) -> our names -> strict check against the architecture
        -> new folder: weights, config, code, tokenizer, image processor
        -> proof: embeddings of fixed inputs, by the written model and by `reference` from the source's own tensors
        -> conversion.json, model card -> renamed into place -> Hub, if asked for

Anything that fails on the way leaves no folder behind.
"""

import argparse
import hashlib
import json
import os
import platform
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

import hfclip
from hfclip import HFCLIPConfig, HFCLIPImageProcessor, HFCLIPModel, HFCLIPProcessor, HFCLIPTokenizer, errors
from hfclip.configuration_hfclip import TOWER_CONFIGS
from hfclip.hub import check_target, end_on_interrupt, model_card, push

from .checkpoints import Checkpoint, View, open_checkpoint
from .errors import UsageError, refusals
from .folder import WrittenWeights, new_folder, num_bytes, require_free, write_weights
from .proof import Rounded, compare, differences, features_of, fixed_inputs, rounded, show, streamed
from .reference import Recorder, unread
from .whose import advice


DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
OPENAI_TOKENIZER = "openai/clip-vit-base-patch32"  # has the vocabulary of OpenAI's nine models
OPENAI_VOCABULARY = 49408


Items = Callable[[Mapping[str, Tensor]], Iterable[tuple[str, Tensor]]]
Features = Callable[[Mapping[str, Tensor], Tensor, Tensor], dict[str, Tensor]]


@dataclass
class Conversion:
    """One conversion, planned and not yet done.

    weights: the source's tensors in its own names.
    items: renames them; a generator, so that one tensor at a time is in memory.
    model_class, config: what they make.
    features: (weights, pixel_values, input_ids) -> embeddings in float64 by name, from the source's tensors alone.
    processor: tokenizer and image processor to go with the model.
    notes: what the user should know, printed and recorded.
    """

    checkpoint: Checkpoint
    weights: View
    items: Items
    model_class: type[PreTrainedModel]
    config: Any
    features: Features
    processor: Any = None
    notes: list[str] = field(default_factory=list)


def convert(plan: Conversion, out: Path, options: argparse.Namespace) -> None:
    """Does it. See the module's docstring.

    Raises:
        UsageError: tensors missing, left over or of the wrong shape; a result that differs from its source; an output
            folder that exists; too little space.
    """
    dtype = DTYPES.get(options.dtype)
    model = on_meta(plan.model_class, plan.config, dtype)
    layout = {name: rounded(tensor, dtype) for name, tensor in plan.items(plan.weights.on_meta())}
    check_fit(layout, model)
    say(f"{describe(plan.config)}; {num_bytes(layout) / 1e6:,.0f} MB")
    with new_folder(out, plan.checkpoint.path, options.overwrite) as folder:
        model.save_pretrained(folder, state_dict={})  # config and code; the weights come one by one
        if plan.processor is not None:
            plan.processor.save_pretrained(folder)
        files = write_weights(folder, layout, plan.items(plan.weights))
        provenance = record(plan, layout, files, prove(plan, files, dtype))
        (folder / "conversion.json").write_text(json.dumps(provenance, indent=2) + "\n")
        (folder / "README.md").write_text(card_of(plan, out, options.push_to_hub, provenance), encoding="utf-8")
    for note in plan.notes:
        say(f"NOTE: {note}")
    say(f"Written: {out}")
    if options.push_to_hub:
        publish(out, options)


def prove(plan: Conversion, files: list[Path], dtype: torch.dtype | None) -> dict[str, dict[str, float]]:
    """Compares what source and result compute, and returns the differences by name.

    Raises:
        UsageError: above `TOLERANCE`, a value that is not finite, or a tensor of the source that took part in nothing.
    """
    say("Comparing with the source ...")
    inputs = fixed_inputs(plan.config)
    source = Recorder(plan.weights)
    expected = plan.features(source if dtype is None else Rounded(source, dtype), *inputs)
    if idle := unread(source):
        raise UsageError(f"{len(idle)} tensors of the source take part in nothing, such as {idle[:3]}.")
    found = features_of(streamed(plan.model_class, plan.config, WrittenWeights(files)), *inputs)
    if dtype is not None:
        show("What rounding changes", differences(found, plan.features(plan.weights, *inputs)))
    return compare(found, expected)


def publish(out: Path, options: argparse.Namespace) -> None:
    """Sends the folder to the Hub; if that fails, says how to go on."""
    words = ["python", "conversion/push_to_hub.py", str(out), options.push_to_hub]
    words += ["--private"] if options.private else []
    words += ["--revision", options.revision] if options.revision else []
    again = f"{out} holds the model. To publish it: {shlex.join(words)}"
    end_on_interrupt(f"Stopped. {again}")
    try:
        push(out, options.push_to_hub, private=options.private, revision=options.revision)
    except UsageError as error:
        raise type(error)(f"{error}\n{again}") from error


def say(line: str) -> None:
    print(line, flush=True)


def on_meta(model_class: type[PreTrainedModel], config: Any, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model without weights.

    Raises:
        UsageError: a tower of transformers that cannot be built from its settings; ours refuse theirs before.
    """
    towers = [getattr(config, f"{name}_config", config) for name in ("text", "vision")]
    is_ours = all(tower.model_type in TOWER_CONFIGS for tower in towers)
    with nullcontext() if is_ours else refusals("A tower cannot be built"), torch.device("meta"):
        model = model_class(config)
    return model if dtype is None else model.to(dtype)


def check_fit(layout: Mapping[str, Tensor], model: PreTrainedModel) -> None:
    """Raises UsageError unless `layout` is exactly the model's state dict, names and shapes."""
    expected = model.state_dict()
    missing, surplus = sorted(expected.keys() - layout.keys()), sorted(layout.keys() - expected.keys())
    common = expected.keys() & layout.keys()
    wrong = [name for name in common if expected[name].shape != layout[name].shape]
    no_floats = [
        name for name in common if expected[name].is_floating_point() and not layout[name].is_floating_point()
    ]
    problems = [f"{len(names)} {what}, such as {names[:3]}" for what, names in (("missing", missing), ("left over", surplus), ("of whole numbers", sorted(no_floats))) if names]  # fmt: skip
    problems += [
        f"{name!r} is {tuple(layout[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in sorted(wrong)[:3]
    ]
    if problems:
        raise UsageError(f"The tensors do not fit the architecture that they tell: {'; '.join(problems)}.")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UsageError: no such file, no JSON, or no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: found no readable JSON file ({error}), expected one of settings.") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path}: found {type(content).__name__}, expected an object of settings.")
    return content


def open_model(folder: Path) -> tuple[HFCLIPConfig, View]:
    """Config and weights of a whole HFCLIPModel, or of transformers' CLIPModel.

    Raises:
        UsageError: another model, a quantised one, or one whose weights do not fit its config; from_pretrained would
            draw them at random.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UsageError(f"{folder}: found no config.json, expected the folder of a model.{advice(folder)}")
    written = read_json(path)
    if (kind := written.get("model_type")) not in ("hfclip", "clip"):
        raise UsageError(f"{folder}: found a model of type {kind!r}, expected a whole CLIP model.")
    if written.get("quantization_config") is not None:
        raise UsageError(
            f"{folder}: found quantised weights, expected plain ones. Start from the model as it was before."
        )
    with refusals(path):
        config = HFCLIPConfig.from_pretrained(folder)
        model = on_meta(HFCLIPModel, config)
    checkpoint = open_checkpoint(folder)
    weights = View(checkpoint, {name: name for name in checkpoint if not name.endswith("position_ids")})
    check_fit(weights.on_meta(), model)
    return config, weights


def describe(config: Any) -> str:
    """One line."""
    if not isinstance(config, HFCLIPConfig):
        return f"{config.model_type}, {config.num_hidden_layers} layers of {config.hidden_size}"
    vision, text = config.vision_config, config.text_config
    return (
        f"{vision.model_type} at {vision.image_size} px and {text.model_type} of {text.vocab_size} tokens, "
        f"{config.projection_dim} joint dimensions"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Record
# ---------------------------------------------------------------------------------------------------------------------


def record(
    plan: Conversion, layout: Mapping[str, Tensor], files: list[Path], differences: dict[str, dict[str, float]]
) -> dict[str, Any]:
    """What `conversion.json` holds."""
    source = plan.checkpoint
    return {
        "source": {"file": Path(source.path).name, "format": source.format, "sha256": source.sha256()},
        "result": {path.name: sha256_of(path) for path in files},
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in layout.values()}),
        "differences": differences,
        "notes": plan.notes,
        # Paths of the machine stay on the machine.
        "command": " ".join(Path(word).name if os.sep in word else word for word in sys.argv),
        "versions": {
            "hfclip": hfclip.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "safetensors")},
        },
    }


def card_of(plan: Conversion, out: Path, repo_id: str | None, provenance: dict[str, Any]) -> str:
    """The model card, with the part of the record that its reader wants."""
    worst = max(values["relative"] for values in provenance["differences"].values())
    source = provenance["source"]
    lines = {
        "Converted from": f"`{source['file']}` ({source['format']})",
        "SHA-256 of the source": f"`{source['sha256']}`",
        "Largest relative difference of embeddings": f"{worst:.1e} (float64, fixed inputs)",
        "Stored as": ", ".join(provenance["dtypes"]),
    }
    return model_card(
        plan.config,
        name=repo_id or ".",
        title=None if repo_id else out.name,
        provenance=lines,
        results=[],
        has_processor=isinstance(plan.processor, HFCLIPProcessor),
    )


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if sys.version_info >= (3, 11) else _sha256(file)


def _sha256(file) -> str:
    digest = hashlib.sha256()
    while piece := file.read(2**20):
        digest.update(piece)
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Processors
# ---------------------------------------------------------------------------------------------------------------------


def openai_processor(config: HFCLIPConfig, merges: str | None) -> tuple[Any, list[str]]:
    """Image processor at the model's resolution with OpenAI's tokenizer, and notes for the user.

    The merges come from a file, or from the Hub. A model with another vocabulary is written without a tokenizer.

    Raises:
        UsageError: merges that are not available, or that are another vocabulary's.
    """
    text = config.text_config
    image_processor = HFCLIPImageProcessor(size=config.image_size)
    if merges is None and text.vocab_size != OPENAI_VOCABULARY:
        return image_processor, [
            f"no tokenizer was written: OpenAI's has 49,408 tokens, this model {text.vocab_size}."
        ]
    try:
        if merges is not None:
            tokenizer = HFCLIPTokenizer.from_openai_bpe(merges)
        else:
            tokenizer = HFCLIPTokenizer.from_pretrained(OPENAI_TOKENIZER)
    except (OSError, ValueError) as error:  # ValueError: without network, a folder without files
        if merges is not None:
            raise UsageError(f"--merges: {error}") from error
        raise UsageError(
            "No tokenizer: OpenAI's cannot be fetched from the Hub, and without it the model cannot be used. Pass --merges "
            "bpe_simple_vocab_16e6.txt.gz (it lies in OpenAI's repository, folder clip)."
        ) from error
    if len(tokenizer) != text.vocab_size:
        raise UsageError(
            f"--merges: found {len(tokenizer)} tokens, expected the model's {text.vocab_size}. Pass the merges that it "
            "was trained with, or leave --merges out."
        )
    tokenizer.model_max_length = text.max_position_embeddings
    return HFCLIPProcessor(image_processor, tokenizer), []


def open_processor(folder: Path) -> tuple[HFCLIPImageProcessor | None, Any]:
    """A model folder's image processor and tokenizer; None for what it has not."""
    image_processor = tokenizer = None
    with refusals(folder):
        if any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
            image_processor = HFCLIPImageProcessor.from_pretrained(folder)
        if any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return image_processor, tokenizer


def save_processor(image_processor: HFCLIPImageProcessor | None, tokenizer: Any, folder: Path) -> None:
    """Writes both, or the one that is there."""
    if image_processor is not None and tokenizer is not None:
        HFCLIPProcessor(image_processor, tokenizer).save_pretrained(folder)
    elif image_processor is not None or tokenizer is not None:
        (image_processor or tokenizer).save_pretrained(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def as_path(text: str) -> Path:
    """A path on the command line; `~` is the home folder also where the shell does not say so."""
    return Path(text).expanduser()


def parser_of(description: str, out_help: str = "the folder to write") -> argparse.ArgumentParser:
    """The arguments that all converters have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=as_path, help="the checkpoint: a file, or a folder that holds one")
    parser.add_argument("out", type=as_path, help=out_help)
    parser.add_argument(
        "--dtype",
        choices=["keep", *DTYPES],
        default="keep",
        help="precision of the stored weights. `keep` (default) stores each tensor as the source does and loses "
        "nothing; models load in float32 either way unless a dtype is asked for here or there",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")
    hub = parser.add_argument_group("Hub", "sign in with `hf auth login` first")
    hub.add_argument("--push-to-hub", metavar="REPO", help="publish the result, e.g. me/clip-rn50")
    hub.add_argument("--private", action="store_true", default=None, help="create the repository as a private one")
    hub.add_argument("--revision", help="branch to publish on (default: main)")
    return parser


def options_of(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line of a converter, refused before any work where it cannot end well.

    Raises:
        UsageError: an output that is not free (see `require_free`), or settings of the Hub that make no sense.
    """
    options = parser.parse_args()
    if options.push_to_hub is not None:
        check_target(options.push_to_hub, options.revision)
    elif alone := [name for name in ("private", "revision") if getattr(options, name) is not None]:
        raise UsageError(
            f"Found --{' and --'.join(alone)} without --push-to-hub. Say where to publish, --push-to-hub REPO, or leave "
            f"{'them' if len(alone) > 1 else 'it'} out."
        )
    require_free(options.out, options.source, options.overwrite)
    return options


def run(main: Callable[[], None]) -> None:
    """Runs a converter's `main`. Exit codes: 0 done, 1 the Hub refused, 2 wrong use or a bad file, 130 Ctrl-C."""
    transformers.utils.logging.disable_progress_bar()  # the weights have one of their own
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C, which tidies up
    errors.run(main, interrupted="Interrupted; nothing was written. Run the same command again.")
