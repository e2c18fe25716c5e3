"""Mixtures of sources and phases of a run: shares, epochs and sizes are exact, and pure functions of the step."""

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from test_training_data import config_of, opened, resent, shards, tokenizer
from training_utils import caption, image_bytes, pairs, write_tar

from hfclip.data.samples import caption_id
from hfclip.data.sources import MixtureSource
from hfclip.errors import UsageError
from training.config import Config
from training.data.batches import Collate, PairDataset, build_loader
from training.data.batches import open_data as open_source
from training.data.order import Order, Place, StepSampler
from training.objectives.stored import StoredEmbeddings
from training.phases import Phase, Phases


def order_of(lengths, weights, batch_size, seed=0):
    return Order([f"source {i}" for i in range(len(lengths))], lengths, weights, batch_size, seed)


def batch_of(order, step):
    return [next(order(step, slot)) for slot in range(order.batch_size)]


def source_of(order, sample):
    return int(np.searchsorted(order.starts, sample, side="right")) - 1


# ---------------------------------------------------------------------------------------------------------------- order


MIXTURES = [
    ([40], [1.0], 16),
    ([100, 50], [1, 1], 16),
    ([1000, 300, 57], [5, 3, 1.7], 32),
    ([500, 9], [0.99, 0.01], 8),
    ([90, 90, 90, 90, 90], [1, 1, 1, 1, 1], 7),
    ([8, 8], [1, 1], 16),
]


@pytest.mark.parametrize(("lengths", "weights", "batch_size"), MIXTURES)
def test_every_batch_has_the_shares_and_no_sample_twice(lengths, weights, batch_size):
    order = order_of(lengths, weights, batch_size)
    shares = np.array(weights) / sum(weights) * batch_size
    total = np.zeros(len(lengths))
    for step in [*range(300), *range(4000, 4200)]:  # beyond the end of a round
        batch = batch_of(order, step)
        assert len(set(batch)) == batch_size, step
        counts = np.bincount([source_of(order, sample) for sample in batch], minlength=len(lengths))
        # One is allowed for what the round to a whole number in 4,096 steps moves.
        assert (counts >= np.floor(shares - 1e-3)).all() and (counts <= np.ceil(shares + 1e-3)).all(), step
        if step < 256:
            total += counts
    # Spread evenly: 256 steps have the share of 256 but for a few samples.
    assert np.abs(total - 256 * shares).max() <= 2


@pytest.mark.parametrize(("lengths", "weights", "batch_size"), MIXTURES)
def test_shares_of_a_round_are_exact_to_the_sample(lengths, weights, batch_size):
    order = order_of(lengths, weights, batch_size)
    shares = np.array(weights) / sum(weights) * batch_size * order.ROUND
    assert np.abs(order.taken[-1] - shares).max() <= 1 and order.taken[-1].sum() == batch_size * order.ROUND


@pytest.mark.parametrize(("lengths", "weights", "batch_size"), MIXTURES)
def test_each_source_goes_round_epochs_of_its_own(lengths, weights, batch_size):
    order = order_of(lengths, weights, batch_size)
    for source, (length, steps) in enumerate(zip(lengths, order.epoch_steps, strict=True)):
        epochs = []
        for epoch in range(3):
            batches = [batch_of(order, step) for step in range(epoch * steps, (epoch + 1) * steps)]
            samples = [sample for batch in batches for sample in batch if source_of(order, sample) == source]
            assert len(set(samples)) == len(samples), "a sample twice in an epoch"
            # What waits for the next epoch: less than a batch's part, and what uneven batches may take more.
            assert length - len(samples) < order.most[source] + 2
            epochs.append(samples)
        assert len(epochs[0]) < 4 or epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize(("lengths", "weights", "batch_size"), MIXTURES)
