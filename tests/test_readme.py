"""The README's Python, run as it stands beside small folders of the names that it reads, every warning an error."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import BertConfig, BertModel, CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model

from hfclip import HFCLIPConfig, HFCLIPImageProcessor, HFCLIPModel, HFCLIPProcessor, HFCLIPTokenizer


README = Path(__file__).parents[1] / "README.md"
CAPTIONS = ["a red circle", "a green triangle", "a blue square", "a photo of a cat", "a photo of a dog"]
TOWER = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
VISION = dict(TOWER, image_size=32, patch_size=8)


def save_what_is_read(folder: Path) -> None:
    """Saves into `folder` what the snippets open: the quickstart's model, two photos, models under their Hub names."""
    tokenizer = HFCLIPTokenizer.train_new_from_iterator(CAPTIONS, vocab_size=600)
    ends = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    text = dict(TOWER, vocab_size=len(tokenizer), **ends)
    image_processor = HFCLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    HFCLIPModel(HFCLIPConfig(text_config=text, vision_config=dict(VISION, model_type="hfclip_vit"))).save_pretrained(
        folder / "runs/quickstart/model"
    )
    HFCLIPProcessor(image_processor, tokenizer).save_pretrained(folder / "runs/quickstart/model")
    CLIPModel(CLIPConfig(text_config=text, vision_config=VISION)).save_pretrained(
        folder / "openai/clip-vit-base-patch32"
    )
    Dinov2Model(Dinov2Config(**TOWER, image_size=32, patch_size=8)).save_pretrained(folder / "facebook/dinov2-small")
    BertModel(BertConfig(**TOWER, vocab_size=99)).save_pretrained(folder / "google-bert/bert-base-uncased")
    for name in ("cat.jpg", "dog.jpg"):
        pixels = np.random.default_rng(len(name)).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)


def test_python_of_the_readme_runs_without_a_warning(tmp_path):
    snippets = re.findall(
        r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )
    assert snippets
    save_what_is_read(tmp_path)
    (tmp_path / "readme.py").write_text("\n".join(snippets), encoding="utf-8")
    result = subprocess.run(
        [sys.executable, "-W", "error", "readme.py"],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0 and not result.stderr, result.stderr
