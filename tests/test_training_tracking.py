"""FLOPs against published figures and torch's counter, the stopwatch, the trace, the log, trackers and curves."""

import gzip
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from training_utils import ROOT, environment, tiny_recipe
from transformers import BertConfig, Dinov2Config, SiglipTextConfig, SwinConfig

from hfclip import HFCLIPConfig, HFCLIPModel
from hfclip.errors import UsageError
from hfclip.evaluation import Result
from hfclip.flops import ModelFlops, _measure, measured_peak
from training.config import Config
from training.data.batches import COUNTED
from training.report.curves import draw_curves, draw_losses, read_metrics
from training.report.timing import WARM_UP, Stopwatch, trace
from training.report.tracking import Tracking


CPU = torch.device("cpu")
VIT = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2}
VIT |= {"image_size": 32, "patch_size": 8}
TEXT = {"hidden_size": 48, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 3}
TEXT |= {"vocab_size": 600, "bos_token_id": 598, "eos_token_id": 599, "max_position_embeddings": 20}
RESNET = {"model_type": "hfclip_resnet", "depths": [2, 1, 3, 1], "stem_width": 8, "image_size": 64}
BAG_OF_WORDS = {name: TEXT[name] for name in ("vocab_size", "bos_token_id", "eos_token_id", "hidden_size")}
BAG_OF_WORDS |= {"model_type": "hfclip_bag_of_words", "max_position_embeddings": 20}

DINO = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
SWIN = SwinConfig(image_size=64, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4)
SIZES = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3}
SIGLIP = SiglipTextConfig(**SIZES, vocab_size=600, max_position_embeddings=20, pad_token_id=1)
BERT = BertConfig(**SIZES, vocab_size=600, max_position_embeddings=20)

# GFLOPs of an image and a text of 77 tokens together, as OpenCLIP's model profile prints them.
PUBLISHED = {"RN50": 18.18, "RN50x4": 51.82, "ViT-B/32": 14.78, "ViT-L/14@336px": 395.22}


