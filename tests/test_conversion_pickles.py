"""Pickles in torch's archives become the tensors, numbers and texts that torch wrote; forged ones are refused, and nothing
of them runs."""

import argparse
import collections
import pickle
import random
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conversion_utils import all_kinds, assert_same, rewrite_zip, same, small_archive, views, write_archive

from hfclip.foreign.checkpoints import CheckpointError, open_checkpoint


# What is read


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


# What is refused


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
