"""What the tests of conversion share: makers of archives as OpenAI published them, and of archives nobody should."""

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn


# What OpenAI's archives hold in half precision: convolutions, linear layers, fused attention, the two projections.
# LayerNorm, BatchNorm, embeddings and the scale stay in single precision.
HALF = re.compile(
    r"(.*\.)?((conv\d|downsample\.0|c_fc|[cqkv]_proj|out_proj)\.(weight|bias)|in_proj_(weight|bias))"
    r"|text_projection|visual\.proj"
)


class Tree(nn.Module):
    """A module whose parameters and buffers are given; tracing needs it to compute something."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs + 1


def plant(tensors: Mapping[str, torch.Tensor]) -> Tree:
    """Nested modules with `tensors` at their dotted names; BatchNorm statistics and 0-d integers become buffers."""
    root = Tree()
    for name, tensor in tensors.items():
        *parents, leaf = name.split(".")
        module = root
        for parent in parents:
            if parent not in module._modules:
                module.add_module(parent, Tree())
            module = module._modules[parent]
        if leaf.startswith("running_") or not tensor.is_floating_point():
            module.register_buffer(leaf, tensor)
        else:
            module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
    return root


def save_torchscript(
    path: Path, tensors: Mapping[str, torch.Tensor], half: bool = True, attributes: Mapping[str, int] | None = None
) -> dict[str, torch.Tensor]:
    """A TorchScript archive with the layout of OpenAI's, from weights in OpenAI's names; returns what it holds.

    `half` stores in half precision what OpenAI stores so. `attributes` (`input_resolution`, `context_length`,
    `vocab_size`) become 0-d integer buffers, as there. The records that torch adds today are left out.
    """
    stored = {name: (t.half() if half and HALF.fullmatch(name) else t).clone() for name, t in tensors.items()}
    stored |= {name: torch.tensor(number) for name, number in (attributes or {}).items()}
    torch.jit.trace(plant(stored), torch.zeros(1)).save(str(path))
    rewrite_zip(path, drop=r"[^/]+/(byteorder|\.data/.*|\.format_version|\.storage_alignment)")
    return stored


def rewrite_zip(
    path: Path,
    replace: Mapping[str, bytes] | None = None,
    drop: str | None = None,
    add: Mapping[str, bytes] | None = None,
    compress: str | None = None,
) -> Path:
    """Writes a zip anew: entries whose name ends with a key of `replace` get other bytes, those that match `drop` go,
    those of `add` come last, those that match `compress` are deflated."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in [*entries.items(), *(add or {}).items()]:
            for ending, other in (replace or {}).items():
                data = other if name.endswith(ending) else data
            if not (drop and re.fullmatch(drop, name)):
                deflate = compress and re.fullmatch(compress, name)
                archive.writestr(name, data, zipfile.ZIP_DEFLATED if deflate else zipfile.ZIP_STORED)
    return path


def write_archive(path: Path, program: bytes, records: Mapping[str, bytes] | None = None) -> Path:
    """A torch.save archive with any pickle and any storages."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/version", b"3\n")
        for key, data in (records or {}).items():
            archive.writestr(f"archive/data/{key}", data)
    return path
