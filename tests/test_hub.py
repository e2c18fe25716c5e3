"""Pushing to a Hub: the script in its own process, against a server that speaks the Hub's API, with what can go wrong.

Every run of the script is checked for the token: it must be in no output.
"""

import hashlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_server import HubServer
from huggingface_hub import EvalResult, ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file
from test_auto import CAPTIONS, VISIONS
from training_utils import command, free_port, pairs, write_recipe, write_tar

from hfclip import HFCLIPConfig, HFCLIPImageProcessor, HFCLIPModel, HFCLIPProcessor, HFCLIPTokenizer, hub
from hfclip.errors import UsageError
from hfclip.hub import check_folder, model_card
from training import pretrain
from training.command import parse_arguments


SCRIPT = Path(__file__).resolve().parents[1] / "conversion" / "push_to_hub.py"
TOKEN = "hf_ThisIsTheSecretOfTheTests"
REPO = "anna/clip-birds"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, Path]:
    """Two models with their processors as save_pretrained leaves them, the ViT in shards."""
    tokenizer = HFCLIPTokenizer.train_new_from_iterator(CAPTIONS, vocab_size=546)
    text = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    image_processor = HFCLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    folders = {}
    for name, vision in VISIONS.items():
        folders[name] = tmp_path_factory.mktemp("saved") / name
        torch.manual_seed(0)
        model = HFCLIPModel(HFCLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
        model.save_pretrained(folders[name], max_shard_size="90KB" if name == "vit" else "50GB")
        HFCLIPProcessor(image_processor=image_processor, tokenizer=tokenizer).save_pretrained(folders[name])
    assert len(list(folders["vit"].glob("model-*.safetensors"))) >= 3
    return folders


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """The ViT in shards with a card of its own, to change at will."""
    path = shutil.copytree(saved["vit"], tmp_path / "birds")
    (path / "README.md").write_text("---\ntags: [clip]\n---\n\nMy model.\n")
    return path


@pytest.fixture(scope="module")
def forker(tmp_path_factory):
    with Forker(tmp_path_factory.mktemp("forker")) as forker:
        yield forker


@pytest.fixture
def server(tmp_path, forker):
    with HubServer(tmp_path / "hub", users={TOKEN: "anna"}, port=forker.port) as server:
        server.forker = forker
        yield server


def environment(url: str, home: Path, **more: str) -> dict[str, str]:
    # Xet is a storage protocol with a server of its own; without it the client sends large files by LFS.
    settings = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_TOKEN": TOKEN}
    settings |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", **more}
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return {**kept, **settings}


# The script with a hundredth of the waits between attempts, hfclip's and huggingface_hub's, and for a silent server.
# Unless asked to COMPARE, it takes the tensors for the model's.
IMPATIENT = """
import os, runpy, sys, time
from hfclip.hub import check, upload
sleep, compare = time.sleep, check._check_tensors
time.sleep = lambda seconds: sleep(seconds / 100)
def run(path, *arguments):
    upload.TIMEOUT = float(os.environ.get("SILENCE", 60))
    check._check_tensors = compare if "COMPARE" in os.environ else lambda *_: None
    sys.argv = [path, *arguments]
    runpy.run_path(path, run_name="__main__")
"""
# Importing takes longer than pushing, so one process imports, and forks one for each line it reads.
FORKING = (
    IMPATIENT
    + """
import json, signal, traceback
for line in sys.stdin:
    arguments, environment, out, err = json.loads(line)
    process = os.fork()
    if process:
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
        continue
    signal.alarm(120)  # and not for ever
    os.environ.update(environment)
    for stream, file in ((sys.stdout, out), (sys.stderr, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream.fileno())
    status = 1
    try:
        run(*arguments)
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(status)
"""
)
AT_IMPORT = {"HF_ENDPOINT", "HF_HUB_OFFLINE"}  # what huggingface_hub reads then


class Forker:
    """Runs the script in forks of one process, against servers that have its port one after the other."""

    def __init__(self, folder: Path):
        self.folder, self.port = folder, free_port()
        self.process = subprocess.Popen(
            [sys.executable, "-c", FORKING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=environment(f"http://127.0.0.1:{self.port}", folder),
        )  # fmt: skip

    def __enter__(self) -> "Forker":
        return self

    def __exit__(self, *_) -> None:
        self.process.communicate()

    def run(self, *arguments: str, **environment: str) -> tuple[int, str, str]:
        """Its status, stdout and stderr."""
        files = [self.folder / "out", self.folder / "err"]
        print(json.dumps([arguments, environment, *map(str, files)]), file=self.process.stdin, flush=True)
        return (int(self.process.stdout.readline()), *(file.read_text() for file in files))


def start(server: HubServer, folder: Path, repo: str = REPO, **more: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", IMPATIENT + "run(*sys.argv[1:])", str(SCRIPT), str(folder), repo],
        env=environment(server.url, server.root.parent / "home", **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def push(server: HubServer, folder: Path, *arguments: str, repo: str = REPO, status: int = 0, **more: str):
    """Stdout and stderr of the script, which must end with `status`, without traceback, and keep the token secret."""
    if more.keys() & AT_IMPORT:
        process = start(server, folder, repo, **more)
        out, err = process.communicate(timeout=120)
        found = process.returncode
    else:
        found, out, err = server.forker.run(str(SCRIPT), str(folder), repo, *arguments, **more)
    assert found == status, err
    assert "Traceback" not in err and TOKEN not in out + err, err
    return out, err


def error_of(err: str) -> str:
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, err
    return errors[0]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---------------------------------------------------------------------------------------------------------------------
# A model that was pushed is the model
# ---------------------------------------------------------------------------------------------------------------------

LOAD = """
import sys
sys.modules["hfclip"] = None
import json, re
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoModel, AutoProcessor

repo, captions, revision = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
options = dict(trust_remote_code=True, revision=revision, code_revision=revision)
model, processor = (auto.from_pretrained(repo, **options) for auto in (AutoModel, AutoProcessor))
inputs = processor(text=captions, images=Image.open("picture.jpg"), return_tensors="pt", padding=True)
with torch.no_grad():
    logits = model(**inputs).logits_per_image[0].tolist()
if revision == "main":
    snippets = re.findall("```python\\n(.*?)```", ModelCard.load(repo).text, flags=re.DOTALL)
    assert len(snippets) == 2
    for snippet in snippets:
        exec(snippet)
    assert probabilities.shape == (1, 2) and type(model).__name__ == "HFCLIPModel"
print(json.dumps(logits))
"""


@pytest.mark.parametrize(
    "name, arguments, revision",
    [("vit", ("--private",), "main"), ("resnet", ("--public", "--revision", "v1"), "v1")],
)
def test_a_pushed_model_opens_by_name_where_hfclip_is_missing(saved, server, tmp_path, name, arguments, revision):
    pixels = np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.jpg")
    out, _ = push(server, saved[name], *arguments, COMPARE="1")
    assert f"Published: {server.url}/{REPO}" in out
    assert server.repositories[REPO].private == ("--private" in arguments)

    more = {"HF_HUB_DISABLE_PROGRESS_BARS": "1"} | ({} if server.repositories[REPO].private else {"HF_TOKEN": ""})
    result = subprocess.run(
        [sys.executable, "-c", LOAD, REPO, json.dumps(CAPTIONS), revision],
        env=environment(server.url, tmp_path / "home", **more), cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    model, processor = HFCLIPModel.from_pretrained(saved[name]), HFCLIPProcessor.from_pretrained(saved[name])
    photo = Image.open(tmp_path / "picture.jpg")
    inputs = processor(text=CAPTIONS, images=photo, return_tensors="pt", padding=True)
    with torch.no_grad():
        expected = model.eval()(**inputs).logits_per_image[0].tolist()
    # The same code on the same weights; only float32 rounding between two processes is left open.
    assert json.loads(result.stdout) == pytest.approx(expected, abs=1e-5)


def test_a_branch_is_made_and_main_stays_as_it_was(folder, server):
    out, _ = push(server, folder, "--revision", "step-500", "--message", "Half way")
    assert f"Published: {server.url}/{REPO}/tree/step-500" in out
    assert set(server.files(REPO)) == {".gitattributes"}
    assert {".gitattributes", *contents(folder)} == set(server.files(REPO, "step-500"))
    assert server.repositories[REPO].messages == ["initial commit", "Half way"]


def test_dry_run_lists_and_sends_nothing(folder, server):
    (folder / "optimizer.pt").write_bytes(b"state")
    out, err = push(server, folder, "--dry-run", HF_TOKEN="")
    assert server.requests == []
    listed = {line.split()[0] for line in out.splitlines() if line.startswith("  ")}
    assert listed == set(contents(folder)) - {"optimizer.pt"}
    assert "no part of the model: optimizer.pt" in err and f"{len(listed)} files" in out
    assert f"Nothing was sent. It would be published at {server.url}/{REPO}" in out


def test_files_above_the_size_of_a_part_travel_in_parts(folder, server):
    server.part_size = 20_000
    push(server, folder)
    assert len(server.asked("^PUT /storage/[0-9a-f]+/2$")) >= 2
    assert contents(folder).items() <= server.files(REPO).items()


def test_an_unchanged_folder_makes_no_second_commit(folder, server):
    push(server, folder)
    server.requests.clear()
    out, _ = push(server, folder)
    assert server.asked("^PUT|/commit/") == [] and "Published:" not in out
    assert f"Nothing changed: {server.url}/{REPO} has all this already." in out
    assert len(server.repositories[REPO].messages) == 2


def test_weights_of_an_earlier_model_go_and_other_files_stay(saved, folder, server):
    repository = server.create(REPO)
    earlier = {"model.safetensors": b"old", "model-00009-of-00009.safetensors": b"old", "notes.md": b"mine"}
    repository.commit("main", {name: server.store(content) for name, content in earlier.items()}, "earlier")
    server.fail("/commit/", lose_answer=True)  # the deletions must not be asked for twice
    out, _ = push(server, folder)
    assert "Published:" in out  # by the commit whose answer was lost
    assert server.files(REPO) == {"notes.md": b"mine", **contents(folder)}
    assert len(repository.messages) == 3


# ---------------------------------------------------------------------------------------------------------------------
# What goes wrong on the way
# ---------------------------------------------------------------------------------------------------------------------

ALWAYS = 1000
CREATE, INFO, PREUPLOAD, BATCH = "POST /api/repos/create", "GET /api/models", "/preupload/", "/objects/batch"
PUT, VERIFY, COMMIT = "^PUT /storage", "/verify", "/commit/"


@pytest.mark.parametrize(
    "pattern, fault, expected",
    [
        (CREATE, dict(status=401), "HTTP 401: made to fail. The Hub does not accept the token. Log in with `hf auth"),
        (CREATE, dict(status=403), "HTTP 403: made to fail. The token may not write to anna/clip-birds"),
        (CREATE, dict(status=404), "HTTP 404: made to fail. There is no such account"),
        (CREATE, dict(status=500), "HTTP 500: made to fail. Push again"),
        (INFO, dict(drop_after_bytes=0), "The Hub did not answer"),
        (BATCH, dict(status=503), "HTTP 503"),
        (PUT, dict(drop_after_bytes=5000), "Uploading to anna/clip-birds failed. The Hub did not answer"),
        (VERIFY, dict(delay=0.6), "The Hub did not answer (ReadTimeout"),
        (COMMIT, dict(status=409), "HTTP 409: made to fail. Somebody else changed the branch meanwhile"),
        (COMMIT, dict(status=429), "HTTP 429: made to fail. The Hub asks for fewer requests"),
        (COMMIT, dict(status=502), "Committing to anna/clip-birds failed. HTTP 502"),
    ],
)
def test_what_fails_for_good_is_said_and_the_next_push_continues(folder, server, pattern, fault, expected):
    fault = server.fail(pattern, times=ALWAYS, **fault)
    _, err = push(server, folder, status=1, **({"SILENCE": "0.3"} if fault.delay else {}))
    assert expected in error_of(err)
    if REPO in server.repositories:  # it had come as far as sending
        assert set(server.files(REPO)) == {".gitattributes"}
        fault.times = 0
        push(server, folder)
        assert contents(folder).items() <= server.files(REPO).items()


@pytest.mark.parametrize(
    "faults",
    [
        {CREATE: dict(status=500), INFO: dict(status=503), PUT: dict(drop_after_bytes=5000), COMMIT: dict(status=504)},
        {CREATE: dict(lose_answer=True), PREUPLOAD: dict(status=429), COMMIT: dict(lose_answer=True)},
    ],
)
def test_what_fails_once_is_repeated(folder, server, faults):
    for pattern, fault in faults.items():
        server.fail(pattern, **fault)
    push(server, folder)
    assert all(fault.times == 0 for fault in server.faults)
    assert contents(folder).items() <= server.files(REPO).items()
    assert len(server.repositories[REPO].messages) == 2  # also where the answer to a commit was lost


def test_blobs_that_arrived_are_not_sent_again(folder, server):
    shards = sorted(folder.glob("*.safetensors"))
    last = hashlib.sha256(shards[-1].read_bytes()).hexdigest()
    fault = server.fail(f"^PUT /storage/{last}", times=ALWAYS, status=500)
    push(server, folder, status=1)
    assert set(server.files(REPO)) == {".gitattributes"}
    assert len(set(server.asked(PUT))) == len(shards)
    fault.times = 0
    server.requests.clear()
    push(server, folder)
    assert server.asked(PUT) == [f"PUT /storage/{last}"]
    assert contents(folder).items() <= server.files(REPO).items()


def test_ctrl_c_ends_at_once_and_the_next_push_continues(folder, server):
    server.fail(PUT, times=ALWAYS, delay=20)
    process = start(server, folder)
    deadline = time.monotonic() + 60
    while not server.asked(PUT) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 130 and "Traceback" not in err
    assert err.splitlines()[-1] == "Stopped. The same command continues: what was uploaded is not sent again."
    server.faults.clear()
    push(server, folder)
    assert contents(folder).items() <= server.files(REPO).items()


def test_a_commit_of_somebody_else_in_between_is_said_and_kept(folder, server):
    repository = server.create(REPO)
    server.fail(COMMIT, delay=1.0)
    process = start(server, folder)
    deadline = time.monotonic() + 60
    while not server.asked(COMMIT) and time.monotonic() < deadline:
        time.sleep(0.02)
    repository.commit("main", {"theirs.txt": server.store(b"theirs")}, "theirs")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "HTTP 412: A commit has happened since" in error_of(err) and "Somebody else changed" in error_of(err)
    assert server.files(REPO) == {"theirs.txt": b"theirs"}


@pytest.mark.parametrize("private, asked", [(True, "--public"), (False, "--private")])
def test_rejects_a_repository_of_other_visibility_before_sending(folder, server, private, asked):
    server.create(REPO, private=private)
    _, err = push(server, folder, asked, status=1)
    assert f"exists and is {'private' if private else 'public'}, but {asked[2:]} was asked for" in error_of(err)
    assert server.asked("^PUT|/preupload/") == []


def test_rejects_a_gitignore_that_would_leave_out_a_part(folder, server):
    repository = server.create(REPO)
    repository.commit("main", {".gitignore": server.store(b"tokenizer.json")}, "ignore")
    _, err = push(server, folder, status=1)
    assert ".gitignore of anna/clip-birds leaves out tokenizer.json" in error_of(err)
    assert set(server.files(REPO)) == {".gitignore"}


def test_metadata_that_the_hub_refuses_is_named(folder, server):
    (folder / "README.md").write_text("---\nlicense: no-such-license\n---\n")
    _, err = push(server, folder, status=1)
    assert 'README.md. - "license" must be one of' in error_of(err)


@pytest.mark.parametrize(
    "more, expected",
    [
        (dict(HF_TOKEN=""), "No usable token was found. Log in with `hf auth login`, or set HF_TOKEN"),
        (dict(HF_HUB_OFFLINE="1"), "HF_HUB_OFFLINE is set"),
        (dict(repo="berta/clip"), "HTTP 403: You don't have the rights to create a model under berta"),
        (dict(HF_ENDPOINT="http://127.0.0.1:9"), "The Hub did not answer (ConnectError"),
    ],
)
def test_what_the_user_can_mend_is_said(folder, server, more, expected):
    _, err = push(server, folder, status=1, **more)
    assert expected in error_of(err)


# Every log at its loudest, and the whole traceback of what `push` raises.
LOUD = """
import logging, sys, traceback
import huggingface_hub.utils.logging as hub_logging
logging.basicConfig(level=logging.DEBUG)
hub_logging.set_verbosity_debug()
import hfclip.hub
hfclip.hub.upload.WAITS = ()
try:
    hfclip.hub.push(sys.argv[1], "anna/clip-birds")
except hfclip.hub.HubError:
    traceback.print_exc()
    sys.exit(1)
"""


@pytest.mark.parametrize("token", [TOKEN, "a-token-of-another-kind", "hf_With\x01Control"])
def test_the_token_is_in_no_log_and_no_traceback(folder, server, token):
    # A server that says back what it was sent; the last token is no legal header, which HTTP clients quote in errors.
    server.fail(CREATE, times=ALWAYS, status=403, message="what is {authorization}?")
    result = subprocess.run(
        [sys.executable, "-c", LOUD, str(folder)], capture_output=True, text=True, timeout=120,
        env=environment(server.url, folder.parent / "home", HF_TOKEN=token, HF_DEBUG="1"),
    )  # fmt: skip
    assert result.returncode == 1, result.stderr
    assert "HubError" in result.stderr
    for secret in (token, token.removeprefix("hf_"), repr(token)[1:-1], "With"):
        assert secret not in result.stdout + result.stderr, result.stderr


def test_the_trainer_publishes_and_names_the_command_where_it_cannot(server, tmp_path):
    (tmp_path / "shards").mkdir()
    write_tar(tmp_path / "shards" / "0.tar", pairs(range(32)))
    held_out = {"retrieval": str(tmp_path / "shards" / "0.tar"), "every": 0}
    recipe = write_recipe(tmp_path, run={"push_to_hub": REPO}, optim={"steps": 3}, eval=held_out)
    server.fail(COMMIT, times=1, status=403)
    train = {"capture_output": True, "text": True, "timeout": 300, "cwd": SCRIPT.parents[1]}
    result = subprocess.run(command("--config", recipe), env=environment(server.url, tmp_path / "home"), **train)
    assert result.returncode == 1 and TOKEN not in result.stdout + result.stderr
    assert "The token may not write to" in result.stderr and "Traceback" not in result.stderr

    (again,) = [line.split() for line in result.stderr.splitlines() if "hfclip push" in line]
    hfclip = [sys.executable, "-c", "import hfclip_cli; hfclip_cli.main()"]
    subprocess.run([*hfclip, *again[1:]], env=environment(server.url, tmp_path / "home"), check=True, **train)
    assert contents(tmp_path / "run" / "model").keys() <= server.files(REPO).keys()
    card = ModelCard(server.files(REPO)["README.md"].decode())
    assert "| Pairs a step | 16 |" in card.text
    assert {"held-out pairs"} == {found.dataset_name for found in card.data.eval_results}


def test_the_trainer_asks_for_a_token_before_it_trains(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("training.report.publish.get_token", lambda: None)  # a developer may be logged in
    recipe = write_recipe(tmp_path, run={"push_to_hub": REPO})
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--config", str(recipe)])
    with pytest.raises(SystemExit, match="2"):
        pretrain.main()
    assert "run.push_to_hub: found no token" in capsys.readouterr().err and not (tmp_path / "run").exists()
    with pytest.raises(UsageError, match="run.push_to_hub: "):
        parse_arguments(["--config", str(write_recipe(tmp_path, run={"push_to_hub": "a/b/c"}))])


# ---------------------------------------------------------------------------------------------------------------------
# The folder
# ---------------------------------------------------------------------------------------------------------------------


def edit_json(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def drop_weights(folder: Path) -> None:
    for path in folder.glob("model*.safetensors*"):
        path.unlink()


def link_out(folder: Path) -> None:
    outside = folder.parent / "outside.txt"
    outside.write_text("private")
    (folder / "notes.md").symlink_to(outside)


def swap_shards(folder: Path) -> None:
    first, second = sorted(folder.glob("model-*.safetensors"))[:2]
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def edit_index(folder: Path, **files) -> None:
    path = folder / "model.safetensors.index.json"
    weight_map = json.loads(path.read_text())["weight_map"]
    edit_json(path, weight_map={**weight_map, **files})


def weights_outside(folder: Path) -> None:
    shutil.copy(min(folder.glob("model-*.safetensors")), folder.parent / "outside.safetensors")
    edit_index(folder, logit_scale="../outside.safetensors")


def save_weights(folder: Path, change) -> None:
    """All tensors after `change` in one file."""
    tensors = HFCLIPModel.from_pretrained(folder).state_dict()
    drop_weights(folder)
    save_file(change(tensors), folder / "model.safetensors")


def pickle_weights(folder: Path) -> None:
    drop_weights(folder)
    (folder / "pytorch_model.bin").write_bytes(b"pickle")


BROKEN = {
    "no-config": (lambda f: (f / "config.json").unlink(), "found no config.json"),
    "damaged-config": (lambda f: truncate(f / "config.json"), "config.json: found no readable JSON file"),
    "other-type": (lambda f: edit_json(f / "config.json", model_type="clip"), "found a model of type 'clip'"),
    "no-auto-map": (lambda f: edit_json(f / "config.json", auto_map={}), "found auto_map with nothing"),
    "no-code": (lambda f: (f / "modeling_hfclip_resnet.py").unlink(), "found no modeling_hfclip_resnet.py"),
    "code-elsewhere": (
        lambda f: edit_json(f / "config.json", auto_map={"AutoConfig": "x/y--c.C", "AutoModel": "x/y--m.M"}),
        "found 'x/y--c.C' in auto_map, expected code in this folder",
    ),
    "code-outside": (
        lambda f: edit_json(f / "config.json", auto_map={"AutoConfig": "../c.C", "AutoModel": "m.M"}),
        "found '../c.C' in auto_map",
    ),
    "code-number": (
        lambda f: edit_json(f / "config.json", auto_map={"AutoConfig": 7, "AutoModel": "m.M"}),
        "found '7' in auto_map",
    ),
    "code-nested": (
        lambda f: edit_json(f / "tokenizer_config.json", auto_map={"AutoTokenizer": [["a.B"], {"c": 1}]}),
        """found "['a.B']" in auto_map""",
    ),
    "code-list": (lambda f: edit_json(f / "processor_config.json", auto_map=[1]), "found '1' in auto_map"),
    "auto-map-number": (lambda f: edit_json(f / "config.json", auto_map=7), "found auto_map with nothing"),
    "code-latin": (
        lambda f: (f / "modeling_hfclip.py").write_bytes("# Köln".encode("latin-1")),
        "modeling_hfclip.py: found no text in UTF-8",
    ),
    "other-class": (
        lambda f: edit_json(f / "config.json", architectures=["CLIPModel"]),
        "'CLIPModel' is no class of hfclip",
    ),
    "config-of-no-model": (
        lambda f: edit_json(f / "config.json", projection_dim="wide"),
        "config.json: found no config of a model",
    ),
    "other-width": (
        lambda f: edit_json(f / "config.json", projection_dim=24),
        "found weights that are not those of HFCLIPModel in config.json: 2 tensors of another shape, such as "
        "text_projection.weight [16, 32] for [24, 32]",
    ),
    "one-tensor": (
        lambda f: save_weights(f, lambda t: {"logit_scale": t["logit_scale"]}),
        "tensors missing, such as text_model.",
    ),
    "left-over-tensor": (
        lambda f: save_weights(f, lambda t: {**t, "text_model.more": torch.zeros(1)}),
        "1 tensors left over, such as text_model.more",
    ),
    "shard-outside": (
        weights_outside,
        "the index names ['../outside.safetensors']; expected plain names of .safetensors files",
    ),
    "shard-number": (lambda f: edit_index(f, logit_scale=3), "the index names [3]; expected plain names"),
    "shards-nested": (lambda f: edit_index(f, logit_scale=["a"]), "the index names [['a']]; expected plain names"),
    "index-list": (
        lambda f: edit_json(f / "model.safetensors.index.json", weight_map=["a"]),
        "no index of shards",
    ),
    "no-weights": (drop_weights, "found no weights"),
    "pickles": (pickle_weights, "found only pickled weights, pytorch_model.bin"),
    "shard-missing": (lambda f: max(f.glob("model-*.safetensors")).unlink(), "shards that are missing: ['model-00"),
    "shard-truncated": (lambda f: truncate(max(f.glob("model-*.safetensors"))), "no complete safetensors file"),
    "shards-swapped": (swap_shards, "disagree on"),
    "two-saves": (lambda f: (f / "model.safetensors").write_bytes(b"x"), "expected one of them"),
    "no-tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "found no tokenizer.json"),
    "no-processor": (lambda f: (f / "processor_config.json").unlink(), "found no processor_config.json"),
    "processor-without-code": (
        lambda f: edit_json(
            f / "tokenizer_config.json", auto_map={"AutoProcessor": "processing_hfclip.HFCLIPProcessor"}
        ),
        "found a tokenizer_class of hfclip without AutoTokenizer",
    ),
    "link-out": (link_out, "notes.md: found a link to"),
    "broken-link": (lambda f: (f / "notes.md").symlink_to(f / "nothing"), "notes.md: found a link to"),
    "card": (lambda f: (f / "README.md").write_text("---\n[:\n---\n"), "README.md: its metadata"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_rejects_a_folder_that_is_no_whole_model(folder, name):
    check_folder(folder)
    spoil, expected = BROKEN[name]
    spoil(folder)
    with pytest.raises(ValueError) as error:
        check_folder(folder)
    assert expected in str(error.value)


def test_leaves_out_what_is_not_the_model_and_says_so(folder, caplog):
    expected = check_folder(folder)
    assert set(expected) == set(folder.iterdir())
    parts = ["LICENSE", "notes.md", ".gitattributes", "conversion.json", "onnx/vision_model.onnx", "figures/curve.png"]
    junk = [".git/config", ".cache/a", ".env", "trainer_state/optimizer.pt", "checkpoint-10/config.json", "rng.pth"]
    junk += ["old.safetensors", "__pycache__/a.pyc", "half.tmp", "train.log", "events.out.tfevents.17.host.1.0"]
    junk += ["id_rsa", "credentials.json", "optimizer.npz", "rng.npy", "core.1234", "train.py", "notes.txt"]
    junk += ["model-00009-of-00009.safetensors", "figures/credentials.json", "onnx/notes.md"]
    for name in parts + junk:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("something")
    (folder / "images").symlink_to(folder.parent)
    with caplog.at_level(logging.WARNING, logger="hfclip.hub"):
        found = check_folder(folder)
    assert set(found) == {*expected, *(folder / name for name in parts)}
    left_out = caplog.messages[-1].partition(": ")[2].split(", ")
    whole = (".git/", ".cache/", "trainer_state/", "checkpoint-10/", "__pycache__/")  # folders are named, not listed
    assert set(left_out) == {name.split("/")[0] if name.startswith(whole) else name for name in junk} | {"images"}


def test_a_tower_that_transformers_renames_while_saving_is_left_to_it(saved, tmp_path, caplog):
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    vision = dict(model_type="dinov2", image_size=28, patch_size=14, **sizes)
    text = HFCLIPConfig.from_pretrained(saved["vit"]).text_config
    shutil.copytree(saved["vit"], tmp_path, dirs_exist_ok=True)
    drop_weights(tmp_path)
    HFCLIPModel(HFCLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(tmp_path)
    check_folder(tmp_path)
    assert not caplog.messages
    tensors = load_file(tmp_path / "model.safetensors")
    for tower in ("text_model.", "vision_model."):
        others = {name: tensor for name, tensor in tensors.items() if not name.startswith(tower)}
        save_file(others, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=f"tensors missing, such as {tower}"):
            check_folder(tmp_path)


def test_says_that_a_tower_which_cannot_be_built_here_was_not_compared(folder, caplog):
    edit_json(folder / "config.json", vision_config={"model_type": "a_tower_of_tomorrow"})
    assert folder / "config.json" in check_folder(folder)
    assert "were not compared with the model, which cannot be built here" in caplog.text


def test_a_tower_of_its_own_needs_no_processor(saved, tmp_path):
    HFCLIPModel.from_pretrained(saved["vit"]).vision_model.save_pretrained(tmp_path)
    assert tmp_path / "model.safetensors" in check_folder(tmp_path)


def test_wrong_usage_ends_with_status_two(folder, server):
    drop_weights(folder)
    _, err = push(server, folder, status=2)
    assert "found no weights" in error_of(err) and server.requests == []
    _, err = push(server, folder, "--private", "--public", status=2)
    assert "not allowed with" in err


@pytest.mark.parametrize("revision", ["", "a b", "../x", "x/../y", "/x", "x/", "x.lock", "-x", "a//b", "a~1", "x\n"])
def test_rejects_a_revision_that_is_no_name_of_a_branch(folder, revision):
    with pytest.raises(ValueError, match="revision: found"):
        hub.push(folder, REPO, revision=revision, dry_run=True)


@pytest.mark.parametrize("revision", ["main", "step-500", "v1.0", "user/try_2", "refs/pr/1"])
def test_a_revision_may_be_any_name_of_a_branch(folder, revision, capsys):
    assert hub.push(folder, REPO, revision=revision, dry_run=True).endswith(f"/{REPO}/tree/{revision}")


def test_an_unusable_folder_or_revision_ends_with_status_two_before_any_request(folder, server):
    assert "revision: found ''" in error_of(push(server, folder, "--revision", "", status=2)[1])
    edit_json(folder / "config.json", projection_dim=24)
    _, err = push(server, folder, status=2, COMPARE="1")
    assert "2 tensors of another shape" in error_of(err) and server.requests == []


# ---------------------------------------------------------------------------------------------------------------------
# Model card
# ---------------------------------------------------------------------------------------------------------------------


def test_the_card_says_what_it_was_given_and_nothing_else():
    config = HFCLIPConfig.from_preset("ViT-B/32")
    bare = ModelCard(model_card(config, name="anna/clip-birds", provenance={}, results=[]))
    assert bare.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "zero-shot-image-classification",
        "tags": ["clip", "hfclip", "custom_code"],
    }
    assert "| Whole model | joint space of 512 dimensions | 151,277,313 |" in bare.text  # as OpenAI's ViT-B/32
    lacking = ModelCard(model_card(config, name=".", title="Birds", provenance={}, results=[], has_processor=False))
    assert "pipeline_tag" not in lacking.data.to_dict() and "pipeline(" not in lacking.text
    assert "# Birds" in lacking.text and 'name = "."  # this folder' in lacking.text
    assert "## Where" not in bare.text and "## Evaluation" not in bare.text

    result = EvalResult("zero-shot-image-classification", "cifar10", "CIFAR-10 | test", "accuracy", 0.875)
    provenance = {"source": "ViT-B-32.pt", "sha256": "40d3", "versions": {"torch": "2.13", "unknown": None}}
    card = ModelCard(
        model_card(
            config, name="anna/clip-birds", provenance=provenance, results=[result], license="mit", base_model="a/b"
        )
    )
    assert (card.data.license, card.data.base_model) == ("mit", "a/b")
    (found,) = card.data.eval_results
    assert (found.dataset_name, found.metric_type, found.metric_value) == ("CIFAR-10 | test", "accuracy", 0.875)
    assert "| versions.torch | 2.13 |" in card.text and "unknown" not in card.text
    assert "| CIFAR-10 \\| test | accuracy | 0.875 |" in card.text


@pytest.mark.parametrize("name", ["runs/clip/model", "."])
def test_the_snippets_of_a_card_get_the_name_of_the_repository(folder, server, name):
    config = HFCLIPConfig.from_pretrained(folder)
    (folder / "README.md").write_text(model_card(config, name=name, provenance={}, results=[]))
    push(server, folder)
    card = server.files(REPO)["README.md"].decode()
    assert card.count('name = "anna/clip-birds"  # this repository') == 2 and f'"{name}"' not in card
    assert card.count("  # this ") == 2 and f'name = "{name}"' in (folder / "README.md").read_text()  # its own stays
