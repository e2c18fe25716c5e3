"""Small folders of transformers' dual encoders, with random weights, tokenizers trained here and image processors."""

import functools
import importlib.util
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from conversion_utils import run_script
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast

from hfclip import HFCLIPModel, HFCLIPProcessor, HFCLIPTokenizer
from hfclip.foreign.processors import as_clip_tokenizer


CONTEXT, SIDE = 24, 32
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SQUARE = {**VISION, "image_size": SIDE, "patch_size": 8}
TEXT = {**VISION, "max_position_embeddings": CONTEXT}
HARD = [
    *("a photo of a cat", "", " ", "CAT!!! dog?", "naïve café", "日本語のテキスト 猫", "🐈‍⬛ emoji 👩‍👩‍👧", "a\tb\nc", "&lt;b&gt; &amp;amp;"),
    *("ﬁ ligature", "ÅNGSTRÖM İstanbul ß", "don't can't it's WE'VE", "123,456.789 1e-5", "<|endoftext|>", "</s><s><pad>"),
    *("a" * 80, "word " * 60, "nul \u0000 and \u200b zero width", "  leading and   inner  ", "مرحبا بالعالم", "हिन्दी"),
    *("[CLS] [SEP] [MASK]", "#hashtag @user http://x.y/z?q=1", "<eos><bos>", "ｆｕｌｌ　ｗｉｄｔｈ", "e\u0301 é", "!" * 40, "▁▁ metaspace ▁x"),
]  # fmt: skip


def hard_texts(number: int = 200) -> list[str]:
    """Texts that tokenizers disagree about."""
    draw = random.Random(0)
    return HARD + [" ".join(draw.choices(HARD, k=2))[: draw.randint(1, 120)] for _ in range(number - len(HARD))]


# Tokenizers


def wordpiece() -> Any:
    trained = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    trained.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    texts = [text.lower() for text in HARD]
    trained.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=300, special_tokens=special))
    return transformers.BertTokenizer(vocab=trained.get_vocab())


def unigram() -> Any:
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trained.train_from_iterator(
        HARD, trainers.UnigramTrainer(vocab_size=300, special_tokens=special, unk_token="<unk>")
    )
    vocab = [tuple(item) for item in json.loads(trained.to_str())["model"]["vocab"]]
    return transformers.XLMRobertaTokenizer(vocab=[*vocab, ("<mask>", 0.0)])


def bytes_and_pairs(kind: str, special: list[str], **options) -> Any:
    """A tokenizer of SentencePiece's kind, with a token for each byte."""
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trained.normalizer = normalizers.Replace(" ", "▁")
    special = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    trained.train_from_iterator(HARD, trainers.BpeTrainer(vocab_size=500, special_tokens=special))
    model = json.loads(trained.to_str())["model"]
    return getattr(transformers, kind)(
        vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]], **options
    )


def gemma(kind: str = "GemmaTokenizer") -> Any:
    tokenizer = bytes_and_pairs(kind, ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"], padding_side="right")
    # As in SigLIP 2's folders: no start, an end.
    template = {"single": "$A <eos>", "special_tokens": [("<eos>", tokenizer.eos_token_id)]}
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(**template)
    tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = ["input_ids"]
    return tokenizer


def siglip() -> Any:
    """SigLIP's rules (lower case, no punctuation, ends with the token that pads, too) without sentencepiece."""
    trained = Tokenizer(models.Unigram())
    trained.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(".", ""), normalizers.Strip()]
    )
    trained.pre_tokenizer, trained.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<unk>", "</s>"]
    trained.train_from_iterator(
        HARD, trainers.UnigramTrainer(vocab_size=300, special_tokens=special, unk_token="<unk>")
    )
    trained.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    words = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "</s>", "model_input_names": ["input_ids"]}
    return PreTrainedTokenizerFast(tokenizer_object=trained, model_max_length=CONTEXT, **words)


