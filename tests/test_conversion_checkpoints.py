"""Checkpoints are read bit for bit as torch and safetensors wrote them, and files that are broken or forged are refused
before anything of them runs."""

import argparse
import collections
import hashlib
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conversion_utils import HALF, rewrite_zip, save_torchscript, write_archive
from safetensors.torch import save_file
from test_key_maps import read_golden

from conversion.checkpoints import CheckpointError, open_checkpoint


ROOT = Path(__file__).resolve().parents[1]


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


# What is read


@pytest.mark.parametrize("name", ["openai_vit_tiny", "openai_resnet_tiny"])
@pytest.mark.parametrize("half", [True, False])
def test_torchscript_archive_of_openai_layout_is_bit_exact(tmp_path, data_dir, name, half):
    weights, _, _ = read_golden(data_dir / "golden" / f"{name}.safetensors")
    numbers = {"input_resolution": 224, "context_length": 77, "vocab_size": 49408}
    stored = save_torchscript(tmp_path / "model.pt", weights, half, numbers)
    checkpoint = open_checkpoint(tmp_path / "model.pt")
    assert checkpoint.format == "torchscript" and checkpoint.path == tmp_path / "model.pt"
    reference = torch.jit.load(str(tmp_path / "model.pt"), map_location="cpu").state_dict()
    assert_same(checkpoint, dict(reference))
    assert checkpoint.keys() == stored.keys() == weights.keys() | numbers.keys()
    assert {checkpoint.dtype(key) for key in weights if HALF.fullmatch(key)} == {
        torch.float16 if half else torch.float32
    }
    assert checkpoint["context_length"].item() == 77


def test_scripted_module_gives_numbers_lists_and_texts(tmp_path):
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.context_length, self.scale, self.kind, self.sizes = 77, 1.5, "ViT", [224, 336]
            self.part = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
            self.tied = self.part[0].weight

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.part(inputs) * self.scale + self.context_length

    module = torch.jit.script(Module())
    module.save(str(tmp_path / "module.pt"))
    checkpoint = open_checkpoint(tmp_path / "module.pt")
    reference = module.state_dict()
    assert checkpoint.keys() == reference.keys()
    assert all(same(checkpoint[name], reference[name]) for name in reference)
    expected = {"context_length": 77, "scale": 1.5, "kind": "ViT", "sizes.0": 224, "sizes.1": 336}
    assert expected.items() <= checkpoint.scalars.items()


@pytest.mark.parametrize("tensors", [all_kinds(), views()], ids=["dtypes", "views"])
def test_torch_save_is_bit_exact(tmp_path, tensors):
    torch.save(tensors, tmp_path / "weights.bin")
    checkpoint = open_checkpoint(str(tmp_path / "weights.bin"))
    assert checkpoint.format == "torch" and checkpoint.scalars == {}
    assert_same(checkpoint, tensors)
    # Memory of its own: a change of what was read reaches neither the file nor what is read later.
    checkpoint["base" if "base" in tensors else "float32"].zero_()
    assert_same(checkpoint, tensors)


def test_training_checkpoint_is_flattened_with_its_prefixes(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5])  # its state holds a Counter
    model(torch.randn(4, 2)).sum().backward()
    optimizer.step()
    content = {
        "epoch": 32,
        "name": "ViT-B-32",
        "done": True,
        "best": np.float64(0.625),
        "arguments": argparse.Namespace(lr=5e-4, sizes=[224, 336], device=torch.device("cuda", 0)),
        "state_dict": {f"module.{name}": tensor for name, tensor in model.state_dict().items()},
        "plain": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "scaler": {"scale": 65536.0, "_growth_tracker": 0},
        "nothing": None,
        "precision": torch.bfloat16,
        "big": 2**40,
        "key": collections.OrderedDict(a=torch.Size([2, 3])),
        "list": [torch.ones(2), {"x": torch.zeros(1)}],
    }
    torch.save(content, tmp_path / "epoch_32.pt")
    checkpoint = open_checkpoint(tmp_path / "epoch_32.pt")
    expected = {f"state_dict.module.{name}": tensor for name, tensor in model.state_dict().items()}
    expected |= {f"plain.{name}": tensor for name, tensor in model.state_dict().items()}
    for number, state in optimizer.state_dict()["state"].items():
        expected |= {f"optimizer.state.{number}.{name}": tensor for name, tensor in state.items()}
    expected |= {"list.0": torch.ones(2), "list.1.x": torch.zeros(1)}
    assert_same(checkpoint, expected)
    values = {"epoch": 32, "name": "ViT-B-32", "done": True, "best": 0.625, "big": 2**40, "key.a.1": 3}
    values |= {"arguments.lr": 5e-4, "arguments.sizes.1": 336, "arguments.device": "cuda", "scaler.scale": 65536.0}
    values |= {
        "scheduler.milestones.3": 1,
        "optimizer.param_groups.0.lr": 1e-3,
        "optimizer.param_groups.0.params.3": 3,
    }
    assert values.items() <= checkpoint.scalars.items()
    assert checkpoint.scalars["done"] is True and "nothing" not in checkpoint.scalars


