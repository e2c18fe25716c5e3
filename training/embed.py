"""Stores the embeddings of a data set: to read with `hfclip.embeddings`, or to distill from with `distill.embeddings`.

    hfclip embed --model clip-b32 --data 'shards/{0000..0099}.tar' --out embeddings
    accelerate launch -m hfclip.training.embed ...                                  # shared by several processes

All images and all captions are embedded once, with the model's own image processor and tokenizer; images are whole
central squares. An interrupted command goes on where it was when it is given again, on any number of processes; the
folder has its name when it is complete. `hfclip.embeddings` says how, and opens it.
"""

import argparse
import os
from pathlib import Path

from hfclip_errors import start_program


if __name__ == "__main__":
    start_program(__file__, __spec__, "train")

import torch
import yaml

from hfclip.embeddings import embed
from hfclip.errors import UsageError, redact, run
from hfclip.names import opening
from hfclip.precision import PRECISIONS

from .config import DataConfig
from .data.batches import open_data
from .machine import computes_on_cpu, num_workers, tune_cpu
from .objectives.teacher import load_teacher


SAME_AS = ("split", "image_key", "caption_key", "max_samples")  # as the trainer's settings of data


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    out = store(arguments)
    if os.environ.get("RANK", "0") == "0":
        print(
            f"The embeddings are in {out}. Read them:\n    hfclip.embeddings.Embeddings.open({str(out)!r}).image_embeds\n"
            f"Or train a student of this model with\n    --distill.embeddings {out}"
        )


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Stores the embeddings of a data set, to read with hfclip.embeddings or to distill from.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add, defaults = parser.add_argument, DataConfig()
    add("--model", required=True, help="an hfclip or transformers CLIP folder, or its name on the Hub")
    add("--data", required=True, help="what data.train will be; a mixture as {name: weight, ...}")
    add("--out", required=True, type=Path, help="the folder to make")
    for name in SAME_AS:
        kind = int if name == "max_samples" else str
        add(f"--{name.replace('_', '-')}", type=kind, default=getattr(defaults, name), help=f"as data.{name}")
    add("--num-workers", type=int, help="processes that read and decode; else as many as the machine has cores for")
    add("--batch-size", type=int, help="images, or captions, at a time; else 32 on a CPU and 256 on a GPU")
    add("--precision", choices=["auto", *PRECISIONS], default="auto", help="as run.precision")
    return parser.parse_args(argv)


def store(arguments: argparse.Namespace) -> Path:
    """Makes the folder `out`, going on with what an interrupted command left; a complete one stays as it is.

    Raises:
        UsageError: if it holds something else, or the data or the teacher do not exist.
    """
    if (arguments.batch_size or 1) < 1 or (arguments.num_workers or 0) < 0:
        raise UsageError("--batch-size must be at least 1, and --num-workers at least 0.")
    try:
        name = yaml.safe_load(arguments.data) if arguments.data.startswith("{") else arguments.data
    except yaml.YAMLError as error:
        raise UsageError(f"--data: found {arguments.data!r}, expected a name or {{name: weight, ...}}.") from error
    config = DataConfig(train=name, **{key: getattr(arguments, key) for key in SAME_AS})
    if computes_on_cpu():
        device = torch.device("cpu")
        tune_cpu()
    else:
        device = torch.device(torch.accelerator.current_accelerator().type, int(os.environ.get("LOCAL_RANK", "0")))
        if device.index:
            torch.accelerator.set_device_index(device.index)
    with opening(arguments.model, "--model"):
        model, processor = load_teacher(os.path.expanduser(arguments.model), device)
    source = open_data(name, config, config.split, model.config.image_size)
    embed(
        model,
        processor,
        source,
        folder=arguments.out,
        batch_size=arguments.batch_size,
        num_workers=num_workers(arguments.num_workers),
        precision=arguments.precision,
        dtype="float16",
        name=redact(arguments.model),
    )
    return arguments.out.expanduser()


if __name__ == "__main__":
    run(main, interrupted="Stopped. The same command goes on from here.")