def test_stand_ins_are_of_the_same_source_and_of_no_other_slot(lengths, weights, batch_size):
    order = order_of(lengths, weights, batch_size)
    for step in (0, 3, 5000):
        rows = [list(order(step, slot)) for slot in range(batch_size)]
        own = []
        for row in rows:
            (source,) = {source_of(order, sample) for sample in row}
            assert len(set(row)) == len(row)
            own += row[: order.lengths[source] // order.most[source]]
        assert len(set(own)) == len(own)


def test_sources_are_spread_over_the_slots():
    """Else one rank would have all of the source with the largest pictures."""
    order = order_of([1000, 1000], [1, 1], 32)
    halves = [[source_of(order, sample) for sample in batch_of(order, step)[:16]] for step in range(20)]
    assert all(2 < sum(half) < 14 for half in halves)  # beyond chance once in 300,000 batches


def test_sources_of_one_length_have_orders_of_their_own():
    order = order_of([512, 512], [1, 1], 64)
    seen = [[], []]
    for step in range(order.epoch_steps[0]):
        for sample in batch_of(order, step):
            seen[sample // 512].append(sample % 512)
    assert sum(a == b for a, b in zip(*map(sorted, seen), strict=True)) > 400  # the same numbers
    assert sum(a == b for a, b in zip(*seen, strict=True)) < 20  # at other places


def test_one_source_gives_all_its_whole_batches():
    order = order_of([103], [1.0], 10)
    assert order.epoch_steps == [10] and order.most == [10]
    assert len({sample for step in range(10) for sample in batch_of(order, step)}) == 100


def test_large_numbers_take_no_time_and_no_memory():
    order = order_of([400_000_000, 3_000_000_000], [1, 4], 32_768)
    assert order.epoch_steps[0] == pytest.approx(400_000_000 / 32_768 * 5, abs=2)
    assert len(set(batch_of(order, 10_000_000))) == 32_768


@pytest.mark.parametrize(
    ("lengths", "weights", "message"),
    [
        ([100, 7], [1, 1], "'source 1' has 7 usable pairs, expected at least 8, its part of one batch of 16"),
        ([15], [1.0], "15 usable pairs.*one batch of 16"),
        ([100, 100], [1, 1e-6], "'source 1' has so small a share"),
    ],
)
def test_rejects_sources_that_cannot_fill_their_part(lengths, weights, message):
    with pytest.raises(UsageError, match=message):
        order_of(lengths, weights, 16)


# -------------------------------------------------------------------------------------------------------------- mixture


def two_sources(folder, weights=(3, 1), **data):
    """60 pairs 0 ... 59 and 20 pairs 1000 ... 1019, in tars."""
    shards(folder, 60)
    write_tar(folder / "other.tar", pairs(range(1000, 1020)))
    mixture = {str(folder / "shards"): weights[0], str(folder / "other.tar"): weights[1]}
    config = config_of(folder, data={"train": mixture, **data})
    return open_source(config.data.train, config.data, "train", 32), config


def batches(config, source, stop, rank=0, num_ranks=1, collate=None, start=0, phases=None):
    dataset = PairDataset(source, config, 32)
    collate = collate or Collate(tokenizer(), pad_to_max=False, group=False)
    options = {"start": start, "stop": stop, "rank": rank, "num_ranks": num_ranks, "phases": phases}
    return list(build_loader(dataset, collate, config, **options))


def texts(batch):
    return tokenizer().batch_decode(batch["input_ids"], skip_special_tokens=True)


def test_mixture_is_its_sources_in_turn(tmp_path):
    source, _ = two_sources(tmp_path)
    first, second = opened(tmp_path, tmp_path / "shards"), opened(tmp_path, tmp_path / "other.tar")
    assert len(source) == 80
    assert [source[i] for i in (0, 59, 60, 79)] == [first[0], first[59], second[0], second[19]]
    assert source.captions(60) == [caption(1000)]


def test_batches_of_a_mixture_are_the_same_for_any_ranks_and_workers(tmp_path):
    source, config = two_sources(tmp_path)
    assert PairDataset(source, config, 32).steps_per_epoch == 5
    alone = batches(config, source, 7)
    _, several = two_sources(tmp_path, num_workers=2)
    split = [batches(several, resent(source), 7, rank, 3) for rank in range(3)]
    others = {caption(i) for i in range(1000, 1020)}
    for step, whole in enumerate(alone):
        parts = [part[step] for part in split]
        assert torch.equal(torch.cat([part["pixel_values"] for part in parts]), whole["pixel_values"])
        assert sum(map(texts, parts), []) == texts(whole)
        assert len(set(texts(whole))) == 16 and sum(text in others for text in texts(whole)) == 4
    assert texts(batches(config, source, 7, start=6)[0]) == texts(alone[6])


def test_max_samples_holds_for_each_source_and_skipped_samples_add_up(tmp_path):
    write_tar(tmp_path / "a.tar", [*pairs(range(20)), ("x.jpg", image_bytes(0))])
    write_tar(tmp_path / "b.tar", [*pairs(range(100, 120)), ("x.jpg", image_bytes(0)), ("y.txt", b"a cat")])
    mixture = {str(tmp_path / "a.tar"): 1, str(tmp_path / "b.tar"): 1}
    config = config_of(tmp_path, data={"train": mixture, "max_samples": 12})
    source = open_source(config.data.train, config.data, "train", 32)
    assert len(source) == 24 and source.captions(12) == [caption(100)]
    assert source.skipped == Counter({"missing caption": 2, "missing image": 1})
    seen = {text for batch in batches(config, source, 6) for text in texts(batch)}
    assert seen == {caption(i) for i in [*range(12), *range(100, 112)]}


def test_mixtures_hold_sources_of_any_kind(tmp_path):
    shards(tmp_path, 40)
    config = config_of(tmp_path, data={"train": {str(tmp_path / "shards"): 1, "scenes": 1.5}})
    source = open_source(config.data.train, config.data, "train", 32)
    assert isinstance(source, MixtureSource) and source.names[1] == "scenes" and len(source) == 50_040
    assert [len(batch["pixel_values"]) for batch in batches(config, source, 3)] == [16] * 3


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ({}, "data.train: found .*expected"),
        ({"scenes": 0}, "'scenes' has the weight 0, expected a number above 0"),
        ({"scenes": -1.0}, "weight -1.0"),
        ({"scenes": math.nan}, "weight nan"),
        ({"scenes": math.inf}, "weight inf"),
        ({"scenes": "much"}, r"data.train\['scenes'\]: found 'much', expected number"),
        ({"scenes": True}, r"data.train\['scenes'\]: found True, expected number"),
        ({"scenes": None}, r"data.train\['scenes'\]: found None, expected number"),
        ({"scenes": 1, "no/such/folder/at/all": 1}, "no/such/folder"),
    ],
)
def test_rejects_wrong_mixtures(mixture, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        data = config_of(tmp_path, data={"train": mixture}).data
        open_source(mixture, data, "train", 32)


# --------------------------------------------------------------------------------------------------------------- phases


FULL = Phase(image_size=32, text_length=16, patch_dropout=0.0)


def phases_of(*given, full=FULL, stride=8, steps_per_epoch=10, total_steps=40):
    config = Config.from_dict({"model": {"checkpoint": "clip"}, "data": {"phases": list(given)}})
    return Phases(config.data.phases, full, stride=stride, steps_per_epoch=steps_per_epoch, total_steps=total_steps)


def test_phases_follow_each_other_and_full_settings_end_the_run():
    phases = phases_of(
        {"epochs": 1.5, "image_size": 16, "text_length": 8, "patch_dropout": 0.5}, {"epochs": 1, "image_size": 24}
    )
    expected = [Phase(16, 8, 0.5)] * 15 + [Phase(24, 16, 0.0)] * 10 + [FULL] * 15
    assert [phases.at(step) for step in range(40)] == expected
    assert [phases_of().at(step) for step in (0, 39)] == [FULL, FULL]


def test_a_phase_may_keep_any_size_of_the_model():
    full = Phase(image_size=30, text_length=16, patch_dropout=0.25)
    assert phases_of({"epochs": 4, "text_length": 4}, full=full).at(39) == Phase(30, 4, 0.25)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"epochs": 1, "image_sise": 16},
            r"'data.phases\[0\].image_sise'. Did you mean 'data.phases\[0\].image_size'",
        ),
        ({"epochs": 1, "lr": 1}, r"'data.phases\[0\].lr'. Expected one of: data.phases\[0\].epochs"),
        ({"image_size": 16}, r"data.phases\[0\].epochs: found None"),
        ({"epochs": 0}, "epochs: found 0.0, expected a number above 0"),
        ({"epochs": math.nan}, "epochs: found nan"),
        ({"epochs": "two"}, "epochs: found 'two'"),
        ({"epochs": 0.01}, "less than a step"),
        ({"epochs": 4.1}, "4.1 epochs, 41 steps, expected at most the 40 steps"),
        ({"epochs": 1, "image_size": 20}, "image_size: found 20, expected a multiple of 8"),
        ({"epochs": 1, "image_size": 40}, "at most the 32 of the model"),
        ({"epochs": 1, "image_size": 0}, "image_size: found 0"),
        ({"epochs": 1, "image_size": 16.0}, "image_size: found 16.0"),
        ({"epochs": 1, "text_length": 17}, "text_length: found 17, expected at most the model's 16"),
        ({"epochs": 1, "text_length": 2}, "text_length: found 2"),
        ({"epochs": 1, "patch_dropout": 1}, "patch_dropout: found 1.0, expected null or 0 <= value < 1"),
        ({"epochs": 1, "patch_dropout": True}, "patch_dropout: found True"),
    ],
)
def test_rejects_wrong_phases(entry, message):
    with pytest.raises(UsageError, match=message):
        phases_of(entry)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_have_the_sizes_of_their_phase(workers, tmp_path):
    long = " ".join(["fish"] * 40).encode()
    members = [(f"{i}.{kind}", data) for i in range(16) for kind, data in (("jpg", image_bytes(i)), ("txt", long))]
    (tmp_path / "shards").mkdir()
    write_tar(tmp_path / "shards" / "0.tar", members)
    config, source = config_of(tmp_path, data={"num_workers": workers}), opened(tmp_path)
    phases = phases_of(
        {"epochs": 2, "image_size": 16, "text_length": 6}, {"epochs": 1, "image_size": 24}, steps_per_epoch=1
    )
    found = batches(config, source, 5, phases=phases)
    assert [batch["pixel_values"].shape[-1] for batch in found] == [16, 16, 24, 32, 32]
    assert [batch["input_ids"].shape[1] for batch in found] == [6, 6, 16, 16, 16]
    for batch in found:
        assert (batch["input_ids"] == tokenizer().eos_token_id).sum(dim=1).tolist() == [1] * 16
        assert (batch["input_ids"][:, -1] == tokenizer().eos_token_id).all()  # the end token stays last
        assert batch["counts"][-1] == 16
    padded = Collate(tokenizer(), pad_to_max=True, group=False)
    assert [batch["input_ids"].shape[1] for batch in batches(config, source, 4, collate=padded, phases=phases)] == [
        6,
        6,
        16,
        16,
    ]
    later = batches(config, source, 5, start=1, phases=phases)
    assert all(torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(found[1:], later, strict=True))


