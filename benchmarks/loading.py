"""Opening a model folder, beside transformers' CLIPModel: the same weights, a fresh process each time, in turns.

    python benchmarks/loading.py                    # prints the table, for a random ViT-L/14
    python benchmarks/loading.py --write            # also stores it, dated, in benchmarks/results/

Both sides open the same tensors in float32: `AutoModel.from_pretrained` on a folder that hfclip wrote, and
`CLIPModel.from_pretrained` on one that transformers wrote. Time is that of the call; memory is the growth of the
process's peak during it. Imports come first and do not count.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import torch
import transformers
from transformers import CLIPModel

import hfclip
from hfclip import HFCLIPConfig, HFCLIPModel


RESULTS = Path(__file__).parent / "results"
OPEN = """
import json, resource, sys, time
import torch
{imports}
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before, start = peak(), time.perf_counter()
model = {call}.from_pretrained(sys.argv[1], dtype=torch.float32)
seconds = time.perf_counter() - start
checksum = sum(parameter.double().sum().item() for parameter in model.parameters())
print(json.dumps([seconds, peak() - before, checksum]))
"""
OURS = OPEN.format(
    imports="import hfclip\nfrom hfclip import HFCLIPModel\nfrom transformers import AutoModel", call="AutoModel"
)
THEIRS = OPEN.format(imports="from transformers import CLIPModel", call="CLIPModel")


def build(folder: Path, preset: str, dtype: torch.dtype) -> tuple[Path, Path]:
    """One set of random weights, as a folder of hfclip and as one of transformers."""
    ours, theirs = folder / "hfclip", folder / "transformers"
    torch.manual_seed(0)
    model = HFCLIPModel(HFCLIPConfig.from_preset(preset)).to(dtype)
    model.save_pretrained(ours)
    # transformers opens the ViT models that hfclip writes as they are; saved again, the folder is its own.
    settings = transformers.CLIPConfig(
        text_config=_fields(model.config.text_config),
        vision_config=_fields(model.config.vision_config),
        projection_dim=model.config.projection_dim,
    )
    with torch.device("meta"):
        clip = CLIPModel(settings)
    clip.load_state_dict(model.state_dict(), strict=False, assign=True)
    clip.save_pretrained(theirs)
    return ours, theirs


def _fields(config) -> dict:
    known = transformers.CLIPTextConfig().to_dict() | transformers.CLIPVisionConfig().to_dict()
    return {name: value for name, value in config.to_dict().items() if name in known and name != "model_type"}


def opened(code: str, folder: Path) -> tuple[float, float, float]:
    """Seconds, bytes and a checksum of one process that opens `folder`."""
    output = subprocess.run([sys.executable, "-c", code, str(folder)], check=True, capture_output=True, text=True)
    return tuple(json.loads(output.stdout.strip().splitlines()[-1]))


def run(preset: str, dtype: str, rounds: int) -> tuple[list[tuple], list[tuple]]:
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = build(Path(folder), preset, getattr(torch, dtype))
        opened(OURS, ours), opened(THEIRS, theirs)  # warm-up: the files are in the system's cache
        measured = [(opened(OURS, ours), opened(THEIRS, theirs)) for _ in range(rounds)]
    checksums = {round(side[2], 3) for pair in measured for side in pair}
    assert len(checksums) == 1, f"the two sides opened different weights: {checksums}"
    return [pair[0] for pair in measured], [pair[1] for pair in measured]


def report(preset: str, rows: list[str]) -> str:
    return "\n".join(
        [
            f"# Opening a {preset} folder beside transformers' CLIPModel, {date.today().isoformat()}",
            "",
            f"{platform.machine()} ({os.cpu_count()} cores), torch {torch.__version__}, transformers "
            f"{transformers.__version__}, hfclip {hfclip.__version__}. Medians over processes in turns; ratio is hfclip / "
            "transformers: below 1 is less. `python benchmarks/loading.py --write`",
            "",
            "| stored as | what | hfclip | transformers | ratio |",
            "|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="ViT-L/14", help="a ViT (default: ViT-L/14)")
    parser.add_argument("--rounds", type=int, default=7, help="pairs of processes")
    parser.add_argument("--write", action="store_true", help="store the table in benchmarks/results/")
    arguments = parser.parse_args()
    rows = []
    for dtype in ("float32", "float16"):
        ours, theirs = run(arguments.preset, dtype, arguments.rounds)
        for what, place, unit, scale in (("time", 0, "s", 1), ("peak memory", 1, "MB", 1e-6)):
            a, b = ([side[place] * scale for side in sides] for sides in (ours, theirs))
            ratio = statistics.median(x / y for x, y in zip(a, b))
            a, b = statistics.median(a), statistics.median(b)
            rows.append(f"| {dtype} | {what} | {a:,.2f} {unit} | {b:,.2f} {unit} | {ratio:.2f} |")
            print(rows[-1], flush=True)
    table = report(arguments.preset, rows)
    if arguments.write:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{date.today().isoformat()}_loading.md").write_text(table)


if __name__ == "__main__":
    main()
