"""An index of images: what is embedded, what is found, hostile folders, kills, and two who write at once."""

import io
import itertools
import json
import os
import resource
import shutil
import signal
import struct
import sys
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from training_utils import FORKED, caption, image_bytes, save_model

import hfclip_cli
from hfclip import HFCLIPImageProcessor, HFCLIPModel, HFCLIPProcessor
from hfclip.data.sources import open_source
from hfclip.embeddings import embed_texts
from hfclip.errors import UsageError
from hfclip.evaluation.retrieval import retrieval
from hfclip.search import ImageIndex, Query, parse_query, update
from hfclip.search.query import count_strong
from hfclip.search.store import Manifest, Record, Store
from hfclip.search.whole import duplicates, sort_by_labels, to_npy, to_parquet, to_qdrant, to_usearch


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


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
    signature = index.store.signature()
    assert index.update()[:6] == (0, 0, 0, 0, 0, 11) and index.store.signature() == signature  # nothing was written
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


def test_recall_is_that_of_the_evaluation(model, processor, tmp_path):
    write_images(tmp_path / "photos", range(100))
    for seed in range(100):
        (tmp_path / "photos" / f"{seed}.txt").write_text(caption(seed))
    index = ImageIndex.build(tmp_path / "photos", model, processor, tmp_path / "store")
    precision = {"precision": index.snapshot().manifest.model["precision"]}
    expected = retrieval(model, processor, open_source(str(tmp_path / "photos")), ks=(1, 10), **precision).metrics
    texts = embed_texts(model, processor, [caption(seed) for seed in range(100)], batch_size=16, **precision)
    places = []
    for seed, text in enumerate(texts):
        names = [Path(hit.path).stem for hit in index.search(Query(((1, text),)), top_k=100).hits]
        places.append(names.index(str(seed)))
    for k in (1, 10):
        assert np.mean(np.array(places) < k) == pytest.approx(expected[f"image_retrieval_recall@{k}"])


def write_store(folder: Path, rows: np.ndarray) -> ImageIndex:
    """An index of files that are not there, and of no model."""
    records = [Record(f"/photos/{i}.jpg", 1, 1, i.to_bytes(16, "big"), 1, 1) for i in range(len(rows))]
    store = Store(folder)
    with store.locked():
        store.commit(Manifest({"name": "none", "dim": rows.shape[1]}), records, [], list(rows))
    return ImageIndex.open(folder)


def test_float16_gives_the_order_of_float32(tmp_path):
    rows, queries = (F.normalize(torch.randn(n, 128), dim=1) for n in (5000, 1000))
    index = write_store(tmp_path / "store", rows.numpy())
    exact = queries @ rows.T
    best = exact.topk(10).values
    same = 0
    for query, scores, expected in zip(queries, exact, best):
        hits = index.search(Query(((1, query),)), top_k=10).hits
        found = scores[[hit.id for hit in hits]]
        assert (found - expected).abs().max() < 1e-3  # images that change places are alike for the query
        assert torch.tensor([hit.score for hit in hits]).sub(found).abs().max() < 1e-3
        same += bool((found == expected).all())
    assert same > 900


def test_strong_matches_are_those_before_the_largest_gap():
    scores = np.sort(np.random.default_rng(0).normal(0.2, 0.02, 1000))[::-1].astype(np.float32)
    matches = np.linspace(0.4, 0.35, 7, dtype=np.float32)

    def strong(*parts):
        joined = np.concatenate(parts)
        return count_strong(joined, (joined - joined.mean()) / (joined.std() + 1e-6), len(joined))

    assert strong(matches, scores) == 7 and strong(np.float32([1]), matches, scores) == 8
    assert strong(scores) < 10 and strong(np.full(50, 0.2, np.float32)) == 0


# ---------------------------------------------------------------------------------------------------------------------
# Hostile folders
# ---------------------------------------------------------------------------------------------------------------------


def encoded(mode="RGB", size=(40, 32), kind="JPEG", **options) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, 1).save(file, kind, **options)
    return file.getvalue()


def bomb() -> bytes:
    """A PNG of 60,000 x 60,000 pixels in its header."""
    head = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = [
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in (head, b"IDAT")
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x112] = 6
    return encoded(exif=exif)


