"""Overlap: exact neighbours against a full product, statistics against scipy and known values, lists of clean images."""

import io
import tarfile

import numpy as np
import PIL.Image
import pytest
import torch

from hfclip import HFCLIPConfig, HFCLIPImageProcessor, HFCLIPModel, HFCLIPProcessor, HFCLIPTokenizer
from hfclip.data.sources import open_source
from hfclip.embeddings import embed
from hfclip.errors import UsageError
from hfclip.evaluation import DataSet
from hfclip.evaluation.data import select
from hfclip.evaluation.overlap import (
    PerceptualHash,
    find_nearest,
    overlap,
    overlap_statistics,
    overlap_summary,
)


pytest.importorskip("scipy", reason="of the extra evaluate")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A random model with its processor, and the folder that it is saved in."""
    torch.manual_seed(0)
    tower = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    tokenizer = HFCLIPTokenizer.train_new_from_iterator(["a photo of a cat, a dog"] * 4, 524)
    ids = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    text = dict(model_type="hfclip_text", vocab_size=len(tokenizer), **ids, **tower)
    vision = dict(model_type="hfclip_vit", image_size=32, patch_size=8, **tower)
    model = HFCLIPModel(HFCLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    processor = HFCLIPProcessor(image_processor=HFCLIPImageProcessor(size=32), tokenizer=tokenizer)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor, folder


def encoded(pixels, kind="PNG", **options):
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """12 evaluation images, of which four are among 30 training images, one of them as a JPEG; one of these is damaged."""
    folder, generator = tmp_path_factory.mktemp("data"), np.random.default_rng(0)

    def picture():
        small = generator.integers(0, 256, (6, 6, 3)).astype(np.uint8)
        return np.asarray(PIL.Image.fromarray(small).resize((48, 48), PIL.Image.Resampling.BICUBIC))

    evaluation = [picture() for _ in range(12)]
    for number, pixels in enumerate(evaluation):
        path = folder / "test" / ("cat" if number % 2 else "dog") / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(pixels))
    training = [encoded(picture()) for _ in range(30)]
    training[3], training[11], training[28] = (encoded(evaluation[number]) for number in (0, 5, 6))
    training[20], training[13] = encoded(evaluation[9], "JPEG", quality=90), b"\x89PNG damaged"
    for shard in range(3):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for number in range(10 * shard, 10 * shard + 10):
                member = tarfile.TarInfo(f"{number:02}.png")
                member.size = len(training[number])
                tar.addfile(member, io.BytesIO(training[number]))
    return DataSet(folder / "test", name="pictures"), str(folder / "{0..2}.tar")


# ----------------------------------------------------------------------------------------------------------- detection


def test_neighbours_are_exact_whatever_the_blocks(clip, data):
    model, processor, _ = clip
    source = open_source(data[1], require_captions=False)
    rows = embed(model, processor, source, what=("images",), precision="fp32").image_embeds
    queries = np.random.default_rng(1).normal(size=(20, 16)).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    scores = np.where(rows.any(axis=1), queries @ rows.T, -np.inf)
    for block in (7, 1000):
        found = find_nearest(model, processor, queries, source, block=block)
        assert (found.index == scores.argmax(axis=1)).all()
        assert found.similarity == pytest.approx(scores.max(axis=1), abs=1e-6)


def run_process(rank, port, folder, training, queue):
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model, processor = HFCLIPModel.from_pretrained(folder), HFCLIPProcessor.from_pretrained(folder)
    queries = np.eye(16, dtype=np.float32)
    found = find_nearest(model, processor, queries, open_source(training, require_captions=False), block=4)
    queue.put((found.similarity.tolist(), found.index.tolist()))


@pytest.mark.slow
def test_two_processes_find_what_one_finds(clip, data):
    model, processor, folder = clip
    alone = find_nearest(model, processor, np.eye(16), open_source(data[1], require_captions=False))
    context, port = torch.multiprocessing.get_context("spawn"), np.random.randint(20000, 60000)
    queue = context.Queue()
    started = [context.Process(target=run_process, args=(rank, port, folder, data[1], queue)) for rank in range(2)]
    for process in started:
        process.start()
    for similarity, index in [queue.get(timeout=120) for _ in started]:
        assert index == alone.index.tolist() and similarity == pytest.approx(alone.similarity.tolist(), abs=1e-6)
    for process in started:
        process.join()


def test_hash_is_that_of_low_frequencies():
    model, processor = PerceptualHash.with_processor()
    generator = np.random.default_rng(0)
    small = PIL.Image.fromarray(generator.integers(0, 256, (5, 7, 3)).astype(np.uint8))
    image = small.resize((90, 70), PIL.Image.Resampling.BICUBIC)
    others = [image.resize((333, 200)), image.point(lambda value: value * 0.8 + 20), image.transpose(1)]
    pixels = processor([image, *others], return_tensors="pt")["pixel_values"]
    signs = model.encode_image(pixels)
    grey = 0.299 * pixels[0, 0] + 0.587 * pixels[0, 1] + 0.114 * pixels[0, 2]
    place = (np.arange(32) + 0.5) * np.pi / 32
    waves = [
        [(grey.numpy() * np.outer(np.cos(place * u), np.cos(place * v))).sum() for v in range(8)] for u in range(8)
    ]
    assert ((np.array(waves) > np.sort(np.ravel(waves))[31]).ravel() == (signs[0].numpy() > 0)).all()
    distance = ((signs[0] != signs).sum(dim=1)).tolist()
    assert distance[0] == 0 and distance[1] <= 4 and distance[2] <= 4 and distance[3] > 16


# ---------------------------------------------------------------------------------------------------------- statistics


def test_statistics_are_those_of_known_values():
    # 8 of 10 right where half are by chance: P(X >= 8) = 56 / 1024. Bounds of Clopper and Pearson for 8 of 10 at 99.5 %
    # solve P(X >= 8 | low) = P(X <= 8 | high) = 0.0025.
    hits = np.array([1] * 8 + [0] * 2 + [1, 0] * 20, bool)
    is_overlap = np.arange(50) < 10
    found = overlap_statistics(hits, is_overlap)
    assert found["p_value"] == pytest.approx(56 / 1024)
    assert (found["top1"], found["clean_top1"], found["overlap_top1"], found["overlap"]) == (0.56, 0.5, 0.8, 0.2)
    assert found["gain"] == pytest.approx(0.06)

    def at_least(successes, chance):
        choose = [1, 10, 45, 120, 210, 252, 210, 120, 45, 10, 1]
        return sum(choose[k] * chance**k * (1 - chance) ** (10 - k) for k in range(successes, 11))

    assert at_least(8, found["overlap_top1_low"]) == pytest.approx(0.0025)
    assert 1 - at_least(9, found["overlap_top1_high"]) == pytest.approx(0.0025)
    many = np.array([1] * 9 + [0] + [1, 0] * 20, bool)  # P(X >= 9) = 11 / 1024
    assert overlap_statistics(many, is_overlap)["is_significant"] == 1
    assert overlap_statistics(many, is_overlap, num_data_sets=35)["is_significant"] == 0


def test_statistics_without_overlap_or_without_clean_images():
    found = overlap_statistics(np.array([True, False]), np.zeros(2, bool))
    assert found["gain"] == 0 and found["overlap"] == 0 and "p_value" not in found
    with pytest.raises(UsageError, match="raise the threshold"):
        overlap_statistics(np.ones(3, bool), np.ones(3, bool))
    rows = [found, {**overlap_statistics(np.array([1, 1, 0, 0], bool), np.array([1, 1, 0, 0], bool)), "p_value": 0.01}]
    results = [{"task": "overlap", "data": [{"name": str(row["overlap"])}], "metrics": row} for row in rows]
    assert overlap_summary(None, None, [*results, {"task": "zero-shot"}]).metrics == {
        "data_sets": 2,
        "data_sets_without_overlap": 1,
        "median_overlap": 0.25,
        "mean_overlap": 0.25,
        "significant": 1,
        "moved_by_0.1_points": 1,
        "largest_gain": 0.5,
    }


# ---------------------------------------------------------------------------------------------------------------- task


@pytest.mark.parametrize("detector, threshold", [(None, 0.9999), ("phash", 0.75), ("model", 0.9999)])
def test_overlap_is_found_listed_and_looked_at(clip, data, tmp_path, detector, threshold):
    model, processor, folder = clip
    detector = str(folder) if detector == "model" else detector
    options = dict(training=data[1], detector=detector, folder=str(tmp_path / "out"))
    result = overlap(model, processor, data[0].labelled(), threshold=threshold, **options)
    clean = (tmp_path / "out" / "clean.txt").read_text().splitlines()
    names = {f"{'cat' if number % 2 else 'dog'}/{number:02}.png" for number in range(12)}
    copies = {"dog/00.png", "cat/05.png", "dog/06.png"}
    assert copies <= names - set(clean) <= copies | {"cat/09.png"}
    assert detector != "phash" or "cat/09.png" not in clean  # a JPEG has the same low frequencies
    assert result.metrics["overlap"] == (12 - len(clean)) / 12
    source = data[0].labelled().samples.source
    kept = select(source, tmp_path / "out" / "clean.txt")
    assert [kept[index].key for index in range(len(kept))] == clean
    named = DataSet(data[0].place, only=tmp_path / "out" / "clean.txt", limit=5)
    assert len(named.labelled().samples) == 5 and named.describe()["only"] != data[0].describe().get("only")
    assert PIL.Image.open(tmp_path / "out" / "pairs.png").size[0] > 1000
    again = overlap(model, processor, data[0].labelled(), threshold=0.99999999, **options)
    assert (again.arrays["similarity"] == result.arrays["similarity"]).all()


def test_another_threshold_does_not_read_training_data_again(clip, data, tmp_path, monkeypatch):
    model, processor, _ = clip
    options = dict(training=data[1], folder=str(tmp_path))
    first = overlap(model, processor, data[0].labelled(), threshold=0.9999, **options)
    monkeypatch.setattr("hfclip.evaluation.overlap.find_nearest", None)
    second = overlap(model, processor, data[0].labelled(), threshold=0.99999, **options)
    assert (first.arrays["nearest"] == second.arrays["nearest"]).all()
    with pytest.raises(TypeError):  # another detector does
        overlap(model, processor, data[0].labelled(), threshold=0.9, **{**options, "detector": "phash"})


def test_rejects_what_makes_no_sense(clip, data, tmp_path):
    model, processor, _ = clip
    for options, message in (
        (dict(threshold=1.5), "a cosine from -1 to 1"),
        (dict(threshold=-1.0), "raise the threshold"),
        (dict(threshold=0.9, detector="nothing/here/at/all"), "detector nothing"),
        (dict(threshold=0.9, num_data_sets=0), "1 or more"),
    ):
        with pytest.raises(UsageError, match=message):
            overlap(model, processor, data[0].labelled(), training=data[1], **options)
    (tmp_path / "clean.txt").write_text("dog/00.png\nother.png\n")
    with pytest.raises(UsageError, match="other.png, which the data have not"):
        select(data[0].labelled().samples.source, tmp_path / "clean.txt")


def test_plot_of_data_sets(tmp_path):
    generator, stored = np.random.default_rng(0), []
    for name, share in (("birds", 0.12), ("cars", 0.02), ("none", 0)):
        is_overlap = np.arange(400) < 400 * share
        metrics = overlap_statistics(generator.random(400) < 0.7 + 0.2 * is_overlap, is_overlap)
        stored.append({"task": "overlap", "data": [{"name": name}], "metrics": metrics})
    found = overlap_summary(None, None, stored, figure=str(tmp_path / "overlap.svg"))
    text = (tmp_path / "overlap.svg").read_text()
    assert "birds" in text and "cars" in text and "share of the images that overlap" in text
    birds, cars = found.tables["accuracies"]
    metrics = stored[0]["metrics"]
    assert birds["difference"] == metrics["overlap_top1"] - metrics["clean_top1"]
    assert birds["low"] < birds["difference"] < birds["high"] and cars["significance"].startswith("p ")
