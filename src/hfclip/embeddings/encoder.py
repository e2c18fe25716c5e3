"""What a model makes of a chunk: a row per image and per caption, which depends on itself alone."""

import functools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import unwrap_model

from ..data.samples import caption_id
from ..errors import UsageError
from ..inference import fixed_weights, optimize_for_inference
from ..modeling_hfclip_transformer import HFCLIPAttention
from ..precision import autocast_for
from ..zero_shot import device_of, evaluating
from .chunks import Options, Pool, is_plain


WIDTH = 8  # tokens; the width of a batch of texts is a multiple, or one of its source's `width`


@contextmanager
def prepared(model: nn.Module, precision: str) -> Iterator[nn.Module]:
    """The model without wrapper in evaluation mode, and as fast and exact as its device allows; then as it was."""
    classes = {module: type(module) for module in model.modules()}
    device = device_of(unwrap_model(model))
    try:
        # One autocast for all batches: it keeps the weights that it has cast.
        with evaluating(model) as bare, autocast_for(precision, device), _exact(precision, device):
            if precision == "fp32" and device.type == "cpu":
                with suppress(RuntimeError):  # without oneDNN
                    optimize_for_inference(bare)
            if precision == "fp32":
                for module in bare.modules():
                    if type(module) is HFCLIPAttention:
                        module.__class__ = _AttentionOfAll
            with fixed_weights(bare):
                yield bare
    finally:
        for module, plain in classes.items():
            if type(module) is not plain:
                module.__class__ = plain


class _AttentionOfAll(HFCLIPAttention):
    """Attention that is computed for all positions, also where only some are asked for.

    That of a single query splits its work over threads by where in the batch an image lies.
    """

    def forward(self, *inputs, queries: slice | None = None, **options) -> tuple[Tensor, Tensor | None]:
        attended, weights = super().forward(*inputs, **options)
        return attended if queries is None else attended[:, queries], weights


def _exact(precision: str, device: torch.device) -> AbstractContextManager:
    """cuDNN computes convolutions in float32, and not by TF32 as torch has it by default."""
    if precision != "fp32" or device.type != "cuda":
        return nullcontext()
    return torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, deterministic=True, allow_tf32=False)


