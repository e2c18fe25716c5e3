"""Images and texts as the model takes them: image processor and tokenizer behind one call.

images -> `image_processor` -> `pixel_values`; text -> `tokenizer` -> `input_ids`, `attention_mask`; both in one
`BatchFeature`. Either part may be of another class of transformers, as the towers may.
"""

import difflib
import os
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin, TextKwargs

from .image_processing_hfclip import HFCLIPImageProcessor
from .tokenization_hfclip import HFCLIPTokenizer


class HFCLIPProcessor(ProcessorMixin):
    """`HFCLIPImageProcessor` and `HFCLIPTokenizer` (or others in their place) as one.

    `from_pretrained` also opens what transformers' `CLIPProcessor` saved; image processor and tokenizer are then those
    of hfclip with the saved settings, since transformers' own differ from openai/CLIP in some pixels and ids.
    """

    _auto_class = "AutoProcessor"  # saved folders carry this code, so that they load where hfclip is not installed

    def __init__(self, image_processor, tokenizer):
        super().__init__(image_processor, tokenizer)

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        *,
        images_kwargs: Mapping[str, Any] | None = None,
        text_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """`pixel_values` (batch, 3, height, width) of `images`, `input_ids` and `attention_mask` (batch, tokens) of
        `text`.

        Args:
            images: What `HFCLIPImageProcessor` takes: one image or many.
            text: One text or many. They are padded to the longest, which leaves the embeddings as they are (the text
                tower reads no further than the end token), unless `padding` says otherwise. The tokenizer cuts texts
                beyond the context length and keeps the end token.
            images_kwargs: Options for the image processor alone.
            text_kwargs: Options for the tokenizer alone.
            kwargs: Options of either, sorted by name; `return_tensors` ("pt", "np" or None for lists) goes to both.

        Raises:
            TypeError: `text` is not made of strings, or an option is unknown to both.
            ValueError: there is neither an image nor a text.
        """
        if images is None and text is None:
            raise ValueError(f"{type(self).__name__} needs images, text or both, found neither.")
        if text is not None:
            _check_text(text)
        image_names = set(type(self.image_processor).valid_kwargs.__annotations__)
        text_names = set(TextKwargs.__annotations__)
        for name in kwargs:
            if name not in image_names | text_names:
                near = difflib.get_close_matches(name, image_names | text_names, n=1, cutoff=0.0)[0]
                raise TypeError(f"{type(self).__name__} has no option {name!r}. The nearest is {near!r}.")
        features = {}
        if text is not None:
            options = {name: value for name, value in kwargs.items() if name in text_names}
            features |= self.tokenizer(text, **{"padding": True, **options, **(text_kwargs or {})})
        if images is not None:
            options = {name: value for name, value in kwargs.items() if name in image_names}
            try:
                features |= self.image_processor(images, **{**options, **(images_kwargs or {})})
            except ValueError as error:
                if text is None and _may_be_text(images):
                    raise ValueError(f"{error} Texts go to `text=`: the order is processor(images, text).") from error
                raise
        return BatchFeature(features)

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs) -> list:
        path = pretrained_model_name_or_path
        image_processor, tokenizer = super()._get_arguments_from_pretrained(path, processor_dict, **kwargs)
        if _is_transformers_clip(image_processor):
            image_processor = HFCLIPImageProcessor.from_pretrained(path, **kwargs)
        if _is_transformers_clip(tokenizer):
            tokenizer = HFCLIPTokenizer.from_pretrained(path, **kwargs)
        return [image_processor, tokenizer]


def _is_transformers_clip(part: Any) -> bool:
    return type(part).__module__.startswith("transformers.models.clip.")


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
