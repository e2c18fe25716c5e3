"""What the tests of conversion share: makers of archives as OpenAI published them, and of archives nobody should; runs
of the scripts, in this process or in one of their own."""

import contextlib
import importlib
import io
import os
import re
import signal
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from conversion.convert import run


ROOT = Path(__file__).resolve().parents[1]

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


def small_archive(path: Path) -> Path:
    torch.save({"a": torch.arange(64.0), "b": torch.ones(3)}, path)
    return path


# Tensors, and what a checkpoint must give back of them


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal in dtype, shape and every bit (not-a-number and minus zero included)."""
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    # () -> (1,), as views of another item size need a dimension
    views = [torch.atleast_1d(tensor).contiguous().view(torch.uint8) for tensor in (found, expected)]
    return torch.equal(*views)


def assert_same(checkpoint, expected: dict[str, torch.Tensor]) -> None:
    assert list(checkpoint) == list(expected) and len(checkpoint) == len(expected)
    for name, tensor in expected.items():
        found = checkpoint[name]
        assert same(found, tensor), name
        assert (checkpoint.shape(name), checkpoint.dtype(name)) == (tensor.shape, tensor.dtype), name
        assert found.is_contiguous() and found.device.type == "cpu", name


def all_kinds() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(3, 5, generator=generator)
    dtypes = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool]
    dtypes += [torch.int8, torch.int16, torch.int32, torch.complex64, torch.uint16, torch.float8_e4m3fn]
    tensors = {str(dtype).removeprefix("torch."): noise.to(dtype) for dtype in dtypes}
    special = torch.tensor([float("nan"), -0.0, float("inf"), 1e-45])
    return tensors | {
        "special": special,
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 4),
        "one": special[:1].clone(),
    }


def views() -> dict[str, torch.Tensor]:
    """Tensors that share a storage, start within it, or lie in it in another order."""
    base = torch.arange(60.0).reshape(3, 4, 5)
    return {
        "base": base,
        "again": base,
        "row": base[1],
        "transposed": base.permute(2, 0, 1),
        "stepped": base[:, ::2, 1::3],
        "expanded": base[0, 0, :1].expand(7, 1),
        "scalar": base[2, 3, 4],
        "empty": base[:, 4:],
        "parameter": torch.nn.Parameter(base[0]),
    }


# Running the converters


@dataclass(frozen=True)
class Result:
    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """What the script said last."""
        assert self.err.count("\nerror: ") == 1, self.err
        return self.err.partition("\nerror: ")[2]


def run_script(name: str, *arguments: object, status: int = 0) -> Result:
    """Runs `conversion/NAME.py` in this process as its command line does. It must end with `status`, without traceback."""
    script = importlib.import_module(f"conversion.{name}")
    out, err = io.StringIO(), io.StringIO()
    argv, sys.argv = sys.argv, [script.__file__, *map(str, arguments)]
    on_interrupt = signal.getsignal(signal.SIGINT)  # pushing sets its own
    found = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run(script.main)
    except SystemExit as end:
        found = end.code
    finally:
        sys.argv = argv
        signal.signal(signal.SIGINT, on_interrupt)
    result = Result(found, out.getvalue(), "\n" + err.getvalue())
    assert result.status == status and "Traceback" not in result.err, result
    return result


def start_script(name: str, *arguments: object, patch: str = "", **environment: str) -> subprocess.Popen:
    """Starts `conversion/NAME.py` in a process of its own, after the Python code `patch`."""
    path = ROOT / "conversion" / f"{name}.py"
    code = f"import runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\n{patch}\nrunpy.run_path({str(path)!r}, run_name='__main__')"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def assert_same_tensors(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Equal names, dtypes, shapes and values."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(found[name], tensor), name


def save(path: Path, weights: Mapping[str, torch.Tensor]) -> Path:
    """A state dict as a file of the kind that its name says."""
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path)
    else:
        torch.save(dict(weights), path)
    return path


# Shapes of published models, from their numbers alone


Shapes = dict[str, tuple[int, ...]]


def openai_shapes(
    dim: int,
    text: tuple[int, int, int],
    layers: int | tuple[int, ...],
    width: int,
    size: int,
    patch: int | None = None,
    mlp: int | None = None,
    context: int = 77,
    vocabulary: int = 49408,
) -> Shapes:
    """OpenAI's (and OpenCLIP's) names and shapes. `text`: width, heads, layers; `mlp`: hidden width of the ViT's MLP."""
    text_width, _, text_layers = text
    shapes = {"positional_embedding": (context, text_width), "text_projection": (text_width, dim), "logit_scale": ()}
    shapes |= {"token_embedding.weight": (vocabulary, text_width), **layer_norm("ln_final", text_width)}
    shapes |= blocks("transformer", text_layers, text_width, 4 * text_width)
    return shapes | (
        resnet_shapes(dim, layers, width, size)
        if patch is None
        else vit_shapes(dim, layers, width, size, patch, mlp or 4 * width)
    )


