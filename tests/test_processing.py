"""The processor: routing of options, exchange with transformers' CLIPProcessor, Auto classes."""

import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, CLIPProcessor, CLIPTokenizer
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.processing_utils import AudioKwargs, ImagesKwargs, ProcessingKwargs, TextKwargs, VideosKwargs
from transformers.utils.logging import warning_once

from hfclip import HFCLIPConfig, HFCLIPImageProcessor, HFCLIPModel, HFCLIPProcessor, HFCLIPTokenizer


CAPTIONS = ["a photo of a cat", "two dogs", "A red car, parked!"]
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def tokenizer():
    return HFCLIPTokenizer.train_new_from_iterator(CAPTIONS, vocab_size=530, show_progress=False)


@pytest.fixture(scope="module")
def processor(tokenizer):
    return HFCLIPProcessor(HFCLIPImageProcessor(size=32), tokenizer)


def equal(found, expected) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


# --------------------------------------------------------------------------------------------------------------- calls


def test_gives_what_both_parts_give(processor):
    found = processor(images=[IMAGE, IMAGE], text=CAPTIONS, return_tensors="pt")
    expected = {
        **processor.tokenizer(CAPTIONS, padding=True, return_tensors="pt"),
        **processor.image_processor([IMAGE, IMAGE], return_tensors="pt"),
    }
    assert equal(found, expected)
    assert set(found) == set(processor.model_input_names) == {"pixel_values", "input_ids", "attention_mask"}
    assert equal(processor([IMAGE, IMAGE], CAPTIONS, return_tensors="pt"), expected)  # in this order


def test_images_or_text_alone(processor):
    assert set(processor(images=IMAGE)) == {"pixel_values"}
    assert set(processor(text="a cat")) == {"input_ids", "attention_mask"}
    assert isinstance(processor(text="a cat")["input_ids"][0], int)
    with pytest.raises(ValueError, match="images, text or both, found neither"):
        processor(return_tensors="pt")


def test_texts_are_padded_to_the_longest_unless_told_otherwise(processor):
    lengths = [len(ids) for ids in processor(text=CAPTIONS, padding=False)["input_ids"]]
    assert len(set(lengths)) > 1
    assert processor(text=CAPTIONS, return_tensors="np")["input_ids"].shape == (3, max(lengths))
    assert processor(text=CAPTIONS, padding="max_length", return_tensors="pt")["input_ids"].shape == (3, 77)


def test_long_text_keeps_its_end_token(processor):
    ids = processor(text=["cat " * 200, "cat"], return_tensors="pt")["input_ids"]
    assert ids.shape == (2, 77)
    assert ids[0, -1] == processor.tokenizer.eos_token_id


def test_options_reach_the_part_they_belong_to(processor):
    found = processor(IMAGE, CAPTIONS, return_tensors="pt", crop_size=16, max_length=5, truncation=True)
    assert found["pixel_values"].shape == (1, 3, 16, 16) and found["input_ids"].shape == (3, 5)
    text_kwargs = {"max_length": 5, "truncation": True}
    split = processor(IMAGE, CAPTIONS, return_tensors="pt", images_kwargs={"crop_size": 16}, text_kwargs=text_kwargs)
    assert equal(split, found)


def test_rejects_unknown_options(processor):
    with pytest.raises(TypeError, match="no option 'paddin'. The nearest is 'padding'"):
        processor(text=CAPTIONS, paddin=True)
    with pytest.raises(TypeError, match="no option 'do_rezise'. The nearest is 'do_resize'"):
        processor(images=IMAGE, do_rezise=True)


