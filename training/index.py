"""Counts the samples of remote tars, so that a run knows them before it fetches any (`data.disk`).

    python -m hfclip.training.index 's3://bucket/{00000..39999}.tar'

Every tar is read once, several at a time, and none is kept. After Ctrl-C or a crash the same command goes on. A run on
several machines needs the same file on each: `--upload` puts it beside the tars, where runs find it; else copy it.
"""

import argparse

from hfclip_errors import start_program


if __name__ == "__main__":
    start_program(__file__, __spec__, "train")

from hfclip.data.counts import count_shards, upload
from hfclip.data.shards import cache_folder
from hfclip.errors import UsageError, redact, run


HOW = ("without data.caption_key", "with one")  # samples may be usable or not


def main() -> None:
    parser = argparse.ArgumentParser(description="Counts the samples of remote tars for runs with data.disk.")
    parser.add_argument("url", help="what data.train will be")
    parser.add_argument("--upload", action="store_true", help="put the file beside the tars, for all machines")
    arguments = parser.parse_args()
    if arguments.upload and redact(arguments.url) != arguments.url:
        raise UsageError(
            "--upload: found credentials in the URL, which the file would publish. Leave --upload out, and copy the "
            "file to the same place on each machine."
        )
    path, counted = count_shards(arguments.url, cache_folder())
    counts = [f"{sum(shard.usable[key] for shard in counted)} usable pairs {how}" for key, how in enumerate(HOW)]
    print(f"{len(counted)} tars, {sum(shard.size for shard in counted) / 1e9:,.1f} GB, {', '.join(counts)}: {path}")
    if arguments.upload:
        print(f"Uploaded to {redact(upload(arguments.url, path))}")


if __name__ == "__main__":
    run(main, interrupted="Stopped. The same command goes on from here.")
