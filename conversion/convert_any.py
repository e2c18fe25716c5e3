"""A checkpoint of OpenAI, OpenCLIP or transformers -> a model folder, by the converter that it belongs to.

    hfclip convert ViT-B-32.pt clip-b32 --merges bpe_simple_vocab_16e6.txt.gz
    hfclip convert CLIP-ViT-B-32-laion2B clip-b32-laion
    hfclip convert openai/clip-vit-base-patch32 clip-b32-hf                      # a name on the Hub
    hfclip convert epoch_32.pt clip-b32-mine --from openclip                     # where tensors cannot tell

SOURCE and OUT come first, the converter's own options after them: `hfclip convert --help --from openclip` lists those of
OpenCLIP's.
"""

import argparse
import importlib
import sys
from pathlib import Path

from hfclip_errors import start_program


if __name__ == "__main__":
    start_program(__file__, __spec__, "convert")

from hfclip.errors import UsageError
from hfclip.foreign.checkpoints import open_checkpoint
from hfclip.foreign.whose import PROGRAMS, kinds_of_folder, kinds_of_tensors

from .convert import run


KINDS = ("openai", "openclip", "transformers")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False, allow_abbrev=False
    )
    parser.add_argument("--from", dest="kind", choices=KINDS, help="whose it is (default: told by its files)")
    options, rest = parser.parse_known_args()
    if options.kind is None and ({"-h", "--help"} & {*rest} or not rest):
        parser.print_help()
        parser.exit()
    if options.kind is None and rest[0].startswith("-"):
        raise UsageError(f"found {rest[0]!r} first, expected SOURCE and OUT. The options come after them.")
    kind = options.kind or find_kind(Path(rest[0]).expanduser())
    sys.argv[1:] = rest
    importlib.import_module(f".convert_{kind}", __package__).main()


def find_kind(source: Path) -> str:
    """The converter of a checkpoint, "openai", "openclip" or "transformers".

    Raises:
        UsageError: none takes it, or tensors alone cannot tell two apart.
    """
    if not source.exists():
        return "transformers"  # a name on the Hub, or a mistake that its converter tells
    kinds = kinds_of_folder(source) or kinds_of_tensors(open_checkpoint(source))
    if not kinds:
        raise UsageError(f"{source}: found no tensors of a CLIP that is known, expected one of {', '.join(KINDS)}.")
    if kinds == ["hfclip"]:
        raise UsageError(f"{source}: found {PROGRAMS['hfclip'][0]}. Use {PROGRAMS['hfclip'][1]}.")
    if kinds == ["openai", "openclip"]:
        raise UsageError(
            f"{source}: found names that OpenAI and OpenCLIP both write; they differ in the activation, which tensors "
            "cannot tell. Add --from openai or --from openclip."
        )
    return kinds[0]


if __name__ == "__main__":
    run(main)