def counted(function) -> int:
    """FLOPs by torch's counter. It knows some fused attention kernels only, and those count what they compute again."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return counter.get_total_flops()


def tiny_model(vision: dict, text: dict) -> HFCLIPModel:
    return HFCLIPModel(HFCLIPConfig(vision_config=vision, text_config=text, projection_dim=24)).train()


def batch_of(model: HFCLIPModel, num_pairs: int, length: int) -> dict[str, torch.Tensor]:
    """Pairs whose texts have `length` tokens. Texts are packed in multiples of 64 tokens: make it one."""
    input_ids = torch.full((num_pairs, length), 7)
    input_ids[:, -1] = 599
    size = model.config.image_size
    return {
        "pixel_values": torch.rand(num_pairs, 3, size, size),
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
    }


# ---------------------------------------------------------------------------------------------------------------------
# FLOPs
# ---------------------------------------------------------------------------------------------------------------------


def all_positions(model: HFCLIPModel) -> int:
    """What published figures of an image count and no product here computes: positions that nobody reads."""
    config = model.config.vision_config
    if config.model_type == "hfclip_vit":
        pixels = torch.zeros(1, 3, config.image_size, config.image_size, device="meta")
        return counted(lambda: model.get_image_features(pixels)) - counted(lambda: model.encode_image(pixels))
    positions, width = (config.image_size // 32) ** 2, config.hidden_size  # of the attention pool, beside its query
    return 2 * positions * width * (width + 2 * (positions + 1) + config.projection_dim)


@pytest.mark.parametrize("name", PUBLISHED)
def test_flops_of_the_presets_are_the_published_ones(name):
    flops = ModelFlops(HFCLIPConfig.from_preset(name))
    measured = flops.of_image().forward + flops.of_text(77).forward + all_positions(flops.model)
    assert round(measured / 1e9, 2) == PUBLISHED[name]


@pytest.mark.parametrize("freeze", ["none", "vision", "text"])
@pytest.mark.parametrize(
    ("vision", "text"),
    [
        (VIT, TEXT),
        ({**VIT, "patch_dropout": 0.6}, TEXT),
        ({**VIT, "pooling": "norm_of_mean", "pre_layer_norm": False}, {**TEXT, "causal": False, "pooling": "last"}),
        (RESNET, TEXT),
        (VIT, BAG_OF_WORDS),
        (DINO, SIGLIP),
        (SWIN, BERT),
    ],
    ids=["vit", "patch_dropout", "unlike_openai", "resnet", "bag_of_words", "dino_siglip", "swin_bert"],
)
def test_flops_of_a_training_step_are_those_that_torch_counts(vision, text, freeze):
    model = tiny_model(vision, text)
    if freeze != "none":
        model.freeze(freeze)
    model.set_attn_implementation("eager")
    batch = batch_of(model, num_pairs=8, length=16)

    def step():
        embeds = model(**batch, embeds_only=True)
        (embeds.image_embeds.sum() + embeds.text_embeds.sum()).backward()

    expected, flops = counted(step), ModelFlops(model.config, freeze)
    assert flops.of_batch(batch) == expected
    assert 8 * (flops.of_image().training + flops.of_text(16).training) == expected


def test_flops_of_a_batch_follow_its_image_size_its_dropped_patches_and_its_real_tokens():
    flops, mask = ModelFlops(tiny_model(VIT, TEXT).config), torch.zeros(3, 20, dtype=torch.long)
    for row, length in enumerate((3, 20, 3)):
        mask[row, :length] = 1
    batch = {"pixel_values": torch.zeros(2, 3, 48, 48), "attention_mask": mask}
    short, full, large = flops.of_text(3).training, flops.of_text(20).training, flops.of_image(48).training
    assert flops.of_batch(batch) == 2 * large + 2 * short + full
    assert short < full and large > flops.of_image().training > flops.of_image(patch_dropout=0.5).training
    assert flops.of_batch(batch, patch_dropout=0.5) < flops.of_batch(batch)
    count, seconds = 0, time.perf_counter()
    while count < 100:
        count += flops.of_batch(batch) > 0
    assert time.perf_counter() - seconds < 0.3  # 3 ms, where a step takes hundreds; on an idle machine 0.03


def test_grouped_convolutions_cost_their_part_in_both_passes():
    conv = torch.nn.Conv2d(8, 8, 3, padding=1, groups=8, device="meta")
    flops = _measure(lambda: conv(torch.zeros(2, 8, 16, 16, device="meta", requires_grad=True)))
    assert flops.forward == 2 * 16**2 * 9 * 8 and flops.training == 3 * flops.forward


def test_a_tower_that_needs_values_is_not_counted_and_does_not_end_the_run(caplog):
    flops = ModelFlops(tiny_model(VIT, TEXT).config)
    flops.model.vision_model.register_forward_pre_hook(lambda module, inputs: flops.model.logit_scale.item())
    batch = {"pixel_values": torch.zeros(2, 3, 32, 32), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    assert [flops.of_batch(batch) for _ in range(2)] == [None, None]
    assert len(caplog.records) == 1 and "FLOPs are not counted" in caplog.text


def test_measured_peak_is_the_speed_of_matrix_products():
    left, right = torch.rand(2, 768, 768)

    def agrees() -> bool:
        times = []
        for _ in range(20):
            start = time.perf_counter()
            left @ right
            times.append(time.perf_counter() - start)
        return measured_peak(CPU, torch.float32) == pytest.approx(2 * 768**3 / min(times), rel=0.7)

    assert any(agrees() for _ in range(10))  # other processes may take the cores during one of the two


# ---------------------------------------------------------------------------------------------------------------------
# Stopwatch and trace
# ---------------------------------------------------------------------------------------------------------------------


def test_stopwatch_adds_up_the_times_of_a_phase_and_starts_anew_when_read():
    stopwatch = Stopwatch(CPU)
    start = time.perf_counter()
    for pause in (0.2, 0.3):
        with stopwatch.time("forward"):
            time.sleep(pause)
        with stopwatch.time("loss"):
            time.sleep(0.001)
    taken = time.perf_counter() - start
    stopwatch.collect()
    seconds = stopwatch.read()
    assert list(seconds) == ["forward", "loss"]
    # A sleep may be long on a busy machine, but is never short.
    assert 0.5 <= seconds["forward"] and 0.002 <= seconds["loss"] < seconds["forward"]
    assert sum(seconds.values()) <= taken
    assert stopwatch.read() == {}


def test_time_of_a_phase_inside_another_is_its_own_alone():
    stopwatch, start = Stopwatch(CPU), time.perf_counter()
    with pytest.raises(ArithmeticError), stopwatch.time("backward"):
        for _ in range(2):
            with stopwatch.time("forward"):
                time.sleep(0.2)
        time.sleep(0.02)
        raise ArithmeticError("a phase ends with an error, too")
    taken = time.perf_counter() - start
    time.sleep(0.6)
    with stopwatch.time("update"):
        pass
    seconds = stopwatch.read()
    assert 0.4 <= seconds["forward"] and 0.02 <= seconds["backward"] and seconds["update"] < seconds["forward"]
    assert seconds["forward"] + seconds["backward"] <= taken  # counted once


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_stopwatch_measures_the_device_without_waiting_for_it():
    device = torch.device("cuda")
    stopwatch, left = Stopwatch(device), torch.rand(4096, 4096, device=device)
    left @ left
    torch.cuda.synchronize()
    start = time.perf_counter()
    with stopwatch.time("forward"):
        for _ in range(100):
            left @ left
    queued = time.perf_counter() - start
    stopwatch.collect()
    torch.cuda.synchronize()
    computed = time.perf_counter() - start
    assert stopwatch.read()["forward"] == pytest.approx(computed, rel=0.2) and queued < computed / 2


def run_traced(folder: Path, num_steps: int, length: int) -> list[str]:
    """What a run of `length` steps says that traces `num_steps` of them."""
    said, stopwatch = [], Stopwatch(CPU)
    with trace(num_steps, folder, said.append) as step_ended:
        for _ in range(length):
            with stopwatch.time("forward"):
                torch.rand(8, 8) @ torch.rand(8, 8)
            step_ended()
    return said


def traced_steps(folder: Path) -> set[str]:
    events = json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))["traceEvents"]
    assert sum(event["name"] == "forward" for event in events) == sum(
        event["name"] == "aten::matmul" for event in events
    )
    return {event["name"] for event in events if event["name"].startswith("ProfilerStep#")}


def test_trace_holds_the_steps_after_those_to_warm_up(tmp_path):
    (said,) = run_traced(tmp_path / "profile", num_steps=2, length=WARM_UP + 4)
    assert traced_steps(tmp_path / "profile") == {f"ProfilerStep#{WARM_UP}", f"ProfilerStep#{WARM_UP + 1}"}
    table = (tmp_path / "profile" / "operators.txt").read_text()
    assert re.search(r"aten::mm\s", table) and str(tmp_path / "profile") in said


def test_trace_of_a_run_that_ends_early_holds_the_steps_it_did(tmp_path):
    assert len(run_traced(tmp_path, num_steps=50, length=WARM_UP + 1)) == 1
    assert f"ProfilerStep#{WARM_UP}" in traced_steps(tmp_path)


def test_trace_says_that_there_is_none_of_a_run_of_few_steps(tmp_path):
    (said,) = run_traced(tmp_path / "profile", num_steps=2, length=WARM_UP - 1)
    assert "No step was traced" in said and not (tmp_path / "profile").exists()


def test_trace_of_no_steps_does_nothing(tmp_path):
    assert run_traced(tmp_path / "profile", num_steps=0, length=WARM_UP + 2) == []
    assert not (tmp_path / "profile").exists()


# ---------------------------------------------------------------------------------------------------------------------
# The log
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tracking_of(tmp_path):
    """Makes the `Tracking` of a run in `tmp_path` with a real Accelerator, whose state is for this test alone."""
    AcceleratorState._reset_state(reset_partial_state=True)

    def make(
        start: int = 0, trackers: tuple[str, ...] = (), log_every: int = 2, tracked: dict | None = None
    ) -> Tracking:
        run = {"trackers": list(trackers), "log_every": log_every}
        config = Config.from_dict(tiny_recipe(tmp_path, run=run))
        Path(config.run.output_dir).mkdir(exist_ok=True)
        accelerator = Accelerator(cpu=True, log_with=list(trackers) or None, project_dir=config.run.output_dir)
        return Tracking(accelerator, config, start, 100, tracked=tracked)

    yield make
    AcceleratorState._reset_state(reset_partial_state=True)


def metrics(loss: float = 2.0, skipped: bool = False) -> dict:
    about = {"lr": 1e-3, "logit_scale": torch.tensor(14.0), "epoch": 0.5}
    return {"loss": loss, "grad_norm": 2 * loss, "skipped": skipped, **about}


NO_COUNTS = torch.zeros(len(COUNTED), dtype=torch.long)


def test_line_holds_means_of_the_good_steps_and_the_last_of_everything_else(tracking_of, tmp_path):
    tracking = tracking_of(log_every=3)
    tracking.step(1, metrics(loss=1.0), 0.1, NO_COUNTS + 1)
    tracking.step(2, metrics(loss=float("nan"), skipped=True), 0.1, NO_COUNTS)
    tracking.step(3, {**metrics(loss=4.0), "lr": 5e-4, "distill_loss": 0.25}, 0.1, NO_COUNTS)
    (line,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    expected = {"step": 3, "loss": 2.5, "grad_norm": 5.0, "lr": 5e-4, "logit_scale": 14.0, "epoch": 0.5}
    expected |= {"distill_loss": 0.25, "skipped_steps": 1, **dict.fromkeys(COUNTED, 1)}
    assert expected.items() <= line.items()
    assert line["data_time"] == pytest.approx(0.1, rel=1e-12)
    assert not {"tflops", "share_of_peak"} & line.keys()  # not counted: left out, not zero


def test_line_of_nothing_but_skipped_steps_has_no_loss(tracking_of, tmp_path):
    tracking = tracking_of(log_every=1)
    tracking.step(1, metrics(loss=float("inf"), skipped=True), 0.0, NO_COUNTS)
    (line,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert line["loss"] is None and line["grad_norm"] is None and line["skipped_steps"] == 1


def test_times_of_the_phases_are_per_step_and_within_the_step(tracking_of, tmp_path):
    start = time.perf_counter()
    tracking = tracking_of()
    pauses = {"forward": 0.02, "loss": 0.005, "backward": 0.04, "update": 0.01}
    for step in (1, 2, 3, 4):
        for phase, pause in pauses.items():
            with tracking.watch.time(phase):
                time.sleep(pause)
        with tracking.paused():
            time.sleep(0.1)
        tracking.step(step, metrics(), 0.0, NO_COUNTS, flops=10**9)
    taken = time.perf_counter() - start
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    line = lines[-1]
    for phase, pause in pauses.items():  # a sleep may be long on a busy machine, but is never short
        assert pause <= line[f"{phase}_time"]
    assert sum(line[f"{phase}_time"] for phase in pauses) <= line["step_time"]
    # A line is of two steps; the pauses, 0.1 s a step, do not count.
    assert sum(2 * line["step_time"] for line in lines) <= taken - 0.4
    # tiny_recipe has 16 pairs a step
    assert line["samples_per_second"] == pytest.approx(16 / line["step_time"], rel=1e-9)
    assert line["tflops"] == pytest.approx(1e-3 / line["step_time"], rel=1e-9)
    assert line["share_of_peak"] == pytest.approx(line["tflops"] * 1e12 / tracking.peak, rel=1e-9)


def test_time_before_the_start_does_not_count(tracking_of, tmp_path):
    tracking = tracking_of(log_every=1)
    time.sleep(0.2)
    start = time.perf_counter()
    tracking.start()
    tracking.step(1, metrics(), 0.0, NO_COUNTS)
    taken = time.perf_counter() - start
    assert 0 < read_metrics(tmp_path / "run" / "metrics.jsonl")[0]["step_time"] <= taken


def test_last_steps_of_a_run_have_a_line(tracking_of, tmp_path):
    tracking = tracking_of(start=96, log_every=3)
    for step in (97, 98, 99, 100):
        tracking.step(step, metrics(loss=step), 0.0, NO_COUNTS)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [(line["step"], line["loss"]) for line in lines] == [(99, 98.0), (100, 100.0)]


def test_resumed_run_forgets_the_lines_that_it_writes_again(tracking_of, tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    path.parent.mkdir()
    lines = [{"step": step, "loss": 1 / step} for step in (2, 4, 6)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 8, "lo')
    tracking = tracking_of(start=4)
    assert path.read_text() == "".join(json.dumps(line) + "\n" for line in lines[:2])
    for step in (5, 6):
        tracking.step(step, metrics(), 0.0, NO_COUNTS)
    assert [line["step"] for line in read_metrics(path)] == [2, 4, 6]
    assert os.listdir(path.parent) == ["metrics.jsonl"]


def test_trackers_get_the_numbers_of_the_log(tracking_of, tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tracking = tracking_of(trackers=("tensorboard",))
    for step in (1, 2, 3, 4):
        tracking.step(step, metrics(loss=step, skipped=step > 2), 0.0, NO_COUNTS + 1, flops=10**9)
    tracking.evaluation(4, {"zero_shot": Result({"top1": 0.5, "top5": 0.9}, headline="top1")})
    tracking.accelerator.end_training()
    first, second, evaluation = read_metrics(tmp_path / "run" / "metrics.jsonl")
    events = reader.EventAccumulator(str(tmp_path / "run" / "hfclip")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [2]  # the line without a loss has none there either
    for name in first.keys() - {"step"}:
        # TensorBoard keeps float32.
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        logged = [(line["step"], line[name]) for line in (first, second) if line[name] is not None]
        assert shown == [(step, pytest.approx(value, rel=1e-6)) for step, value in logged], name
    assert events.Scalars("zero_shot/top1")[0].value == evaluation["zero_shot/top1"]
    assert evaluation["headlines"] == ["zero_shot/top1"] and "zero_shot/top5" in evaluation
    settings = "".join(path.read_text() for path in (tmp_path / "run").rglob("hparams.yml"))
    assert "optim.batch_size: 16\n" in settings and "model.config.vision_config.patch_size: 8\n" in settings


def test_resumed_run_has_each_step_once_in_tensorboard(tracking_of, tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for start in (0, 4):
        tracking = tracking_of(start=start, trackers=("tensorboard",))
        for step in range(start + 1, 9):
            tracking.step(step, metrics(loss=step), 0.0, NO_COUNTS)
        tracking.accelerator.end_training()
        time.sleep(1.1)  # event files are in the order of their names, which have seconds
    events = reader.EventAccumulator(str(tmp_path / "run" / "hfclip")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [2, 4, 6, 8]


def test_resumed_run_goes_on_in_its_run_of_wandb(tracking_of, tmp_path, monkeypatch):
    """Also where its folder has another name now; a new run is a new one there, too."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    known = []
    for tracked in ({}, "of the first", {}):
        tracking = tracking_of(start=0, trackers=("wandb",), tracked=known[0] if tracked else None)
        known.append(json.loads(json.dumps(tracking.tracked)))
        tracking.step(2, metrics(), 0.0, NO_COUNTS)
        tracking.accelerator.end_training()
    first, resumed, other = (entry["wandb"] for entry in known)
    assert first == resumed and first["name"] == "run" and other["id"] != first["id"]
    folders = [path.name for path in (tmp_path / "run" / "wandb").glob("offline-run-*")]
    assert {name.rsplit("-", 1)[1] for name in folders} == {first["id"], other["id"]}


