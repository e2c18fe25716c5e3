"""Scaling against scipy's line and its interval; videos against frames chosen by hand."""

import sys

import numpy as np
import PIL.Image
import pytest
import torch

from hfclip import HFCLIPConfig, HFCLIPImageProcessor, HFCLIPModel, HFCLIPProcessor, HFCLIPTokenizer
from hfclip.data.videos import VideoFrames
from hfclip.embeddings import embed_images
from hfclip.errors import UsageError
from hfclip.evaluation import DataSet
from hfclip.evaluation.scaling import fit_power_law, scaling
from hfclip.evaluation.video import mean_of_frames, video
from hfclip.zero_shot import embed_labels


pytest.importorskip("scipy", reason="of the extra evaluate")


# ------------------------------------------------------------------------------------------------------------- scaling


def test_power_law_and_interval_are_scipys():
    from scipy.stats import linregress, t

    law = fit_power_law([1, 10, 100], [0.5, 0.5 * 10**-0.1, 0.5 * 10**-0.2])
    assert (law.factor, law.exponent, law.r2) == pytest.approx((0.5, -0.1, 1))
    generator, compute = np.random.default_rng(0), np.array([6.1, 9.9, 20.4, 76.0, 265.9])
    error = 0.7 * compute**-0.12 * np.exp(0.02 * generator.normal(size=5))
    law, line = fit_power_law(compute, error, confidence=0.9), linregress(np.log(compute), np.log(error))
    reach = t.ppf(0.95, 3) * line.stderr
    assert (law.low, law.exponent, law.high) == pytest.approx((line.slope - reach, line.slope, line.slope + reach))
    middle, low, high = law.predict([1.0, 50.0])
    assert np.log(middle[0]) == pytest.approx(line.intercept)
    assert np.log(high[0] / middle[0]) == pytest.approx(t.ppf(0.95, 3) * line.intercept_stderr)
    assert high[1] / low[1] < high[0] / low[0]  # narrower within the data


def test_interval_holds_what_it_says():
    generator, compute = np.random.default_rng(1), np.geomspace(1, 44, 6)
    inside = 0
    for _ in range(300):
        law = fit_power_law(compute, 0.6 * compute**-0.1 * np.exp(0.05 * generator.normal(size=6)))
        inside += law.low <= -0.1 <= law.high
    assert 270 <= inside <= 297


@pytest.mark.parametrize(
    "compute, error, message",
    [
        ([1, 2], [0.5, 0.4], "three models"),
        ([1, 1, 1], [0.5, 0.4, 0.3], "of 1 sizes"),
        ([1, 2, 3], [0.5, 0.4, 0], "no logarithm"),
        ([1, 2, np.nan], [0.5, 0.4, 0.3], "no logarithm"),
        ([1, 2, 3], [0.5, 0.4, 1.3], "no logarithm"),
    ],
)
def test_rejects_points_without_a_line(compute, error, message):
    with pytest.raises(UsageError, match=message):
        fit_power_law(compute, error)


def test_error_of_stored_results_against_compute(clip, tmp_path):
    results, (model, _) = [], clip
    for number, (layers, top1) in enumerate(((1, 0.3), (2, 0.42), (5, 0.5))):
        vision = {**model.config.vision_config.to_dict(), "num_hidden_layers": layers}
        HFCLIPConfig(vision_config=vision, projection_dim=16).save_pretrained(tmp_path / f"m{number}")
        about = {"task": "zero-shot", "model": {"name": str(tmp_path / f"m{number}")}, "headline": "top1"}
        results += [
            {**about, "data": [{"name": name}], "metrics": {"top1": top1 + more}} for name, more in DATA.items()
        ]
    results[0] = {**results[0], "task": "other"}  # the first model has no result on the first data set
    found = scaling(None, None, results, figure=str(tmp_path / "scaling.svg"))
    text = (tmp_path / "scaling.svg").read_text()
    assert "GFLOPs per image" in text and "m1" in text and len(found.tables["line"]) == 50
    rows = found.tables["scaling"]
    assert [row["name"] for row in rows] == ["m0", "m1", "m2"] and rows[0]["error"] == pytest.approx(0.6)
    law = fit_power_law([row["compute"] for row in rows], [0.6, 0.48, 0.4])
    assert (found.metrics["exponent"], found.metrics["exponent_low"]) == pytest.approx((law.exponent, law.low))
    assert rows[2]["compute"] > 2 * rows[1]["compute"] > 2 * rows[0]["compute"]
    (tmp_path / "compute.csv").write_text("model,compute\nm0,1e18\nm1,2e18\nm2,9e18\n")
    found = scaling(None, None, results, compute=str(tmp_path / "compute.csv"))
    assert [row["compute"] for row in found.tables["scaling"]] == [1e18, 2e18, 9e18]
    (tmp_path / "compute.csv").write_text("model,compute\nm0,1e18\nm1,2e18\n")
    for options, message in (
        (dict(compute=str(tmp_path / "compute.csv")), "m2 among them"),
        (dict(of_task="few"), "0 models"),
    ):
        with pytest.raises(UsageError, match=message):
            scaling(None, None, results, **options)


DATA = {"first": 0.05, "second": 0.1}


