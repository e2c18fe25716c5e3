"""Lists well-known models: address on the Hub, resolution, parameters, embeddings, logits, licence, ImageNet zero-shot.

hfclip models                    # all
hfclip models siglip 384         # those that hold all words
hfclip models sigmoid --json     # one JSON object per line

Nothing is fetched. Accuracies are what the source publishes: `--json` names it.
"""

import argparse
import dataclasses
import json

from hfclip.errors import UsageError, run
from hfclip.models import SOURCES, ListedModel, list_models


COLUMNS = {
    "name": lambda model: model.name,
    "hub": lambda model: model.hub,
    "pixels": lambda model: model.image_size,
    "params": lambda model: model.parameters and f"{model.parameters:,.0f} M",
    "width": lambda model: model.width,
    "logits": lambda model: model.logits,
    "licence": lambda model: model.license,
    "ImageNet": lambda model: model.imagenet and f"{model.imagenet:.1f} %",
    "needs": lambda model: model.needs,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="WORD", help="only models whose row holds all words")
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    options = parser.parse_args()
    found = list_models(*options.words)
    if not found:
        raise UsageError(f"found no model with {' and '.join(map(repr, options.words))}. `hfclip models` lists all.")
    if options.json:
        for model in found:
            print(json.dumps(as_object(model), ensure_ascii=False))
        return
    table = [list(COLUMNS), *([str(value(model) or "") for value in COLUMNS.values()] for model in found)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def as_object(model: ListedModel) -> dict:
    known = {key: value for key, value in dataclasses.asdict(model).items() if value not in (None, "")}
    source = {"source": SOURCES[model.source]} if model.source else {}
    return {**known, **source, "preset": model.is_preset, "opens": model.opens}


if __name__ == "__main__":
    run(main)
