"""Whether a folder holds a whole model, and which of its files are published."""

import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from transformers import PreTrainedModel

from .. import modeling_hfclip_heads as heads
from ..configuration_hfclip import TOWER_CONFIGS
from ..errors import UsageError
from ..foreign.checkpoints import open_checkpoint
from ..modeling_hfclip import HFCLIPModel
from ..towers_hfclip import TOWERS


logger = logging.getLogger(__name__)
Shapes = dict[str, list[int]]  # of tensors, by name

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
WEIGHT_FILE = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
PICKLED = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".distcp"}
# What is published beside the weights and the code; all else is left out, since a run's folder may hold anything.
PUBLISHED_FILES = re.compile(
    r"(config|generation_config|processor_config|preprocessor_config|conversion|open_clip_config)\.json"
    r"|(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json|(merges|vocab)\.txt"
    r"|(tokenizer|spiece|sentencepiece|sentencepiece\.bpe)\.model"
    r"|\.gitattributes|(LICEN[CS]E|NOTICE)(\.md|\.txt|-[\w.-]+)?|[\w-][\w.-]*\.md"
    r"|onnx/[\w-][\w.-]*\.onnx(_data|\.data)?|((assets|figures|images)/)?[\w-][\w. -]*\.(png|jpe?g)"
)
PUBLISHED_FOLDERS = ("onnx", "assets", "figures", "images")


def check_folder(folder: str | os.PathLike) -> list[Path]:
    """The files of `folder` that are sent: the small ones by name, then the weights. Logs what is left out.

    Sent are the weights that the model reads, the code that travels with it, and what a model's folder is known to
    hold (`PUBLISHED_FILES`). Links that lead out of the folder are refused: what they show may not be meant to be seen.

    Raises:
        UsageError: the folder is no whole hfclip model: no or unreadable config.json, another `model_type`, weights
            missing, truncated or pickled only, shards that the index does not match, tensors that the model does not
            have or other ones than it has, code of `auto_map` missing, a dual encoder without tokenizer or processor,
            links that lead out of the folder, an unreadable README.md.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise UsageError(
            f"{folder}: found no config.json, expected a folder with a saved model. Give the folder that "
            "`save_pretrained` wrote."
        )
    config = read_json(folder / "config.json")
    model_type = str(config.get("model_type"))
    if not model_type.startswith("hfclip"):
        raise UsageError(
            f"{folder}: found a model of type {model_type!r}, expected one of hfclip. Open it with "
            "`HFCLIPModel.from_pretrained` and save model and processor to a new folder."
        )
    weights, shapes = _read_weights(folder)
    code = _check_code(folder, config)
    if is_dual_encoder(config):
        _check_processor(folder)
    if (folder / "README.md").is_file():
        _check_card(folder / "README.md")
    _check_tensors(folder, config, shapes)
    files, left_out = _select_files(folder, weights | code)
    if left_out:
        logger.warning("Left out, as no part of the model: %s", ", ".join(left_out))
    return sorted(files, key=lambda path: (path.name in weights, path.relative_to(folder).as_posix()))


def is_dual_encoder(config: dict) -> bool:
    return config.get("model_type") == "hfclip" and config.get("architectures") in (None, ["HFCLIPModel"])


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; UsageError for no such file, no JSON, or no object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: found no readable JSON file ({error}).") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path}: found a {type(content).__name__}, expected an object of settings.")
    return content


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: found no text in UTF-8 ({error}). Save the model again.") from error


def one_line(text: str) -> str:
    return " ".join(text.split())[:300].rstrip(".")


# Weights


def _read_weights(folder: Path) -> tuple[set[str], Shapes]:
    """The names of the weight files, and the shapes of the tensors in them."""
    whole, index = folder / WEIGHTS, folder / INDEX
    if whole.is_file() and index.is_file():
        raise UsageError(
            f"{folder}: found {WEIGHTS} and {INDEX}, expected one of them. Delete the one of an earlier save: "
            "from_pretrained would read the first."
        )
    if not (whole.is_file() or index.is_file()):
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
        raise UsageError(
            f"{folder}: found {'only pickled weights, ' + ', '.join(pickled) if pickled else 'no weights'}, expected "
            f"{WEIGHTS} (or {INDEX} and its shards). Open the model and save it with `save_pretrained`."
        )
    checkpoint = open_checkpoint(folder, (WEIGHTS, INDEX))
    files = {checkpoint.path.name, *(path.name for path in checkpoint.files)}
    return files, {name: list(checkpoint.shape(name)) for name in checkpoint}


def _check_tensors(folder: Path, config: dict, found: Shapes) -> None:
    """The tensors are those of the config's model. Towers of transformers are left to it: it renames while saving."""
    towers = [(name, config.get(f"{name}_config")) for name in ("vision", "text")]
    kinds = {name: part["model_type"] for name, part in towers if isinstance(part, dict) and part.get("model_type")}
    foreign = tuple(f"{name}_model." for name, kind in kinds.items() if kind not in TOWER_CONFIGS)
    try:
        model = _build_on_meta(folder, config)
    except Exception as error:  # a damaged config makes transformers raise anything
        reason = one_line(str(error))
        if not foreign:
            raise UsageError(f"{folder / 'config.json'}: found no config of a model ({reason}).") from error
        logger.warning("The tensors were not compared with the model, which cannot be built here (%s).", reason)
        return
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    own = {name: shape for name, shape in expected.items() if not name.startswith(foreign)}
    ignored = type(model)._keys_to_ignore_on_load_unexpected or ()  # the model's own has its towers' added
    ours = {name: shape for name, shape in found.items() if not name.startswith(foreign)}
    ours = {n: s for n, s in ours.items() if n in own or not any(re.search(pattern, n) for pattern in ignored)}
    own |= {tower: [] for tower in foreign if not any(name.startswith(tower) for name in found)}
    if said := mismatches(ours, own):
        raise UsageError(
            f"{folder}: found weights that are not those of {type(model).__name__} in config.json: "
            f"{'; '.join(said)}. Save the model again."
        )


