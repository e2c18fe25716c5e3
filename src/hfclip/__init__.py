"""CLIP as an ordinary transformers model.

Importing this package costs next to nothing: its names load on first use, and its classes are registered with
transformers' Auto classes at the moment those are imported.
"""

import importlib
from typing import TYPE_CHECKING

from ._registration import register_with_auto_classes


__version__ = "0.1.0"

_NAMES = {
    "configuration_hfclip": [
        *("HFCLIPConfig", "HFCLIPTextConfig", "HFCLIPVisionConfig", "HFCLIPResNetConfig", "HFCLIPBagOfWordsConfig"),
    ],
    "modeling_hfclip_transformer": [
        *("HFCLIPTextModel", "HFCLIPVisionModel", "HFCLIPBagOfWordsModel", "HFCLIPPreTrainedModel"),
    ],
    "modeling_hfclip": [
        *("HFCLIPModel", "HFCLIPForImageClassification"),
        *("HFCLIPTextModelWithProjection", "HFCLIPVisionModelWithProjection"),
    ],
    "modeling_hfclip_resnet": ["HFCLIPResNetModel"],
    "tokenization_hfclip": ["HFCLIPTokenizer"],
    "image_processing_hfclip": ["HFCLIPImageProcessor"],
    "processing_hfclip": ["HFCLIPProcessor"],
    "zero_shot": ["ZeroShotClassifier"],
    "losses": ["contrastive_loss", "sigmoid_loss"],
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [*_MODULE_OF, "__version__"]

if TYPE_CHECKING:
    from .configuration_hfclip import (
        HFCLIPBagOfWordsConfig,
        HFCLIPConfig,
        HFCLIPResNetConfig,
        HFCLIPTextConfig,
        HFCLIPVisionConfig,
    )
    from .image_processing_hfclip import HFCLIPImageProcessor
    from .losses import contrastive_loss, sigmoid_loss
    from .modeling_hfclip import (
        HFCLIPForImageClassification,
        HFCLIPModel,
        HFCLIPTextModelWithProjection,
        HFCLIPVisionModelWithProjection,
    )
    from .modeling_hfclip_resnet import HFCLIPResNetModel
    from .modeling_hfclip_transformer import (
        HFCLIPBagOfWordsModel,
        HFCLIPPreTrainedModel,
        HFCLIPTextModel,
        HFCLIPVisionModel,
    )
    from .processing_hfclip import HFCLIPProcessor
    from .tokenization_hfclip import HFCLIPTokenizer
    from .zero_shot import ZeroShotClassifier


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_with_auto_classes()
