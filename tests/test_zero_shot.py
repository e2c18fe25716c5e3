"""The cached zero-shot classifier: against the model's own logits, in what it takes, saves and refuses."""

import copy
import json

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from hfclip import HFCLIPConfig, HFCLIPImageProcessor, HFCLIPModel, HFCLIPProcessor, HFCLIPTokenizer
from hfclip.zero_shot import ZeroShotClassifier, embed_labels, model_fingerprint


LABELS = ["cat", "golden retriever", "aircraft carrier", "tulip", "bus", "{c} in braces"]
TEMPLATES = ["a photo of a {}.", "a blurry photo of the {c}", lambda label: f"{label}, drawn by hand and hung up"]

# float32 towers of two layers, whose batches and paddings differ: a few hundred roundings of 6e-8 on values below 1.
CLOSE = dict(rtol=1e-5, atol=1e-5)


def tiny_model(attention_dropout=0.0, **config):
    torch.manual_seed(0)
    tower = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    tower.update(attention_dropout=attention_dropout)
    vocab_size = 514 + 20
    text = dict(model_type="hfclip_text", vocab_size=vocab_size, max_position_embeddings=64, **tower)
    text.update(bos_token_id=vocab_size - 2, eos_token_id=vocab_size - 1)
    vision = dict(model_type="hfclip_vit", image_size=32, patch_size=8, **tower)
    return HFCLIPModel(HFCLIPConfig(text_config=text, vision_config=vision, projection_dim=16, **config)).eval()


@pytest.fixture(scope="module")
def processor():
    texts = [template.format(label) for label in LABELS for template in ("a photo of a {}", "the {} on a table")]
    tokenizer = HFCLIPTokenizer.train_new_from_iterator(texts, 514 + 20)
    return HFCLIPProcessor(image_processor=HFCLIPImageProcessor(size=32), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def classifier(model, processor):
    return ZeroShotClassifier(model, processor, LABELS, TEMPLATES)


def photos(count, seed=0):
    generator = np.random.default_rng(seed)
    return [PIL.Image.fromarray(generator.integers(0, 256, (40, 50, 3), dtype=np.uint8)) for _ in range(count)]


@torch.no_grad()
def logits_of_model(model, processor, images, labels):
    """What the model itself says to "a photo of a {label}."."""
    prompts = ["a photo of a " + label + "." for label in labels]
    return model(**processor(images=images, text=prompts, padding=True, return_tensors="pt")).logits_per_image


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 4, 256])
def test_label_embeddings_are_means_of_unit_text_embeddings(model, processor, batch_size):
    found = embed_labels(model, processor, LABELS, TEMPLATES, batch_size)
    for label, embeds in zip(LABELS, found, strict=True):
        prompts = [f"a photo of a {label}.", f"a blurry photo of the {label}", f"{label}, drawn by hand and hung up"]
        inputs = [processor(text=[prompt], return_tensors="pt") for prompt in prompts]
        each = [F.normalize(model.encode_text(one["input_ids"], normalize=False), dim=-1) for one in inputs]
        torch.testing.assert_close(embeds, F.normalize(torch.cat(each).mean(dim=0), dim=-1), **CLOSE)
    assert found.dtype == torch.float32 and not found.requires_grad


def test_kinds_of_templates_make_the_same_prompts(model, processor):
    embeds = [
        embed_labels(model, processor, LABELS, [template])
        for template in ("a photo of a {}.", "a photo of a {c}.", lambda label: f"a photo of a {label}.")
    ]
    assert torch.equal(embeds[0], embeds[1]) and torch.equal(embeds[0], embeds[2])


def test_scores_are_the_softmax_of_the_models_logits(model, processor):
    images = photos(5)
    logits = logits_of_model(model, processor, images, LABELS)
    classifier = ZeroShotClassifier(model, processor, LABELS)
    torch.testing.assert_close(classifier.logits(images), logits, **CLOSE)
    for result, scores in zip(classifier(images, top_k=6), logits.softmax(dim=-1), strict=True):
        assert [entry["label"] for entry in result] == [LABELS[i] for i in scores.argsort(descending=True)]
        found = torch.tensor([entry["score"] for entry in result])
        torch.testing.assert_close(found, scores.sort(descending=True).values, **CLOSE)


