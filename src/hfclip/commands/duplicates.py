"""Finds images of an index that are alike: copies, other sizes, other formats, crops.

    hfclip duplicates                               # groups, the largest image of each first
    hfclip duplicates --paths                       # all but the largest of each
    hfclip duplicates -0 | xargs -0 gio trash

All pairs are compared. Nothing is removed.

exit codes: 0 found, 1 found none, 2 wrong usage
"""

import argparse
import json
import sys

from hfclip.commands.search import add_store, open_index, print_paths, printable
from hfclip_errors import run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_store(parser)
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.98,
        help="cosine from which on two images are alike (default: %(default)s)",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="a list of images per line, one for each group")
    form.add_argument("--paths", action="store_true", help="all but the largest of each group, one per line")
    form.add_argument("-0", "--null", action="store_true", help="the same, each ended by a null character")
    options = parser.parse_args()
    index = open_index(options)
    from hfclip.search.whole import duplicates

    groups = duplicates(index, options.threshold)
    for group in groups:
        if options.json:
            print(json.dumps([vars(hit) for hit in group]))
        elif options.paths or options.null:
            print_paths(group[1:], options)
        else:
            print(*(f"{hit.score:.3f}\t{hit.width} x {hit.height}\t{printable(hit.path)}" for hit in group), sep="\n")
            print()
    if not groups:
        print("found no duplicates", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run(main)
