"""Publishes a saved model folder to the Hugging Face Hub.

    folder -> check_folder (is it whole? what is left out?) -> blobs, content-addressed -> one commit -> URL

The large files travel first and change nothing that anybody can see. Then one commit puts all files in place, so a
reader finds the old model or the new one, never a mixture. A push that broke off is repeated by the same call: the Hub
has the blobs by their SHA-256 and does not ask for them again. Tokens are huggingface_hub's own business (`hf auth
login`, HF_TOKEN); no message of this file shows one.
"""

import json
import logging
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    get_session,
    get_token,
)

# The base class of all that can go wrong with a request, in httpx or in httpx2: huggingface_hub knows which one it uses.
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

from .model_card import model_card, renamed


if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)
T = TypeVar("T")

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
WEIGHT_FILE = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
PICKLED = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".distcp"}
# What is published beside the weights and the code; all else is left out, since a run's folder may hold anything.
PARTS = re.compile(
    r"(config|generation_config|processor_config|preprocessor_config|conversion|open_clip_config)\.json"
    r"|(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json|(merges|vocab)\.txt"
    r"|(tokenizer|spiece|sentencepiece|sentencepiece\.bpe)\.model"
    r"|\.gitattributes|(LICEN[CS]E|NOTICE)(\.md|\.txt|-[\w.-]+)?|[\w-][\w.-]*\.md"
    r"|onnx/[\w-][\w.-]*\.onnx(_data|\.data)?|((assets|figures|images)/)?[\w-][\w. -]*\.(png|jpe?g)"
)
FOLDERS = {"onnx", "assets", "figures", "images"}
# Names that git takes; a name that it does not would be an HTTP error of any kind.
BRANCH = re.compile(r"(?!.*(\.\.|//|/\.|\.lock(/|$)))\w[\w./-]*(?<![./])", re.ASCII)

# Seconds between attempts, for the requests that huggingface_hub does not repeat itself.
_WAITS = (1.0, 2.0, 4.0)
# Seconds without one byte from the Hub before a request counts as lost. huggingface_hub would wait for ever.
_SILENCE = 120.0


class HubError(RuntimeError):
    """The Hub refused a push or could not be reached; the message says what to do."""


