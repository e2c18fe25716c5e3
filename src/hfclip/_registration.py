"""Registers hfclip's classes with transformers' Auto classes, when those are first imported.

Importing the Auto classes costs seconds (they import torch), so `import hfclip` does not. A finder on `sys.meta_path`
waits for each `transformers.models.auto.*_auto` module and runs its registration right behind the import; modules
that are there already are served at once.
"""

import importlib.abc
import importlib.machinery
import sys


def _register_configs() -> None:
    from transformers import AutoConfig

    from .configuration_hfclip import TOWER_CONFIGS, HFCLIPConfig

    for config in (HFCLIPConfig, *TOWER_CONFIGS.values()):
        AutoConfig.register(config.model_type, config, exist_ok=True)


def _register_models() -> None:
    from transformers import AutoModel, AutoModelForImageClassification, AutoModelForZeroShotImageClassification
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    )

    from .configuration_hfclip import HFCLIPConfig
    from .modeling_hfclip import TOWERS, HFCLIPForImageClassification, HFCLIPModel

    AutoModel.register(HFCLIPConfig, HFCLIPModel, exist_ok=True)
    for tower in TOWERS.values():
        AutoModel.register(tower.config_class, tower, exist_ok=True)
    AutoModelForZeroShotImageClassification.register(HFCLIPConfig, HFCLIPModel, exist_ok=True)
    AutoModelForImageClassification.register(HFCLIPConfig, HFCLIPForImageClassification, exist_ok=True)
    # Pipelines look names up here, and log an error for a class that they do not find.
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES[HFCLIPConfig.model_type] = HFCLIPForImageClassification.__name__
    MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES[HFCLIPConfig.model_type] = HFCLIPModel.__name__


def _register_tokenizer() -> None:
    from transformers import AutoTokenizer

    from .configuration_hfclip import HFCLIPConfig
    from .tokenization_hfclip import HFCLIPTokenizer

    AutoTokenizer.register(HFCLIPConfig, fast_tokenizer_class=HFCLIPTokenizer, exist_ok=True)


def _register_image_processor() -> None:
    # transformers 5.17 offers only a placeholder at the top level where torchvision is missing.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    from .configuration_hfclip import HFCLIPConfig
    from .image_processing_hfclip import HFCLIPImageProcessor

    # The same class for every backend that transformers may prefer: pixels do not depend on what is installed.
    classes = {"pil": HFCLIPImageProcessor, "torchvision": HFCLIPImageProcessor}
    AutoImageProcessor.register(HFCLIPConfig, image_processor_classes=classes, exist_ok=True)


def _register_processor() -> None:
    from transformers import AutoProcessor

    from .configuration_hfclip import HFCLIPConfig
    from .processing_hfclip import HFCLIPProcessor

    AutoProcessor.register(HFCLIPConfig, HFCLIPProcessor, exist_ok=True)


AUTO = "transformers.models.auto."
REGISTRATIONS = {
    AUTO + "configuration_auto": _register_configs,
    AUTO + "modeling_auto": _register_models,
    AUTO + "tokenization_auto": _register_tokenizer,
    AUTO + "image_processing_auto": _register_image_processor,
    AUTO + "processing_auto": _register_processor,
}


class _RegisterAfterImport(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the awaited modules like everybody else, and registers behind their execution.

    Our own modules are awaited too. These modules import each other, so registrations wait until none of them is
    halfway through its execution.
    """

    def __init__(self):
        self.waiting = dict(REGISTRATIONS)
        self.loaders: dict[str, importlib.abc.Loader] = {}
        self.num_executing = 0

    def find_spec(self, name, path=None, target=None):
        if name not in self.waiting and not name.startswith(f"{__package__}."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            self.loaders[name], spec.loader = spec.loader, self
        return spec

    def create_module(self, spec):
        return self.loaders[spec.name].create_module(spec)

    def exec_module(self, module) -> None:
        name = module.__spec__.name
        module.__spec__.loader = module.__loader__ = self.loaders.pop(name)
        self.num_executing += 1
        try:
            module.__loader__.exec_module(module)
        finally:
            self.num_executing -= 1
        self.register()

    def register(self) -> None:
        """Runs each registration whose Auto module is there, unless an awaited module is halfway."""
        for auto in list(self.waiting):
            if auto in sys.modules and not self.num_executing:
                if registration := self.waiting.pop(auto, None):
                    registration()


def register_with_auto_classes() -> None:
    """Registers with the Auto modules that are imported, and arranges it for those that will be."""
    finder = _RegisterAfterImport()
    sys.meta_path.insert(0, finder)
    finder.register()
