"""Every architecture of OpenCLIP becomes a model that computes what open_clip computes, or is refused with its reason.

All are opened at their full size on the meta device. Numbers are compared at small sizes: of each model of timm, with one
block a stage, and of each kind of tower that is OpenCLIP's own or transformers'."""

import copy
import re
from pathlib import Path

import pytest
import torch
from conversion_utils import relative, run_script
from families_utils import check_embeddings, check_pixels, check_saved, open_source, photos
from torch.overrides import TorchFunctionMode
from transformers import M2M100Config, MT5Config, RobertaConfig, XLMRobertaConfig

from hfclip import HFCLIPModel
from hfclip.errors import UsageError
from hfclip.foreign.key_maps import hfclip_items, openclip_config
from hfclip.foreign.plan import check_fit, on_meta
from hfclip.foreign.towers import foreign_plan, has_foreign_tower, siglip_kind


pytestmark = pytest.mark.peers
open_clip, timm = pytest.importorskip("open_clip"), pytest.importorskip("timm")
from openclip_utils import KINDS, OpenCLIPSource, build, save_source, shallow  # noqa: E402 -- they need both


DOCS = Path(__file__).resolve().parents[1] / "docs" / "conversion.md"
CONFIGS = {name: open_clip.get_model_config(name) for name in open_clip.list_models()}
ARCHITECTURES = [name for name, config in CONFIGS.items() if config["vision_cfg"].get("timm_model_name")]
# One of each kind; the others differ from them in sizes, and are tried with the slow tests.
QUICK = """ViT-B-16-SigLIP ViT-B-32-SigLIP2-256 ViT-SO400M-16-SigLIP-i18n-256 ViT-L-16-SigLIP2-512 ViTamin-S MobileCLIP-S1
    MobileCLIP-B EVA02-B-16 PE-Core-T-16-384 convnext_tiny swin_base_patch4_window7_224 vit_medium_patch16_gap_256
    vit_relpos_medium_patch16_cls_224 convnext_large_d nllb-clip-base-siglip""".split()
# The sizes of published text towers, which open_clip would fetch.
XLM = {"vocab_size": 250_002, "max_position_embeddings": 514, "type_vocab_size": 1}
NLLB = {"vocab_size": 256_206, "d_model": 1024}
TEXT_TOWERS = {
    "roberta-base": RobertaConfig(vocab_size=50_265, max_position_embeddings=514, type_vocab_size=1),
    "xlm-roberta-base": XLMRobertaConfig(**XLM),
    "xlm-roberta-large": XLMRobertaConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, **XLM
    ),
    "google/mt5-base": MT5Config(vocab_size=250_112, d_model=768, d_ff=2048, num_layers=12, num_heads=12),
    "google/mt5-xl": MT5Config(vocab_size=250_112, d_model=2048, d_ff=5120, num_layers=24, num_heads=32),
    "facebook/nllb-200-distilled-600M": M2M100Config(
        encoder_layers=12, decoder_layers=12, encoder_ffn_dim=4096, **NLLB
    ),
    "facebook/nllb-200-distilled-1.3B": M2M100Config(
        encoder_layers=24, decoder_layers=24, encoder_ffn_dim=8192, **NLLB
    ),
}


