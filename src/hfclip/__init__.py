"""CLIP as an ordinary transformers model.

Importing this package registers its classes with transformers' Auto classes, and therefore imports those (and torch).
The trainer is `hfclip.training`, the converters are `hfclip.conversion`.
"""

from pathlib import Path

from ._registration import register_with_auto_classes
from .configuration_hfclip import (
    HFCLIPBagOfWordsConfig,
    HFCLIPConfig,
    HFCLIPResNetConfig,
    HFCLIPTextConfig,
    HFCLIPVisionConfig,
)
from .image_processing_hfclip import HFCLIPImageProcessor
from .inference import ZeroShotImageClassificationPipeline, optimize_for_inference
from .losses import contrastive_loss, sigmoid_loss
from .modeling_hfclip import HFCLIPModel
from .modeling_hfclip_heads import (
    HFCLIPForImageClassification,
    HFCLIPTextModelWithProjection,
    HFCLIPVisionModelWithProjection,
)
from .modeling_hfclip_resnet import HFCLIPResNetModel
from .modeling_hfclip_text import HFCLIPBagOfWordsModel, HFCLIPTextModel
from .modeling_hfclip_transformer import HFCLIPPreTrainedModel, HFCLIPVisionModel
from .models import list_models
from .processing_hfclip import HFCLIPProcessor
from .tokenization_hfclip import HFCLIPTokenizer
from .zero_shot import ZeroShotClassifier


__version__ = "0.1.0"

__all__ = [
    *("HFCLIPConfig", "HFCLIPTextConfig", "HFCLIPVisionConfig", "HFCLIPResNetConfig", "HFCLIPBagOfWordsConfig"),
    *("HFCLIPModel", "HFCLIPForImageClassification", "HFCLIPPreTrainedModel"),
    *("HFCLIPTextModel", "HFCLIPVisionModel", "HFCLIPResNetModel", "HFCLIPBagOfWordsModel"),
    *("HFCLIPTextModelWithProjection", "HFCLIPVisionModelWithProjection"),
    *("HFCLIPTokenizer", "HFCLIPImageProcessor", "HFCLIPProcessor"),
    *("ZeroShotImageClassificationPipeline", "optimize_for_inference"),
    *("ZeroShotClassifier", "contrastive_loss", "sigmoid_loss", "list_models", "__version__"),
]

if not (Path(__file__).parent / "training").is_dir():  # they are in the wheel; in a clone they lie at its top
    __path__.append(str(Path(__file__).parents[2]))

register_with_auto_classes()
