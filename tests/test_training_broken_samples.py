"""Training on data of which a tenth is broken, in every way we could think of: it completes, and each is counted.

HFCLIP_BROKEN_SAMPLES sets how many samples are broken (default 110; ten times as many are in all).
"""

import io
import json
import os
import re
import struct
import tarfile
import zlib
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from training_utils import (
    caption,
    image_bytes,
    model_with_tokenizer,
    pairs,
    tiny_recipe,
    train,
    write_recipe,
    write_tar,
)

from hfclip import HFCLIPTokenizer
from training.config import Config
from training.data.batches import COUNTED, Collate, PairDataset, build_loader
from training.data.batches import open_data as open_source


pytestmark = pytest.mark.slow


NUM_BROKEN = int(os.environ.get("HFCLIP_BROKEN_SAMPLES", "110"))
BATCH = 16
JPEG, PNG = image_bytes(0), image_bytes(0, kind="PNG")


def encoded(image, kind="PNG"):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def png_of_size(width, height):
    """A PNG whose header promises so many pixels."""
    data = bytearray(encoded(Image.new("L", (8, 8))))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def wrong_checksum(png):
    return png[:29] + bytes([png[29] ^ 255]) + png[30:]


def link(name):
    header = tarfile.TarInfo(name)
    header.type, header.linkname = tarfile.SYMTYPE, "/etc/hostname"
    return header


def folder(name):
    header = tarfile.TarInfo(name)
    header.type = tarfile.DIRTYPE
    return header