FRAMES = [Image.new("L", (8, 8), value) for value in (0, 255)]
# What lies in the folder -> the kind of problem; None: it is indexed, "left out": it is not seen.
HOSTILE = {
    "plain.jpg": (encoded(), None),
    "UPPER.JPG": (encoded(size=(41, 32)), None),
    "alpha.png": (encoded("RGBA", kind="PNG"), None),
    "deep.png": (encoded("I;16", kind="PNG"), None),
    "grey.jpg": (encoded("L"), None),
    "bits.png": (encoded("1", kind="PNG"), None),
    "palette.gif": (encoded("P", kind="GIF", transparency=0), None),
    "cmyk.jpg": (encoded("CMYK"), None),
    "moving.gif": (encoded("L", kind="GIF", save_all=True, append_images=FRAMES), None),
    "small.webp": (encoded(kind="WEBP"), None),
    "small.tif": (encoded(kind="TIFF"), None),
    "small.bmp": (encoded(kind="BMP"), None),
    "small.ppm": (encoded(kind="PPM"), None),
    "turned.jpg": (turned(), None),
    "renamed.jpg": (encoded(kind="PNG"), None),
    "dot.png": (encoded(size=(1, 1), kind="PNG"), None),
    "thin.png": (encoded(size=(3000, 1), kind="PNG"), None),
    "garbage after.jpg": (encoded(size=(42, 32)) + b"garbage", None),
    "new\nline.jpg": (encoded(size=(43, 32)), None),
    "quotes '\" `$(x)`.jpg": (encoded(size=(44, 32)), None),
    "-rf.jpg": (encoded(size=(45, 32)), None),
    "\U0001f427 \u202e.jpg": (encoded(size=(46, 32)), None),
    "n" * 251 + ".jpg": (encoded(size=(47, 32)), None),
    os.fsdecode(b"\xff\xfe.jpg"): (encoded(size=(48, 32)), None),
    "/".join(["below"] * 60) + "/far.jpg": (encoded(size=(49, 32)), None),
    "folder.jpg/inside.jpg": (encoded(size=(50, 32)), None),
    "empty.jpg": (b"", "empty image"),
    "text.jpg": (b"no image at all", "not an image"),
    "page.png": (b"<html></html>", "not an image"),
    "postscript.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not an image"),
    "cut.jpg": (image_bytes(1)[:300], "unreadable image"),
    "head.png": (encoded(kind="PNG")[:20], "unreadable image"),
    "float.tiff": (encoded("F", kind="TIFF"), "unreadable image"),
    "bomb.png": (bomb(), "too large image"),
    ".hidden.jpg": (encoded(), "left out"),
    ".git/object.jpg": (encoded(), "left out"),
    "@eaDir/thumb.jpg": (encoded(), "left out"),
    "excluded/a.jpg": (encoded(), "left out"),
    "notes.txt": (b"", "left out"),
    ".hfclipignore": (b"# comment\nexcluded/\n*.ignored.jpg\n", "left out"),
    "x.ignored.jpg": (encoded(), "left out"),
}


def test_hostile_folder_is_indexed_to_its_end(build, tmp_path):
    folder = tmp_path / "photos"
    for name, (data, _) in HOSTILE.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    expected = Counter(kind for _, kind in HOSTILE.values())
    images, _ = expected.pop(None), expected.pop("left out")
    (folder / "loop").symlink_to(folder)
    (folder / "dangling.jpg").symlink_to(tmp_path / "nothing.jpg")
    (folder / "itself.jpg").symlink_to(folder / "itself.jpg")
    (folder / "link.jpg").symlink_to(folder / "plain.jpg")
    os.mkfifo(folder / "pipe.jpg")
    with open(folder / "sparse.jpg", "wb") as file:
        file.truncate((1 << 30) + 1)
    expected += {"repeated folder": 1, "broken link": 2, "not a file": 1, "too large image": 1}
    if os.geteuid():  # root may read everything
        (folder / "secret.jpg").write_bytes(encoded())
        (folder / "secret.jpg").chmod(0)
        (folder / "closed").mkdir(0)
        expected += {"no permission": 1, "unreadable folder": 1}
    index = build(folder)
    counts = index.last_update
    assert (counts.embedded, counts.copied) == (images, 1) and counts.problems == dict(expected)
    assert {os.path.relpath(hit.path, folder) for hit in index} == {
        "link.jpg",
        *(name for name, (_, kind) in HOSTILE.items() if kind is None),
    }
    sizes = {Path(hit.path).name: (hit.width, hit.height) for hit in index}
    assert sizes["turned.jpg"] == (32, 40) and sizes["thin.png"] == (3000, 1) and sizes["link.jpg"] == (40, 32)
    listed = [json.loads(line) for line in index.store.problems_file().read_text().splitlines()]
    assert Counter(line["kind"] for line in listed) == expected
    assert index.update()[:6] == (0, 0, 0, 0, 0, images + 1)
    assert len(index.search("red", top_k=100).hits) == images + 1


