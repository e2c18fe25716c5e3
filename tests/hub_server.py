"""A Hub of one's own for tests: an HTTP server that speaks the part of the Hugging Face Hub's API that pushing a model
and loading it again need.

    client -> Handler (one thread a connection) -> faults asked for by the test -> route -> Repository -> files in `root`

Blobs lie on disk by their SHA-256, as the Hub's large files do, and a branch is a name for a commit: what a reader gets
changes only when a commit is made. `HubServer.fail` makes chosen requests go wrong; `HubServer.requests` says what came.
"""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


LARGE = (".safetensors", ".png", ".jpg")  # files that travel as blobs of their own; all others in the commit itself


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose `METHOD /path` the pattern matches."""

    pattern: str
    times: int = 1
    status: int | None = None
    message: str = "made to fail"
    drop_after_bytes: int | None = None
    """Reads so many bytes of the body and resets the connection."""
    lose_answer: bool = False
    """Does what was asked, and resets the connection instead of answering."""
    delay: float = 0.0
    """Seconds of silence before all else."""


@dataclass
class File:
    sha256: str
    size: int
    large: bool
    git_sha1: str

    @property
    def oid(self) -> str:
        """By which the Hub tells a client what it has: SHA-256 of large files, git's hash of others."""
        return self.sha256 if self.large else self.git_sha1


