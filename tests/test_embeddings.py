"""A data set embedded: by several processes, after a kill, in another order, from the cache; and by layers."""

import functools
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from training_utils import FORKED, ROOT, caption, image_bytes, pairs, save_model, write_tar

from hfclip import (
    HFCLIPModel,
    HFCLIPProcessor,
    ZeroShotClassifier,
)
from hfclip.data.sources import open_source
from hfclip.embeddings import Embeddings, embed, embed_images, embed_texts
from hfclip.errors import UsageError
from hfclip.evaluation.retrieval import retrieval


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def load(folder):
    return HFCLIPModel.from_pretrained(folder), HFCLIPProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(model_folder):
    return load(model_folder)[0]


@pytest.fixture(scope="module")
def processor(model_folder):
    return load(model_folder)[1]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """600 pairs in two tars: three chunks. Some captions are long; image 7 and caption 300 are damaged."""
    folder = tmp_path_factory.mktemp("shards")
    members = dict(pairs(range(600)))
    for seed in range(0, 600, 9):
        members[f"{seed:06d}.txt"] += b", red and blue and green and large"
    members["000007.jpg"], members["000300.txt"] = members["000007.jpg"][:100], b"\xff"
    members = sorted(members.items())
    write_tar(folder / "a.tar", members[:500])
    write_tar(folder / "b.tar", members[500:])
    return folder


def source_of(shards, *names):
    name = "::".join(str(shards / name) for name in names) if names else str(shards)
    return open_source(name, cache_dir=shards / "cache")


embed_exactly = functools.partial(embed, precision="fp32", num_workers=0)


@pytest.fixture(scope="module")
def alone(model, processor, shards):
    """What one process computes in memory."""
    return embed_exactly(model, processor, source_of(shards), batch_size=8)


def count_images(model) -> list[int]:
    """The list to which each batch of images that the model sees from now on adds its size."""
    seen = []
    model.vision_model.register_forward_hook(lambda module, inputs, output: seen.append(len(output.pooler_output)))
    return seen


# ---------------------------------------------------------------------------------------------------------------------
# The same rows however they are computed
# ---------------------------------------------------------------------------------------------------------------------


def test_rows_are_those_of_the_model(model, processor, alone):
    inputs = processor(images=image_bytes(5), text=[caption(5)], return_tensors="pt")
    with torch.no_grad():
        outputs = model.eval()(**inputs)
    row = alone.offsets[5]
    torch.testing.assert_close(torch.from_numpy(alone.image_embeds[5:6]), outputs.image_embeds, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        torch.from_numpy(alone.text_embeds[row : row + 1]), outputs.text_embeds, rtol=0, atol=1e-6
    )
    assert alone.scale == pytest.approx(model.logit_scale.exp().item())


def run_process(rank, port, model_folder, shards, folder, num_workers):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2" if port else "1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    multiprocessing.set_start_method("fork", force=True)  # of workers; this process's own would import all once more
    torch.set_num_threads(1)
    options = {"batch_size": 8, "num_workers": num_workers, "precision": "fp32"}
    embed(*load(model_folder), source_of(shards), folder=folder, **options)


def assert_same(folder, expected):
    found = Embeddings.open(folder)
    for name in ("image_embeds", "text_embeds", "offsets", "caption_ids", "label_ids"):
        assert getattr(found, name).tobytes() == getattr(expected, name).tobytes(), name
    assert found.keys == expected.keys and found.problems == expected.problems


def test_two_processes_with_workers_give_the_rows_of_one(model_folder, shards, alone, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run = functools.partial(FORKED.Process, target=run_process)
    processes = [run(args=(rank, port, model_folder, shards, tmp_path / "out", 1)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    assert_same(tmp_path / "out", alone)
    assert isinstance(Embeddings.open(tmp_path / "out").image_embeds, np.memmap)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_killed_embedding_goes_on_where_it_was(model_folder, shards, alone, tmp_path):
    process = FORKED.Process(target=run_process, args=(0, 0, model_folder, shards, tmp_path / "out", 0))
    process.start()
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".out.partial/*/chunk-00000.safetensors")):
        assert time.monotonic() < deadline and process.is_alive()
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    num_done = len(list(tmp_path.glob(".out.partial/*/chunk-*.safetensors")))
    assert not (tmp_path / "out").exists() and 0 < num_done < 3
    model, processor = load(model_folder)
    seen = count_images(model)
    embed_exactly(model, processor, source_of(shards), folder=tmp_path / "out", batch_size=8)
    assert_same(tmp_path / "out", alone)
    assert sum(seen) <= 600 - 256 * num_done + 8


@pytest.mark.slow
def test_program_that_is_interrupted_goes_on_when_it_is_given_again(model_folder, shards, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "training/embed.py"), "--model", str(model_folder), "--data", str(shards)]
    command += ["--out", str(out), "--precision", "fp32", "--batch-size", "8", "--num-workers", "1"]
    environment = {**os.environ, "HFCLIP_CACHE": str(tmp_path / "cache")}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        deadline = time.monotonic() + 200
        while not list(tmp_path.glob(".out.partial/*/chunk-00000.safetensors")):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.001)
        process.send_signal(signal.SIGINT)
        said = process.communicate()[1]
    assert process.returncode == 130 and "The same command goes on from here." in said and "Traceback" not in said
    assert not out.exists()
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "Embeddings.open" in done.stdout, done.stderr
    assert len(Embeddings.open(out)) == 600


