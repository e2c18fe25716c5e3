"""transformers' dual encoders open as they are: embeddings, logits, pixels and ids of the source, saved and sent back."""

import functools
import json
import shutil

import pytest
import torch
import transformers
from families_utils import CASES, CONTEXT, SIDE, hard_texts, write_source
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, AutoTokenizer, pipeline

import hfclip
from hfclip import HFCLIPConfig, HFCLIPModel, HFCLIPProcessor, HFCLIPTokenizer, ZeroShotClassifier
from hfclip.families_hfclip import FAMILIES, IMAGE_PROCESSORS, REFUSED


TOLERANCE = 1e-5
SENT_BACK = [name for name in CASES if not name.startswith(("flava", "clipseg", "owl"))]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return functools.cache(lambda name: write_source(name, tmp_path_factory.mktemp("source")))


@pytest.fixture(scope="module")
def opened(source):
    """Model and processor of a case, as hfclip opens its folder."""

    @functools.cache
    def open_folder(name):
        found = source(name)
        model = HFCLIPModel.from_pretrained(found.folder)
        return model, HFCLIPProcessor.from_pretrained(found.folder) if found.image_processor is not None else None

    return open_folder


def images_of(name, model):
    """What the model takes for two images."""
    generator = torch.Generator().manual_seed(1)
    if "naflex" in name:
        mask = torch.tensor([[1] * 16, [1] * 12 + [0] * 4])
        shapes = torch.tensor([[4, 4], [3, 4]])
        patches = torch.randn(2, 16, 192, generator=generator)
        return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}
    return {"pixel_values": torch.randn(2, 3, SIDE, SIDE, generator=generator)}


def texts_of(case, tokenizer, texts=("a photo of a cat", "CAT!!! dog?", "naïve café")):
    """Ids as the family has them: padded to the context without a mask, or to the longest with one."""
    padding = "max_length" if case.pads_to_context else True
    words = tokenizer(list(texts), padding=padding, truncation=True, max_length=CONTEXT, return_tensors="pt")
    kept = ("input_ids",) if case.pads_to_context else ("input_ids", "attention_mask")
    return {key: words[key] for key in kept}


def source_features(model, images, texts):
    image, text = model.get_image_features(**images).pooler_output, model.get_text_features(**texts).pooler_output
    if type(model).__name__ == "FlavaModel":  # it projects every position; its contrastive loss reads the first
        return image[:, 0], text[:, 0]
    return image, text


def source_logits(model, images, texts):
    if type(model).__name__ != "FlavaModel":
        return model(**images, **texts).logits_per_image
    image, text = (F / F.norm(dim=-1, keepdim=True) for F in source_features(model, images, texts))
    return image @ text.T * model.logit_scale.exp()