# ---------------------------------------------------------------------------------------------------------------------
# Push
# ---------------------------------------------------------------------------------------------------------------------


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
        ValueError: the folder is no model that can be published (see `check_folder`), or `repo_id` or `revision` is
            malformed.
        HubError: the Hub refused, or was not reached. The branch is unchanged then.
    """
    folder = Path(folder)
    check_target(repo_id, revision)
    files = check_folder(folder)
    branch, message = revision or "main", commit_message or f"Model of hfclip: {folder.resolve().name}"
    contents: dict[str, Path | bytes] = {path.relative_to(folder).as_posix(): path for path in files}
    if dry_run:
        _print_plan(f"Would send to {repo_id} ({branch})", _with_card(contents, folder, repo_id, has_card=False))
        address = _url(HfApi().endpoint + "/" + repo_id, revision)
        print(f"Nothing was sent. It would be published at {address}")
        return address

    api = HfApi(token=token)
    with _explained("looking for the token", repo_id, token):
        secret = token or get_token()
    if not (secret and secret.isascii() and secret.isprintable()):  # else no request can carry it
        raise HubError("No usable token was found. Log in with `hf auth login`, or set HF_TOKEN, and push again.")
    with _limited_silence():
        with _explained(f"creating the repository {repo_id}", repo_id, secret):
            url = _patiently(lambda: api.create_repo(repo_id, private=private, exist_ok=True))
        repo_id = url.repo_id
        with _explained(f"looking at {repo_id}", repo_id, secret):
            info = _patiently(lambda: _find_branch(api, repo_id, branch))
        if private is not None and info.private != private:
            found, asked = ("private", "public") if info.private else ("public", "private")
            raise HubError(
                f"{repo_id} exists and is {found}, but {asked} was asked for. Nothing was sent. Change its visibility "
                f"in {url}/settings, or push to another name."
            )
        contents = _with_card(contents, folder, repo_id, has_card="README.md" in _names(info))
        _print_plan(f"Sending to {url} ({branch})", contents)
        changed = _upload_and_commit(api, repo_id, branch, contents, info, message, secret)
    address = _url(str(url), revision)
    print(f"Published: {address}" if changed else f"Nothing changed: {address} has all this already.", flush=True)
    return address


def check_target(repo_id: str, revision: str | None) -> None:
    """Raises ValueError unless these can be names of a repository and, if there is one, of a branch. No network."""
    validate_repo_id(repo_id)
    if revision is not None and not BRANCH.fullmatch(revision):
        raise ValueError(
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
    api: HfApi, repo_id: str, branch: str, contents: dict[str, Path | bytes], info: Any, message: str, secret: str
) -> bool:
    """Whether the branch changed: it does not where it has all files already."""
    operations = _additions(contents)
    with _explained(f"uploading to {repo_id}", repo_id, secret):
        # Repeats failed requests itself. Not `upload_folder`: with Xet it makes several commits.
        api.preupload_lfs_files(repo_id, operations, revision=branch, free_memory=False)
    ignored = [addition.path_in_repo for addition in operations if getattr(addition, "_should_ignore", False)]
    if ignored:
        raise HubError(
            f"The .gitignore of {repo_id} leaves out {', '.join(ignored)}: the model would not be whole. Nothing was "
            "published. Delete .gitignore in the repository, or these lines of it, and push again."
        )
    operations += _deletions(contents, info)
    attempts = iter([operations])

    def commit():
        # An answer that is lost may hide a commit that was made. Fresh operations compare each file with the branch:
        # none differs then, and no second commit follows. `parent_commit` refuses to build on anybody else's commit.
        current = next(attempts, None) or _additions(contents) + _deletions(
            contents, _find_branch(api, repo_id, branch)
        )
        return api.create_commit(repo_id, current, commit_message=message, revision=branch, parent_commit=info.sha)

    with _explained(f"committing to {repo_id}", repo_id, secret):
        return _patiently(commit).oid != info.sha


def _find_branch(api: HfApi, repo_id: str, branch: str) -> Any:
    """The branch's head and files, as huggingface_hub's `ModelInfo`; creates the branch where it is missing."""
    try:
        return api.model_info(repo_id, revision=branch)
    except RevisionNotFoundError:
        api.create_branch(repo_id, branch=branch, exist_ok=True)
        return api.model_info(repo_id, revision=branch)


def _names(info: Any) -> set[str]:
    return {sibling.rfilename for sibling in info.siblings or ()}


def _additions(contents: dict[str, Path | bytes]) -> list:
    return [CommitOperationAdd(name, content) for name, content in contents.items()]


def _deletions(contents: dict[str, Path | bytes], info: Any) -> list:
    """Weight files of the model that was there before. from_pretrained would prefer or mix them."""
    leftover = sorted(name for name in _names(info) - contents.keys() if WEIGHT_FILE.fullmatch(name))
    return [CommitOperationDelete(name) for name in leftover]


def _with_card(
    contents: dict[str, Path | bytes], folder: Path, repo_id: str, has_card: bool
) -> dict[str, Path | bytes]:
    """`contents` with a README.md whose snippets name the repository. A card of one's own is sent as it is."""
    if "README.md" in contents:
        card = (folder / "README.md").read_text(encoding="utf-8")
        return {**contents, "README.md": renamed(card, repo_id).encode()}
    if has_card or not _is_dual_encoder(_read_json(folder / "config.json")):
        return contents
    from .configuration_hfclip import HFCLIPConfig

    provenance = _read_json(folder / "conversion.json") if "conversion.json" in contents else {}
    card = model_card(HFCLIPConfig.from_pretrained(folder), name=repo_id, provenance=provenance, results=[])
    return {**contents, "README.md": card.encode()}


