"""Measures what a model can do, on any data, and keeps the results.

    hfclip evaluate zero-shot --model FOLDER --data cifar10/test
    hfclip evaluate retrieval --model FOLDER OTHER --data photos/ --out results --json
    hfclip evaluate zero-shot --model FOLDER --data food101 pets --data-root /data --expect ViT-B/32
    hfclip evaluate suite.yaml --out results
    hfclip evaluate --list                        # tasks and data sets that have a name
    hfclip evaluate TASK --help                   # the options of a task
    torchrun --nproc-per-node 8 -m hfclip.commands.evaluate zero-shot ...

A result is one JSON file below --out. One that is there is not computed again, and embeddings are kept in --cache-dir, so
that an interrupted command goes on where it was when it is given again. Processes share the work of each data set.

A suite is a YAML file with the flags of several commands:

    models: [clip-b32, clip-b16]
    defaults: {precision: fp32}
    runs:
    - {task: zero-shot, data: [cifar10/test, photos]}
    - {task: retrieval, data: captions, models: [clip-b16]}

exit codes: 0 done, 1 some of several results could not be computed, 2 wrong usage, 130 stopped with Ctrl-C
"""

import argparse
import itertools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist
import yaml
from transformers.utils import logging

from hfclip.data.shards import cache_folder
from hfclip.embeddings import embed
from hfclip.errors import UsageError, run
from hfclip.evaluation import TASKS, DataSet
from hfclip.evaluation.records import Record
from hfclip.evaluation.registry import compare, published_models, registered, tell_protocol
from hfclip.evaluation.running import Job, open_model
from hfclip.evaluation.tasks import EMBEDDING, add_flags, defaults_of, find_task


def main() -> None:
    arguments = parse_arguments(sys.argv[1:])
    is_first = os.environ.get("RANK", "0") == "0"
    if arguments[0].list:
        print(list_all())
        return
    logging.disable_progress_bar()  # of weights; embedding has one of its own
    jobs = [planned for parsed in arguments for planned in jobs_of(parsed)]
    models = list(dict.fromkeys(planned.job.model for planned in jobs))
    jobs.sort(key=lambda planned: models.index(planned.job.model))  # each is opened once
    if arguments[0].dry_run:
        for job, asked in jobs:
            path = job.path(asked.out)
            print(f"{'kept' if path.exists() else 'to do'}\t{path}")
        return
    failed = run_jobs(jobs, is_first)
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    if failed:
        sys.exit(1)


class Planned(NamedTuple):
    job: Job
    asked: argparse.Namespace


def run_jobs(jobs: list[Planned], prints: bool) -> int:
    """Runs them model by model, and says what each gave. Returns how many of several failed."""
    failed = 0
    for name, of_model in itertools.groupby(jobs, key=lambda planned: planned.job.model):
        opened = None
        for job, asked in of_model:
            try:
                opened = opened or (open_model(name) if name else None)
                record = job.run(opened, asked.out)
            except UsageError as error:
                if len(jobs) == 1 or int(os.environ.get("WORLD_SIZE", "1")) > 1:  # the others wait for this process
                    raise
                failed += 1
                print(f"error: {error}", file=sys.stderr, flush=True)
                continue
            if prints:
                say = (
                    json.dumps(record.result, ensure_ascii=False)
                    if asked.json
                    else describe(job, record, asked.expect)
                )
                print(say, flush=True)
    return failed


def describe(job: Job, record: Record, expect: str | None) -> str:
    """A result in a line, and lines of what there is to know, and of what was published if that is asked for."""
    metrics = ", ".join(
        f"{name} {value:.2%}" if isinstance(value, float) else f"{name} {value:,}"
        for name, value in record.metrics.items()
    )
    lines = [f"{job.task}\t{job.names}\t{job.model}\t{metrics}\t{record.path}", *record.result["notes"]]
    if expect:
        found = compare(record.result, None if expect == SAME else expect)
        lines += map(str, found or ["nothing was published of this task, data set and architecture"])
    return "\n    ".join(lines + [said for said in [tell_protocol(record.result)] if said])


def jobs_of(parsed: argparse.Namespace) -> list[Planned]:
    """One for each model and, unless the task compares them, each data set."""
    if parsed.task is None:
        raise UsageError(f"found no task, expected one of {', '.join(TASKS)} as the first word, or a suite.")
    row = find_task(parsed.task)
    for flag in ("data",) if row.reads == "results" else ("model", "data"):
        if not getattr(parsed, flag):
            raise UsageError(f"{parsed.task}: found no --{flag}, expected at least one.")
    options = {name: getattr(parsed, name) for name in (*defaults_of(row.load()), *EMBEDDING) if hasattr(parsed, name)}
    sets = [DataSet(_place(text), root=parsed.data_root, limit=parsed.limit, only=parsed.only) for text in parsed.data]
    groups = [sets] if row.reads == "several" else [[part] for part in sets]
    models = [None] if row.reads == "results" else parsed.model
    if parsed.expect and parsed.expect not in (SAME, *published_models()):
        raise UsageError(f"--expect: found {parsed.expect!r}, expected one of {', '.join(published_models())}.")
    return [Planned(Job(parsed.task, model, group, options), parsed) for model in models for group in groups]


