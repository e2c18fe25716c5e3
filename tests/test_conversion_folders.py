"""safetensors files, shards and folders are read as one checkpoint; files of other kinds are refused with what to do."""

import hashlib
import json
import os
import struct
from pathlib import Path

import pytest
import torch
from conversion_utils import all_kinds, assert_same, small_archive, write_archive
from safetensors.torch import save_file
from test_conversion_pickles import call, program, text

from hfclip.foreign.checkpoints import CheckpointError, open_checkpoint


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


def write_pickled_shards(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {name: torch.full((2, 3), float(number)).half() for number, name in enumerate("abcd")}
    names = {name: f"pytorch_model-0000{1 + (name > 'b')}-of-00002.bin" for name in "abcd"}
    for file in set(names.values()):
        torch.save({name: tensors[name] for name in names if names[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return tensors


def test_pickled_shards_are_one_checkpoint(tmp_path):
    tensors = write_pickled_shards(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert_same(checkpoint, tensors)
    assert (checkpoint.path.name, checkpoint.format) == ("pytorch_model.bin.index.json", "torch")
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in tmp_path.glob("*.bin")]
    assert checkpoint.sha256() == hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()
    write_shards(tmp_path)
    assert open_checkpoint(tmp_path).format == "safetensors"


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


# What is refused


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
        ({"a": []}, "the index names"),
        ([], "no index of shards"),
        ({}, "no index of shards"),
    ],
)
def test_rejects_wrong_indexes(tmp_path, weight_map, message):
    write_shards(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 605\n"


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("pytorch_model-00002-of-00002.bin", LFS_POINTER, "00002.bin: this is a Git LFS pointer"),
        ("pytorch_model-00002-of-00002.bin", None, r"missing: \['pytorch_model-00002"),
        ("pytorch_model-00002-of-00002.bin", "forged", "00002.bin: its pickle asks for 'os.system'.*nothing was run"),
        ("pytorch_model-00002-of-00002.bin", "safetensors", "00002.bin: a safetensors file, expected torch"),
        ("pytorch_model-00002-of-00002.bin", "others", r"00002.bin disagree on \['c', 'd', 'x'\]"),
        ("../pytorch_model.bin", "others", "expected plain names of .bin files"),
        ("shard.safetensors", "others", "expected plain names of .bin files"),
    ],
)
def test_rejects_wrong_pickled_shards(tmp_path, name, content, message):
    (tmp_path / "model").mkdir()
    write_pickled_shards(tmp_path / "model")
    index = tmp_path / "model" / "pytorch_model.bin.index.json"
    index.write_text(index.read_text().replace("pytorch_model-00002-of-00002.bin", name))
    shard, canary = tmp_path / "model" / name, tmp_path / "canary"
    if content == "forged":
        write_archive(shard, program(call("os", "system", text(f"touch {canary}"))))
    elif content == "safetensors":
        save_file({"c": torch.ones(1), "d": torch.ones(1)}, shard)
    elif content == "others":
        torch.save({"x": torch.ones(1)}, shard)
    else:
        shard.unlink() if content is None else shard.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "model")
    assert not canary.exists()


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "the file is empty"),
        (LFS_POINTER, "Git LFS pointer.*git lfs pull"),
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
