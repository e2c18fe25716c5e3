"""What all converters share: from a checkpoint's tensors to a model folder that is proven, recorded and publishable.

    checkpoint -> weights (the source's names, read one at a time) -> our names -> strict check against the architecture
        -> new folder: weights, config, code, tokenizer, image processor
        -> proof: embeddings of fixed inputs, by the written model and by `reference` from the source's own tensors
        -> conversion.json, model card -> renamed into place -> Hub, if asked for

Anything that fails on the way leaves no folder.
"""

import argparse
import json
import os
import platform
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

import hfclip
from hfclip import HFCLIPConfig, HFCLIPModel, HFCLIPProcessor, errors
from hfclip.errors import UsageError, as_usage_error
from hfclip.families_hfclip import FAMILIES
from hfclip.foreign.checkpoints import (
    FOLDER_FILES,
    OPENCLIP_FILES,
    Checkpoint,
    View,
    open_checkpoint,
    rounded,
    sha256_of,
)
from hfclip.foreign.plan import Items, Plan, check_fit, on_meta
from hfclip.foreign.processors import join
from hfclip.foreign.whose import advice, require_own
from hfclip.hub import check_target, end_on_interrupt, model_card, push
from hfclip.hub.card import describe
from hfclip.hub.check import read_json

from .folder import new_folder, require_free
from .proof import compare, compute_features, differences, fixed_inputs, show, streamed
from .reference import Recorder, unread
from .safetensors_files import num_bytes, write_weights


DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


Features = Callable[[Mapping[str, Tensor], Tensor, Tensor], dict[str, Tensor]]


@dataclass
class Conversion:
    """One conversion, planned and not yet done.

    weights: the source's tensors in its own names.
    items: as of a `Plan`.
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


def conversion_of(plan: Plan, features: Features, unproven: Iterable[str] = ()) -> Conversion:
    """The conversion of a dual encoder; `unproven`: notes on what `features` leaves open."""
    tokenizer, notes = plan.build_tokenizer()
    return Conversion(
        plan.checkpoint,
        plan.weights,
        plan.items,
        HFCLIPModel,
        plan.config,
        features,
        join(plan.image_processor, tokenizer),
        [*plan.notes, *unproven, *notes],
    )


def convert(plan: Conversion, out: Path, options: argparse.Namespace) -> None:
    """Writes the planned conversion to `out` and proves it.

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
        provenance = record(plan, layout, files, prove(plan, folder, dtype))
        (folder / "conversion.json").write_text(json.dumps(provenance, indent=2) + "\n")
        (folder / "README.md").write_text(build_card(plan, out, options.push_to_hub, provenance), encoding="utf-8")
    for note in plan.notes:
        say(f"NOTE: {note}")
    say(f"Written: {out}")
    if options.push_to_hub:
        publish(out, options)


def prove(plan: Conversion, folder: Path, dtype: torch.dtype | None) -> dict[str, dict[str, float]]:
    """Compares what source and result compute, and returns the differences by name."""
    say("Comparing with the source ...")
    inputs = fixed_inputs(plan.config)
    source = Recorder(plan.weights)
    expected = plan.features(View(source, dtype=dtype), *inputs)
    if idle := unread(source):
        raise UsageError(f"{len(idle)} tensors of the source take part in nothing, such as {idle[:3]}.")
    found = compute_features(streamed(plan.model_class, plan.config, open_checkpoint(folder)), *inputs)
    if dtype is not None:
        show("What rounding changes", differences(found, plan.features(plan.weights, *inputs)))
    return compare(found, expected)


def publish(out: Path, options: argparse.Namespace) -> None:
    """Sends the folder to the Hub; if that fails, says how to go on."""
    words = ["hfclip", "push", str(out), options.push_to_hub]
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


def open_source(own: str, source: Path) -> Checkpoint:
    """The checkpoint at `source`, refused with the right program where it is certainly not `own`, a key of `PROGRAMS`."""
    require_own(own, source)
    checkpoint = open_checkpoint(source, OPENCLIP_FILES if own == "openclip" else FOLDER_FILES)
    require_own(own, source, checkpoint)
    return checkpoint


def open_model(folder: Path) -> tuple[HFCLIPConfig, View]:
    """Config and weights of a whole HFCLIPModel, or of transformers' CLIPModel."""
    path = folder / "config.json"
    if not path.is_file():
        raise UsageError(f"{folder}: found no config.json, expected the folder of a model.{advice(folder)}")
    written = read_json(path)
    kind = written.get("model_type")
    if isinstance(kind, str) and kind in FAMILIES:
        raise UsageError(
            f"{folder}: found a model of type {kind!r}, expected hfclip's own folder. Write it first: "
            "HFCLIPModel.from_pretrained opens this one as it is, save_pretrained writes it; likewise HFCLIPProcessor."
        )
    if kind not in ("hfclip", "clip"):
        raise UsageError(f"{folder}: found a model of type {kind!r}, expected a whole CLIP model.")
    if written.get("quantization_config") is not None:
        raise UsageError(
            f"{folder}: found quantised weights, expected plain ones. Start from the model as it was before."
        )
    with as_usage_error(path):
        config = HFCLIPConfig.from_pretrained(folder)
        model = on_meta(HFCLIPModel, config)
    checkpoint = open_checkpoint(folder)
    weights = View(checkpoint, {name: name for name in checkpoint if not name.endswith("position_ids")})
    check_fit(weights.on_meta(), model)
    return config, weights


# Record


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


def build_card(plan: Conversion, out: Path, repo_id: str | None, provenance: dict[str, Any]) -> str:
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


# Command line


def add_paths(
    parser: argparse.ArgumentParser,
    source: str = "a folder of an HFCLIPModel (or of transformers' CLIPModel)",
    out: str = "the folder to write",
) -> argparse.ArgumentParser:
    """Adds what every program here takes: where it reads and where it writes."""
    as_path = lambda text: Path(text).expanduser()  # `~` is the home folder also where the shell does not say so
    parser.add_argument("source", type=as_path, help=source)
    parser.add_argument("out", type=as_path, help=out)
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    return parser


def build_parser(description: str) -> argparse.ArgumentParser:
    """The arguments that all converters have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_paths(parser, source="the checkpoint: a file, or a folder that holds one")
    parser.add_argument(
        "--dtype",
        choices=["keep", *DTYPES],
        default="keep",
        help="precision of the stored weights. `keep` (default) stores each tensor as the source does and loses "
        "nothing; models load in float32 either way unless a dtype is asked for here or there",
    )
    hub = parser.add_argument_group("Hub", "sign in with `hf auth login` first")
    hub.add_argument("--push-to-hub", metavar="REPO", help="publish the result, e.g. me/clip-rn50")
    hub.add_argument("--private", action="store_true", default=None, help="create the repository as a private one")
    hub.add_argument("--revision", help="branch to publish on (default: main)")
    return parser


def parse_options(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line of a converter, refused before any work where it cannot end well."""
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
