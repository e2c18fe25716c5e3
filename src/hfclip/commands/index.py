"""Makes an index of the images in folders, or brings it to what they hold now.

    hfclip index ~/photos --model clip-b32      # the first time
    hfclip index                                # afterwards: all its folders; only new images are embedded
    hfclip index /media/card                    # another folder

Folders below are included. Names that begin with a dot are left out, and so is what a file `.hfclipignore` names, in
the syntax of .gitignore. What cannot be read is counted by kind and listed. Ctrl-C keeps what is done.

exit codes: 0 done, 2 wrong usage, 130 stopped with Ctrl-C
"""

import argparse
import sys

from hfclip_errors import require_extra, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", metavar="FOLDER", help="default: those of the index")
    parser.add_argument("--model", help="a CLIP folder, or its name on the Hub (default: that of the index)")
    parser.add_argument("--store", help="the index's own folder (default: ~/.cache/hfclip/search)")
    parser.add_argument("--include-hidden", action="store_true", help="hidden files and folders of the system, too")
    options = parser.parse_args()
    require_extra("search")
    from tqdm import tqdm

    from hfclip.search import ImageIndex

    with tqdm(desc="indexing", unit="image", disable=None, leave=False) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        options = {**vars(options), "progress": show}
        index = ImageIndex.build(options.pop("folders"), **options)
    print(f"{len(index):,} images in {index.store.folder}: {index.last_update}")
    if problems := index.snapshot().problems:
        print(f"{len(problems):,} files have no row; `{index.store.problems_file()}` lists them.", file=sys.stderr)


if __name__ == "__main__":
    run(main, "Stopped. What is done is kept; the same command goes on from here.")