def _print_plan(title: str, contents: dict[str, Path | bytes]) -> None:
    sizes = {name: len(c) if isinstance(c, bytes) else c.stat().st_size for name, c in contents.items()}
    print(f"{title}:")
    width = max(map(len, sizes))
    for name, size in sizes.items():
        print(f"  {name:<{width}}  {_readable(size):>9}")
    print(f"{len(sizes)} files, {_readable(sum(sizes.values()))}", flush=True)


def _readable(size: int) -> str:
    power = min(int(math.log10(max(size, 1))) // 3, 3)
    return f"{size / 1000**power:.{1 if power else 0}f} {('B', 'kB', 'MB', 'GB')[power]}"


def _url(repository: str, revision: str | None) -> str:
    return repository if revision is None else f"{repository}/tree/{revision}"


# ---------------------------------------------------------------------------------------------------------------------
# What can go wrong on the way
# ---------------------------------------------------------------------------------------------------------------------

_CONTINUE = "Push again: what was uploaded is not sent again, and the branch is unchanged."
_REMEDIES = {
    401: "The Hub does not accept the token. Log in with `hf auth login`, or set HF_TOKEN, with a token that may write.",
    403: "The token may not write to {repo_id}. Take one with write access (https://huggingface.co/settings/tokens), "
    "or another account's name.",
    404: "There is no such account, repository or branch, or the token may not see it. Check the name {repo_id}.",
    409: "Somebody else changed the branch meanwhile. Nothing of this push is visible. Look at that change, then push "
    "again.",
    429: "The Hub asks for fewer requests. Wait some minutes. " + _CONTINUE,
}
_REMEDIES[412] = _REMEDIES[409]


def _patiently(call: Callable[[], T]) -> T:
    """The result of `call`, which is repeated after server errors (5xx) and lost connections."""
    for wait in _WAITS:
        try:
            return call()
        except HTTPError as error:
            status = _status(error)
            if status is not None and status < 500:
                raise
            logger.warning("%s. Trying again in %g s.", f"HTTP {status}" if status else "No answer", wait)
            time.sleep(wait)
    return call()


def _status(error: BaseException) -> int | None:
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


@contextmanager
def _limited_silence() -> Iterator[None]:
    """Requests of huggingface_hub fail after `_SILENCE` seconds without a byte."""
    session = get_session()
    before, session.timeout = session.timeout, _SILENCE
    try:
        yield
    finally:
        session.timeout = before


@contextmanager
def _explained(action: str, repo_id: str, secret: str | None) -> Iterator[None]:
    """Turns what huggingface_hub raises into a `HubError` with one clear message."""
    try:
        yield
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        # The original may hold the token (a header that is no legal HTTP is quoted in full), so it is not chained.
        text = _redacted(_explain(error, repo_id), secret)
        raise HubError(f"{action[0].upper()}{action[1:]} failed. {text}") from None


def _explain(error: BaseException, repo_id: str) -> str:
    while isinstance(error, RuntimeError) and error.__cause__ is not None:  # wrapped by a thread that uploads
        error = error.__cause__
    if isinstance(error, HfHubHTTPError):
        status, said = error.response.status_code, _one_line(error.server_message or "")
        remedy = _REMEDIES.get(status, _CONTINUE if status >= 500 else "").format(repo_id=repo_id)
        return f"HTTP {status}{f': {said}' if said else ''}. {remedy}".rstrip()
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set. Unset it and push again."
    text = f"{type(error).__name__}: {_one_line(str(error))}."
    if isinstance(error, HTTPError):
        return f"The Hub did not answer ({text[:-1]}). {_CONTINUE}"
    return text if isinstance(error, ValueError) else f"{text} {_CONTINUE}"


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300].rstrip(".")