class Encoder:
    """What the model makes of a chunk: rows of its samples and of its captions."""

    def __init__(self, model: nn.Module, processor: Any, options: Options, width: int = WIDTH):
        self.model, self.processor, self.options, self.device = model, processor, options, device_of(model)
        self.scale = model.logit_scale.exp().item()
        self.normalization = None
        if is_plain(images := getattr(processor, "image_processor", None)):
            values = torch.tensor([images.image_mean, images.image_std], device=self.device)
            self.normalization = values[:, :, None, None]  # (2, 3) -> mean and deviation, (3, 1, 1) each
        self.width, self.hooks, self.outputs = width, [], {}

    def __enter__(self) -> "Encoder":
        for name, how in self.options.layers.items():
            try:
                module = self.model.get_submodule(name)
            except AttributeError as error:
                raise UsageError(f"layers: the model has no module {name!r}: {error}.") from error
            keep = functools.partial(self._keep, name, how)
            self.hooks.append(module.register_forward_hook(keep))
        return self

    def _keep(self, name: str, how: Pool, module: nn.Module, inputs: tuple, output: Any) -> None:
        self.outputs[name] = inputs[0] if how == "input" else output

    def __exit__(self, *exception) -> None:
        for hook in self.hooks:
            hook.remove()

    def __call__(self, chunk: dict) -> dict:
        captions = [caption for captions in chunk["captions"] for caption in captions]
        result = {
            "keys": chunk["key"],
            "problems": chunk["problems"],
            "label_ids": np.array([-1 if label is None else label for label in chunk["label"]], np.int64),
            "num_captions": np.array([len(captions) for captions in chunk["captions"]], np.int64),
            "caption_ids": np.array([caption_id(caption) for caption in captions], np.int64),
        }
        if chunk["readable"]:
            for name, rows in self._images(chunk["pixels"]).items():
                result[name] = np.zeros((len(chunk["key"]), *rows.shape[1:]), self.options.dtype)
                result[name][chunk["readable"]] = rows
        if captions:
            # A caption that repeats, as the name of a class does, is embedded once.
            distinct = {caption: row for row, caption in enumerate(dict.fromkeys(captions))}
            rows = self._texts(list(distinct)).astype(self.options.dtype)
            result["text_embeds"] = rows[[distinct[caption] for caption in captions]]
        return result

    def _images(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        found = {}
        for places, number in self._full_batches(range(len(pixels))):
            batch = torch.from_numpy(pixels[places]).to(self.device)
            if self.normalization is not None:
                mean, std = self.normalization
                batch = batch.float().div_(255).sub_(mean).div_(std)
            batch = batch.to(self.model.dtype)
            if self.options.layers:  # with all positions in the last block, too
                embeds = self.model.get_image_features(batch).pooler_output
            else:
                embeds = self.model.encode_image(batch, normalize=False)
            rows = {"image_embeds": F.normalize(embeds.float(), dim=-1)}
            rows |= {
                f"layer.{name}": self._feature(name, how, len(batch)) for name, how in self.options.layers.items()
            }
            for name, value in rows.items():
                found.setdefault(name, []).append(value[:number].float().cpu().numpy())
        return {name: np.concatenate(parts) for name, parts in found.items()}

    def _feature(self, name: str, how: Pool, batch_size: int) -> Tensor:
        output = self.outputs.pop(name, None)
        output = output if isinstance(output, Tensor) or output is None else output[0]
        shape = None if output is None else tuple(output.shape)
        if output is None or output.shape[0] != batch_size or how == "first" and output.ndim != 3:
            raise UsageError(
                f"layers: {name} gives {shape or 'nothing'} for {batch_size} images, expected a row for each"
                f"{', (images, tokens, width)' if how == 'first' else ''}."
            )
        if how in ("all", "input") or output.ndim == 2:
            return output
        # (images, tokens, width), or (images, channels, height, width)
        return output[:, 0] if how == "first" else output.float().mean(1 if output.ndim == 3 else (2, 3))

    def _texts(self, texts: list[str]) -> np.ndarray:
        """(len(texts), dim), each in a batch of texts of its own width."""
        context = min(self.processor.tokenizer.model_max_length, self.model.config.text_config.max_position_embeddings)
        lengths = [len(ids) for ids in self.processor(text=texts, padding=False, truncation=True)["input_ids"]]
        by_width: dict[int, list[int]] = {}
        for place, length in enumerate(lengths):
            by_width.setdefault(min(-(-length // self.width) * self.width, context), []).append(place)
        rows = np.empty((len(texts), self.model.config.projection_dim), np.float32)
        for width, same in by_width.items():
            options = {"padding": "max_length", "max_length": width, "truncation": True, "return_tensors": "pt"}
            for places, number in self._full_batches(same):
                tokens = self.processor(text=[texts[place] for place in places], **options).to(self.device)
                # Without a mask where none is needed: attention computes in another way if no text of a batch has padding.
                mask = None if self.model.config.packs_texts else tokens.get("attention_mask")
                outputs = self.model.get_text_features(tokens["input_ids"], mask)
                embeds = F.normalize(outputs.pooler_output.float(), dim=-1)
                rows[places[:number]] = embeds[:number].cpu().numpy()
        return rows

    def _full_batches(self, places: Sequence[int]) -> Iterator[tuple[list[int], int]]:
        """Places, the last ones filled up with themselves to a whole batch, and how many of them are new."""
        for start in range(0, len(places), self.options.batch_size):
            batch = list(places[start : start + self.options.batch_size])
            yield batch + batch[-1:] * (self.options.batch_size - len(batch)), len(batch)
