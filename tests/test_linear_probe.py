"""Logistic regression against scikit-learn and against its own definition; linear probe and few-shot on real images."""

import io
import tarfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from hfclip import HFCLIPConfig, HFCLIPImageProcessor, HFCLIPModel, HFCLIPProcessor, HFCLIPTokenizer
from hfclip.errors import UsageError
from hfclip.evaluation import DataSet
from hfclip.evaluation.few_shot import few_shot, shots_to_match
from hfclip.evaluation.linear_probe import GRID, linear_probe
from hfclip.evaluation.logistic import LabelRegressions, LogisticRegression
from hfclip.evaluation.zero_shot import zero_shot


# ------------------------------------------------------------------------------------------------- logistic regression


def clusters(num_samples=600, dim=24, num_classes=5, seed=0):
    """Features as towers make them: correlated, far from 0, one dimension much larger than the others; and targets."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.arange(1, dim + 1) ** -0.7
    turn = torch.linalg.qr(torch.randn(dim, dim, generator=generator)).Q
    targets = torch.randint(num_classes, (num_samples,), generator=generator)
    centres = 0.5 * torch.randn(num_classes, dim, generator=generator)
    features = (centres[targets] + torch.randn(num_samples, dim, generator=generator)) * spread @ turn
    features[:, 3] *= 30
    return features + torch.randn(dim, generator=generator), targets


def loss_of(fit, features, targets, prior=0.0):
    """The definition, in float64."""
    weight = fit.weight - prior
    penalised = weight[1] - weight[0] if len(weight) == 2 else weight
    logits = features.double() @ fit.weight.T + fit.bias
    return F.cross_entropy(logits, targets, reduction="sum") + fit.lam / 2 * penalised.square().sum()


@pytest.mark.parametrize("num_classes", [2, 5])
@pytest.mark.parametrize("lam", [30.0, 0.1, 1e-4])
def test_solution_is_that_of_scikit_learn(num_classes, lam):
    linear_model = pytest.importorskip("sklearn.linear_model")
    features, targets = clusters(5600, num_classes=num_classes)
    new, features, targets = features[600:], features[:600], targets[:600]
    fit = LogisticRegression(features, targets, num_classes).fit(lam)
    peer = linear_model.LogisticRegression(C=1 / lam, tol=1e-10, max_iter=100_000)
    peer.fit(features.double().numpy(), targets.numpy())
    weight, bias = torch.from_numpy(peer.coef_), torch.from_numpy(peer.intercept_)
    if num_classes == 2:
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    expected = loss_of(fit._replace(weight=weight, bias=bias), features, targets)
    assert fit.converged
    assert loss_of(fit, features, targets) <= expected * (1 + 1e-5)
    assert fit.loss == pytest.approx(expected.item(), rel=1e-5)
    agree = fit.logits(new).argmax(1) == torch.from_numpy(peer.predict(new.double().numpy()))
    assert agree.double().mean() >= 0.999


@pytest.mark.parametrize("num_samples", [300, 20])
def test_solution_has_no_gradient(num_samples):
    """Of the definition in float64, with and without prior, and with fewer samples than dimensions."""
    features, targets = clusters(num_samples)
    for prior in (None, torch.randn(5, 24, generator=torch.Generator().manual_seed(1))):
        fit = LogisticRegression(features, targets, 5, prior).fit(0.5, tolerance=1e-12)
        fit = fit._replace(weight=fit.weight.requires_grad_(), bias=fit.bias.requires_grad_())
        loss = loss_of(fit, features, targets, 0.0 if prior is None else prior)
        assert fit.loss == pytest.approx(loss.item(), rel=1e-6)
        d_weight, d_bias = torch.autograd.grad(loss, (fit.weight, fit.bias))
        scale = features.abs().sum()
        assert d_weight.abs().max() < 1e-5 * scale
        assert (d_bias.abs().max() < 1e-5 * num_samples) if prior is None else (fit.bias == 0).all()


def test_start_from_another_solution_changes_the_way_and_not_the_end():
    features, targets = clusters()
    part = LogisticRegression(features[:500], targets[:500], 5).fit(0.1)
    regression = LogisticRegression(features, targets, 5)
    cold, warm = regression.fit(0.1), regression.fit(0.1, part)
    assert warm.iterations < cold.iterations
    assert warm.loss == pytest.approx(cold.loss, rel=1e-6)
    assert regression.fit(0.1, cold).iterations <= 2


def test_what_has_not_converged_says_so():
    fit = LogisticRegression(*clusters(), 5).fit(1e-3, max_iterations=3)
    assert (fit.iterations, fit.converged) == (3, False)


def test_class_without_samples_is_never_predicted():
    features, targets = clusters()
    targets[targets == 2] = 1
    fit = LogisticRegression(features, targets, 7).fit(1.0)
    assert set(fit.logits(features).argmax(1).tolist()) == {0, 1, 3, 4}
    dense = LogisticRegression(features, torch.tensor([0, 1, 1, 2, 3])[targets], 4).fit(1.0)
    torch.testing.assert_close(fit.logits(features)[:, [0, 1, 3, 4]], dense.logits(features))


def test_each_label_of_several_is_a_regression_of_its_own():
    linear_model = pytest.importorskip("sklearn.linear_model")
    features, targets = clusters()
    rows = torch.stack([targets == 0, targets % 2 == 0, targets > 9, targets < 4], dim=1).long()
    rows[:50, 1] = -1  # ignored
    fit = LabelRegressions(features, rows, 4).fit(0.3, tolerance=1e-10)
    assert fit.converged and (fit.logits(features)[:, 2] == -torch.inf).all()  # of which there is none
    for label in (0, 1, 3):
        x, y = features[rows[:, label] >= 0].double(), rows[rows[:, label] >= 0, label]
        peer = linear_model.LogisticRegression(C=1 / 0.3, tol=1e-10, max_iter=100_000).fit(x.numpy(), y.numpy())
        both = (fit.weight[label], fit.bias[label]), (torch.from_numpy(peer.coef_[0]), peer.intercept_[0])
        losses = [F.binary_cross_entropy_with_logits(x @ w + b, y.double(), reduction="sum") for w, b in both]
        ours, theirs = (loss + 0.15 * w.square().sum() for loss, (w, _) in zip(losses, both))
        assert ours <= theirs * (1 + 1e-5)


def test_large_penalty_leaves_the_prior():
    features, targets = clusters()
    prior = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))
    fit = LogisticRegression(features, targets, 5, prior).fit(1e12)
    torch.testing.assert_close(fit.logits(features), features @ prior.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x, y: (x, y[:-1]), r"features are \(600, 24\) and targets \(599,\)"),
        (lambda x, y: (x, y.float()), "targets .* of torch.float32: expected .* an integer per sample"),
        (lambda x, y: (x.index_fill(0, torch.tensor(7), torch.nan), y), "features of sample 7 are not finite"),
        (lambda x, y: (x, y + 1), "found target 5: expected 0 to 4"),
        (lambda x, y: (x, y * 0), "found samples of 1 class: expected two or more"),
    ],
)
def test_rejects_samples_that_cannot_be_fitted(change, message):
    with pytest.raises(UsageError, match=message):
        LogisticRegression(*change(*clusters()), 5)


def test_rejects_penalty_that_is_none():
    with pytest.raises(UsageError, match="lambda is 0: expected a finite number above 0"):
        LogisticRegression(*clusters(), 5).fit(0)


# ------------------------------------------------------------------------------------------------------------- probing


LABELS = ["red", "green", "blue", "grey"]
COLOURS = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200], [110, 110, 110]])


@pytest.fixture(scope="module")
def model_and_processor():
    torch.manual_seed(0)
    tower = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    text = dict(model_type="hfclip_text", vocab_size=524, bos_token_id=522, eos_token_id=523, **tower)
    vision = dict(model_type="hfclip_vit", image_size=32, patch_size=16, **tower)
    model = HFCLIPModel(HFCLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    tokenizer = HFCLIPTokenizer.train_new_from_iterator([*LABELS, "a photo of a"] * 3, 524)
    return model, HFCLIPProcessor(image_processor=HFCLIPImageProcessor(size=32), tokenizer=tokenizer)


def write_images(folder, count, seed=0, labels=LABELS):
    """`count` images of noise per class around the colour of the class; the last class has 3."""
    generator = np.random.default_rng(seed)
    for number, label in enumerate(labels):
        (folder / label).mkdir(parents=True)
        for index in range(count if number < 3 else 3):
            pixels = COLOURS[number] + generator.normal(0, 60, (1, 1, 3)) + generator.normal(0, 30, (32, 32, 3))
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            image.save(folder / label / f"{index}.png")


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    folder = tmp_path_factory.mktemp("colours")
    write_images(folder / "train", 20)
    write_images(folder / "test", 10, seed=1)
    return folder


def test_probe_classifies_what_enters_the_projection(model_and_processor, colours):
    model, processor = model_and_processor
    result = linear_probe(model, processor, DataSet(colours))
    assert result.headline == "top1"
    assert result.metrics["top1"] > 0.6
    assert result.protocol["images"] == {"train": 63, "test": 33}
    assert result.protocol["lambda_chosen_on"] == "20% of train, stratified by class, seed 0"
    rows = result.tables["lambdas"]
    tried = [GRID.index(row["lambda"]) for row in rows]
    assert len(tried) in (14, 15) and {0, 16, 32, 48, 64, 80, 96} <= set(tried)
    assert tried == sorted(tried)
    best = max(rows, key=lambda row: (row["top1"], row["lambda"]))["lambda"]
    assert result.protocol["lambda"] == best
    assert {place for place in (GRID.index(best) - 1, GRID.index(best) + 1) if place in range(97)} <= set(tried)

    pixels, targets = {}, {}
    for split in ("train", "test"):
        folder = DataSet(colours).labelled(split)
        images, found = zip(*(folder.samples[index] for index in range(len(folder.samples))))
        pixels[split] = processor(images=list(images), return_tensors="pt")["pixel_values"]
        targets[split] = torch.tensor(found)
    with torch.no_grad():
        features = {split: model.eval().vision_model(values).pooler_output for split, values in pixels.items()}
    fit = LogisticRegression(features["train"], targets["train"], 4).fit(best)
    right = fit.logits(features["test"]).argmax(1) == targets["test"]
    assert result.metrics["top1"] == pytest.approx(right.double().mean().item())


def test_validation_split_chooses_lambda_and_joins_train(model_and_processor, colours):
    splits = {"train": colours / "train", "validation": colours / "test", "test": colours / "test"}
    layer = {"layer": "vision_model.encoder.layers.0", "pool": "mean"}
    result = linear_probe(*model_and_processor, DataSet(splits), metric="mean_per_class_recall", **layer)
    assert result.protocol["lambda_chosen_on"] == "the validation split"
    assert result.protocol["features"] == "mean of vision_model.encoder.layers.0"
    assert result.protocol["images"]["validation"] == 33
    assert result.headline == "mean_per_class_recall"


def test_given_lambda_is_not_searched_for(model_and_processor, colours):
    result = linear_probe(*model_and_processor, DataSet(colours), lam=0.3, layer="image_embeds")
    assert (result.protocol["features"], result.protocol["dim"]) == ("image_embeds", 16)
    assert result.protocol["lambda"] == 0.3
    assert not result.tables


def test_images_with_several_labels_are_probed_by_average_precision(model_and_processor, tmp_path):
    generator = np.random.default_rng(0)
    for split, count in (("train", 60), ("test", 30)):
        (tmp_path / split).mkdir()
        with tarfile.open(tmp_path / split / "0.tar", "w") as tar:
            for number, row in enumerate(generator.random((count, 3)) < 0.4):  # a label is a bright channel
                pixels = generator.integers(0, 100, (32, 32, 3)) + 120 * row
                for ending, save in (
                    ("png", lambda file: Image.fromarray(pixels.astype(np.uint8)).save(file, "png")),
                    ("npy", lambda file: np.save(file, row.astype(np.float32))),
                ):
                    save(file := io.BytesIO())
                    member = tarfile.TarInfo(f"{number}.{ending}")
                    member.size = file.tell()
                    tar.addfile(member, io.BytesIO(file.getvalue()))
    (tmp_path / "classnames.txt").write_text("red\ngreen\nblue\n")
    result = linear_probe(*model_and_processor, DataSet(tmp_path))
    assert result.headline == "map_11_point" and result.metrics["map_11_point"] > 0.95
    assert "each label" in result.protocol["loss"] and result.protocol["images"] == {"train": 60, "test": 30}
    with pytest.raises(UsageError, match="'top1' for data with several labels"):
        linear_probe(*model_and_processor, DataSet(tmp_path), metric="top1")
    with pytest.raises(UsageError, match="several labels per image"):
        few_shot(*model_and_processor, DataSet(tmp_path))


def test_few_shot_begins_at_zero_shot(model_and_processor, colours):
    result = few_shot(*model_and_processor, DataSet(colours), shots=[1, 4], num_seeds=2)
    again = few_shot(*model_and_processor, DataSet(colours), shots=[4, 1], num_seeds=2)
    assert result.metrics == again.metrics
    expected = zero_shot(*model_and_processor, DataSet(colours).labelled("test")).metrics["top1"]
    assert result.metrics["top1@0"] == pytest.approx(expected)
    assert result.headline == "top1@4"
    of_four = [row["top1"] for row in result.tables["probes"] if row["shots"] == 4]
    assert result.metrics["top1@4"] == pytest.approx(np.mean(of_four))
    assert result.tables["curve"][1]["deviation"] == pytest.approx(np.std(of_four, ddof=1))
    assert [row["images"] for row in result.tables["probes"]] == [4, 4, 15, 15]
    assert "Classes with fewer than 4 images, which give all they have: 1, the least 3." in result.notes


def test_few_shot_from_zero_shot_stays_there_under_a_large_penalty(model_and_processor, colours):
    options = {"shots": [1, 8], "num_seeds": 1, "start": "zero-shot"}
    tied = few_shot(*model_and_processor, DataSet(colours), lam=1e12, **options).metrics
    assert tied["top1@0"] == tied["top1@1"] == tied["top1@8"]
    free = few_shot(*model_and_processor, DataSet(colours), lam=1e-3, **options).metrics
    assert free["top1@8"] > tied["top1@8"]


@pytest.mark.parametrize(
    "accuracies, target, expected",
    [
        ([0.2, 0.4, 0.6], 0.4, 2),
        ([0.2, 0.4, 0.6], 0.5, 2**1.5),
        ([0.2, 0.1, 0.3], 0.25, 2**1.75),
        ([0.2, 0.4, 0.6], 0.1, 1),
        ([0.2, 0.4, 0.6], 0.7, None),
    ],
)
def test_shots_to_match_lie_on_a_logarithmic_scale(accuracies, target, expected):
    assert shots_to_match([1, 2, 4], accuracies, target) == pytest.approx(expected)


def test_rejects_data_that_cannot_be_probed(model_and_processor, colours, tmp_path):
    with pytest.raises(UsageError, match="expected test"):
        linear_probe(*model_and_processor, DataSet({"train": colours / "train"}))
    write_images(tmp_path / "train", 2, labels=LABELS[:3])
    splits = DataSet({"train": tmp_path / "train", "test": colours / "test"}, name="odd")
    with pytest.raises(UsageError, match="odd: train has 3 labels, .* and test 4"):
        linear_probe(*model_and_processor, splits)
    with pytest.raises(UsageError, match="'roc_auc' for 4 classes"):
        linear_probe(*model_and_processor, DataSet(colours), metric="roc_auc")
    with pytest.raises(UsageError, match="'map_11_point' for data with one label per image"):
        linear_probe(*model_and_processor, DataSet(colours), metric="map_11_point")
    with pytest.raises(UsageError, match=r"all of vision_model.* is \(5, 32\) for an image"):
        linear_probe(*model_and_processor, DataSet(colours), layer="vision_model.encoder.layers.0", pool="all")
    with pytest.raises(UsageError, match="no class has more than 20 images, by which lambda could be chosen"):
        few_shot(*model_and_processor, DataSet(colours), shots=[20])


def test_rejects_features_that_are_not_finite(model_and_processor, colours):
    model, processor = model_and_processor
    weight = model.vision_model.post_layernorm.weight
    before = weight.detach().clone()
    try:
        weight.data[0] = torch.nan
        with pytest.raises(UsageError, match="embeddings that are not finite"):
            linear_probe(model, processor, DataSet(colours))
    finally:
        weight.data.copy_(before)