def test_places_carry_the_phase():
    phases = phases_of({"epochs": 1, "image_size": 16}, steps_per_epoch=2)
    places = list(StepSampler(1, 3, range(4, 6), phases))
    assert places == [[Place(1, 4, 16, 16), Place(1, 5, 16, 16)], [Place(2, 4, 32, 16), Place(2, 5, 32, 16)]]


# ---------------------------------------------------------------------------------------------------------- micro-batches


def test_sorted_by_length_pairs_stay_together(tmp_path):
    words = [" ".join(["fish"] * (1 + i * 7 % 11)) + f" {i}" for i in range(16)]
    members = [
        (f"{i}.{kind}", data)
        for i in range(16)
        for kind, data in (("jpg", image_bytes(i)), ("txt", words[i].encode()))
    ]
    (tmp_path / "shards").mkdir()
    write_tar(tmp_path / "shards" / "0.tar", members)
    config, source = config_of(tmp_path), opened(tmp_path)
    plain, by_length = (
        batches(config, source, 1, collate=Collate(tokenizer(), pad_to_max=False, group=True, sort_by_length=on))[0]
        for on in (False, True)
    )
    lengths = by_length["attention_mask"].sum(dim=1).tolist()
    assert lengths == sorted(lengths, reverse=True) != plain["attention_mask"].sum(dim=1).tolist()

    def as_pairs(batch):
        names = ("pixel_values", "input_ids", "attention_mask", "group_id")
        rows = zip(*(batch[name] for name in names), strict=True)
        return sorted(tuple(value.numpy().tobytes() for value in row) for row in rows)

    assert as_pairs(plain) == as_pairs(by_length)
    assert torch.equal(plain["counts"], by_length["counts"])