def test_scores_are_sigmoids_in_a_model_with_a_bias(processor):
    model = tiny_model(logit_bias_init_value=-3.0)
    images = photos(2)
    logits = logits_of_model(model, processor, images, LABELS)
    result = ZeroShotClassifier(model, processor, LABELS)(images, top_k=6)
    found = torch.tensor([[entry["score"] for entry in entries] for entries in result])
    torch.testing.assert_close(found, logits.sigmoid().sort(dim=-1, descending=True).values, **CLOSE)
    assert (found.sum(dim=-1) - 1).abs().min() > 0.01


def test_takes_one_image_or_several_of_any_kind(classifier, tmp_path):
    image = photos(1)[0]
    image.save(tmp_path / "photo.png")
    expected = classifier(image)
    assert isinstance(expected[0], dict) and len(expected) == 5
    for same in (tmp_path / "photo.png", str(tmp_path / "photo.png"), (tmp_path / "photo.png").read_bytes()):
        assert classifier(same) == expected
    assert classifier(np.asarray(image)) == expected
    assert classifier([image]) == [expected]
    assert classifier(np.asarray(image)[None]) == [expected]
    rgba = np.random.default_rng(0).integers(0, 256, (3, 4, 40, 50), dtype=np.uint8)  # channels, since it is a batch
    images = [PIL.Image.fromarray(planes.transpose(1, 2, 0)) for planes in rgba]
    assert classifier(rgba, batch_size=2) == classifier(images, batch_size=2)


