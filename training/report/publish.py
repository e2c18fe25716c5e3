"""The end of a run: what was measured on the screen, and the trained model on the Hub."""

import json
import os
from contextlib import suppress
from pathlib import Path

from huggingface_hub import EvalResult, get_token

from hfclip import HFCLIPConfig, __version__
from hfclip.data.samples import BadSample, Source
from hfclip.data.streaming import StreamSource
from hfclip.errors import UsageError, redact
from hfclip.evaluation import Result, all_metrics
from hfclip.hub import end_on_interrupt, model_card, push

from ..config import Config
from ..evaluation import LabelledSet
from ..launcher import exit_with_message


def check_token(config: Config) -> None:
    """Raises UsageError if the run is to be published and this machine is not logged in."""
    if config.run.push_to_hub and os.environ.get("RANK", "0") == "0" and get_token() is None:
        raise UsageError("run.push_to_hub: found no token. Log in with `hf auth login`, or set HF_TOKEN.")


def print_summary(
    results: dict[str, Result], problems: dict[str, int], model_folder: Path, picture: Path | None, labels: list[str]
) -> None:
    """Prints what was measured and how to use the model, with `labels` that its data has."""
    shown = all_metrics(results)
    width = max(map(len, shown), default=0)
    for name, value in shown.items():
        print(f"  {name:<{width}}  {value:>6.1%}" if isinstance(value, float) else f"  {name:<{width}}  {value:>6}")
    for name, count in problems.items():
        print(f"  {name}: {count}")
    print(f"\nThe model is in {model_folder}" + (f", an image of predictions in {picture}." if picture else "."))
    print(
        "Use it:\n\n"
        "    import hfclip, transformers\n"
        f'    classify = transformers.pipeline("zero-shot-image-classification", {json.dumps(str(model_folder))})\n'
        f'    classify("picture.png", candidate_labels={json.dumps(labels, ensure_ascii=False)})'
    )


def example_labels(tasks: list[LabelledSet], source: Source) -> list[str]:
    """Returns two texts that fit the run's images: labels that were measured, or captions."""
    for task in tasks:
        return list(dict.fromkeys(task.labels))[:2]
    texts = []
    if not isinstance(source, StreamSource):  # which would have to fetch them
        for index in range(0, len(source), max(len(source) // 9, 1)):
            with suppress(BadSample):
                texts += (" ".join(text.split()) for text in source.captions(index) if 0 < len(text.strip()) <= 80)
    return list(dict.fromkeys(texts))[:2] or ["a photo of a cat", "a photo of a dog"]


def write_card(
    folder: Path,
    config: Config,
    model_config: HFCLIPConfig,
    steps: int,
    results: dict[str, Result],
    *,
    name: str,
    title: str | None = None,
) -> None:
    """Writes the README.md of a trained model: its architecture, settings of the run, and what was measured."""
    provenance = {
        "Trained with": f"hfclip {__version__}",
        "Steps": steps,
        "Pairs a step": config.optim.batch_size,
        "Loss": config.optim.loss,
        "Peak learning rate": config.optim.lr,
        "Precision": config.run.precision,
    }
    results = as_eval_results(config, results)
    card = model_card(model_config, name=name, title=title, provenance=provenance, results=results)
    (folder / "README.md").write_text(redact(card), encoding="utf-8")


def publish(config: Config, model_config: HFCLIPConfig, steps: int, results: dict[str, Result]) -> None:
    """Pushes the trained model with a card of settings and results. Comes last: no other process waits for it."""
    folder, repo_id = Path(config.run.output_dir) / "model", config.run.push_to_hub
    again = f"{folder} holds the trained model. Publish it:\n    hfclip push {folder} {repo_id}"
    end_on_interrupt(f"Stopped. {again}")
    try:
        write_card(folder, config, model_config, steps, results, name=repo_id)
        push(folder, repo_id)
    except (UsageError, OSError) as error:
        exit_with_message(f"error: {error}\n{again}", status=1)


def as_eval_results(config: Config, results: dict[str, Result]) -> list[EvalResult]:
    """What was measured, in the form of model cards."""
    names = {"zero_shot": Path(config.eval.zero_shot or "").name, "retrieval": "held-out pairs"}
    rows = []
    for source, result in results.items():
        task = "zero-shot-retrieval" if source == "retrieval" else "zero-shot-image-classification"
        name = names.get(source, source)
        for metric, value in result.metrics.items():
            if metric != "unreadable_images":
                rows.append(EvalResult(task, name, name, metric, round(value, 4)))
    return rows