def test_older_layouts_are_read(tmp_path):
    """Records in `tensors/`, no byte order, and the six-part storage reference of torch 1.4 and 1.5."""
    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0kX\x03\0\0\0cpuK\x02NtQ"
    program = b"\x80\x02}X\x01\0\0\0w" + tensor(storage, 0, (2,), (1,)) + b"s."
    write_archive(tmp_path / "old.pt", program)
    rewrite_zip(tmp_path / "old.pt", add={"archive/tensors/k": np.float32([1, 2]).tobytes()})
    assert_same(open_checkpoint(tmp_path / "old.pt"), {"w": torch.tensor([1.0, 2.0])})


def test_safetensors_is_bit_exact(tmp_path):
    tensors = {name: tensor for name, tensor in all_kinds().items() if name != "complex64"}
    save_file(tensors, tmp_path / "weights.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(tmp_path / "weights.safetensors")
    assert checkpoint.format == "safetensors" and checkpoint.scalars == {"format": "pt"}
    assert checkpoint.keys() == tensors.keys()
    assert_same(checkpoint, {name: tensors[name] for name in checkpoint})


def write_shards(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {name: torch.full((2, 3), float(number)) for number, name in enumerate("abcd")}
    save_file({name: tensors[name] for name in "ab"}, folder / "model-00001-of-00002.safetensors")
    save_file({name: tensors[name] for name in "cd"}, folder / "model-00002-of-00002.safetensors")
    weight_map = {name: f"model-0000{1 + (name > 'b')}-of-00002.safetensors" for name in "abcd"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tensors


def test_shards_are_one_checkpoint(tmp_path):
    tensors = write_shards(tmp_path)
    for path in (tmp_path, tmp_path / "model.safetensors.index.json"):
        checkpoint = open_checkpoint(path)
        assert_same(checkpoint, tensors)
        assert checkpoint.path == tmp_path / "model.safetensors.index.json"
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in tmp_path.glob("*.safetensors")]
    assert checkpoint.sha256() == hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()


@pytest.mark.parametrize("name", ["model.safetensors", "open_clip_model.safetensors"])
def test_folder_prefers_safetensors(tmp_path, name):
    torch.save({"w": torch.zeros(2)}, tmp_path / "open_clip_pytorch_model.bin")
    assert open_checkpoint(tmp_path).path.name == "open_clip_pytorch_model.bin"
    torch.save({"w": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    assert open_checkpoint(tmp_path).path.name == "pytorch_model.bin"
    save_file({"w": torch.ones(2)}, tmp_path / name)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.path.name == name
    assert checkpoint.sha256() == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures memory through /proc")
@pytest.mark.parametrize("kind", ["torch", "torchscript", "safetensors"])
def test_opening_and_reading_one_by_one_take_little_memory(tmp_path, kind):
    """200 MB in 50 tensors: whoever reads them all at once needs 200 MB more, whoever opens them next to nothing."""
    tensors = {f"w{number}": torch.zeros(1000, 1000) for number in range(50)}
    path = tmp_path / "weights"
    if kind == "torchscript":
        save_torchscript(path, tensors)
    else:
        torch.save(tensors, path) if kind == "torch" else save_file(tensors, path)
    # VmHWM is the peak of this process alone. Both ways of reading are measured, so that a blind gauge is noticed.
    program = f"""
import re, sys, torch
from conversion.checkpoints import open_checkpoint
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1000
torch.zeros(10).sum()
start = peak()
checkpoint = open_checkpoint({str(path)!r})
tensor = checkpoint["w7"]
one = peak()
total = sum(checkpoint[name].sum().item() for name in checkpoint)
streamed = peak()
everything = dict(checkpoint.items())
print(one - start, streamed - start, peak() - start)
"""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    path.unlink()  # the folders of several runs are kept
    assert result.returncode == 0, result.stderr
    one, streamed, everything = map(float, result.stdout.split())
    # A tensor has 4 MB; the rest is the allocator's and the interpreter's.
    assert one < 40 and streamed < 60 and everything > 150, result.stdout


# What is refused: pickles


def text(string: str) -> bytes:
    data = string.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    data = value.to_bytes(9, "little", signed=True)
    return b"\x8a\x09" + data


def call(module: str, name: str, *arguments: bytes) -> bytes:
    return f"c{module}\n{name}\n".encode() + b"(" + b"".join(arguments) + b"tR"


def storage(key: str = "0", numel: int = 4, kind: str = "FloatStorage") -> bytes:
    return b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu") + number(numel) + b"tQ"


def tensor(where: bytes, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *rest: bytes) -> bytes:
    sizes = [b"(" + b"".join(map(number, numbers)) + b"t" for numbers in (shape, stride)]
    return call(
        "torch._utils",
        "_rebuild_tensor_v2",
        where,
        number(offset),
        *sizes,
        b"\x89",
        b"ccollections\nOrderedDict\n)R",
        *rest,
    )


def program(body: bytes) -> bytes:
    """A dictionary with `body` under "w"."""
    return b"\x80\x02}" + text("w") + body + b"s."


GOOD = tensor(storage(), 0, (2, 2), (2, 1))
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"

# name -> what stands in the place of a tensor (CANARY is replaced by the path of a file), and the message.
PICKLES = {
    "os.system": (call("os", "system", text("touch CANARY")), "'os.system'.*nothing was run"),
    "posix.system": (call("posix", "system", text("touch CANARY")), "posix.system"),
    "subprocess": (call("subprocess", "getoutput", text("touch CANARY")), "subprocess.getoutput"),
    "eval": (call("builtins", "eval", text("open('CANARY', 'w')")), "builtins.eval"),
    "exec": (call("__builtin__", "exec", text("open('CANARY', 'w')")), "__builtin__.exec"),
    "open": (call("io", "open", text("CANARY"), text("w")), "io.open"),
    "getattr": (call("builtins", "getattr", text("x"), text("__class__")), "builtins.getattr"),
    "import": (call("builtins", "__import__", text("antigravity")), "builtins.__import__"),
    "torch.load": (call("torch", "load", text("CANARY")), "'torch.load'"),
    "torch.jit.load": (call("torch.jit", "load", text("CANARY")), "'torch.jit.load'"),
    "torch.save": (call("torch", "save", b"N", text("CANARY")), "'torch.save'"),
    "numpy.load": (call("numpy", "load", text("CANARY")), "numpy.load"),
    "numpy array": (call("numpy.core.multiarray", "_reconstruct", b"N"), "_reconstruct"),
    "dotted name": (call("torch._utils", "_rebuild_tensor_v2.__globals__", b"N"), "__globals__"),
    "module class": (b"ctorch.nn.modules.linear\nLinear\n)\x81}b", "modules.linear.Linear.*state_dict"),
    "quantised": (call("torch._utils", "_rebuild_qtensor", b"N"), "_rebuild_qtensor"),
    "extension": (b"\x82\x01", "uses EXT1"),
    "INST": (b"(X\x01\0\0\0xios\nsystem\n", "uses INST"),
    "OBJ": (b"(ccollections\nOrderedDict\nX\x01\0\0\0xo", "uses OBJ"),
    "STACK_GLOBAL": (text("os") + text("system") + b"\x93", "uses STACK_GLOBAL"),
    "text reference": (b"Pos.system\n", "uses PERSID"),
    "long number": (b"I" + b"9" * 100_000 + b"\n", "uses INT|Exceeds the limit"),
    "memo bomb": (b"Nr\xff\xff\xff\x7f", "no named tensors"),
    "state of a function": (REBUILD + b"}" + text("__code__") + b"Nsb", "gives a state to a function"),
    "state of a tensor": (GOOD + b"}" + text("shape") + b"Nsb", "gives a state to a Entry"),
    "state of a class": (b"ccollections\nOrderedDict\nN}" + text("__init__") + b"Ns\x86b", "gives a state to a function"),
    "state of a module class": (b"c__torch__\nM\nN}" + text("__init__") + b"Ns\x86b", "gives a state to a type"),
    "packed module": (b"c__torch__\nM\n)\x81(K\x01tb", "something other than its attributes"),
    "call of a module": (b"c__torch__\nM\n)R", r"no function \(REDUCE\)"),
    "module arguments": (b"c__torch__\nM\n(K\x01t\x81", r"no function \(NEWOBJ\)"),
    "instance of a function": (REBUILD + b")\x81", r"no function \(NEWOBJ\)"),
    "call of a tensor": (GOOD + b")R", r"no function \(REDUCE\)"),
    "call of a text": (text("os.system") + b")R", r"no function \(REDUCE\)"),
    "item of a class": (b"ccollections\nOrderedDict\n" + text("x") + b"Ns", "takes a function for a dict"),
    "item of a list": (b"]K\x05Ns", "takes a list for a dict"),
    "foreign reference": (b"(" + text("module") + text("os") + text("s") + text("cpu") + b"NtQ", "no storage"),
    "bare reference": (text("../../etc/passwd") + b"Q", "no storage"),
    "reference with a list": (b"(" + text("storage") + b"N]" + text("cpu") + b"K\x01tQ", "storage of no known type"),
    "storage outside": (tensor(storage("../version"), 0, (1,), (1,)), "'archive/tensors/../version' is missing"),
    "storage that is missing": (tensor(storage("7"), 0, (1,), (1,)), "is missing"),
    "storage too short": (tensor(storage(numel=5), 0, (1,), (1,)), "has 16 bytes, but its pickle says 5 elements of 4"),
    "storage too long": (tensor(storage(numel=3), 0, (1,), (1,)), "its pickle says 3 elements"),
    "storage of another type": (tensor(storage(kind="DoubleStorage"), 0, (1,), (1,)), "4 elements of 8"),
    "storage below nothing": (tensor(storage(numel=-1), 0, (1,), (1,)), "its pickle says -1"),
    "view beyond": (tensor(storage(), 1, (2, 2), (2, 1)), "reaches beyond its storage of 4 elements"),
    "stride beyond": (tensor(storage(), 0, (2,), (4,)), "reaches beyond"),
    "offset of an empty one": (tensor(storage(), 5, (0,), (1,)), "reaches beyond"),
    "negative shape": (tensor(storage(), 0, (-2,), (1,)), "whole numbers from 0"),
    "negative stride": (tensor(storage(), 3, (2,), (-1,)), "whole numbers from 0"),
    "negative offset": (tensor(storage(), -1, (2,), (1,)), "whole numbers from 0"),
    "fewer strides": (tensor(storage(), 0, (2, 2), (1,)), "2 sizes and 1 strides"),
    "many dimensions": (tensor(storage(), 0, (1,) * 65, (1,) * 65), "65 sizes"),
    "terabytes": (tensor(storage(), 0, (2**40,), (0,)), "repeats the 4 elements"),
    "terabytes of nothing": (tensor(storage(), 0, (0, 2**62, 2**62), (1, 1, 1)), "repeats the 4 elements"),
    "shape of texts": (
        call("torch._utils", "_rebuild_tensor_v2", storage(), b"K\0", b"(" + text("a") + b"t", b"(K\1t", b"\x89", b"N"),
        "shape",
    ),
    "tensor of nothing": (tensor(b"N", 0, (1,), (1,)), "without a typed storage"),
    "conjugate": (tensor(storage(), 0, (1,), (1,), b"}" + text("conj") + b"\x88s"), "lazy conjugate"),
    "key": (b"}(K\1K\2tNs", "key of type tuple"),
    "long name": (b"}" + text("x" * 600) + GOOD + b"s", "name of more than 512"),
    "one name twice": (b"}" + text("1") + GOOD + b"sK\x01" + GOOD + b"s", "two things in the file are named 'w.1'"),
    "deep": (b"]" * 5000 + b"a" * 4999, "64 levels"),
    "loop": (b"}q\x01" + text("x") + b"h\x01s", "64 levels"),
    # Ten lists of which each holds the one before 100 times: 10^20 leaves from 3 kB.
    "laughs": (
        b"](" + b"".join(b"](" + (b"h" + bytes([n]) if n else b"N") * 100 + b"eq" + bytes([n + 1]) for n in range(10)) + b"e",
        "1000000 things",
    ),
    "NumPy object": (call("numpy", "dtype", text("O8"), b"\x89", b"\x88"), "NumPy value that is no number"),
    "no mark": (b"t", "damaged .IndexError"),
    "empty stack": (b"00", "uses POP"),
    "more than there is": (b"\x87", "takes more than it has"),
    "nothing": (b"N", "no named tensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", PICKLES)
def test_rejects_forged_pickles_and_runs_nothing(tmp_path, name):
    body, message = PICKLES[name]
    canary = tmp_path / "canary"
    # The path has another length than its placeholder: texts with it are packed anew.
    for string in ("touch CANARY", "open('CANARY', 'w')", "CANARY"):
        body = body.replace(text(string), text(string.replace("CANARY", str(canary))))
    for add in ({}, {"archive/constants.pkl": b"\x80\x02)."}):
        path = write_archive(tmp_path / "forged.pt", program(body), {"0": bytes(16)})
        rewrite_zip(path, add=add)
        with pytest.raises(CheckpointError, match=message) as caught:
            open_checkpoint(path)
        assert str(path) in str(caught.value)
        assert not canary.exists()


def test_the_forged_programs_are_real(tmp_path):
    """The checks above mean nothing if the programs would do nothing: an ordinary unpickler runs them."""
    for name in ("os.system", "posix.system", "subprocess", "eval", "exec", "open"):
        canary = tmp_path / name
        body = PICKLES[name][0]
        for string in ("touch CANARY", "open('CANARY', 'w')", "CANARY"):
            body = body.replace(text(string), text(string.replace("CANARY", str(canary))))
        pickle.loads(program(body))
        assert canary.exists(), name
    write_archive(tmp_path / "good.pt", program(GOOD), {"0": np.float32([1, 2, 3, 4]).tobytes()})
    assert_same(open_checkpoint(tmp_path / "good.pt"), {"w": torch.tensor([[1.0, 2.0], [3.0, 4.0]])})


def test_forged_pickles_leave_no_trace_in_the_next_file(tmp_path):
    test_dir = tmp_path / "forged"
    test_dir.mkdir()
    for name in (name for name in PICKLES if name.startswith("state of")):
        write_archive(test_dir / "forged.pt", program(PICKLES[name][0]), {"0": bytes(16)})
        with pytest.raises(CheckpointError):
            open_checkpoint(test_dir / "forged.pt")
    tensors = views()
    torch.save(collections.OrderedDict(tensors), tmp_path / "good.pt")
    assert_same(open_checkpoint(tmp_path / "good.pt"), tensors)


def test_torchscript_code_never_runs(tmp_path):
    """A module whose `__setstate__` writes a file: torch.jit.load writes it, here it is only refused."""
    canary = str(tmp_path / "canary")

    class Module(torch.nn.Module):
        path: torch.jit.Final[str]

        def __init__(self):
            super().__init__()
            self.path = canary
            self.weight = torch.nn.Parameter(torch.ones(2))

        @torch.jit.export
        def __getstate__(self):
            return self.weight, self.training

        @torch.jit.export
        def __setstate__(self, state: tuple[torch.Tensor, bool]):
            torch.save(state[0], self.path)
            self.weight = state[0]
            self.training = state[1]

        def forward(self, inputs):
            return inputs

    torch.jit.script(Module()).save(str(tmp_path / "module.pt"))
    torch.jit.load(str(tmp_path / "module.pt"))
    assert Path(canary).exists()
    Path(canary).unlink()
    with pytest.raises(CheckpointError, match="something other than its attributes"):
        open_checkpoint(tmp_path / "module.pt")
    assert not Path(canary).exists()


def test_rejects_other_pickle_protocols_and_whole_modules(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "protocol.pt", pickle_protocol=4)
    with pytest.raises(CheckpointError, match="default pickle_protocol"):
        open_checkpoint(tmp_path / "protocol.pt")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(CheckpointError, match=r"torch.save\(model.state_dict\(\), path\)"):
        open_checkpoint(tmp_path / "module.pt")
    torch.save(torch.ones(2), tmp_path / "tensor.pt")
    with pytest.raises(CheckpointError, match="expected a state dict"):
        open_checkpoint(tmp_path / "tensor.pt")
    write_archive(tmp_path / "huge.pt", bytes(64 * 2**20 + 1))
    with pytest.raises(CheckpointError, match="expected at most 67108864"):
        open_checkpoint(tmp_path / "huge.pt")
    (tmp_path / "huge.pt").unlink()


# What is refused: zips


def small_archive(path: Path) -> Path:
    torch.save({"a": torch.arange(64.0), "b": torch.ones(3)}, path)
    return path


def patch_entry(path: Path, ending: bytes, changes: dict[int, bytes]) -> None:
    """Changes bytes of the directory entry of the file whose name ends so; the offsets count from its start."""
    data = bytearray(path.read_bytes())
    start = data.rindex(b"PK\x01\x02", 0, data.rindex(ending, data.index(b"PK\x01\x02")))
    for offset, value in changes.items():
        data[start + offset : start + offset + len(value)] = value
    path.write_bytes(data)


def two_of_one_name(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile warns of the name
        rewrite_zip(path, add={"small/data/0": bytes(256)})


# name -> how a good archive is spoilt, and the message; offsets are those of a zip directory entry.
ARCHIVES = {
    "compressed storage": (lambda path: rewrite_zip(path, compress=".*/data/0"), "is compressed or encrypted"),
    "compressed pickle": (lambda path: rewrite_zip(path, compress=".*/data.pkl"), "is compressed or encrypted"),
    "encrypted": (lambda path: patch_entry(path, b"/data/0", {8: b"\x01\x08"}), "is compressed or encrypted"),
    "two of one name": (two_of_one_name, "two entries of the zip archive have one name"),
    "two pickles": (lambda path: rewrite_zip(path, add={"other/data.pkl": b"N."}), "2 pickles"),
    "no pickle": (lambda path: rewrite_zip(path, drop=".*/data.pkl"), "0 pickles.*Unpack"),
    "no storage": (lambda path: rewrite_zip(path, drop=".*/data/1"), "data/1' is missing|tensors/1' is missing"),
    "parent folder": (lambda path: rewrite_zip(path, add={"small/../../evil": b"x"}), "unsafe name"),
    "absolute name": (lambda path: rewrite_zip(path, add={"/etc/evil": b"x"}), "unsafe name '/etc/evil'"),
    "backslash": (lambda path: rewrite_zip(path, add={"small\\..\\evil": b"x"}), "unsafe name"),
    "big-endian": (lambda path: rewrite_zip(path, replace={"/byteorder": b"big"}), "big-endian"),
    "size beyond the file": (
        lambda path: patch_entry(path, b"/data/0", {20: b"\xff\xff\xff\x3f", 24: b"\xff\xff\xff\x3f"}),
        "bytes that are not its own",
    ),
    "size of the next": (
        lambda path: patch_entry(path, b"/data/0", {20: b"\x00\x04\0\0", 24: b"\x00\x04\0\0"}),
        "bytes that are not its own",
    ),
    "two sizes": (lambda path: patch_entry(path, b"/data/0", {24: b"\xff\xff\xff\x3f"}), "is compressed or encrypted"),
    "place of another": (
        lambda path: patch_entry(path, b"/data/0", {42: b"\0\0\0\0"}),
        "has another name|bytes that are not its own",
    ),
    "pickle's checksum": (lambda path: patch_entry(path, b"/data.pkl", {16: b"\0\0\0\0"}), "do not fit the checksum"),
    "huge directory": (
        lambda path: path.write_bytes(path.read_bytes()[:-10] + b"\xf0\xff\xff\xff" + path.read_bytes()[-6:]),
        "a zip directory of 4294967280 bytes",
    ),
    "comment": (lambda path: path.write_bytes(path.read_bytes() + b"comment"), "does not end as torch ends it"),
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHIVES)
def test_rejects_forged_archives(tmp_path, name):
    path = small_archive(tmp_path / "small.pt")
    rewrite_zip(path)  # as zipfile writes it: without data descriptors and padding, which move the offsets
    assert list(open_checkpoint(path)) == ["a", "b"]
    spoil, message = ARCHIVES[name]
    spoil(path)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)


def test_zip64_archives_are_read_and_their_sizes_checked(tmp_path):
    """Archives above 4 GB carry their sizes in a second record, made here by hand."""
    path = rewrite_zip(small_archive(tmp_path / "small.pt"))
    data = path.read_bytes()
    count, size, offset = struct.unpack("<HII", data[-12:-2])
    for claimed, place, message in (
        (size, 0, None),
        (2**40, 0, "zip directory of 1099511627776"),
        (size, 7, "misplaced"),
    ):
        record = struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, claimed, offset)
        locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, len(data) - 22 + place, 1)
        path.write_bytes(data[:-22] + record + locator + data[-22:])
        if message is None:
            assert same(open_checkpoint(path)["a"], torch.arange(64.0))
        else:
            with pytest.raises(CheckpointError, match=message):
                open_checkpoint(path)


def test_rejects_damage_in_what_is_read(tmp_path):
    path = small_archive(tmp_path / "small.pt")
    data = path.read_bytes()
    place = data.index(np.arange(64, dtype=np.float32).tobytes())
    path.write_bytes(data[: place + 100] + b"\x55" + data[place + 101 :])
    checkpoint = open_checkpoint(path)
    assert same(checkpoint["b"], torch.ones(3))
    with pytest.raises(CheckpointError, match="small.pt, tensor 'a'.*do not fit the checksum"):
        checkpoint["a"]
    # A view of a part that is whole is refused too: the checksum is the storage's.
    torch.save({"part": torch.arange(64.0)[40:]}, path)
    data = path.read_bytes()
    place = data.index(np.arange(64, dtype=np.float32).tobytes())
    path.write_bytes(data[:place] + b"\x55" + data[place + 1 :])
    with pytest.raises(CheckpointError, match="do not fit the checksum"):
        open_checkpoint(path)["part"]
    checkpoint = open_checkpoint(path)
    os.truncate(path, 100)
    with pytest.raises(CheckpointError, match="ends too early"):
        checkpoint["part"]
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint["part"]
    with pytest.raises(KeyError):
        checkpoint["absent"]
    assert "absent" not in checkpoint and "part" in checkpoint


@pytest.mark.parametrize("kind", ["torch", "torchscript", "safetensors"])
def test_rejects_every_truncation(tmp_path, kind):
    path = tmp_path / "small.safetensors" if kind == "safetensors" else small_archive(tmp_path / "small.pt")
    if kind == "safetensors":
        save_file({"a": torch.arange(64.0), "b": torch.ones(3)}, path)
    if kind == "torchscript":
        save_torchscript(path, {"a": torch.arange(64.0), "b": torch.ones(3)})
    data = path.read_bytes()
    open_checkpoint(path)
    for size in range(0, len(data), max(1, len(data) // 97)):
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match="download|begins with"):
            open_checkpoint(path)


@pytest.mark.parametrize("kind", ["torch", "safetensors"])
def test_random_damage_never_gets_beyond_checkpoint_errors(tmp_path, kind):
    """Any byte may change: a file opens, or is refused with the one error that callers catch."""
    path = tmp_path / "small.safetensors"
    if kind == "torch":
        small_archive(path)
        rewrite_zip(path)  # without padding, so that most changes hit something
    else:
        save_file({"a": torch.arange(64.0), "b": torch.ones(3)}, path)
    data = path.read_bytes()
    dice = random.Random(0)
    outcomes = collections.Counter()
    for _ in range(600):
        damaged = bytearray(data)
        for _ in range(dice.choice((1, 2, 8))):
            damaged[dice.randrange(len(damaged))] = dice.randrange(256)
        path.write_bytes(damaged)
        try:
            dict(open_checkpoint(path).items())
            outcomes["read"] += 1
        except CheckpointError:
            outcomes["refused"] += 1
    assert outcomes["refused"] > 100 and outcomes["read"] > 10, outcomes


def test_random_pickles_never_get_beyond_checkpoint_errors(tmp_path):
    """As above behind a right checksum, where the pickle itself is what is damaged."""
    with zipfile.ZipFile(small_archive(tmp_path / "small.pt")) as archive:
        data = archive.read("small/data.pkl")
        records = {key: archive.read(f"small/data/{key}") for key in "01"}
    dice = random.Random(0)
    refused = 0
    for _ in range(600):
        damaged = bytearray(data)
        for _ in range(dice.choice((1, 2, 8))):
            damaged[dice.randrange(2, len(damaged))] = dice.choice((dice.randrange(256), dice.choice(data)))
        write_archive(tmp_path / "small.pt", bytes(damaged), records)
        try:
            dict(open_checkpoint(tmp_path / "small.pt").items())
        except CheckpointError:
            refused += 1
    assert refused > 100


# What is refused: safetensors, folders, and files of other kinds


def safetensors_bytes(header: dict | bytes, data: bytes = b"") -> bytes:
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + data


@pytest.mark.parametrize(
    "content",
    [
        safetensors_bytes({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, bytes(8)),
        safetensors_bytes({"w": {"dtype": "F32", "shape": [400], "data_offsets": [0, 16]}}, bytes(16)),
        safetensors_bytes({"w": {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]}}, bytes(24)),
        safetensors_bytes({"w": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}}, bytes(16)),
        safetensors_bytes({"w": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}}, bytes(16)),
        safetensors_bytes({"w": {"dtype": "object", "shape": [4], "data_offsets": [0, 16]}}, bytes(16)),
        safetensors_bytes(b'{"w": '),
        struct.pack("<Q", 2**62) + b"{}",
        safetensors_bytes(b"[" * 100_000),
        b"short",
    ],
    ids=["half-written", "shape", "hole", "reversed", "negative", "dtype", "json", "huge header", "deep", "short"],
)
def test_rejects_broken_safetensors(tmp_path, content):
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="w.safetensors: no complete safetensors file"):
        open_checkpoint(tmp_path / "w.safetensors")


def test_rejects_safetensors_without_tensors(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(safetensors_bytes({}))
    with pytest.raises(CheckpointError, match="0 tensors"):
        open_checkpoint(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    "weight_map, message",
    [
        ({"a": "../secret.safetensors"}, r"names \['../secret.safetensors'\]; expected plain names"),
        ({"a": "/etc/x.safetensors"}, "expected plain names"),
        ({"a": "pytorch_model.bin"}, "expected plain names"),
        ({"a": "gone.safetensors"}, r"missing: \['gone.safetensors'\]"),
        ({"z": "model-00001-of-00002.safetensors"}, r"disagree on \['a', 'b', 'z'\]"),
        ({"a": 5}, "expected plain names"),
        ({"a": []}, "no index of shards"),
        ([], "no index of shards"),
        ({}, "no index of shards"),
    ],
)
def test_rejects_wrong_indexes(tmp_path, weight_map, message):
    write_shards(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "the file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 605\n", "Git LFS pointer.*git lfs pull"),
        (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "web page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "web page or an error message"),
        (b"\x1f\x8b\x08\0\0", "compressed file; unpack it"),
        (b"7z\xbc\xaf\x27\x1c\0\4", "compressed file; unpack it"),
        (b"PK\x05\x06" + bytes(18), "empty zip archive"),
        (bytes(257) + b"ustar\0" + bytes(300), "before 1.6.*save it again with torch.save"),
        (b"\x89PNG\r\n\x1a\n", "begins with .*PNG.*expected a zip archive of torch"),
    ],
)
def test_rejects_files_of_other_kinds(tmp_path, content, message):
    (tmp_path / "ViT-B-32.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "ViT-B-32.pt")


def test_rejects_torch_files_from_before_zip(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="before 1.6.*weights_only=True and save it again"):
        open_checkpoint(tmp_path / "old.pt")


def test_rejects_places_without_a_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="absent.pt: no such file"):
        open_checkpoint(tmp_path / "absent.pt")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"found \['config.json'\], expected one of \['model.safetensors'"):
        open_checkpoint(tmp_path)
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    with pytest.raises(CheckpointError, match="no such file"):
        open_checkpoint(tmp_path / "pipe")


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs POSIX permissions")
def test_reports_missing_permission(tmp_path):
    path = small_archive(tmp_path / "small.pt")
    path.chmod(0)
    user = os.geteuid()
    if user == 0:  # root may read everything
        os.seteuid(65534)
    try:
        with pytest.raises(CheckpointError, match="small.pt: cannot be read.*Permission denied"):
            open_checkpoint(path)
    finally:
        os.seteuid(user)