def layer_norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def linear(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def blocks(prefix: str, number: int, width: int, mlp: int) -> Shapes:
    shapes = {}
    for block in (f"{prefix}.resblocks.{n}" for n in range(number)):
        shapes |= layer_norm(f"{block}.ln_1", width) | layer_norm(f"{block}.ln_2", width)
        shapes |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
        shapes |= linear(f"{block}.attn.out_proj", width, width)
        shapes |= linear(f"{block}.mlp.c_fc", width, mlp) | linear(f"{block}.mlp.c_proj", mlp, width)
    return shapes


def vit_shapes(dim: int, layers: int, width: int, size: int, patch: int, mlp: int) -> Shapes:
    shapes = {"visual.class_embedding": (width,), "visual.positional_embedding": ((size // patch) ** 2 + 1, width)}
    shapes |= {"visual.proj": (width, dim), "visual.conv1.weight": (width, 3, patch, patch)}
    shapes |= layer_norm("visual.ln_pre", width) | layer_norm("visual.ln_post", width)
    return shapes | blocks("visual.transformer", layers, width, mlp)


def resnet_shapes(dim: int, layers: tuple[int, ...], width: int, size: int) -> Shapes:
    def conv(name: str, inputs: int, outputs: int, kernel: int) -> Shapes:
        # Each convolution has the BatchNorm of its number; a shortcut's are 0 and 1 in a list.
        norm = f"{name[:-1]}1" if name.endswith("downsample.0") else name.replace("conv", "bn")
        statistics = {f"{norm}.running_mean": (outputs,), f"{norm}.running_var": (outputs,)}
        counter = {f"{norm}.num_batches_tracked": ()}
        return {
            f"{name}.weight": (outputs, inputs, kernel, kernel),
            **layer_norm(norm, outputs),
            **statistics,
            **counter,
        }

    shapes = conv("visual.conv1", 3, width // 2, 3) | conv("visual.conv2", width // 2, width // 2, 3)
    shapes |= conv("visual.conv3", width // 2, width, 3)
    channels = width
    for stage, number in enumerate(layers):
        planes = width * 2**stage
        for n in range(number):
            block = f"visual.layer{stage + 1}.{n}"
            shapes |= conv(f"{block}.conv1", channels, planes, 1) | conv(f"{block}.conv2", planes, planes, 3)
            shapes |= conv(f"{block}.conv3", planes, 4 * planes, 1)
            if n == 0:
                shapes |= conv(f"{block}.downsample.0", channels, 4 * planes, 1)
            channels = 4 * planes
    shapes |= {"visual.attnpool.positional_embedding": ((size // 32) ** 2 + 1, channels)}
    for part in ("q", "k", "v"):
        shapes |= linear(f"visual.attnpool.{part}_proj", channels, channels)
    return shapes | linear("visual.attnpool.c_proj", channels, dim)