def test_order_of_shards_does_not_change_rows(model, processor, shards, alone):
    other = embed_exactly(model, processor, source_of(shards, "b.tar", "a.tar"), batch_size=8)
    assert other.keys != alone.keys
    for place, key in enumerate(other.keys):
        if place in other.problems:
            continue  # what cannot be read has no name
        before = alone.keys.index(key)
        assert other.image_embeds[place].tobytes() == alone.image_embeds[before].tobytes()
        rows, rows_before = (e.text_embeds[slice(*e.offsets[i : i + 2])] for e, i in ((other, place), (alone, before)))
        assert rows.tobytes() == rows_before.tobytes()


def test_unreadable_samples_are_named_and_have_no_row(alone):
    assert alone.problems == {7: "unreadable image", 300: "unreadable caption"}
    zero = [index for index in range(600) if not alone.image_embeds[index].any()]
    assert zero == [7, 300]
    assert np.diff(alone.offsets).tolist() == [0 if index == 300 else 1 for index in range(600)]
    assert np.isfinite(alone.text_embeds).all() and len(alone.text_embeds) == 599


def test_rejects_images_that_cannot_be_read(model, processor, tmp_path):
    (tmp_path / "a.jpg").write_bytes(image_bytes(0))
    (tmp_path / "b.jpg").write_bytes(image_bytes(0)[:100])
    with pytest.raises(UsageError, match="b.jpg: unreadable image. Leave it out; 1 of 2 cannot"):
        embed_images(model, processor, tmp_path)
    (tmp_path / "x.jpg").write_bytes(b"no image")
    with pytest.raises(UsageError, match="x.jpg is one.: 1 with not an image"):
        embed_images(model, processor, tmp_path / "x.jpg")


# ---------------------------------------------------------------------------------------------------------------------
# Cache
# ---------------------------------------------------------------------------------------------------------------------


def test_cache_computes_again_only_what_has_changed(model_folder, tmp_path):
    model, processor = load(model_folder)
    seen = count_images(model)
    members = dict(pairs(range(20)))

    def embed_now():
        write_tar(tmp_path / "0.tar", members.items())
        seen.clear()
        source = open_source(str(tmp_path / "0.tar"), cache_dir=tmp_path / "indices")
        return embed_exactly(model, processor, source, cache_dir=tmp_path / "cache")

    first = embed_now()
    assert seen
    again = embed_now()
    assert not seen and again.folder == first.folder
    image = bytearray(members["000003.jpg"])
    image[-20] ^= 1  # neither its length nor its caption
    members["000003.jpg"] = bytes(image)
    changed = embed_now()
    assert seen and changed.folder != first.folder
    with torch.no_grad():
        model.visual_projection.weight[0, 0] += 1
    assert embed_now().folder not in (first.folder, changed.folder) and seen
    processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    embed_now()
    assert seen and len(list((tmp_path / "cache").iterdir())) == 4


def test_rejects_folder_of_something_else(model, processor, shards, tmp_path):
    (tmp_path / "other").mkdir()
    with pytest.raises(UsageError, match="other exists and holds something else"):
        embed_exactly(model, processor, source_of(shards), folder=tmp_path / "other")
    with pytest.raises(UsageError, match="holds no stored embeddings"):
        Embeddings.open(tmp_path / "other")


