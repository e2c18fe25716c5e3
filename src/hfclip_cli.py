"""The command `hfclip`: a verb is one row of a table, and a program that also runs by itself.

A module beside the package because `import hfclip` imports torch, which takes seconds: help is shown before that.
"""

import difflib
import importlib.metadata
import logging
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from hfclip_errors import UsageError, require_extra, run


def run_program(module: str, arguments: list[str]) -> None:
    runpy.run_module(module, run_name="__main__")


def launch_program(module: str, arguments: list[str]) -> None:
    """Runs a program by `accelerate launch`, and ends as it does; what stands before "--" is the launcher's own.

    Ctrl-C and SIGTERM are the program's, which saves and has the last word.
    """
    require_extra("train")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # see training/threads.py: to be set before torch is imported
    split = arguments.index("--") if "--" in arguments else 0
    own, rest = arguments[:split], arguments[split + ("--" in arguments) :]
    if {"-h", "--help"} & {*rest}:
        sys.argv[1:] = rest
        return run_program(module, rest)
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    for name in ("accelerate.commands.launch", "torch.distributed.elastic"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # its defaults, and what the program has said already
    options = launch_command_parser().parse_args([*own, "-m", module, *rest])
    options.signals_to_handle = "SIGHUP,SIGQUIT"  # of torchrun, which would leave the program 30 seconds
    received, status = [], 0
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: _pass_on(number, received))
    try:
        launch_command(options)
    except subprocess.CalledProcessError as error:
        status = error.returncode
    except ChildFailedError as error:
        status = error.get_first_failure()[1].exitcode
    status = 128 - status if status < 0 else status
    sys.exit(status or (128 + signal.SIGINT if signal.SIGINT in received else 0))


def export(module: str, arguments: list[str]) -> None:
    """Exports an index of images, if the first argument is one, else a model."""
    is_index = bool(arguments) and os.path.isfile(os.path.join(arguments[0], "store.json"))
    run_program("hfclip.commands.export_index" if is_index else module, arguments)


def _pass_on(number: int, received: list[int]) -> None:
    """Sends a signal to this process' children, which may have it from the terminal, too; without any, ends this one."""
    import psutil

    received.append(number)
    children = psutil.Process().children()
    if not children:
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
    for child in children:
        with suppress(psutil.NoSuchProcess):  # it has ended
            child.send_signal(number)


class Verb(NamedTuple):
    module: str
    does: str
    example: str
    start: Callable[[str, list[str]], None] = run_program


VERBS = {
    "train": Verb(
        "hfclip.training.pretrain",
        "trains or fine-tunes a model; launcher options stand before --",
        "hfclip train --num_processes 8 -- --data.train 'shards/{000..099}.tar' --model.preset ViT-B/32",
        launch_program,
    ),
    "plan": Verb(
        "hfclip.training.plan",
        "predicts memory, time and bottleneck of a run",
        "hfclip plan --config vit_l_14 --world 64 --device a100",
    ),
    "embed": Verb(
        "hfclip.training.embed",
        "stores the embeddings of a data set",
        "hfclip embed --model FOLDER --data 'shards/{000..099}.tar' --out embeddings",
    ),
    "classify": Verb(
        "hfclip.commands.classify",
        "sorts images into labels given in words",
        "hfclip classify photos/ --model FOLDER --labels cat,dog --top-k 1",
    ),
    "index": Verb(
        "hfclip.commands.index",
        "makes an index of the images in folders, or brings it up to date",
        "hfclip index ~/photos --model FOLDER",
    ),
    "search": Verb(
        "hfclip.commands.search",
        "finds images of an index by words and by images",
        "hfclip search two parrots + beach --top 20",
    ),
    "similar": Verb(
        "hfclip.commands.similar",
        "finds images of an index that are like one",
        "hfclip similar photo.jpg",
    ),
    "duplicates": Verb(
        "hfclip.commands.duplicates",
        "finds images of an index that are alike",
        "hfclip duplicates -0 | xargs -0 gio trash",
    ),
    "sort": Verb(
        "hfclip.commands.sort",
        "sorts the images of an index into folders of labels, by links or copies",
        "hfclip sort --labels labels.txt --out sorted",
    ),
    "serve": Verb(
        "hfclip.commands.serve",
        "serves image search to browsers: a page and a JSON API",
        "hfclip serve --port 7860",
    ),
    "evaluate": Verb(
        "hfclip.commands.evaluate",
        "measures a model on data: zero-shot accuracy, retrieval ...",
        "hfclip evaluate zero-shot --model FOLDER --data cifar10/test",
    ),
    "report": Verb(
        "hfclip.commands.report",
        "makes a page of results, with plots and the paper's numbers",
        "hfclip report results --out report",
    ),
    "info": Verb(
        "hfclip.commands.info",
        "says what a model folder holds",
        "hfclip info FOLDER",
    ),
    "models": Verb(
        "hfclip.commands.models",
        "lists well-known models and where they are",
        "hfclip models siglip 384",
    ),
    "convert": Verb(
        "hfclip.conversion.convert_any",
        "makes a model folder of a checkpoint of OpenAI, OpenCLIP or transformers",
        "hfclip convert ViT-B-32.pt clip-b32",
    ),
    "export": Verb(
        "hfclip.conversion.export",
        "brings a model to ONNX, OpenAI, OpenCLIP or transformers, an index to parquet, npy or Qdrant",
        "hfclip export clip-b32 clip-b32-onnx --to onnx",
        start=export,
    ),
    "push": Verb(
        "hfclip.conversion.push_to_hub",
        "publishes a model folder on the Hugging Face Hub",
        "hfclip push clip-b32 me/clip-b32 --dry-run",
    ),
}


def main() -> None:
    run(dispatch)


def dispatch() -> None:
    verb, *arguments = sys.argv[1:] or ["--help"]
    if verb in ("-h", "--help", "help"):
        print(help_text())
    elif verb == "--version":
        print(importlib.metadata.version("hfclip"))
    elif verb in VERBS:
        sys.argv[:] = [f"hfclip {verb}", *arguments]
        VERBS[verb].start(VERBS[verb].module, arguments)
    else:
        close = difflib.get_close_matches(verb, VERBS, 1)
        meant = f"Did you mean {close[0]!r}?" if close else "`hfclip --help` explains them."
        raise UsageError(f"found no verb {verb!r}, expected one of {', '.join(VERBS)}. {meant}")


def help_text() -> str:
    lines = ["usage: hfclip VERB ...      hfclip VERB --help explains a verb", "", "verbs:"]
    for name, verb in VERBS.items():
        lines += [f"  {name:<11}{verb.does}", f"             $ {verb.example}"]
    return "\n".join(
        [
            *lines,
            "",
            "exit codes: 0 done, 1 failed, wholly or partly, 2 wrong usage, 130 stopped with Ctrl-C",
        ]
    )