TEXT, DEEP = b"a cat", b'{"text": ' + b"[" * 100_000
# What the sample is counted under, and its members: extension -> content, or how its header is made.
BROKEN = {
    "truncated JPEG": ("unreadable image", [("jpg", JPEG[: len(JPEG) // 2]), ("txt", TEXT)]),
    "PNG with a wrong checksum": ("unreadable image", [("png", wrong_checksum(PNG)), ("txt", TEXT)]),
    "floats in a TIFF": (
        "unreadable image",
        [("png", encoded(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF")), ("txt", TEXT)],
    ),
    "no bytes for an image": ("empty image", [("jpg", b""), ("txt", TEXT)]),
    "decompression bomb": ("too large image", [("png", png_of_size(20_000, 20_000)), ("txt", TEXT)]),
    "a line 200,000 pixels long": ("too large image", [("png", encoded(Image.new("L", (1, 200_000)))), ("txt", TEXT)]),
    "error page for an image": ("not an image", [("jpg", b"<html><body>404 Not Found</body></html>"), ("txt", TEXT)]),
    "noise for an image": ("not an image", [("jpg", np.random.default_rng(0).bytes(700)), ("txt", TEXT)]),
    "empty text": ("empty caption", [("jpg", JPEG), ("txt", b"")]),
    "blank text": ("empty caption", [("jpg", JPEG), ("txt", " \t\n\u3000".encode())]),
    "blanks of HTML": ("empty caption", [("jpg", JPEG), ("txt", b"&nbsp; &#8203;&amp;nbsp;")]),
    "mark of byte order": ("empty caption", [("jpg", JPEG), ("txt", b"\xef\xbb\xbf\n")]),
    "characters without width": ("empty caption", [("jpg", JPEG), ("json", b'{"text": "\\u200b\\u2060\\ufeff"}')]),
    "no caption in the list": ("empty caption", [("jpg", JPEG), ("json", b'{"captions": []}')]),
    "text in UTF-16": ("unreadable caption", [("jpg", JPEG), ("txt", "a cat".encode("utf-16"))]),
    "broken JSON": ("unreadable caption", [("jpg", JPEG), ("json", b'{"text": "a cat"')]),
    "number for a caption": ("unreadable caption", [("jpg", JPEG), ("json", b'{"text": 5}')]),
    "half a character": ("unreadable caption", [("jpg", JPEG), ("json", b'{"text": "a cat \\ud83d"}')]),
    "JSON 100,000 levels deep": ("unreadable caption", [("jpg", JPEG), ("json", DEEP)]),
    "JSON without caption": ("missing caption", [("jpg", JPEG), ("json", b'{"url": "http://a.b/c.jpg"}')]),
    "null for a caption": ("missing caption", [("jpg", JPEG), ("json", b'{"text": null}')]),
    "image without text": ("missing caption", [("jpg", JPEG)]),
    "text without image": ("missing image", [("txt", TEXT)]),
    "link for an image": ("missing image", [("jpg", link), ("txt", TEXT)]),
    "folder for an image": ("missing image", [("jpg", folder), ("txt", TEXT)]),
}
LEFT_OUT = ("image without text", "text without image", "link for an image", "folder for an image")  # at the start
LEFT_OUT += ("empty text", "blank text", "blanks of HTML", "mark of byte order")
# Odd, but nothing is wrong with them.
ODD = {
    "../../outside/{}": [("jpg", JPEG), ("txt", TEXT)],
    "/absolute/{}": [("jpg", image_bytes(1, kind="GIF")), ("txt", TEXT)],
    "a/b/c/d/{}": [("jpg", encoded(Image.new("CMYK", (40, 32)), "JPEG")), ("txt", b"a\0cat")],
    "\u00e9\u4e2d/{}": [("png", encoded(Image.new("P", (40, 32)))), ("json", json.dumps({"text": "\u732b"}).encode())],
    "ampersands/{}": [("jpg", JPEG), ("txt", "\u732b & \U0001f408&nbsp;".encode())],
    "x" * 200 + "/{}": [("webp", image_bytes(2, kind="WEBP")), ("txt", b"\xef\xbb\xbfa cat" + b" cat" * 10_000)],
}


def add(tar, name, extension, content):
    if callable(content):
        tar.addfile(content(f"{name}.{extension}"))
        return
    header = tarfile.TarInfo(f"{name}.{extension}")
    header.size = len(content)
    tar.addfile(header, io.BytesIO(content))


def write_broken_data(path):
    """Tars with broken samples strewn among good ones; those that have a place in the epoch make whole batches.

    Returns the counts that are to be found at the start, and during an epoch.
    """
    each = NUM_BROKEN // len(BROKEN)
    samples = [members for _, members in BROKEN.values() for _ in range(each)]
    names = [f"{i:06d}" for i in range(len(samples))] + [name.format(i) for i, name in enumerate(ODD)]
    samples += ODD.values()
    left_out = each * len(LEFT_OUT)
    num_good = 9 * NUM_BROKEN + -(9 * NUM_BROKEN + len(samples) - left_out + damaged_tars(path)) % BATCH
    names += [f"good/{i:06d}" for i in range(num_good)]
    samples += [[("jpg", image_bytes(i)), ("txt", caption(i % 4096).encode())] for i in range(num_good)]

    order = np.random.default_rng(0).permutation(len(samples))
    for shard in range(4):
        with tarfile.open(path / f"{shard}.tar", "w") as tar:
            for i in order[shard::4]:
                for extension, content in samples[i]:
                    add(tar, names[i], extension, content)
    at_start = Counter({"truncated shard": 1, "damaged shard": 1, "not a tar": 1, "missing caption": 2})
    in_epoch = Counter()
    for name, (kind, _) in BROKEN.items():
        (at_start if name in LEFT_OUT else in_epoch)[kind] += each
    return at_start, in_epoch


def damaged_tars(path):
    """A tar that ends in its last text, one with noise for the header of a text, one that is none.

    Returns how many pairs are left in them: two lose their texts.
    """
    for name in ("truncated", "damaged"):
        write_tar(path / f"{name}.tar", pairs(range(8)))
        data = bytearray((path / f"{name}.tar").read_bytes())
        with tarfile.open(path / f"{name}.tar") as tar:
            texts = [member for member in tar if member.name.endswith(".txt")]
        if name == "truncated":
            del data[texts[-1].offset_data + 2 :]
        else:
            data[texts[3].offset : texts[3].offset_data] = np.random.default_rng(1).bytes(512)
        (path / f"{name}.tar").write_bytes(data)
    (path / "none.tar").write_bytes(b"<html>404</html>" * 100)
    return 14


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("broken")
    (path / "shards").mkdir()
    return path, *write_broken_data(path / "shards")


@pytest.mark.parametrize(("num_ranks", "workers"), [(1, 0), (3, 2)])
def test_each_broken_sample_is_counted_once_an_epoch(data, num_ranks, workers):
    path, at_start, in_epoch = data
    config = Config.from_dict(tiny_recipe(path, data={"num_workers": workers}))
    source = open_source(config.data.train, config.data, "train", 32)
    assert source.skipped == at_start
    dataset = PairDataset(source, config, 32)
    assert len(source) == dataset.steps_per_epoch * BATCH  # all have a place
    tokenizer = HFCLIPTokenizer.train_new_from_iterator(map(caption, range(300)), 600, show_progress=False)
    collate = Collate(tokenizer, pad_to_max=False, group=True)
    for epoch in range(2):
        counts = 0
        for rank in range(num_ranks):
            span = {"start": epoch * dataset.steps_per_epoch, "stop": (epoch + 1) * dataset.steps_per_epoch}
            for batch in build_loader(dataset, collate, config, **span, rank=rank, num_ranks=num_ranks):
                assert "failure" not in batch
                counts = counts + batch["counts"]
        found = Counter(dict(zip(COUNTED, counts.tolist(), strict=True)))
        expected = {f"skipped: {kind}": count for kind, count in in_epoch.items()}
        assert {kind: count for kind, count in found.items() if count and kind != "truncated captions"} == expected


def test_training_completes_and_counts_each_broken_sample(data, tmp_path):
    path, at_start, in_epoch = data
    sections = {"model": model_with_tokenizer(tmp_path), "optim": {"steps": None, "epochs": 1}}
    files = {"train": str(path / "shards"), "num_workers": 1}
    process = train("--config", write_recipe(tmp_path, data=files, **sections), processes=2)
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    told = next(line for line in process.stdout.splitlines() if line.startswith("Left out of the data"))
    assert {kind: int(count) for count, kind in re.findall(r"(\d+) with ([a-z ]*[a-z])", told)} == at_start
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    counts = {name: count for name, count in lines[-1].items() if name.startswith("skipped: ")}
    assert counts == {f"skipped: {kind}": count for kind, count in in_epoch.items()}
    assert lines[-1]["skipped_steps"] == 0 and len(lines) == lines[-1]["step"]
