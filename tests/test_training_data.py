"""Reading of training data: real tars, tables and servers; an order that is a pure function; damage is counted."""

import functools
import gzip
import http.server
import io
import itertools
import json
import os
import pickle
import random
import shutil
import tarfile
import threading
import time
from collections import Counter
from contextlib import contextmanager

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image
from training_utils import caption, image_bytes, pairs, tiny_recipe, write_tar

from hfclip import HFCLIPTokenizer
from hfclip.data.samples import BadSample, Keys, caption_id
from hfclip.data.shards import find_shards, patterns_of
from hfclip.data.tars import files_of
from hfclip.data.webdataset import ShardSource
from hfclip.errors import UsageError
from training.config import Config
from training.data.batches import COUNTED, Collate, PairDataset, build_loader
from training.data.batches import open_data as open_source
from training.data.order import rank_slice, shuffled


def config_of(folder, **sections):
    return Config.from_dict(tiny_recipe(folder, **sections))


def opened(folder, name=None, **data):
    config = config_of(folder, data=data)
    return open_source(str(name or folder / "shards"), config.data, "train", 32)


def shards(folder, num_pairs, num_shards=2):
    """A folder of tars with pairs 0 ... num_pairs - 1 in turn."""
    (folder / "shards").mkdir(exist_ok=True)
    for i in range(num_shards):
        write_tar(folder / "shards" / f"{i:02d}.tar", pairs(range(i, num_pairs, num_shards)))
    return folder / "shards"


@functools.cache
def tokenizer():
    tokenizer = HFCLIPTokenizer.train_new_from_iterator(map(caption, range(300)), 600, show_progress=False)
    tokenizer.model_max_length = 16
    return tokenizer


def table(num_rows):
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    rows = [{"image": {"bytes": image_bytes(i), "path": None}, "caption": caption(i)} for i in range(num_rows)]
    return Dataset.from_list(rows, features=Features({"image": ImageFeature(), "caption": Value("string")}))


def parquet_of_twenty(folder):
    (folder / "parquet").mkdir()
    table(20).to_parquet(str(folder / "parquet" / "train-0.parquet"))
    return str(folder / "parquet")


def resent(value):
    return pickle.loads(pickle.dumps(value))


def batches(config, source, start=0, stop=4, rank=0, num_ranks=1):
    dataset = PairDataset(source, config, 32)
    collate = Collate(tokenizer(), pad_to_max=False, group=config.data.group_captions)
    return list(build_loader(dataset, collate, config, start=start, stop=stop, rank=rank, num_ranks=num_ranks))


def texts(batch):
    return tokenizer().batch_decode(batch["input_ids"], skip_special_tokens=True)


# --------------------------------------------------------------------------------------------------------------- order


@pytest.mark.parametrize("length", [1, 2, 3, 17, 64, 1000])
def test_shuffled_is_a_bijection_in_every_epoch(length):
    orders = [[shuffled(i, length, 3, epoch) for i in range(length)] for epoch in range(3)]
    assert all(sorted(order) == list(range(length)) for order in orders)
    if length > 16:
        assert orders[0] != orders[1] != orders[2] != list(range(length))


def test_shuffled_looks_random():
    """Where a sample lies in one epoch says nothing about the next, nor do neighbours stay together."""
    length = 4096
    a, b = (np.array([shuffled(i, length, 0, epoch) for i in range(length)]) for epoch in (0, 1))
    # Correlations of independent permutations have standard deviation 1 / 64; five of them are beyond chance.
    assert abs(np.corrcoef(a, b)[0, 1]) < 5 / 64
    assert abs(np.corrcoef(a[:-1], a[1:])[0, 1]) < 5 / 64
    assert abs(np.corrcoef(a, np.arange(length))[0, 1]) < 5 / 64


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
def test_rank_slices_make_the_batch(num_ranks):
    slices = [rank_slice(16, rank, num_ranks) for rank in range(num_ranks)]
    assert [slot for part in slices for slot in part] == list(range(16))
    assert max(map(len, slices)) - min(map(len, slices)) <= 1


