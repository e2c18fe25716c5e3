"""transformers' Auto classes and pipeline on a saved folder, each in a fresh process, with and without hfclip."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from hfclip import (
    HFCLIPConfig,
    HFCLIPForImageClassification,
    HFCLIPImageProcessor,
    HFCLIPModel,
    HFCLIPProcessor,
    HFCLIPTokenizer,
)


CAPTIONS = ["a photo of a cat", "a photo of a dog", "two small birds on a branch", "a red car, parked"]
VISIONS = {
    "vit": dict(
        model_type="hfclip_vit", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        image_size=32, patch_size=8,
    ),
    "resnet": dict(model_type="hfclip_resnet", depths=(1, 1, 1, 1), stem_width=8, image_size=32),
}  # fmt: skip


def save_folder(path, vision):
    """Saves a model with its processor, a photo, and the logits that they give here."""
    tokenizer = HFCLIPTokenizer.train_new_from_iterator(CAPTIONS, vocab_size=600)
    text = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    config = HFCLIPConfig(text_config=text, vision_config=VISIONS[vision], projection_dim=16)
    model = HFCLIPModel(config).eval()
    image_processor = HFCLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = HFCLIPProcessor(image_processor=image_processor, tokenizer=tokenizer)
    pixels = np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path / "photo.png")
    model.save_pretrained(path)
    processor.save_pretrained(path)
    inputs = processor(text=CAPTIONS, images=Image.open(path / "photo.png"), return_tensors="pt", padding=True)
    with torch.no_grad():
        logits = model(**inputs).logits_per_image[0].tolist()
    (path / "expected.json").write_text(json.dumps({"captions": CAPTIONS, "logits": logits}))
    return path


@pytest.fixture(scope="module", params=VISIONS)
def folder(request, tmp_path_factory):
    return save_folder(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory):
    return save_folder(tmp_path_factory.mktemp("vit"), "vit")


PRELUDE = """
import json, sys
folder = sys.argv[1]
expected = json.load(open(folder + "/expected.json"))
captions = expected["captions"]
def check(logits):
    assert max(abs(a - b) for a, b in zip(logits, expected["logits"])) < 1e-5, (logits, expected["logits"])
"""
WITHOUT_HFCLIP = 'import sys; sys.modules["hfclip"] = None\n'


def run(code: str, folder) -> str:
    """Runs code in a fresh process; returns what it wrote to stderr (warnings, logs)."""
    env = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_MODULES_CACHE": str(folder / "modules")}
    result = subprocess.run(
        [sys.executable, "-c", PRELUDE + code, str(folder)], capture_output=True, text=True, env=env, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stderr


AUTO = """
from PIL import Image
from transformers import (AutoConfig, AutoImageProcessor, AutoModel, AutoModelForZeroShotImageClassification,
                          AutoProcessor, AutoTokenizer)
load = lambda auto: auto.from_pretrained(folder, **kwargs)
processor = load(AutoProcessor)
photo = Image.open(folder + "/photo.png")
inputs = processor(text=captions, images=photo, return_tensors="pt", padding=True)
for auto in (AutoModel, AutoModelForZeroShotImageClassification):
    model = load(auto).eval()
    check(model(**inputs).logits_per_image[0].tolist())
names = [type(load(auto)).__name__ for auto in (AutoConfig, AutoModel, AutoProcessor, AutoTokenizer, AutoImageProcessor)]
assert names == ["HFCLIPConfig", "HFCLIPModel", "HFCLIPProcessor", "HFCLIPTokenizer", "HFCLIPImageProcessor"], names
assert type(processor.tokenizer).__name__ == "HFCLIPTokenizer"
assert type(processor.image_processor).__name__ == "HFCLIPImageProcessor"
"""

PIPELINE = """
import math
from transformers import pipeline
classify = pipeline("zero-shot-image-classification", model=folder, **kwargs)
found = classify(folder + "/photo.png", candidate_labels=captions, hypothesis_template="{}")
weights = [math.exp(logit) for logit in expected["logits"]]
for entry in found:
    probability = weights[captions.index(entry["label"])] / sum(weights)
    assert abs(entry["score"] - probability) < 1e-5, (found, weights)
