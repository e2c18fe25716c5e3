"""Publishes a model folder to the Hugging Face Hub, whole, as one commit.

    hfclip push runs/clip/model anna/clip-birds --dry-run    # what would be sent; no network
    hfclip push runs/clip/model anna/clip-birds --private    # a repository that only you can see
    hfclip push runs/clip/checkpoint-5000 anna/clip-birds --revision step-5000

FOLDER is what training or conversion wrote: config.json, model.safetensors (or its shards), tokenizer, processor and
the code that travels with them. It is checked before anything is sent. Beside these go the model card and other *.md,
LICENSE, conversion.json, onnx/*.onnx and images (*.png, *.jpg); all else in FOLDER is left out, and named. Large files
go first; the model becomes visible with the commit at the end, never in part.

Log in once with `hf auth login`, or set HF_TOKEN, with a token that may write. A push that broke off, or that was
stopped with Ctrl-C, is continued by the same command: what was uploaded is not sent again.

Exit codes: 0 published (or listed, or there already), 1 the Hub refused or was not reached, 2 wrong usage or a folder
that is no model, 130 stopped with Ctrl-C.
"""

import argparse
import sys
import warnings

from hfclip.errors import run
from hfclip.hub import end_on_interrupt, push


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", help="the saved model")
    parser.add_argument("repo_id", metavar="REPO_ID", help="user/name or organization/name; made where it is missing")
    visibility = parser.add_mutually_exclusive_group()
    visibility.add_argument("--private", action="store_true", default=None, help="only you can see the repository")
    visibility.add_argument(
        "--public", action="store_false", dest="private", help="all can see it (default: your account's setting)"
    )
    parser.add_argument("--revision", metavar="BRANCH", help="branch, made from main where it is missing (main)")
    parser.add_argument("--message", metavar="TEXT", dest="commit_message", help="message of the commit")
    parser.add_argument("--dry-run", action="store_true", help="check the folder and list what would be sent")
    arguments = parser.parse_args()
    end_on_interrupt("Stopped. The same command continues: what was uploaded is not sent again.")
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    push(**vars(arguments))


if __name__ == "__main__":
    run(main)
