"""Small models of OpenCLIP with random weights: its folders as the Hub has them, and its training checkpoints."""

import copy
import json

import open_clip
import timm
import torch
from conversion_utils import assert_same_tensors, run_script
from families_utils import (
    CONTEXT,
    SIDE,
    Source,
    bytes_and_pairs,
    check_embeddings,
    gemma,
    hard_texts,
    siglip,
    unigram,
    wordpiece,
)
from open_clip.tokenizer import HFTokenizer, basic_clean, default_bpe
from open_clip.transform import PreprocessCfg, image_transform_v2
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import BertConfig, M2M100Config, MT5Config, RobertaConfig, RobertaTokenizer, XLMRobertaConfig

from hfclip import HFCLIPModel


SMALL = {"vocab_size": 300, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
BERT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 40, **SMALL}
SMALL_TEXT_TOWERS = {
    "bert": BertConfig(**BERT),
    "roberta": RobertaConfig(max_position_embeddings=80, **BERT),
    "xlm-roberta": XLMRobertaConfig(max_position_embeddings=80, **BERT),
    "mt5": MT5Config(d_model=32, d_kv=8, d_ff=40, num_layers=2, num_heads=4, **SMALL),
    "m2m_100": M2M100Config(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, encoder_ffn_dim=40, **SMALL
    ),
}


def roberta():
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator([], trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet))
    return RobertaTokenizer(vocab=trained.get_vocab(), merges=[])


def nllb():
    return bytes_and_pairs("NllbTokenizer", ["<s>", "<pad>", "</s>", "<unk>"])


TOKENIZERS = {"bert": wordpiece, "roberta": roberta, "xlm-roberta": unigram, "mt5": unigram, "m2m_100": nllb}
# Settings of architectures, and of OpenCLIP's transform where they are not its defaults.
VIT = {"image_size": SIDE, "layers": 2, "width": 48, "head_width": 12, "patch_size": 8}
TEXT = {"context_length": CONTEXT, "vocab_size": 49408, "width": 16, "heads": 4, "layers": 2}
COCA = {"attentional_pool": True, "attn_pooler_heads": 4, "attn_pooler_queries": 5, "output_tokens": True}
COCA_TEXT = {**TEXT, "embed_cls": True, "output_tokens": True}
DECODER = {"width": 24, "context_length": CONTEXT, "vocab_size": 49408, "layers": 1, "heads": 4}
CLIPA = {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True, "pos_embed_type": "sin_cos_2d"}
CLIPA_TEXT = {"pool_type": "last", "no_causal_mask": True, "act_kwargs": {"approximate": "tanh"}}
SIGLIP_TEXT = {"no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}
SIGLIP_TEXT |= {**TEXT, "width": 24, "tokenizer_kwargs": {"clean": "canonicalize"}}
HALF = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}
ZERO = {"mean": [0.0] * 3, "std": [1.0] * 3, "interpolation": "bilinear"}


def trunk(name, pool, image_size, proj=None, embed_dim=24, **fields):
    vision = {"timm_model_name": name, "timm_pool": pool, "timm_proj": proj, "image_size": image_size}
    return {"embed_dim": embed_dim, "vision_cfg": vision, "text_cfg": TEXT, "custom_text": True, **fields}


def towers(vision=VIT, text=TEXT, **fields):
    return {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text, **fields}


def of_transformers(name, vision=VIT, **fields):
    context = {"hf_model_name": name, "hf_tokenizer_name": f"tiny/{name}", "context_length": CONTEXT}
    return towers(vision, {**context, **fields.pop("text", {})}, **fields)