"""


# What else a program may import, before hfclip and after it.
IMPORTS = [
    ("", "from transformers import CLIPModel"),
    ("", "from transformers import AutoModelForZeroShotImageClassification, AutoProcessor, pipeline"),
    ("", "import transformers.models.clip.modeling_clip, transformers.models.auto.modeling_auto"),
    ("import transformers", "import transformers.modeling_layers"),
    ("from transformers import CLIPModel", "import peft"),
    ("import transformers.models.clip.modeling_clip", "import accelerate, datasets"),
    ("from transformers import BertModel", "import torch.distributed.fsdp"),
    ("from transformers import AutoConfig, AutoModel", "from transformers import SiglipModel, Trainer"),
    ("from transformers import AutoProcessor", "from transformers import CLIPVisionModel"),
    ("from transformers import AutoImageProcessor", "from transformers import BatchFeature, PreTrainedModel"),
    ("from transformers import AutoTokenizer", "import hfclip.evaluation, hfclip.hub"),
    ("from transformers import pipeline", "import hfclip.data.scenes, hfclip.grad_cache"),
    ("import torch", "import transformers.pipelines"),
    ("import peft", "from transformers import CLIPTokenizer, ProcessorMixin"),
]
OTHER_PROGRAMS = {
    "a module first": "import hfclip.losses\nfrom transformers import CLIPModel",
    "another module first": "from hfclip.zero_shot import ZeroShotClassifier\nimport transformers.modeling_utils",
    "no name at all": "import transformers.modeling_layers\nimport hfclip",
    "imported again": "import hfclip, importlib\nimportlib.reload(hfclip)\nimport transformers.models.clip.modeling_clip",
    "threads": """
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
lines = ["import hfclip", "from hfclip import HFCLIPModel, losses", "from hfclip import HFCLIPProcessor"]
lines += ["import transformers"]
start = Barrier(len(lines))
def run(line):
    start.wait()
    exec(line)
with ThreadPoolExecutor(len(lines)) as threads:
    list(threads.map(run, lines))
""",
    "late": """
import sys
def load(module, name):
    __import__(module)
    return getattr(sys.modules[module], name)
load("hfclip", "HFCLIPModel")
load("transformers", "CLIPTextModelWithProjection")
""",
}
PROGRAMS = OTHER_PROGRAMS | {
    f"{before}-{after}": f"{before}\nfrom hfclip import HFCLIPModel\n{after}\n" for before, after in IMPORTS
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_auto_classes_and_pipeline_after_any_imports(vit_folder, program):
    assert run(program + "\nkwargs = {}\n" + AUTO + PIPELINE, vit_folder) == ""


@pytest.mark.peers
@pytest.mark.parametrize("program", ["import hfclip, sentence_transformers", "import sentence_transformers, hfclip"])
def test_auto_classes_and_pipeline_beside_sentence_transformers(vit_folder, program):
    pytest.importorskip("sentence_transformers")
    assert run(program + "\nkwargs = {}\n" + AUTO + PIPELINE, vit_folder) == ""


def test_auto_classes_by_remote_code_where_hfclip_is_missing(folder):
    run(WITHOUT_HFCLIP + "kwargs = {'trust_remote_code': True}\n" + AUTO, folder)


def test_pipeline_by_remote_code_where_hfclip_is_missing(folder):
    run(WITHOUT_HFCLIP + "kwargs = {'trust_remote_code': True}\n" + PIPELINE, folder)


def test_a_model_loaded_by_remote_code_saves_a_folder_that_loads_again(folder, tmp_path):
    code = """
from transformers import AutoModel, AutoProcessor
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model.save_pretrained(sys.argv[1] + "/again")
processor.save_pretrained(sys.argv[1] + "/again")
"""
    run(WITHOUT_HFCLIP + code, folder)
    again = 'folder += "/again"\n' + AUTO.replace('"/photo.png"', '"/../photo.png"')
    run(WITHOUT_HFCLIP + "kwargs = {'trust_remote_code': True}\n" + again, folder)


def test_image_classification_by_auto_class(tmp_path):
    config = HFCLIPConfig(
        text_config=dict(vocab_size=100, eos_token_id=99), vision_config=VISIONS["vit"], num_labels=3
    )
    HFCLIPForImageClassification(config).save_pretrained(tmp_path)
    code = """
import torch
from transformers import AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained(folder, **kwargs)
assert type(model).__name__ == "HFCLIPForImageClassification"
assert model(torch.zeros(1, 3, 32, 32)).logits.shape == (1, 3)
"""
    (tmp_path / "expected.json").write_text(json.dumps({"captions": [], "logits": []}))
    run("import hfclip\nkwargs = {}\n" + code, tmp_path)
    run(WITHOUT_HFCLIP + "kwargs = {'trust_remote_code': True}\n" + code, tmp_path)
