"""The command line of the trainer: a YAML file, flags that override it, and what is asked of this start alone.

`parse_arguments` turns argv into the `Config` of a run and the `Command`, whose flags no file keeps.
"""

import argparse
import dataclasses
import functools
import math
import os
import re
import shlex
import typing
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from hfclip_errors import UsageError

from .config import CONFIG_FILE, SECTIONS, Config, as_text
from .launcher import LAUNCH_FOLDER, prefix
from .removed import FLAGS, answer, translate
from .typed import describe, field_docstrings, nearest, require


CONFIG_FOLDER = Path(__file__).parent / "configs"
QUICKSTART = "quickstart"
# Flags that say what is trained, or on what: a run that is not the quickstart any more.
NAMES_A_RUN = ("data.train", "model.preset", "model.config", "model.checkpoint")


class Command(NamedTuple):
    """What is asked of this start alone."""

    resume: str | None = None
    """"auto", a checkpoint folder, or None for a new run."""
    stop_after: float | None = None
    """Minutes."""
    profile: int = 0
    """Steps."""


def parse_arguments(argv: list[str]) -> tuple[Config, Command]:
    """Returns the run that the command line asks for, and what it asks of this start alone.

    Raises:
        UsageError: for whatever is wrong with either.
    """
    arguments, unknown = build_parser().parse_known_args(argv)
    if unknown:
        flag = unknown[0].split("=")[0]
        raise UsageError(
            answer(flag.lstrip("-"))
            or f"Unknown argument {flag!r}.{nearest(flag, [f'--{name}' for name in _settings()])}"
        )
    for name in ("config", "resume"):
        if getattr(arguments, name) == "":
            raise UsageError(f"--{name}: found an empty word, expected a path. Is a variable of the shell not set?")
    values = _read_recipe(arguments)
    earlier = values.get("run") if isinstance(values.get("run"), dict) else {}
    values = translate(values)
    for name, (hint, _) in _settings().items():
        text = getattr(arguments, name)
        if text is not None:
            section, key = name.split(".")
            given = values.get(section) or {}
            require(isinstance(given, dict), section, given, "a mapping of settings")
            values[section] = given | {key: _from_command_line(text, hint, name)}
    config = Config.from_dict(values)
    _check_credentials(config)
    minutes, steps = (_number(arguments, name, earlier.get(name)) for name in ("stop_after", "profile"))
    return config, Command(arguments.resume and os.path.expanduser(arguments.resume), minutes, int(steps or 0))


def _read_recipe(arguments: argparse.Namespace) -> dict:
    """Returns what the file says; that of a run's folder goes on there."""
    is_named = any(getattr(arguments, name) is not None for name in NAMES_A_RUN)
    recipe = arguments.config or (None if is_named else QUICKSTART)
    if not recipe:
        return {}
    values = load_yaml(recipe)
    folder = run_folder_of(recipe)
    if folder is not None and isinstance(values.get("run") or {}, dict):
        values["run"] = {**(values.get("run") or {}), "output_dir": str(folder)}
    return values


def _number(arguments: argparse.Namespace, name: str, earlier: Any) -> float | None:
    """The number of a flag, or that which a file of an earlier version has."""
    found = getattr(arguments, name)
    value, flag = earlier if found is None else found, FLAGS[f"run.{name}"]
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    good = value is None or is_number and 0 <= value < math.inf and (name == "profile" or value > 0)
    require(good, flag, value, "steps, 0 or more" if name == "profile" else "minutes above 0")
    return value


def _check_credentials(config: Config) -> None:
    """Raises UsageError for a URL out of a file of a run, where its credentials are masked."""
    for name, value in config.masked().items():
        if value == as_text(config.value(name)):
            raise UsageError(
                f"{name}: {value!r} has lost its credentials, which no file of a run keeps. Give it again on the "
                f"command line: `--{name} URL`."
            )


def run_folder_of(config_file: str) -> Path | None:
    """The folder in which a saved config.yaml lies beside what a run has left there; None for any other file."""
    path = Path(config_file).expanduser()
    is_of_run = any(path.parent.glob("checkpoint-*")) or (path.parent / "metrics.jsonl").exists()
    return path.parent if path.name == CONFIG_FILE and path.is_file() and is_of_run else None


