"""Curves of runs as images, from their metrics.jsonl: `curves.png` in a run's folder, losses of several runs in one."""

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


METRICS_FILE, CURVES_FILE = "metrics.jsonl", "curves.png"
PANELS = {
    "loss": "loss",
    "grad_norm": "gradient norm",
    "logit_scale": "logit scale",
    "lr": "learning rate",
    "samples_per_second": "pairs per second",
}


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl. One that is not whole (the run was killed while it wrote) is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


def draw_curves(run_folder: Path, say: Callable[[str], None] = tqdm.write) -> Path | None:
    """Draws the `curves.png` of a run that goes on whatever happens: what hinders the image (matplotlib is not
    installed, the disk is full) is told to `say`, once, and None returned.
    """
    try:
        return draw_run(run_folder)
    except Exception as error:
        _say_once(say, f"No {CURVES_FILE}: {error}")
        return None


@functools.cache
def _say_once(say: Callable[[str], None], message: str) -> None:
    say(message)


def draw_run(run_folder: Path) -> Path | None:
    """Draws loss, gradient norm, logit scale, learning rate, speed and evaluations over the steps of a run.

    Returns:
        The image, `curves.png` in the run's folder, or None if there is no step to draw yet.

    Raises:
        ImportError: matplotlib is not installed.
    """
    path = run_folder / METRICS_FILE
    lines = read_metrics(path) if path.is_file() else []
    if not any("loss" in line for line in lines):
        return None
    figure = _figure(13, 7)
    axes = figure.subplots(2, 3).flatten()
    for panel, (name, title) in zip(axes, PANELS.items(), strict=False):
        _draw(panel, lines, name)
        panel.set_title(title)
    if min(_series(lines, "grad_norm")[1], default=0) > 0:
        axes[1].set_yscale("log")
    axes[4].set_ylim(bottom=0)
    _draw_evaluations(axes[-1], lines)
    figure.suptitle(run_folder.resolve().name)
    return _save(figure, run_folder / CURVES_FILE)


def draw_losses(run_folders: list[Path], out: Path) -> Path:
    """Draws the losses of several runs over each other into `out`; later runs as thinner lines, so that all are seen.

    Raises:
        FileNotFoundError: a folder has no metrics.jsonl.
        ImportError: matplotlib is not installed.
    """
    figure = _figure(9, 5.5)
    panel = figure.subplots()
    shared = os.path.commonpath([folder.resolve().parent for folder in run_folders])
    for number, folder in enumerate(run_folders):
        label = os.path.relpath(folder.resolve(), shared)
        width = 1 + 1.5 * (len(run_folders) - 1 - number)
        _draw(panel, read_metrics(folder / METRICS_FILE), "loss", linewidth=width, label=label)
    panel.set_ylabel("loss")
    panel.legend(frameon=False)
    return _save(figure, out)


def _figure(width: float, height: float) -> "Figure":
    """An empty figure, `width` x `height` inches. Of its own: pyplot's would stay in memory, and look for a screen."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Curves are drawn by matplotlib, which is not installed: `pip install matplotlib`."
        ) from error
    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def _series(lines: list[dict], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric where there is one: a line of nothing but skipped steps has no loss."""
    points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _draw(panel: "Axes", lines: list[dict], name: str, **style) -> None:
    steps, values = _series(lines, name)
    # A run's first lines are points more than a curve: the fewer, the larger.
    marker = {"marker": "o", "markersize": 8 if len(steps) < 4 else 4} if len(steps) < 40 else {}
    panel.plot(steps, values, **{"linewidth": 1.2, **marker, **style})
    panel.set_xlabel("step")
    panel.grid(alpha=0.3)


def _draw_evaluations(panel: "Axes", lines: list[dict]) -> None:
    # Lines of earlier versions name no headlines: all that they measured is drawn.
    measured = [line.get("headlines") or [name for name in line if "/" in name] for line in lines]
    names = sorted({name for found in measured for name in found})
    for name in names:
        _draw(panel, lines, name, label=name, marker="o")
    panel.set_title("evaluations")
    if names:
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        panel.legend(frameon=False, fontsize="small")
    else:
        panel.set_axis_off()
        panel.text(0.5, 0.5, "none yet", ha="center", va="center", transform=panel.transAxes)


def _save(figure: "Figure", path: Path) -> Path:
    """Written beside and renamed: who looks at it sees the image before or this one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    figure.savefig(beside, format="png")
    beside.replace(path)
    return path