def test_batches_are_the_same_for_any_ranks_and_workers(tmp_path):
    source = ShardSource(find_shards(str(shards(tmp_path, 50)), tmp_path), Keys(), tmp_path / "cache")
    alone = batches(config_of(tmp_path), source, stop=5)
    several = config_of(tmp_path, data={"num_workers": 2})
    split = [batches(several, source, stop=5, rank=rank, num_ranks=3) for rank in range(3)]
    for step, whole in enumerate(alone):
        parts = [part[step] for part in split]
        assert torch.equal(torch.cat([part["pixel_values"] for part in parts]), whole["pixel_values"])
        assert sum(map(texts, parts), []) == texts(whole)


def test_reading_from_any_step_gives_what_comes_there(tmp_path):
    source, config = opened(tmp_path, shards(tmp_path, 50)), config_of(tmp_path)
    all_steps, later = batches(config, source, stop=7), batches(config, source, start=4, stop=7)
    for a, b in zip(all_steps[4:], later, strict=True):
        assert torch.equal(a["pixel_values"], b["pixel_values"]) and torch.equal(a["input_ids"], b["input_ids"])


@pytest.mark.parametrize("make", [lambda folder: str(shards(folder, 20)), lambda folder: "scenes", parquet_of_twenty])
def test_everything_workers_need_can_be_sent_to_them(make, tmp_path):
    """Where worker processes are not forked (macOS, Windows, Python 3.14) data set and collate are pickled."""
    source, config = opened(tmp_path, make(tmp_path), max_samples=20), config_of(tmp_path)
    parts = PairDataset(source, config, 32), Collate(tokenizer(), pad_to_max=False, group=True)
    expected, found = (collate([dataset[0, i] for i in range(16)]) for dataset, collate in (parts, resent(parts)))
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)


def test_an_epoch_shows_each_pair_once_and_the_next_in_another_order(tmp_path):
    source, config = opened(tmp_path, shards(tmp_path, 48)), config_of(tmp_path)
    seen = [text for batch in batches(config, source, stop=6) for text in texts(batch)]
    first, second = seen[:48], seen[48:]
    assert sorted(first) == sorted(second) == sorted(map(caption, range(48)))
    assert first != second


def test_images_belong_to_their_captions_and_crops_move(tmp_path):
    source, config = opened(tmp_path, shards(tmp_path, 16)), config_of(tmp_path)
    first, second = batches(config, source, stop=2)
    by_text = [dict(zip(texts(batch), batch["pixel_values"], strict=True)) for batch in (first, second)]
    moved = 0
    for seed in range(16):
        pixels = np.asarray(Image.open(io.BytesIO(image_bytes(seed)))).transpose(
            2, 0, 1
        )  # 40 x 32 pixels, crop 32 x 32
        for crops in by_text:
            crop = crops[caption(seed)].numpy()
            assert any((pixels[:, :, x : x + 32] == crop).all() for x in range(9))
        moved += not torch.equal(by_text[0][caption(seed)], by_text[1][caption(seed)])
    assert moved > 8  # a crop stays where it was with probability 1 / 9


def test_one_of_several_captions_is_chosen_by_epoch(tmp_path):
    record = {"captions": ["red", "green", "blue"], "id": 7}
    members = [(f"{i}.{kind}", data) for i in range(16) for kind, data in _both(i, json.dumps(record).encode())]
    (tmp_path / "shards").mkdir()
    write_tar(tmp_path / "shards" / "0.tar", members)
    source, config = opened(tmp_path), config_of(tmp_path)
    seen = [texts(batch) for batch in batches(config, source, stop=4)]
    assert set(sum(seen, [])) == {"red", "green", "blue"} and len({tuple(epoch) for epoch in seen}) == 4
    assert seen == [texts(batch) for batch in batches(config, source, stop=4)]


def _both(seed, record):
    return ("jpg", image_bytes(seed)), ("json", record)


# ------------------------------------------------------------------------------------------------------------- batches


def test_group_ids_follow_the_caption_and_nothing_else(tmp_path):
    members = [(f"{i}.{kind}", data) for i in range(16) for kind, data in (("png", image_bytes(i)), ("txt", b"a cat"))]
    (tmp_path / "shards").mkdir()
    write_tar(tmp_path / "shards" / "0.tar", [*members, *pairs(range(100, 116))])
    source = opened(tmp_path)
    config = config_of(tmp_path, data={"group_captions": True}, optim={"batch_size": 32})
    batch = batches(config, source, stop=1)[0]
    expected = torch.tensor([caption_id(text) for text in texts(batch)])
    assert torch.equal(batch["group_id"], expected)
    assert (batch["group_id"] == caption_id("a cat")).sum() == 16 and len(batch["group_id"].unique()) == 17
    assert caption_id("a cat") == 5867787368591784627  # the same on every machine, in every version
    assert "group_id" not in batches(config_of(tmp_path), source, stop=1)[0]