def clip() -> Any:
    tokenizer = as_clip_tokenizer(HFCLIPTokenizer.train_new_from_iterator(HARD, 600, show_progress=False))
    tokenizer.model_max_length = 77
    return tokenizer


# Image processors


def squashed(kind: str, **options) -> Any:
    return getattr(transformers, kind)(size={"height": SIDE, "width": SIDE}, **options)


def cropped(kind: str = "CLIPImageProcessorPil") -> Any:
    return getattr(transformers, kind)(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})


def efficient_net() -> Any:
    options = {"do_center_crop": True, "include_top": False, "resample": 2}
    options |= {"rescale_factor": 1 / 127.5, "rescale_offset": True, "do_normalize": False}
    size = {"size": {"height": 40, "width": 40}, "crop_size": {"height": SIDE, "width": SIDE}}
    return transformers.EfficientNetImageProcessorPil(**size, **options)


class Settings(dict):
    """An image processor's file; the class itself needs torchvision."""

    do_center_crop = False

    def save_pretrained(self, folder: Path) -> None:
        (folder / "preprocessor_config.json").write_text(json.dumps(self))


def tipsv2() -> Any:
    settings = {"image_processor_type": "Tipsv2ImageProcessor", "size": {"height": SIDE, "width": SIDE}}
    is_there = importlib.util.find_spec("torchvision") is not None
    return transformers.Tipsv2ImageProcessor(size=settings["size"]) if is_there else Settings(settings)


def naflex() -> Any:
    return transformers.Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16)


# Families


@dataclass
class Case:
    """A family, or one form of its folders.

    config: (vocabulary, tokenizer's ids of use) -> the family's config.
    model: class of transformers that writes the folder; the towers' model is in `whole` of it where that is another.
    limited: whether its scale is beyond the largest that counts. pixel_tolerance: of its own image processor's values.
    refused: why it is not sent back. returned_as: the class of transformers that it is sent back as, where that is another.
    """

    config: Callable[[int, dict], Any]
    model: str
    tokenizer: Callable[[], Any]
    image_processor: Callable[[], Any]
    pads_to_context: bool = False
    whole: str | None = None
    limited: bool = False
    refused: str | None = None
    returned_as: str | None = None
    pixel_tolerance: float = 1e-6


def plain(name: str, vision: dict = SQUARE, text: dict | None = None, **fields) -> Callable[[int, dict], Any]:
    def build(vocab_size: int, ids: dict) -> Any:
        towers = {"text_config": {**TEXT, "vocab_size": vocab_size, **ids, **(text or {})}, "vision_config": vision}
        return getattr(transformers, f"{name}Config")(**towers, **fields)

    return build


def align(vocab_size: int, ids: dict) -> Any:
    blocks = {"kernel_sizes": [3, 3], "in_channels": [32, 8], "out_channels": [8, 24], "strides": [1, 2]}
    blocks |= {
        "num_block_repeats": [1, 1],
        "expand_ratios": [1, 2],
        "width_coefficient": 1.0,
        "depth_coefficient": 1.0,
    }
    vision = {**blocks, "image_size": SIDE, "hidden_dim": 24}
    return plain("Align", vision, projection_dim=24, temperature_init_value=0.07)(vocab_size, ids)


def flava(vocab_size: int, ids: dict) -> Any:
    text = {**TEXT, "vocab_size": vocab_size, **ids}
    return transformers.FlavaConfig(text_config=text, image_config=SQUARE, multimodal_config=VISION, projection_dim=24)


def two_towers(vocab_size: int, ids: dict) -> Any:
    towers = transformers.ViTConfig(**SQUARE), transformers.BertConfig(**TEXT, vocab_size=vocab_size, **ids)
    return transformers.VisionTextDualEncoderConfig.from_vision_text_configs(*towers, projection_dim=24)


