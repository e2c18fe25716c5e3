"""A trained CLIP as teacher: the student's similarities learn to follow the teacher's.

The teacher sees the student's batch (`Teacher`), or has seen the data before (`StoredEmbeddings`, written by
training/embed.py). Either gives unit embeddings of the batch, and `distillation_loss` compares the two models' views
of which text belongs to which image. The embeddings themselves are not compared: they may differ in size.
"""

import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from hfclip import HFCLIPModel, HFCLIPProcessor

from .config import Config, UsageError
from .data import caption_id
from .sources import BadSample, Source, num_samples


TILE = 1 << 23  # similarities that are held at a time
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


def distillation_loss(
    student_image: Tensor,
    student_text: Tensor,
    student_scale: Tensor | float,
    teacher_image: Tensor,
    teacher_text: Tensor,
    teacher_scale: float,
    *,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Divergence of the student's similarities from the teacher's over the global batch (arXiv:2311.17049, eq. 2, 3).

    For each image the distribution over the texts of all ranks, softmax(scale * cosines), is compared by KL(teacher ||
    student), and for each text that over the images; the loss is the mean of both over all N pairs. It is computed in
    float32 (float64 for a float64 student) whatever autocast says, a few rows at a time, its gradients with it: memory
    beyond the embeddings of the global batch and their gradients does not grow with N.

    As the losses of `hfclip`, it has the same value on every rank, and gradients whose mean over the ranks is the
    gradient of that value. Batches of different size on different ranks are exact. The teacher gets no gradient.

    Args:
        student_image, student_text: `(local_batch, dim)`, unit norm (trusted, not checked).
        student_scale: exp(logit_scale) of the student.
        teacher_image, teacher_text: `(local_batch, teacher_dim)`, unit norm, of the same pairs.
        teacher_scale: exp(logit_scale) of the teacher.
        group: ranks that share the batch. Default: all of them, or this process alone.

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
    student, teacher = (
        torch.cat([images, texts], dim=1).to(dtype)
        for images, texts in ((student_image, student_text), (teacher_image.detach(), teacher_text.detach()))
    )
    batch = _Batch(student, teacher, group)
    scale = torch.as_tensor(student_scale, dtype=dtype, device=student.device)
    return _Distillation.apply(student, scale, teacher, teacher_scale, batch)


class _Batch:
    """The sizes of all ranks' batches, and how their rows come together and their gradients go home."""

    def __init__(self, student: Tensor, teacher: Tensor, group: dist.ProcessGroup | None):
        self.group, self.rank, self.sizes = None, 0, [len(student)]
        if dist.is_available() and dist.is_initialized():
            self.group = dist.group.WORLD if group is None else group
            self.rank = dist.get_rank(self.group)
            if self.rank < 0:
                raise ValueError(f"rank {dist.get_rank()} is not a member of `group`: pass a group it belongs to.")
            record = [len(student), student.shape[1] // 2, teacher.shape[1] // 2, student.element_size()]
            records = self._all_gather(torch.tensor([record], device=student.device)).tolist()
            if len({tuple(record[1:]) for record in records}) > 1:
                raise ValueError(
                    "the ranks must agree on the sizes of student's and teacher's embeddings and on the precision, but "
                    f"found (pairs, dim, teacher_dim, bytes) {records}."
                )
            self.sizes = [record[0] for record in records]
        if sum(self.sizes) == 0:
            raise ValueError("the global batch is empty: expected at least one pair.")

    def gather(self, rows: Tensor) -> Tensor:
        """`(local_batch, ...)` -> `(global_batch, ...)` in rank order."""
        if self.group is None:
            return rows
        parts = self._all_gather(self._padded(rows)).split(max(self.sizes))
        return torch.cat([part[:size] for part, size in zip(parts, self.sizes, strict=True)])

    def send_home(self, columns: Tensor) -> Tensor:
        """`(global_batch, ...)` on each rank -> the sum over ranks of this rank's own rows."""
        if self.group is None:
            return columns
        padded = torch.cat([self._padded(part) for part in columns.split(self.sizes)])
        own = padded.new_empty(max(self.sizes), *padded.shape[1:])
        # torch 2.13 renamed reduce_scatter_tensor and all_gather_into_tensor, and warns at the old names.
        reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        reduce_scatter(own, padded, group=self.group)
        return own[: self.sizes[self.rank]]

    def sum(self, value: Tensor) -> Tensor:
        if self.group is not None:
            dist.all_reduce(value, group=self.group)
        return value

    def _padded(self, rows: Tensor) -> Tensor:
        return F.pad(rows, (0, 0, 0, max(self.sizes) - len(rows)))

    def _all_gather(self, local: Tensor) -> Tensor:
        gathered = local.new_empty(dist.get_world_size(self.group) * len(local), *local.shape[1:])
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        all_gather(gathered, local.contiguous(), group=self.group)
        return gathered


class _Distillation(torch.autograd.Function):
    """The gradients are computed with the value, tile by tile: a tile would have to be computed again for them."""

    @staticmethod
    def forward(ctx, student: Tensor, scale: Tensor, teacher: Tensor, teacher_scale: float, batch: _Batch) -> Tensor:
        rows, columns = student.chunk(2, dim=1), batch.gather(student).chunk(2, dim=1)
        teacher_rows, teacher_columns = teacher.chunk(2, dim=1), batch.gather(teacher).chunk(2, dim=1)
        d_rows, d_columns = torch.zeros_like(student), student.new_zeros(sum(batch.sizes), student.shape[1])
        loss, d_scale = student.new_zeros(()), torch.zeros_like(scale)
        size = max(TILE // sum(batch.sizes), 1)
        with torch.autocast(student.device.type, enabled=False):
            for this, other in ((0, 1), (1, 0)):  # images against texts, texts against images
                for tile in (slice(start, start + size) for start in range(0, len(student), size)):
                    # (tile, dim) @ (dim, global_batch) -> (tile, global_batch)
                    cosines = rows[this][tile] @ columns[other].T
                    log_student = F.log_softmax(cosines * scale, dim=1)
                    target = (teacher_rows[this][tile] @ teacher_columns[other].T).mul_(teacher_scale)
                    log_target = F.log_softmax(target, dim=1)
                    target = log_target.exp()
                    loss += (target * (log_target - log_student)).sum() / 2
                    d_logits = (log_student.exp_() - target) / 2
                    d_scale += (d_logits * cosines).sum()
                    d_logits *= scale
                    d_rows.chunk(2, dim=1)[this][tile] += d_logits @ columns[other]
                    d_columns.chunk(2, dim=1)[other].addmm_(d_logits.T, rows[this][tile])
        total = sum(batch.sizes)
        share = len(batch.sizes) / total  # see hfclip.losses: gradients are averaged over the ranks
        ctx.save_for_backward((d_rows + batch.send_home(d_columns)) * share, d_scale * share)
        return batch.sum(loss) / total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        d_student, d_scale = ctx.saved_tensors
        return grad * d_student, grad * d_scale, None, None, None


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
        precision: "bf16", "fp16" or "fp32".

    Raises:
        UsageError: if there is no such model, or its tokenizer would give other ids or its context is shorter.
    """

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase, device: torch.device, precision: str):
        self.model, processor = load_teacher(name, device)
        self.autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
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
        with computing_in(self.autocast, pixels.device):
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


def computing_in(dtype: torch.dtype | None, device: torch.device):
    """Autocast to `dtype`; nothing for None."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


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


def usable_captions(source: Source, index: int) -> list[str]:
    """The captions of a sample that training may choose from; none if they cannot be read."""
    try:
        return [caption.strip() for caption in source.captions(index) if caption.strip()]
    except BadSample:
        return []


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
    def open(cls, folder: str | Path, source: Source, length: int) -> "StoredEmbeddings":
        """The embeddings in `folder`, of the first `length` samples of `source`.

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
        stored = StoredEmbeddings.open(settings.embeddings, source, num_samples(source, config.data))
    return teacher, stored