def test_rejects_a_tracker_that_does_not_start(tracking_of, tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "hfclip").write_text("in the way of TensorBoard's folder")
    with pytest.raises(UsageError, match=r"run\.trackers: .*hfclip"):
        tracking_of(trackers=("tensorboard",))


# ---------------------------------------------------------------------------------------------------------------------
# Curves
# ---------------------------------------------------------------------------------------------------------------------


def write_run(folder: Path, slope: float = 0.1, evaluated: bool = True) -> Path:
    lines = [{"step": step, **metrics(4 - slope * step), "samples_per_second": 50} for step in range(1, 31)]
    lines = [{**line, "logit_scale": 14.0} for line in lines]
    lines[3] |= {"loss": None, "grad_norm": None}
    if evaluated:
        lines += [
            {"step": step, "zero_shot/top1": step / 40, "retrieval/recall@1": step / 50} for step in (10, 20, 30)
        ]
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 31, "lo')
    return folder


def inked(picture: Path, color: tuple[int, int, int]) -> np.ndarray:
    """(height, width) where a picture has this color, or nearly, as on the edges of lines."""
    pixels = np.asarray(Image.open(picture).convert("RGB"), dtype=int)
    return (abs(pixels - color) < 60).all(axis=-1)


BLUE, ORANGE = (31, 119, 180), (255, 127, 14)  # matplotlib's first lines


