"""The contrastive loss beside OpenCLIP's ClipLoss, forward and backward: a fresh process each time, in turns.

    python benchmarks/loss.py                 # prints the tables
    python benchmarks/loss.py --write         # also stores them, dated, in benchmarks/results/

Both sides get the same unit embeddings in float32 and a trained scale; loss and gradients are compared before the
times are. Time is that of one forward and backward pass after a warm-up on a small batch; memory is the growth of the
process's peak during it: the gradients of the embeddings count, imports and the embeddings do not. Where open_clip is
not installed, the usual dense loss in plain torch stands in, and the table says so. A second table shows hfclip alone,
at growing batches.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch

import hfclip


RESULTS = Path(__file__).parent / "results"
BATCHES = (4096, 8192, 16384, 32768)
STEP = """
import json, resource, sys, time
import torch
{definition}

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def step(pairs, dim):
    torch.manual_seed(0)
    images, texts = torch.randn(pairs, dim), torch.randn(pairs, dim)
    texts.add_(images, alpha=0.2)  # pairs that belong together, weakly
    for embeds in (images, texts):
        embeds.div_(embeds.norm(dim=1, keepdim=True)).requires_grad_()
    scale = torch.tensor(30.0, requires_grad=True)
    before, start = peak(), time.perf_counter()
    value = loss(images, texts, scale)
    value.backward()
    seconds, memory = time.perf_counter() - start, peak() - before
    return [seconds, memory, value.item(), scale.grad.item(), images.grad.norm().item(), texts.grad.norm().item()]

pairs, dim, threads = map(int, sys.argv[1:])
torch.set_num_threads(threads)
step(min(pairs, 1024), dim)
print(json.dumps(step(pairs, dim)))
"""
CONTRASTIVE = STEP.format(definition="from hfclip import contrastive_loss as loss")
SIGMOID = STEP.format(
    definition="""
from hfclip import sigmoid_loss
def loss(images, texts, scale):
    return sigmoid_loss(images, texts, scale, -10.0)
"""
)
OPENCLIP = STEP.format(definition="from open_clip import ClipLoss\nloss = ClipLoss()")
DENSE = STEP.format(
    definition="""
def loss(images, texts, scale):
    logits, own = scale * images @ texts.T, torch.arange(len(images))
    cross_entropy = torch.nn.functional.cross_entropy
    return (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2
"""
)


def measured(code: str, pairs: int, dim: int, threads: int) -> list[float]:
    """Seconds, bytes, then loss and sizes of the gradients, of one process."""
    command = [sys.executable, "-c", code, *map(str, (pairs, dim, threads))]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(output.stdout.strip().splitlines()[-1])


def side_by_side(peer: str, code: str, pairs: int, dim: int, threads: int, rounds: int) -> list[str]:
    results = []
    for number in range(1, rounds + 1):
        ours, theirs = measured(CONTRASTIVE, pairs, dim, threads), measured(code, pairs, dim, threads)
        # float32 on both sides; sums of a million terms in different order
        for found, expected in zip(ours[2:], theirs[2:], strict=True):
            assert abs(found - expected) <= 1e-4 * abs(expected), f"the sides disagree: {ours[2:]}, {theirs[2:]}"
        print(f"round {number}: {ours[0]:.2f} s against {theirs[0]:.2f} s", flush=True)
        results.append((ours, theirs))
    lines = [f"| {pairs:,} pairs | hfclip | {peer} | ratio |", "|---|---|---|---|"]
    for what, place, unit, factor in (("time", 0, "s", 1), ("memory", 1, "MiB", 2**-20)):
        a, b = (statistics.median(pair[side][place] * factor for pair in results) for side in (0, 1))
        ratio = statistics.median(theirs[place] / ours[place] for ours, theirs in results)
        lines.append(f"| {what} | {a:,.2f} {unit} | {b:,.2f} {unit} | {ratio:.1f} |")
    return lines


def growing(dim: int, threads: int) -> list[str]:
    lines = [
        "| loss | pairs | time | memory | of which gradients of the embeddings | beyond them |",
        "|---|---|---|---|---|---|",
    ]
    for name, code in (("contrastive", CONTRASTIVE), ("sigmoid", SIGMOID)):
        for pairs in BATCHES:
            seconds, memory, *_ = measured(code, pairs, dim, threads)
            gradients = 2 * pairs * dim * 4
            cells = (f"{size / 2**20:,.0f} MiB" for size in (memory, gradients, memory - gradients))
            lines.append(f"| {name} | {pairs:,} | {seconds:.2f} s | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    return lines


def report(peer: str, arguments: argparse.Namespace, tables: list[str]) -> str:
    return "\n".join(
        [
            f"# The contrastive loss beside {peer}, {date.today().isoformat()}",
            "",
            f"Forward and backward, {arguments.dim} dimensions, float32, {arguments.threads} threads of "
            f"{platform.machine()} ({os.cpu_count()} cores), torch {torch.__version__}, hfclip {hfclip.__version__}. "
            "Medians of processes in turns; ratio above 1: hfclip takes less. `python benchmarks/loss.py --write`",
            "",
            *tables,
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=16384, help="batch of the comparison")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="pairs of processes")
    parser.add_argument("--write", action="store_true", help="store the tables in benchmarks/results/")
    arguments = parser.parse_args()
    if find_spec("open_clip"):
        peer, code = f"OpenCLIP {version('open_clip_torch')}'s ClipLoss", OPENCLIP
    else:
        peer, code = "a dense loss in plain torch (OpenCLIP is not installed)", DENSE
    pairs, dim, threads, rounds = arguments.pairs, arguments.dim, arguments.threads, arguments.rounds
    tables = [*side_by_side(peer, code, pairs, dim, threads, rounds), "", *growing(dim, threads)]
    table = report(peer, arguments, tables)
    print(table)
    if arguments.write:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{date.today().isoformat()}_loss.md").write_text(table)


if __name__ == "__main__":
    main()
