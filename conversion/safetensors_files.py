"""Weights written into safetensors files tensor by tensor.

A conversion never holds more than a tensor or two of the model, so it fits in little memory whatever the model's size.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from tqdm import tqdm

from hfclip.errors import UsageError
from hfclip.foreign.checkpoints import DTYPES

from .folder import require_space


MAX_SHARD_BYTES = 5_000_000_000
DTYPE_NAMES = {
    dtype: name for name, dtype in DTYPES.items() if not name.startswith("F8")
}  # which isfinite does not know


def num_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """Size of (meta) tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def write_weights(
    folder: Path,
    layout: Mapping[str, torch.Tensor],
    items: Iterable[tuple[str, torch.Tensor]],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[Path]:
    """Writes `items` as they come into `model.safetensors`, or into shards with an index.

    Args:
        layout: name -> meta tensor of the dtype and shape that will come.
        items: the tensors, in any order. Written in the layout's dtype.

    Returns:
        The weight files.

    Raises:
        UsageError: values that are not finite; too little space.
        ValueError: a tensor that is not in the layout or of another shape, or one that never came.
    """
    total = num_bytes(layout)
    require_space(folder, total + 10_000_000)
    shards = split_torch_state_dict_into_shards(
        layout, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_bytes
    )
    if shards.is_sharded:
        index = {"metadata": {"total_size": total}, "weight_map": shards.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    files = {name: open(folder / name, "wb") for name in shards.filename_to_tensors}
    try:
        places = {}
        for name, tensors in shards.filename_to_tensors.items():
            starts = _write_header(files[name], layout, tensors)
            places |= {tensor: (files[name], start) for tensor, start in starts.items()}
        bar = tqdm(total=total, desc="writing weights", unit="B", unit_scale=True, disable=None)
        for name, tensor in items:
            if name not in places or tensor.shape != layout[name].shape:
                raise ValueError(f"Found a tensor {name!r} of shape {tuple(tensor.shape)} that nothing expects.")
            file, offset = places.pop(name)
            file.seek(offset)
            stored = tensor.detach().to(layout[name].dtype)
            require_finite(name, tensor, stored)
            data = stored.contiguous().reshape(-1).view(torch.uint8).numpy()
            file.write(memoryview(data))
            bar.update(data.nbytes)
        bar.close()
        if places:
            raise ValueError(f"{len(places)} tensors never came, such as {next(iter(places))!r}.")
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    finally:
        for file in files.values():
            file.close()
    return [folder / name for name in files]


def require_finite(name: str, tensor: torch.Tensor, stored: torch.Tensor) -> None:
    """Raises UsageError if a tensor, as it is stored, has values that are not finite."""
    if stored.isfinite().all():
        return
    if tensor.isfinite().all():
        raise UsageError(
            f"{name!r} reaches {tensor.abs().max():.3g}, more than {stored.dtype} holds. Choose another --dtype."
        )
    raise UsageError(
        f"{name!r} has {int((~tensor.isfinite()).sum())} values that are not finite (NaN or infinite): the training "
        "went wrong, or the file is damaged. Choose another checkpoint."
    )


def _write_header(file, layout: Mapping[str, torch.Tensor], names: list[str]) -> dict[str, int]:
    """Writes the head of a safetensors file and returns where in the file each tensor goes."""
    # Large items first keeps each tensor aligned to its item size.
    names = sorted(names, key=lambda name: (-layout[name].element_size(), name))
    header, places, end = {"__metadata__": {"format": "pt"}}, {}, 0
    for name in names:
        tensor = layout[name]
        if tensor.dtype not in DTYPE_NAMES:
            raise UsageError(f"{name!r} is of {tensor.dtype}, which safetensors files do not hold here.")
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        places[name] = start
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(len(encoded).to_bytes(8, "little") + encoded)
    file.truncate(8 + len(encoded) + end)  # tensors without elements write nothing
    return {name: 8 + len(encoded) + start for name, start in places.items()}
