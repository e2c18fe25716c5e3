"""A trained CLIP as teacher: the student's similarities learn to follow the teacher's.

The teacher sees the student's batch (`Teacher`), or has seen the data before (`StoredEmbeddings`, written by
training/embed.py). Either gives unit embeddings of the batch, and `distillation_loss` compares the two models' views
of which text belongs to which image. The embeddings themselves are not compared: they may differ in size.
"""

import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from hfclip import HFCLIPModel, HFCLIPProcessor, losses
from hfclip.data.samples import Source, caption_id, usable_captions
from hfclip.losses import LN_2, GlobalBatch

from .config import Config, UsageError
from .machine import PRECISIONS


# What tokenizers that share their vocabulary may still treat differently.
PROBES = (
    "a photo of a cat",
    "  A PHOTO,  of   Two Dogs! ",
    "caf\u00e9 na\u00efve \u00dcber \u4f60\u597d \U0001f600",
    "it's 1,024 (x) a_b-c &amp; <b>",
    "line\none\ttab \u200b",
    "",
)


# ---------------------------------------------------------------------------------------------------------------------
# Loss
# ---------------------------------------------------------------------------------------------------------------------


# Opaque to torch.compile, as the losses of hfclip.
@torch.compiler.disable
def distillation_loss(
    student_image: Tensor,
    student_text: Tensor,
    student_scale: Tensor | float,
    teacher_image: Tensor,
    teacher_text: Tensor,
    teacher_scale: float,
    *,
    group: dist.ProcessGroup | None = None,
    exchange: Literal["gather", "ring"] = "gather",
) -> Tensor:
    """Divergence of the student's similarities from the teacher's over the global batch (arXiv:2311.17049, eq. 2, 3).

    For each image the distribution over the texts of all ranks, softmax(scale * cosines), is compared by KL(teacher ||
    student), and for each text that over the images; the loss is the mean of both over all N pairs. It is computed in
    float32 (float64 for a float64 student) whatever autocast says, tile by tile as the losses of `hfclip`, whose value,
    gradients, `group` and `exchange` it has: the same value on every rank, and gradients whose mean over the ranks is
    the gradient of that value. Batches of different size on different ranks are exact. The teacher gets no gradient.

    Args:
        student_image, student_text: `(local_batch, dim)`, unit norm (trusted, not checked).
        student_scale: exp(logit_scale) of the student.
        teacher_image, teacher_text: `(local_batch, teacher_dim)`, unit norm, of the same pairs.
        teacher_scale: exp(logit_scale) of the teacher.
        group: ranks that share the batch. Default: all of them, or this process alone.
        exchange: how ranks come by each other's texts and the teacher's. "gather": every rank holds those of all.
            "ring": a rank holds those of two others at a time. Values agree to rounding.

    Raises:
        ValueError: embeddings that do not fit together, here or on another rank, a global batch of no pairs, or a rank
            outside of `group`.
    """
    shapes = [tuple(embeds.shape) for embeds in (student_image, student_text, teacher_image, teacher_text)]
    if len(shapes[0]) != 2 or len(shapes[2]) != 2 or shapes[0] != shapes[1] or shapes[2] != shapes[3]:
        raise ValueError(f"student's and teacher's embeddings are {shapes}: expected (local_batch, dim) twice each.")
    if shapes[0][0] != shapes[2][0]:
        raise ValueError(f"the student has {shapes[0][0]} pairs and the teacher {shapes[2][0]}: expected the same.")
    dtype = torch.promote_types(student_image.dtype, torch.float32)
    images, texts, *teacher = (
        embeds.to(dtype) for embeds in (student_image, student_text, teacher_image, teacher_text)
    )
    scale, teacher_scale = (losses.as_factor("scale", value, images) for value in (student_scale, teacher_scale))
    batch = losses.agree(images, texts, None, exchange, group, teacher_dim=shapes[2][1])
    return _Distillation.apply(images, texts, scale, *teacher, teacher_scale, batch)