@pytest.mark.parametrize("evaluated", [True, False])
def test_curves_have_a_panel_for_each_metric(tmp_path, evaluated):
    pytest.importorskip("matplotlib")
    picture = draw_curves(write_run(tmp_path / "run", evaluated=evaluated))
    assert picture == tmp_path / "run" / "curves.png"
    rows = np.array_split(inked(picture, BLUE), 2, axis=0)
    panels = [panel.any() for row in rows for panel in np.array_split(row, 3, axis=1)]
    assert panels == [True] * 5 + [evaluated]
    assert inked(picture, ORANGE).any() == evaluated
    assert sorted(os.listdir(tmp_path / "run")) == ["curves.png", "metrics.jsonl"]


def test_run_of_one_line_has_points_that_are_seen(tmp_path):
    pytest.importorskip("matplotlib")
    write_run(tmp_path / "run")
    line = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0]
    (tmp_path / "run" / "metrics.jsonl").write_text(line + "\n")
    rows = np.array_split(inked(draw_curves(tmp_path / "run"), BLUE), 2, axis=0)
    points = [panel.sum() for row in rows for panel in np.array_split(row, 3, axis=1)][:5]
    assert min(points) > 80, points  # pixels: a disc of 10 across


def test_run_without_steps_has_no_curves(tmp_path):
    assert draw_curves(tmp_path) is None
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "zero_shot/top1": 0.1}\n')
    assert draw_curves(tmp_path) is None and not (tmp_path / "curves.png").exists()


