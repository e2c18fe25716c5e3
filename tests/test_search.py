"""An index of images: what is embedded, what is found, hostile folders, kills, and two who write at once."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from training_utils import image_bytes, model_with_tokenizer

import hfclip_cli
from hfclip import HFCLIPConfig, HFCLIPImageProcessor, HFCLIPModel, HFCLIPProcessor, HFCLIPTokenizer
from hfclip.errors import UsageError


pytest.importorskip("pathspec")
from hfclip.search import ImageIndex, Query, parse_query


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    config = HFCLIPConfig(**model_with_tokenizer(folder)["config"])
    torch.manual_seed(0)
    HFCLIPModel(config).save_pretrained(folder)
    tokenizer = HFCLIPTokenizer.from_pretrained(folder / "tokenizer", model_max_length=16)
    HFCLIPProcessor(HFCLIPImageProcessor(size=32), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(model_folder):
    return HFCLIPModel.from_pretrained(model_folder).eval()


@pytest.fixture(scope="module")
def processor(model_folder):
    return HFCLIPProcessor.from_pretrained(model_folder)


@pytest.fixture
def build(model, processor, tmp_path):
    return lambda *folders, **options: ImageIndex.build(folders, model, processor, tmp_path / "store", **options)


def write_images(folder: Path, seeds, size=(40, 32)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        (folder / f"{seed}.jpg").write_bytes(image_bytes(seed, size))


def write_photos(folder: Path) -> Path:
    write_images(folder, range(6))
    write_images(folder / "Spain", range(6, 10), (80, 60))
    os.utime(folder / "0.jpg", (1, 1))
    return folder


@pytest.fixture
def photos(tmp_path) -> Path:
    return write_photos(tmp_path / "photos")


@pytest.fixture(scope="module")
def index(model, processor, tmp_path_factory) -> ImageIndex:
    """An index that no test changes."""
    folder = tmp_path_factory.mktemp("index")
    return ImageIndex.build(write_photos(folder / "photos"), model, processor, folder / "store")


def paths(index: ImageIndex) -> list[str]:
    return sorted(hit.path for hit in index)


# ---------------------------------------------------------------------------------------------------------------------
# What is embedded
# ---------------------------------------------------------------------------------------------------------------------


def test_only_new_content_is_embedded_and_ids_stay(build, model, photos):
    seen = []
    hook = model.vision_model.register_forward_hook(
        lambda module, inputs, output: seen.append(len(output.pooler_output))
    )
    index = build(photos)
    ids = {hit.path: hit.id for hit in index}
    assert index.last_update.embedded == len(index) == 10 == sum(seen)
    (photos / "0.jpg").rename(photos / "Spain" / "moved.jpg")
    (photos / "1.jpg").write_bytes(image_bytes(100))
    (photos / "2.jpg").unlink()
    os.utime(photos / "3.jpg", (0, 0))
    (photos / "copy.jpg").write_bytes(image_bytes(4))
    counts = index.update()
    assert counts[:6] == (1, 1, 1, 0, 2, 7) and sum(seen) == 11
    assert index.find(photos / "Spain" / "moved.jpg") == ids[str(photos / "0.jpg")]
    assert index.find(photos / "0.jpg") is None and index.find(photos / "1.jpg") == 10
    assert index.get(ids[str(photos / "3.jpg")]).modified == 0
    (photos / "1.jpg").write_bytes(image_bytes(1))
    (photos / "2.jpg").write_bytes(image_bytes(2))
    assert index.update()[:6] == (0, 0, 0, 2, 1, 9) and sum(seen) == 11
    assert index.find(photos / "1.jpg") == ids[str(photos / "1.jpg")]
    assert index.update()[:6] == (0, 0, 0, 0, 0, 11)
    hook.remove()


def test_files_are_those_that_are_documented(build, photos, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    index = build(photos)
    (photos / "2.jpg").unlink()
    index.update()
    rows = np.load(tmp_path / "store" / "rows.npy", mmap_mode="r")
    (table,) = sorted((tmp_path / "store").glob("files-*.parquet"))[-1:]
    files = parquet.read_table(table).to_pylist()
    assert rows.dtype == np.float16 and rows.shape == (10, 16) == (len(files), 16)
    assert [os.fsdecode(file["path"]) for file in files if not file["deleted"]] == [hit.path for hit in index]
    assert (files[9]["width"], files[9]["height"]) == (80, 60)
    np.testing.assert_allclose(np.linalg.norm(rows.astype(np.float32), axis=1), 1, atol=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# What is found
# ---------------------------------------------------------------------------------------------------------------------


def test_best_images_of_words_images_and_their_sums(index):
    rows = torch.from_numpy(np.array(index.snapshot().rows)).float()
    found = index.search(Query(((1, 3), (-0.5, 7))), top_k=4)
    expected = rows @ (rows[3] - 0.5 * rows[7]) / (rows[3] - 0.5 * rows[7]).norm()
    assert [hit.id for hit in found.hits] == expected.argsort(descending=True)[:4].tolist() and found.total == 10
    assert [hit.score for hit in found.hits] == pytest.approx(
        expected.sort(descending=True).values[:4].tolist(), abs=1e-3
    )
    assert [hit.z for hit in found.hits] == sorted((hit.z for hit in found.hits), reverse=True)
    assert index.search(Query(((1, 3),)), top_k=1).hits[0].id == 3
    assert index.search("red dog + blue", top_k=3, offset=2).hits == index.search("red dog + blue").hits[2:5]
    assert len(index.search("red " * 10_000).hits) == 10
    with pytest.raises(UsageError, match="query: found ' ', expected words"):
        index.search(" ")
    with pytest.raises(LookupError, match="no image 99"):
        index.search(Query(((1, 99),)))


@pytest.mark.parametrize(
    "text, terms",
    [
        ("two parrots", [(1, "two parrots")]),
        ("two parrots + beach - 2:people", [(1, "two parrots"), (1, "beach"), (-2, "people")]),
        ("- t-shirt +  .5:a+b ", [(-1, "t-shirt"), (0.5, "a+b")]),
    ],
)
def test_query_is_a_sum_of_terms(text, terms):
    assert list(parse_query(text).terms) == terms


@pytest.mark.parametrize("text", ["", " ", "+", "a +", "a - - b", "2:"])
def test_rejects_query_without_words(text):
    with pytest.raises(UsageError, match="expected words"):
        parse_query(text)


@pytest.mark.parametrize(
    "where, seeds",
    [
        ("folder=spain", {6, 7, 8, 9}),
        ("width>40 height<=60", {6, 7, 8, 9}),
        ("name=3.JPG", {3}),
        ("after=2020-05", set(range(10)) - {0}),
        ("before=2020 size>1", {0}),
        ("folder=nowhere", set()),
    ],
)
def test_conditions(where, seeds, index):
    found = index.search("red", where=where)
    assert {int(Path(hit.path).stem) for hit in found.hits} == seeds and found.total == len(seeds)


@pytest.mark.parametrize("where", ["width", "width>x", "after=20x", "after>2020", "owner=me", "'"])
def test_rejects_conditions_that_are_none(where, index):
    with pytest.raises(UsageError, match="where: found .* expected conditions like"):
        index.search("red", where=where)


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def test_command_indexes_and_searches(model_folder, photos, tmp_path, monkeypatch, capsys):
    def hfclip(*words):
        monkeypatch.setattr(sys, "argv", ["hfclip", *map(str, words)])
        try:
            hfclip_cli.main()
        except SystemExit as end:
            return end.code, *capsys.readouterr()
        return 0, *capsys.readouterr()

    status, _, err = hfclip("index", photos)
    assert status == 2 and err.startswith("error: a new index needs a model. Name one: --model MODEL")
    status, out, err = hfclip("index", photos, "--model", model_folder)
    assert status == 0 and "10 embedded" in out, err
    status, out, err = hfclip("search", "red", "dog", "-", photos / "3.jpg", "--top", 10, "-0")
    assert (
        status == 0
        and sorted(out.split("\0")[:-1]) == paths(ImageIndex.open())
        and out.split("\0")[9].endswith("/3.jpg")
    )
    assert hfclip("search", "red", "--where", "folder=x")[::2] == (1, "found nothing\n")