class _Distillation(torch.autograd.Function):
    """Two rounds over the tiles: the sums of exponentials of rows and columns, then the loss and its gradients.

    The gradients do not wait for the backward pass: there the tiles would have to be computed a third time. Logits are
    in units of ln 2. `sums` are of the student and of the teacher a maximum and a sum relative to it, for each row or
    column; the logarithm of the sum takes its place when it is complete.
    """

    @staticmethod
    def forward(
        ctx,
        images: Tensor,
        texts: Tensor,
        scale: Tensor,
        teacher_images: Tensor,
        teacher_texts: Tensor,
        teacher_scale: Tensor,
        batch: GlobalBatch,
    ) -> Tensor:
        columns = [batch.spread(texts), batch.spread(teacher_texts)]
        row_sums, column_sums = _no_sums(images), _no_sums(columns[0])
        row_loss = images.new_zeros(len(images))

        def logits(rows: slice, cols: slice, columns: list[Tensor]) -> tuple[Tensor, Tensor]:
            """A tile of the student's logits, and of the teacher's."""
            student = (images[rows] @ columns[0][cols].T).mul_(scale / LN_2)
            return student, (teacher_images[rows] @ columns[1][cols].T).mul_(teacher_scale / LN_2)

        def add(offset: int, columns: list[Tensor], column_sums: list[Tensor]) -> None:
            for rows, cols in losses.tiles(images, columns[0]):
                for i, tile in enumerate(logits(rows, cols, columns)):
                    losses.add_exponentials(row_sums[2 * i][rows], row_sums[2 * i + 1][rows], tile, dim=1)
                    losses.add_exponentials(column_sums[2 * i][cols], column_sums[2 * i + 1][cols], tile, dim=0)

        def d_logits(rows: slice, cols: slice, offset: int, read: list[Tensor]) -> Tensor:
            student, teacher = logits(rows, cols, read[:2])
            result = torch.zeros_like(student)
            of_rows, of_columns = [values[rows, None] for values in row_sums], [values[cols] for values in read[2:]]
            for maximum, log, teacher_maximum, teacher_log in (of_rows, of_columns):
                log_share = (student - maximum).sub_(log)
                log_target = (teacher - teacher_maximum).sub_(teacher_log)
                target = log_target.exp2()
                row_loss[rows].add_(log_target.sub_(log_share).mul_(target).sum(dim=1))
                result.add_(log_share.exp2_().sub_(target))
            return result.mul_(batch.share / 2)

        ctx.batch = batch
        with torch.autocast(images.device.type, enabled=False):
            column_sums = batch.visit(add, columns, column_sums)
            for maximum, total in (column_sums[:2], column_sums[2:]):
                batch.complete(maximum, total)
            for total in (*row_sums[1::2], *column_sums[1::2]):
                total.log2_()
            ctx.save_for_backward(*losses.gradients(ctx, images, texts, scale, [*columns, *column_sums], d_logits))
        return batch.mean(row_loss.sum() * (LN_2 / 2))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        losses.refuse_second_derivatives()
        return *(None if value is None else grad * value for value in ctx.saved_tensors), None, None, None, None


def _no_sums(embeds: Tensor) -> list[Tensor]:
    """Maximum and sum of no exponentials, of the student and of the teacher, `(rows,)` each."""
    return [embeds.new_full((len(embeds),), value) for value in (-torch.inf, 0, -torch.inf, 0)]


