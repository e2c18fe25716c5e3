"""Latency beside transformers and OpenCLIP: the same weights, one process, in turns.

    python benchmarks/latency.py                            # on the CPU, batch 1
    python benchmarks/latency.py --device cuda --write      # batch 1 to 1,024, bf16, with and without CUDA graphs

Each model gets images, and captions of 13 tokens: alone, and padded to 77 as OpenCLIP's tokenizer makes them (OpenCLIP
takes no others). Embeddings are compared before they are timed. A round calls each contender in turn; times are medians
over rounds, and the ratio is the median of the rounds' ratios to the faster peer (above 1: hfclip is faster). Where
open_clip is not installed, transformers is the only peer.
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from transformers import CLIPModel

import hfclip
from hfclip import HFCLIPConfig, HFCLIPModel


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
RESULTS = Path(__file__).parent / "results"
TOKENS = 13
Contenders = dict[str, Callable[[], torch.Tensor]]


def build(name: str) -> HFCLIPModel:
    """ViT-B/32, or a model of its depth that is so small that only the calls themselves cost."""
    torch.manual_seed(0)
    if name == "ViT-B/32":
        return HFCLIPModel(HFCLIPConfig.from_preset(name))
    tower = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 1, "num_hidden_layers": 12}
    return HFCLIPModel(HFCLIPConfig(vision_config=dict(tower), text_config=dict(tower), projection_dim=64))


def peers_of(model: HFCLIPModel, device: torch.device, dtype: torch.dtype) -> dict[str, torch.nn.Module]:
    """hfclip, transformers, and OpenCLIP where it is installed, with the same weights."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        models = {"hfclip": HFCLIPModel.from_pretrained(folder), "transformers": to_transformers(model)}
        if find_spec("open_clip"):
            models["OpenCLIP"] = to_openclip(model)
    return {name: other.to(device, dtype).eval() for name, other in models.items()}


def to_transformers(model: HFCLIPModel) -> CLIPModel:
    towers = {}
    for key, own in (("text_config", model.config.text_config), ("vision_config", model.config.vision_config)):
        names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "hidden_act")
        towers[key] = {name: getattr(own, name) for name in names}
    towers["text_config"] |= {"bos_token_id": 49406, "eos_token_id": 49407}
    theirs = CLIPModel(transformers.CLIPConfig(**towers, projection_dim=model.config.projection_dim))
    missing, unexpected = theirs.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected and all("position_ids" in name for name in missing), (missing, unexpected)
    return theirs


def to_openclip(model: HFCLIPModel) -> torch.nn.Module:
    import open_clip
    from open_clip.model import CLIP

    from hfclip.foreign.key_maps import openai_items

    text, vision = model.config.text_config, model.config.vision_config
    theirs = CLIP(
        embed_dim=model.config.projection_dim,
        vision_cfg=open_clip.CLIPVisionCfg(
            layers=vision.num_hidden_layers,
            width=vision.hidden_size,
            head_width=vision.hidden_size // vision.num_attention_heads,
            patch_size=vision.patch_size,
            image_size=vision.image_size,
        ),
        text_cfg=open_clip.CLIPTextCfg(
            context_length=text.max_position_embeddings,
            vocab_size=text.vocab_size,
            width=text.hidden_size,
            heads=text.num_attention_heads,
            layers=text.num_hidden_layers,
        ),
        quick_gelu=True,
    )
    theirs.load_state_dict(dict(openai_items(model.state_dict())))
    return theirs


def inputs_of(batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 49000, (batch, TOKENS), generator=generator)
    ids[:, 0], ids[:, -1] = 49406, 49407
    padded = torch.nn.functional.pad(ids, (0, 77 - TOKENS))
    pixels = torch.randn(batch, 3, 224, 224, generator=generator)
    return {"image": pixels.to(device, dtype), "text": ids.to(device), "text of 77": padded.to(device)}


