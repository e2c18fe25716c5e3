"""An index of images -> the forms that other programs read.

hfclip export ~/.cache/hfclip/search photos.parquet --to parquet    # one table, with the embeddings
hfclip export ~/.cache/hfclip/search photos --to npy                # embeddings.npy and files.parquet
hfclip export ~/.cache/hfclip/search http://localhost:6333 --to qdrant
hfclip export ~/.cache/hfclip/search photos.usearch --to usearch    # a graph for approximate search
"""

import argparse
import os

from hfclip_errors import UsageError, require_extra, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", help="the index's own folder")
    parser.add_argument("out", help="a new file or folder; for qdrant the address of a server, too")
    parser.add_argument("--to", required=True, choices=("npy", "parquet", "qdrant", "usearch"), help="for whom")
    options = parser.parse_args()
    require_extra("search")
    if options.to in ("qdrant", "usearch"):
        require_extra(options.to)
    if os.path.exists(options.out):
        raise UsageError(f"{options.out} exists, expected a new name.")
    from hfclip.search import ImageIndex
    from hfclip.search.whole import EXPORTS

    index = ImageIndex.open(options.store)
    if not len(index):
        raise UsageError(f"{options.store} holds no image.")
    EXPORTS[options.to](index, options.out)
    print(f"Written: {options.out}")


if __name__ == "__main__":
    run(main)
