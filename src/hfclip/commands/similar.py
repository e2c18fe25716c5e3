"""Finds the images of an index that are like one, which need not be in it.

    hfclip similar photo.jpg
    hfclip similar photo.jpg --where folder=Spain --json

exit codes: 0 found, 1 found nothing, 2 wrong usage
"""

import argparse
import os
from dataclasses import replace

from hfclip.commands.search import add_options, open_index, read_query, show
from hfclip_errors import UsageError, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", metavar="IMAGE", help="a file")
    add_options(parser)
    options = parser.parse_args()
    if not os.path.isfile(options.image):
        raise UsageError(f"found no file {options.image!r}, expected an image.")
    index = open_index(options)
    own = index.find(options.image)
    from hfclip.search import Query

    query = read_query([options.image]) if own is None else Query(((1, own),))
    found = index.search(query, options.top + 1, options.where)
    others = [hit for hit in found.hits if hit.id != own]
    strong = max(found.strong - (len(others) < len(found.hits)), 0)
    show(replace(found, hits=others[: options.top], strong=strong), options)


if __name__ == "__main__":
    run(main)
