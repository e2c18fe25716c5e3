"""Sorts the images of an index by labels given in words.

    hfclip sort --labels labels.txt                     # prints which image would go where
    hfclip sort --labels labels.txt --out sorted        # makes a folder per label, with links to the images
    hfclip sort --labels labels.txt --out sorted --copy

The file has a label per line. Images stay where they are.

exit codes: 0 done, 2 wrong usage
"""

import argparse
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from hfclip.commands.search import add_store, open_index, printable
from hfclip_errors import UsageError, as_usage_error, run


if TYPE_CHECKING:
    from hfclip.search import Hit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_store(parser)
    parser.add_argument("--labels", type=Path, required=True, metavar="FILE", help="what to tell apart, one per line")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="a new folder, for a folder per label")
    parser.add_argument("--copy", action="store_true", help="copies in place of links")
    options = parser.parse_args()
    with as_usage_error("--labels"):
        labels = [line.strip() for line in options.labels.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not labels:
        raise UsageError(f"--labels: found none in {options.labels}, expected one per line.")
    if options.out is not None and options.out.exists():
        raise UsageError(f"--out: {options.out} exists, expected the name of a new folder.")
    index = open_index(options)
    from hfclip.search.whole import sort_by_labels

    for label, hit in sort_by_labels(index, labels):
        if options.out is None:
            print(f"{label}\t{hit.score:.3f}\t{printable(hit.path)}")
        else:
            put(hit, options.out / label.replace(os.sep, "_"), options.copy)


def put(hit: "Hit", folder: Path, copy: bool) -> None:
    """Links or copies an image into a folder, by its own name or, if that is taken, by its id."""
    folder.mkdir(parents=True, exist_ok=True)
    name = os.path.basename(hit.path)
    target = folder / name
    if os.path.lexists(target):
        target = folder / f"{hit.id}{os.path.splitext(name)[1]}"
    if copy:
        shutil.copy2(hit.path, target)
    else:
        target.symlink_to(hit.path)


if __name__ == "__main__":
    run(main)
