"""Small folders of transformers' dual encoders, with random weights, tokenizers trained here and image processors."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from hfclip import HFCLIPTokenizer


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
    tokenizer = HFCLIPTokenizer.train_new_from_iterator(HARD, 600, show_progress=False)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in model["merges"]]
    return transformers.CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=77)


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


def naflex() -> Any:
    return transformers.Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16)


# Families


@dataclass
class Case:
    """A family, or one form of its folders.

    config: (vocabulary, tokenizer's ids of use) -> the family's config.
    model: class of transformers that writes the folder; the towers' model is in `whole` of it where that is another.
    """

    config: Callable[[int, dict], Any]
    model: str
    tokenizer: Callable[[], Any]
    image_processor: Callable[[], Any]
    pads_to_context: bool = False
    whole: str | None = None


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


JOINT = {"projection_dim": 24}
NAFLEX = {**VISION, "patch_size": 8, "num_patches": 16}
CASES = {
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
    "aimv2 beyond its largest scale": Case(plain("Aimv2", logit_scale_init_value=5.0, **JOINT), "Aimv2Model", clip, cropped),
    "tipsv2": Case(plain("Tipsv2"), "Tipsv2Model", lambda: bytes_and_pairs("Tipsv2Tokenizer", ["<pad>", "<unk>"], model_max_length=CONTEXT), lambda: None),
    "flava": Case(flava, "FlavaModel", wordpiece, lambda: cropped("FlavaImageProcessorPil")),
    "clipseg": Case(plain("CLIPSeg", **JOINT), "CLIPSegModel", clip, lambda: squashed("ViTImageProcessorPil")),
    "clipseg with its decoder": Case(plain("CLIPSeg", extract_layers=[0, 1], reduce_dim=8, decoder_intermediate_size=16, **JOINT), "CLIPSegForImageSegmentation", clip, lambda: squashed("ViTImageProcessorPil"), whole="clip"),
    "owlvit": Case(plain("OwlViT", **JOINT), "OwlViTModel", clip, lambda: squashed("OwlViTImageProcessorPil")),
    "owlvit with its detector": Case(plain("OwlViT", **JOINT), "OwlViTForObjectDetection", clip, lambda: squashed("OwlViTImageProcessorPil"), whole="owlvit"),
    "owlv2": Case(plain("Owlv2", **JOINT), "Owlv2Model", clip, lambda: None),
}  # fmt: skip


@dataclass
class Source:
    """A folder that transformers wrote, and what wrote it."""

    case: Case
    folder: Path
    model: Any
    tokenizer: Any
    image_processor: Any


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
    if image_processor is not None:
        image_processor.save_pretrained(folder)
    whole = model if case.whole is None else getattr(model, case.whole)
    return Source(case, folder, whole, tokenizer, image_processor)