# ---------------------------------------------------------------------------------------------------------------------
# Teachers
# ---------------------------------------------------------------------------------------------------------------------


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

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase, device: torch.device, precision: str):
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
                "teacher's tokenizer (model.tokenizer), or store the teacher's embeddings by training/embed.py and set "
                "distill.embeddings."
            )
        context = self.model.config.text_config.max_position_embeddings
        if tokenizer.model_max_length > context:
            raise UsageError(
                f"distill.teacher: {name} reads texts of at most {context} tokens, but the student's have up to "
                f"{tokenizer.model_max_length}. Choose another teacher, or store its embeddings by training/embed.py "
                "and set distill.embeddings."
            )

    @torch.no_grad()
    def embed(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Unit embeddings of images and texts, `(batch, teacher_dim)` float32 each, without gradient.

        Args:
            pixels: (batch, 3, height, width) uint8, not normalised.
            input_ids, attention_mask: (batch, length).
        """
        pixels = pixels.float() / 255
        if pixels.shape[-1] != self.image_size:
            size = (self.image_size, self.image_size)
            pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True, align_corners=False).clamp_(0, 1)
        with computing_in(self.precision, pixels.device):
            images = self.model.encode_image((pixels - self.mean) / self.std)
            texts = self.model.encode_text(input_ids, attention_mask)
        return F.normalize(images.float(), dim=1), F.normalize(texts.float(), dim=1)


def load_teacher(name: str, device: torch.device) -> tuple[HFCLIPModel, HFCLIPProcessor]:
    """A frozen model in float32 and evaluation mode, and what prepares its inputs.

    Raises:
        UsageError: if there is no such model, or weights are missing.
    """
    try:
        model, report = HFCLIPModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
        processor = HFCLIPProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UsageError(f"Teacher {name!r}: {error}") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise UsageError(f"Teacher {name!r} lacks {len(missing)} weights of the model, first {missing[0]!r}.")
    return model.requires_grad_(False).eval().to(device), processor


def computing_in(precision: str, device: torch.device) -> AbstractContextManager:
    """Autocast to "bf16" or "fp16"; nothing for "fp32"."""
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, dtype=PRECISIONS[precision])


def tokenizer_difference(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> str | None:
    """What keeps two tokenizers from giving the same ids; None if nothing does."""
    if len(first) != len(second):
        return f"{len(second)} tokens, not {len(first)}"
    if first.get_vocab() != second.get_vocab():
        return "another vocabulary of the same size"
    if _merges(first) != _merges(second):
        return "other merges of the same vocabulary"
    for text in PROBES:
        ids = [tokenizer(text, truncation=False, verbose=False)["input_ids"] for tokenizer in (first, second)]
        if ids[0] != ids[1]:
            return f"{text!r} becomes {ids[1]}, not {ids[0]}"
    return None


def _merges(tokenizer: PreTrainedTokenizerBase) -> list | None:
    """The merges of a BPE as pairs; None for other kinds."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    merges = None if backend is None else json.loads(backend.to_str())["model"].get("merges")
    return merges and [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]


# ---------------------------------------------------------------------------------------------------------------------
# Stored embeddings
# ---------------------------------------------------------------------------------------------------------------------

HEADER = "embeddings.json"
ARRAYS = ("offsets", "caption_ids", "image_embeds", "text_embeds")
NUM_PROBED = 64


class StoredEmbeddings:
    """A teacher's embeddings of all images and captions of a source, written by training/embed.py.

    `image_embeds.npy` (num_samples, dim) and `text_embeds.npy` (num_captions, dim) are float16 and mapped, not read;
    the captions of sample i are the rows offsets[i] to offsets[i + 1], known by their `caption_ids`. An image's row is
    of its central square, prepared as the teacher's images are: the student's random crops show parts of it.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.header = json.loads((folder / HEADER).read_text(encoding="utf-8"))
        self.scale = self.header["scale"]
        for name in ARRAYS:
            setattr(self, name, np.load(folder / f"{name}.npy", mmap_mode="r"))

    def __reduce__(self):
        return StoredEmbeddings, (self.folder,)  # pickled, a mapped array would be read whole

    @classmethod
    def open(cls, folder: str | Path, source: Source) -> "StoredEmbeddings":
        """The embeddings in `folder`, of the samples of `source`.

        Raises:
            UsageError: if they are not there, not finished, or of other data: some samples' captions are compared
                here, and those of all samples when they are looked up.
        """
        folder = Path(folder).expanduser()
        try:
            stored = cls(folder)
        except (OSError, ValueError, KeyError) as error:
            raise UsageError(
                f"distill.embeddings: {folder} holds no stored embeddings ({error}). Make them by training/embed.py; "
                "it ends an interrupted folder if started again."
            ) from error
        length = len(source)
        if stored.header["num_samples"] < length:
            raise UsageError(
                f"distill.embeddings: {folder} holds {stored.header['num_samples']} samples, expected the {length} "
                "of data.train. Store them again by training/embed.py."
            )
        for index in np.linspace(0, length - 1, min(length, NUM_PROBED)).astype(int).tolist():
            for caption in usable_captions(source, index):
                stored.row_of(index, caption)
        return stored

    def row_of(self, sample: int, caption: str) -> int:
        """The row of a caption of a sample.

        Raises:
            UsageError: if the sample had no such caption.
        """
        start, stop = self.offsets[sample : sample + 2].tolist()
        found = np.flatnonzero(self.caption_ids[start:stop] == caption_id(caption))
        if not len(found):
            raise UsageError(
                f"distill.embeddings: {self.folder} was made for other data: sample {sample} had no caption {caption!r}. "
                "Store the embeddings again by training/embed.py."
            )
        return start + int(found[0])

    def lookup(self, samples: list[int], captions: list[str]) -> tuple[Tensor, Tensor]:
        """Unit embeddings of images and texts, `(len(samples), dim)` float32 each.

        Args:
            samples: places in the source.
            captions: one of each sample's, stripped.

        Raises:
            UsageError: if the data is not what was embedded, or could not be read then.
        """
        rows = [self.row_of(sample, caption) for sample, caption in zip(samples, captions, strict=True)]
        images, texts = (
            torch.from_numpy(np.asarray(array[places], np.float32))
            for array, places in ((self.image_embeds, samples), (self.text_embeds, rows))
        )
        unread = (images.norm(dim=1) < 0.5) | (texts.norm(dim=1) < 0.5)
        if unread.any():
            sample = samples[int(unread.int().argmax())]
            raise UsageError(
                f"distill.embeddings: sample {sample} could not be read when {self.folder} was made. Store the "
                "embeddings again by training/embed.py."
            )
        return F.normalize(images, dim=1), F.normalize(texts, dim=1)


def build_teacher(
    config: Config, tokenizer: PreTrainedTokenizerBase, source: Source, accelerator: Accelerator
) -> tuple[Teacher | None, StoredEmbeddings | None]:
    """The live teacher or the stored embeddings that the settings name; None for what they do not.

    Args:
        tokenizer: the student's.
        source: the data that the student learns from.

    Raises:
        UsageError: if the teacher cannot teach this student, or the embeddings are of other data.
    """
    settings, teacher, stored = config.distill, None, None
    if settings.teacher is not None:
        teacher = Teacher(settings.teacher, tokenizer, accelerator.device, config.run.precision)
    if settings.embeddings is not None:
        stored = StoredEmbeddings.open(settings.embeddings, source)
    return teacher, stored
