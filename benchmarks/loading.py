"""Opening a model folder, beside who wrote it: the same weights, a fresh process each time, in turns.

    python benchmarks/loading.py                    # prints the table, for a random ViT-L/14
    python benchmarks/loading.py --write            # also stores it, dated, in benchmarks/results/

Both sides open the same tensors in float32: `AutoModel.from_pretrained` on a folder that hfclip wrote, and
`CLIPModel.from_pretrained` on one that transformers wrote; where open_clip is installed, `HFCLIPModel.from_pretrained`
and `open_clip.create_model` on OpenCLIP's folder. Time is that of the call; memory is the growth of the process's peak
during it, mapped pages that were read included. Imports come first and do not count.
"""

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import CLIPModel

import hfclip
from hfclip import HFCLIPConfig, HFCLIPModel
from hfclip.foreign.key_maps import openai_items


RESULTS = Path(__file__).parent / "results"
OPEN = """
import json, resource, sys, time
import torch
{imports}
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before, start = peak(), time.perf_counter()
model = {call}
seconds = time.perf_counter() - start
checksum = 0.0  # of all weights, in pieces that take no memory; reads what is mapped
for parameter in model.parameters():
    checksum += sum(piece.double().sum().item() for piece in parameter.detach().flatten().split(100_000))
print(json.dumps([seconds, peak() - before, checksum]))
"""
OURS = OPEN.format(
    imports="import hfclip\nfrom hfclip import HFCLIPModel\nfrom transformers import AutoModel",
    call="AutoModel.from_pretrained(sys.argv[1], dtype=torch.float32)",
)
THEIRS = OPEN.format(
    imports="from transformers import CLIPModel", call="CLIPModel.from_pretrained(sys.argv[1], dtype=torch.float32)"
)
OURS_OF_OPENCLIP = OPEN.format(
    imports="import hfclip.foreign.opening\nfrom hfclip import HFCLIPModel",
    call="HFCLIPModel.from_pretrained(sys.argv[1])",
)
OPENCLIPS = OPEN.format(imports="import open_clip", call='open_clip.create_model("local-dir:" + sys.argv[1])')


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


def build_openclip(folder: Path, preset: str) -> Path:
    """Random weights in float32 as a folder of OpenCLIP."""
    import open_clip

    torch.manual_seed(0)
    weights = dict(openai_items(HFCLIPModel(HFCLIPConfig.from_preset(preset)).state_dict()))
    save_file(weights, folder / "open_clip_model.safetensors")
    settings = {"model_cfg": open_clip.get_model_config(preset.replace("/", "-")), "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    return folder


def _fields(config) -> dict:
    known = transformers.CLIPTextConfig().to_dict() | transformers.CLIPVisionConfig().to_dict()
    return {name: value for name, value in config.to_dict().items() if name in known and name != "model_type"}


def opened(code: str, folder: Path) -> tuple[float, float, float]:
    """Seconds, bytes and a checksum of one process that opens `folder`."""
    output = subprocess.run([sys.executable, "-c", code, str(folder)], check=True, capture_output=True, text=True)
    return tuple(json.loads(output.stdout.strip().splitlines()[-1]))


Side = tuple[str, Path]  # code and folder


def compare(ours: Side, theirs: Side, rounds: int) -> tuple[list[tuple], list[tuple]]:
    """What both sides measure in turns, after one turn that leaves the files in the system's cache."""
    measured = [(opened(*ours), opened(*theirs)) for _ in range(rounds + 1)][1:]
    checksums = [side[2] for pair in measured for side in pair]
    assert max(checksums) - min(checksums) < 1e-3, f"the two sides opened different weights: {checksums}"
    return [pair[0] for pair in measured], [pair[1] for pair in measured]


def rows_of(kind: str, ours: Side, theirs: Side, rounds: int) -> Iterator[str]:
    measured = compare(ours, theirs, rounds)
    for what, place, unit, scale in (("time", 0, "s", 1), ("peak memory", 1, "MB", 1e-6)):
        a, b = ([side[place] * scale for side in sides] for sides in measured)
        ratio = statistics.median(x / y for x, y in zip(a, b))
        a, b = statistics.median(a), statistics.median(b)
        yield f"| {kind} | {what} | {a:,.2f} {unit} | {b:,.2f} {unit} | {ratio:.2f} |"


def report(preset: str, rows: list[str]) -> str:
    return "\n".join(
        [
            f"# Opening a {preset} folder beside transformers' CLIPModel and open_clip, {date.today().isoformat()}",
            "",
            f"{platform.machine()} ({os.cpu_count()} cores), torch {torch.__version__}, transformers "
            f"{transformers.__version__}, hfclip {hfclip.__version__}. Medians over processes in turns; ratio is hfclip / "
            "peer: below 1 is less. `python benchmarks/loading.py --write`",
            "",
            "| stored as, peer | what | hfclip | peer | ratio |",
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
        with tempfile.TemporaryDirectory() as folder:
            ours, theirs = build(Path(folder), arguments.preset, getattr(torch, dtype))
            rows += rows_of(f"{dtype}, transformers", (OURS, ours), (THEIRS, theirs), arguments.rounds)
    if importlib.util.find_spec("open_clip"):
        with tempfile.TemporaryDirectory() as folder:
            source = build_openclip(Path(folder), arguments.preset)
            size = (source / "open_clip_model.safetensors").stat().st_size
            kind = f"float32, OpenCLIP ({size / 1e6:,.0f} MB)"
            rows += rows_of(kind, (OURS_OF_OPENCLIP, source), (OPENCLIPS, source), arguments.rounds)
    print(*rows, sep="\n")
    table = report(arguments.preset, rows)
    if arguments.write:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{date.today().isoformat()}_loading.md").write_text(table)


if __name__ == "__main__":
    main()