def test_rules_of_folders_below_go_before_those_above(build, tmp_path):
    write_images(tmp_path / "photos", range(3))
    write_images(tmp_path / "photos" / "below", range(3, 6))
    (tmp_path / "photos" / ".hfclipignore").write_text("[0-4].jpg\n")
    (tmp_path / "photos" / "below" / ".hfclipignore").write_text("!4.jpg\n5.jpg\n")
    index = build(tmp_path / "photos")
    assert [Path(hit.path).name for hit in index] == ["4.jpg"]
    (tmp_path / "photos" / ".hfclipignore").unlink()
    assert index.update().embedded == 4


def test_rejects_folders_without_images(build, photos, tmp_path):
    (tmp_path / "none").mkdir()
    with pytest.raises(UsageError, match="found no image in .*none. Expected files of jpg, "):
        build(tmp_path / "none")
    with pytest.raises(UsageError, match="found no folder '.*nowhere'"):
        build(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="holds no index of images. Make one: hfclip index"):
        ImageIndex.open(tmp_path / "store")
    assert build(photos).last_update.embedded == 10


def test_images_of_a_folder_that_is_not_there_are_kept(build, photos, tmp_path):
    write_images(tmp_path / "card", range(20, 23))
    index = build(photos, tmp_path / "card")
    (tmp_path / "card").rename(tmp_path / "away")
    counts = index.update()
    assert counts.missing_folders == [str(tmp_path / "card")] and counts.deleted == 0 and len(index) == 13


# ---------------------------------------------------------------------------------------------------------------------
# The store: kills, full disks, two writers, other models
# ---------------------------------------------------------------------------------------------------------------------


def index_and_die(model_folder, photos, store, at):
    """Indexes, and is killed at a number of steps that change the disk, whichever that is."""
    torch.set_num_threads(1)
    update.CHUNK, update.SECONDS, update.COMMITTING = 16, 0, 1e9  # a commit per 16 images
    update.usual_workers = lambda on_cpu: 0  # they would outlive a process that is killed
    steps = itertools.count(1)

    def dying(step):
        def counted(*arguments, **options):
            if next(steps) == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*arguments, **options)

        return counted

    for module, name in ((os, "fsync"), (os, "replace"), (Path, "unlink")):
        setattr(module, name, dying(getattr(module, name)))
    ImageIndex.build(photos, str(model_folder), store=store)


def contents(store) -> list[tuple]:
    snapshot = ImageIndex.open(store).snapshot()
    return [(record.path, record.hash, record.deleted) for record in snapshot.records()]


def test_killed_indexing_leaves_a_whole_store_and_ends_as_if_undisturbed(model_folder, model, processor, tmp_path):
    """HFCLIP_KILLS says how often it is killed (4)."""
    write_images(tmp_path / "photos", range(60))
    (tmp_path / "photos" / "bad.jpg").write_bytes(b"")
    undisturbed = ImageIndex.build(tmp_path / "photos", model, processor, tmp_path / "whole")
    kills = int(os.environ.get("HFCLIP_KILLS", "4"))
    for kill in range(kills):
        store, at = tmp_path / f"store{kill}", 1 + 50 * kill // kills
        process = FORKED.Process(target=index_and_die, args=(model_folder, tmp_path / "photos", store, at))
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
        done = len(ImageIndex.open(store)) if (store / "store.json").exists() else 0
        index = ImageIndex.build(tmp_path / "photos", model, processor, store)
        assert index.last_update.embedded == 60 - done
        assert contents(store) == contents(tmp_path / "whole") and index.stats() == {
            **undisturbed.stats(),
            "store": str(store),
            "model": index.stats()["model"],
        }
        rows = [i.snapshot().rows.astype(np.float32) for i in (index, undisturbed)]
        np.testing.assert_allclose(*rows, atol=2e-3)  # the last chunk is a batch of another size


