"""The examples of docs/training.md, run as they stand there."""

import copy
import re

import pytest
import torch
from safetensors.torch import load_file
from training_utils import ROOT, tiny_recipe

from hfclip import HFCLIPConfig, HFCLIPImageProcessor, HFCLIPModel, HFCLIPProcessor, HFCLIPTokenizer
from hfclip.data.scenes import Scenes


pytestmark = pytest.mark.slow


def test_examples_train_and_save_models_that_load(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    scenes = Scenes("train", num_scenes=200)
    texts = (scenes.caption(index) for index in range(200))
    tokenizer = HFCLIPTokenizer.train_new_from_iterator(texts, 600, show_progress=False)
    tokenizer.model_max_length = 16
    config = HFCLIPConfig(**copy.deepcopy(tiny_recipe(tmp_path)["model"]["config"]))
    config.text_config.vocab_size, config.text_config.eos_token_id = len(tokenizer), tokenizer.eos_token_id
    start = tmp_path / "runs" / "quickstart" / "model"
    HFCLIPModel(config).save_pretrained(start)
    HFCLIPProcessor(HFCLIPImageProcessor(size=32), tokenizer).save_pretrained(start)

    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "training.md").read_text(), flags=re.S)
    names = {}
    for block in blocks[1:]:  # the first one, of two towers, is under test in test_training_model.py
        exec(compile(block, "docs/training.md", "exec"), names)
    assert len(blocks) == 3

    def changed(kind: str) -> set[str]:
        before, after = (
            load_file(folder / "model.safetensors") for folder in (start, tmp_path / "runs" / kind / "model")
        )
        assert before.keys() == after.keys()
        HFCLIPModel.from_pretrained(tmp_path / "runs" / kind / "model")
        return {name for name in before if not torch.equal(before[name], after[name])}

    assert {"logit_scale", "visual_projection.weight"} < changed("trainer")
    adapted = changed("lora")
    assert adapted and all(re.search(r"(q_proj|k_proj|v_proj|out_proj|fc1|fc2)\.weight$", name) for name in adapted)
    assert (tmp_path / "runs/lora/adapter/adapter_model.safetensors").is_file()
    losses = [line["loss"] for line in names["trainer"].state.log_history if "loss" in line]
    assert len(losses) == 8 and sum(losses[4:]) < sum(losses[:4])