def test_long_captions_are_cut_counted_and_keep_their_end(tmp_path):
    long = " ".join(["fish"] * 40).encode()
    members = [(f"{i}.{kind}", data) for i in range(16) for kind, data in (("jpg", image_bytes(i)), ("txt", long))]
    (tmp_path / "shards").mkdir()
    write_tar(tmp_path / "shards" / "0.tar", [*members[:10], *pairs(range(100, 111))])
    batch = batches(config_of(tmp_path), opened(tmp_path), stop=1)[0]
    assert batch["input_ids"].shape == (16, 16)
    assert batch["counts"][COUNTED.index("truncated captions")] == 5
    assert all(tokenizer().eos_token_id in ids for ids in batch["input_ids"].tolist())


# -------------------------------------------------------------------------------------------------------------- damage


def damaged_members():
    """One sample of each kind of damage, with what it is counted under."""
    whole = image_bytes(0)
    return {
        "unreadable image": [("bad1.jpg", whole[: len(whole) // 2]), ("bad1.txt", b"a cat")],
        "empty caption": [("bad2.jpg", whole), ("bad2.json", b'{"text": "  \\n"}')],
        "unreadable caption": [("bad3.jpg", whole), ("bad3.txt", b"\xff\xfe\x00\xd8")],
        "missing caption": [("bad4.jpg", whole)],
        "missing image": [("bad5.txt", b"a cat")],
    }


def test_damaged_samples_are_counted_and_replaced_within_the_slot(tmp_path):
    folder = shards(tmp_path, 61)
    write_tar(folder / "bad.tar", [member for members in damaged_members().values() for member in members])
    source, config = opened(tmp_path, folder), config_of(tmp_path)
    assert source.skipped == {"missing image": 1, "missing caption": 1}  # known from the headers
    assert len(source) == 64
    epoch = batches(config, source, stop=4)
    assert all(len(batch["pixel_values"]) == 16 for batch in epoch)
    assert all(len(set(texts(batch))) == 16 for batch in epoch), "a sample twice in one batch"
    counts = {name: int(n) for name, n in zip(COUNTED, sum(batch["counts"] for batch in epoch), strict=True) if n}
    kinds = ("unreadable image", "empty caption", "unreadable caption")
    assert counts == {f"skipped: {kind}": 1 for kind in kinds}  # in their own places, not where they would stand in


def test_replacement_is_the_same_for_any_ranks(tmp_path):
    folder = shards(tmp_path, 30)
    write_tar(folder / "bad.tar", damaged_members()["unreadable image"] + damaged_members()["empty caption"])
    source, config = opened(tmp_path, folder), config_of(tmp_path)
    alone = batches(config, source, stop=4)
    split = [batches(config, source, stop=4, rank=rank, num_ranks=2) for rank in range(2)]
    for step, whole in enumerate(alone):
        assert sum((texts(part[step]) for part in split), []) == texts(whole)
        assert torch.equal(sum(part[step]["counts"] for part in split), whole["counts"])


def test_too_many_unusable_samples_in_a_row_fail_with_a_message(tmp_path):
    members = [
        (f"{i}.{kind}", data) for i in range(64) for kind, data in (("jpg", b"not a picture"), ("txt", b"a cat"))
    ]
    (tmp_path / "shards").mkdir()
    write_tar(tmp_path / "shards" / "0.tar", [*pairs([0]), *members])
    source = opened(tmp_path)
    failure = batches(config_of(tmp_path), source, stop=1)[0]["failure"]
    assert "15 tried before it" in failure and "not an image" in failure  # four columns of four samples


def test_truncated_shard_gives_what_it_has(tmp_path):
    folder = shards(tmp_path, 40)
    data = (folder / "01.tar").read_bytes()
    (folder / "01.tar").write_bytes(data[: len(data) * 2 // 3])
    source = opened(tmp_path, folder)
    assert source.skipped["truncated shard"] == 1
    assert 20 < len(source) < 40
    # The last member may be cut in its middle: its header is there, its bytes are not.
    kinds = Counter(_kind_of(source, index) for index in range(len(source)))
    assert set(kinds) <= {"usable", "truncated shard"} and kinds["truncated shard"] <= 1


def test_a_shard_that_vanishes_later_is_counted(tmp_path):
    source = opened(tmp_path, shards(tmp_path, 40))
    (tmp_path / "shards" / "01.tar").unlink()
    assert Counter(_kind_of(source, index) for index in range(40)) == {"usable": 20, "unreadable shard": 20}


def tar_of(path, format, folder):
    """50 files of random sizes in `folder`, with folders and links between them."""
    rng = random.Random(0)
    with tarfile.open(path, "w", format=format) as tar:
        for i in range(50):
            header, data = tarfile.TarInfo(f"{folder}{i}.jpg"), rng.randbytes(rng.randrange(2000))
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
            for kind in (tarfile.DIRTYPE, tarfile.LNKTYPE) if i % 7 == 0 else ():
                header = tarfile.TarInfo(f"other{i}")
                header.type, header.linkname = kind, "a"
                tar.addfile(header)
    return path.read_bytes()


def found_in(path):
    damage = set()
    with open(path, "rb") as file:
        return list(files_of(file, damage)), damage


FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
FOLDERS = ["", "d" * 80 + "/" + "e" * 60 + "/", "\u00e9\u4e2d"]
LONG = "z" * 300  # ustar has no names of this length


@pytest.mark.parametrize(
    ("format", "folder"),
    [*itertools.product(FORMATS, FOLDERS), (tarfile.GNU_FORMAT, LONG), (tarfile.PAX_FORMAT, LONG)],
)
def test_files_of_a_tar_are_those_that_tarfile_finds(format, folder, tmp_path):
    path = tmp_path / "x.tar"
    tar_of(path, format, folder)
    with tarfile.open(path) as tar:
        expected = [(member.name, member.offset_data, member.size) for member in tar if member.isfile()]
    assert found_in(path) == (expected, set())


@pytest.mark.parametrize("format", FORMATS)
def test_damage_to_a_tar_costs_only_what_it_hits(format, tmp_path):
    path, long_names = tmp_path / "x.tar", "z" * 120 + "/"
    whole = tar_of(path, format, long_names)
    expected = found_in(path)[0]
    for place in range(0, len(whole) - 11_000, 3989):  # a tar ends with 10 kB of zeros
        path.write_bytes(whole[:place])
        found, damage = found_in(path)
        assert damage and found == expected[: len(found)]
        lost = [start for _, start, size in expected[len(found) :] if start + size <= place]
        assert len(lost) <= 1  # what begins in a header of several blocks, which is cut
        path.write_bytes(whole[:place] + random.Random(place).randbytes(700) + whole[place + 700 :])
        # Three blocks at most are hit, each of them perhaps a header; the rest is found.
        assert len(set(expected) - set(found_in(path)[0])) <= 3


def _kind_of(source, index):
    try:
        source[index]
        return "usable"
    except BadSample as error:
        return error.kind


# ------------------------------------------------------------------------------------------------------------- sources


def test_tar_members_of_other_kinds_are_ignored_and_names_follow_webdataset(tmp_path):
    members = [
        ("a/1.JPG", image_bytes(1)),
        ("a/1.cls", b"3"),
        ("a/1.TXT", b"one"),
        ("b/1.webp", image_bytes(2, kind="WEBP")),
        ("b/1.JSON", b'{"caption": "two", "text": ""}'),
        ("b/2.seg.png", image_bytes(3)),
        ("b/2.txt", b"no picture"),
    ]
    write_tar(tmp_path / "x.tar", members)
    source = opened(tmp_path, tmp_path / "x.tar", caption_key="caption")
    assert [source.captions(i) for i in range(len(source))] == [["two"]]
    source = opened(tmp_path, tmp_path / "x.tar")
    assert [source[i][:2] for i in range(len(source))] == [
        (image_bytes(1), ["one"]),
        (image_bytes(2, kind="WEBP"), [""]),  # "text" comes before "caption"
    ]


def test_index_of_shards_is_kept_and_follows_the_file(tmp_path):
    folder = shards(tmp_path, 10, num_shards=1)
    assert len(opened(tmp_path, folder)) == 10
    kept = list((tmp_path / "cache" / "indices").iterdir())
    assert len(kept) == 1
    write_tar(folder / "00.tar", pairs(range(12)))
    source = opened(tmp_path, folder)
    assert len(source) == 12 and source.captions(11) == [caption(11)]
    assert len(opened(tmp_path, folder)) == 12  # from the cache


def test_patterns_name_shards(tmp_path):
    folder = shards(tmp_path, 30, num_shards=3)
    for pattern, expected in (
        ("{00..02}.tar", [0, 1, 2]),
        ("{00,02}.tar", [0, 2]),
        ("0[12].tar", [1, 2]),
        ("*.tar", [0, 1, 2]),
        ("01.tar", [1]),
    ):
        found = find_shards(str(folder / pattern), tmp_path)
        assert found == [folder / f"{i:02d}.tar" for i in expected], pattern


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("{2..0}", ["2", "1", "0"]),
        ("{00003..00001}", ["00003", "00002", "00001"]),
        ("{8..10}", ["8", "9", "10"]),
        ("{08..010}", ["008", "009", "010"]),
        ("{0..10..5}", ["0", "5", "10"]),
        ("{10..0..-5}", ["10", "5", "0"]),
        ("{-1..1}", ["-1", "0", "1"]),
        ("{a..c}", ["a", "b", "c"]),
        ("{a,b{1..2},}x", ["ax", "b1x", "b2x", "x"]),
        ("{a,b} {c,d}", ["a c", "a d", "b c", "b d"]),
        ("{a}{}{0..}{a,b", ["{a}{}{0..}{a,b"]),
        ("a.tar::{0..1}.tar", ["a.tar", "0.tar", "1.tar"]),
        ("simplecache::s3://b/{0..1}.tar::s3://c/x.tar",
         ["simplecache::s3://b/0.tar", "simplecache::s3://b/1.tar", "s3://c/x.tar"]),
        ("file:///data/a b.tar", ["/data/a b.tar"]),
    ],
)  # fmt: skip
def test_patterns_mean_what_they_mean_to_shells_and_webdataset(pattern, expected):
    assert patterns_of(pattern) == expected


def test_patterns_are_joined_and_not_multiplied():
    assert len(patterns_of("a{000..299}.tar::b{300..599}.tar")) == 600


@pytest.mark.parametrize("pattern", ["{0..999999999999}.tar", "{0..9999}{0..9999}.tar"])
def test_rejects_patterns_of_too_many_names_at_once(pattern):
    with pytest.raises(UsageError, match="more than 1,000,000 tars"):
        patterns_of(pattern)


def test_joined_patterns_name_folders_globs_and_files(tmp_path, monkeypatch):
    folder = shards(tmp_path, 30, num_shards=3)
    (tmp_path / "my shards").mkdir()
    write_tar(tmp_path / "my shards" / "a,b.tar", pairs(range(30, 34)))
    monkeypatch.setenv("HOME", str(tmp_path))
    found = find_shards("~/my shards::~/shards/{02..01}.tar::~/shards/*0.tar", tmp_path)
    assert found == [tmp_path / "my shards" / "a,b.tar", *(folder / f"{i:02d}.tar" for i in (2, 1, 0))]
    assert find_shards(f"{tmp_path}/{{my shards,shards}}", tmp_path)[0] == found[0]
    source = opened(tmp_path, f"{folder}::file://{tmp_path}/my shards/*.tar")
    assert len(source) == 34 and source.captions(33) == [caption(33)]
    assert not (tmp_path / "cache" / "shards").exists()  # files of this machine are read in place


def test_names_of_tars_that_are_no_files_are_told(tmp_path):
    (tmp_path / "folder.tar").mkdir()
    (tmp_path / "link.tar").symlink_to("nowhere.tar")
    os.mkfifo(tmp_path / "pipe.tar")
    shards(tmp_path, 4)
    for name, words in {
        "folder.tar": "folder.tar' is a folder, expected a tar file",
        "link.tar": "link.tar' is a link to 'nowhere.tar', which is no file",
        "pipe.tar": "pipe.tar' is no ordinary file",
        "*.tar": "3 of 3 tars are missing",
        "x*.tar": "found no file '.*x\\*.tar'",
        "a.tar,b.tar": "found no file.*Join patterns by '::'",
        "a.tar::": "found an empty part",
        "shards::photos": "'.*photos' names no tars, but other parts",
    }.items():
        with pytest.raises(UsageError, match=words):
            opened(tmp_path, f"{tmp_path}/{name}".replace("::", f"::{tmp_path}/" if name != "a.tar::" else "::"))
    source = opened(tmp_path)
    shutil.rmtree(tmp_path / "shards")
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "00.tar").symlink_to("nowhere.tar")
    with pytest.raises(UsageError, match="00.tar' is a link to"):
        opened(tmp_path)
    assert len(source) == 4


def test_local_tars_need_no_cache(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HFCLIP_CACHE", str(tmp_path / "file" / "cache"))
    source = opened(tmp_path, shards(tmp_path, 4))
    assert len(source) == 4
    errors = capsys.readouterr().err
    assert f"The cache {tmp_path / 'file' / 'cache'}" in errors and "cannot be written" in errors
    with (
        pytest.raises(UsageError, match="The cache .*cannot be written.*HFCLIP_CACHE"),
        server(tmp_path / "shards") as (url, _),
    ):
        opened(tmp_path, url + "/{00..01}.tar")


class Handler(http.server.SimpleHTTPRequestHandler):
    fetched = None

    def do_GET(self):
        self.fetched.append(self.path)
        super().do_GET()

    def log_message(self, *_):
        pass


@contextmanager
def server(folder, handler=Handler):
    """A web server on `folder`; yields its address and the paths that were fetched."""
    fetched = []
    handler = functools.partial(type("Handler", (handler,), {"fetched": fetched}), directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as http_server:
        threading.Thread(target=http_server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http_server.server_port}", fetched
        http_server.shutdown()


def test_remote_shards_are_fetched_once(tmp_path):
    pytest.importorskip("aiohttp", reason="fsspec reads http through aiohttp")
    folder = shards(tmp_path, 10)
    with server(folder) as (address, fetched):
        source = opened(tmp_path, address + "/{00..01}.tar")
        assert [source[i] for i in range(10)] == [opened(tmp_path, folder)[i] for i in range(10)]
        assert fetched.count("/00.tar") == 1
        fetched.clear()
        opened(tmp_path, address + "/{00..01}.tar")
        assert not fetched
        with pytest.raises(UsageError, match="cannot be fetched"):
            opened(tmp_path, address + "/{00..02}.tar")


def test_connection_that_breaks_off_is_tried_again(tmp_path):
    pytest.importorskip("aiohttp", reason="fsspec reads http through aiohttp")

    class Flaky(Handler):
        def do_GET(self):
            if self.path in self.fetched:
                return super().do_GET()
            self.fetched.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", "20480")
            self.end_headers()
            self.wfile.write(b"half of it")
            self.close_connection = True

    folder = shards(tmp_path, 10)
    with server(folder, Flaky) as (address, fetched):
        source = opened(tmp_path, address + "/{00..01}.tar")
    assert len(source) == 10 and fetched.count("/00.tar") == 2
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_shards_are_fetched_side_by_side(tmp_path):
    pytest.importorskip("aiohttp", reason="fsspec reads http through aiohttp")
    both_are_there = threading.Barrier(2)

    class Waiting(Handler):
        def do_GET(self):
            both_are_there.wait(timeout=30)
            super().do_GET()

    with server(shards(tmp_path, 10), Waiting) as (address, _):
        assert len(opened(tmp_path, address + "/{00..01}.tar")) == 10


def test_a_missing_shard_ends_the_fetching_and_what_was_fetched_stays(tmp_path):
    pytest.importorskip("aiohttp", reason="fsspec reads http through aiohttp")

    class Endless(Handler):
        """One tar comes at once, one trickles for ever, one is there until it is asked for."""

        def do_GET(self):
            if self.path == "/00.tar":
                return super().do_GET()
            if self.path == "/02.tar":
                has_begun.wait(30)
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Length", str((folder / "01.tar").stat().st_size))
            self.end_headers()
            try:
                for count in range(600):
                    self.wfile.write(b"x")
                    time.sleep(0.1)
                    if count > 20 and list((tmp_path / "cache").rglob("00.tar")):
                        has_begun.set()
            except OSError:
                pass

    folder, has_begun = shards(tmp_path, 12, num_shards=3), threading.Event()
    with server(folder, Endless) as (address, _):
        start = time.monotonic()
        with pytest.raises(UsageError, match="cannot be fetched: FileNotFoundError.*02.tar"):
            opened(tmp_path, address + "/{00..02}.tar")
        assert time.monotonic() - start < 20
        names = [
            path.name for path in sorted((tmp_path / "cache" / "shards").rglob("*.*"), key=lambda path: path.name)
        ]
        assert names[0] == "00.tar" and [name[:7] + name[-5:] for name in names[1:]] == ["01.tar..part"]


def test_rejects_remote_shards_larger_than_the_disk_before_fetching(tmp_path):
    pytest.importorskip("aiohttp", reason="fsspec reads http through aiohttp")

    class Huge(Handler):
        def do_HEAD(self):
            self.send_response(200)
            self.send_header("Content-Length", str(10**18))
            self.end_headers()

    with server(shards(tmp_path, 10), Huge) as (address, fetched):
        with pytest.raises(UsageError, match=r"take 2,000,000,000.0 GB, but .* GB free. Set HFCLIP_CACHE"):
            opened(tmp_path, address + "/{00..01}.tar")
        assert not fetched


@pytest.mark.parametrize("pattern", ["{00..01}.tar", "*.tar", ""])
def test_shards_in_a_store_of_objects_are_read(pattern, tmp_path):
    """What s3:// and hf:// go through, with fsspec's own store in memory."""
    files = fsspec.filesystem("memory")
    folder = shards(tmp_path, 10)
    try:
        for name in ("00.tar", "01.tar"):
            files.pipe_file(f"/bucket/{name}", (folder / name).read_bytes())
        source = opened(tmp_path, f"memory://bucket/{pattern}")
        assert [source[i] for i in range(10)] == [opened(tmp_path, folder)[i] for i in range(10)]
        with pytest.raises(UsageError, match="cannot be fetched.*02.tar"):
            opened(tmp_path, "memory://bucket/{00..02}.tar")
    finally:
        files.rm("/bucket", recursive=True)


@pytest.mark.parametrize("pattern", ["{00..01}.tar", "*.tar", ""])
def test_shards_behind_any_fsspec_url_are_read(pattern, tmp_path):
    folder = shards(tmp_path, 10)
    source = opened(tmp_path, f"file://{folder}/{pattern}")
    assert len(source) == 10
    assert sum((source.captions(i) for i in range(10)), []) == [
        caption(i) for i in [*range(0, 10, 2), *range(1, 10, 2)]
    ]


def test_parquet_files_are_read(tmp_path):
    parquet_of_twenty(tmp_path)
    for name in ("parquet", "parquet/train-0.parquet", "parquet/*.parquet"):
        source = opened(tmp_path, tmp_path / name)
        assert [source[i][:2] for i in (0, 19)] == [(image_bytes(i), [caption(i)]) for i in (0, 19)]
        assert source.captions(7) == [caption(7)]


def test_table_with_other_columns_lists_and_gaps_is_read(tmp_path):
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    features = Features({"photo": ImageFeature(), "sentences": List(Value("string"))})
    rows = [{"photo": {"bytes": image_bytes(i), "path": None}, "sentences": [caption(i), "a"]} for i in range(4)]
    rows += [{"photo": None, "sentences": ["a"]}, {"photo": rows[0]["photo"], "sentences": None}]
    Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "x.parquet"))
    source = opened(tmp_path, tmp_path / "x.parquet", image_key="photo")
    assert source[3][:2] == (image_bytes(3), [caption(3), "a"])
    assert _kind_of(source, 4) == "missing image" and _kind_of(source, 5) == "missing caption"
    with pytest.raises(UsageError, match="'photo'.*set image_key"):
        opened(tmp_path, tmp_path / "x.parquet")


def test_image_folder_with_metadata_is_read(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    lines = [json.dumps({"file_name": f"{i}.jpg", "text": caption(i)}) for i in range(5)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    for i in range(5):
        (folder / f"{i}.jpg").write_bytes(image_bytes(i))
    source = opened(tmp_path, folder)
    assert sorted(source[i][:2] for i in range(5)) == sorted((image_bytes(i), [caption(i)]) for i in range(5))


def test_local_folder_with_one_split_is_read_whatever_the_split_is_called(tmp_path):
    for name, count in {"photos": 3, "photos/test": 2}.items():
        folder = tmp_path / name
        folder.mkdir()
        lines = [json.dumps({"file_name": f"{i}.jpg", "text": caption(i)}) for i in range(count)]
        (folder / "metadata.jsonl").write_text("\n".join(lines))
        for i in range(count):
            (folder / f"{i}.jpg").write_bytes(image_bytes(i))
    config = config_of(tmp_path).data
    assert len(open_source(str(tmp_path / "photos" / "test"), config, "train", 32)) == 2
    shutil.rmtree(tmp_path / "photos" / "test")
    assert len(open_source(str(tmp_path / "photos"), config, "test", 32)) == 3
    assert len(open_source(str(tmp_path / "photos"), config, "train[:1]", 32)) == 1
    with pytest.raises(UsageError, match=r"test\[:1\]"):
        open_source(str(tmp_path / "photos"), config, "test[:1]", 32)


def test_scenes_need_no_files(tmp_path):
    source = opened(tmp_path, "scenes", max_samples=100)
    image, captions, *_ = source[42]
    assert len(source) == 100 and image.size == (32, 32) and captions == source.captions(42)


@pytest.mark.parametrize(
    ("make", "name", "words"),
    [
        (lambda f: None, "nowhere/at/all", ["found neither a file nor a folder"]),
        (lambda f: None, "{0..1}.tar", ["0.tar", "2 of 2 tars are missing"]),
        (lambda f: (f / "empty").mkdir(), "empty", ["is empty, expected tars"]),
        (lambda f: write_tar(f / "x.tar", []), "x.tar", ["no usable pair"]),
        (lambda f: write_tar(f / "x.tar", [("a.jpg", b"x")]), "x.tar", ["no usable pair", "1 with missing caption"]),
        (lambda f: (f / "x.tar").write_bytes(random.Random(0).randbytes(5000)), "x.tar", ["not an uncompressed tar"]),
        (
            lambda f: (f / "x.tar").write_bytes(gzip.compress(b"x" * 5000)),
            "x.tar",
            ["is compressed. Unpack it by `gunzip"],
        ),
        (lambda f: (f / "x.tar").write_bytes(b""), "x.tar", ["no usable pair|not an uncompressed tar"]),
        (
            lambda f: (f / "x.parquet").write_bytes(b"junk"),
            "x.parquet",
            ["x.parquet", "cannot be read as a table"],
        ),
    ],
)
def test_rejects_data_that_is_not_there(make, name, words, tmp_path):
    make(tmp_path)
    with pytest.raises(UsageError) as error:
        opened(tmp_path, tmp_path / name)
    for word in words:
        assert any(option in str(error.value) for option in word.split("|")), str(error.value)


def test_rejects_fewer_pairs_than_a_batch(tmp_path):
    source = opened(tmp_path, shards(tmp_path, 10))
    with pytest.raises(UsageError, match="10 usable pairs.*batch of 16"):
        PairDataset(source, config_of(tmp_path), 32)


def test_rejects_a_caption_key_that_the_shards_have_not(tmp_path):
    write_tar(tmp_path / "x.tar", [("a.jpg", image_bytes(1)), ("a.json", b'{"caption": "one", "url": ""}')])
    with pytest.raises(UsageError, match=r"caption_key: x.tar has the keys \['caption', 'url'\], expected 'alt'"):
        opened(tmp_path, tmp_path / "x.tar", caption_key="alt")


def test_a_missing_folder_is_no_hub_name_if_its_parent_is_here(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="found neither a file nor a folder"):
        opened(tmp_path, "data/trian")


def test_one_bad_sample_of_a_single_batch_costs_that_sample(tmp_path):
    (tmp_path / "shards").mkdir(exist_ok=True)
    members = dict(pairs(range(16)))
    members["000003.jpg"] = members["000003.jpg"][:100]
    write_tar(tmp_path / "shards" / "0.tar", sorted(members.items()))
    config = config_of(tmp_path)
    config.optim.batch_size = 16
    found = batches(config, opened(tmp_path), stop=2)
    assert all("failure" not in batch and len(batch["pixel_values"]) == 16 for batch in found)
    assert all(int(batch["counts"].sum()) == 1 for batch in found)
