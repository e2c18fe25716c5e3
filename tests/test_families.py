"""transformers' dual encoders open as they are: embeddings, logits, pixels and ids of the source, saved and sent back."""

import contextlib
import copy
import functools
import json
import shutil

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from conversion_utils import run_script
from families_utils import (
    CASES,
    CONTEXT,
    HARD,
    PADDED,
    SIDE,
    TOLERANCE,
    Settings,
    check_embeddings,
    check_pixels,
    check_saved,
    hard_texts,
    open_source,
    photos,
    plain,
    squashed,
    write_source,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import pipeline

import hfclip
from hfclip import HFCLIPConfig, HFCLIPModel, HFCLIPProcessor, ZeroShotClassifier
from hfclip.commands.info import collect
from hfclip.embeddings import embed_images, embed_texts
from hfclip.errors import UsageError
from hfclip.families_hfclip import FAMILIES, IMAGE_PROCESSORS, REFUSED
from hfclip.inference import optimize_for_inference
from training.config import Config
from training.model import build_architecture, build_model, build_processor


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return functools.cache(lambda name: write_source(name, tmp_path_factory.mktemp("source")))


@pytest.fixture(scope="module")
def opened(source):
    """Model and processor of a case, as hfclip opens its folder."""
    return functools.cache(lambda name: open_source(source(name)))


@pytest.mark.parametrize("name", CASES)
def test_embeddings_and_logits_are_those_of_the_source(name, source, opened):
    check_embeddings(source(name), opened(name)[0])


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.pads_to_context])
def test_padding_that_a_tower_reads_is_filled_up(name, source, opened):
    found, (ours, processor) = source(name), opened(name)
    whole = found.ids(PADDED)
    short = processor(text=list(PADDED), padding=True, return_tensors="pt")
    assert short["input_ids"].shape[1] < CONTEXT == processor(text="a", return_tensors="pt")["input_ids"].shape[1]
    with torch.no_grad():
        expected = found.model.get_text_features(**whole).pooler_output
        torch.testing.assert_close(ours.encode_text(**short, normalize=False), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_saved_opened_again_and_sent_back_bit_for_bit(name, source, opened, tmp_path):
    check_saved(*opened(name), tmp_path / "ours")
    source(name).check_sent_back(tmp_path / "ours", tmp_path / "theirs")


@pytest.mark.parametrize(
    "name", [*(name for name in CASES if name != "tipsv2"), pytest.param("tipsv2", marks=pytest.mark.peers)]
)
def test_pixels_are_those_of_its_own_processor(name, source, opened, data_dir):
    found, images = source(name), photos(data_dir)
    if isinstance(found.image_processor, Settings):
        pytest.skip("its own image processor needs torchvision")
    if found.image_processor.do_center_crop and not name.startswith("align"):
        # transformers rounds the offsets of a crop in its own way; hfclip as torchvision, by which these were trained.
        images = [image.crop((0, 0, min(image.size), min(image.size))) for image in images]
    check_pixels(found, opened(name)[1], images, found.case.pixel_tolerance)


@pytest.mark.parametrize("name", CASES)
def test_ids_are_those_of_its_own_tokenizer(name, source, opened):
    source(name).check_ids(opened(name)[1])


@pytest.mark.peers
def test_ids_of_siglips_sentencepiece_model_are_those_of_transformers_and_open_clip(tmp_path):
    sentencepiece, tokenizer = pytest.importorskip("sentencepiece"), pytest.importorskip("open_clip").tokenizer
    with open(tmp_path / "spiece.model", "wb") as file:
        ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
        words = iter([text for text in HARD if "\0" not in text])
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=words, model_writer=file, vocab_size=200, hard_vocab_limit=False, **ids)  # fmt: skip
    theirs = transformers.SiglipTokenizer(str(tmp_path / "spiece.model"), model_max_length=CONTEXT)
    for part in (theirs, squashed("SiglipImageProcessorPil"), plain("Siglip")(len(theirs), {})):
        part.save_pretrained(tmp_path)
    processor, texts = HFCLIPProcessor.from_pretrained(tmp_path), hard_texts()
    expected = theirs(texts, padding="max_length", truncation=True, max_length=CONTEXT)["input_ids"]
    assert processor(text=texts)["input_ids"] == expected and len({tuple(row) for row in expected}) > 100
    processor.save_pretrained(tmp_path / "again")
    assert HFCLIPProcessor.from_pretrained(tmp_path / "again")(text=texts)["input_ids"] == expected
    # open_clip also repairs what ftfy and HTML know, and knows no names of special tokens.
    texts = [text for text in texts if tokenizer.basic_clean(text) == text.strip()]
    texts = [text for text in texts if not any(token in text for token in theirs.all_special_tokens)]
    others = tokenizer.HFTokenizer(str(tmp_path), context_length=CONTEXT, clean="canonicalize")(texts)
    assert len(texts) > 50 and processor(text=texts)["input_ids"] == others.tolist()


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


# One folder per family; the uses that are refused, with the reason.
FAMILY = [
    name for name, case in CASES.items() if not any(word in name for word in (" with ", " of another ", " beyond "))
]
NAFLEX = "each in its own shape"
NOT_USED = {
    ("train", "siglip 2 naflex"): NAFLEX,
    ("embed", "siglip 2 naflex"): NAFLEX,
    ("onnx", "siglip 2 naflex"): "patches of images in their own shapes",
    **{
        ("onnx", name): "exported by torch, takes one batch size"
        for name in ("align", "altclip", "chinese_clip", "flava")
    },
    ("train", "align"): "found a EfficientNetImageProcessor",
    ("train", "owlv2"): "found a Owlv2ImageProcessor",
}