KINDS = {
    "ViT": towers(quick_gelu=True),
    "ResNet": towers({"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None}),
    "LayerScale": towers({**VIT, "ls_init_value": 0.1}, {**TEXT, "ls_init_value": 0.2}),
    "sigmoid loss": towers(init_logit_bias=-3.0, preprocess=ZERO),
    "CLIPA": towers(
        {**VIT, **CLIPA},
        {**TEXT, **CLIPA_TEXT, "hf_tokenizer_name": "tiny/bert", "tokenizer_kwargs": {"strip_sep_token": True}},
        tokenizer=wordpiece,
        preprocess=HALF,
    ),
    "CoCa": towers({**VIT, **COCA}, COCA_TEXT, multimodal_cfg=DECODER),
    "CoCa as wide as its tower": towers({**VIT, **COCA, "width": 24}, COCA_TEXT, multimodal_cfg=DECODER),
    "CoCa with RoBERTa": of_transformers(
        "roberta",
        {**VIT, "output_tokens": True},
        text={"hf_proj_type": "linear", "output_tokens": True},
        multimodal_cfg=DECODER,
    ),
    "RoBERTa, mlp": of_transformers("roberta", quick_gelu=True),
    "XLM-R, mlp": of_transformers("xlm-roberta", text={"hf_pooler_type": "mean_pooler"}),
    "mT5, mlp": of_transformers("mt5", text={"hf_pooler_type": "mean_pooler"}),
    "NLLB": of_transformers("m2m_100", text={"hf_proj_type": "linear", "hf_pooler_type": "cls_pooler"}),
    "BiomedCLIP": of_transformers(
        "bert",
        trunk("test_vit", "", 160, "linear")["vision_cfg"],
        text={"hf_proj_type": "mlp", "hf_pooler_type": "cls_last_hidden_state_pooler"},
    ),
    "a classifier with a bias": trunk("test_vit", "token", 160),
    "SigLIP": trunk(
        "vit_base_patch16_siglip_224",
        *("map", 224, "none", 768),
        text_cfg={**SIGLIP_TEXT, "hf_tokenizer_name": "tiny/siglip"},
        tokenizer=siglip,
        preprocess=HALF,
        init_logit_bias=-10.0,
    ),
    "SigLIP 2": trunk(
        "vit_base_patch32_siglip_256",
        *("map", 256, "none", 768),
        text_cfg={**SIGLIP_TEXT, "hf_tokenizer_name": "tiny/gemma", "act_kwargs": {"approximate": "tanh"}},
        tokenizer=gemma,
        preprocess={**HALF, "interpolation": "bilinear"},
        init_logit_bias=-10.0,
    ),
    "EVA02": trunk("eva02_base_patch16_clip_224", "token", 224),
    "PE-Core": trunk("vit_pe_core_tiny_patch16_384", "map", 384, preprocess=HALF),
    "ConvNeXt": trunk("convnext_tiny", "", 64, "linear"),
    "MobileOne": trunk("fastvit_mci0", "avg", 64, preprocess=ZERO),
}


def build(config):
    """The model that open_clip makes of a `model_cfg`, without weights to fetch."""
    config = copy.deepcopy(config)
    is_custom = config.pop("custom_text", False) or "hf_model_name" in config["text_cfg"]
    if "hf_model_name" in config["text_cfg"]:
        config["text_cfg"]["hf_model_pretrained"] = False
    if "multimodal_cfg" in config:
        return open_clip.CoCa(**config)
    return (open_clip.CustomTextCLIP if is_custom else open_clip.CLIP)(**config)


def shallow(name):
    """Teaches timm to build the model of this name with one block a stage; returns what undoes it."""
    entry = timm.models.model_entrypoint(name)
    stages = {"convnext": "depths", "swin": "depths", "fastvit": "layers"}
    option = next((option for kind, option in stages.items() if name.startswith(kind)), "depth")
    blocks = 1
    if option != "depth":
        with torch.device("meta"):
            number = len(timm.create_model(name).feature_info)
        blocks = (2,) + (1,) * (number - 1)  # Swin shifts the windows of every second block

    def build(pretrained=False, **options):
        return entry(pretrained=pretrained, **{option: blocks, **options})

    build.__name__, build.__module__ = name, entry.__module__
    timm.models.register_model(build)
    return lambda: timm.models.register_model(entry)


def random_model(config, folder, **ids):
    """A model of these settings, none of its weights zero; the config of a text tower of transformers goes to `folder`."""
    if name := config["text_cfg"].get("hf_model_name"):
        tower = copy.deepcopy(SMALL_TEXT_TOWERS[name])
        tower.update(ids)
        tower.save_pretrained(folder / name)
        config["text_cfg"]["hf_model_name"] = str(folder / name)
    torch.manual_seed(0)
    model = build(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if not parameter.abs().sum():
            torch.nn.init.normal_(parameter, std=0.1)  # a bias of zeros proves nothing
    return model


def save_source(config, folder):
    """Writes a training checkpoint, its JSON and its text tower's config; returns the model in float64."""
    model = random_model(config, folder)
    (folder / "model.json").write_text(json.dumps(config))
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, folder / "epoch_1.pt")
    return model.double()


class OpenCLIPSource(Source):
    """A folder of OpenCLIP's, and open_clip's own model, transform and tokenizer of it."""

    def __init__(self, kind, folder):
        self.kind, self.folder, self.options = kind, folder, {}
        config, ids = copy.deepcopy(KINDS[kind]), {}
        preprocess = {"size": config["vision_cfg"]["image_size"], **config.pop("preprocess", {})}
        self.transform = image_transform_v2(PreprocessCfg(**preprocess), is_train=False)
        train = config.pop("tokenizer", TOKENIZERS.get(config["text_cfg"].get("hf_model_name")))
        if train is None:
            self.options["tokenizer"] = default_bpe()
        else:
            tokenizer = train()
            tokenizer.save_pretrained(folder)
            ids = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
            config["text_cfg"]["vocab_size"] = len(tokenizer)
        self.model = random_model(config, folder, **ids)
        if kind == "MobileOne":
            self.model = timm.utils.reparameterize_model(self.model)
        save_file(self.model.state_dict(), folder / "open_clip_model.safetensors")
        settings = {"model_cfg": config, "preprocess_cfg": preprocess}
        (folder / "open_clip_config.json").write_text(json.dumps(settings))
        self.tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")

    @property
    def is_own(self):
        """Whether both towers are OpenCLIP's own, with an activation and tokenizer of its own."""
        vision, text = KINDS[self.kind]["vision_cfg"], KINDS[self.kind]["text_cfg"]
        return not vision.get("timm_model_name") and not text.get("hf_model_name")

    def ids(self, texts):
        return {"input_ids": self.tokenizer(list(texts))}

    def images(self):
        side, generator = KINDS[self.kind]["vision_cfg"]["image_size"], torch.Generator().manual_seed(1)
        return {"pixel_values": torch.randn(2, 3, side, side, generator=generator)}

    def pixels(self, photos):
        return {"pixel_values": torch.stack([self.transform(photo) for photo in photos])}

    def features(self, images, texts):
        image = self.model.encode_image(images["pixel_values"], normalize=False)
        return image, self.model.encode_text(texts["input_ids"], normalize=False)

    def logits(self, images, texts):
        image, text = (torch.nn.functional.normalize(F, dim=-1) for F in self.features(images, texts))
        bias = getattr(self.model, "logit_bias", None)
        return self.model.logit_scale.exp() * image @ text.T + (0 if bias is None else bias)

    def check_ids(self, processor):
        """What the tokenizer's file cannot say is left out: OpenCLIP repairs texts, and knows no names of special tokens."""
        texts, special = hard_texts(600), processor.tokenizer.all_special_tokens
        if isinstance(self.tokenizer, HFTokenizer):
            texts = [text for text in texts if basic_clean(text) == text.strip()]
        texts = [text for text in texts if not any(token in text for token in special)][:200]
        ours = processor(text=texts, padding="max_length", return_tensors="pt")["input_ids"]
        assert len(texts) == 200 and torch.equal(ours, self.ids(texts)["input_ids"])

    def check_converted(self, model, folder):
        """By way of a conversion it is the same model."""
        merges = ("--merges", self.options["tokenizer"]) if self.options else ()
        run_script("convert_openclip", self.folder, folder, *merges)
        assert_same_tensors(load_file(folder / "model.safetensors"), model.state_dict())

    def check_sent_back(self, ours, folder):
        """OpenCLIP's own towers; of CoCa without what writes captions."""
        if not self.is_own:
            refusal = run_script("export", ours, folder, "--to", "openclip", status=2).error
            assert "OpenCLIP has no towers" in refusal
            return
        run_script("export", ours, folder, "--to", "openclip")
        found = load_file(folder / "open_clip_model.safetensors")
        found = {name.removeprefix("text."): tensor for name, tensor in found.items()}
        expected = {name.removeprefix("text."): tensor for name, tensor in self.model.state_dict().items()}
        assert found.keys() == {name for name in expected if not name.startswith("text_decoder.")}
        for name, tensor in found.items():
            assert torch.equal(
                tensor, expected[name][: len(tensor)] if name.endswith("attn_pool.query") else expected[name]
            )
        self.model = open_clip.create_model(f"local-dir:{folder}").eval()
        check_embeddings(self, HFCLIPModel.from_pretrained(ours))
