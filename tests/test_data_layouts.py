"""Layouts that people keep images and captions in: each is read as meant, or refused with one clear message."""

import csv
import gzip
import io
import json
import pickle
import sys
import tarfile
import zipfile
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from hfclip.data.folders import TABLES
from hfclip.data.records import IMAGE_KEYS
from hfclip.data.samples import CAPTION_KEYS, IMAGE_ENDINGS
from hfclip.data.sources import open_source
from hfclip.errors import UsageError


TEXTS = ["a red cat", "a blue dog", "a green bird"]


def photo(seed, kind="JPEG"):
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 10, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


PHOTOS = [photo(seed) for seed in range(3)]
NAMES = [f"{number}.jpg" for number in range(3)]
PAIRS = {**dict(zip(NAMES, PHOTOS)), **{f"{i}.txt": text.encode() for i, text in enumerate(TEXTS)}}
ROWS = [{"file_name": name, "text": text} for name, text in zip(NAMES, TEXTS)]
IMAGES = dict(zip(NAMES, PHOTOS))


def write(folder, files):
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())


def tar(files):
    """A tar with these members, in this order."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in files.items() if isinstance(files, dict) else files:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    return out.getvalue()


def zipped(files):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return out.getvalue()


def table(rows, separator=","):
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), delimiter=separator)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def parquet(rows):
    import pyarrow
    import pyarrow.parquet

    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out)
    return out.getvalue()


def renamed(prefix, files):
    return {f"{prefix}{name}": data for name, data in files.items()}


def rows_as(image, text, folder=""):
    return [{image: f"{folder}{name}", text: caption} for name, caption in zip(NAMES, TEXTS)]


STRUCTS = [{"image": {"bytes": data, "path": None}, "text": text} for data, text in zip(PHOTOS, TEXTS)]
DOTS = {f"v1.{i}.{kind}": PAIRS[f"{i}.{kind}"] for i in range(3) for kind in ("jpg", "txt")}
FIELDS = {**PAIRS, "0.seg.png": photo(9, "PNG"), "1.npy": b"x"}
SPREAD = [*[(name, PAIRS[name]) for name in NAMES], *[(f"{i}.txt", PAIRS[f"{i}.txt"]) for i in (2, 0, 1)]]
CLASSES = {f"{i}/{name}": IMAGES[name] for i, name in enumerate(NAMES)}
LABELLED = {f"{i}.{kind}": data for i in range(3) for kind, data in (("jpg", PHOTOS[i]), ("cls", str(2 - i).encode()))}
JSONS = {**IMAGES, **{f"{i}.json": json.dumps({"caption": text, "url": ""}) for i, text in enumerate(TEXTS)}}

# name of the layout -> files, what is named, options of open_source
READ = {
    "tar": ({"x.tar": tar(PAIRS)}, "x.tar", {}),
    "tar whose members are anywhere": ({"x.tar": tar(SPREAD)}, "x.tar", {}),
    "tar of names with dots": ({"x.tar": tar(DOTS)}, "x.tar", {}),
    "tar with further fields": ({"x.tar": tar(FIELDS)}, "x.tar", {}),
    "tar with nested folders": ({"x.tar": tar(renamed("./a/b/", PAIRS))}, "x.tar", {}),
    "tar of json": (
        {"x.tar": tar({k: v if isinstance(v, bytes) else v.encode() for k, v in JSONS.items()})},
        "x.tar",
        {},
    ),
    "tars in folders of folders": (
        {f"a/{i}/x.tar": tar({n: PAIRS[n] for n in (f"{i}.jpg", f"{i}.txt")}) for i in range(3)},
        "",
        {},
    ),
    "tars of splits": (
        {"train/x.tar": tar(PAIRS), "test/x.tar": tar({"9.jpg": PHOTOS[0], "9.txt": b"no"})},
        "",
        {"split": "train"},
    ),
    "tar of labels": ({"x.tar": tar(LABELLED), "classnames.txt": "\n".join(TEXTS[::-1])}, "x.tar", {}),
    "csv": ({**IMAGES, "x.csv": table(rows_as("filepath", "title"))}, "x.csv", {}),
    "csv with tabs": ({**IMAGES, "x.csv": table(rows_as("filepath", "title"), "\t")}, "x.csv", {}),
    "csv with semicolons and a mark": ({**IMAGES, "x.csv": "\ufeff" + table(ROWS, ";")}, "x.csv", {}),
    "csv of own columns": (
        {**IMAGES, "x.csv": table(rows_as("a", "b"))},
        "x.csv",
        {"image_key": "a", "caption_key": "b"},
    ),
    "tsv of images in folders": (
        {**renamed("i/", IMAGES), "x.tsv": table(rows_as("image", "caption", "i/"), "\t")},
        "x.tsv",
        {},
    ),
    "jsonl": ({**IMAGES, "x.jsonl": lines(rows_as("image", "caption"))}, "x.jsonl", {}),
    "json": ({**IMAGES, "x.json": json.dumps(rows_as("image", "caption"))}, "x.json", {}),
    "several csv files": ({**IMAGES, **{f"{i}.csv": table(ROWS[i : i + 1]) for i in range(3)}}, "{0..2}.csv", {}),
    "csv of Windows, in its letters": (
        {**renamed("i/", IMAGES), "x.csv": table(rows_as("image", "text", "i\\")).replace("\r\n", "\n")},
        "x.csv",
        {},
    ),
    "csv of Windows, with its drives": (
        {**IMAGES, "x.csv": "\ufeff" + table(rows_as("image", "text", "C:\\i\\"))},
        "",
        {},
    ),
    "csv in UTF-16, as Excel has it": (
        {**IMAGES, "x.csv": table(rows_as("image", "text"), "\t").encode("utf-16")},
        "x.csv",
        {},
    ),
    "images by a pattern": (PAIRS, "*.jpg", {}),
    "images by a pattern, with metadata": ({**IMAGES, "metadata.csv": table(ROWS)}, "*.jpg", {}),
    "class folders by a pattern": ({f"{text}/x.jpg": data for text, data in zip(TEXTS, PHOTOS)}, "*/*.jpg", {}),
    "folder with one csv": ({**IMAGES, "captions.csv": table(ROWS)}, "", {}),
    "folder with a csv and images in another": ({**renamed("i/", IMAGES), "x.csv": table(ROWS)}, "", {}),
    "images with txt": (PAIRS, "", {}),
    "images with json": (JSONS, "", {}),
    "images with json of a key": ({**JSONS, "0.txt": "no"}, "", {"caption_key": "caption"}),
    "nested images with txt": (
        {f"{i:05d}/{i}.{kind}": PAIRS[f"{i}.{kind}"] for i in range(3) for kind in ("jpg", "txt")},
        "",
        {},
    ),
    "names with dots beside": ({f"v1.{name}": data for name, data in PAIRS.items()}, "", {}),
    "metadata.csv": ({**IMAGES, "metadata.csv": table(ROWS)}, "", {}),
    "metadata.jsonl": ({**IMAGES, "metadata.jsonl": lines(ROWS)}, "", {}),
    "metadata.parquet": ({**IMAGES, "metadata.parquet": parquet(ROWS)}, "", {}),
    "metadata of splits": (
        {
            **renamed("train/", {**IMAGES, "metadata.csv": table(ROWS)}),
            "test/0.jpg": b"",
            "test/metadata.csv": table(ROWS[:1]),
        },
        "",
        {"split": "train"},
    ),
    "class folders": ({f"{text}/x.jpg": data for text, data in zip(TEXTS, PHOTOS)}, "", {}),
    "class folders of a split": (
        {**{f"train/{text}/x.jpg": data for text, data in zip(TEXTS, PHOTOS)}, "val/a/x.jpg": b""},
        "",
        {"split": "train"},
    ),
    "parquet of structs": ({"x.parquet": parquet(STRUCTS)}, "x.parquet", {}),
    "parquet of bytes": (
        {"x.parquet": parquet([{"jpg": d, "txt": t} for d, t in zip(PHOTOS, TEXTS)])},
        "x.parquet",
        {},
    ),
    "parquet of paths": ({**IMAGES, "x.parquet": parquet(ROWS)}, "x.parquet", {}),
    "parquet by braces": ({f"{i}.parquet": parquet(STRUCTS[i : i + 1]) for i in range(3)}, "{0..2}.parquet", {}),
    "parquet by a glob, of different columns": (
        {f"{i}.parquet": parquet([{**STRUCTS[i], **({"x": 1} if i else {})}]) for i in range(3)},
        "*.parquet",
        {},
    ),
    "folder of parquet": ({f"data/train-{i}.parquet": parquet(STRUCTS[i : i + 1]) for i in range(3)}, "", {}),
    "zip of images with txt": ({"x.zip": zipped(renamed("photos/", PAIRS))}, "x.zip", {}),
    "zip with metadata": ({"x.zip": zipped({**IMAGES, "metadata.csv": table(ROWS)})}, "x.zip", {}),
    "zip of class folders": ({"x.zip": zipped({f"all/{t}/0.jpg": d for t, d in zip(TEXTS, PHOTOS)})}, "x.zip", {}),
    **{
        f"images in {kind}": (
            {**{f"{i}.{end}": photo(i, kind) for i in range(3)}, **{f"{i}.txt": t for i, t in enumerate(TEXTS)}},
            "",
            {},
        )
        for end, kind in (
            ("png", "PNG"),
            ("webp", "WEBP"),
            ("gif", "GIF"),
            ("bmp", "BMP"),
            ("tiff", "TIFF"),
            ("avif", "AVIF"),
            ("jfif", "JPEG"),
        )
        if kind in Image.registered_extensions().values()
    },
}


@pytest.mark.parametrize("layout", READ)
def test_layout_is_read(layout, tmp_path):
    """By worker processes, too, to which a source is sent."""
    files, name, options = READ[layout]
    write(tmp_path / "data", files)
    source = open_source(str(tmp_path / "data" / name), cache_dir=tmp_path / "cache", **options)
    samples = [source[i] for i in range(len(source))]
    assert sorted(sample.captions for sample in samples) == sorted([text] for text in TEXTS)
    assert [source.captions(i) for i in range(len(source))] == [sample.captions for sample in samples]
    by_text = {sample.captions[0]: sample.image for sample in samples}
    if "images in" not in layout:
        assert [by_text[text] for text in TEXTS] == PHOTOS
    assert pickle.loads(pickle.dumps(source))[2] == samples[2]
    assert len({sample.key for sample in samples}) == 3 or "tars in" in layout


PHOTOS_ONLY = r"found 3 images without captions. Captions are given by a .txt or .json"
REFUSED = {
    "images alone": (IMAGES, "", PHOTOS_ONLY),
    "one class folder": (renamed("cat/", IMAGES), "", PHOTOS_ONLY),
    "one folder with images": ({**renamed("train2017/", IMAGES), "annotations/a.json": "{}"}, "", PHOTOS_ONLY),
    "zip of images alone": ({"x.zip": zipped(IMAGES)}, "x.zip", PHOTOS_ONLY),
    "tar.gz": ({"x.tar.gz": gzip.compress(tar(PAIRS))}, "x.tar.gz", "compressed.*`gunzip .*x.tar.gz`"),
    "tgz in a folder": ({"a/x.tgz": gzip.compress(tar(PAIRS))}, "", "compressed.*`gunzip .*x.tgz`"),
    "compressed tar named tar": ({"x.tar": gzip.compress(tar(PAIRS))}, "x.tar", "not an uncompressed tar.*gunzip"),
    "tars in a zip": ({"x.zip": zipped({"x.tar": tar(PAIRS)})}, "x.zip", "holds tars.*unzip"),
    "zip that is none": ({"x.zip": "no zip"}, "x.zip", "cannot be read: BadZipFile"),
    "columns of other names": (
        {"x.csv": "photo,words\n0.jpg,a cat\n"},
        "x.csv",
        r"found the columns \['photo', 'words'\].*set image_key",
    ),
    "no column of captions": (
        {"x.csv": "filepath,width\n0.jpg,3\n"},
        "x.csv",
        "expected text or caption.*set caption_key",
    ),
    "captions that are numbers": (
        {**IMAGES, "x.jsonl": lines([{"image": "0.jpg", "text": 5}])},
        "x.jsonl",
        "none of 1 samples.*unreadable caption.*found 5, expected text",
    ),
    "images that are not there": (
        {"x.csv": table(ROWS)},
        "x.csv",
        "none of 3 samples.*missing image.*No such file",
    ),
    "images that are URLs": ({"x.csv": "url,text,image\nu,a,http://a.b/c.jpg\n"}, "x.csv", "by URLs.*img2dataset"),
    "images that are web pages": (
        {"0.jpg": "<html>", "0.txt": "a cat"},
        "",
        "none of 1 samples.*not an image.*cannot be decoded",
    ),
    "metadata without file_name": (
        {**IMAGES, "metadata.csv": "name,text\n0.jpg,a\n"},
        "",
        "expected image or .*file_name.*set image_key",
    ),
    "metadata that is no JSON": ({**IMAGES, "metadata.jsonl": "no json\n"}, "", r"found the columns \[\]"),
    "damaged parquet": ({"x.parquet": b"junk"}, "x.parquet", "cannot be read as a table: ArrowInvalid"),
    "parquet of other columns": ({"x.parquet": parquet([{"a": 1}])}, "x.parquet", r"found the columns \['a'\]"),
    "text in the place of images": (
        {"x.parquet": parquet([{"image": 5, "text": "a"}])},
        "x.parquet",
        "found int, expected bytes",
    ),
    "parquet without rows": (
        {"x.parquet": parquet([])},
        "x.parquet",
        "cannot be read as a table: ValueError: it has no",
    ),
    "another kind of file": ({"x.npz": b"1"}, "x.npz", "is a file that is not read, expected one of .tar"),
    "one image": (IMAGES, "0.jpg", "found 1 images without captions"),
    "tar among images": (
        {**PAIRS, "x.tar": tar(PAIRS)},
        "",
        "holds tars .1, x.tar. and images .3, .*0.jpg.,.*Name the tars by",
    ),
    "nothing but empty captions": (
        {**IMAGES, "0.txt": "", "1.txt": " \n", "2.txt": "&nbsp;"},
        "",
        "Left out: 3 with empty caption .0.txt",
    ),
    "folder of other files": ({"a.npz": b"1"}, "", "holds no images .1 files, .npz"),
    "missing csv": ({}, "x.csv", "found neither a file nor a folder"),
    "missing zip": ({}, "x.zip", "found neither a file nor a folder"),
    "splits without the one asked for": (
        {"val/0.jpg": PHOTOS[0], "test/0.jpg": PHOTOS[0]},
        "",
        r"has the splits \['test', 'val'\], expected train",
    ),
    "labels without names": (
        {"x.tar": tar(LABELLED)},
        "x.tar",
        "3 with missing caption .x.tar/0.jpg.. Captions are given by",
    ),
}


@pytest.mark.parametrize("layout", REFUSED)
def test_layout_is_refused_with_one_clear_message(layout, tmp_path):
    files, name, message = REFUSED[layout]
    (tmp_path / "data").mkdir()
    write(tmp_path / "data", files)
    with pytest.raises(UsageError, match=message):
        open_source(str(tmp_path / "data" / name), split="train", cache_dir=tmp_path / "cache")


# What is left out, by reason and with an example, where the rest is read.
LEFT_OUT = {
    "broken rows of a csv": (
        {**IMAGES, "x.csv": table(ROWS) + "a.jpg,b,c\nd.jpg\n"},
        "x.csv",
        {"broken row": (2, "x.csv, line 5: 3 columns")},
    ),
    "rows that a quote swallows": (
        {**IMAGES, "x.csv": table(ROWS) + '0.jpg,"open\n1.jpg,b\n2.jpg,c\n'},
        "x.csv",
        {"broken row": (3, "x.csv, line 5: unexpected end of data")},
    ),
    "broken lines of a jsonl": (
        {**IMAGES, "x.jsonl": lines(ROWS) + "{\n"},
        "x.jsonl",
        {"broken row": (1, "x.jsonl, line 4")},
    ),
    "rows without their image": (
        {**IMAGES, "metadata.csv": table(ROWS) + "9.jpg,x\n../../etc/passwd,x\n"},
        "",
        {"missing image": (2, "9.jpg")},
    ),
    "images without a row": (
        {**IMAGES, "9.jpg": PHOTOS[0], "metadata.csv": table(ROWS)},
        "",
        {"no metadata": (1, "9.jpg")},
    ),
    "images without a text": ({**PAIRS, "9.jpg": PHOTOS[0]}, "", {"missing caption": (1, "9.jpg")}),
    "texts without an image": ({**PAIRS, "9.txt": "x"}, "", {"missing image": (1, "9.txt")}),
    "other files": ({**PAIRS, "9.psd": "x", ".DS_Store": "x"}, "", {"other format": (1, "9.psd")}),
    "files of class folders": (
        {**{f"{t}/x.jpg": d for t, d in zip(TEXTS, PHOTOS)}, "a red cat/x.psd": "x"},
        "",
        {"other format": (1, "a red cat/x.psd")},
    ),
    "images without a row of a csv": (
        {**IMAGES, "9.jpg": PHOTOS[0], "x.csv": table(ROWS)},
        "",
        {"no metadata": (1, "9.jpg")},
    ),
    "class of other files": (
        {**{f"{t}/x.jpg": d for t, d in zip(TEXTS, PHOTOS)}, "z/x.psd": "x"},
        "",
        {"class without images": (1, "z"), "other format": (1, "z/x.psd")},
    ),
    "format in a tar": (
        {"x.tar": tar({**PAIRS, "9.psd": b"x", "9.txt": b"x"})},
        "x.tar",
        {"missing image": (1, "x.tar/9.psd")},
    ),
    "stray member of a tar": (
        {"x.tar": tar({**PAIRS, "info.yaml": b"x"})},
        "x.tar",
        {"unknown format": (1, "x.tar/info.yaml")},
    ),
    "what lies beside tars": (
        {"0.tar": tar(PAIRS), "stats.json": "{}", "old/1.tar": tar(PAIRS)},
        "",
        {"other format": (1, "stats.json"), "tar in a folder below": (1, "old/1.tar")},
    ),
    "what lies beside parquet files": (
        {"x.parquet": parquet(STRUCTS), "a.csv": "b"},
        "",
        {"other format": (1, "a.csv")},
    ),
    "empty texts beside images": (
        {**PAIRS, "7.jpg": PHOTOS[0], "7.txt": " \n", "8.jpg": PHOTOS[0], "8.json": '{"text": ""}'},
        "",
        {"empty caption": (2, "7.txt")},
    ),
    "empty texts in a tar": (
        {"x.tar": tar({**PAIRS, "8.jpg": PHOTOS[0], "8.txt": b"", "9.jpg": PHOTOS[0], "9.txt": b"\xef\xbb\xbf "})},
        "x.tar",
        {"empty caption": (2, "x.tar/8.jpg")},
    ),
    "empty texts in a csv": (
        {**IMAGES, "x.csv": table([*ROWS, {"file_name": "0.jpg", "text": " "}])},
        "x.csv",
        {"empty caption": (1, "x.csv: 0.jpg")},
    ),
    "no texts in a jsonl": (
        {
            **IMAGES,
            "x.jsonl": lines([*ROWS, {"file_name": "0.jpg", "text": None}, {"file_name": "1.jpg", "text": []}]),
        },
        "x.jsonl",
        {"missing caption": (1, "x.jsonl: 0.jpg"), "empty caption": (1, "x.jsonl: 1.jpg")},
    ),
    "empty texts in a parquet file": (
        {"x.parquet": parquet([{**STRUCTS[0], "text": None}, *STRUCTS, {**STRUCTS[0], "text": "\u200b"}])},
        "x.parquet",
        {"missing caption": (1, "x.parquet, row 0"), "empty caption": (1, "x.parquet, row 4")},
    ),
    "damaged parquet file": (
        {**{f"{i}.parquet": parquet(STRUCTS[i : i + 1]) for i in range(3)}, "3.parquet": b"x"},
        "*.parquet",
        {"damaged file": (1, "3.parquet")},
    ),
    "parquet file of other columns": (
        {"0.parquet": parquet(STRUCTS), "1.parquet": parquet([{"a": 1}])},
        "*.parquet",
        {"other columns": (1, "1.parquet")},
    ),
}


@pytest.mark.parametrize("layout", LEFT_OUT)
def test_what_is_not_used_is_counted_with_an_example(layout, tmp_path):
    files, name, expected = LEFT_OUT[layout]
    write(tmp_path / "data", files)
    source = open_source(str(tmp_path / "data" / name), cache_dir=tmp_path / "cache")
    assert len(source) == 3 and sorted(source[i].captions[0] for i in range(3)) == sorted(TEXTS)
    assert source.skipped == {reason: count for reason, (count, _) in expected.items()}
    assert all(example in source.examples[reason] for reason, (_, example) in expected.items())
    assert all(f"{count} with {reason} (" in source.describe_skipped() for reason, (count, _) in expected.items())


CLASSES = {f"{text}/x.jpg": data for text, data in zip(TEXTS, PHOTOS)}
WITHOUT_CAPTIONS = {
    "images": (IMAGES, ""),
    "images of which some have a text": ({**IMAGES, "0.txt": TEXTS[0]}, ""),
    "tar": ({"x.tar": tar({**IMAGES, "0.txt": TEXTS[0].encode()})}, "x.tar"),
    "csv": ({**IMAGES, "x.csv": "image\n" + "\n".join(NAMES)}, "x.csv"),
    "parquet": ({"x.parquet": parquet([{"image": data} for data in PHOTOS])}, "x.parquet"),
    "zip": ({"x.zip": zipped(IMAGES)}, "x.zip"),
}


@pytest.mark.parametrize("layout", WITHOUT_CAPTIONS)
def test_images_are_read_without_captions_where_none_are_required(layout, tmp_path):
    files, name = WITHOUT_CAPTIONS[layout]
    write(tmp_path / "data", files)
    source = open_source(str(tmp_path / "data" / name), cache_dir=tmp_path / "cache", require_captions=False)
    samples = [source[i] for i in range(len(source))]
    assert [sample.image for sample in samples] == PHOTOS
    has_text = "0.txt" in str(files) or layout == "tar"
    assert [sample.captions for sample in samples] == [[TEXTS[0]] if has_text else [], [], []]


@pytest.mark.parametrize("layout", ["class folders", "zip", "tar", "saved", "parquet"])
def test_labels_are_read_and_their_names_are_captions(layout, tmp_path, capsys):
    from datasets import ClassLabel, Dataset, Features, Value

    labels = sorted(TEXTS)
    rows = {"jpg": PHOTOS, "label": [labels.index(text) for text in TEXTS]}
    files = {"zip": {"x.zip": zipped(CLASSES)}, "class folders": CLASSES}.get(layout, {})
    if layout == "tar":
        samples = dict(enumerate(zip(PHOTOS, rows["label"])))
        members = {f"{i}.{kind}": d for i, (p, n) in samples.items() for kind, d in (("jpg", p), ("cls", b"%d" % n))}
        files = {"x.tar": tar(members), "classnames.txt": "\n".join(labels)}
    table = Dataset.from_dict(rows, Features({"jpg": Value("binary"), "label": ClassLabel(names=labels)}))
    write(tmp_path / "data", files)
    if layout == "saved":
        table.save_to_disk(tmp_path / "data")
    if layout == "parquet":
        (tmp_path / "data").mkdir()
        table.to_parquet(tmp_path / "data" / "x.parquet")
    source = open_source(str(tmp_path / "data" / ("x.zip" if layout == "zip" else "")), cache_dir=tmp_path / "cache")
    samples = sorted((source[i] for i in range(3)), key=lambda sample: sample.label)
    assert source.labels == labels and sorted(source.label(i) for i in range(3)) == [0, 1, 2]
    assert [(s.captions, s.label) for s in samples] == [([label], i) for i, label in enumerate(labels)]
    assert [sample.image for sample in samples] == [PHOTOS[TEXTS.index(label)] for label in labels]
    assert "captions (a blue dog" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["x.csv", "x.zip", "photos/", "photos", "x.parquet", "tars/"])
def test_remote_layouts_are_read_through_fsspec(name, tmp_path):
    write(tmp_path / "photos", PAIRS)
    write(tmp_path, {"x.csv": table(rows_as("image", "text", "photos/")), "x.zip": zipped(PAIRS)})
    write(tmp_path, {"x.parquet": parquet(STRUCTS), "tars/a/x.tar": tar(PAIRS)})
    store = fsspec.filesystem("memory")
    store.put(str(tmp_path) + "/", "/data/", recursive=True)
    try:
        source = open_source(f"memory://data/{name}", cache_dir=tmp_path / "cache")
        assert sorted((s.captions, s.image) for s in map(source.__getitem__, range(3))) == sorted(
            ([text], photo) for text, photo in zip(TEXTS, PHOTOS)
        )
    finally:
        store.rm("/data", recursive=True)


def test_heic_is_read_with_the_extra(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif", reason="an extra")
    pillow_heif.register_heif_opener()
    write(tmp_path, {**{f"{i}.heic": photo(i, "HEIF") for i in range(3)}, "0.txt": "a cat"})
    assert open_source(str(tmp_path))[0].captions == ["a cat"]


def test_library_that_is_missing_is_named(tmp_path, monkeypatch):
    write(tmp_path, {"x.parquet": parquet(STRUCTS)})
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match="x.parquet' is read by datasets: `pip install datasets`"):
        open_source(str(tmp_path / "x.parquet"))


def test_page_names_all_columns_and_formats_that_are_read():
    page = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
    assert all(f"`{key}`" in page for key in (*IMAGE_KEYS, *CAPTION_KEYS))
    assert all(f" {ending}" in page for ending in IMAGE_ENDINGS) and all(kind in page for kind in TABLES)


def test_what_can_be_no_name_on_the_hub_is_not_asked_there(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos" / "cats").mkdir(parents=True)
    for name, hint in (("photoz/", "Did you mean 'photos'"), ("photos/dogs", "'photos' is there and holds cats")):
        with pytest.raises(UsageError, match=f"found neither a file nor a folder there. {hint}"):
            open_source(name)


def test_csv_in_the_letters_of_windows_is_read_and_told(tmp_path, capsys):
    write(tmp_path, {**IMAGES, "x.csv": "image,text\n0.jpg,caf\u00e9 crème\n".encode("cp1252")})
    source = open_source(str(tmp_path / "x.csv"))
    assert source[0].captions == ["caf\u00e9 crème"]
    assert "not all UTF-8: its other letters are read as Windows-1252" in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["tar", "images with txt", "parquet of structs", "csv", "zip of images with txt"])
def test_sample_is_named_by_its_place(layout, tmp_path):
    files, name, _ = READ[layout]
    write(tmp_path / "data", files)
    source = open_source(str(tmp_path / "data" / name), cache_dir=tmp_path / "cache")
    place = {"tar": "x.tar/1.jpg", "parquet of structs": f"{tmp_path}/data/x.parquet, row 1"}
    folder = tmp_path / "data" / ("x.zip/photos" if name == "x.zip" else "")
    assert source.name(1) == place.get(layout, f"{folder}/1.jpg")
