"""Archives of torch are read bit for bit, a tensor at a time; broken and forged ones are refused."""

import collections
import os
import random
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conversion_utils import HALF, ROOT, assert_same, rewrite_zip, same, save_torchscript, small_archive
from safetensors.torch import save_file
from test_key_maps import read_golden

from hfclip.foreign.checkpoints import CheckpointError, open_checkpoint


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
from hfclip.foreign.checkpoints import open_checkpoint
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


# What is refused


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