# ------------------------------------------------------------------------------------------------------------ embeddings


def store_embeddings(folder, num_samples):
    """Embeddings of pairs 0 ... num_samples - 1: one direction for each image, and the opposite for its caption."""
    rows = np.eye(num_samples, dtype=np.float16)
    ids = np.array([caption_id(caption(i)) for i in range(num_samples)])
    arrays = {"offsets": np.arange(num_samples + 1), "caption_ids": ids, "image_embeds": rows, "text_embeds": -rows}
    arrays["keys"] = np.array([f"{i:03}".encode() for i in range(num_samples)])
    folder.mkdir()
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    (folder / "embeddings.json").write_text(json.dumps({"scale": 10.0, "num_samples": num_samples}))
    return folder


@pytest.mark.parametrize("sort_by_length", [False, True])
def test_stored_embeddings_come_with_their_pairs(sort_by_length, tmp_path):
    source, config = opened(tmp_path, shards(tmp_path, 48, num_shards=1)), config_of(tmp_path)
    stored = StoredEmbeddings.open(store_embeddings(tmp_path / "stored", 48), source)
    collate = Collate(
        tokenizer(), pad_to_max=False, group=False, sort_by_length=sort_by_length, targets=stored.targets
    )
    for batch in batches(config, source, 3, collate=collate):
        samples = batch["teacher_image_embeds"].argmax(dim=1).tolist()
        assert [caption(sample) for sample in samples] == texts(batch)
        assert torch.equal(batch["teacher_text_embeds"], -batch["teacher_image_embeds"])


def test_stored_embeddings_of_other_data_fail_with_a_message(tmp_path):
    source, config = opened(tmp_path, shards(tmp_path, 48, num_shards=1)), config_of(tmp_path)
    stored = StoredEmbeddings(store_embeddings(tmp_path / "stored", 48))
    write_tar(tmp_path / "shards" / "00.tar", pairs(range(100, 148)))
    collate = Collate(tokenizer(), pad_to_max=False, group=False, targets=stored.targets)
    batch = batches(config, opened(tmp_path, tmp_path / "shards"), 1, collate=collate)[0]
    assert "made for other data" in batch["failure"] and len(source) == 48