class _EachKeyOnce(yaml.SafeLoader):
    """Refuses a key that is given twice in a mapping: YAML would drop the first."""

    def compose_mapping_node(self, anchor):
        node, lines = super().compose_mapping_node(anchor), {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # which yaml refuses itself
            if (before := lines.setdefault(key.value, key.start_mark)) is not key.start_mark:
                place = f"lines {before.line + 1} and {key.start_mark.line + 1}"
                raise yaml.YAMLError(f"{key.value!r} is given twice, in {place}. Join them into one.")
        return node


def load_yaml(name: str) -> dict:
    """Reads a config file, given as a path or as the name of a recipe in `training/configs`."""
    path = Path(name).expanduser()
    if not path.is_file():
        path = CONFIG_FOLDER / f"{name}.yaml"
    if not path.is_file():
        recipes = ", ".join(sorted(p.stem for p in CONFIG_FOLDER.glob("*.yaml")))
        raise UsageError(f"--config: found no file {name!r}, expected a YAML file or one of the recipes: {recipes}.")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _EachKeyOnce)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"--config: {path} is not a YAML file: {error}") from error
    require(isinstance(values or {}, dict), f"--config {path}", values, "a mapping of sections")
    return values or {}


class ArgumentParser(argparse.ArgumentParser):
    """Tells mistakes as UsageError."""

    def error(self, message):
        raise UsageError(f"{message[:1].upper()}{message[1:]}. `--help` lists all arguments.")


def build_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog=shlex.join(prefix()),
        usage="%(prog)s [--config FILE] [--resume WHERE] [--section.setting VALUE ...]",
        description="Trains a CLIP model. Without arguments: a small one on built-in images, minutes on a CPU.",
        epilog="Paths: `~` is the home folder, and relative paths are taken from where the command is run. The config.yaml "
        "of a run's folder has them from the root, and goes on in the folder where it lies. Credentials in URLs are "
        "never written: give such a URL again with --resume. Remote data are kept in HFCLIP_CACHE (default: "
        "~/.cache/hfclip). Several processes: `accelerate launch`, or launcher options before `--` "
        f"in `hfclip train`; configurations for it: {LAUNCH_FOLDER}.",
        allow_abbrev=False,
        formatter_class=functools.partial(argparse.HelpFormatter, max_help_position=6),
    )
    add = parser.add_argument
    recipe = (
        f"a YAML file, or one of the recipes in {CONFIG_FOLDER}; the arguments below override it. Default: quickstart, if none "
        f"of them names data or a model ({', '.join('--' + name for name in NAMES_A_RUN)}); else no recipe, and what "
        "is not given has the default that is shown below"
    )
    add("--config", metavar="FILE", help=recipe)
    resume = (
        '"auto": the newest whole checkpoint of the run folder; where there is none, the run starts anew and says so. '
        "Or a checkpoint folder"
    )
    add("--resume", metavar="WHERE", help=resume)
    stop = "the run saves and ends with status 0 after this time, to be resumed: for jobs with a time limit"
    add("--stop-after", type=float, metavar="MINUTES", help=stop)
    profile = "that are traced, after three to warm up, into profile/ of the run folder"
    add("--profile", type=int, metavar="STEPS", help=profile)
    groups = {name: parser.add_argument_group(name, section.__doc__) for name, section in SECTIONS.items()}
    for name, (hint, text) in _settings().items():
        options = {"nargs": "?", "const": "true"} if hint is bool else {}
        groups[name.split(".")[0]].add_argument(f"--{name}", dest=name, metavar=_metavar(hint), help=text, **options)
    return parser


def _metavar(hint: Any) -> str:
    kind, parts = typing.get_origin(hint), typing.get_args(hint)
    if kind is Literal:
        return "{" + ",".join(parts) + "}"
    if kind is list and typing.get_origin(parts[0]) is Literal:
        return _metavar(parts[0])
    return describe(hint).upper().removesuffix(" OR NULL")


def _settings() -> dict[str, tuple[Any, str]]:
    """`section.key` -> (type, help with the default). The help is the docstring under the field."""
    settings = {}
    for name, section in SECTIONS.items():
        hints, texts = typing.get_type_hints(section), field_docstrings(section)
        for f in dataclasses.fields(section):
            default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
            shown = "null" if default is None else str(default).lower() if isinstance(default, bool) else default
            settings[f"{name}.{f.name}"] = (hints[f.name], f"{texts[f.name]} (default: {shown})".replace("%", "%%"))
    return settings


def _from_command_line(text: str, hint: Any, name: str) -> Any:
    """Text of an argument -> the value that YAML would give; words stay text for settings that take text."""
    kinds = {typing.get_origin(part) or part for part in (hint, *typing.get_args(hint))}
    is_mapping, is_list = dict in kinds and re.fullmatch(r"\{.*\}", text, re.S), list in kinds and text[:1] == "["
    if kinds & {str, list} and text != "null" and not (is_mapping or is_list):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{name}: found {text!r}, which is not a YAML value: {error}") from error
