"""Every architecture of OpenCLIP with a tower of timm becomes a folder that computes what open_clip computes, or is refused
with its reason. The towers are timm's own, of one block a stage; their other settings are the architectures'."""

import json
import re
from pathlib import Path

import pytest
import torch
from conversion_utils import relative, run_script

from hfclip import HFCLIPModel
from hfclip.foreign.towers import siglip_kind


pytestmark = pytest.mark.peers
open_clip, timm = pytest.importorskip("open_clip"), pytest.importorskip("timm")

DOCS = Path(__file__).resolve().parents[1] / "docs" / "conversion.md"
CONFIGS = {name: open_clip.get_model_config(name) for name in open_clip.list_models()}
ARCHITECTURES = [name for name, config in CONFIGS.items() if config["vision_cfg"].get("timm_model_name")]
# One of each kind; the others differ from them in sizes, and are tried with the slow tests.
QUICK = """ViT-B-16-SigLIP ViT-B-32-SigLIP2-256 ViT-SO400M-16-SigLIP-i18n-256 ViT-L-16-SigLIP2-512 ViTamin-S MobileCLIP-S1
    MobileCLIP-B EVA02-B-16 PE-Core-T-16-384 convnext_tiny swin_base_patch4_window7_224 vit_medium_patch16_gap_256
    vit_relpos_medium_patch16_cls_224 convnext_large_d nllb-clip-base-siglip""".split()
REFUSED = {
    "convnext_large_d": "timm_proj 'mlp'",
    "convnext_large_d_320": "timm_proj 'mlp'",
    "nllb-clip-base-siglip": "The text tower's config is not available",  # and if it is: the decoder comes with it
    "nllb-clip-large-siglip": "The text tower's config is not available",
}


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


@pytest.fixture
def source(request, tmp_path):
    """A training checkpoint of a shallow model, its JSON, and the model in float64."""
    name = request.param
    config = json.loads(json.dumps(CONFIGS[name]))
    undo = shallow(config["vision_cfg"]["timm_model_name"])
    if "hf_model_name" not in config["text_cfg"]:
        config["text_cfg"] |= {"layers": 1, "vocab_size": 300, "hf_tokenizer_name": None}
    path = tmp_path / f"shallow-{name}.json"
    path.write_text(json.dumps(config))
    model = None
    if name not in REFUSED:
        open_clip.add_model_config(path)
        torch.manual_seed(0)
        model = open_clip.create_model(path.stem).eval()
        torch.save({"epoch": 1, "state_dict": model.state_dict()}, tmp_path / "epoch_1.pt")
        model.double()
    else:
        torch.save({"logit_scale": torch.ones(()), "visual.trunk.x": torch.ones(1)}, tmp_path / "epoch_1.pt")
    yield name, path, model
    undo()


@pytest.mark.filterwarnings("ignore:Overwriting .* in registry")
@pytest.mark.parametrize(
    "source",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in ARCHITECTURES],
    indirect=True,
)
@torch.no_grad()
def test_computes_what_open_clip_does_or_is_refused(source, tmp_path):
    name, path, theirs = source
    arguments = (tmp_path / "epoch_1.pt", tmp_path / "out", "--model", path)
    if name in REFUSED:
        assert REFUSED[name] in run_script("convert_openclip", *arguments, status=2).error
        return
    run_script("convert_openclip", *arguments)
    ours = HFCLIPModel.from_pretrained(tmp_path / "out", dtype=torch.float64).eval()
    side = ours.config.image_size
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, 3, side, side, dtype=torch.float64, generator=generator)
    ids = torch.randint(2, 299, (2, theirs.context_length), generator=generator)
    ids[:, -1] = 299
    assert relative(ours.encode_image(pixels, normalize=False), theirs.encode_image(pixels)) < 1e-9
    assert relative(ours.encode_text(ids, normalize=False), theirs.encode_text(ids)) < 1e-9


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


def test_the_documentation_counts_what_converts():
    siglip = [name for name in ARCHITECTURES if "SigLIP" in name]
    others = [name for name in ARCHITECTURES if name not in siglip and name not in REFUSED]
    text = " ".join(DOCS.read_text(encoding="utf-8").split())
    assert f"all {len(siglip)} of SigLIP and SigLIP2 and {len(others)} others" in text
    assert set(re.findall(r"`([^`]+)`", text.partition("Not convertible among them are ")[2].partition(".")[0])) == {
        *REFUSED
    }