@dataclass
class Repository:
    private: bool
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, File], message: str) -> str:
        content = json.dumps([message, len(self.commits), {name: file.sha256 for name, file in files.items()}])
        sha = hashlib.sha1(content.encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        self.messages.append(message)
        return sha


class HubServer(ThreadingHTTPServer):
    """`users` are names by token; each may write to its own account and nowhere else. Use as a context manager."""

    daemon_threads = True

    def __init__(self, root: Path, users: dict[str, str], part_size: int | None = None, port: int = 0):
        super().__init__(("127.0.0.1", port), Handler)
        self.root, self.users, self.part_size = root, users, part_size
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self.url = f"http://127.0.0.1:{self.server_port}"
        (root / "blobs").mkdir(parents=True)

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.shutdown()
        self.server_close()

    def fail(self, pattern: str, **what) -> Fault:
        fault = Fault(pattern, **what)
        self.faults.append(fault)
        return fault

    def asked(self, pattern: str) -> list[str]:
        """The requests, `METHOD /path`, that match, in the order in which they came."""
        return [request for request in self.requests if re.search(pattern, request)]

    def files(self, name: str, branch: str = "main") -> dict[str, bytes]:
        """What a reader of a branch gets."""
        repository = self.repositories[name]
        files = repository.commits[repository.branches[branch]]
        return {path: self.blob(file.sha256).read_bytes() for path, file in files.items()}

    def blob(self, sha256: str) -> Path:
        return self.root / "blobs" / sha256

    def store(self, content: bytes, large: bool = False) -> File:
        sha256 = hashlib.sha256(content).hexdigest()
        self.blob(sha256).write_bytes(content)
        return File(sha256, len(content), large, hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest())

    def create(self, name: str, private: bool = False) -> Repository:
        repository = self.repositories[name] = Repository(private)
        repository.commit("main", {".gitattributes": self.store(b"*.safetensors filter=lfs\n")}, "initial commit")
        return repository

    def handle_error(self, request, client_address) -> None:
        """Clients that go away in the middle are part of the tests."""


class Problem(Exception):
    def __init__(self, status: int, message: str, code: str = ""):
        super().__init__(message)
        self.status, self.code = status, code


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keeps connections open, as the Hub does
    server: HubServer
    ROUTES = (  # names of models are `account/name`
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("POST", r"/api/repos/create", "create"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?", "info"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(/(?P<path>.+))?", "tree"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<branch>[^/]+)", "branch"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<branch>[^/]+)", "commit"),
        ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
        ("PUT", r"/storage/(?P<oid>[0-9a-f]{64})(/(?P<part>\d+))?", "put"),
        ("POST", r"/(?P<repo>[^/]+/[^/]+)/complete/(?P<oid>[0-9a-f]{64})", "complete"),
        ("POST", r"/(?P<repo>[^/]+/[^/]+)/verify", "verify"),
        ("GET", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    )

    def log_message(self, *_) -> None:
        pass

    def do_GET(self):
        self.answer_request()

    do_HEAD = do_POST = do_PUT = do_GET

    # -- plumbing ------------------------------------------------------------------------------------------------

    def answer_request(self) -> None:
        path = urlsplit(self.path).path
        request = f"{self.command} {path}"
        fault = None
        with self.server.lock:
            self.server.requests.append(request)
            for candidate in self.server.faults:
                if candidate.times > 0 and re.search(candidate.pattern, request):
                    candidate.times -= 1
                    fault = candidate
                    break
        if fault is not None:
            time.sleep(fault.delay)
            if fault.drop_after_bytes is not None:
                self.rfile.read(fault.drop_after_bytes)
                return self.reset()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            if fault is not None and fault.status is not None:
                raise Problem(
                    fault.status, fault.message.replace("{authorization}", str(self.headers["Authorization"]))
                )
            with self.server.lock:
                status, headers, content = self.route(path, body)
        except Problem as problem:
            status, headers = problem.status, {"X-Error-Code": problem.code}
            content = json.dumps({"error": str(problem), "url": getattr(problem, "url", "")}).encode()
        if fault is not None and fault.lose_answer:
            return self.reset()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def route(self, path: str, body: bytes) -> tuple[int, dict, bytes]:
        for method, pattern, name in self.ROUTES:
            found = re.fullmatch(pattern, path)
            if found and method == ("GET" if self.command == "HEAD" else self.command):
                values = {key: unquote(value) for key, value in found.groupdict().items() if value is not None}
                answer = getattr(self, name)(body, **values)
                if isinstance(answer, tuple):
                    return answer
                return 200, {"Content-Type": "application/json"}, json.dumps(answer).encode()
        raise Problem(404, f"no such route: {self.command} {path}")

    def user(self) -> str:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in self.server.users:
            raise Problem(401, "Invalid credentials in Authorization header")
        return self.server.users[token]

    def writable(self, repo: str) -> Repository:
        if repo.split("/")[0] != self.user():
            raise Problem(403, f"You don't have the rights to write to {repo}")
        return self.readable(repo)

    def readable(self, repo: str) -> Repository:
        repository = self.server.repositories.get(repo)
        if repository is None or (repository.private and repo.split("/")[0] != self.user()):
            raise Problem(404, "Repository not found", "RepoNotFound")
        return repository

    def commit_of(self, repository: Repository, revision: str) -> str:
        sha = repository.branches.get(revision, revision)
        if sha not in repository.commits:
            raise Problem(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    # -- routes --------------------------------------------------------------------------------------------------

    def whoami(self, body):
        return {"type": "user", "name": self.user(), "orgs": []}

    def validate(self, body):
        if "license: no-such-license" in json.loads(body)["content"]:
            content = json.dumps({"errors": [{"message": '"license" must be one of [apache-2.0, mit]'}]}).encode()
            return 400, {}, content
        return {"errors": [], "warnings": []}

    def create(self, body):
        wanted, user = json.loads(body), self.user()
        repo = f"{wanted.get('organization') or user}/{wanted['name']}"
        if repo.split("/")[0] != user:
            raise Problem(403, f"You don't have the rights to create a model under {repo.split('/')[0]}")
        if repo in self.server.repositories:
            problem = Problem(409, "You already created this model repo")
            problem.url = f"{self.server.url}/{repo}"
            raise problem
        self.server.create(repo, private=wanted.get("visibility") == "private" or wanted.get("private", False))
        return {"url": f"{self.server.url}/{repo}", "name": repo}

    def info(self, body, repo, revision="main"):
        repository = self.readable(repo)
        sha = self.commit_of(repository, revision)
        files = [{"rfilename": path} for path in repository.commits[sha]]
        return {"id": repo, "sha": sha, "private": repository.private, "siblings": files, "tags": []}

    def tree(self, body, repo, revision, path=""):
        repository = self.readable(repo)
        files = repository.commits[self.commit_of(repository, revision)]
        found = {name: file for name, file in files.items() if not path or name.startswith(path + "/")}
        if path and not found:
            raise Problem(404, f"{path} does not exist", "EntryNotFound")
        return [{"type": "file", "path": name, "size": file.size, "oid": file.oid} for name, file in found.items()]

    def branch(self, body, repo, branch):
        repository = self.writable(repo)
        if branch in repository.branches:
            raise Problem(409, f"Reference already exists: {branch}")
        repository.branches[branch] = repository.branches["main"]
        return {}

    def preupload(self, body, repo, revision):
        repository = self.writable(repo)
        files = repository.commits[self.commit_of(repository, revision)]
        ignored = self.server.blob(files[".gitignore"].sha256).read_text().split() if ".gitignore" in files else []
        answers = []
        for asked in json.loads(body)["files"]:
            path = asked["path"]
            mode = "lfs" if path.endswith(LARGE) or asked["size"] > 1_000_000 else "regular"
            oid = files[path].oid if path in files else None
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": path in ignored, "oid": oid})
        return {"files": answers}

    def batch(self, body, repo):
        self.writable(repo)
        objects = []
        for asked in json.loads(body)["objects"]:
            oid, size, actions = asked["oid"], asked["size"], None
            if not self.server.blob(oid).is_file():
                part = self.server.part_size
                upload = {"href": f"{self.server.url}/storage/{oid}"}
                if part is not None and size > part:
                    count = -(-size // part)
                    parts = {f"{n:05d}": f"{upload['href']}/{n}" for n in range(1, count + 1)}
                    upload = {
                        "href": f"{self.server.url}/{repo}/complete/{oid}",
                        "header": {"chunk_size": str(part), **parts},
                    }
                actions = {"upload": upload, "verify": {"href": f"{self.server.url}/{repo}/verify"}}
            objects.append({"oid": oid, "size": size, **({"actions": actions} if actions else {})})
        return {"transfer": "basic", "objects": objects}

    def put(self, body, oid, part=None):
        """Storage knows no accounts: the address is the permission, as with presigned URLs."""
        if part is None and hashlib.sha256(body).hexdigest() != oid:
            raise Problem(400, "content does not have this SHA-256")
        self.server.blob(oid if part is None else f"{oid}.{part}").write_bytes(body)
        return 200, {"ETag": f'"{hashlib.md5(body).hexdigest()}"'}, b""

    def complete(self, body, repo, oid):
        parts = sorted(json.loads(body)["parts"], key=lambda part: part["partNumber"])
        content = b"".join(self.server.blob(f"{oid}.{part['partNumber']}").read_bytes() for part in parts)
        return self.put(content, oid)

    def verify(self, body, repo):
        self.writable(repo)
        asked = json.loads(body)
        blob = self.server.blob(asked["oid"])
        if not blob.is_file() or blob.stat().st_size != asked["size"]:
            raise Problem(404, "the object was not uploaded")
        return {}

    def commit(self, body, repo, branch):
        repository = self.writable(repo)
        if branch not in repository.branches:
            raise Problem(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        entries = [json.loads(line) for line in body.splitlines()]
        header = entries[0]["value"]
        if header.get("parentCommit") not in (None, repository.branches[branch]):
            raise Problem(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repository.commits[repository.branches[branch]])
        for entry in entries[1:]:
            value = entry["value"]
            path = value["path"]
            if entry["key"] == "file":
                files[path] = self.server.store(base64.b64decode(value["content"]))
            elif entry["key"] == "lfsFile":
                blob = self.server.blob(value["oid"])
                if not blob.is_file():
                    raise Problem(400, f"LFS pointer of {path} points to a file that does not exist")
                files[path] = self.server.store(blob.read_bytes(), large=True)
            elif entry["key"] == "deletedFile":
                if files.pop(path, None) is None:
                    raise Problem(404, "A file with this name doesn't exist", "EntryNotFound")
        sha = repository.commit(branch, files, header["summary"])
        return {"success": True, "commitOid": sha, "commitUrl": f"{self.server.url}/{repo}/commit/{sha}"}

    def resolve(self, body, repo, revision, path):
        repository = self.readable(repo)
        sha = self.commit_of(repository, revision)
        file = repository.commits[sha].get(path)
        if file is None:
            content = json.dumps({"error": "Entry not found"}).encode()
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha}, content
        headers = {"X-Repo-Commit": sha, "ETag": f'"{file.oid}"', "Accept-Ranges": "bytes"}
        if file.large:
            headers |= {"X-Linked-Etag": f'"{file.oid}"', "X-Linked-Size": str(file.size)}
        return 200, headers, self.server.blob(file.sha256).read_bytes()