def contenders(models: dict, kind: str, value: torch.Tensor) -> Contenders:
    """What each model is asked for: unit embeddings of images or texts."""
    ours, theirs, openclip = models["hfclip"], models["transformers"], models.get("OpenCLIP")
    unit = lambda outputs: torch.nn.functional.normalize(outputs.pooler_output, dim=-1)
    if kind == "image":
        asked: Contenders = {
            "hfclip": lambda: ours.encode_image(value),
            "transformers": lambda: unit(theirs.get_image_features(value)),
        }
        if openclip:
            asked["OpenCLIP"] = lambda: openclip.encode_image(value, normalize=True)
        return asked
    asked = {
        "hfclip": lambda: ours.encode_text(value),
        "transformers": lambda: unit(theirs.get_text_features(value)),
    }
    if openclip and value.shape[1] == 77:
        asked["OpenCLIP"] = lambda: openclip.encode_text(value, normalize=True)
    return asked


def as_cuda_graph(function: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """The same work recorded once and replayed, or the reason why it cannot be recorded."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = function()
    return lambda: (graph.replay(), output)[1]


def measure(asked: Contenders, rounds: int, calls: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds a call, one value a round, of each contender."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times: dict[str, list[float]] = {name: [] for name in asked}
    for number in range(rounds + 1):
        for name, function in asked.items():
            wait()
            start = time.perf_counter()
            for _ in range(calls):
                function()
            wait()
            if number:  # the first round warms up
                times[name].append((time.perf_counter() - start) / calls)
    return times


@torch.inference_mode()
def run(device: torch.device, dtype: torch.dtype, batches: list[int], rounds: int) -> list[str]:
    lines = []
    for name in ("12 layers of width 64", "ViT-B/32"):
        models = peers_of(build(name), device, dtype)
        for batch in batches:
            for kind, value in inputs_of(batch, device, dtype).items():
                asked = contenders(models, kind, value)
                results = {other: function().float() for other, function in asked.items()}
                tolerance = 1e-4 if dtype == torch.float32 else 3e-2
                for other, result in results.items():
                    assert (result - results["hfclip"]).abs().max() < tolerance, f"{name}, {kind}: {other} differs"
                lines.append(
                    row(f"{name}, {kind}, batch {batch}", measure(asked, rounds, calls_of(name, batch), device))
                )
                if device.type == "cuda":
                    graphs = {other: as_cuda_graph(function) for other, function in asked.items()}
                    label = f"{name}, {kind}, batch {batch}, CUDA graph"
                    lines.append(row(label, measure(graphs, rounds, calls_of(name, batch), device)))
    return lines


def calls_of(name: str, batch: int) -> int:
    return max(1, (20 if name == "ViT-B/32" else 50) // batch)


def row(label: str, times: dict[str, list[float]]) -> str:
    medians = {name: statistics.median(values) for name, values in times.items()}
    peer = min((name for name in medians if name != "hfclip"), key=medians.get)
    ratio = statistics.median(theirs / ours for ours, theirs in zip(times["hfclip"], times[peer], strict=True))
    cells = [
        f"{medians[name] * 1e3:.2f} ms" if name in medians else "-" for name in ("hfclip", "transformers", "OpenCLIP")
    ]
    line = f"| {label} | {' | '.join(cells)} | {ratio:.2f}x |"
    print(line, flush=True)
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--rounds", type=int, default=25, help="rounds of each comparison")
    parser.add_argument("--write", action="store_true", help="store the table in benchmarks/results/")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    on_gpu = device.type == "cuda"
    lines = run(
        device, torch.bfloat16 if on_gpu else torch.float32, [1, 32, 1024] if on_gpu else [1], arguments.rounds
    )
    machine = torch.cuda.get_device_name() if on_gpu else f"{platform.machine()}, {torch.get_num_threads()} threads"
    table = "\n".join([
        f"# Latency, {date.today().isoformat()}",
        "",
        f"{machine} ({os.cpu_count()} cores), torch {torch.__version__}, transformers {transformers.__version__}, hfclip "
        f"{hfclip.__version__}, {'bfloat16' if on_gpu else 'float32'}. Unit embeddings; medians of rounds in turns; the "
        "ratio is to the faster peer, above 1: hfclip is faster. `python benchmarks/latency.py`",
        "",
        "| work | hfclip | transformers | OpenCLIP | ratio |",
        "|---|---|---|---|---|",
        *lines,
        "",
    ])  # fmt: skip
    if arguments.write:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{date.today().isoformat()}_latency_{device.type}.md").write_text(table)


if __name__ == "__main__":
    main()