def test_takes_every_keyword_that_processors_of_transformers_take(processor):
    """As sentence-transformers passes them, for modalities that CLIP does not have, too."""
    expected = processor(IMAGE, CAPTIONS, return_tensors="pt")
    parts = {
        "text_kwargs": {"padding": True, "truncation": "longest_first"},
        "images_kwargs": {"data_format": "channels_first", "device": "cpu", "disable_grouping": True, "do_pad": False},
        "audio_kwargs": {"padding": True, "sampling_rate": 16000},
        "videos_kwargs": {"fps": 2},
        "common_kwargs": {"return_tensors": "pt", "padding": True},
    }
    assert equal(processor(images=IMAGE, text=CAPTIONS, videos=None, audio=None, **parts), expected)
    for group in ProcessingKwargs.__annotations__:
        empty = {} if group.endswith("_kwargs") else None
        assert equal(processor(IMAGE, CAPTIONS, return_tensors="pt", **{group: empty}), expected)
    for kind in (TextKwargs, ImagesKwargs, VideosKwargs, AudioKwargs):
        for name in kind.__annotations__.keys() - {"return_tensors"}:
            assert equal(processor(IMAGE, CAPTIONS, return_tensors="pt", **{name: None}), expected), name
    assert equal(processor(IMAGE, CAPTIONS, return_tensors="pt", fps=2, sampling_rate=8000), expected)


def test_rejects_videos_audio_and_options_that_it_would_have_to_follow(processor):
    for name in ("videos", "audio"):
        with pytest.raises(ValueError, match=f"takes images and texts, found {name}"):
            processor(text=CAPTIONS, **{name: [np.zeros((2, 8, 8, 3), np.uint8)]})
    with pytest.raises(TypeError, match="no option 'paddin'. The nearest is 'padding'"):
        processor(text=CAPTIONS, common_kwargs={"paddin": True})
    for option in ({"data_format": "channels_last"}, {"do_pad": True}, {"default_to_square": True}):
        with pytest.raises(TypeError, match="no option"):
            processor(images=IMAGE, **option)


@pytest.mark.peers
def test_sentence_transformers_embeds_images_and_texts(tmp_path, processor):
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="compares with sentence-transformers")
    from sentence_transformers.sentence_transformer.modules.clip_model import CLIPModel

    torch.manual_seed(0)
    tower = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    last = processor.tokenizer.eos_token_id
    text = dict(model_type="hfclip_text", vocab_size=last + 1, bos_token_id=last - 1, eos_token_id=last, **tower)
    vision = dict(model_type="hfclip_vit", image_size=32, patch_size=8, **tower)
    model = HFCLIPModel(HFCLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)

    with torch.no_grad():
        inputs = processor([IMAGE, IMAGE.rotate(90)], CAPTIONS, return_tensors="pt")
        images = model.encode_image(inputs["pixel_values"])
        texts = model.encode_text(inputs["input_ids"], inputs["attention_mask"])
    wrapped = sentence_transformers.SentenceTransformer(modules=[CLIPModel(str(tmp_path))])
    for encoder in (sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu"), wrapped):
        for found, expected in (
            (encoder.encode([IMAGE, IMAGE.rotate(90)]), images),
            (encoder.encode(CAPTIONS), texts),
        ):
            found = torch.nn.functional.normalize(torch.as_tensor(found), dim=-1)
            torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-5)


def test_rejects_swapped_and_wrong_inputs(processor):
    with pytest.raises(TypeError, match=r"found .*Image.*processor\(images, text\)"):
        processor(CAPTIONS, IMAGE)
    with pytest.raises(TypeError, match="found NoneType"):
        processor(text=["a cat", None])
    with pytest.raises(TypeError, match="found dict"):
        processor(text={"caption": "a cat"})
    with pytest.raises(ValueError, match=r"image 0 \(a cat\).*neither an existing file"):
        processor(images=["a cat"])