def test_batches_do_not_change_the_scores(classifier, processor):
    images = photos(5)
    expected = classifier.logits(images)
    torch.testing.assert_close(classifier.logits(images, batch_size=2), expected, **CLOSE)
    pixel_values = processor(images=images, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(classifier.logits(pixel_values=pixel_values, batch_size=2), expected, **CLOSE)
    found = classifier(images, batch_size=2)
    assert [entries[0]["label"] for entries in found] == [LABELS[row.argmax()] for row in expected]


def test_top_k_limits_the_labels(classifier):
    image = photos(1)[0]
    every = classifier(image, top_k=100)
    assert len(every) == len(LABELS) and abs(sum(entry["score"] for entry in every) - 1) < 1e-5
    assert classifier(image, top_k=2) == every[:2]


@torch.no_grad()
def test_bfloat16_embeddings_are_compared_in_float32(processor):
    model = tiny_model().bfloat16()
    images = photos(3)
    texts = processor(text=[f"a photo of a {label}." for label in LABELS], padding=True, return_tensors="pt")
    pixel_values = processor(images=images, return_tensors="pt")["pixel_values"].bfloat16()
    text_embeds = model.encode_text(**texts, normalize=False)
    image_embeds = model.encode_image(pixel_values, normalize=False)
    logits = ZeroShotClassifier(model, processor, LABELS).logits(images)
    assert logits.dtype == torch.float32 and image_embeds.dtype == torch.bfloat16
    cosines = F.normalize(image_embeds.float(), dim=-1) @ F.normalize(text_embeds.float(), dim=-1).T
    expected = model.logit_scale.float().exp() * cosines
    torch.testing.assert_close(logits, expected, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("autocast", [False, True])
def test_ranking_of_bfloat16_embeddings_is_that_of_their_float32_product(model, processor, autocast):
    """1,000 labels, 200 images: half-precision products would make a ninth of the images tie for the best label."""
    generator = torch.Generator().manual_seed(0)
    labels = [f"label {i}" for i in range(1000)]
    embeds = F.normalize(torch.randn(1000, 16, generator=generator), dim=-1).bfloat16()
    pixel_values = torch.randn(200, 3, 32, 32, generator=generator)
    classifier = ZeroShotClassifier(model, processor, labels, label_embeds=embeds)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = classifier.logits(pixel_values=pixel_values, batch_size=200)
        images = model.encode_image(pixel_values, normalize=False)
    assert images.dtype == (torch.bfloat16 if autocast else torch.float32) and logits.dtype == torch.float32
    expected = model.logit_scale.exp() * F.normalize(images.float(), dim=-1) @ embeds.float().T
    assert torch.equal(logits.argmax(dim=1), expected.argmax(dim=1))
    best, second = logits.topk(2, dim=1).values.unbind(dim=1)
    assert (best > second).all()
    half = F.normalize(images.float(), dim=-1).bfloat16() @ embeds.T
    assert (half.topk(2, dim=1).values.diff() == 0).any()  # or the test could not fail


@pytest.mark.parametrize("pad_token_id", [0, 7, 533])
def test_padding_side_and_pad_token_do_not_change_label_embeddings(model, processor, pad_token_id):
    expected = embed_labels(model, processor, LABELS)
    for side in ("left", "right"):
        tokenizer = copy.deepcopy(processor.tokenizer)
        tokenizer.padding_side, tokenizer.pad_token_id = side, pad_token_id
        other = HFCLIPProcessor(image_processor=processor.image_processor, tokenizer=tokenizer)
        ids = other(text=LABELS, return_tensors="pt")["input_ids"]
        assert (ids[:, 0] == pad_token_id).any() == (side == "left")
        torch.testing.assert_close(embed_labels(model, other, LABELS), expected, **CLOSE)


def test_embeds_in_eval_mode_and_restores_the_mode_of_every_module(processor):
    model = tiny_model(attention_dropout=0.5)
    expected = ZeroShotClassifier(model, processor, LABELS).logits(photos(2))
    model.train()
    model.vision_model.eval()  # as a frozen tower
    modes = [module.training for module in model.modules()]
    assert torch.equal(ZeroShotClassifier(model, processor, LABELS).logits(photos(2)), expected)
    assert [module.training for module in model.modules()] == modes and len(set(modes)) == 2
    assert torch.is_grad_enabled()


def test_saves_and_loads_without_embedding_again(model, classifier, tmp_path):
    classifier.save(tmp_path / "pets")
    model.save_pretrained(tmp_path / "model")
    reloaded = HFCLIPModel.from_pretrained(tmp_path / "model")
    loaded = ZeroShotClassifier.load(tmp_path / "pets", reloaded, classifier.processor)
    assert torch.equal(loaded.label_embeds, classifier.label_embeds)
    assert loaded.labels == LABELS and loaded(photos(2)) == classifier(photos(2))
    assert loaded.templates == [*TEMPLATES[:2], "{}, drawn by hand and hung up"]
    loaded.save(tmp_path / "again")
    for name in ("zero_shot_classifier.json", "zero_shot_classifier.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "pets" / name).read_bytes()


def test_rejects_loading_for_another_model(model, classifier, tmp_path):
    classifier.save(tmp_path)
    other = tiny_model()
    with torch.no_grad():
        other.text_projection.weight[0, 0] += 1e-3
    remedy = "found {}.*build it anew: ZeroShotClassifier"
    with pytest.raises(ValueError, match=remedy.format(model_fingerprint(other)[:12])):
        ZeroShotClassifier.load(tmp_path, other, classifier.processor)
    same_weights = tiny_model()
    same_weights.config.text_config.hidden_act = "gelu"
    with pytest.raises(ValueError, match=remedy.format(model_fingerprint(same_weights)[:12])):
        ZeroShotClassifier.load(tmp_path, same_weights, classifier.processor)


def test_fingerprint_ignores_where_a_model_came_from(model, tmp_path):
    model.save_pretrained(tmp_path)
    elsewhere = HFCLIPModel.from_pretrained(tmp_path, attn_implementation="eager")
    assert model_fingerprint(elsewhere) == model_fingerprint(model)
    half = tiny_model().bfloat16()
    half.save_pretrained(tmp_path)
    assert model_fingerprint(HFCLIPModel.from_pretrained(tmp_path, dtype=torch.float32)) == model_fingerprint(half)
    assert model_fingerprint(half) != model_fingerprint(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda embeds: embeds * torch.nan, "label 'cat' is of length nan"),
        (lambda embeds: embeds * torch.inf, "label 'cat' is of length (inf|nan)"),
        (
            lambda embeds: embeds * torch.eye(6)[1][:, None],
            "label 'cat' is of length 0: expected finite ones of length 1",
        ),
        (lambda embeds: embeds * 3, "label 'cat' is of length 3"),
        (lambda embeds: torch.cat([embeds, embeds], dim=1), r"\(6, 32\): expected \(6, dim\) .* dim of 16"),
        (lambda embeds: embeds[:5], r"\(5, 16\): expected \(6, dim\)"),
        (lambda embeds: embeds[0], r"\(16,\): expected \(6, dim\)"),
        (lambda embeds: embeds.sign().long(), "of torch.int64: expected a floating point dtype"),
    ],
)
def test_rejects_embeddings_that_do_not_fit(model, classifier, tmp_path, change, message):
    embeds = change(classifier.label_embeds).contiguous()
    with pytest.raises(ValueError, match=message):
        ZeroShotClassifier(model, classifier.processor, LABELS, label_embeds=embeds)
    classifier.save(tmp_path)
    save_file({"label_embeds": embeds}, tmp_path / "zero_shot_classifier.safetensors")
    with pytest.raises(ValueError, match=message):
        ZeroShotClassifier.load(tmp_path, model, classifier.processor)


def test_rejects_the_embeddings_of_another_folder(model, classifier, tmp_path):
    other = tiny_model()
    with torch.no_grad():
        other.text_projection.weight[0, 0] += 1
    classifier.save(tmp_path / "one")
    ZeroShotClassifier(other, classifier.processor, LABELS, TEMPLATES).save(tmp_path / "other")
    name = "zero_shot_classifier.safetensors"
    (tmp_path / "one" / name).write_bytes((tmp_path / "other" / name).read_bytes())
    with pytest.raises(ValueError, match=f"embeddings of the model of fingerprint {model_fingerprint(other)[:12]}"):
        ZeroShotClassifier.load(tmp_path / "one", model, classifier.processor)
    # as files were saved before they named their model
    save_file({"label_embeds": classifier.label_embeds}, tmp_path / "one" / name)
    assert ZeroShotClassifier.load(tmp_path / "one", model, classifier.processor).labels == LABELS


@pytest.mark.parametrize(
    "change", [{"labels": [1, 2]}, {"labels": "cat"}, {"templates": [5]}, {"labels": []}, {"templates": []}]
)
def test_rejects_an_info_file_of_wrong_types(model, classifier, tmp_path, change):
    classifier.save(tmp_path)
    path = tmp_path / "zero_shot_classifier.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match="zero_shot_classifier.json is damaged"):
        ZeroShotClassifier.load(tmp_path, model, classifier.processor)


def test_rejects_folder_without_classifier_and_unfinished_one(model, classifier, tmp_path):
    with pytest.raises(FileNotFoundError, match="zero_shot_classifier.json and zero_shot_classifier.safetensors"):
        ZeroShotClassifier.load(tmp_path, model, classifier.processor)
    classifier.save(tmp_path)
    info = json.loads((tmp_path / "zero_shot_classifier.json").read_text())
    (tmp_path / "zero_shot_classifier.json").write_text(json.dumps({**info, "labels": LABELS[:-1]}))
    with pytest.raises(ValueError, match=r"label_embeds is \(6, 16\): expected \(5, dim\)"):
        ZeroShotClassifier.load(tmp_path, model, classifier.processor)


@pytest.mark.parametrize(
    ("labels", "templates", "error", "message"),
    [
        ([], ["{}"], ValueError, "0 labels"),
        (None, ["{}"], TypeError, "labels is None: expected a list of strings"),
        (["cat"], None, TypeError, "templates is None: expected a list"),
        ("cat", ["{}"], TypeError, "expected a list of strings"),
        (["cat", 3], ["{}"], TypeError, "expected a list of strings"),
        (["cat", "", "dog", "  "], ["{}"], ValueError, r"labels at \[1, 3\] are empty"),
        (["cat", "dog", "cat"], ["{}"], ValueError, r"labels repeat: \['cat'\]"),
        (["cat"], [], ValueError, "0 templates"),
        (["cat"], "a photo of a {}.", TypeError, r"expected a list, \['a photo of a {}.'\]"),
        (["cat"], ["a photo of a {}.", "a photo"], ValueError, "'a photo' has no place for the label"),
        (["cat"], [7], TypeError, "expected a string or a function"),
        (["cat"], [lambda label: None], TypeError, "made None of 'cat'"),
    ],
)
def test_rejects_labels_and_templates(model, processor, labels, templates, error, message):
    with pytest.raises(error, match=message):
        ZeroShotClassifier(model, processor, labels, templates)


def test_rejects_calls_that_ask_for_nothing(classifier):
    with pytest.raises(ValueError, match="0 images"):
        classifier([])
    with pytest.raises(ValueError, match="top_k is 0"):
        classifier(photos(1), top_k=0)
    with pytest.raises(ValueError, match="batch_size is 0"):
        classifier(photos(1), batch_size=0)
    with pytest.raises(ValueError, match="batch_size is 0"):
        classifier.logits(pixel_values=torch.zeros(1, 3, 32, 32), batch_size=0)
    with pytest.raises(ValueError, match="batch_size is 0"):
        ZeroShotClassifier(classifier.model, classifier.processor, LABELS, batch_size=0)
    with pytest.raises(TypeError, match="top_k is '1'"):
        classifier(photos(1), top_k="1")
    with pytest.raises(ValueError, match="found both or neither"):
        classifier.logits()


def test_errors_count_images_over_the_whole_list(classifier):
    with pytest.raises(ValueError, match="^image 4"):
        classifier([*photos(4), b"no picture"], batch_size=3)
    with pytest.raises(TypeError, match="image 1 is a list"):
        classifier([photos(1)[0], photos(2)])


def test_takes_labels_and_templates_from_generators(model, processor, classifier):
    made = ZeroShotClassifier(model, processor, (label for label in LABELS), (template for template in TEMPLATES))
    assert made.labels == LABELS and made.templates == TEMPLATES
    assert torch.equal(made.label_embeds, classifier.label_embeds)


@pytest.mark.parametrize("name", ["zero_shot_classifier.json", "zero_shot_classifier.safetensors"])
def test_rejects_damaged_files(model, classifier, tmp_path, name):
    classifier.save(tmp_path)
    for damaged in ((tmp_path / name).read_bytes()[:50], b"[]"):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{name} is damaged"):
            ZeroShotClassifier.load(tmp_path, model, classifier.processor)


def test_rejects_the_processor_of_another_model(model, processor):
    tokenizer = HFCLIPTokenizer.train_new_from_iterator(["a photo of a cat"], 514 + 2)
    other = HFCLIPProcessor(image_processor=processor.image_processor, tokenizer=tokenizer)
    assert tokenizer.eos_token_id != processor.tokenizer.eos_token_id
    with pytest.raises(ValueError, match=f"id {tokenizer.eos_token_id}, .* expects 533: .* another model"):
        ZeroShotClassifier(model, other, LABELS)


def test_rejects_damaged_weights(processor):
    model = tiny_model()
    with torch.no_grad():
        model.text_projection.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="label 'cat' is not finite"):
        ZeroShotClassifier(model, processor, LABELS)