@pytest.mark.parametrize("name", CASES)
def test_embeddings_and_logits_are_those_of_the_source(name, source, opened):
    found, (ours, _) = source(name), opened(name)
    images, texts = images_of(name, ours), texts_of(found.case, found.tokenizer)
    image, text = source_features(found.model, images, texts)
    with torch.no_grad():
        torch.testing.assert_close(ours.get_image_features(**images).pooler_output, image, atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(ours.get_text_features(**texts).pooler_output, text, atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(ours.encode_image(**images, normalize=False), image, atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(ours.encode_text(**texts, normalize=False), text, atol=TOLERANCE, rtol=0)
        logits = source_logits(found.model, images, texts)
        torch.testing.assert_close(ours(**images, **texts).logits_per_image, logits, atol=1e-4, rtol=1e-5)
    assert text.std() > 0.01 and image.std() > 0.01 and logits.std() > 0.001


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.pads_to_context])
def test_padding_that_a_tower_reads_is_filled_up(name, source, opened):
    found, (ours, processor) = source(name), opened(name)
    whole = texts_of(found.case, found.tokenizer)
    short = processor(text=["a photo of a cat", "CAT!!! dog?", "naïve café"], padding=True, return_tensors="pt")
    assert short["input_ids"].shape[1] < CONTEXT == processor(text="a", return_tensors="pt")["input_ids"].shape[1]
    with torch.no_grad():
        expected = found.model.get_text_features(**whole).pooler_output
        torch.testing.assert_close(ours.encode_text(**short, normalize=False), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_saved_and_opened_again_bit_for_bit(name, opened, tmp_path):
    model, processor = opened(name)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    again, report = HFCLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert written["model_type"] == "hfclip" and not any(report.values())
    tensors, tensors_again = model.state_dict(), again.state_dict()
    assert tensors.keys() == tensors_again.keys() == load_file(tmp_path / "model.safetensors").keys()
    assert all(torch.equal(tensor, tensors_again[key]) for key, tensor in tensors.items())
    if processor is None:
        return
    processor.save_pretrained(tmp_path)
    texts, reopened = hard_texts(40), HFCLIPProcessor.from_pretrained(tmp_path)
    assert dict(reopened(text=texts)) == dict(processor(text=texts))
    assert type(reopened.image_processor) is type(processor.image_processor)


@pytest.mark.parametrize("name", SENT_BACK)
def test_sent_back_to_the_family(name, source, opened, tmp_path):
    from conversion import export

    found, (model, processor) = source(name), opened(name)
    model.save_pretrained(tmp_path / "ours")
    if processor is not None:
        processor.save_pretrained(tmp_path / "ours")
    sent_back(export, tmp_path / "ours", tmp_path / "theirs")
    theirs = type(found.model).from_pretrained(tmp_path / "theirs").state_dict()
    for key, tensor in found.model.state_dict().items():
        if not key.startswith("text_model.pooler.") and (key != "logit_scale" or "largest scale" not in name):
            rtol = 1e-6 if key == "temperature" else 0  # it was a logarithm here
            torch.testing.assert_close(theirs[key], tensor, atol=0, rtol=rtol)
    if processor is not None:
        words = texts_of(found.case, AutoTokenizer.from_pretrained(tmp_path / "theirs"), hard_texts(40))
        expected = texts_of(found.case, found.tokenizer, hard_texts(40))
        assert words.keys() == expected.keys() and torch.equal(words["input_ids"], expected["input_ids"])
        AutoProcessor.from_pretrained(tmp_path / "theirs", backend="pil")


def sent_back(export, ours, theirs):
    import sys
    from unittest import mock

    with mock.patch.object(sys, "argv", ["export.py", str(ours), str(theirs), "--to", "transformers"]):
        export.main()


@pytest.mark.parametrize("name", ["siglip", "siglip 2 of a fixed size", "siglip 2 naflex", "metaclip_2", "chinese_clip", "align", "flava", "clipseg", "owlvit"])  # fmt: skip
def test_pixels_are_those_of_its_own_processor(name, source, opened, data_dir):
    found, (_, processor) = source(name), opened(name)
    photos = [Image.open(path) for path in sorted((data_dir / "imagenet_sample").glob("*.JPEG"))[:20]]
    for photo in photos:
        photo.draft("RGB", (128, 128))  # smaller from the file on: it is the photos' variety that counts
    photos = [photo.convert("RGB") for photo in photos]
    if found.image_processor.do_center_crop and not name.startswith("align"):
        # transformers rounds the offsets of a crop in its own way; hfclip as torchvision, by which these were trained.
        photos = [photo.crop((0, 0, min(photo.size), min(photo.size))) for photo in photos]
    ours = processor(images=photos, return_tensors="pt")
    theirs = found.image_processor(photos, return_tensors="pt")
    assert ours.keys() == theirs.keys() and len(photos) == 20
    for key in theirs:
        torch.testing.assert_close(ours[key].float(), theirs[key].float(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_ids_are_those_of_its_own_tokenizer(name, source, opened):
    found, (_, processor) = source(name), opened(name)
    if processor is None:
        pytest.skip("no image processor here")
    if found.case.tokenizer.__name__ == "clip":  # whose ids differ from OpenAI's in some texts; hfclip's do not
        assert type(processor.tokenizer) is HFCLIPTokenizer
        assert processor.tokenizer.get_vocab() == found.tokenizer.get_vocab()
        assert len(processor(text=["a " * 60])["input_ids"][0]) == CONTEXT  # its files say 77
        return
    ours, theirs = (
        processor(text=hard_texts(), return_tensors="pt"),
        texts_of(found.case, found.tokenizer, hard_texts()),
    )
    assert torch.equal(ours["input_ids"], theirs["input_ids"]) and ours.keys() == {"input_ids", "attention_mask"}


# What is refused


@pytest.mark.parametrize("name", ["siglip", "chinese_clip", "align"])
def test_weights_that_would_be_random_are_refused(name, source, tmp_path):
    folder = tmp_path / "source"
    shutil.copytree(source(name).folder, folder)
    tensors = load_file(folder / "model.safetensors")
    lost = {"siglip": "logit_bias", "chinese_clip": "text_projection.weight", "align": "temperature"}[name]
    del tensors[lost]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=lost.replace("temperature", "logit_scale")):
        HFCLIPModel.from_pretrained(folder)
    _, report = HFCLIPModel.from_pretrained(folder, output_loading_info=True)
    assert report["missing_keys"] == {lost.replace("temperature", "logit_scale")}


def test_published_folders_of_tipsv2_hold_no_temperature(source, tmp_path):
    folder = tmp_path / "source"
    shutil.copytree(source("tipsv2").folder, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["temperature"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    scale = HFCLIPModel.from_pretrained(folder).logit_scale
    torch.testing.assert_close(scale.exp(), 1 / torch.tensor(0.005065968260169029))


@pytest.mark.parametrize("model_type", [*REFUSED, "bert", "vit"])
def test_models_that_are_no_dual_encoder_are_refused(model_type, tmp_path):
    transformers.CONFIG_MAPPING[model_type]().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"type '{model_type}'"):
        HFCLIPModel.from_pretrained(tmp_path)


def test_every_dual_encoder_of_transformers_is_opened_or_refused():
    names = transformers.models.auto.modeling_auto.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES
    assert names.keys() - {"clip", "hfclip"} <= FAMILIES.keys() | REFUSED.keys()


# What comes after


@pytest.mark.parametrize("name", ["siglip", "siglip 2 naflex", "metaclip_2"])
def test_the_logit_rule_reaches_every_pipeline(name, source, opened, data_dir, tmp_path):
    """Sigmoid with its bias or softmax: transformers' pipeline on the source's folder and on ours, and hfclip's own."""
    found, (model, processor) = source(name), opened(name)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    photo = str(min((data_dir / "imagenet_sample").glob("*.JPEG")))
    labels = ["cat", "dog", "猫"]
    images = processor(images=Image.open(photo), return_tensors="pt")
    texts = texts_of(found.case, found.tokenizer, [f"a {label}" for label in labels])
    logits = found.model(**images, **texts).logits_per_image[0]
    expected = logits.sigmoid() if found.case.pads_to_context else logits.softmax(dim=0)
    classify = ZeroShotClassifier(model, processor, labels, templates=["a {}"])
    for classes in ({}, {"pipeline_class": hfclip.ZeroShotImageClassificationPipeline}):
        run = pipeline("zero-shot-image-classification", model=str(tmp_path), device="cpu", **classes)
        scores = {
            row["label"]: row["score"] for row in run(photo, candidate_labels=labels, hypothesis_template="a {}")
        }
        torch.testing.assert_close(torch.tensor([scores[label] for label in labels]), expected, atol=1e-5, rtol=0)
    scores = {row["label"]: row["score"] for row in classify(photo)}
    torch.testing.assert_close(torch.tensor([scores[label] for label in labels]), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["siglip", "metaclip_2"])
def test_training_starts_from_the_loss_of_the_source(name, source, data_dir):
    from training.config import Config
    from training.model import build_architecture, build_model, build_processor

    found = source(name)
    loss = {"siglip": "sigmoid", "metaclip_2": "contrastive"}[name]
    settings = {"model": {"checkpoint": str(found.folder)}, "optim": {"loss": loss}, "data": {"train": "scenes"}}
    config = Config.from_dict({**settings, "run": {"output_dir": "run"}})
    architecture, processor = build_processor(config, build_architecture(config), [])
    model = build_model(config, architecture).eval()
    images = {"pixel_values": torch.randn(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))}
    captions = ["a photo of a cat", "CAT!!! dog?", "naïve café", "a\tb\nc"]
    expected = found.model(**images, **texts_of(found.case, found.tokenizer, captions), return_loss=True).loss
    words = processor.tokenizer(captions, padding="longest", truncation=True, return_tensors="pt")
    outputs = model(**images, input_ids=words["input_ids"], attention_mask=words["attention_mask"], embeds_only=True)
    compute = {"siglip": hfclip.sigmoid_loss, "metaclip_2": hfclip.contrastive_loss}[name]
    scalars = [model.logit_scale.exp(), *([] if model.logit_bias is None else [model.logit_bias])]
    torch.testing.assert_close(
        compute(outputs.image_embeds, outputs.text_embeds, *scalars), expected, atol=TOLERANCE, rtol=0
    )


def test_configs_of_families_are_translated_from_defaults_on(tmp_path):
    """Published configs name only what is not the default; SigLIP's name the wrong padding for Gemma's vocabulary."""
    written = {"model_type": "siglip", "text_config": {"vocab_size": 256_000}, "vision_config": {"image_size": 384}}
    (tmp_path / "config.json").write_text(json.dumps(written))
    config = HFCLIPConfig.from_pretrained(tmp_path)
    assert config.text_config.pad_token_id == 0 and config.projection_dim == 768 and config.image_size == 384
    assert config.vision_projection_type == "identity" and config.text_reads_padding
    assert config.to_dict()["model_type"] == "hfclip" and set(IMAGE_PROCESSORS) >= {"SiglipImageProcessor"}
