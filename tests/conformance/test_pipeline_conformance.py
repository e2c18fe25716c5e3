"""transformers' common pipeline tests on tiny hfclip models.

The common tests open a folder for each model, make its pipeline, and batch it. The folders and the checks of a task's
results are made here: transformers keeps its own on the Hub and in its repository.
"""

import json
import os
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import numpy as np
import PIL.Image
import torch
from transformers import ZeroShotImageClassificationPipeline, pipeline
from transformers_mixins import load

import hfclip
from hfclip import (
    HFCLIPConfig,
    HFCLIPForImageClassification,
    HFCLIPImageProcessor,
    HFCLIPModel,
    HFCLIPProcessor,
    HFCLIPResNetModel,
    HFCLIPTokenizer,
    HFCLIPVisionModel,
)


FOLDER = tempfile.TemporaryDirectory()
LABELS = ["a cat", "a dog", "a house"]
MODELS = (HFCLIPModel, HFCLIPForImageClassification, HFCLIPVisionModel, HFCLIPResNetModel)

# The common tests read this when they are imported: where models stand, and which tokenizer and processor they have.
(Path(FOLDER.name) / "reports").mkdir()
(Path(FOLDER.name) / "reports" / "tiny_model_summary.json").write_text(
    json.dumps(
        {
            model.__name__: {
                "tokenizer_classes": ["HFCLIPTokenizer"] if model is HFCLIPModel else [],
                "processor_classes": ["HFCLIPImageProcessor"],
            }
            for model in MODELS
        }
    )
)
with mock.patch.dict(os.environ, {"TRANSFORMERS_TINY_MODEL_PATH": FOLDER.name}):
    common = load("test_pipeline_mixin")
common.transformers_module = hfclip  # where the classes of tokenizers and image processors are looked up by name
common.task_to_pipeline_and_spec_mapping.clear()  # compares the documentation of pipelines, which are transformers' own


def setUpModule():
    transformer = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    resnet = {"model_type": "hfclip_resnet", "depths": [1, 1, 1, 1], "stem_width": 4, "image_size": 32}
    tokenizer = HFCLIPTokenizer.train_new_from_iterator(LABELS, vocab_size=520, show_progress=False)
    special = {"vocab_size": 520, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = HFCLIPConfig(
        vision_config={**transformer, "image_size": 32, "patch_size": 16},
        text_config={**transformer, **special},
        projection_dim=24,
        num_labels=3,
    )
    processor = HFCLIPProcessor(HFCLIPImageProcessor(size=32), tokenizer)
    with_resnet = HFCLIPConfig(vision_config=resnet, text_config=config.text_config, projection_dim=24)
    for model_class in MODELS:
        own = {HFCLIPVisionModel: config.vision_config, HFCLIPResNetModel: with_resnet.vision_config}
        model = model_class(own.get(model_class, config))
        folder = Path(FOLDER.name) / model.config.model_type / model_class.__name__
        model.save_pretrained(folder)
        processor.save_pretrained(folder)


def tearDownModule():
    FOLDER.cleanup()


class Task:
    """What the common tests ask of a task: a pipeline with examples, and a check of what it gives."""

    def get_test_pipeline(self, model, tokenizer=None, image_processor=None, dtype="float32", **_):
        pixels = np.random.default_rng(0).integers(0, 256, (2, 40, 50, 3), dtype=np.uint8)
        with self.assertNoLogs("transformers", "ERROR"):  # said of models that a pipeline does not know
            made = pipeline(
                self.name,
                model=model,
                tokenizer=tokenizer,
                image_processor=image_processor,
                dtype=dtype,
                **self.options,
            )
        return made, [PIL.Image.fromarray(image) for image in pixels]


class LabelledPipeline(ZeroShotImageClassificationPipeline):
    """The common tests call a pipeline with images alone."""

    def __call__(self, image, candidate_labels=LABELS, **kwargs):
        return super().__call__(image, candidate_labels, **kwargs)


class ZeroShotTask(Task, unittest.TestCase):
    name, options = "zero-shot-image-classification", {"pipeline_class": LabelledPipeline}

    def run_pipeline_test(self, made, examples):
        for scores in (made(examples[0]), *made(examples, batch_size=2)):
            self.assertEqual(sorted(score["label"] for score in scores), LABELS)
            self.assertAlmostEqual(sum(score["score"] for score in scores), 1, places=2)


class ClassificationTask(Task, unittest.TestCase):
    name, options = "image-classification", {}

    def run_pipeline_test(self, made, examples):
        for scores in (made(examples[0]), *made(examples, batch_size=2)):
            self.assertEqual(sorted(score["label"] for score in scores), ["LABEL_0", "LABEL_1", "LABEL_2"])


class FeaturesTask(Task, unittest.TestCase):
    name, options = "image-feature-extraction", {"pool": True}

    def run_pipeline_test(self, made, examples):
        batched = made(examples, batch_size=2)
        self.assertEqual(len(batched), 2)
        torch.testing.assert_close(torch.tensor(batched[0]), torch.tensor(made(examples[0])), atol=1e-2, rtol=1e-2)


for task in (ZeroShotTask, ClassificationTask, FeaturesTask):
    common.pipeline_test_mapping[task.name]["test"] = f"{__name__}.{task.__name__}"


class PipelineTest(common.PipelineTesterMixin, unittest.TestCase):
    pipeline_model_mapping = {
        ZeroShotTask.name: HFCLIPModel,
        ClassificationTask.name: HFCLIPForImageClassification,
        FeaturesTask.name: (HFCLIPVisionModel, HFCLIPResNetModel),
    }

    def test_pipeline_image_feature_extraction(self):
        # The common test is skipped where timm is missing, which hfclip does not need.
        self.run_task_tests(task="image-feature-extraction")

    def test_pipeline_image_feature_extraction_fp16(self):
        self.run_task_tests(task="image-feature-extraction", dtype="float16")
