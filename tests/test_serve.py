"""The server of image search: its API, hostile requests to it, and what it shows of files."""

import asyncio
import http.client
import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest
from PIL import Image
from training_utils import environment


pytest.importorskip("pathspec")
pytest.importorskip("uvicorn")
from serve_utils import build_index, serving

import hfclip_cli
from hfclip.search.serve import LONGEST_QUERY, QueryQueue, create_app


LOOPBACK = {"127.0.0.1", "localhost"}


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return build_index(tmp_path_factory.mktemp("served"), 30)


@pytest.fixture(scope="module")
def address(index):
    with serving(create_app(index, hosts=LOOPBACK)) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    with httpx.Client(base_url=address, timeout=20) as client:
        yield client


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# Queries
# ---------------------------------------------------------------------------------------------------------------------


def test_search_gives_what_the_index_finds_page_by_page(client, index):
    expected = index.search("red + 2:blue - dog", top_k=30)
    pages = [client.get("/api/search", params={"q": "red + 2:blue - dog", "limit": 20, "offset": k}) for k in (0, 20)]
    hits = [hit for page in pages for hit in page.json()["hits"]]
    assert [hit["id"] for hit in hits] == [hit.id for hit in expected.hits]
    assert [hit["path"] for hit in hits] == [hit.path for hit in expected.hits]
    reply = pages[0].json()
    assert (reply["total"], reply["strong"]) == (30, expected.strong)
    assert [(term["weight"], term["text"]) for term in reply["terms"]] == [(1, "red"), (2, "blue"), (-1, "dog")]


def test_images_and_filters_are_part_of_the_query(client, index):
    hits = client.get("/api/similar/7").json()["hits"]
    assert hits[0]["id"] == 7 and hits[0]["score"] == pytest.approx(1, abs=1e-3)
    assert client.get("/api/search?like=7").json()["hits"] == hits
    assert client.get("/api/search?like=-7").json()["hits"][-1]["id"] == 7
    found = client.get("/api/search", params={"q": "red", "folder": "summer days"}).json()
    assert found["total"] == 20 and {hit["folder"].rpartition("/")[2] for hit in found["hits"]} == {"summer days"}
    assert client.get("/api/search?q=red&after=2100-01-01").json()["total"] == 0
    latest = client.get("/api/images?limit=200&before=2100").json()
    changed = [hit["modified"] for hit in latest["hits"]]
    assert changed == sorted(changed, reverse=True) and len(changed) == 30 and latest["hits"][0]["score"] is None


def test_uploaded_image_finds_itself(client, index):
    hit = index.get(5)
    with open(hit.path, "rb") as file:
        key = client.post("/api/images", content=file.read()).json()["image"]
    assert client.get(f"/api/search?image=2:{key}").json()["hits"][0]["id"] == 5
    assert Image.open(io.BytesIO(client.get(f"/thumb/upload/{key}").content)).size == (hit.width, hit.height)


@pytest.mark.parametrize(
    "query",
    [
        f"q={'a' * 10_000}",
        "",
        "q=",
        "q=+++",
        "q=red+%2B",
        "like=17x",
        "like=9999",
        "like=ab",
        "image=0123",
        "q=a" + "&like=1" * 17,
        "q=a&limit=0",
        "q=a&limit=201",
        "q=a&offset=99999999999",
        "q=a&offset=-1",
        "q=a&after=soon",
    ],
)
def test_queries_that_are_none_are_refused_in_a_sentence(client, query):
    reply = client.get(f"/api/search?{query}")
    assert reply.status_code in (400, 404) and len(reply.json()["error"]) > 15


def test_longest_query_is_answered(client):
    assert client.get("/api/search", params={"q": "a" * LONGEST_QUERY}).status_code == 200


def test_queries_that_wait_are_answered_together():
    batches = []

    def answer(questions):
        batches.append(len(questions))
        time.sleep(0.02)
        return [ValueError(text) if text == "7" else text.upper() for (text,) in questions]

    async def ask_all():
        queue = QueryQueue(answer)
        return await asyncio.gather(*[queue.ask(str(number)) for number in range(100)], return_exceptions=True)

    answers = asyncio.run(ask_all())
    assert batches == [64, 36]
    assert [str(answer) for answer in answers] == [str(number) for number in range(100)]
    assert isinstance(answers[7], ValueError)


def test_threads_at_once_get_their_own_answers(client, index):
    words = ["red", "blue", "a large cat", "star", "small fish", "boat + red"]
    expected = {word: [hit.id for hit in index.search(word, 5).hits] for word in words}
    found = {}

    def ask(word):
        found[word] = [hit["id"] for hit in client.get("/api/search", params={"q": word, "limit": 5}).json()["hits"]]

    threads = [threading.Thread(target=ask, args=(word,)) for word in words]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert found == expected