def mismatches(found: Shapes, expected: Shapes) -> list[str]:
    """How the tensors of a file differ from those of a model, by names and shapes."""
    common = sorted(found.keys() & expected.keys())
    kinds = {
        "missing": sorted(expected.keys() - found.keys()),
        "left over": sorted(found.keys() - expected.keys()),
        "of another shape": [f"{n} {found[n]} for {expected[n]}" for n in common if found[n] != expected[n]],
    }
    return [f"{len(names)} tensors {kind}, such as {names[0]}" for kind, names in kinds.items() if names]


def _build_on_meta(folder: Path, config: dict) -> PreTrainedModel:
    """The config's model without weights."""
    whole = {"hfclip": HFCLIPModel, **TOWERS}
    (architecture,) = config.get("architectures") or [whole[config["model_type"]].__name__]
    known = {model.__name__: model for model in whole.values()} | vars(heads)
    if (model_class := known.get(architecture)) is None:
        raise UsageError(f"architectures: {architecture!r} is no class of hfclip")
    with torch.device("meta"):
        return model_class(model_class.config_class.from_pretrained(folder))


# What lies beside them


def _check_code(folder: Path, config: dict) -> set[str]:
    """The files of code that `auto_map` names, and what they import, all in the folder."""
    names = list(config["auto_map"]) if isinstance(config.get("auto_map"), dict) else []
    if "AutoConfig" not in names or not any(name.startswith("AutoModel") for name in names):
        raise UsageError(
            f"{folder / 'config.json'}: found auto_map with {', '.join(names) or 'nothing'}, expected AutoConfig and "
            "AutoModel: without them nobody can open the model. Save it with hfclip's `save_pretrained`."
        )
    files = [*folder.glob("*processor_config.json"), *folder.glob("tokenizer_config.json")]
    references = {reference for part in (config, *map(read_json, files)) for reference in _references(part)}
    if foreign := sorted(reference for reference in references if not re.fullmatch(r"\w+\.\w+", reference)):
        raise UsageError(
            f"{folder}: found {foreign[0]!r} in auto_map, expected code in this folder, as `module.Class`. Open the "
            "model with hfclip and save it again."
        )
    modules, seen = {reference.split(".")[0] for reference in references}, set()
    while modules:
        name = modules.pop()
        seen.add(name)
        file = folder / f"{name}.py"
        if not file.is_file():
            raise UsageError(
                f"{folder}: found no {file.name}, which auto_map or its code needs. Save the model again."
            )
        modules |= set(re.findall(r"^\s*from \.(\w+) import", _read_text(file), flags=re.MULTILINE)) - seen
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
        raise UsageError(
            f"{folder}: found no {', '.join(missing)}, expected tokenizer and image processor beside a dual encoder. "
            "Save them there: `processor.save_pretrained(folder)`."
        )
    text = "".join(_read_text(folder / name) for name in (*processors, "tokenizer_config.json"))
    classes = {"AutoProcessor": "processor_class", "AutoTokenizer": "tokenizer_class"}
    classes |= {"AutoImageProcessor": "image_processor_type"}
    for auto, field in classes.items():
        if re.search(rf'"{field}":\s*"HFCLIP', text) and f'"{auto}"' not in text:
            raise UsageError(
                f"{folder}: found a {field} of hfclip without {auto} in its auto_map: it would open as something "
                "else. Save the processor again with hfclip's `save_pretrained`."
            )


def _check_card(path: Path) -> None:
    try:
        ModelCard(_read_text(path))
    except Exception as error:  # PyYAML's errors have no base class that huggingface_hub names
        raise UsageError(f"{path}: its metadata, between the lines of `---`, cannot be read ({error}).") from error


def _select_files(folder: Path, own: set[str]) -> tuple[list[Path], list[str]]:
    """The files to send, `own` and `PUBLISHED_FILES`, and the names of all else. Refuses links that lead out."""
    inner = {path for name in PUBLISHED_FOLDERS if (path := folder / name).is_dir() and not path.is_symlink()}
    paths = {*folder.iterdir(), *(path for part in inner for path in part.iterdir())} - inner
    files, left_out = [], []
    for path in sorted(paths):
        name = path.relative_to(folder).as_posix()
        is_published = name in own or PUBLISHED_FILES.fullmatch(name)
        is_inside = path.exists() and path.resolve().is_relative_to(folder.resolve())
        if is_published and path.is_symlink() and not is_inside:
            raise UsageError(
                f"{path}: found a link to {os.readlink(path)}, expected files of {folder} only. Copy the folder with "
                "its links followed (`cp -rL`), or delete the link."
            )
        if is_published and path.is_file():
            files.append(path)
        else:
            left_out.append(name)
    return files, left_out