# -------------------------------------------------------------------------------------------------------------- videos


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(0)
    tower = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    tokenizer = HFCLIPTokenizer.train_new_from_iterator(["a photo of jumping jacks", "yo yo"] * 4, 524)
    ids = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    text = dict(model_type="hfclip_text", vocab_size=len(tokenizer), **ids, **tower)
    vision = dict(model_type="hfclip_vit", image_size=32, patch_size=8, **tower)
    model = HFCLIPModel(HFCLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    return model, HFCLIPProcessor(image_processor=HFCLIPImageProcessor(size=32), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Five folders of 4 to 7 frames in three classes, one of them with a damaged frame in the middle."""
    folder, generator = tmp_path_factory.mktemp("videos"), np.random.default_rng(0)
    for number, label in enumerate(("jumping_jacks", "jumping_jacks", "yo_yo", "yo_yo", "diving")):
        (folder / label / f"v{number}").mkdir(parents=True)
        for frame in range(4 + number % 4):
            pixels = generator.integers(0, 256, (32, 32, 3)).astype(np.uint8)
            PIL.Image.fromarray(pixels).save(folder / label / f"v{number}" / f"{frame:03}.png")
    (folder / "diving" / "v4" / "002.png").write_bytes(b"\x89PNG damaged")
    return folder


def test_middle_frame_and_mean_of_frames(clip, videos):
    source = VideoFrames(videos)
    assert source.labels == ["diving", "jumping jacks", "yo yo"] and len(source) == 5
    assert source[1].image == (videos / "jumping_jacks" / "v0" / "002.png").read_bytes()
    assert source[4].image == (videos / "yo_yo" / "v3" / "003.png").read_bytes() and source.label(4) == 2
    three = VideoFrames(videos, 3)
    assert [three[12 + j].image for j in range(3)] == [
        (videos / "yo_yo" / "v3" / f"{frame:03}.png").read_bytes() for frame in (1, 3, 5)
    ]
    label_embeds = embed_labels(*clip, source.labels).numpy()
    result = video(*clip, DataSet(videos))
    middles = [videos / "jumping_jacks/v0/002.png", videos / "jumping_jacks/v1/002.png", videos / "yo_yo/v2/003.png"]
    rows = embed_images(*clip, [*middles, videos / "yo_yo/v3/003.png"], precision="fp32").numpy()
    hits = (rows @ label_embeds.T).argmax(axis=1) == [1, 1, 2, 2]
    assert result.metrics == {
        "top1": hits.mean(),
        "top5": 1,
        "mean_top1_top5": (hits.mean() + 1) / 2,
        "unreadable_videos": 1,
    }
    result = video(*clip, DataSet(videos), num_frames=2)
    means, frames = [], {"diving/v4": (1, 3), "jumping_jacks/v0": (1, 3), "jumping_jacks/v1": (1, 3)}
    for name, places in {**frames, "yo_yo/v2": (1, 4), "yo_yo/v3": (1, 5)}.items():
        rows = embed_images(*clip, [videos / name / f"{place:03}.png" for place in places], precision="fp32").numpy()
        means.append(rows.mean(axis=0))
    hits = (np.array(means) @ label_embeds.T).argmax(axis=1) == [0, 1, 1, 2, 2]
    assert result.metrics["top1"] == hits.mean() and "unreadable_videos" not in result.metrics


def test_mean_of_frames_is_of_unit_length():
    embeds = np.array([[1, 0], [0, 1], [0.6, 0.8]], np.float32)
    assert mean_of_frames(embeds, np.array([0, 0, 1])) == pytest.approx(np.array([[0.5**0.5, 0.5**0.5], [0.6, 0.8]]))
    with pytest.raises(UsageError, match="cancel"):
        mean_of_frames(np.array([[1, 0], [-1, 0]], np.float32), np.array([0, 0]))


def test_video_files_are_decoded(tmp_path):
    av = pytest.importorskip("av")
    for label in ("dark", "light"):
        (tmp_path / label).mkdir()
    with av.open(str(tmp_path / "dark" / "a.mp4"), "w") as file:
        stream = file.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for grey in range(0, 200, 20):
            frame = av.VideoFrame.from_image(PIL.Image.new("RGB", (64, 48), (grey,) * 3))
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    (tmp_path / "light" / "b.avi").write_bytes(b"RIFF no video")
    source = VideoFrames(tmp_path, 2)
    greys = [np.asarray(source[index].image).mean() for index in range(2)]
    assert greys == pytest.approx([40, 140], abs=5)  # frames 2 and 7 of 10
    assert abs(np.asarray(VideoFrames(tmp_path)[0].image).mean() - 100) < 5
    with pytest.raises(Exception, match="unreadable image"):
        source[2]


def test_rejects_folders_that_hold_no_videos(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="0 folders with 0 videos"):
        VideoFrames(tmp_path / "nothing")
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    with pytest.raises(UsageError, match="2 folders with 0 videos"):
        VideoFrames(tmp_path)
    (tmp_path / "one" / "a.mp4").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UsageError, match=r"PyAV: `pip install 'hfclip\[video\]'`"):
        VideoFrames(tmp_path)
