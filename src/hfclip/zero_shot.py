"""Zero-shot classification: labels and templates become a cached classifier for images.

labels x templates -> prompts -> unit text embeddings -> mean over templates, unit norm: (num_labels, dim), once
images -> pixel_values -> unit image embeddings -> logits (num_images, num_labels) -> labels with scores
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BatchFeature
from transformers.modeling_utils import unwrap_model
from transformers.utils.logging import tqdm

from .configuration_hfclip import TOWER_CONFIGS
from .data.image_list import find_images


Template = str | Callable[[str], str]

DEFAULT_TEMPLATES = ("a photo of a {}.",)

_PLACEHOLDER = re.compile(r"\{c?\}")  # {c} is the one of clip-benchmark's template files
_INFO_FILE = "zero_shot_classifier.json"
_EMBEDS_FILE = "zero_shot_classifier.safetensors"


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """The model without its distributed wrapper, in eval mode and without gradients; afterwards as it was before.

    The mode of every module is restored by itself: a frozen tower stays in eval mode when the rest trains again.
    """
    model = unwrap_model(model)
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield model
    finally:
        for module in in_training:
            module.training = True


def device_of(model: nn.Module) -> torch.device:
    """Where a model takes its inputs; offloaded weights have no place, and what moves them moves inputs, too."""
    return torch.device("cpu") if model.device.type == "meta" else model.device


def embed_labels(
    model: nn.Module,
    processor: Any,
    labels: Iterable[str],
    templates: Iterable[Template] = DEFAULT_TEMPLATES,
    batch_size: int = 256,
) -> Tensor:
    """One embedding a label: the mean over templates of unit text embeddings, again of unit norm (paper 3.1.4).

    Embeddings are averaged, not probabilities, so any number of templates costs the same at classification.

    Returns:
        `(num_labels, dim)` float32 on the model's device.

    Raises:
        ValueError: no or empty labels, no templates, a template without placeholder, `batch_size` below 1, embeddings
            that are not finite.
        TypeError: labels or templates that are one string instead of a list, or hold something else.
    """
    labels, templates = check_labels(labels), check_templates(templates)
    _check_count("batch_size", batch_size)
    prompts = [fill_template(template, label) for label in labels for template in templates]
    # Summed on the CPU in float64: the same bits whatever the device's order of additions.
    sums: Tensor | None = None
    with evaluating(model) as model:
        for start in _progress(len(prompts), batch_size, "Embedding labels"):
            batch = prompts[start : start + batch_size]
            inputs = processor(text=batch, padding=True, return_tensors="pt").to(device_of(model))
            embeds = model.encode_text(inputs["input_ids"], inputs.get("attention_mask"), normalize=False)
            if sums is None:
                sums = torch.zeros(len(labels), embeds.shape[1], dtype=torch.float64)
            owner = torch.arange(start, start + len(batch)) // len(templates)
            sums.index_add_(0, owner, F.normalize(embeds.cpu().double(), dim=-1))
    if not sums.isfinite().all():
        broken = labels[(~sums.isfinite()).any(dim=1).nonzero()[0].item()]
        raise ValueError(f"the text embedding of label {broken!r} is not finite: the model's weights are damaged.")
    return F.normalize(sums, dim=-1).float().to(device_of(model))


class ZeroShotClassifier:
    """Classifies images into labels given in words; the labels are embedded once, when it is built.

    It belongs to the weights the model has at that moment: build it anew after training them further.

    Example:

        classifier = ZeroShotClassifier(model, processor, ["cat", "dog"], templates=["a photo of a {}."])
        classifier("pet.jpg")                       # [{"label": "cat", "score": 0.98}, {"label": "dog", ...}]
        classifier.save("pets"); ZeroShotClassifier.load("pets", model, processor)

    Args:
        model: a `HFCLIPModel`, on any device and of any dtype; a distributed wrapper is taken off. Its mode is left
            as it is: embeddings are computed in eval mode and without gradients, which is restored afterwards.
        processor: a `HFCLIPProcessor`.
        labels: what to tell apart, each once.
        templates: sentences with `{}` or `{c}` for the label, or functions from label to sentence. The embeddings of
            all sentences of a label are averaged (paper 3.1.4).
        batch_size: prompts embedded at a time.
        label_embeds: `(num_labels, dim)` unit embeddings of any floating point dtype, if they are already known;
            nothing is embedded then. They are kept and compared in float32.

    Raises:
        ValueError: no, empty or repeated labels, no templates, a template without placeholder, `label_embeds` that are
            not one finite vector of unit length and of the model's width a label, a processor whose tokenizer ends
            texts where the model does not pool them.
        TypeError: labels or templates that are one string instead of a list, or hold something else.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        labels: Iterable[str],
        templates: Iterable[Template] = DEFAULT_TEMPLATES,
        *,
        batch_size: int = 256,
        label_embeds: Tensor | None = None,
    ):
        self.model = unwrap_model(model)
        self.processor = processor
        self.labels = labels = check_labels(labels)
        self.templates = check_templates(templates) if label_embeds is None else list(templates)
        check_tokenizer(self.model, processor)
        repeated = [label for label, times in Counter(labels).items() if times > 1]
        if repeated:
            raise ValueError(
                f"labels repeat: {repeated}. Expected each label once, or they share one score: "
                "pass list(dict.fromkeys(labels)), or tell them apart in words."
            )
        if label_embeds is None:
            label_embeds = embed_labels(model, processor, labels, self.templates, batch_size)
        else:
            _check_embeds(label_embeds, labels, self.model.config.projection_dim)
        self.label_embeds = label_embeds.float()

    def __call__(self, images: Any, top_k: int = 5, batch_size: int = 32) -> list[dict] | list[list[dict]]:
        """The best labels of each image, best first.

        Args:
            images: whatever the processor takes as one image (PIL image, path, URL, bytes, array); a folder, or a
                pattern such as "photos/*.jpg"; a list of such, or a 4-D array.
            top_k: labels returned for each image, at most; all of them if there are fewer.
            batch_size: images opened and embedded at a time.

        Returns:
            For one image a list of `{"label", "score"}`, for several a list of such lists. Scores are probabilities
            over all labels: the softmax of the logits, or, in a model with `logit_bias` (sigmoid loss), an
            independent probability for each label.

        Raises:
            ValueError: no image, one that cannot be read (images count from 0 over the whole list), or `top_k` or
                `batch_size` below 1.
            TypeError: something that is no image, a list of lists, or `top_k` or `batch_size` that is no integer.
        """
        _check_count("top_k", top_k)
        images, several = find_images(images)
        results = []
        with evaluating(self.model) as model:
            for inputs in self._preprocessed(images, batch_size):
                results += self._ranked(self._logits(model, inputs), top_k)
        return results if several else results[0]

    def logits(self, images: Any | None = None, *, pixel_values: Tensor | None = None, batch_size: int = 32) -> Tensor:
        """exp(logit_scale) * cosine (+ logit_bias) of each image, or of each row of `pixel_values`, with each label.

        Args:
            images: one image or several, as in a call.
            pixel_values: `(num_images, channels, height, width)`, already preprocessed; instead of `images`.
            batch_size: images embedded at a time.

        Returns:
            `(num_images, num_labels)` float32 on the model's device.
        """
        if (images is None) == (pixel_values is None):
            raise ValueError("expected either images or pixel_values, found both or neither.")
        _check_count("batch_size", batch_size)
        if pixel_values is None:
            batches = self._preprocessed(find_images(images)[0], batch_size)
        else:
            batches = ({"pixel_values": batch} for batch in pixel_values.split(batch_size))
        with evaluating(self.model) as model:
            return torch.cat([self._logits(model, batch) for batch in batches])

    def rank(self, image_embeds: Tensor, top_k: int = 5) -> list[list[dict]]:
        """The best labels of images that are embedded already, as in a call; `image_embeds` (num_images, dim) are unit."""
        _check_count("top_k", top_k)
        image_embeds = image_embeds.to(self.label_embeds.device)
        with evaluating(self.model) as model:
            logits = model(image_embeds=image_embeds, text_embeds=self.label_embeds).logits_per_image
        return self._ranked(logits, top_k)

    def _preprocessed(self, images: Sequence, batch_size: int) -> Iterator[Mapping[str, Tensor]]:
        """What the processor makes of images, `pixel_values` among it, one batch opened at a time."""
        if len(images) == 0:
            raise ValueError("found 0 images: expected at least one.")
        _check_count("batch_size", batch_size)
        for start in _progress(len(images), batch_size, "Classifying"):
            try:
                inputs = self.processor(images=images[start : start + batch_size], return_tensors="pt")
            except (TypeError, ValueError) as error:
                # The processor counts within the batch, the caller over all images.
                message = re.sub(r"^image (\d+)", lambda match: f"image {start + int(match[1])}", str(error))
                raise type(error)(message) from error
            yield inputs

    def _logits(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """Processed images -> `(batch, num_labels)`, in float32 whatever the model's dtype."""
        inputs = BatchFeature(inputs).to(device=device_of(model), dtype=model.dtype)
        # Normalised here: in half precision a unit vector is off by up to a part in 256, and so would be the logits.
        image_embeds = F.normalize(model.encode_image(**inputs, normalize=False).float(), dim=-1)
        return model(image_embeds=image_embeds, text_embeds=self.label_embeds).logits_per_image

    def _ranked(self, logits: Tensor, top_k: int) -> list[list[dict]]:
        scores = logits.softmax(dim=-1) if self.model.logit_bias is None else logits.sigmoid()
        # Ranked by logits: scores near 0 or 1 may round to equal ones. Stable: ties keep the order of the labels.
        order = logits.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
        return [
            [{"label": self.labels[index], "score": score} for index, score in zip(*row, strict=True)]
            for row in zip(order.tolist(), scores.gather(1, order).tolist(), strict=True)
        ]

    def save(self, folder: str | Path) -> None:
        """Write labels, templates, embeddings and the fingerprint of the model, but not the model.

        A template that is a function is recorded by what it makes of "{}".
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        templates = [template if isinstance(template, str) else template("{}") for template in self.templates]
        info = {"model_fingerprint": model_fingerprint(self.model), "labels": self.labels, "templates": templates}
        # Without its info file a half-written classifier is none; it never joins old labels with new embeddings.
        (folder / _INFO_FILE).unlink(missing_ok=True)
        metadata = {"model_fingerprint": info["model_fingerprint"]}  # a file of another folder does not fit
        save_file({"label_embeds": self.label_embeds.cpu().contiguous()}, folder / _EMBEDS_FILE, metadata)
        (folder / _INFO_FILE).write_text(json.dumps(info, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path, model: nn.Module, processor: Any) -> "ZeroShotClassifier":
        """Open what `save` wrote, for the model it was built with; nothing is embedded.

        Raises:
            FileNotFoundError: no classifier in `folder`.
            ValueError: files that are damaged, or embeddings that are not finite or not of the labels; or the classifier
                belongs to another model: other weights, other architecture, or a dtype that has rounded the weights.
        """
        folder = Path(folder)
        missing = [name for name in (_INFO_FILE, _EMBEDS_FILE) if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{folder} lacks {' and '.join(missing)}: expected a folder written by ZeroShotClassifier.save."
            )
        try:
            info = json.loads((folder / _INFO_FILE).read_text(encoding="utf-8"))
            expected, labels, templates = (info[key] for key in ("model_fingerprint", "labels", "templates"))
            labels, templates, expected = check_labels(labels), check_templates(templates), str(expected)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder / _INFO_FILE} is damaged ({error!r}): save the classifier anew.") from error
        found = model_fingerprint(model)
        if found != expected:
            raise ValueError(
                f"the classifier in {folder} was built with the model of fingerprint {expected[:12]}, found "
                f"{found[:12]}: its label embeddings do not fit this model. Load the model it was built with, in the "
                "same dtype, or build it anew: ZeroShotClassifier(model, processor, labels, templates)."
            )
        try:
            with safe_open(folder / _EMBEDS_FILE, "pt") as file:
                label_embeds = file.get_tensor("label_embeds").to(device_of(unwrap_model(model)))
                origin = (file.metadata() or {}).get("model_fingerprint", expected)  # older files do not name it
        except SafetensorError as error:
            raise ValueError(f"{folder / _EMBEDS_FILE} is damaged ({error!r}): save the classifier anew.") from error
        if origin != expected:
            raise ValueError(
                f"{folder / _EMBEDS_FILE} holds embeddings of the model of fingerprint {origin[:12]}, {_INFO_FILE} is of "
                f"{expected[:12]}: save the classifier anew."
            )
        return cls(model, processor, labels, templates, label_embeds=label_embeds)


def model_fingerprint(model: nn.Module) -> str:
    """SHA-256 of a model's architecture and weights: 64 hex digits, the same after saving and loading.

    Weights count by their value in float32, so a bfloat16 checkpoint has one fingerprint in bfloat16 and in float32;
    weights rounded to a smaller dtype are other weights. Names, versions and the attention kernel do not count.

    Raises:
        ValueError: the weights are offloaded, and cannot be read as they are.
    """
    model = unwrap_model(model)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            "the model's weights are offloaded, and its fingerprint needs them: save or load the classifier with a model "
            "that is held in memory."
        )
    digest = hashlib.sha256(json.dumps(_architecture(model.config.to_dict()), sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        values = tensor.float() if tensor.is_floating_point() else tensor
        digest.update(f"{name}{tuple(values.shape)}".encode())
        digest.update(values.detach().cpu().contiguous().numpy())
    return digest.hexdigest()


def _architecture(config: Any) -> Any:
    """A config dictionary without what does not change the embeddings: where it came from and how it is stored."""
    if not isinstance(config, dict):
        return config
    incidental = {"transformers_version", "architectures", "auto_map", "dtype", "torch_dtype"}
    kept = {key: value for key, value in config.items() if key not in incidental and not str(key).startswith("_")}
    return {str(key): _architecture(value) for key, value in kept.items()}


def _progress(total: int, batch_size: int, desc: str) -> Iterable[int]:
    """First index of each batch; a bar on a terminal, if there is more than one."""
    disable = None if total > batch_size else True
    return tqdm(range(0, total, batch_size), desc=desc, disable=disable, leave=False)


def fill_template(template: Template, label: str) -> str:
    """The sentence that a template makes of a label."""
    if isinstance(template, str):
        # Not str.format: a label or sentence may hold braces of its own.
        return _PLACEHOLDER.sub(lambda _: label, template)
    prompt = template(label)
    if not isinstance(prompt, str):
        raise TypeError(f"template {template!r} made {prompt!r} of {label!r}: expected a string.")
    return prompt


def check_labels(labels: Iterable[str]) -> list[str]:
    """Labels as a list. Raises TypeError for what is no list of strings, ValueError for none or empty ones."""
    if isinstance(labels, Iterable) and not isinstance(labels, str):
        labels = list(labels)
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise TypeError(f"labels is {labels!r}: expected a list of strings.")
    if not labels:
        raise ValueError("found 0 labels: expected at least one.")
    empty = [index for index, label in enumerate(labels) if not label.strip()]
    if empty:
        raise ValueError(f"the labels at {empty} are empty: expected words to put into the templates.")
    return labels


def check_templates(templates: Iterable[Template]) -> list[Template]:
    """Templates as a list. Raises TypeError for what is none, ValueError for none or one without placeholder."""
    if isinstance(templates, str) or callable(templates) or not isinstance(templates, Iterable):
        raise TypeError(f"templates is {templates!r}: expected a list, [{templates!r}].")
    templates = list(templates)
    if not templates:
        raise ValueError('found 0 templates: expected at least one, e.g. "a photo of a {}.".')
    for template in templates:
        if isinstance(template, str):
            if not _PLACEHOLDER.search(template):
                raise ValueError(f"template {template!r} has no place for the label: expected {{}} or {{c}} in it.")
        elif not callable(template):
            raise TypeError(f"template {template!r}: expected a string or a function from label to string.")
    return templates


def _check_embeds(embeds: Tensor, labels: list[str], dim: int) -> None:
    if not isinstance(embeds, Tensor):
        raise TypeError(f"label_embeds is of {type(embeds).__name__}: expected a tensor.")
    if tuple(embeds.shape) != (len(labels), dim):
        raise ValueError(
            f"label_embeds is {tuple(embeds.shape)}: expected ({len(labels)}, dim) for as many labels and the model's "
            f"dim of {dim}."
        )
    if not embeds.is_floating_point():
        raise ValueError(f"label_embeds is of {embeds.dtype}: expected a floating point dtype.")
    # Half precision leaves a unit vector within a part in 256 of its length.
    wrong = (~((embeds.float().norm(dim=1) - 1).abs() < 0.01)).nonzero().flatten().tolist()  # also where it is NaN
    if wrong:
        norm = embeds[wrong[0]].float().norm().item()
        raise ValueError(
            f"the embedding of label {labels[wrong[0]]!r} is of length {norm:g}: expected finite ones of length 1."
        )


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, Integral):
        raise TypeError(f"{name} is {value!r}: expected an integer of at least 1.")
    if value < 1:
        raise ValueError(f"{name} is {value}: expected at least 1.")


def check_tokenizer(model: nn.Module, processor: Any) -> None:
    """Our text towers pool where a text ends: with another end token they would pool anywhere, and say nothing."""
    config = model.config.text_config
    if config.model_type not in TOWER_CONFIGS:
        return
    found = processor.tokenizer.eos_token_id
    if found != config.eos_token_id:
        raise ValueError(
            f"the processor's tokenizer ends texts with id {found}, the model's text tower expects "
            f"{config.eos_token_id}: the processor belongs to another model. Load it from where the model is from: "
            "HFCLIPProcessor.from_pretrained."
        )