def index_on_a_full_disk(model_folder, photos, store, left):
    """What is written ends after a number of bytes per file."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (left, left))
    try:
        ImageIndex.build(photos, str(model_folder), store=store)
    except OSError:
        sys.exit(3)


def test_full_disk_leaves_what_was_there(model_folder, build, photos, tmp_path):
    before = build(photos).snapshot().records()
    write_images(tmp_path / "photos", range(100, 400))
    process = FORKED.Process(target=index_on_a_full_disk, args=(model_folder, photos, tmp_path / "store", 2000))
    process.start()
    process.join(120)
    assert process.exitcode == 3
    index = ImageIndex.open(tmp_path / "store")
    assert index.snapshot().records() == before and index.stats()["indexing"] is None
    assert build(photos).last_update.embedded == 300


def test_two_do_not_index_at_once(build, photos, tmp_path):
    index = build(photos)
    with Store(tmp_path / "store").locked():
        Store(tmp_path / "store").tell_progress(3, 7)
        assert index.stats()["indexing"] == (3, 7)
        with pytest.raises(UsageError, match=f"is being indexed by process {os.getpid()}. Wait for it"):
            index.update()
        assert len(index.search("red").hits) == 10
    assert index.update().unchanged == 10 and index.stats()["indexing"] is None


def test_searches_go_on_while_the_index_grows(build, model, processor, photos, tmp_path):
    index = build(photos)
    reader = ImageIndex.open(tmp_path / "store", model, processor)
    assert len(reader.search("red").hits) == 10

    def search(number):
        return {len(reader.search(f"red {number + i}", top_k=100).hits) for i in range(20)}

    write_images(photos, range(100, 130))
    with ThreadPoolExecutor(4) as pool:
        found = [pool.submit(search, 20 * number) for number in range(4)]
        index.update()
        seen = set.union(*(future.result() for future in found))
    assert seen <= {10, 40} and len(reader.search("red", top_k=100).hits) == 40


def test_rejects_another_model_and_another_preprocessing(build, model_folder, model, processor, photos, tmp_path):
    build(photos)
    other = HFCLIPModel.from_pretrained(model_folder)
    with torch.no_grad():
        other.visual_projection.weight[0, 0] += 1
    mistaken = ImageIndex.open(tmp_path / "store", other, processor)
    for _ in range(2):  # also when it is asked again
        with pytest.raises(
            UsageError, match="holds embeddings of .* Index anew with it: hfclip index .*photos --model"
        ):
            mistaken.search("red")
    cropped = HFCLIPProcessor(HFCLIPImageProcessor(size=32, image_mean=[0, 0, 0]), processor.tokenizer)
    (photos / "new.jpg").write_bytes(image_bytes(50))
    with pytest.raises(UsageError, match="preprocessing"):
        ImageIndex.build(photos, model, cropped, tmp_path / "store")
    assert len(ImageIndex.open(tmp_path / "store")) == 10


@pytest.mark.parametrize("name", ["store.json", "rows.npy", "files-*.parquet", "problems-*.jsonl"])
@pytest.mark.parametrize("left", [0.5, None], ids=["cut in half", "missing"])
def test_damaged_store_is_one_line(name, left, tmp_path):
    write_store(tmp_path / "store", np.eye(16, dtype=np.float32))
    (path,) = (tmp_path / "store").glob(name)
    if left is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * left)])
    if name.startswith("problems") and left:
        return  # nothing in it
    with pytest.raises(UsageError, match="is damaged .* index its folders again|holds no index"):
        ImageIndex.open(tmp_path / "store")


# ---------------------------------------------------------------------------------------------------------------------
# All images at once
# ---------------------------------------------------------------------------------------------------------------------


def test_duplicates_are_linked_groups_with_the_largest_first(build, tmp_path):
    write_images(tmp_path / "photos", range(5))
    for name, size in (("large.png", (400, 320)), ("small.png", (39, 31))):
        Image.open(tmp_path / "photos" / "3.jpg").resize(size, Image.Resampling.BICUBIC).save(
            tmp_path / "photos" / name
        )
    shutil.copy(tmp_path / "photos" / "4.jpg", tmp_path / "photos" / "copy.jpg")
    index = build(tmp_path / "photos")
    scores = F.normalize(torch.from_numpy(np.array(index.snapshot().rows)).float(), dim=1)
    groups = duplicates(index, 0.999)
    assert ["4.jpg", "copy.jpg"] in [sorted(Path(hit.path).name for hit in group) for group in groups]
    for group in groups:
        assert group[0].width == max(hit.width for hit in group)
    together = {hit.id: number for number, group in enumerate(groups) for hit in group}
    for a, b in (scores @ scores.T >= 0.999).nonzero().tolist():
        assert a == b or together[a] == together[b]


def test_labels_are_those_of_the_best_score(index):
    labels = ["red dog", "blue cat", "a green bird on a small car"]
    vectors = torch.stack([index.embed(label) for label in labels])
    expected = (torch.from_numpy(np.array(index.snapshot().rows)).float() @ vectors.T).argmax(1).tolist()
    assert [labels.index(label) for label, _ in sort_by_labels(index, labels)] == expected


def test_exports_hold_what_is_there(build, photos, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    index = build(photos)
    (photos / "2.jpg").unlink()
    index.update()
    expected = {hit.path: index.snapshot().rows[hit.id].astype(np.float32) for hit in index}
    to_parquet(index, tmp_path / "out.parquet")
    to_npy(index, tmp_path / "out")
    one, two = (parquet.read_table(tmp_path / name).to_pylist() for name in ("out.parquet", "out/files.parquet"))
    vectors = np.load(tmp_path / "out" / "embeddings.npy")
    assert [row["path"] for row in one] == [row["path"] for row in two] == list(expected) and len(expected) == 9
    for row, vector in zip(one, vectors):
        assert np.array_equal(row["embedding"], vector) and np.array_equal(vector, expected[row["path"]])


def test_usearch_finds_what_the_index_finds(index, tmp_path):
    usearch = pytest.importorskip("usearch.index")
    to_usearch(index, tmp_path / "graph")
    found = usearch.Index.restore(str(tmp_path / "graph"), view=True).search(index.embed("red dog").numpy(), 5)
    assert found.keys.tolist() == [hit.id for hit in index.search("red dog", top_k=5).hits]


@pytest.mark.slow
def test_qdrant_finds_what_the_index_finds(build, photos, tmp_path):
    client = pytest.importorskip("qdrant_client")
    index = build(photos)
    to_qdrant(index, str(tmp_path / "qdrant"))
    query = index.embed("red dog")
    points = client.QdrantClient(path=str(tmp_path / "qdrant")).query_points("images", query.tolist(), limit=5).points
    hits = index.search("red dog", top_k=5).hits
    assert [point.id for point in points] == [hit.id for hit in hits]
    assert [point.payload["path"] for point in points] == [hit.path for hit in hits]
    assert [point.score for point in points] == pytest.approx([hit.score for hit in hits], abs=1e-3)


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
    status, out, err = hfclip("similar", photos / "3.jpg", "--json")
    assert status == 0 and {json.loads(line)["path"] for line in out.splitlines()} == set(paths(ImageIndex.open())) - {
        str(photos / "3.jpg")
    }
    (tmp_path / "labels.txt").write_text("red dog\n\nblue/cat\n")
    status, out, err = hfclip("sort", "--labels", tmp_path / "labels.txt", "--out", tmp_path / "sorted")
    assert (status, out) == (0, "") and len(list((tmp_path / "sorted").glob("*/*.jpg"))) == 10
    status, out, err = hfclip("duplicates", "--threshold", "1.1")
    assert (status, err) == (1, "found no duplicates\n")
    store = tmp_path / "cache" / "search"
    assert hfclip("export", store, tmp_path / "out.parquet", "--to", "parquet")[0] == 0
    status, _, err = hfclip("export", store, tmp_path / "out.parquet", "--to", "npy")
    assert status == 2 and "out.parquet exists" in err
