"""Registers hfclip's classes with transformers' Auto classes and pipelines."""

# The module `transformers` replaces itself during its import: names are available from it once this statement has waited for
# another thread that is in the middle of it.
import transformers  # noqa: F401
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    AutoTokenizer,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES,
)

from .configuration_hfclip import TOWER_CONFIGS, HFCLIPConfig
from .image_processing_hfclip import HFCLIPImageProcessor
from .modeling_hfclip import HFCLIPModel
from .modeling_hfclip_heads import HFCLIPForImageClassification
from .processing_hfclip import HFCLIPProcessor
from .tokenization_hfclip import HFCLIPTokenizer
from .towers_hfclip import TOWERS


def register_with_auto_classes() -> None:
    """Makes each Auto class and `pipeline` open hfclip's folders; a second call changes nothing."""
    for config in (HFCLIPConfig, *TOWER_CONFIGS.values()):
        AutoConfig.register(config.model_type, config, exist_ok=True)

    AutoModel.register(HFCLIPConfig, HFCLIPModel, exist_ok=True)
    for tower in TOWERS.values():
        AutoModel.register(tower.config_class, tower, exist_ok=True)
    AutoModelForZeroShotImageClassification.register(HFCLIPConfig, HFCLIPModel, exist_ok=True)
    AutoModelForImageClassification.register(HFCLIPConfig, HFCLIPForImageClassification, exist_ok=True)
    # Pipelines look names up here, and log an error for a class that they do not find.
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES[HFCLIPConfig.model_type] = HFCLIPForImageClassification.__name__
    MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES[HFCLIPConfig.model_type] = HFCLIPModel.__name__

    AutoTokenizer.register(HFCLIPConfig, fast_tokenizer_class=HFCLIPTokenizer, exist_ok=True)
    # The same class for every backend that transformers may prefer: pixels do not depend on what is installed.
    image_processors = {"pil": HFCLIPImageProcessor, "torchvision": HFCLIPImageProcessor}
    AutoImageProcessor.register(HFCLIPConfig, image_processor_classes=image_processors, exist_ok=True)
    AutoProcessor.register(HFCLIPConfig, HFCLIPProcessor, exist_ok=True)
