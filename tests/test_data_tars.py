"""Headers of tars, hostile and damaged ones: as tarfile finds them or better, in a bounded time, and what is lost is told."""

import io
import random
import tarfile

import pytest
from training_utils import caption, image_bytes, pairs, tiny_recipe, write_tar

from hfclip.data.samples import BadSample
from hfclip.data.tars import files_of, index_tar
from training.config import Config
from training.data.batches import open_data as open_source


BLOCK = 512


def found_in(data):
    damage = set()
    return list(files_of(io.BytesIO(data), damage)), damage


def header(name, size=b"00000001000", kind=b"0"):
    """A header whose checksum is right, whatever it says: `size` as it stands in the block."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    block[124:136] = size.ljust(12, b"\0")
    block[156:157] = kind
    return signed(block)


def signed(block):
    block[148:156] = b"        "
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def member(name, data=b"x" * BLOCK, kind=b"0"):
    return header(name, b"%011o" % len(data), kind) + data + bytes(-len(data) % BLOCK)


def pax(**records):
    """An extended header with these records, or with `raw` bytes."""
    data = records.pop("raw", b"")
    for key, value in records.items():
        rest = f" {key}={value}\n".encode()
        length = len(rest) + len(str(len(rest) + 3))
        data += str(length).encode() + rest
    return member("pax", data, b"x")


END = bytes(2 * BLOCK)
AFTER = member("after.jpg")


@pytest.mark.parametrize(
    "size", [b"-0000001000", b"+0000001000", b"0o000001000", b"1_000", b"9", b"\x80" + b"\xff" * 11, b"\xff" * 12]
)
def test_size_that_is_no_number_of_bytes_costs_its_member(size):
    """2^63 and more and negative ones in base 256, signs and underscores, which int() takes."""
    assert found_in(member("a.jpg") + header("b.jpg", size) + bytes(BLOCK) + AFTER + END) == (
        [("a.jpg", BLOCK, BLOCK), ("after.jpg", 5 * BLOCK, BLOCK)],
        {"damaged shard"},
    )


@pytest.mark.parametrize("size", [b"77777777777", b"\x80" + bytes(3) + b"\x00\xff" + bytes(6)])
def test_size_beyond_the_end_does_not_hide_what_follows(size):
    assert found_in(header("b.jpg", size) + bytes(BLOCK) + AFTER + END) == (
        [("after.jpg", 3 * BLOCK, BLOCK)],
        {"damaged shard"},
    )


@pytest.mark.parametrize(
    "record",
    [pax(size=-512), pax(size="1e3"), pax(size=""), pax(raw=b"11 path=a.j"), pax(raw=b"99999999999 path=a\n")],
)
def test_extended_header_that_is_not_understood_costs_its_member(record):
    found, damage = found_in(record + member("b.jpg") + AFTER + END)
    assert [name for name, _, _ in found] == ["after.jpg"] and damage == {"damaged shard"}


def test_many_headers_in_front_of_a_file_are_read_one_after_the_other():
    """5,000 long names and extended headers; the first of them counts, as for tarfile."""
    many = member("long", b"first.jpg\0", b"L") + 5000 * (member("long", b"other.jpg\0", b"L") + pax(path="third.jpg"))
    assert found_in(many + member("b.jpg") + AFTER + END) == (
        [("first.jpg", len(many) + BLOCK, BLOCK), ("after.jpg", len(many) + 3 * BLOCK, BLOCK)],
        set(),
    )


def test_endless_name_is_not_read_into_memory(tmp_path):
    with open(tmp_path / "x.tar", "wb") as file:
        file.write(header("long", b"%011o" % (1 << 32), b"L"))
        file.seek(1 << 32, 1)  # a hole: takes no room on the disk
        file.write(member("b.jpg") + AFTER + END)
    damage = set()
    with open(tmp_path / "x.tar", "rb", buffering=0) as file:
        assert [name for name, _, _ in files_of(file, damage)] == ["after.jpg"] and damage == {"damaged shard"}


def test_hole_of_zeros_is_not_the_end():
    """A file that was fetched in parts, one of which is missing."""
    assert found_in(member("a.jpg") + bytes(4 * BLOCK) + AFTER + END)[0][1][0] == "after.jpg"
    assert found_in(member("a.jpg") + bytes(4 * BLOCK) + AFTER + END)[1] == {"damaged shard"}
    assert found_in(AFTER + bytes(40 * BLOCK))[1] == set()


def test_files_that_are_stored_with_gaps_are_no_samples(tmp_path):
    block = bytearray(header("sparse.jpg", b"%011o" % BLOCK, b"S"))
    block[482] = 1  # another block of its map follows
    second = bytes(BLOCK)
    assert found_in(signed(block) + second + bytes(BLOCK) + AFTER + END) == ([("after.jpg", 4 * BLOCK, BLOCK)], set())


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT])
def test_mutated_tar_gives_what_tarfile_finds_and_more(format, tmp_path):
    """400 times: bytes changed anywhere, or fields of a header with a checksum that agrees."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for i in range(6):
            entry = tarfile.TarInfo(f"{'d' * 90}/{'e' * 40}/{i}.jpg")
            entry.size = 300 * i
            tar.addfile(entry, io.BytesIO(random.Random(i).randbytes(entry.size)))
    whole = file.getvalue()
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        places = [entry.offset for entry in tar]
    more, rng = 0, random.Random(0)
    for _ in range(400):
        data = bytearray(whole)
        if rng.random() < 0.5:
            for _ in range(rng.randint(1, 8)):
                data[rng.randrange(len(data) - 8000)] = rng.randrange(256)
        else:
            place = rng.choice(places)
            block = data[place : place + BLOCK]
            field, values = rng.choice(
                [(124, b"01234567 \0"), (135, b"01234567"), (156, b"\0001257LKAZ"), (0, b"a/\0"), (345, b"b\0/")]
            )
            block[field + rng.randrange(11 if field == 124 else 1)] = rng.choice(values)
            data[place : place + BLOCK] = signed(block)
        expected = []
        try:
            with tarfile.open(fileobj=io.BytesIO(data)) as tar:
                for entry in tar:
                    if entry.isfile() and entry.offset_data + entry.size <= len(data):
                        expected.append((entry.name, entry.offset_data, entry.size))
        except (tarfile.TarError, OSError, EOFError):
            pass
        found, _ = found_in(bytes(data))
        assert set(expected) <= set(found)
        more += len(found) > len(expected)
    assert more > 100


