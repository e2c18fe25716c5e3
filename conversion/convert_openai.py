"""OpenAI's CLIP checkpoints -> model folders.

    hfclip convert ViT-B-32.pt clip-vit-b-32 --merges bpe_simple_vocab_16e6.txt.gz
    hfclip convert RN50.pt clip-rn50 --dtype float16 --push-to-hub me/clip-rn50

The source is one of the nine archives that OpenAI published, or any state dict in their names (.pt, .bin or
.safetensors). It is read as data; no code in it is run. The architecture follows from the tensors' shapes. The folder
opens with AutoModel, AutoProcessor and pipeline("zero-shot-image-classification").
"""

from pathlib import Path

from hfclip_errors import start_program


if __name__ == "__main__":
    start_program(__file__, __spec__, "convert")

from hfclip.errors import UsageError
from hfclip.foreign.checkpoints import Checkpoint
from hfclip.foreign.openai import plan_openai
from hfclip.foreign.plan import Choices

from .convert import build_parser, conversion_of, convert, open_source, parse_options, run, say
from .reference_settings import openai_features


# SHA-256 of the published files, as they stand in their addresses in OpenAI's clip.py.
PUBLISHED = {
    "RN50.pt": "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762",
    "RN101.pt": "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599",
    "RN50x4.pt": "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd",
    "RN50x16.pt": "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa",
    "RN50x64.pt": "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c",
    "ViT-B-32.pt": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "ViT-B-16.pt": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    "ViT-L-14.pt": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    "ViT-L-14-336px.pt": "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
}


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument(
        "--merges", metavar="FILE", help="OpenAI's bpe_simple_vocab_16e6.txt.gz (default: from the Hub)"
    )
    parser.add_argument(
        "--any-hash", action="store_true", help="accept a file under a published name with another SHA-256"
    )
    options = parse_options(parser)
    checkpoint = open_source("openai", options.source)
    conversion = conversion_of(plan_openai(checkpoint, Choices(merges=options.merges)), openai_features)
    if not check_hash(checkpoint, options.any_hash):
        conversion.notes.append(
            "taken for a model as OpenAI built them, with QuickGELU and 64 units a head, which tensors cannot tell. "
            "OpenCLIP's checkpoints need --from openclip."
        )
    convert(conversion, options.out, options)


def check_hash(checkpoint: Checkpoint, any_hash: bool) -> bool:
    """Says and returns whether the file is one that OpenAI published."""
    name, found = Path(checkpoint.path).name, checkpoint.sha256()
    known = {digest: published for published, digest in PUBLISHED.items()}
    if found in known:
        say(f"SHA-256 matches OpenAI's {known[found]}.")
    elif name in PUBLISHED and not any_hash:
        raise UsageError(
            f"{checkpoint.path} has the SHA-256 {found}, expected {PUBLISHED[name]} of OpenAI's {name}. Fetch it again, "
            "rename it if it is a model of your own, or pass --any-hash."
        )
    else:
        say(f"SHA-256 {found}, none of OpenAI's nine.")
    return found in known


if __name__ == "__main__":
    run(main)
