"""Publishes a saved model folder to the Hugging Face Hub.

    folder -> check_folder (is it whole? what is left out?) -> blobs, content-addressed -> one commit -> URL

The large files travel first and change nothing that anybody can see. Then one commit puts all files in place, so a
reader finds the old model or the new one, never a mixture. A push that broke off is repeated by the same call: the Hub
has the blobs by their SHA-256 and does not ask for them again. Tokens are huggingface_hub's own business (`hf auth
login`, HF_TOKEN); no message of this file shows one.
"""

import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelInfo,
    RepoUrl,
    get_session,
    get_token,
)

# The base class of all that can go wrong with a request, in httpx or in httpx2: huggingface_hub knows which one it uses.
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from tqdm import tqdm

from ..configuration_hfclip import HFCLIPConfig
from ..errors import MASK, UsageError, redact
from .card import model_card, with_name
from .check import WEIGHT_FILE, check_folder, is_dual_encoder, one_line, read_json


logger = logging.getLogger(__name__)
T = TypeVar("T")
Contents = dict[str, Path | bytes]  # name in the repository -> what is sent

# Names that git takes; a name that it does not would be an HTTP error of any kind.
BRANCH = re.compile(r"(?!.*(\.\.|//|/\.|\.lock(/|$)))\w[\w./-]*(?<![./])", re.ASCII)
# Seconds between attempts, for the requests that huggingface_hub does not repeat itself.
WAITS = (1.0, 2.0, 4.0)
# Seconds without one byte from the Hub before a request counts as lost. huggingface_hub would wait for ever.
TIMEOUT = 120.0


class HubError(UsageError):
    """The Hub refused a push or could not be reached; the message says what to do."""

    exit_status = 1


def push(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    dry_run: bool = False,
    token: str | None = None,
) -> str:
    """Publishes a model folder as one commit and returns its URL. Prints what is sent, and what came of it.

    Large files go first; nothing is visible before the commit at the end. The same call continues a push that broke
    off. A new repository or branch is created. Weight files of an earlier model that the new one would not replace
    (`model.safetensors` when the new model is sharded, surplus shards) are deleted in the same commit; all other files
    of the repository stay. A folder without README.md gets a model card, unless the repository has one.

    Args:
        folder: as `save_pretrained` of model and processor wrote it.
        repo_id: `"user/name"`, or `"name"` for the token's own account.
        private: visibility of a new repository; None is the account's default. An existing repository must have the
            visibility that is asked for.
        revision: branch; None is `main`. A branch that does not exist starts from `main`.
        dry_run: only check the folder and print what would be sent, without network.
        token: None takes the one of `hf auth login` or HF_TOKEN.

    Raises:
        UsageError: the folder is no model that can be published (see `check_folder`), or `repo_id` or `revision` is
            malformed.
        HubError: the Hub refused, or was not reached. The branch is unchanged then.
    """
    folder = Path(folder)
    check_target(repo_id, revision)
    contents: Contents = {path.relative_to(folder).as_posix(): path for path in check_folder(folder)}
    branch, suffix = revision or "main", f"/tree/{revision}" if revision else ""
    if dry_run:
        _print_plan(f"Would send to {repo_id} ({branch})", _with_card(contents, folder, repo_id, has_card=False))
        address = f"{HfApi().endpoint}/{repo_id}{suffix}"
        print(f"Nothing was sent. It would be published at {address}")
        return address

    api = HfApi(token=token)
    with _as_hub_error("looking for the token", repo_id, token):
        secret = token or get_token()
    if not (secret and secret.isascii() and secret.isprintable()):  # else no request can carry it
        raise HubError("No usable token was found. Log in with `hf auth login`, or set HF_TOKEN, and push again.")
    with _request_timeout():
        url, info = _open_branch(api, repo_id, branch, private, secret)
        repo_id = url.repo_id
        contents = _with_card(contents, folder, repo_id, has_card="README.md" in _names(info))
        _print_plan(f"Sending to {url} ({branch})", contents)
        message = commit_message or f"Model of hfclip: {folder.resolve().name}"
        changed = _upload_and_commit(api, repo_id, branch, contents, info, message, secret)
    address = f"{url}{suffix}"
    print(f"Published: {address}" if changed else f"Nothing changed: {address} has all this already.", flush=True)
    return address


