"""The linear probe's logistic regression beside scikit-learn's: at single lambdas, and in the paper's search for one.

    python benchmarks/probe.py                            # prints the tables
    python benchmarks/probe.py --write                    # also stores them, dated, in benchmarks/results/
    python benchmarks/probe.py --images data/cifar10      # a random ViT's features of real images in place of mixtures

Each fit is of a process of its own, on the same float32 features and with the same number of threads; the time includes all
but reading the features. scikit-learn stops by `--tol`, a bound on the gradient of the mean loss. Both losses are computed from
the weights, in float64, and predictions are compared on features that neither has seen. A search takes some 15 fits of four
fifths of the samples, and one of all. scikit-learn then fits all of these lambdas, from the strongest penalty on, each from
the solution before, until its gradient meets `--search-tol`: at 1e-6 it ends far above the minimum where the penalty is
weak, at 1e-9 it comes as near as hfclip does.

    python benchmarks/probe.py --samples 2000 --dim 256 --classes 50 --threads 1 --search-only     # a minute
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import hfclip
from hfclip import HFCLIPConfig, HFCLIPImageProcessor, HFCLIPModel
from hfclip.embeddings import embed
from hfclip.evaluation import DataSet
from hfclip.evaluation.data import LabelledFolder
from hfclip.evaluation.linear_probe import Split, divide, search


RESULTS = Path(__file__).parent / "results"
LAMBDAS = (100.0, 10.0, 1.0)


def mixtures(num_samples: int, dim: int, num_classes: int) -> dict[str, np.ndarray]:
    """Clusters on a falling spectrum, off centre, of about unit variance, as a tower's last LayerNorm gives them."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.arange(1, dim + 1) ** -0.7
    spread *= (dim / spread.square().sum()).sqrt()
    turn = torch.linalg.qr(torch.randn(dim, dim, generator=generator)).Q
    targets = torch.randint(num_classes, (2 * num_samples,), generator=generator)
    centres = 0.2 * torch.randn(num_classes, dim, generator=generator)
    features = (centres[targets] + torch.randn(2 * num_samples, dim, generator=generator)) * spread @ turn
    features += 0.5 * torch.randn(dim, generator=generator)
    return as_arrays(features, targets, num_samples)


