"""A trained CLIP as teacher: the student's similarities learn to follow the teacher's.

The teacher sees the student's batch (`Teacher`), or has seen the data before (`StoredEmbeddings`). Either gives unit
embeddings of the batch, and `distillation_loss` compares the two models' views of which text belongs to which image.
The embeddings themselves are not compared: they may differ in size.
"""

import json

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from hfclip import HFCLIPModel, HFCLIPProcessor
from hfclip.errors import UsageError
from hfclip.losses import distillation_loss
from hfclip.names import opening
from hfclip.precision import autocast_for

from ..config import Config
from ..model import load_model
from .contrastive import Contrastive
from .stored import StoredEmbeddings


# What tokenizers that share their vocabulary may still treat differently.
PROBES = (
    "a photo of a cat",
    "  A PHOTO,  of   Two Dogs! ",
    "caf\u00e9 na\u00efve \u00dcber \u4f60\u597d \U0001f600",
    "it's 1,024 (x) a_b-c &amp; <b>",
    "line\none\ttab \u200b",
    "",
)


class Distillation(Contrastive):
    """`distill.weight` of the loss follows a teacher, the rest is the loss that `optim.loss` names."""

    def __init__(self, config: Config, teacher: "Teacher | StoredEmbeddings"):
        super().__init__(config)
        self.teacher, self.weight, self.targets = teacher, config.distill.weight, teacher.targets

    def loss_inputs(self, parts: list[dict]) -> dict:
        pieces = [self.teacher.embed(part) for part in parts]
        return {**super().loss_inputs(parts), "teacher": [torch.cat(embeds) for embeds in zip(*pieces, strict=True)]}

    def loss(self, embeds: tuple[Tensor, ...], scalars: dict[str, Tensor], inputs: dict) -> Tensor:
        factors = self.factors(scalars)
        value = sum(0 * factor for factor in factors[1:])  # wrappers wait for every weight's gradient
        if self.weight < 1:
            value = value + (1 - self.weight) * self.loss_of_factors(embeds, factors, inputs)
        if self.weight > 0:
            teacher = (*inputs["teacher"], self.teacher.scale)
            value = value + self.weight * distillation_loss(*embeds, factors[0], *teacher, exchange=self.exchange)
        return value


class Teacher:
    """A frozen CLIP that embeds the student's batches.

    It gets the student's own crops. Where it takes images of another size, they are resized on the device, bicubic
    with antialiasing and clipped to the range of colours; its mean and deviation are its own. Its weights are float32
    and it computes in the precision of the run.

    Args:
        name: an hfclip or transformers CLIP folder, or its name on the Hub.
        tokenizer: the student's. The teacher gets the same ids.
        precision: one of `PRECISIONS`.

    Raises:
        UsageError: if there is no such model, or its tokenizer would give other ids or its context is shorter.
    """

    targets = None  # it needs no further columns

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase, device: torch.device, precision: str):
        with opening(name, "Teacher"):
            self.model, processor = load_teacher(name, device)
        self.precision = precision
        self.scale = self.model.logit_scale.exp().item()
        self.image_size = self.model.config.image_size
        values = [processor.image_processor.image_mean, processor.image_processor.image_std]
        # (2, 3) -> mean and deviation, (3, 1, 1) each
        self.mean, self.std = torch.tensor(values, device=device)[:, :, None, None]
        difference = tokenizer_difference(tokenizer, processor.tokenizer)
        if difference:
            raise UsageError(
                f"distill.teacher: {name} reads other token ids than the student: {difference}. Give the student the "
                "teacher's tokenizer (model.tokenizer), or store the teacher's embeddings by `hfclip embed` and set "
                "distill.embeddings."
            )
        context = self.model.config.text_config.max_position_embeddings
        if tokenizer.model_max_length > context:
            raise UsageError(
                f"distill.teacher: {name} reads texts of at most {context} tokens, but the student's have up to "
                f"{tokenizer.model_max_length}. Choose another teacher, or store its embeddings by `hfclip embed` "
                "and set distill.embeddings."
            )

    @torch.no_grad()
    def embed(self, part: dict) -> tuple[Tensor, Tensor]:
        """Unit embeddings of images and texts, `(size, teacher_dim)` float32 each, without gradient.

        Args:
            part: `pixel_values` (size, 3, height, width) uint8, not normalised; `input_ids`, `attention_mask`
                (size, length).
        """
        names, device = ("pixel_values", "input_ids", "attention_mask"), self.model.device
        pixels, input_ids, attention_mask = (part[name].to(device, non_blocking=True) for name in names)
        pixels = pixels.float() / 255
        if pixels.shape[-1] != self.image_size:
            size = (self.image_size, self.image_size)
            pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True, align_corners=False).clamp_(0, 1)
        with autocast_for(self.precision, pixels.device):
            images = self.model.encode_image((pixels - self.mean) / self.std)
            texts = self.model.encode_text(input_ids, attention_mask)
        return F.normalize(images.float(), dim=1), F.normalize(texts.float(), dim=1)


def load_teacher(name: str, device: torch.device) -> tuple[HFCLIPModel, HFCLIPProcessor]:
    """A frozen model in float32 and evaluation mode, and what prepares its inputs.

    Raises:
        UsageError: if weights are missing; what transformers raises if there is no such model.
    """
    model, processor = load_model(name), HFCLIPProcessor.from_pretrained(name)
    return model.requires_grad_(False).eval().to(device), processor


def tokenizer_difference(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> str | None:
    """What keeps two tokenizers from giving the same ids; None if nothing does."""
    if first.get_vocab() != second.get_vocab():
        return f"another vocabulary, of {len(second)} tokens and not {len(first)}"
    if _merges(first) != _merges(second):
        return "other merges of the same vocabulary"
    for text in PROBES:
        ids = [tokenizer(text, truncation=False, verbose=False)["input_ids"] for tokenizer in (first, second)]
        if ids[0] != ids[1]:
            return f"{text!r} becomes {ids[1]}, not {ids[0]}"
    return None


def _merges(tokenizer: PreTrainedTokenizerBase) -> list | None:
    """The merges of a BPE; None for other kinds."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return None if backend is None else json.loads(backend.to_str())["model"].get("merges")