def test_finished_update_is_seen_without_restart(tmp_path):
    index = build_index(tmp_path, 3)
    with serving(create_app(index)) as address:
        assert httpx.get(f"{address}/api/stats").json()["images"] == 3
        Image.new("RGB", (8, 8)).save(tmp_path / "photos" / "new.png")
        with index.store.locked():
            index.store.tell_progress(1, 4)
            assert httpx.get(f"{address}/api/stats").json()["indexing"] == [1, 4]
        index.update()
        stats = httpx.get(f"{address}/api/stats").json()
        assert (stats["images"], stats["indexing"]) == (4, None)
        assert httpx.get(f"{address}/api/search?q=red").json()["total"] == 4


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def test_files_are_shown_as_types_that_browsers_cannot_run(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    wide = Image.linear_gradient("L").resize((1200, 600))
    for name in ("a.png", "b.tiff", "c.bmp", "d.gif"):
        wide.save(folder / name)
    turned = Image.Exif()
    turned[0x0112] = 6
    wide.convert("RGB").save(folder / "e.jpg", exif=turned)
    wide.save(os.fsencode(folder) + b"/f\xff\n\"'.png", "PNG")
    for name in ("g.png", "h.png", "i.png"):
        Image.new("RGB", (9, ord(name[0]))).save(folder / name)
    index = build_index(tmp_path, 0)
    ids = {os.path.basename(hit.path)[0]: hit.id for hit in index}
    (folder / "g.png").write_text("<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>")
    (folder / "h.png").unlink(), os.mkfifo(folder / "h.png")
    (folder / "i.png").unlink()
    with serving(create_app(index)) as address, httpx.Client(base_url=address) as client:
        replies = {name: client.get(f"/image/{number}") for name, number in ids.items()}
        kinds = {name: reply.headers["content-type"] for name, reply in replies.items() if reply.is_success}
        jpeg, png = "image/jpeg", "image/png"
        assert kinds == {"a": png, "b": jpeg, "c": jpeg, "d": "image/gif", "e": jpeg, "f": png}
        assert [replies[name].status_code for name in "ghi"] == [415, 404, 404]
        assert [client.get(f"/thumb/{ids[name]}").status_code for name in "ghi"] == [415, 404, 404]
        assert Image.open(io.BytesIO(replies["b"].content)).size == (1200, 600)
        thumbnails = {name: client.get(f"/thumb/{ids[name]}") for name in "abcdef"}
        sizes = {name: Image.open(io.BytesIO(reply.content)).size for name, reply in thumbnails.items()}
        assert sizes == {**dict.fromkeys("abcdf", (512, 256)), "e": (128, 256)}
        assert {reply.headers["content-type"] for reply in thumbnails.values()} == {"image/webp"}
        (folder / "a.png").unlink()  # the thumbnail is kept
        assert client.get(f"/thumb/{ids['a']}").content == thumbnails["a"].content
        download = client.get(f"/image/{ids['f']}?download=1")
        assert download.headers["content-disposition"].startswith("attachment")
        assert download.headers["content-type"] == "application/octet-stream"
        assert client.get(f"/image/{ids['e']}", headers={"range": "bytes=0-9"}).status_code == 206
        assert all(hit["name"] for hit in client.get("/api/images").json()["hits"])


# ---------------------------------------------------------------------------------------------------------------------
# Strangers
# ---------------------------------------------------------------------------------------------------------------------

BOMB = encoded(Image.new("1", (20_000, 20_000)))
HOSTILE = [
    *(
        ("GET", path, {}, b"")
        for path in (
            "/../../etc/passwd",
            "/page/../serve.py",
            "/page/..%2fserve.py",
            "/page/%2e%2e/%2e%2e/serve.py",
            "/page//etc/passwd",
            "/image/../../../etc/passwd",
            "/image/..%2f..%2f..%2fetc%2fpasswd",
            "/image//etc/passwd",
            "/image/-1",
            "/image/1e3",
            "/image/0%00.jpg",
            "/image/99999999999999999999999999",
            "/thumb/upload/..%2f..%2f..%2fetc%2fpasswd",
            "/thumb/upload/%00",
            "/api/similar/file:///etc/passwd",
            "/api/search?image=http://169.254.169.254/latest/meta-data",
            "/api/search?image=file:///etc/passwd",
            "/api/search?like=/etc/passwd",
            "/static/../../../etc/passwd",
            "http://evil.example/api/stats",
        )
    ),
    ("GET", "/api/stats", {"Host": "evil.example"}, b""),
    ("GET", "/api/stats", {"Host": "127.0.0.1@evil.example"}, b""),
    ("GET", "/api/stats", {"Host": "127.0.0.1.evil.example:80"}, b""),
    ("GET", "/api/stats", {"Host": "evil.example", "X-Forwarded-Host": "127.0.0.1"}, b""),
    ("GET", "/api/stats", {"Host": "["}, b""),
    ("POST", "/api/images", {"Origin": "http://evil.example"}, encoded(Image.new("L", (8, 8)))),
    ("POST", "/api/images", {"Origin": "null"}, encoded(Image.new("L", (8, 8)))),
    ("POST", "/api/images", {"Sec-Fetch-Site": "cross-site"}, encoded(Image.new("L", (8, 8)))),
    ("POST", "/api/images", {}, b""),
    ("POST", "/api/images", {}, b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
    ("POST", "/api/images", {}, b"http://169.254.169.254/latest/meta-data"),
    ("POST", "/api/images", {}, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
    ("POST", "/api/images", {}, BOMB),
    ("POST", "/api/images", {}, bytes(21 * 2**20)),
    ("POST", "/api/images", {"Content-Length": "-1"}, b""),
    ("POST", "/api/search?q=red", {}, b""),
    ("PUT", "/image/1", {}, b"x"),
    ("DELETE", "/image/1", {}, b""),
    ("TRACE", "/", {}, b""),
]


@pytest.mark.parametrize("method, path, headers, body", HOSTILE, ids=[f"{n}-{h[0]}" for n, h in enumerate(HOSTILE)])
def test_hostile_requests_get_nothing(address, index, method, path, headers, body):
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=20)
    connection.putrequest(method, path, skip_host="Host" in headers)
    for name, value in {**({"Content-Length": str(len(body))} if body else {}), **headers}.items():
        connection.putheader(name, value)
    connection.endheaders()
    try:
        connection.send(body)
    except ConnectionError:
        pass  # it has answered, and reads no more
    try:
        reply = connection.getresponse()
    except ConnectionError:
        return
    finally:
        connection.close()
    content = reply.read() if not reply.isclosed() else b""
    assert 400 <= reply.status < 500 and b"root:" not in content and b"import" not in content
    assert str(index.store.folder).encode() not in content


def test_every_reply_has_the_headers_of_the_guard(client):
    for path in ("/", "/page/app.js", "/api/stats", "/api/search", "/nothing", "/thumb/1", "/image/1"):
        headers = client.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"
        assert headers["cross-origin-resource-policy"] == "same-origin" and "server" not in headers
        assert "access-control-allow-origin" not in headers


def test_token_is_asked_for_everywhere(index):
    with serving(create_app(index, token="Geheim")) as address:
        for path in ("/", "/api/stats", "/thumb/1", "/image/1", "/page/app.js", "/?token=geheim", "/?token="):
            assert httpx.get(address + path).status_code == 401
        assert httpx.get(f"{address}/healthz").status_code == 200
        assert httpx.get(f"{address}/api/stats", headers={"Authorization": "Bearer Geheim"}).status_code == 200
        with httpx.Client(base_url=address) as client:
            entry = client.get("/?token=Geheim")
            assert (entry.status_code, entry.headers["location"]) == (303, "/")
            assert "HttpOnly" in entry.headers["set-cookie"] and "SameSite=lax" in entry.headers["set-cookie"]
            assert client.get("/api/stats").status_code == 200
            own = {"origin": address}
            image = encoded(Image.new("L", (8, 8)))
            assert client.post("/api/images", content=image, headers=own).status_code == 200
            foreign = {"origin": "http://evil.example"}
            assert client.post("/api/images", content=image, headers=foreign).status_code == 403


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def test_command_prints_an_address_with_a_token_and_ends_with_ctrl_c(index):
    line = [sys.executable, "-c", "import hfclip_cli; hfclip_cli.main()"]
    line += ["serve", str(index.store.folder), "--host", "0.0.0.0", "--port", "0"]
    with subprocess.Popen(
        line, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        address = process.stdout.readline().split("at ")[1].split()[0].replace("0.0.0.0", "127.0.0.1")
        with httpx.Client(follow_redirects=True) as client:
            assert client.get(address.partition("?")[0]).status_code == 401
            assert "<title>Image search</title>" in client.get(address).text
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130 and process.stderr.read().strip() == "Stopped."


def test_taken_port_is_one_line(index, monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        monkeypatch.setattr(sys, "argv", ["hfclip", "serve", str(index.store.folder), "--port", port])
        with pytest.raises(SystemExit) as end:
            hfclip_cli.main()
    assert end.value.code == 2
    assert f"--port {port}: " in (message := capsys.readouterr().err) and message.count("\n") == 1