class WithoutValues(TorchFunctionMode):
    """Weights on the meta device are not drawn, which takes longer than all else there."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        tensor = (*args, (kwargs or {}).get("tensor"))[0]
        draws = re.fullmatch(r"[a-z]\w*_", func.__name__) and isinstance(tensor, torch.Tensor) and tensor.is_meta
        return tensor if draws else func(*args, **(kwargs or {}))


def openclip_weights(model):
    """As `weight_names` gives them."""
    state = {name.removeprefix("text."): tensor for name, tensor in model.state_dict().items()}
    return {name: tensor for name, tensor in state.items() if not name.startswith("text_decoder.")}


@pytest.fixture(scope="module")
def text_towers(tmp_path_factory):
    """Folders with the configs of `TEXT_TOWERS`, by their names on the Hub."""
    folder = tmp_path_factory.mktemp("text")
    for name, config in TEXT_TOWERS.items():
        config.save_pretrained(folder / name.replace("/", "-"))
    return {name: str(folder / name.replace("/", "-")) for name in TEXT_TOWERS}


def opened(config, text_towers):
    """Types of the towers of an architecture, opened at its full size without memory."""
    config = copy.deepcopy(config)
    if name := config["text_cfg"].get("hf_model_name"):
        config["text_cfg"]["hf_model_name"] = text_towers[name]
    with torch.device("meta"), WithoutValues():
        weights = openclip_weights(build(config))
    ours, items = (
        foreign_plan(weights, config, None)
        if has_foreign_tower(config)
        else (openclip_config(weights, config), hfclip_items)
    )
    with WithoutValues():
        check_fit(dict(items(weights)), on_meta(HFCLIPModel, ours))
    return ours.vision_config.model_type, ours.text_config.model_type


def test_every_architecture_is_opened_or_refused_as_documented(text_towers):
    kinds, refused = {}, {}
    for name, config in CONFIGS.items():
        try:
            kinds.setdefault(opened(config, text_towers), []).append(name)
        except UsageError as error:
            refused[name] = str(error)
    assert len(refused) < 0.1 * len(CONFIGS), refused
    version = open_clip.__version__.rpartition(".")[0]
    expected = [f"Of the {len(CONFIGS)} architectures in open_clip {version}, {len(CONFIGS) - len(refused)} open."]
    for (image, text), names in kinds.items():
        expected.append(f"| `{image}` | `{text}` | {len(names)} | {' '.join(sorted(names))} |")
    expected += [f"| `{name}` | {reason} |" for name, reason in refused.items()]
    documented = DOCS.read_text(encoding="utf-8")
    assert not [line for line in expected if line not in documented], "\n".join(expected)


@pytest.fixture
def source(request, tmp_path):
    """A training checkpoint of a shallow model, its JSON, and the model in float64."""
    config = copy.deepcopy(CONFIGS[request.param])
    undo = shallow(config["vision_cfg"]["timm_model_name"])
    if "hf_model_name" not in config["text_cfg"]:
        config["text_cfg"] |= {"layers": 1, "vocab_size": 300}
    else:
        config["text_cfg"]["hf_model_name"] = "m2m_100"
    config["text_cfg"]["hf_tokenizer_name"] = None
    yield save_source(config, tmp_path)
    undo()


@pytest.mark.filterwarnings("ignore:Overwriting .* in registry")
@pytest.mark.parametrize(
    "source",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in ARCHITECTURES],
    indirect=True,
)
def test_models_of_timm_compute_what_open_clip_does(source, tmp_path):
    compare(source, tmp_path)


@torch.no_grad()
def compare(theirs, folder):
    run_script("convert_openclip", folder / "epoch_1.pt", folder / "out", "--model", folder / "model.json")
    ours = HFCLIPModel.from_pretrained(folder / "out", dtype=torch.float64).eval()
    side = ours.config.image_size
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, 3, side, side, dtype=torch.float64, generator=generator)
    length = min(theirs.context_length or 16, 77)
    ids = torch.randint(3, 299, (3, length), generator=generator)
    ids[0, 4] = ids[1, 8] = ids[2, -1] = 299
    ids[0, 5:] = ids[1, 9:] = ours.config.text_config.pad_token_id or 0
    assert relative(ours.encode_image(pixels, normalize=False), theirs.encode_image(pixels, normalize=False)) < 1e-9
    assert relative(ours.encode_text(ids, normalize=False), theirs.encode_text(ids, normalize=False)) < 1e-9


@pytest.fixture
def kind(request, tmp_path):
    """A folder of OpenCLIP's."""
    name = KINDS[request.param]["vision_cfg"].get("timm_model_name")
    undo = shallow(name) if name and name != "test_vit" else lambda: None
    (tmp_path / "source").mkdir()
    yield OpenCLIPSource(request.param, tmp_path / "source")
    undo()


@pytest.mark.filterwarnings("ignore:Overwriting .* in registry")
@pytest.mark.parametrize("kind", KINDS, indirect=True)
def test_every_kind_of_model_is_what_open_clip_makes_of_it(kind, data_dir, tmp_path):
    model, processor = open_source(kind)
    check_embeddings(kind, model)
    check_pixels(kind, processor, photos(data_dir))
    kind.check_ids(processor)
    kind.check_converted(model, tmp_path / "converted")
    check_saved(model, processor, tmp_path / "ours")
    kind.check_sent_back(tmp_path / "ours", tmp_path / "theirs")


def test_siglip_settings_are_timms():
    names = [name for name in timm.list_models("vit_*_siglip_*") if siglip_kind(name) is not None]
    assert len(names) >= 14 and not [name for name in names if "gap" in name]
    for name in names:
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=0, depth=1)
        act = model.blocks[0].mlp.act
        is_tanh = "Tanh" in type(act).__name__ or getattr(act, "approximate", "none") == "tanh"
        expected = (model.embed_dim, model.blocks[0].attn.num_heads, "gelu_tanh" if is_tanh else "gelu")
        assert siglip_kind(name) == expected, name
