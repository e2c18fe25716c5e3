"""The list of well-known models: its rows agree with the architectures, and people find what they look for."""

import json

import pytest
import torch
from test_cli import hfclip  # noqa: F401 -- the command, run in this process

from hfclip import HFCLIPConfig, HFCLIPModel, list_models
from hfclip.errors import UsageError
from hfclip.models import SOURCES, nearest_model
from hfclip.names import opening
from hfclip.presets_hfclip import PRESETS


def test_the_nine_architectures_come_first_with_their_sizes():
    first = list_models()[: len(PRESETS)]
    assert [model.name for model in first] == list(PRESETS) and all(model.is_preset for model in first)
    assert not any(model.is_preset for model in list_models()[len(PRESETS) :])
    for model in first:
        config = HFCLIPConfig.from_preset(model.name)
        with torch.device("meta"):
            parameters = sum(parameter.numel() for parameter in HFCLIPModel(config).parameters())
        assert (model.image_size, model.width) == (config.image_size, config.projection_dim)
        assert model.parameters == pytest.approx(parameters / 1e6, abs=0.06)


def test_rows_are_whole_and_say_their_source():
    models = list_models()
    assert len(models) > 60 and len({model.hub for model in models}) == len({model.name for model in models}) == len(
        models
    )
    for model in models:
        assert model.format in ("transformers", "openclip") and model.logits in ("softmax", "sigmoid")
        assert model.hub.count("/") == 1 and model.hub in model.opens
        assert (model.imagenet is None) == (not model.source) and (not model.source or model.source in SOURCES)
        assert model.imagenet is None or 20 < model.imagenet < 90
    assert {model.logits for model in list_models("siglip")} == {"sigmoid"}


@pytest.mark.parametrize(
    "name, expected",
    [
        ("ViT-B-32", "openai/clip-vit-base-patch32"),
        ("openai/clip-vit-base-patch-32", "openai/clip-vit-base-patch32"),
        ("google/siglip-2-base-patch16-224", "google/siglip2-base-patch16-224"),
    ],
)
def test_a_near_miss_is_told_the_nearest(name, expected):
    assert nearest_model(name) == f"Did you mean {expected!r}?"
    with pytest.raises(UsageError, match=f"--model: found no folder '{name}' here.* Did you mean '{expected}'"):
        with opening(name, "--model"):
            HFCLIPModel.from_pretrained(name)
    assert not nearest_model("anna/birds") and not nearest_model(expected)


def test_the_command_lists_what_holds_all_words(hfclip):  # noqa: F811
    status, out, _ = hfclip("models", "siglip", "384")
    header, *rows = out.splitlines()
    assert (
        status == 0
        and header.split()[:3] == ["name", "hub", "pixels"]
        and len(rows) == len(list_models("siglip", "384"))
    )
    assert all("384" in row and "sigmoid" in row for row in rows)
    found = [json.loads(line) for line in hfclip("models", "ViT-L/14@336px", "--json")[1].splitlines()]
    assert [(row["hub"], row["imagenet"], row["preset"]) for row in found] == [
        ("openai/clip-vit-large-patch14-336", 76.56, True)
    ]
    assert found[0]["source"].startswith("https://") and "HFCLIPModel.from_pretrained" in found[0]["opens"]
    status, _, err = hfclip("models", "blip")
    assert status == 2 and "found no model with 'blip'" in err


@pytest.mark.peers
def test_addresses_of_openclips_files_are_those_that_open_clip_knows():
    open_clip = pytest.importorskip("open_clip")
    hubs = [open_clip.get_pretrained_cfg(*names).get("hf_hub") or "" for names in open_clip.list_pretrained()]
    known = {"/".join(hub.split("/")[:2]) for hub in hubs}
    listed = {model.hub for model in list_models() if model.format == "openclip"}
    assert {hub.split("/")[0] for hub in listed - known} == {"microsoft"}