def features_of_images(place: str, num_samples: int) -> dict[str, np.ndarray]:
    """The pooled features of a random ViT of 4 layers of width 768 on patches of 8 pixels of 32."""
    torch.manual_seed(0)
    vision = dict(model_type="hfclip_vit", image_size=32, patch_size=8, hidden_size=768, intermediate_size=3072)
    vision |= dict(num_hidden_layers=4, num_attention_heads=12)
    model = HFCLIPModel(HFCLIPConfig(vision_config=vision))
    processor = argparse.Namespace(image_processor=HFCLIPImageProcessor(size=32))
    data = DataSet(place, limit=2 * num_samples).labelled("train")
    layers = {"visual_projection": "input"}
    found = embed(model, processor, data.samples.source, what=("images",), layers=layers, precision="fp32")
    order = np.random.default_rng(0).permutation(len(found))
    return as_arrays(found.layers["visual_projection"][order], found.label_ids[order], len(order) // 2)


def as_arrays(features: np.ndarray, targets: np.ndarray, num_samples: int) -> dict[str, np.ndarray]:
    """Those to fit, and new ones."""
    features, targets = np.asarray(features, np.float32), np.asarray(targets)
    return {"features": features[:num_samples], "targets": targets[:num_samples], "new": features[num_samples:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--images", help="a labelled data set, instead of mixtures")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tol", type=float, default=1e-6, help="of scikit-learn")
    parser.add_argument("--max-iter", type=int, default=10_000, help=argparse.SUPPRESS)
    parser.add_argument(
        "--search-iterations", type=int, default=1000, help="of scikit-learn per fit; the paper's are 1000"
    )
    parser.add_argument("--search-tol", type=float, default=1e-9, help="of scikit-learn in the search")
    parser.add_argument("--search-only", action="store_true", help="no single lambdas")
    parser.add_argument("--lambdas", help=argparse.SUPPRESS)
    parser.add_argument("--wrap", default="", help="words before the command of each measured process")
    parser.add_argument("--write", action="store_true", help="store the tables in benchmarks/results/")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--lam", type=float, default=1.0, help=argparse.SUPPRESS)
    parser.add_argument("--data", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        torch.set_num_threads(arguments.threads)
        print(json.dumps(SIDES[arguments.side](arguments)))
        return
    with tempfile.TemporaryDirectory() as folder:
        arguments.data = f"{folder}/data.npz"
        shape = arguments.samples, arguments.dim, arguments.classes
        arrays = features_of_images(arguments.images, arguments.samples) if arguments.images else mixtures(*shape)
        np.savez(arguments.data, **arrays)
        table = report(
            arguments,
            [*([] if arguments.search_only else [*single_lambdas(arguments), ""]), *the_search(arguments, folder)],
        )
    print(table)
    if arguments.write:
        RESULTS.mkdir(exist_ok=True)
        of = "images" if arguments.images else "mixtures"
        with open(RESULTS / f"{date.today().isoformat()}_probe_{of}.md", "a") as file:
            file.write(f"\n{table}")


# ----------------------------------------------------------------------------------------- what a measured process does


def fit_ours(arguments: argparse.Namespace) -> dict:
    split = read(arguments)
    start = time.perf_counter()
    fit = split.regression().fit(arguments.lam)
    seconds = time.perf_counter() - start
    return result(arguments, seconds, fit.iterations, fit.converged, fit.weight, fit.bias)


def search_ours(arguments: argparse.Namespace) -> dict:
    split = read(arguments)
    start = time.perf_counter()
    best, rows = search(*divide(split, 0), "top1")
    fit = split.regression().fit(best.lam, best)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "best": fit.lam, "iterations": fit.iterations, "rows": rows}


def fit_scikit_learn(arguments: argparse.Namespace) -> dict:
    from sklearn.linear_model import LogisticRegression

    split = read(arguments)
    features, targets = split.features.double().numpy(), split.targets.numpy()
    start = time.perf_counter()
    fit = LogisticRegression(C=1 / arguments.lam, tol=arguments.tol, max_iter=arguments.max_iter).fit(
        features, targets
    )
    seconds = time.perf_counter() - start
    iterations = int(fit.n_iter_[0])
    weight, bias = torch.from_numpy(fit.coef_), torch.from_numpy(fit.intercept_)
    return result(arguments, seconds, iterations, iterations < arguments.max_iter, weight, bias)


def search_scikit_learn(arguments: argparse.Namespace) -> dict:
    """Fits for the same lambdas, from the strongest penalty on, each from the solution before; then one of all samples."""
    from sklearn.linear_model import LogisticRegression

    split = read(arguments)
    kept, _ = divide(split, 0)
    lambdas, best = json.loads(Path(arguments.lambdas).read_text())
    peer = LogisticRegression(tol=arguments.tol, max_iter=arguments.max_iter, warm_start=True)
    seconds, rows = 0.0, []
    for part, lam in [*((kept, lam) for lam in sorted(lambdas, reverse=True)), (split, best)]:
        features, targets = part.features.double(), part.targets
        start = time.perf_counter()
        peer.set_params(C=1 / lam).fit(features.numpy(), targets.numpy())
        seconds += time.perf_counter() - start
        weight = torch.from_numpy(peer.coef_)
        losses = F.cross_entropy(features @ weight.T + torch.from_numpy(peer.intercept_), targets, reduction="sum")
        count = int(peer.n_iter_[0])
        row = {"lambda": lam, "loss": (losses + lam / 2 * weight.square().sum()).item(), "iterations": count}
        rows.append(row | {"converged": count < arguments.max_iter})
    return {"seconds": seconds, "rows": rows[-2::-1], "iterations": rows[-1]["iterations"]}


SIDES = {
    "hfclip": fit_ours,
    "search": search_ours,
    "scikit-learn": fit_scikit_learn,
    "scikit-learn's search": search_scikit_learn,
}


def read(arguments: argparse.Namespace) -> Split:
    with np.load(arguments.data) as file:
        features, targets = torch.from_numpy(file["features"]), torch.from_numpy(file["targets"])
    torch.ones(999, 999).mm(torch.ones(999, 999))  # threads are started
    labels = [str(label) for label in range(int(targets.max()) + 1)]
    return Split(LabelledFolder(labels, [], None), features, features[:, :1], targets)


def result(arguments, seconds, iterations, converged, weight, bias) -> dict:
    """What is asked about a fit; its loss and predictions are computed here, from float64."""
    with np.load(arguments.data) as file:
        features, targets, new = (torch.from_numpy(file[name]) for name in ("features", "targets", "new"))
    losses = F.cross_entropy(features.double() @ weight.T + bias, targets, reduction="sum")
    loss = (losses + arguments.lam / 2 * weight.square().sum()).item()
    predicted = (new.double() @ weight.T + bias).argmax(1).tolist()
    return {"seconds": seconds, "iterations": iterations, "converged": converged, "loss": loss, "predicted": predicted}


# -------------------------------------------------------------------------------------------------------------- tables


def measured(arguments: argparse.Namespace, side: str, **options) -> dict:
    """The result of a process."""
    options = (
        {name: getattr(arguments, name) for name in ("data", "threads", "tol", "max_iter")} | {"side": side} | options
    )
    flags = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    environment = {**os.environ, **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(arguments.threads))}
    command = [*shlex.split(arguments.wrap), sys.executable, __file__, *flags]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    return json.loads(output.strip().splitlines()[-1])


def single_lambdas(arguments: argparse.Namespace) -> list[str]:
    lines = [
        "| lambda | hfclip | scikit-learn | ratio | iterations | losses, relative difference | same predictions |",
        "|---|---|---|---|---|---|---|",
    ]
    for lam in LAMBDAS:
        ours, theirs = (measured(arguments, side, lam=lam) for side in ("hfclip", "scikit-learn"))
        ratio, difference = theirs["seconds"] / ours["seconds"], ours["loss"] / theirs["loss"] - 1
        same = np.mean(np.array(ours["predicted"]) == theirs["predicted"])
        lines.append(
            f"| {lam:g} | {ours['seconds']:.2f} s | {theirs['seconds']:.1f} s | {ratio:.1f} | "
            f"{iterations(ours)}, {iterations(theirs)} | {difference:+.1e} | {same:.2%} |"
        )
        print(lines[-1], flush=True)
    return lines


def iterations(result: dict) -> str:
    return f"{result['iterations']}{'' if result['converged'] else ' (not converged)'}"


def the_search(arguments: argparse.Namespace, folder: str) -> list[str]:
    ours = measured(arguments, "search")
    Path(folder, "lambdas.json").write_text(json.dumps([[row["lambda"] for row in ours["rows"]], ours["best"]]))
    options = {"tol": arguments.search_tol, "max_iter": arguments.search_iterations}
    theirs = measured(arguments, "scikit-learn's search", lambdas=f"{folder}/lambdas.json", **options)
    ratio = theirs["seconds"] / ours["seconds"]
    lines = [
        "| the search, with the last fit | hfclip | scikit-learn | ratio |",
        "|---|---|---|---|",
        f"| {len(ours['rows']) + 1} fits | {ours['seconds']:.2f} s | {theirs['seconds']:.1f} s | {ratio:.1f} |",
        "",
        "| lambda | iterations of hfclip | of scikit-learn | losses, relative difference |",
        "|---|---|---|---|",
    ]
    for row, other in zip(ours["rows"], theirs["rows"], strict=True):
        difference = row["loss"] / other["loss"] - 1
        lines.append(f"| {row['lambda']:.2g} | {iterations(row)} | {iterations(other)} | {difference:+.1e} |")
    lines.append(f"| {ours['best']:.2g}, of all samples | {ours['iterations']} | {theirs['iterations']} | |")
    return lines


def report(arguments: argparse.Namespace, tables: list[str]) -> str:
    split = read(arguments)
    (num_samples, dim), num_classes = split.features.shape, len(split.folder.labels)
    kind = f"of a random ViT, of images of {Path(arguments.images).name}" if arguments.images else "of random clusters"
    return "\n".join(
        [
            f"# Logistic regression beside scikit-learn {version('scikit-learn')}, {date.today().isoformat()}",
            "",
            f"{num_samples:,} features of {dim} dimensions {kind}, {num_classes} classes, {arguments.threads} threads of "
            f"{platform.machine()} ({os.cpu_count()} cores), torch {torch.__version__}, hfclip {hfclip.__version__}. "
            f"scikit-learn in float64 with tol={arguments.tol:g}, in the search {arguments.search_tol:g}. Ratio above 1: hfclip "
            "takes less; a difference below 0: its loss is lower. `python benchmarks/probe.py --write`",
            "",
            *tables,
            "",
        ]
    )


if __name__ == "__main__":
    main()
