"""Remote shards over faults that pass: slow, silent, broken off, busy; real servers of this machine."""

import http.server
import re
import threading
import time
from contextlib import contextmanager

import pytest
from training_utils import caption, pairs, tiny_recipe, write_tar

from hfclip.data import stores
from hfclip.errors import UsageError
from training.config import Config
from training.data.batches import open_data as open_source


pytest.importorskip("aiohttp", reason="fsspec reads http through aiohttp")

PAIRS = 40


@pytest.fixture(scope="module")
def tar(tmp_path_factory):
    return write_tar(tmp_path_factory.mktemp("tar") / "0.tar", pairs(range(PAIRS))).read_bytes()


class Server(http.server.BaseHTTPRequestHandler):
    """One file. What it does with a GET is `answer`, a method of subclasses; by default, it gives parts if asked."""

    protocol_version = "HTTP/1.1"
    data, asked, served, ranges, version = b"", 0, 0, True, '"1"'

    def do_HEAD(self):
        self.begin(200, len(self.data))

    def do_GET(self):
        type(self).asked += 1
        try:
            self.answer()
        except OSError:  # nobody listens any more
            self.close_connection = True

    def answer(self):
        self.send(self.data[self.first() :])

    def first(self):
        """From which byte on the file is asked for, and given."""
        asked = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        same = self.headers.get("If-Range", self.version) == self.version
        first = int(asked[1]) if asked and self.ranges and same else 0
        self.begin(206 if first else 200, len(self.data) - first, first)
        return first

    def begin(self, status, length, first=0):
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.send_header("ETag", self.version)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(self.data) - 1}/{len(self.data)}")
        self.end_headers()

    def send(self, data):
        self.wfile.write(data)
        type(self).served += len(data)

    def log_message(self, *_):
        pass


@contextmanager
def serving(tar, **methods):
    handler = type("Handler", (Server,), {"data": tar, **methods})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/0.tar", handler
        server.shutdown()


def opened(folder, url):
    config = Config.from_dict(tiny_recipe(folder)).data
    return open_source(url, config, "train", 32)


def arrives(folder, url):
    source = opened(folder, url)
    assert [source.captions(i) for i in range(PAIRS)] == [[caption(i)] for i in range(PAIRS)]


def test_transfer_takes_as_long_as_it_takes_while_bytes_come(tar, tmp_path, monkeypatch):
    """Longer than the limit, which is one on silence."""
    monkeypatch.setattr(stores, "SILENCE", 1.0)

    def answer(self):
        first = self.first()
        for place in range(first, len(tar), len(tar) // 9):
            time.sleep(0.3)
            self.send(tar[place : place + len(tar) // 9])

    with serving(tar, answer=answer) as (url, handler):
        arrives(tmp_path, url)
        assert handler.asked == 1


def test_silent_server_is_given_up_with_a_reason(tar, tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "SILENCE", 0.3)
    monkeypatch.setattr(stores, "ATTEMPTS", 2)
    end = threading.Event()

    def answer(self):
        self.first()
        end.wait(60)

    with serving(tar, answer=answer) as (url, handler):
        try:
            with pytest.raises(UsageError, match=r"0.tar' cannot be fetched: .*Time.* \(no byte for 0.3 s\)"):
                opened(tmp_path, url)
        finally:
            end.set()


@pytest.mark.parametrize("ranges", [True, False])
def test_transfer_that_broke_off_goes_on_from_there(ranges, tar, tmp_path):
    """Where the server gives parts of a file; else from the start."""

    def answer(self):
        first = self.first()
        whole = self.asked > 3
        self.send(tar[first:] if whole else tar[first : first + len(tar) // 5])
        self.wfile.flush()
        self.close_connection = not whole
        if not whole:
            self.connection.shutdown(2)

    with serving(tar, answer=answer, ranges=ranges) as (url, handler):
        arrives(tmp_path, url)
        assert handler.asked == 4
        assert handler.served == len(tar) if ranges else handler.served == len(tar) + len(tar) // 5 * 3


def test_another_run_goes_on_where_one_was_given_up(tar, tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "ATTEMPTS", 1)
    half = len(tar) // 2

    def answer(self):
        self.send(tar[self.first() :][:half])
        self.connection.shutdown(2)
        self.close_connection = True

    with serving(tar, answer=answer) as (url, handler):
        with pytest.raises(UsageError, match="Run again to go on from here"):
            opened(tmp_path, url)
        handler.answer = Server.answer
        arrives(tmp_path, url)
        assert handler.served == len(tar)
    assert not list((tmp_path / "cache").rglob("*.part"))


def test_file_that_changed_meanwhile_is_fetched_anew(tar, tmp_path):
    other = write_tar(tmp_path / "other.tar", pairs(range(PAIRS, 2 * PAIRS))).read_bytes()
    other = other[: len(tar)].ljust(len(tar), b"\0")

    def answer(self):
        if self.asked == 1:
            self.send(other[self.first() :][: len(tar) // 2])
            self.connection.shutdown(2)
            self.close_connection = True
            type(self).version = '"2"'
        else:
            self.send(tar[self.first() :])

    with serving(tar, answer=answer) as (url, _):
        arrives(tmp_path, url)


@pytest.mark.parametrize("method", ["do_HEAD", "do_GET"])
def test_busy_store_is_asked_again(method, tar, tmp_path):
    """When shards are looked up, and when they are fetched."""
    times = []

    def busy(self):
        times.append(1)
        if len(times) < 3 or method == "do_HEAD" and self.command == "GET" and len(times) < 5:
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            getattr(Server, f"do_{self.command}")(self)

    methods = {"do_HEAD": busy, "do_GET": busy} if method == "do_HEAD" else {"do_GET": busy}
    with serving(tar, **methods) as (url, _):
        arrives(tmp_path, url)


@pytest.mark.parametrize(
    ("status", "words"),
    [(404, "FileNotFoundError: .*0.tar"), (403, "PermissionError: 403"), (503, "503.*5 attempts|503.*2 attempts")],
)
def test_answer_of_the_store_is_told(status, words, tar, tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "ATTEMPTS", 2)

    def refuse(self):
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    with serving(tar, do_HEAD=refuse, do_GET=refuse) as (url, _):
        with pytest.raises(UsageError, match=words):
            opened(tmp_path, url)


def test_ctrl_c_does_not_wait_for_a_silent_store(tar, tmp_path):
    """Which is given a minute; told to, what is under way ends within seconds."""
    end, stop = threading.Event(), threading.Event()

    def answer(self):
        self.first()
        end.wait(60)

    with serving(tar, answer=answer) as (url, handler):
        files = stores.open_store(url)

        class Stopped(stores.Callback):
            def call(self, *_, **__):
                if stop.is_set():
                    raise InterruptedError("stopped")

        threading.Timer(1, stop.set).start()
        start = time.monotonic()
        with pytest.raises(InterruptedError):
            stores.fetch(files, url, len(tar), tmp_path / "0.tar", Stopped())
        assert time.monotonic() - start < 20
        end.set()
