"""Remote shards of which the disk holds a few at a time: a pure order, a bounded disk, counts, and failures."""

import functools
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager

import fsspec
import numpy as np
import psutil
import pytest
import torch
import yaml
from training_utils import (
    ROOT,
    caption,
    command,
    environment,
    fork,
    model_with_tokenizer,
    pairs,
    pretrain,
    tiny_recipe,
    train,
    write_tar,
)

from hfclip import HFCLIPTokenizer
from hfclip.data.counts import count_shards, upload
from hfclip.data.samples import Keys
from hfclip.data.webdataset import ShardSource
from hfclip.errors import UsageError
from training.config import Config
from training.data.batches import Collate, PairDataset, build_loader
from training.data.batches import open_data as open_source
from training.data.order import LaneOrder, rank_slice


pytestmark = pytest.mark.slow


pytest.importorskip("aiohttp", reason="fsspec reads http through aiohttp")

NUM_SHARDS = 40  # two lanes
URL = "/{00..39}.tar"


# --------------------------------------------------------------------------------------------------------------- order


ORDERS = [
    ([8] * 40, 12),
    ([3, 0, 9, 14, 1] * 13, 7),  # lanes of different widths
    ([5], 4),
    ([1] * 200, 64),
    (list(range(1, 100)), 1),
    ([2] * 64, 128),  # an epoch of one step
]


@pytest.mark.parametrize("counts, batch_size", ORDERS)
def test_an_epoch_has_each_sample_once_but_less_than_a_batch(counts, batch_size):
    order = LaneOrder("data", counts, batch_size, seed=3)
    epochs = []
    for epoch in range(2):
        steps = range(epoch * order.epoch_steps, (epoch + 1) * order.epoch_steps)
        seen = [next(order(step, slot)) for step in steps for slot in range(batch_size)]
        assert len(seen) == len(set(seen)) > sum(counts) - batch_size
        assert set(seen) <= set(range(sum(counts)))
        epochs.append(seen)
    assert epochs[0] != epochs[1] or sum(counts) < 10