JOINT = {"projection_dim": 24}
NAFLEX = {**VISION, "patch_size": 8, "num_patches": 16}
CASES = {
    "clip": Case(plain("CLIP", **JOINT), "CLIPModel", clip, cropped),
    "siglip": Case(plain("Siglip"), "SiglipModel", siglip, lambda: squashed("SiglipImageProcessorPil"), True),
    "siglip with a head of another width": Case(
        plain("Siglip", {**SQUARE, "hidden_size": 48}, {"projection_size": 48}), "SiglipModel", siglip, lambda: squashed("SiglipImageProcessorPil"), True
    ),
    "siglip 2 of a fixed size": Case(plain("Siglip"), "SiglipModel", gemma, lambda: squashed("SiglipImageProcessorPil", resample=2), True),
    "siglip 2 naflex": Case(plain("Siglip2", NAFLEX), "Siglip2Model", lambda: gemma("Siglip2Tokenizer"), naflex, True),
    "metaclip_2": Case(plain("MetaClip2", **JOINT), "MetaClip2Model", unigram, cropped),
    "metaclip_2 of another activation": Case(plain("MetaClip2", {**SQUARE, "hidden_act": "gelu"}, {"hidden_act": "gelu"}, **JOINT), "MetaClip2Model", unigram, cropped),
    "chinese_clip": Case(plain("ChineseCLIP", **JOINT), "ChineseCLIPModel", wordpiece, lambda: squashed("ChineseCLIPImageProcessorPil", do_center_crop=False)),
    "altclip": Case(plain("AltCLIP", text={"project_dim": 20, "max_position_embeddings": CONTEXT + 2}, **JOINT), "AltCLIPModel", unigram, cropped),
    "align": Case(align, "AlignModel", wordpiece, efficient_net),
    "aimv2": Case(plain("Aimv2", **JOINT), "Aimv2Model", clip, cropped),
    "aimv2 beyond its largest scale": Case(plain("Aimv2", logit_scale_init_value=5.0, **JOINT), "Aimv2Model", clip, cropped, limited=True),
    "tipsv2": Case(plain("Tipsv2"), "Tipsv2Model", lambda: bytes_and_pairs("Tipsv2Tokenizer", ["<pad>", "<unk>"], model_max_length=CONTEXT), tipsv2, pixel_tolerance=0.00393),  # a level of 255
    "flava": Case(flava, "FlavaModel", wordpiece, lambda: cropped("FlavaImageProcessorPil"), refused="needs its multimodal encoder"),
    "clipseg": Case(plain("CLIPSeg", **JOINT), "CLIPSegModel", clip, lambda: squashed("ViTImageProcessorPil"), returned_as="CLIPModel"),
    "clipseg with its decoder": Case(plain("CLIPSeg", extract_layers=[0, 1], reduce_dim=8, decoder_intermediate_size=16, **JOINT), "CLIPSegForImageSegmentation", clip, lambda: squashed("ViTImageProcessorPil"), whole="clip", returned_as="CLIPModel"),
    "owlvit": Case(plain("OwlViT", **JOINT), "OwlViTModel", clip, lambda: squashed("OwlViTImageProcessorPil"), returned_as="CLIPModel"),
    "owlvit with its detector": Case(plain("OwlViT", **JOINT), "OwlViTForObjectDetection", clip, lambda: squashed("OwlViTImageProcessorPil"), whole="owlvit", returned_as="CLIPModel"),
    "owlv2": Case(plain("Owlv2", **JOINT), "Owlv2Model", clip, lambda: squashed("Owlv2ImageProcessorPil"), returned_as="CLIPModel"),
    "vision-text-dual-encoder": Case(two_towers, "VisionTextDualEncoderModel", wordpiece, lambda: squashed("ViTImageProcessorPil"), refused="no tower of type bert"),
}  # fmt: skip