def check_target(repo_id: str, revision: str | None) -> None:
    """Raises UsageError unless these can be names of a repository and, if there is one, of a branch. No network."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UsageError(str(error)) from error
    if revision is not None and not BRANCH.fullmatch(revision):
        raise UsageError(
            f"revision: found {revision!r}, expected the name of a branch: letters, digits, '.', '_', '-' and '/'."
        )


def end_on_interrupt(message: str) -> None:
    """From now on Ctrl-C ends this process at once, with one line and status 130. For programs, before they push.

    A KeyboardInterrupt would wait for the threads that upload until their files are through.
    """

    def end(number, frame):
        sys.stderr.write(f"\n{message}\n")
        sys.stderr.flush()
        os._exit(130)

    signal.signal(signal.SIGINT, end)


def _upload_and_commit(
    api: HfApi, repo_id: str, branch: str, contents: Contents, info: ModelInfo, message: str, secret: str
) -> bool:
    """Whether the branch changed: it does not where it has all files already."""
    operations = _operations(contents, info)
    additions = [operation for operation in operations if isinstance(operation, CommitOperationAdd)]
    with _as_hub_error(f"uploading to {repo_id}", repo_id, secret):
        # Repeats failed requests itself. Not `upload_folder`: with Xet it makes several commits.
        api.preupload_lfs_files(repo_id, additions, revision=branch, free_memory=False)
    ignored = [addition.path_in_repo for addition in additions if getattr(addition, "_should_ignore", False)]
    if ignored:
        raise HubError(
            f"The .gitignore of {repo_id} leaves out {', '.join(ignored)}: the model would not be whole. Nothing was "
            "published. Delete .gitignore in the repository, or these lines of it, and push again."
        )
    attempts = iter([operations])

    def commit():
        # An answer that is lost may hide a commit that was made. Fresh operations compare each file with the branch:
        # none differs then, and no second commit follows. `parent_commit` refuses to build on anybody else's commit.
        current = next(attempts, None) or _operations(contents, _find_branch(api, repo_id, branch))
        return api.create_commit(repo_id, current, commit_message=message, revision=branch, parent_commit=info.sha)

    with _as_hub_error(f"committing to {repo_id}", repo_id, secret):
        return _retry(commit).oid != info.sha


def _open_branch(
    api: HfApi, repo_id: str, branch: str, private: bool | None, secret: str
) -> tuple[RepoUrl, ModelInfo]:
    """The repository and its branch, created where they are missing; refuses one of another visibility."""
    with _as_hub_error(f"creating the repository {repo_id}", repo_id, secret):
        url = _retry(lambda: api.create_repo(repo_id, private=private, exist_ok=True))
    with _as_hub_error(f"looking at {url.repo_id}", url.repo_id, secret):
        info = _retry(lambda: _find_branch(api, url.repo_id, branch))
    if private is not None and info.private != private:
        found, asked = ("private", "public") if info.private else ("public", "private")
        raise HubError(
            f"{url.repo_id} exists and is {found}, but {asked} was asked for. Nothing was sent. Change its visibility in "
            f"{url}/settings, or push to another name."
        )
    return url, info


def _find_branch(api: HfApi, repo_id: str, branch: str) -> ModelInfo:
    """The branch's head and files; creates the branch where it is missing."""
    try:
        return api.model_info(repo_id, revision=branch)
    except RevisionNotFoundError:
        api.create_branch(repo_id, branch=branch, exist_ok=True)
        return api.model_info(repo_id, revision=branch)


def _names(info: ModelInfo) -> set[str]:
    return {sibling.rfilename for sibling in info.siblings or ()}


def _operations(contents: Contents, info: ModelInfo) -> list[CommitOperationAdd | CommitOperationDelete]:
    """All of `contents`, and the end of another model's weight files, which from_pretrained would prefer or mix."""
    leftover = sorted(name for name in _names(info) - contents.keys() if WEIGHT_FILE.fullmatch(name))
    additions = [CommitOperationAdd(name, content) for name, content in contents.items()]
    return [*additions, *map(CommitOperationDelete, leftover)]


