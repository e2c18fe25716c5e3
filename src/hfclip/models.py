"""Well-known models by name: where they are, what they are, and what was measured of them. Nothing is fetched to say so.

models.csv has a row per checkpoint, the nine published architectures first: parameters are in millions, `imagenet` is the
zero-shot top-1 accuracy in percent that `source` publishes, empty where none is known. `license` is what the model's card
on the Hub said when it was read in 2025, empty where it was not read or, as OpenAI's, says none: read it before you rely
on a model. Addresses of OpenCLIP's files are those that open_clip itself knows, but for BiomedCLIP's.
"""

import csv
import difflib
import functools
from dataclasses import dataclass
from pathlib import Path

from .presets_hfclip import PRESETS


SOURCES = {
    "open_clip": "https://github.com/mlfoundations/open_clip/blob/89fb801/docs/openclip_results.csv",
    "siglip2": "https://github.com/google-research/big_vision/blob/1659d42/big_vision/configs/proj/image_text/README_siglip2.md",
    "pe": "https://github.com/facebookresearch/perception_models/blob/44e61d1/apps/pe/README.md",
    "mobileclip": "https://github.com/apple/ml-mobileclip/blob/1140b8d/README.md",
    "mobileclip2": "https://huggingface.co/apple/MobileCLIP2-B/blob/main/README.md",
}


@dataclass(frozen=True)
class ListedModel:
    """A row of models.csv.

    hub: its address on the Hub. family: who trained it, or how. format: whose files they are, `transformers` or
    `openclip`. needs: what has to be installed beside hfclip. width: dimensions of its embeddings. logits: `softmax`, or
    `sigmoid` with a bias.
    """

    name: str
    hub: str
    family: str
    format: str
    needs: str
    image_size: int | None
    parameters: float | None
    width: int | None
    logits: str
    license: str
    imagenet: float | None
    source: str

    @property
    def is_preset(self) -> bool:
        """Whether `HFCLIPConfig.from_preset` knows the architecture by this name."""
        return self.name in PRESETS

    @property
    def opens(self) -> str:
        """What opens it."""
        needs = f"  # pip install {self.needs}" if self.needs else ""
        return f'HFCLIPModel.from_pretrained("{self.hub}"){needs}'


def list_models(*words: str) -> list[ListedModel]:
    """The models whose names, addresses, families, logits or licences hold all `words`, whatever their case."""

    def holds(model: ListedModel) -> bool:
        text = " ".join((model.name, model.hub, model.family, model.format, model.logits, model.license)).lower()
        return all(word.lower() in text for word in words)

    return [model for model in _read() if holds(model)]


def nearest_model(name: str) -> str:
    """A sentence on the model that is nearest to a name or address that nobody knows; empty if none is near."""
    hubs = {
        key.lower(): model.hub for model in _read() for key in (model.name, model.name.replace("/", "-"), model.hub)
    }
    near = difflib.get_close_matches(name.lower(), hubs, n=1, cutoff=0.8)
    return f"Did you mean {hubs[near[0]]!r}?" if near and hubs[near[0]] != name else ""


@functools.cache
def _read() -> tuple[ListedModel, ...]:
    with open(Path(__file__).with_name("models.csv"), encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    kinds = {"image_size": int, "parameters": float, "width": int, "imagenet": float}
    for row in rows:
        row.update({key: kind(row[key]) if row[key] else None for key, kind in kinds.items()})
    return tuple(ListedModel(**row) for row in rows)