def _place(text: str) -> str | dict[str, str]:
    """A place, or what "{train: PLACE, test: PLACE}" means."""
    if not text.startswith("{"):
        return text
    places = yaml.safe_load(text)
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise UsageError(f"--data: found {text!r}, expected a place or {{train: PLACE, test: PLACE}}.")
    return places


def parse_arguments(words: list[str]) -> list[argparse.Namespace]:
    """The commands that are meant: one, or those of a suite."""
    first = words[0] if words and not words[0].startswith("-") else None
    is_suite = first is not None and first.endswith((".yaml", ".yml"))
    if not is_suite or {"-h", "--help", "--list"} & {*words}:
        return [build_parser(None if is_suite else first).parse_args(words)]
    return [build_parser(command[0]).parse_args(command) for command in commands_of(Path(first), words[1:])]


def commands_of(path: Path, given: Sequence[str]) -> list[list[str]]:
    """The commands of a suite; flags that were given come last, so that they decide.

    Raises:
        UsageError: it is no suite.
    """
    try:
        suite = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"{path}: {error}") from error
    keys = {"models", "defaults", "runs"}
    runs = suite.get("runs") if isinstance(suite, dict) else None
    are_runs = isinstance(runs, list) and runs and all(isinstance(entry, dict) for entry in runs)
    if not are_runs or suite.keys() - keys:
        found = sorted(map(str, suite)) if isinstance(suite, dict) else type(suite).__name__
        raise UsageError(
            f"{path}: found {found}, expected a mapping with {', '.join(sorted(keys))}; runs is a list of mappings."
        )
    commands = []
    for number, entry in enumerate(suite["runs"]):
        values = {"models": suite.get("models"), **(suite.get("defaults") or {}), **entry}
        if "task" not in values or "data" not in values:
            raise UsageError(f"{path}: run {number} has the keys {sorted(entry)}, expected task and data among them.")
        values["model"] = values.pop("models")
        task = values.pop("task")
        commands.append([task, *(word for name, value in values.items() for word in _words(name, value)), *given])
    return commands


def _words(name: str, value: object) -> list[str]:
    """A key of a suite as the flag that it is."""
    flag = f"--{name.replace('_', '-')}"
    if value is None:
        return []
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    if isinstance(value, list):
        return [flag, *(json.dumps(part) if isinstance(part, dict) else str(part) for part in value)]
    return [f"{flag}={json.dumps(value) if isinstance(value, dict) else value}"]


class ArgumentParser(argparse.ArgumentParser):
    """Tells mistakes as UsageError."""

    def error(self, message):
        raise UsageError(f"{message[:1].upper()}{message[1:]}. `--help` lists all arguments.")


def build_parser(task: str | None) -> argparse.ArgumentParser:
    """The parser of a task's command; without a task, of what helps to find one."""
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("task", metavar="TASK", nargs="?", help=f"{', '.join(TASKS)}, or a suite, a .yaml file")
    add("--model", nargs="+", metavar="NAME", default=[], help="CLIP folders, or names on the Hub")
    add("--data", nargs="+", metavar="PLACE", default=[], help=PLACES)
    add("--out", type=Path, default=Path("results"), metavar="FOLDER", help="of results (default: %(default)s)")
    add("--limit", type=int, metavar="N", help="images of each split, at most, spread evenly over it")
    add("--only", metavar="FILE", help="keys of the samples that count, a line each: clean.txt of an overlap")
    add("--data-root", type=Path, metavar="FOLDER", help="where data sets of the registry lie; else they are fetched")
    add(
        "--expect",
        nargs="?",
        const=SAME,
        metavar="MODEL",
        help="say how far each result is from what was published of MODEL (default: of the same architecture)",
    )
    add("--json", action="store_true", help="one JSON object per result")
    add("--dry-run", action="store_true", help="say which results are there and which would be computed")
    add("--list", action="store_true", help="list tasks and data sets")
    add_flags(parser.add_argument_group("embedding"), embed, [name for name in EMBEDDING if name != "cache_dir"])
    caches = cache_folder() / "embeddings"
    add("--cache-dir", type=Path, default=caches, metavar="FOLDER", help="of embeddings (default: %(default)s)")
    if task is not None:
        add_flags(parser.add_argument_group(f"options of {task}"), find_task(task).load())
    return parser


SAME = "same architecture"  # as the model that is measured
PLACES = (
    "names of the registry (--list); what `hfclip.data.open_source` reads: folders of tars, of classes, of images with captions, tables, names on the Hub; "
    "or a place for each split, {train: PLACE, test: PLACE}"
)


def list_all() -> str:
    lines = ["tasks:", *(f"  {name:<16}{row.does}" for name, row in TASKS.items()), "", "data sets:"]
    for row in registered().values():
        size = "" if row.test is None else f"{row.test:,} images"
        same = {True: "as in the paper", False: "not as in the paper", None: ""}[row.same_protocol]
        lines.append(f"  {row.name:<18}{row.title:<34}{size:<16}{row.metric:<26}{same}")
    return "\n".join([*lines, "", "docs/datasets.md has splits, addresses, licences and published numbers."])


if __name__ == "__main__":
    run(main, interrupted="Stopped. The same command goes on from here.")