def _with_card(contents: Contents, folder: Path, repo_id: str, has_card: bool) -> Contents:
    """`contents` with a README.md whose snippets name the repository. A card of one's own is sent as it is."""
    if "README.md" in contents:
        card = with_name((folder / "README.md").read_text(encoding="utf-8"), repo_id)
    elif has_card or not is_dual_encoder(read_json(folder / "config.json")):
        return contents
    else:
        provenance = read_json(folder / "conversion.json") if "conversion.json" in contents else {}
        card = model_card(HFCLIPConfig.from_pretrained(folder), name=repo_id, provenance=provenance, results=[])
    return {**contents, "README.md": card.encode()}


def _print_plan(title: str, contents: Contents) -> None:
    sizes = {name: len(c) if isinstance(c, bytes) else c.stat().st_size for name, c in contents.items()}
    print(f"{title}:")
    width = max(map(len, sizes))
    for name, size in sizes.items():
        print(f"  {name:<{width}}  {tqdm.format_sizeof(size, 'B'):>9}")
    print(f"{len(sizes)} files, {tqdm.format_sizeof(sum(sizes.values()), 'B')}", flush=True)


# What can go wrong on the way

_CONTINUE = "Push again: what was uploaded is not sent again, and the branch is unchanged."
_CONFLICT = "Somebody else changed the branch meanwhile. Nothing of this push is visible. Look at that change, then push again."
_REMEDIES = {
    401: "The Hub does not accept the token. Log in with `hf auth login`, or set HF_TOKEN, with a token that may write.",
    403: "The token may not write to {repo_id}. Take one with write access (https://huggingface.co/settings/tokens), "
    "or another account's name.",
    404: "There is no such account, repository or branch, or the token may not see it. Check the name {repo_id}.",
    409: _CONFLICT,
    412: _CONFLICT,
    429: f"The Hub asks for fewer requests. Wait some minutes. {_CONTINUE}",
}


def _retry(call: Callable[[], T]) -> T:
    """The result of `call`, which is repeated after server errors (5xx) and lost connections."""
    for wait in WAITS:
        try:
            return call()
        except HTTPError as error:
            status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
            if status is not None and status < 500:
                raise
            logger.warning("%s. Trying again in %g s.", f"HTTP {status}" if status else "No answer", wait)
            time.sleep(wait)
    return call()


@contextmanager
def _request_timeout() -> Iterator[None]:
    """Makes requests of huggingface_hub fail after `TIMEOUT` seconds without a byte."""
    session = get_session()
    before, session.timeout = session.timeout, TIMEOUT
    try:
        yield
    finally:
        session.timeout = before


@contextmanager
def _as_hub_error(action: str, repo_id: str, secret: str | None) -> Iterator[None]:
    """Turns what huggingface_hub raises into a `HubError` with one clear message."""
    try:
        yield
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        text = _explain(error, repo_id)
        text = redact(text.replace(secret, MASK) if secret else text)
        # The original may hold the token (a header that is no legal HTTP is quoted in full), so it is not chained.
        raise HubError(f"{action[0].upper()}{action[1:]} failed. {text}") from None


def _explain(error: BaseException, repo_id: str) -> str:
    while isinstance(error, RuntimeError) and error.__cause__ is not None:  # wrapped by a thread that uploads
        error = error.__cause__
    if isinstance(error, HfHubHTTPError):
        status, said = error.response.status_code, one_line(error.server_message or "")
        remedy = _REMEDIES.get(status, _CONTINUE if status >= 500 else "").format(repo_id=repo_id)
        return f"HTTP {status}{f': {said}' if said else ''}. {remedy}".rstrip()
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set. Unset it and push again."
    text = f"{type(error).__name__}: {one_line(str(error))}"
    if isinstance(error, HTTPError):
        return f"The Hub did not answer ({text}). {_CONTINUE}"
    return f"{text}." if isinstance(error, ValueError) else f"{text}. {_CONTINUE}"