def _redacted(text: str, secret: str | None) -> str:
    if secret:
        text = text.replace(secret, "***")
    return re.sub(r"(Bearer\s+)[^\s'\"]+|\bhf_\w{6,}", lambda match: (match[1] or "") + "***", text)


# ---------------------------------------------------------------------------------------------------------------------
# Is the folder a whole model?
# ---------------------------------------------------------------------------------------------------------------------


def check_folder(folder: str | os.PathLike) -> list[Path]:
    """The files of `folder` that are sent: the small ones by name, then the weights. Logs what is left out.

    Sent are the weights that the model reads, the code that travels with it, and what a model's folder is known to
    hold (`PARTS`). Links that lead out of the folder are refused: what they show may not be meant to be seen.

    Raises:
        ValueError: the folder is no whole hfclip model: no or unreadable config.json, another `model_type`, weights
            missing, truncated or pickled only, shards that the index does not match, tensors that the model does not
            have or other ones than it has, code of `auto_map` missing, a dual encoder without tokenizer or processor,
            links that lead out of the folder, an unreadable README.md.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder}: found no config.json, expected a folder with a saved model. Give the folder that "
            "`save_pretrained` wrote."
        )
    config = _read_json(folder / "config.json")
    model_type = str(config.get("model_type"))
    if not model_type.startswith("hfclip"):
        raise ValueError(
            f"{folder}: found a model of type {model_type!r}, expected one of hfclip. Open it with "
            "`HFCLIPModel.from_pretrained` and save model and processor to a new folder."
        )
    shapes = _check_weights(folder)
    code = _check_code(folder, config)
    if _is_dual_encoder(config):
        _check_processor(folder)
    if (folder / "README.md").is_file():
        _check_card(folder / "README.md")
    _check_tensors(folder, config, {name: shape for file in shapes.values() for name, shape in file.items()})
    weights = shapes.keys() | ({INDEX} if WEIGHTS not in shapes else set())
    files, left_out = _sort_out(folder, weights | code)
    if left_out:
        logger.warning("Left out, as no part of the model: %s", ", ".join(left_out))
    return sorted(files, key=lambda path: (path.name in weights, path.relative_to(folder).as_posix()))


def _is_dual_encoder(config: dict) -> bool:
    return config.get("model_type") == "hfclip" and config.get("architectures") in (None, ["HFCLIPModel"])


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: found no readable JSON ({error}). Save the model again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: found a {type(content).__name__}, expected a JSON object. Save the model again.")
    return content


def _check_weights(folder: Path) -> dict[str, dict[str, list[int]]]:
    """The weight files, each with the shapes of the tensors that are read from it."""
    whole, index = folder / WEIGHTS, folder / INDEX
    if whole.is_file() and index.is_file():
        raise ValueError(
            f"{folder}: found {WEIGHTS} and {INDEX}, expected one of them. Delete the one of an earlier save: "
            "from_pretrained would read the first."
        )
    if whole.is_file():
        return {WEIGHTS: _shapes(whole)}
    if not index.is_file():
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
        raise ValueError(
            f"{folder}: found {'only pickled weights, ' + ', '.join(pickled) if pickled else 'no weights'}, expected "
            f"{WEIGHTS} (or {INDEX} and its shards). Open the model and save it with `save_pretrained`."
        )
    shard_of = _read_json(index).get("weight_map")
    named = list(shard_of.values()) if isinstance(shard_of, dict) else [shard_of]
    if strange := [name for name in named if not (isinstance(name, str) and SHARD.fullmatch(name))]:
        raise ValueError(
            f"{index}: found {str(strange[0])[:80]!r} in weight_map, expected a shard such as "
            "'model-00001-of-00002.safetensors' for each tensor. Save the model again."
        )
    shards = sorted(set(named))
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing or not shards:
        raise ValueError(
            f"{index}: names {len(shards)} shards, found without {', '.join(missing) or 'any of them'}. Copy the "
            "missing files, or save the model again."
        )
    shapes = {}
    for shard in shards:
        found, expected = _shapes(folder / shard), {name for name, file in shard_of.items() if file == shard}
        if lacking := expected - found.keys():
            raise ValueError(
                f"{folder / shard}: lacks {min(lacking)} and {len(lacking) - 1} more tensors that {INDEX} expects "
                "there. Index and shards are of different saves: save the model again."
            )
        shapes[shard] = {name: found[name] for name in expected}
    return shapes


def _shapes(path: Path) -> dict[str, list[int]]:
    """Of all tensors in a safetensors file; opening compares the file's length with its header."""
    try:
        with safe_open(path, framework="np") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path}: found {path.stat().st_size} bytes that are no whole safetensors file ({error}). Copy it again, "
            "or save the model again."
        ) from error