@pytest.mark.parametrize("counts, batch_size", ORDERS)
def test_no_batch_holds_a_sample_twice_whatever_stands_in(counts, batch_size):
    order, rng = LaneOrder("data", counts, batch_size, seed=3), np.random.default_rng(0)
    for step in range(min(order.epoch_steps * 2, 12)):
        candidates = [list(order(step, slot)) for slot in range(batch_size)]
        assert all(len(slot) == order.epoch_steps == len(set(slot)) for slot in candidates)
        assert sum(map(len, candidates)) == len(set().union(*candidates))
        bad = set(rng.choice(sum(counts), sum(counts) // 3, replace=False).tolist())
        taken = [next((sample for sample in slot if sample not in bad), None) for slot in candidates]
        found = [sample for sample in taken if sample is not None]
        assert len(found) == len(set(found))


@pytest.mark.parametrize("counts, batch_size", ORDERS)
def test_samples_lie_in_the_shards_of_their_window(counts, batch_size):
    order = LaneOrder("data", counts, batch_size, seed=3)
    starts, follows = np.cumsum([0, *counts]), {}
    for step in range(min(order.epoch_steps * 2, 60)):
        for slot in range(batch_size):
            window = order.window(step, slot)
            shard = np.searchsorted(starts, next(order(step, slot)), side="right") - 1
            assert shard in order.shards_of(window)
            before = follows.get(window.lane, window)
            assert window in (before, order.next_window(before))
            follows[window.lane] = window


def test_a_rank_reads_few_of_the_shards_and_a_batch_comes_from_many():
    order = LaneOrder("data", [100] * 640, 128, seed=0)
    assert order.num_lanes == 40
    starts = np.cumsum([0] + [100] * 640)
    by_rank = []
    for rank in range(8):
        samples = [next(order(step, slot)) for step in range(500) for slot in rank_slice(128, rank, 8)]
        by_rank.append(set((np.searchsorted(starts, samples, side="right") - 1).tolist()))
    # 640 / 8, and one more at each end of five lanes
    assert max(map(len, by_rank)) <= 80 + 2 * 5
    batch = {int(np.searchsorted(starts, next(order(7, slot)), side="right")) for slot in range(128)}
    assert len(batch) > 60


def test_rejects_fewer_pairs_than_a_batch():
    with pytest.raises(UsageError, match="has 5 usable pairs, expected at least optim.batch_size, 6"):
        LaneOrder("data", [2, 3], 6, seed=0)


# ------------------------------------------------------------------------------------------------------------- reading


class Handler(http.server.SimpleHTTPRequestHandler):
    requests = None

    def do_GET(self):
        self.requests.append(self.path)
        super().do_GET()

    def log_message(self, *_):
        pass


@contextmanager
def server(folder, handler=Handler):
    """A web server on `folder`; yields its address and the paths that were asked for."""
    requests = []
    handler = functools.partial(type("Handler", (handler,), {"requests": requests}), directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as http_server:
        threading.Thread(target=http_server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http_server.server_port}", requests
        http_server.shutdown()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A folder of tars that hold two to eight pairs each, 200 together; and a tokenizer."""
    folder, first = tmp_path_factory.mktemp("remote"), 0
    (folder / "shards").mkdir()
    for i in range(NUM_SHARDS):
        count = 2 + i * 7 % 7 if i % 2 else 8 - i * 7 % 7
        write_tar(folder / "shards" / f"{i:02d}.tar", pairs(range(first, first + count)))
        first += count
    model_with_tokenizer(folder)
    return folder / "shards"


def total(shards):
    return sum(path.stat().st_size for path in shards.glob("*.tar"))


def config_of(folder, url, shards, **data):
    data = {"train": url, "disk": total(shards) * 0.6 / 1e9, **data}
    model = {"tokenizer": str(shards.parent / "tokenizer")}
    return Config.from_dict(tiny_recipe(folder, model=model, data=data))


def opened(config):
    return open_source(config.data.train, config.data, "train", 32)


def batches(config, start=0, stop=20, rank=0, num_ranks=1):
    dataset = PairDataset(opened(config), config, 32)
    tokenizer = HFCLIPTokenizer.from_pretrained(config.model.tokenizer)
    collate = Collate(tokenizer, pad_to_max=False, group=True)
    return list(build_loader(dataset, collate, config, start=start, stop=stop, rank=rank, num_ranks=num_ranks))


def contents(batches):
    return [(batch["group_id"].tolist(), batch["pixel_values"].sum(dim=(1, 2, 3)).tolist()) for batch in batches]


@contextmanager
def watched(folder):
    """The most bytes of tars that lay in a folder at a time, in a list."""
    most, end = [0], threading.Event()

    def watch():
        while not end.wait(0.002):
            sizes = []
            for path in folder.glob("*.t??"):
                try:
                    sizes.append(path.stat().st_size)
                except FileNotFoundError:
                    pass
            most[0] = max(most[0], sum(sizes))

    thread = threading.Thread(target=watch)
    thread.start()
    yield most
    end.set()
    thread.join()


@pytest.mark.parametrize("num_ranks, workers", [(1, 2), (2, 0), (3, 2)])
def test_batches_are_the_same_for_any_ranks_workers_and_start_on_a_bounded_disk(
    num_ranks, workers, shards, tmp_path, monkeypatch
):
    with server(shards) as (address, _):
        config = config_of(tmp_path, address + URL, shards)
        monkeypatch.setenv("HFCLIP_CACHE", str(tmp_path / "other"))
        count_shards(config.data.train, tmp_path / "other")
        shutil.copytree(tmp_path / "other" / "counts", tmp_path / "cache" / "counts")
        expected = contents(batches(config, stop=26))  # two epochs of twelve steps, and a bit
        monkeypatch.setenv("HFCLIP_CACHE", str(tmp_path / "cache"))
        config = config_of(tmp_path, address + URL, shards, num_workers=workers)
        with watched(tmp_path / "cache" / "streamed") as most:
            found = [contents(batches(config, stop=26, rank=rank, num_ranks=num_ranks)) for rank in range(num_ranks)]
            resumed = contents(batches(config, start=17, stop=26))
    for step, (ids, sums) in enumerate(expected):
        parts = [found[rank][step] for rank in range(num_ranks)]
        assert ids == [value for part in parts for value in part[0]]
        assert sums == [value for part in parts for value in part[1]]
    assert resumed == expected[17:]
    assert 0 < most[0] <= config.data.disk * 1e9
    assert len({value for ids, _ in expected[:12] for value in ids}) == 12 * 16  # captions are all different


def test_streamed_samples_are_those_of_local_shards(shards, tmp_path):
    with server(shards) as (address, requests):
        config = config_of(tmp_path, address + URL, shards)
        count_shards(config.data.train, tmp_path / "cache")
        source, local = opened(config), ShardSource(sorted(shards.glob("*.tar")), Keys(), tmp_path / "cache")
        requests.clear()
        assert len(source) == len(local) and source.skipped == local.skipped
        assert [source[i] for i in range(len(local))] == [local[i] for i in range(len(local))]
        assert Counter(requests) == Counter(f"/{path.name}" for path in shards.glob("*.tar"))


def test_an_epoch_asks_for_each_shard_about_once(shards, tmp_path):
    with server(shards) as (address, requests):
        config = config_of(tmp_path, address + URL, shards, num_workers=2)
        count_shards(config.data.train, tmp_path / "cache")
        requests.clear()
        batches(config, stop=12)
        order = PairDataset(opened(config), config, 32).order
    asked = Counter(path for path in requests if path.endswith(".tar"))
    windows = {order.window(step, slot) for step in range(12) for slot in range(16)}
    assert {f"/{shard:02d}.tar" for window in windows for shard in order.shards_of(window)} <= set(asked)
    # One shard lies across the cut between two lanes, and of the next epoch the first window of each lane comes ahead.
    assert sum(asked.values()) <= NUM_SHARDS + 1 + order.num_lanes * (order.WINDOW + 2)


@pytest.mark.parametrize("workers", [0, 2])
def test_any_store_of_objects_streams(workers, shards, tmp_path):
    store = fsspec.filesystem("memory")
    store.put(str(shards) + "/", "/streamed/", recursive=True)
    try:
        config = config_of(tmp_path, "memory://streamed/*.tar", shards, num_workers=workers)
        path, _ = count_shards(config.data.train, tmp_path / "cache")
        upload(config.data.train, path)
        path.unlink()  # as on another machine
        ids = [value for batch in batches(config, stop=12) for value in batch["group_id"].tolist()]
        assert len(ids) == len(set(ids)) == 12 * 16
    finally:
        store.rm("/streamed", recursive=True)


def test_first_samples_only_are_used_if_so_many_are_asked_for(shards, tmp_path):
    with server(shards) as (address, _):
        config = config_of(tmp_path, address + URL, shards, max_samples=50)
        count_shards(config.data.train, tmp_path / "cache")
        order = PairDataset(opened(config), config, 32).order
    assert order.epoch_steps == 3
    assert max(next(order(step, slot)) for step in range(30) for slot in range(16)) < 50


# ------------------------------------------------------------------------------------------------------------ failures


def test_a_store_that_is_busy_or_breaks_off_is_tried_again(shards, tmp_path):
    flaky = threading.Event()

    class Flaky(Handler):
        def do_GET(self):
            if self.path != "/01.tar" or not flaky.is_set() or self.requests.count(self.path) == 2:
                return super().do_GET()
            self.requests.append(self.path)
            if len(self.requests) == 1:
                return self.send_error(503)
            self.send_response(200)
            self.send_header("Content-Length", str((shards / "01.tar").stat().st_size))
            self.end_headers()
            self.wfile.write(b"half of it")
            self.close_connection = True

    with server(shards, Flaky) as (address, requests):
        config = config_of(tmp_path, address + "/{00..03}.tar", shards, disk=1.0)
        count_shards(config.data.train, tmp_path / "cache")
        source = opened(config)
        flaky.set()
        requests.clear()
        assert source[source.starts[1]][1] == [caption(int(source.starts[1]))]
        assert requests == ["/01.tar"] * 3


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "harm, words",
    [
        (lambda tar: tar.unlink(), "cannot be fetched: FileNotFoundError"),
        (lambda tar: tar.write_bytes(tar.read_bytes() + bytes(512)), r"has \d+ bytes, but had \d+"),
        (lambda tar: tar.write_bytes(bytes(tar.stat().st_size)), r"has 0 usable pairs, but had \d+"),
    ],
    ids=["vanished", "grown", "other content"],
)
def test_a_shard_that_is_not_what_was_counted_ends_the_run_by_its_name(harm, words, workers, shards, tmp_path):
    remote = shutil.copytree(shards, tmp_path / "remote")
    with server(remote) as (address, _):
        config = config_of(tmp_path, address + URL, shards, num_workers=workers)
        count_shards(config.data.train, tmp_path / "cache")
        harm(remote / "07.tar")
        failures = [batch["failure"] for batch in batches(config, stop=12) if "failure" in batch]
    assert failures and all("07.tar" in failure for failure in failures)
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(failures[0])


def test_rejects_what_cannot_be_streamed(shards, tmp_path):
    with server(shards) as (address, _):
        url = address + URL
        with pytest.raises(
            UsageError, match=r"found no counts.*python -m hfclip.training.index 'http.*39}.tar' --upload"
        ):
            opened(config_of(tmp_path, url, shards))
        with pytest.raises(UsageError, match="is no URL of tars"):
            opened(config_of(tmp_path, str(shards), shards))
        with pytest.raises(UsageError, match="is no URL of tars"):
            opened(config_of(tmp_path, "https://host/a.parquet", shards))
        with pytest.raises(UsageError, match="found a mixture"):
            opened(config_of(tmp_path, {url: 1.0, "scenes": 1.0}, shards))
        count_shards(url, tmp_path / "cache")
        with pytest.raises(UsageError, match="data.disk: found 1e-05 GB, expected at least .* 2 of the 2 lanes"):
            batches(config_of(tmp_path, url, shards, disk=1e-5))
        config = config_of(tmp_path, url, shards)
        config.model.tokenizer = "train"
        with pytest.raises(UsageError, match="model.tokenizer: found 'train'"):
            PairDataset(opened(config), config, 32)
    with pytest.raises(UsageError, match="data.disk: found -1"):
        config_of(tmp_path, "http://host/a.tar", shards, disk=-1)


def test_a_disk_of_the_named_size_is_enough_and_what_a_killed_process_left_goes(shards, tmp_path):
    with server(shards) as (address, _):
        url = address + URL
        count_shards(url, tmp_path / "cache")
        with pytest.raises(UsageError) as error:
            batches(config_of(tmp_path, url, shards, disk=1e-5))
        needed = float(str(error.value).split("at least ")[1].split(". A")[0]) * 1.005  # it has three digits
        config = config_of(tmp_path, url, shards, disk=needed, num_workers=2)
        folder = tmp_path / "cache" / "streamed"
        (folder / f"{'0' * 24}-{int(needed * 9e8)}.tmp").write_bytes(b"half of a shard")
        assert len(batches(config, stop=12)) == 12
        assert not list(folder.glob("0000*.tmp"))
        assert sum(path.stat().st_size for path in folder.glob("*.tar")) <= needed * 1e9


def counted_otherwise(rank, url, shards, folder):
    """What the second of two machines does, whose counts are not those of the first."""
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    os.environ["HFCLIP_CACHE"] = str(folder / f"cache{rank}")
    config = config_of(folder, url, shards)
    with pytest.raises(UsageError, match="the machines have different counts"):
        batches(config, rank=rank, num_ranks=2)
    torch.distributed.destroy_process_group()


def test_rejects_machines_with_different_counts(shards, tmp_path):
    with server(shards) as (address, _):
        url = address + URL
        for rank in range(2):
            path, _ = count_shards(url, tmp_path / f"cache{rank}")
        lines = path.read_text().splitlines()
        path.write_text("\n".join(lines[:-1]))
        fork(counted_otherwise, url, shards, tmp_path, processes=2)


# -------------------------------------------------------------------------------------------------------------- counts


def test_counting_goes_on_where_it_was_killed_and_reads_what_changed(shards, tmp_path):
    slow = threading.Event()

    class Slow(Handler):
        def do_GET(self):
            if self.path > "/1" and not slow.is_set():
                slow.wait(60)
            super().do_GET()

    remote = shutil.copytree(shards, tmp_path / "remote")
    with server(remote, Slow) as (address, requests):
        line = [sys.executable, ROOT / "training" / "index.py", address + URL]
        process = subprocess.Popen(line, env=environment(), stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        partial = None
        while time.monotonic() < deadline:
            partial = next((tmp_path / "cache" / "counts").glob("*.partial"), None)
            if partial and partial.read_text().count("]\n") == 10:
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        with open(partial, "a") as file:
            file.write('["half of a li')
        slow.set()
        time.sleep(0.2)  # the server notices that nobody listens
        requests.clear()
        done = subprocess.run(line, env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert f"{NUM_SHARDS} tars" in done.stdout and "0 usable pairs with one" in done.stdout
        assert sorted(requests) == [f"/{i:02d}.tar" for i in range(10, 40)]

        _, expected = count_shards(address + URL, tmp_path / "other")
        path, found = count_shards(address + URL, tmp_path / "cache")
        assert found == expected and not list(path.parent.glob("*.partial"))
        write_tar(remote / "05.tar", pairs(range(900, 911)))
        requests.clear()
        _, found = count_shards(address + URL, tmp_path / "cache")
        assert requests == ["/05.tar"] and found[5].usable == [11, 0]


def test_rejects_shards_that_cannot_be_counted(shards, tmp_path):
    with server(shards) as (address, _):
        with pytest.raises(UsageError, match="cannot be counted: FileNotFoundError.*40.tar"):
            count_shards(address + "/{38..40}.tar", tmp_path / "cache")
        with pytest.raises(UsageError, match="found no uncompressed tar"):
            count_shards(address + "/a.txt", tmp_path / "cache")


# ------------------------------------------------------------------------------------------------------------- the run


def test_run_learns_the_same_with_one_process_and_two(shards, tmp_path):
    losses = []
    with server(shards) as (address, _):
        url = address + URL
        count_shards(url, tmp_path / "cache")
        model = model_with_tokenizer(tmp_path)
        recipe = tiny_recipe(tmp_path, data={"train": url, "disk": total(shards) * 0.6 / 1e9, "num_workers": 1})
        recipe["model"] = model
        recipe["optim"]["steps"] = 14
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        for processes in (1, 2):
            run = tmp_path / f"run{processes}"
            done = train("--config", tmp_path / "recipe.yaml", "--run.output_dir", run, processes=processes)
            assert done.returncode == 0, done.stderr
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            losses.append([line["loss"] for line in lines if "loss" in line])
    # Sums over two processes have another order: single precision.
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_run_saves_before_it_ends_for_a_shard_that_vanished(shards, tmp_path):
    remote = shutil.copytree(shards, tmp_path / "remote")
    with server(remote) as (address, _):
        url = address + URL
        count_shards(url, tmp_path / "cache")
        recipe = tiny_recipe(tmp_path, data={"train": url, "disk": 1.0, "num_workers": 1})
        recipe["model"] = model_with_tokenizer(tmp_path)
        recipe["optim"]["steps"] = 24
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        order = LaneOrder(url, opened(Config.from_dict(recipe)).counts, 16, seed=0)
        late = set(range(NUM_SHARDS)) - {
            shard for step in range(3) for slot in range(16) for shard in order.shards_of(order.window(step, slot))
        }
        (remote / f"{max(late):02d}.tar").unlink()
        done = pretrain("--config", tmp_path / "recipe.yaml", processes=2)
    assert done.returncode != 0
    assert f"{max(late):02d}.tar cannot be fetched: FileNotFoundError" in done.stderr
    assert list((tmp_path / "run").glob("checkpoint-*"))


class Hanging(Handler):
    """Answers no request for a tar while `hangs` is set."""

    hangs, answers = threading.Event(), threading.Event()

    def do_GET(self):
        if self.path.endswith(".tar") and self.hangs.is_set():
            self.answers.wait(120)
        super().do_GET()


@pytest.fixture
def hanging(shards, tmp_path):
    """The recipe of a run on streamed shards, and the event that makes their store hang."""
    Hanging.hangs, Hanging.answers = threading.Event(), threading.Event()
    with server(shards, Hanging) as (address, _):
        count_shards(address + URL, tmp_path / "cache")
        recipe = tiny_recipe(tmp_path, data={"train": address + URL, "disk": total(shards) * 0.4 / 1e9})
        recipe["model"], recipe["optim"]["steps"] = model_with_tokenizer(tmp_path), 100_000
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        yield tmp_path / "recipe.yaml", Hanging.hangs
        Hanging.answers.set()


def steps_when_waiting(folder, process, hangs):
    """How many steps are done when the store hangs and all that was read ahead is used up."""
    file, done = folder / "run" / "metrics.jsonl", [0, 0, 0]
    end = time.monotonic() + 120
    while done[-1] < 4 or len(set(done[-3:])) > 1:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.5)
        done.append(len(file.read_text().splitlines()) if file.is_file() else 0)
        if done[-1] > 2:
            hangs.set()
    return done[-1]


@pytest.mark.parametrize("told", [0, 1])
def test_run_that_waits_for_a_store_saves_and_ends_when_one_of_its_processes_is_told_to(told, hanging, tmp_path):
    recipe, hangs = hanging
    line = command("--config", recipe, "--data.num_workers", "1", processes=2)
    launch = subprocess.Popen(line, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    done = steps_when_waiting(tmp_path, launch, hangs)
    psutil.Process(launch.pid).children()[told].send_signal(signal.SIGTERM)
    output, errors = launch.communicate(timeout=30)
    assert launch.returncode == 0, errors
    assert f"Stopped after step {done} of 100000" in output and (tmp_path / "run" / f"checkpoint-{done}").is_dir()


@pytest.mark.parametrize("workers", [0, 1])
def test_deadline_ends_a_run_that_waits_for_a_store(workers, hanging):
    recipe, hangs = hanging
    hangs.set()
    done = train("--config", recipe, "--data.num_workers", workers, "--stop-after", "0.05", timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Stopped after step 0 of 100000" in done.stdout


def test_counts_with_credentials_are_not_published():
    command = [sys.executable, "training/index.py", "http://someone:pw@127.0.0.1:9/{0..1}.tar", "--upload"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 2 and "found credentials in the URL" in found.stderr and "pw@" not in found.stderr