@dataclass
class Source:
    """A folder that transformers wrote, and what wrote it: the family's own side of every comparison.

    options: what `from_pretrained` needs beside the folder.
    """

    case: Case
    folder: Path
    model: Any
    tokenizer: Any
    image_processor: Any
    options: dict = field(default_factory=dict)

    def ids(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Texts as the family has them: padded to the context without a mask, or to the longest with one."""
        return self.ids_of(self.tokenizer, texts)

    def ids_of(self, tokenizer: Any, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        padding = "max_length" if self.case.pads_to_context else True
        words = tokenizer(list(texts), padding=padding, truncation=True, max_length=CONTEXT, return_tensors="pt")
        kept = ("input_ids",) if self.case.pads_to_context else ("input_ids", "attention_mask")
        return {key: words[key] for key in kept}

    def images(self) -> dict[str, torch.Tensor]:
        """What the model takes for two images."""
        generator = torch.Generator().manual_seed(1)
        if self.case.image_processor is naflex:
            mask = torch.tensor([[1] * 16, [1] * 12 + [0] * 4])
            shapes = torch.tensor([[4, 4], [3, 4]])
            patches = torch.randn(2, 16, 192, generator=generator)
            return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}
        return {"pixel_values": torch.randn(2, 3, SIDE, SIDE, generator=generator)}

    def pixels(self, photos: list[Image.Image]) -> dict[str, torch.Tensor]:
        return self.image_processor(photos, return_tensors="pt")

    def features(self, images: dict, texts: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings of images and texts, not normalised."""
        if type(self.model).__name__ == "VisionTextDualEncoderModel":  # its own return tensors
            image, text = self.model.get_image_features(**images), self.model.get_text_features(**texts)
            return tuple(getattr(part, "pooler_output", part) for part in (image, text))
        image = self.model.get_image_features(**images).pooler_output
        text = self.model.get_text_features(**texts).pooler_output
        if (
            type(self.model).__name__ == "FlavaModel"
        ):  # it projects every position; its contrastive loss reads the first
            return image[:, 0], text[:, 0]
        return image, text

    def logits(self, images: dict, texts: dict) -> torch.Tensor:
        if type(self.model).__name__ != "FlavaModel":
            return self.model(**images, **texts).logits_per_image
        image, text = (F / F.norm(dim=-1, keepdim=True) for F in self.features(images, texts))
        return image @ text.T * self.model.logit_scale.exp()

    def check_ids(self, processor: HFCLIPProcessor) -> None:
        if self.case.tokenizer is clip:  # whose ids differ from OpenAI's in some texts; hfclip's do not
            assert type(processor.tokenizer) is HFCLIPTokenizer
            assert processor.tokenizer.get_vocab() == self.tokenizer.get_vocab()
            assert len(processor(text=["a " * 60])["input_ids"][0]) == CONTEXT  # its files say 77
            return
        ours, theirs = processor(text=hard_texts(), return_tensors="pt"), self.ids(hard_texts())
        assert torch.equal(ours["input_ids"], theirs["input_ids"]) and ours.keys() == {"input_ids", "attention_mask"}

    def check_sent_back(self, ours: Path, folder: Path) -> None:
        """The folder that `hfclip export` makes of `ours` holds the family's own tensors and ids; or it is refused."""
        if self.case.refused is not None:
            assert self.case.refused in run_script("export", ours, folder, "--to", "transformers", status=2).error
            return
        run_script("export", ours, folder, "--to", "transformers")
        theirs = getattr(transformers, self.case.returned_as or type(self.model).__name__).from_pretrained(folder)
        found, expected = theirs.state_dict(), self.model.state_dict()
        for key, tensor in found.items():
            key_here = key.replace(".pre_layrnorm.", ".pre_layernorm.") if key not in expected else key
            if not key.startswith("text_model.pooler.") and (key != "logit_scale" or not self.case.limited):
                rtol = 1e-6 if key == "temperature" else 0  # it was a logarithm here
                torch.testing.assert_close(tensor, expected[key_here], atol=0, rtol=rtol)
        words = self.ids_of(AutoTokenizer.from_pretrained(folder), hard_texts(40))
        expected = self.ids(hard_texts(40))
        assert words.keys() == expected.keys() and torch.equal(words["input_ids"], expected["input_ids"])
        if not isinstance(self.image_processor, Settings):
            AutoProcessor.from_pretrained(folder, backend="pil")


def write_source(name: str, folder: Path) -> Source:
    """The folder of a case, with weights of which none is zero or one."""
    case = CASES[name]
    tokenizer, image_processor = case.tokenizer(), case.image_processor()
    names = ("pad_token_id", "bos_token_id", "eos_token_id")
    ids = {name: getattr(tokenizer, name) for name in names if getattr(tokenizer, name) is not None}
    model = getattr(transformers, case.model)(case.config(len(tokenizer), ids)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for key, parameter in model.named_parameters():
        if not key.endswith(("logit_scale", "logit_bias", "temperature")):
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    for module in model.modules():
        if getattr(module, "padding_idx", None) is not None and isinstance(module, torch.nn.Embedding):
            module.weight[module.padding_idx] = 0  # as transformers does whenever it opens a folder
    if hasattr(model, "logit_bias"):
        model.logit_scale.fill_(1.5), model.logit_bias.fill_(-3.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    image_processor.save_pretrained(folder)
    whole = model if case.whole is None else getattr(model, case.whole)
    return Source(case, folder, whole, tokenizer, image_processor)


# What holds for every family


PADDED = ("a photo of a cat", "CAT!!! dog?", "naïve café")
TOLERANCE = 1e-5


@functools.cache
def photos(data_dir: Path) -> list[Image.Image]:
    """Twenty photos, smaller from the file on: it is their variety that counts."""
    found = [Image.open(path) for path in sorted((data_dir / "imagenet_sample").glob("*.JPEG"))[:20]]
    for photo in found:
        photo.draft("RGB", (128, 128))
    assert len(found) == 20
    return [photo.convert("RGB") for photo in found]


def open_source(found: Source) -> tuple[HFCLIPModel, HFCLIPProcessor]:
    """The folder as hfclip opens it."""
    openers = (HFCLIPModel, HFCLIPProcessor)
    model, processor = (opener.from_pretrained(found.folder, **found.options) for opener in openers)
    return model, processor


@torch.no_grad()
def check_embeddings(found: Source, ours: HFCLIPModel) -> None:
    images, texts = found.images(), found.ids(PADDED)
    image, text = found.features(images, texts)
    torch.testing.assert_close(ours.get_image_features(**images).pooler_output, image, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(ours.get_text_features(**texts).pooler_output, text, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(ours.encode_image(**images, normalize=False), image, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(ours.encode_text(**texts, normalize=False), text, atol=TOLERANCE, rtol=0)
    logits = found.logits(images, texts)
    torch.testing.assert_close(ours(**images, **texts).logits_per_image, logits, atol=1e-4, rtol=1e-5)
    assert text.std() > 0.01 and image.std() > 0.01 and logits.std() > 0.001


def check_pixels(
    found: Source, processor: HFCLIPProcessor, images: list[Image.Image], tolerance: float = 1e-6
) -> None:
    ours, theirs = processor(images=images, return_tensors="pt"), found.pixels(images)
    assert ours.keys() == theirs.keys()
    for key in theirs:
        torch.testing.assert_close(ours[key].float(), theirs[key].float(), atol=tolerance, rtol=0)


def check_saved(model: HFCLIPModel, processor: HFCLIPProcessor, folder: Path) -> None:
    """Saved, and opened again bit for bit."""
    model.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    again, report = HFCLIPModel.from_pretrained(folder, output_loading_info=True)
    assert written["model_type"] == "hfclip" and not any(report.values())
    tensors, tensors_again = model.state_dict(), again.state_dict()
    assert tensors.keys() == tensors_again.keys() == load_file(folder / "model.safetensors").keys()
    assert all(torch.equal(tensor, tensors_again[key]) for key, tensor in tensors.items())
    processor.save_pretrained(folder)
    texts, reopened = hard_texts(40), HFCLIPProcessor.from_pretrained(folder)
    assert dict(reopened(text=texts)) == dict(processor(text=texts))
    assert type(reopened.image_processor) is type(processor.image_processor)
    assert reopened.image_processor.to_dict() == processor.image_processor.to_dict()