def test_losses_of_equal_runs_lie_on_each_other(tmp_path):
    pytest.importorskip("matplotlib")
    runs = [write_run(tmp_path / name, slope) for name, slope in (("a", 0.1), ("b", 0.1), ("c", 0.05))]
    widest = []  # vertical distances of the first run's pixels from the second's, in the columns that have both
    for second in runs[1:]:
        picture = draw_losses([runs[0], second], tmp_path / "overlay.png")
        blue, orange = (inked(picture, color)[:, 100:600].T for color in (BLUE, ORANGE))  # left of the legend
        both = [(b.nonzero()[0], o.nonzero()[0]) for b, o in zip(blue, orange, strict=True) if b.any() and o.any()]
        assert len(both) > 250
        widest.append(max(abs(b[:, None] - o).max() for b, o in both))
    # Of equal runs, the second lies on the first, a line of 4 pixels with a marker of 10.
    assert widest[0] <= 12 and widest[1] > 60


def curves_command(*arguments: str | Path, without: Path | None = None) -> subprocess.CompletedProcess:
    line = [sys.executable, str(ROOT / "training" / "curves.py"), *map(str, arguments)]
    paths = {"PYTHONPATH": f"{without}:{environment()['PYTHONPATH']}"} if without else {}
    return subprocess.run(line, env={**environment(), **paths}, capture_output=True, text=True, timeout=60)


