"""Which tokens of a text count: the one it is pooled at, the real ones, and texts packed without their padding."""

from dataclasses import dataclass

import torch

from .layers_hfclip import is_on_host


def pooled_positions(input_ids: torch.Tensor, attention_mask: torch.Tensor | None, eos_token_id: int) -> torch.Tensor:
    """(batch,) position that each text is pooled at: its first end-of-text token.

    A text without one (cut by hand) is pooled at its last real token, if an attention mask says which that is.

    Raises:
        ValueError: no end-of-text token and no attention mask; pooling position 0 would be silently wrong
            (open_clip issue 1151). On a GPU the host would have to wait to find out, and does not.
    """
    is_eos = input_ids == eos_token_id
    if attention_mask is not None:
        is_eos = is_eos & attention_mask.bool()
    first_eos = is_eos.int().argmax(dim=-1)
    if attention_mask is not None:
        order = torch.arange(input_ids.shape[1], device=input_ids.device)
        last_real = (attention_mask.bool() * order).argmax(dim=-1)
        return torch.where(is_eos.any(dim=-1), first_eos, last_real)
    if is_on_host(input_ids):
        complete = is_eos.any(dim=-1)
        if not complete.all():
            rows = (~complete).nonzero().flatten()[:5].tolist()
            raise ValueError(
                f"input_ids: found no end-of-text token {eos_token_id} in row(s) {rows}, expected one in each. "
                "Let the tokenizer truncate (it keeps that token), or pass the attention_mask."
            )
    return first_eos


def count_from_first_real(attention_mask: torch.Tensor) -> torch.Tensor:
    """(batch, length) position of each token in its text: 0 at the first real one, and in any padding before it."""
    order = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return (order - attention_mask.bool().int().argmax(dim=1, keepdim=True)).clamp(min=0)


def without_left_padding(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, (batch, length) each, with any padding before a text moved to after it."""
    length = input_ids.shape[1]
    shift = attention_mask.bool().int().argmax(dim=1, keepdim=True)
    index = torch.arange(length, device=input_ids.device) + shift
    index = torch.where(index < length, index, index - length)  # `%` by a length that is open is not exported to ONNX
    return input_ids.gather(1, index), attention_mask.gather(1, index)


def real_tokens_first(attention_mask: torch.Tensor) -> torch.Tensor | None:
    """(batch, length) order that brings the real tokens of each text to the front; None if they are there already.

    On a device the answer would make the host wait: there the order is computed in any case.
    """
    real = attention_mask.bool()
    if is_on_host(real) and not (real[:, 1:] & ~real[:, :-1]).any():
        return None
    return (~real).int().argsort(dim=1, stable=True)


@dataclass
class PackedTexts:
    """Where the real tokens of a padded batch lie: flat (num_tokens, ...) tensors <-> (batch, length, ...) tensors.

    The flat list is filled up to a round number with tokens from after the pooled ones, as far as there are any:
    kernels are chosen and cached by shape, and numbers of tokens would hardly ever repeat. Round are multiples of 64,
    and of larger powers of two for longer lists: at most 16 numbers between one power of two and the next.
    """

    index: torch.Tensor  # (num_tokens,) place of each packed token in the flattened (batch * length) layout
    last: torch.Tensor  # (batch,) place of each text's pooled token in the flat list
    real: torch.Tensor  # (batch, length) whether a token is at or before the pooled one

    @classmethod
    def of(cls, text_lengths: list[int], device: torch.device) -> "PackedTexts":
        """The first tokens of each text, a number for each. All is decided on the host, and then sent to the device."""
        lengths = torch.tensor(text_lengths)
        width, num_real = max(text_lengths), sum(text_lengths)
        real = torch.arange(width) < lengths[:, None]
        taken = real.flatten()
        spare = -num_real % max(64, 2 ** num_real.bit_length() // 32)
        if spare:
            taken = taken.clone()
            taken[(~taken).nonzero().flatten()[:spare]] = True
        last = taken.cumsum(dim=0)[torch.arange(len(lengths)) * width + lengths - 1] - 1
        index = taken.nonzero().flatten()
        return cls(*(part.to(device, non_blocking=True) for part in (index, last, real)))

    def pack(self, padded: torch.Tensor) -> torch.Tensor:
        """(batch, at least length, ...) -> (num_tokens, ...)"""
        return padded[:, : self.real.shape[1]].flatten(0, 1).index_select(0, self.index)

    def pad(self, packed: torch.Tensor) -> torch.Tensor:
        """(num_tokens, hidden) -> (batch, length, hidden), zeros in the places without a token"""
        padded = packed.new_zeros(self.real.numel(), packed.shape[-1])
        return padded.index_copy(0, self.index, packed).view(*self.real.shape, -1)