def test_text_in_the_place_of_images_is_told_where_to_go(processor, tmp_path):
    for text in (["a cat"], "a cat", "cats"):  # the last is base64, too
        with pytest.raises(ValueError, match="Texts go to `text=`"):
            processor(text)
    (tmp_path / "damaged.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="cannot be decoded") as caught:
        processor(str(tmp_path / "damaged.png"))
    assert "text=" not in str(caught.value)


def test_takes_other_tokenizers_and_image_processors(tokenizer):
    processor = HFCLIPProcessor(CLIPImageProcessorPil(size=32, crop_size=32), tokenizer)
    assert processor(IMAGE, CAPTIONS, return_tensors="pt", crop_size=16)["pixel_values"].shape == (1, 3, 16, 16)
    with pytest.raises(TypeError, match="image_processor"):
        HFCLIPProcessor(tokenizer, tokenizer)


def test_transformers_processor_takes_our_parts(processor):
    theirs = CLIPProcessor(processor.image_processor, processor.tokenizer)
    found = theirs(images=IMAGE, text=CAPTIONS, padding=True, return_tensors="pt")
    assert equal(found, processor(IMAGE, CAPTIONS, return_tensors="pt"))


# -------------------------------------------------------------------------------------------------------------- saving


@pytest.mark.parametrize("load", [HFCLIPProcessor.from_pretrained, AutoProcessor.from_pretrained])
def test_round_trip(tmp_path, processor, load):
    processor.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert type(again) is HFCLIPProcessor
    assert type(again.image_processor) is HFCLIPImageProcessor and type(again.tokenizer) is HFCLIPTokenizer
    assert equal(again(IMAGE, CAPTIONS, return_tensors="pt"), processor(IMAGE, CAPTIONS, return_tensors="pt"))


def test_auto_image_processor_is_ours_without_a_word(tmp_path, processor, caplog, monkeypatch):
    """Whether torchvision is installed or not: transformers would prefer, or miss aloud, a torchvision backend."""
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "processor_config.json").read_text())["image_processor"]["resize_backend"] == "pil"
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    warning_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        found = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(found) is HFCLIPImageProcessor and found.backend == "pil"
    assert not caplog.records
    assert AutoImageProcessor.from_pretrained(tmp_path, resize_backend="torch").backend == "torch"


def test_opens_a_folder_of_transformers_clip_as_ours(tmp_path, processor):
    processor.tokenizer.save_pretrained(tmp_path / "tokenizer")
    theirs = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    CLIPProcessor(CLIPImageProcessorPil(size=48, crop_size=40), theirs).save_pretrained(tmp_path / "clip")
    assert json.loads((tmp_path / "clip" / "processor_config.json").read_text())["processor_class"] == "CLIPProcessor"

    ours = HFCLIPProcessor.from_pretrained(tmp_path / "clip")
    assert type(ours.image_processor) is HFCLIPImageProcessor and type(ours.tokenizer) is HFCLIPTokenizer
    found = ours(IMAGE, CAPTIONS, return_tensors="pt")
    expected = HFCLIPImageProcessor(size=48, crop_size=40)(IMAGE, return_tensors="pt")["pixel_values"]
    assert torch.equal(found["pixel_values"], expected)
    mask = found["attention_mask"].bool()
    assert torch.equal(found["input_ids"][mask], processor(text=CAPTIONS, return_tensors="pt")["input_ids"][mask])


def test_remote_code_is_named_in_the_saved_folder(tmp_path, tokenizer, monkeypatch):
    """What a process without hfclip needs to find all three classes in the folder's own modules."""
    monkeypatch.setattr(HFCLIPImageProcessor, "_auto_class", "AutoImageProcessor")  # as register_for_auto_class
    monkeypatch.setattr(HFCLIPTokenizer, "_auto_class", "AutoTokenizer")
    monkeypatch.setattr(HFCLIPProcessor, "_auto_class", "AutoProcessor")
    HFCLIPProcessor(HFCLIPImageProcessor(size=32), tokenizer).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "processor_config.json").read_text())
    assert config["auto_map"]["AutoProcessor"] == "processing_hfclip.HFCLIPProcessor"
    image_map = config["image_processor"]["auto_map"]
    assert image_map["AutoImageProcessor"] == "image_processing_hfclip.HFCLIPImageProcessor"
    for module in ("image_processing_hfclip.py", "processing_hfclip.py", "tokenization_hfclip.py"):
        assert (tmp_path / module).is_file()
    reloaded = HFCLIPImageProcessor.from_pretrained(tmp_path)  # and keeps saying so when it is saved again
    assert reloaded.to_dict()["auto_map"] == image_map
