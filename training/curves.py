"""Draws curves of runs from their metrics.jsonl: `curves.png` in a run's folder, or losses of several runs in one image.

python -m hfclip.training.curves runs/clip                                  # draws runs/clip/curves.png
python -m hfclip.training.curves runs/one runs/four --out overlay.png       # the losses of both
"""

import argparse
from pathlib import Path

from hfclip_errors import UsageError, run, start_program


if __name__ == "__main__":
    start_program(__file__, __spec__, "train")

from .report.curves import CURVES_FILE, METRICS_FILE, draw_losses, draw_run


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws curves of runs from their metrics.jsonl.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    parser.add_argument(
        "--out", type=Path, help=f"draws the losses of all runs here, a .png. Default: each run's {CURVES_FILE}"
    )
    arguments = parser.parse_args()
    for folder in arguments.runs:
        if not (folder / METRICS_FILE).is_file():
            raise UsageError(f"found no {METRICS_FILE} in {folder}, expected the folder of a run (run.output_dir).")
    out = arguments.out
    if out is not None and (out.suffix != ".png" or not out.parent.is_dir()):
        raise UsageError(f"--out: found {out}, expected a file that ends with .png, in a folder that exists.")
    try:
        if out is not None:
            print(draw_losses(arguments.runs, out))
            return
        for folder in arguments.runs:
            print(draw_run(folder) or f"{folder}: no step is logged yet.")
    except ImportError as error:  # matplotlib is not installed
        raise UsageError(str(error)) from error


if __name__ == "__main__":
    run(main)