def test_table_has_a_row_per_sample(alone, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    alone.to_parquet(tmp_path / "x.parquet")
    rows = parquet.read_table(tmp_path / "x.parquet").to_pylist()
    assert [row["key"] for row in rows] == alone.keys and rows[7]["problem"] == "unreadable image"
    assert np.array_equal(np.array(rows[9]["image_embeds"], np.float32), alone.image_embeds[9])
    assert rows[300]["text_embeds"] == [] and len(rows[9]["text_embeds"]) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Images, texts, layers
# ---------------------------------------------------------------------------------------------------------------------


def test_images_alone_and_texts_alone(model, processor, shards, alone):
    source = source_of(shards, "b.tar")
    images, texts = (
        embed_exactly(model, processor, source, what=(what,), batch_size=8) for what in ("images", "texts")
    )
    assert images.text_embeds is None and texts.image_embeds is None
    assert images.image_embeds.tobytes() == alone.image_embeds[-len(source) :].tobytes()
    assert texts.text_embeds.tobytes() == alone.text_embeds[-len(texts.text_embeds) :].tobytes()


def test_layers_by_name(model, processor, shards):
    source = open_source(str(shards / "a.tar"), cache_dir=shards / "cache", max_samples=6)
    name = "vision_model.encoder.layers.0"
    layers = {name: "all", "vision_model.post_layernorm": "mean"}
    found = embed_exactly(model, processor, source, what=("images",), layers=layers)
    pixels = processor(images=[image_bytes(seed) for seed in range(6)], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        hidden = model.eval().vision_model(pixels, output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(torch.from_numpy(found.layers[name]), hidden, rtol=0, atol=1e-5)
    for how, expected in (("mean", hidden.mean(1)), ("first", hidden[:, 0])):
        pooled = embed_exactly(model, processor, source, what=("images",), layers={name: how}).layers[name]
        torch.testing.assert_close(torch.from_numpy(pooled), expected, rtol=0, atol=1e-5)
    with pytest.raises(UsageError, match="layers: the model has no module 'vision_model.nothing'"):
        embed_exactly(model, processor, source, layers={"vision_model.nothing": "mean"})
    with pytest.raises(UsageError, match="text_model gives nothing for 6 images"):
        embed_exactly(model, processor, source, layers={"text_model": "mean"})


def test_model_is_left_as_it_was(model_folder, shards):
    model, processor = load(model_folder)
    model.train()
    before = [(type(module), module.training, len(module._forward_hooks)) for module in model.modules()]
    embed_exactly(model, processor, source_of(shards, "b.tar"), layers={"vision_model.post_layernorm": "mean"})
    assert before == [(type(module), module.training, len(module._forward_hooks)) for module in model.modules()]
    assert all(parameter.grad is None for parameter in model.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# What people have
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    (folder / "below").mkdir()
    for seed, name in enumerate(("a.jpg", "b.JPG", "below/c.jpg", ".hidden.jpg", "notes.txt")):
        (folder / name).write_bytes(image_bytes(seed))
    return folder


def test_images_as_people_have_them(model, processor, photos, monkeypatch):
    first, second, third = (photos / name for name in ("a.jpg", "b.JPG", "below/c.jpg"))
    expected = embed_images(model, processor, [str(first), second, third], precision="fp32")
    assert expected.shape == (3, 16) and not expected.requires_grad
    opened = [Image.open(first), second.read_bytes(), np.asarray(Image.open(third))]
    for images in (photos, str(photos), opened, [photos], [first, photos / "b*", photos / "below"]):
        torch.testing.assert_close(embed_images(model, processor, images, precision="fp32"), expected)
    monkeypatch.chdir(photos)
    torch.testing.assert_close(embed_images(model, processor, "*.jpg", precision="fp32"), expected[:1])
    texts = embed_texts(model, processor, ["a cat", "a dog"], precision="fp32")
    torch.testing.assert_close(embed_texts(model, processor, "a dog", precision="fp32"), texts[1:])


def test_classifier_takes_folders_and_patterns(model, processor, photos):
    classifier = ZeroShotClassifier(model, processor, ["cat", "dog"])
    files = [photos / name for name in ("a.jpg", "b.JPG", "below/c.jpg")]
    assert classifier(photos) == classifier(files) and len(classifier(f"{photos}/*.jpg")) == 1
    assert len(classifier(photos)) == 3 and classifier(files[0])[0].keys() == {"label", "score"}


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("https://example.com/a.jpg", "found the URL 'https://example.com/a.jpg', expected files"),
        ([], "found none, expected at least one"),
        ("absent.jpg", "found no file 'absent.jpg'"),
    ],
)
def test_rejects_images_that_are_none(model, processor, images, message):
    with pytest.raises(UsageError, match=message):
        embed_images(model, processor, images)


def test_rejects_folder_without_images_and_texts_without_words(model, processor, tmp_path: Path):
    with pytest.raises(UsageError, match="found no image in"):
        embed_images(model, processor, tmp_path)
    with pytest.raises(UsageError, match="found text 1 empty"):
        embed_texts(model, processor, ["a", " "])


def test_retrieval_of_images_without_captions_is_refused(model, processor, tmp_path):
    for name, data in pairs(range(4))[::2]:
        (tmp_path / name).write_bytes(data)
    source = open_source(str(tmp_path), cache_dir=tmp_path / "cache", require_captions=False)
    with pytest.raises(UsageError, match="no image with a caption"):
        retrieval(model, processor, source)
