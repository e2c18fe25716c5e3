"""OpenCLIP's checkpoints -> model folders.

    hfclip convert CLIP-ViT-B-32-laion2B-s34B-b79K clip-b32-laion    # a folder from the Hub
    hfclip convert epoch_32.pt my-clip --merges bpe_simple_vocab_16e6.txt.gz
    hfclip convert epoch_32.pt my-clip --model ViT-B-32-quickgelu --merges ...

The source is a folder with open_clip_config.json and weights, or a training checkpoint (.pt, .bin, .safetensors). The
architecture of a ViT or ResNet of OpenCLIP follows from shapes (`openclip_shapes`); what no shape tells, such as
QuickGELU, from the name of the run or of `--model`. Others need the JSON of theirs: a file, or the name of one that an
installed open_clip knows. Prefixes such as `module.` are removed and optimizer states left aside; of several sets of
weights (EMA) `--weights` chooses one.

Converted are OpenCLIP's own ViT, ResNet and text towers with all their activations, masks, poolings, context lengths
and vocabularies, trained with the contrastive or the sigmoid loss; SigLIP, image towers of timm, and BERT-like text
towers of transformers (`foreign/towers.py`). Whatever has no counterpart is refused with its reason, such as other
attention blocks. Of CoCa the decoder is left aside. See docs/conversion.md.
"""

from hfclip_errors import start_program


if __name__ == "__main__":
    start_program(__file__, __spec__, "convert")

from hfclip.foreign.openclip import plan_openclip
from hfclip.foreign.plan import Choices
from hfclip.foreign_hfclip import OPENCLIP_CONFIG

from .convert import build_parser, conversion_of, convert, open_source, parse_options, run
from .reference_towers import openclip_features


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument(
        "--model",
        metavar="NAME",
        help=f"the architecture, where the source is no folder with {OPENCLIP_CONFIG}: OpenCLIP's name, or its JSON file "
        "(default: told by shapes)",
    )
    parser.add_argument("--weights", metavar="NAME", help="which weights of a training checkpoint, e.g. state_dict")
    parser.add_argument(
        "--merges", metavar="FILE", help="OpenAI's bpe_simple_vocab_16e6.txt.gz (default: from the Hub)"
    )
    parser.add_argument("--tokenizer", metavar="NAME", help="tokenizer of another vocabulary: a folder or a Hub name")
    parser.add_argument(
        "--text-model", metavar="NAME", help="config of a text tower of transformers: a folder or a Hub name"
    )
    options = parse_options(parser)
    checkpoint = open_source("openclip", options.source)
    choices = Choices(
        folder=options.source if options.source.is_dir() else None,
        architecture=options.model,
        **{name: getattr(options, name) for name in ("weights", "tokenizer", "merges", "text_model")},
    )
    plan = plan_openclip(checkpoint, choices)
    convert(conversion_of(plan, *openclip_features(plan.model_cfg, plan.config.text_config)), options.out, options)


if __name__ == "__main__":
    run(main)