def _check_tensors(folder: Path, config: dict, found: dict[str, list[int]]) -> None:
    """The tensors are those of the config's model. Towers of transformers are left to it: it renames while saving."""
    from .configuration_hfclip import TOWER_CONFIGS

    towers = {tower: config.get(f"{tower}_config") for tower in ("vision", "text")}
    types = {tower: str(part.get("model_type", "")) for tower, part in towers.items() if isinstance(part, dict)}
    foreign = tuple(f"{tower}_model." for tower, kind in types.items() if kind and kind not in TOWER_CONFIGS)
    try:
        model = _on_meta(folder, config)
    except Exception as error:  # a damaged config makes transformers raise anything
        if not foreign:
            raise ValueError(
                f"{folder / 'config.json'}: found no config of a model ({_one_line(str(error))})."
            ) from error
        reason = _one_line(str(error))
        logger.warning("The tensors were not compared with the model, which cannot be built here (%s).", reason)
        return
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    ignored = type(model)._keys_to_ignore_on_load_unexpected or ()  # the model's own has its towers' added
    missing = [tower for tower in foreign if not any(name.startswith(tower) for name in found)]
    missing += sorted(name for name in expected.keys() - found.keys() if not name.startswith(foreign))
    surplus = sorted(name for name in found.keys() - expected.keys() if not name.startswith(foreign))
    surplus = [name for name in surplus if not any(re.search(pattern, name) for pattern in ignored)]
    common = sorted(name for name in expected.keys() & found.keys() if not name.startswith(foreign))
    differing = [f"{name} {found[name]} for {expected[name]}" for name in common if found[name] != expected[name]]
    problems = (("missing", missing), ("left over", surplus), ("of another shape", differing))
    if said := [f"{len(names)} tensors {what}, such as {names[0]}" for what, names in problems if names]:
        raise ValueError(
            f"{folder}: found weights that are not those of {type(model).__name__} in config.json: "
            f"{'; '.join(said)}. Save the model again."
        )


def _on_meta(folder: Path, config: dict) -> "PreTrainedModel":
    """The config's model without weights."""
    import torch

    from . import modeling_hfclip as modeling

    default = {"hfclip": modeling.HFCLIPModel, **modeling.TOWERS}[config["model_type"]].__name__
    (architecture,) = config.get("architectures") or [default]
    if (model_class := getattr(modeling, architecture, None)) is None:
        raise ValueError(f"architectures: {architecture!r} is no class of hfclip")
    with torch.device("meta"):
        return model_class(model_class.config_class.from_pretrained(folder))


