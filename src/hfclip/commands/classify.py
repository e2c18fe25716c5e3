"""Sorts images into labels given in words.

    hfclip classify photos/ --model FOLDER --labels cat,dog
    hfclip classify 'photos/*.jpg' more/ --model FOLDER --labels-file labels.txt --templates "a photo of a {}." --json

IMAGES are files, folders, which are taken with those below, and patterns of names. Those that cannot be read are named,
and the others classified. With --json each line of the output is an object: {"image", "labels": [{"label", "score"}]},
or {"image", "error"}.

exit codes: 0 done, 1 some images could not be read, 2 wrong usage, 130 stopped with Ctrl-C
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from transformers.utils import logging

from hfclip import HFCLIPModel, HFCLIPProcessor, ZeroShotClassifier
from hfclip.data.image_list import ImageList
from hfclip.embeddings import embed
from hfclip.errors import UsageError, as_usage_error, run
from hfclip.names import opening
from hfclip.zero_shot import DEFAULT_TEMPLATES


def main() -> None:
    options = parse_options()
    labels = read_labels(options)
    images = ImageList(options.images)
    logging.disable_progress_bar()  # of weights; images have one of their own
    with opening(options.model, "--model"):
        model = HFCLIPModel.from_pretrained(options.model).eval()
        processor = HFCLIPProcessor.from_pretrained(options.model)
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    with as_usage_error("--labels, --templates"):
        classifier = ZeroShotClassifier(model, processor, labels, options.templates)
    found = embed(model, processor, images, what=("images",), batch_size=options.batch_size, alone=True)
    ranked = classifier.rank(torch.from_numpy(found.image_embeds), options.top_k)
    for index, (image, best) in enumerate(zip(found.keys, ranked, strict=True)):
        if options.json:
            result = {"error": found.problems[index]} if index in found.problems else {"labels": best}
            print(json.dumps({"image": image, **result}, ensure_ascii=False))
        elif index not in found.problems:
            print(image, *(f"{entry['label']} {entry['score']:.3f}" for entry in best), sep="\t")
    if found.problems:
        problems = [f"  {found.keys[index]}: {problem}" for index, problem in found.problems.items()]
        print(f"{len(problems)} of {len(images)} images cannot be read:", *problems, sep="\n", file=sys.stderr)
        sys.exit(1)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", metavar="IMAGES", help="files, folders, patterns of names")
    parser.add_argument("--model", required=True, help="a CLIP folder, or its name on the Hub")
    labels = parser.add_mutually_exclusive_group(required=True)
    labels.add_argument("--labels", help="what to tell apart, separated by commas")
    labels.add_argument("--labels-file", type=Path, metavar="FILE", help="the same, one per line")
    parser.add_argument(
        "--templates",
        nargs="+",
        default=list(DEFAULT_TEMPLATES),
        metavar="TEXT",
        help=f"sentences with {{}} for the label, whose embeddings are averaged (default: {DEFAULT_TEMPLATES[0]!r})",
    )
    parser.add_argument("--top-k", type=int, default=5, help="labels per image, at most (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, help="images embedded at a time (default: 32 on a CPU, else 256)")
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    options = parser.parse_args()
    if options.top_k < 1 or (options.batch_size or 1) < 1:
        parser.error("--top-k and --batch-size must be at least 1.")
    return options


def read_labels(options: argparse.Namespace) -> list[str]:
    if options.labels is not None:
        lines = options.labels.split(",")
    else:
        with as_usage_error("--labels-file"):
            lines = options.labels_file.read_text(encoding="utf-8").splitlines()
    labels = [line.strip() for line in lines if line.strip()]
    if not labels:
        raise UsageError(f"--labels: found none in {options.labels_file or options.labels!r}, expected at least one.")
    return labels


if __name__ == "__main__":
    run(main)
