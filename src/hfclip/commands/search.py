"""Finds images of an index by words and by images.

    hfclip search two parrots                       # the 10 best, those that match strongly first
    hfclip search two parrots + beach - 2:people    # sums and differences of words, with weights
    hfclip search ./sketch.png + red                # a file is an image
    hfclip search sunset --where "folder=Spain after=2020-05 width>1000" --top 50
    hfclip search sunset --strong -0 | xargs -0 cp -t best/

Scores of different queries cannot be compared. z says by how many standard deviations an image is above the mean of all
images for this query; a line divides strong matches from weak ones at the largest gap. A few words are also embedded in
sentences such as "a photo of ...", which are averaged.

exit codes: 0 found, 1 found nothing, 2 wrong usage
"""

import argparse
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

from hfclip_errors import UsageError, require_extra, run


if TYPE_CHECKING:
    from hfclip.search import Found, Hit, ImageIndex, Query


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("query", nargs="+", metavar="WORD", help="words, files of images, + and -")
    add_options(parser)
    options = parser.parse_args()
    index = open_index(options)
    show(index.search(read_query(options.query), options.top, options.where), options)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds what `search` and `similar` share."""
    add_store(parser)
    parser.add_argument("--top", type=int, default=10, metavar="N", help="at most N images (default: %(default)s)")
    parser.add_argument("--where", metavar="CONDITIONS", help="folder= name= after= before= width> height< size>")
    parser.add_argument("--strong", action="store_true", help="strong matches alone")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON object per line")
    form.add_argument("--paths", action="store_true", help="paths alone, one per line")
    form.add_argument("-0", "--null", action="store_true", help="paths alone, each ended by a null character")
    form.add_argument("--open", action="store_true", help="open the images in the system's viewer")


def add_store(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--store", help="the index's own folder (default: ~/.cache/hfclip/search)")
    parser.add_argument("--model", help="where the model of the index is now, if it was moved")


def open_index(options: argparse.Namespace) -> "ImageIndex":
    require_extra("search")
    from hfclip.search import ImageIndex

    sys.stdout.reconfigure(errors="surrogateescape")  # paths are bytes, some of them no text
    return ImageIndex.open(options.store, options.model)


def read_query(words: list[str]) -> "Query":
    """The query of a command line, in which files are images.

    Raises:
        UsageError: a file that cannot be opened.
    """
    from hfclip.open_image_hfclip import open_image
    from hfclip.search import Query, parse_query

    terms = []
    for weight, term in parse_query(" ".join(words)).terms:
        if os.path.isfile(term):
            try:
                term = open_image(term)
            except ValueError as error:
                raise UsageError(f"{term}: {error}") from error
        terms.append((weight, term))
    return Query(tuple(terms))


def show(found: "Found", options: argparse.Namespace) -> None:
    hits = found.hits[: found.strong] if options.strong else found.hits
    if options.open:
        opener = {"darwin": "open", "win32": "explorer"}.get(sys.platform, "xdg-open")
        for hit in hits:
            subprocess.run([opener, hit.path], check=False)
    elif options.json:
        for place, hit in enumerate(hits):
            print(json.dumps({**vars(hit), "strong": place < found.strong}))
    elif options.paths or options.null:
        print_paths(hits, options)
    else:
        for place, hit in enumerate(hits):
            if place == found.strong:
                print("-- weaker --")
            print(f"{hit.score:.3f}\tz {hit.z:.1f}\t{printable(hit.path)}")
    if not hits:
        print("found nothing", file=sys.stderr)
        sys.exit(1)


def print_paths(hits: list["Hit"], options: argparse.Namespace) -> None:
    for hit in hits:
        print(hit.path, end="\0" if options.null else "\n")


def printable(path: str) -> str:
    """A path on one line, whatever it holds."""
    return "".join(sign if sign.isprintable() or sign > "\ud7ff" else repr(sign)[1:-1] for sign in path)


if __name__ == "__main__":
    run(main)