def _check_code(folder: Path, config: dict) -> set[str]:
    """The files of code that `auto_map` names, and what they import, all in the folder."""
    names = list(config["auto_map"]) if isinstance(config.get("auto_map"), dict) else []
    if "AutoConfig" not in names or not any(name.startswith("AutoModel") for name in names):
        raise ValueError(
            f"{folder / 'config.json'}: found auto_map with {', '.join(names) or 'nothing'}, expected AutoConfig and "
            "AutoModel: without them nobody can open the model. Save it with hfclip's `save_pretrained`."
        )
    configs = [config, *(_read_json(path) for path in folder.glob("*processor_config.json"))]
    if (folder / "tokenizer_config.json").is_file():
        configs.append(_read_json(folder / "tokenizer_config.json"))
    waiting = {reference for part in configs for reference in _references(part)}
    if foreign := sorted(reference for reference in waiting if not re.fullmatch(r"\w+\.\w+", reference)):
        raise ValueError(
            f"{folder}: found {foreign[0]!r} in auto_map, expected code in this folder, as `module.Class`. Open the "
            "model with hfclip and save it again."
        )
    modules, seen = {reference.split(".")[0] for reference in waiting}, set()
    while modules:
        name = modules.pop()
        file = folder / f"{name}.py"
        if not file.is_file():
            raise ValueError(
                f"{folder}: found no {file.name}, which auto_map or its code needs. Save the model again."
            )
        seen.add(name)
        try:
            source = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: found no text in UTF-8 ({error}). Save the model again.") from error
        modules |= set(re.findall(r"^\s*from \.(\w+) import", source, flags=re.MULTILINE)) - seen
    return {f"{name}.py" for name in seen}


def _references(part: Any) -> Iterator[str]:
    """All `module.Class` of all auto_maps in a config, nested ones included."""
    for key, value in part.items() if isinstance(part, dict) else ():
        if key == "auto_map":
            for reference in value.values() if isinstance(value, dict) else [value]:
                yield from map(str, filter(None, reference if isinstance(reference, list) else [reference]))
        else:
            yield from _references(value)


def _check_processor(folder: Path) -> None:
    """Tokenizer and processor are there, and AutoProcessor finds their code. Without it, it returns a tokenizer."""
    processors = [path for path in ("processor_config.json", "preprocessor_config.json") if (folder / path).is_file()]
    missing = [name for name in ("tokenizer.json", "tokenizer_config.json") if not (folder / name).is_file()]
    missing += [] if processors else ["processor_config.json"]
    if missing:
        raise ValueError(
            f"{folder}: found no {', '.join(missing)}, expected tokenizer and image processor beside a dual encoder. "
            "Save them there: `processor.save_pretrained(folder)`."
        )
    text = "".join((folder / name).read_text(encoding="utf-8") for name in (*processors, "tokenizer_config.json"))
    classes = {"AutoProcessor": "processor_class", "AutoTokenizer": "tokenizer_class"}
    classes |= {"AutoImageProcessor": "image_processor_type"}
    for auto, field in classes.items():
        if re.search(rf'"{field}":\s*"HFCLIP', text) and f'"{auto}"' not in text:
            raise ValueError(
                f"{folder}: found a {field} of hfclip without {auto} in its auto_map: it would open as something "
                "else. Save the processor again with hfclip's `save_pretrained`."
            )


def _check_card(path: Path) -> None:
    try:
        ModelCard(path.read_text(encoding="utf-8"))
    except Exception as error:  # PyYAML's errors have no base class that huggingface_hub names
        raise ValueError(f"{path}: its metadata, between the lines of `---`, cannot be read ({error}).") from error


def _sort_out(folder: Path, own: set[str]) -> tuple[list[Path], list[str]]:
    """The files to send, `own` and `PARTS`, and the names of all else. Refuses links that lead out."""
    folders = {folder / name for name in FOLDERS if (folder / name).is_dir() and not (folder / name).is_symlink()}
    paths = {*folder.iterdir(), *(path for inner in folders for path in inner.iterdir())} - folders
    files, left_out = [], []
    for path in sorted(paths):
        name = path.relative_to(folder).as_posix()
        part = name in own or PARTS.fullmatch(name)
        if part and path.is_symlink() and not (path.exists() and path.resolve().is_relative_to(folder.resolve())):
            raise ValueError(
                f"{path}: found a link to {os.readlink(path)}, expected files of {folder} only. Copy the folder with "
                "its links followed (`cp -rL`), or delete the link."
            )
        if part and path.is_file():
            files.append(path)
        else:
            left_out.append(name)
    return files, left_out