def test_sample_behind_four_gigabytes_is_read_and_the_large_one_counted(tmp_path):
    """Sizes and places beyond 32 bits; the member is a hole and takes no room on the disk."""
    (tmp_path / "shards").mkdir()
    size = (1 << 32) + 100
    with open(tmp_path / "shards" / "0.tar", "wb") as file:
        file.write(header("a.jpg", b"%011o" % size))
        file.seek(size + -size % BLOCK, 1)
        file.write(member("a.txt", b"a cat"))
        file.write(member("b.jpg", image_bytes(1)) + member("b.txt", caption(1).encode()) + END)
    members, damage = index_tar(tmp_path / "shards" / "0.tar")
    assert members["image_size"].tolist() == [size, len(image_bytes(1))] and not damage
    config = Config.from_dict(tiny_recipe(tmp_path)).data
    source = open_source(config.train, config, "train", 32)
    assert source[1][:2] == (image_bytes(1), [caption(1)])
    with pytest.raises(BadSample, match="too large image"):
        source[0]


def test_shard_of_hostile_headers_costs_itself(tmp_path):
    (tmp_path / "shards").mkdir()
    write_tar(tmp_path / "shards" / "0.tar", pairs(range(4)))
    (tmp_path / "shards" / "1.tar").write_bytes(header("b.jpg", b"-0000001000") + bytes(2 * BLOCK))
    config = Config.from_dict(tiny_recipe(tmp_path)).data
    source = open_source(config.train, config, "train", 32)
    assert len(source) == 4 and source.skipped == {"not a tar": 1}