def test_curves_are_a_command(tmp_path):
    pytest.importorskip("matplotlib")
    runs = [write_run(tmp_path / name) for name in ("a", "b")]
    overlay = curves_command(*runs, "--out", tmp_path / "overlay.png")
    assert overlay.returncode == 0 and Image.open(tmp_path / "overlay.png").size[0] > 500, overlay.stderr
    each = curves_command(*runs)
    assert each.returncode == 0 and all((run / "curves.png").is_file() for run in runs), each.stderr
    wrong = curves_command(tmp_path)
    assert wrong.returncode == 2 and "found no metrics.jsonl" in wrong.stderr


@pytest.mark.parametrize("out", ["overlay.jpg", "overlay", "no_such_folder/overlay.png"])
def test_command_refuses_a_picture_that_it_cannot_write(out, tmp_path):
    result = curves_command(write_run(tmp_path / "run"), "--out", tmp_path / out)
    assert result.returncode == 2 and "expected a file that ends with .png, in a folder that exists" in result.stderr
    assert not (tmp_path / out).exists()


def test_command_names_what_is_missing(tmp_path):
    without = tmp_path / "without"
    without.mkdir()
    (without / "matplotlib.py").write_text("raise ImportError('as if it were not installed')")
    result = curves_command(write_run(tmp_path / "run"), without=without)
    assert result.returncode == 2 and "pip install matplotlib" in result.stderr and "Traceback" not in result.stderr


def test_what_hinders_the_curves_of_a_run_is_said_once(tmp_path):
    pytest.importorskip("matplotlib")
    said, run = [], write_run(tmp_path / "run")
    (run / "curves.png").mkdir()  # in the way
    assert [draw_curves(run, said.append) for _ in range(2)] == [None, None]
    assert len(said) == 1 and said[0].startswith("No curves.png: ")
    (run / "curves.png").rmdir()
    assert draw_curves(run, said.append) == run / "curves.png" and len(said) == 1