def refused(use, name):
    """Expects the error of a use that a family is refused."""
    if reason := NOT_USED.get((use, name)):
        return pytest.raises(UsageError, match=reason)
    return contextlib.nullcontext()


@pytest.mark.parametrize("name", FAMILY)
def test_the_logit_rule_reaches_every_pipeline(name, source, opened, data_dir, tmp_path):
    """Sigmoid with its bias or softmax: transformers' pipeline on the source's folder and on ours, and hfclip's own."""
    found, (model, processor) = source(name), opened(name)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    photo = str(min((data_dir / "imagenet_sample").glob("*.JPEG")))
    labels = ["cat", "dog", "photo"]
    images = processor(images=Image.open(photo), return_tensors="pt")
    logits = found.logits(images, found.ids([f"a {label}" for label in labels]))[0]
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


@pytest.mark.parametrize("name", FAMILY)
def test_training_starts_from_the_loss_of_the_source(name, source):
    found = source(name)
    is_sigmoid = found.case.pads_to_context
    settings = {
        "model": {"checkpoint": str(found.folder)},
        "optim": {"loss": "sigmoid" if is_sigmoid else "contrastive"},
    }
    config = Config.from_dict({**settings, "data": {"train": "scenes"}, "run": {"output_dir": "run"}})
    with refused("train", name):
        architecture, processor = build_processor(config, build_architecture(config), [])
        model = build_model(config, architecture).eval()
    if ("train", name) in NOT_USED:
        return
    images = {"pixel_values": torch.randn(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))}
    captions = ["a photo of a cat", "cat dog?", "a cafe", "a b c"]
    logits, own = found.logits(images, found.ids(captions)), torch.eye(4)
    losses = [-(F.logsigmoid((2 * own - 1) * logits)).sum() / 4] if is_sigmoid else [F.cross_entropy(part, own) for part in (logits, logits.T)]  # fmt: skip
    words = processor.tokenizer(captions, padding="longest", truncation=True, return_tensors="pt")
    outputs = model(**images, input_ids=words["input_ids"], attention_mask=words["attention_mask"], embeds_only=True)
    compute = hfclip.sigmoid_loss if is_sigmoid else hfclip.contrastive_loss
    scalars = [model.logit_scale.exp(), *([] if model.logit_bias is None else [model.logit_bias])]
    loss = compute(outputs.image_embeds, outputs.text_embeds, *scalars)
    torch.testing.assert_close(loss, sum(losses) / len(losses), atol=TOLERANCE, rtol=0)
    loss.backward()
    idle = [key for key, value in model.named_parameters() if value.requires_grad and value.grad is None]
    assert not idle, idle


@pytest.mark.parametrize("name", FAMILY)
def test_embeddings_of_a_data_set_lora_and_faster_inference(name, source, opened, data_dir, tmp_path):
    (model, processor), images = opened(name), photos(data_dir)[:3]
    with refused("embed", name):
        pixels = processor(images=images, return_tensors="pt")
        expected = model.encode_image(**pixels)
        torch.testing.assert_close(
            embed_images(model, processor, images, precision="fp32"), expected, atol=TOLERANCE, rtol=0
        )
    texts = processor(text=list(PADDED), return_tensors="pt")
    expected = model.encode_text(**texts)
    torch.testing.assert_close(
        embed_texts(model, processor, list(PADDED), precision="fp32"), expected, atol=TOLERANCE, rtol=0
    )
    torch.testing.assert_close(optimize_for_inference(copy.deepcopy(model)).encode_text(**texts), expected, atol=TOLERANCE, rtol=0)  # fmt: skip
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))  # fmt: skip
    changed = adapted.encode_text(**texts)
    changed.sum().backward()
    assert (changed - expected).abs().max() > 1e-3
    adapted.merge_and_unload().save_pretrained(tmp_path)
    torch.testing.assert_close(HFCLIPModel.from_pretrained(tmp_path).encode_text(**texts), changed, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", [name if name == "siglip 2 naflex" else pytest.param(name, marks=pytest.mark.slow) for name in FAMILY])  # fmt: skip
def test_onnx(name, opened, tmp_path):
    """The converter proves the towers that it writes."""
    for part in opened(name):
        part.save_pretrained(tmp_path / "ours")
    status = 2 if ("onnx", name) in NOT_USED else 0
    result = run_script("export", tmp_path / "ours", tmp_path / "onnx", "--to", "onnx", status=status)
    assert NOT_USED["onnx", name] in result.error if status else (tmp_path / "onnx" / "onnx").is_dir()


def test_info_says_what_naflex_takes(source):
    facts = collect(str(source("siglip 2 naflex").folder))
    assert facts["resolution"] == f"{NAFLEX}, as patches" and facts["preprocessing"]["max_num_patches"] == 16


def test_configs_of_families_are_translated_from_defaults_on(tmp_path):
    """Published configs name only what is not the default; SigLIP's name the wrong padding for Gemma's vocabulary."""
    written = {"model_type": "siglip", "text_config": {"vocab_size": 256_000}, "vision_config": {"image_size": 384}}
    (tmp_path / "config.json").write_text(json.dumps(written))
    config = HFCLIPConfig.from_pretrained(tmp_path)
    assert config.text_config.pad_token_id == 0 and config.projection_dim == 768 and config.image_size == 384
    assert config.vision_projection_type == "identity" and config.text_reads_padding
    assert config.to_dict()["model_type"] == "hfclip" and set(IMAGE_PROCESSORS) >= {"SiglipImageProcessor"}
