"""Images and texts as the model takes them: image processor and tokenizer behind one call.

images -> `image_processor` -> `pixel_values`; text -> `tokenizer` -> `input_ids`, `attention_mask`; both in one
`BatchFeature`. Either part may be of another class of transformers, as the towers may.
"""

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import AutoImageProcessor, AutoTokenizer, BatchFeature
from transformers.processing_utils import (
    AudioKwargs,
    ProcessingKwargs,
    ProcessorMixin,
    TextKwargs,
    Unpack,
    VideosKwargs,
)
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from .families_hfclip import IMAGE_PROCESSORS, family_of
from .foreign_hfclip import foreign, is_foreign, pinned
from .image_processing_hfclip import HFCLIPImageProcessor
from .tokenization_hfclip import HFCLIPTokenizer
from .translation_hfclip import TRANSFORMERS_MODEL_TYPES, translate_transformers_config


class HFCLIPProcessor(ProcessorMixin):
    """`HFCLIPImageProcessor` and `HFCLIPTokenizer` (or others in their place) as one.

    `from_pretrained` also opens what the processors of transformers' dual encoders saved. Image processor and tokenizer
    are those of hfclip with the saved settings where the folder has CLIP's, since transformers' own differ from openai/CLIP
    in some pixels and ids, and wherever hfclip's image processor gives the same pixels; else they are the family's own.
    Texts are cut at the context, and padded to it where a family is trained so (SigLIP).
    """

    _auto_class = "AutoProcessor"  # saved folders carry this code, so that they load where hfclip is not installed

    def __init__(self, image_processor, tokenizer):
        super().__init__(image_processor, tokenizer)

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        **kwargs: Unpack[ProcessingKwargs],
    ) -> BatchFeature:
        """`pixel_values` (batch, 3, height, width) of `images`, `input_ids` and `attention_mask` (batch, tokens) of
        `text`.

        Args:
            images: What `HFCLIPImageProcessor` takes: one image or many.
            text: One text or many. They are padded to the longest, which leaves the embeddings as they are (the text
                tower reads no further than the end token), unless `padding` says otherwise, here or where the tokenizer
                was made. The tokenizer cuts texts beyond the context length and keeps the end token.
            kwargs: Options of the image processor and of the tokenizer, sorted by name; `return_tensors` ("pt", "np"
                or None for lists) goes to both. The dictionaries `images_kwargs` and `text_kwargs` hold options for
                one alone, `common_kwargs` such for both. transformers' options for videos and audio have no effect;
                `videos` and `audio` themselves may be None, as callers of every kind of processor pass them.

        Raises:
            TypeError: `text` is not made of strings, or an option is unknown to transformers' processors.
            ValueError: there is neither an image nor a text, there are videos or audio, or an option is given twice.
        """
        for name in ("videos", "audio"):
            if kwargs.pop(name, None) is not None:
                raise ValueError(f"{type(self).__name__} takes images and texts, found {name}. Frames go to `images`.")
        if images is None and text is None:
            raise ValueError(f"{type(self).__name__} needs images, text or both, found neither.")
        if text is not None:
            _check_text(text)
        image_options, text_options = self._options_by_part(kwargs)
        text_options = {name: value for name, value in text_options.items() if value is not None}
        features = {}
        if text is not None:
            features |= self.tokenizer(text, **{"padding": True, **self._tokenizer_defaults(), **text_options})
        if images is not None:
            try:
                features |= self.image_processor(images, **image_options)
            except ValueError as error:
                if text is None and _may_be_text(images):
                    raise ValueError(f"{error} Texts go to `text=`: the order is processor(images, text).") from error
                raise
        return BatchFeature(features)

    def _options_by_part(self, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The given options of the image processor and of the tokenizer."""
        parts = {
            "images_kwargs": set(type(self.image_processor).valid_kwargs.__annotations__),
            "text_kwargs": set(TextKwargs.__annotations__),
        }
        elsewhere = {*VideosKwargs.__annotations__, *AudioKwargs.__annotations__}
        groups = {*ProcessingKwargs.__annotations__, "common_kwargs"}
        names = set.union(*parts.values())
        flat = {name: value for name, value in given.items() if name not in groups or name in names}
        common = given.get("common_kwargs") or {}
        for name in {*flat, *common} - names - elsewhere:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
            raise TypeError(f"{type(self).__name__} has no option {name!r}. The nearest is {near!r}.")
        options = []
        for part, valid in parts.items():
            own, by_name = given.get(part) or {}, {name: flat[name] for name in flat.keys() & valid}
            if twice := own.keys() & by_name.keys():
                raise ValueError(f"{min(twice)!r} was given twice: in {part} and by itself. Give it once.")
            shared = {name: common[name] for name in common.keys() & valid}
            options.append({**shared, **by_name, **own})
        return options[0], options[1]

    def _tokenizer_defaults(self) -> dict[str, Any]:
        """Options of a call that the tokenizer was made with, such as `max_length`."""
        made_with = self.tokenizer.init_kwargs
        names = [name for name in made_with if name in TextKwargs.__annotations__ and made_with[name] is not None]
        return {name: getattr(self.tokenizer, name, made_with[name]) for name in names}

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> list[str]:
        try:
            return super().save_pretrained(save_directory, **kwargs)
        finally:
            self.__dict__.pop("auto_map", None)  # noted for the file; a processor opened from it has none

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs) -> "HFCLIPProcessor":
        """Opens what `HFCLIPModel.from_pretrained` does, with the same `architecture`, `tokenizer` ..."""
        kwargs = pinned(pretrained_model_name_or_path, kwargs)
        if is_foreign(pretrained_model_name_or_path, kwargs):
            return foreign(pretrained_model_name_or_path).open_processor(cls, pretrained_model_name_or_path, **kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs) -> list:
        path = pretrained_model_name_or_path
        return [open_image_processor(path, **kwargs), open_tokenizer(path, **kwargs)]


def open_image_processor(path: str | os.PathLike, **kwargs) -> Any:
    """The image processor of a folder or Hub name: hfclip's with its settings where the pixels are the same."""
    backend = kwargs.pop("backend", "pil")  # pixels do not depend on what is installed
    saved, others = HFCLIPImageProcessor.get_image_processor_dict(path, **kwargs)  # also of OpenAI's and OpenCLIP's
    name, own = saved.get("image_processor_type") or saved.get("feature_extractor_type"), None
    if name is None:  # it follows from the model's type
        own = AutoImageProcessor.from_pretrained(path, backend=backend, **kwargs)
        name = type(own).__name__
    name = re.sub("(Fast|Pil)$", "", name.replace("FeatureExtractor", "ImageProcessor"))
    if name not in IMAGE_PROCESSORS:
        return own or AutoImageProcessor.from_pretrained(path, backend=backend, **kwargs)
    defaults = IMAGE_PROCESSORS[name]
    if defaults:  # of another family, whose files may hold what has no bearing on these pixels
        known = HFCLIPImageProcessor.valid_kwargs.__annotations__
        saved = {key: value for key, value in saved.items() if key in known and value is not None}
    return HFCLIPImageProcessor.from_dict({**defaults, **saved}, **others)


def open_tokenizer(path: str | os.PathLike, **kwargs) -> Any:
    """The tokenizer of a folder or Hub name, hfclip's in place of transformers' for CLIP."""
    tokenizer = AutoTokenizer.from_pretrained(path, **kwargs)
    if is_clip := type(tokenizer).__module__.startswith("transformers.models.clip."):
        tokenizer = HFCLIPTokenizer.from_pretrained(path, **kwargs)
    family, written = family_of(path, kwargs)
    if family is None and written.get("model_type") not in TRANSFORMERS_MODEL_TYPES:
        return tokenizer
    reserved = 0 if family is None else family.reserved_positions
    context = translate_transformers_config(written)["text_config"].get("max_position_embeddings", VERY_LARGE_INTEGER)
    tokenizer.model_max_length = min(tokenizer.model_max_length, context - reserved)
    if not is_clip:
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
        tokenizer.init_kwargs |= {"truncation": True, "model_input_names": tokenizer.model_input_names}
    if family is not None and family.sigmoid:
        tokenizer.init_kwargs["padding"] = "max_length"
    return tokenizer


def _may_be_text(images: Any) -> bool:
    first = images[0] if isinstance(images, (list, tuple)) and images else images
    return isinstance(first, str) and "://" not in first and not os.path.exists(first)


def _check_text(text: Any) -> None:
    texts = [text] if isinstance(text, str) else text
    wrong = text if not isinstance(texts, (list, tuple)) else next((t for t in texts if not isinstance(t, str)), "")
    if not isinstance(wrong, str):
        raise TypeError(
            f"text must be a str or a list of str, found {type(wrong).__name__}. The order is processor(images, text)."
        )


__all__ = ["HFCLIPProcessor"]
