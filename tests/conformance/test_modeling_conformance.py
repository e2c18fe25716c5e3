"""transformers' common modelling tests on tiny hfclip models.

A test is skipped where transformers skips it for its own `CLIPModel`, or where the architecture has no such thing; the
reason stands beside each.
"""

import copy
import unittest
from unittest import mock

import torch
from torch import nn
from transformers_mixins import load

from hfclip import (
    HFCLIPConfig,
    HFCLIPForImageClassification,
    HFCLIPModel,
    HFCLIPResNetConfig,
    HFCLIPResNetModel,
    HFCLIPTextConfig,
    HFCLIPTextModel,
    HFCLIPTextModelWithProjection,
    HFCLIPVisionConfig,
    HFCLIPVisionModel,
    HFCLIPVisionModelWithProjection,
)


common = load("test_modeling_common")
config_common = load("test_configuration_common")

# A batch of at least 7: some tests fill a smaller one up with ids that are no texts.
BATCH_SIZE, PROJECTION_DIM = 7, 24
TRANSFORMER = {"hidden_size": 16, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 2}
NO_LOSS = "a tower alone has no loss; HFCLIPModel and HFCLIPForImageClassification train it in their tests"
IN_TOWERS = "covered by the tests of the towers, as in transformers' tests of CLIP"


# ---------------------------------------------------------------------------------------------------------------------
# Models and inputs
# ---------------------------------------------------------------------------------------------------------------------


class VisionTester:
    """Tiny ViT and its images."""

    batch_size, is_training, image_size, seq_length = BATCH_SIZE, True, 16, 17
    hidden_size, num_hidden_layers, num_attention_heads = 16, 2, 2

    def get_config(self):
        return HFCLIPVisionConfig(
            **TRANSFORMER, image_size=16, patch_size=4, projection_dim=PROJECTION_DIM, attention_dropout=0.1
        )

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), {"pixel_values": common.floats_tensor([BATCH_SIZE, 3, 16, 16])}


class ResNetTester:
    """Tiny ResNet and its images. The common tests count the stem and four stages as layers."""

    batch_size, is_training, image_size, expected_num_hidden_layers = BATCH_SIZE, True, 64, 5

    def get_config(self):
        return HFCLIPResNetConfig(depths=[1, 1, 1, 1], stem_width=4, image_size=64, projection_dim=PROJECTION_DIM)

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), {"pixel_values": common.floats_tensor([BATCH_SIZE, 3, 64, 64])}


class TextTester:
    """Tiny text tower and its texts: start token, words, end token, anything.

    The vocabulary is so large that it has the default ids of special tokens too, which one test asks for; those used
    here stand at its beginning, since other tests make it smaller.
    """

    batch_size, is_training, seq_length = BATCH_SIZE, True, 7
    hidden_size, num_hidden_layers, num_attention_heads = 16, 2, 2

    def get_config(self):
        return HFCLIPTextConfig(
            **TRANSFORMER,
            max_position_embeddings=16,
            projection_dim=PROJECTION_DIM,
            attention_dropout=0.1,
            bos_token_id=1,
            eos_token_id=2,
        )

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        input_ids = 3 + common.ids_tensor([BATCH_SIZE, self.seq_length], config.vocab_size - 3)
        end = torch.arange(BATCH_SIZE)[:, None] % (self.seq_length - 2) + 2
        order = torch.arange(self.seq_length)
        input_ids[:, 0] = config.bos_token_id
        input_ids = torch.where(order == end, config.eos_token_id, input_ids)
        return config, {"input_ids": input_ids, "attention_mask": (order <= end).long()}


class DualTester:
    """Dual encoder of two towers, with pairs of images and texts."""

    batch_size, is_training = BATCH_SIZE, True

    def __init__(self, vision_model_tester):
        self.vision_model_tester, self.text_model_tester = vision_model_tester, TextTester()

    def get_config(self):
        return HFCLIPConfig(
            vision_config=self.vision_model_tester.get_config(),
            text_config=self.text_model_tester.get_config(),
            projection_dim=PROJECTION_DIM,
            logit_scale_init_value=0.0,  # logits are cosines: tolerances for half precision are made for such numbers
        )

    def prepare_config_and_inputs_for_common(self):
        inputs = {"return_loss": True}
        for tester in (self.text_model_tester, self.vision_model_tester):
            inputs |= tester.prepare_config_and_inputs_for_common()[1]
        return self.get_config(), inputs


class ClassificationTester(DualTester):
    """Image classifier, which has the config of a dual encoder and takes images alone."""

    def __init__(self, vision_model_tester):
        super().__init__(vision_model_tester)
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "seq_length"):
            if hasattr(vision_model_tester, name):
                setattr(self, name, getattr(vision_model_tester, name))

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), self.vision_model_tester.prepare_config_and_inputs_for_common()[1]


# ---------------------------------------------------------------------------------------------------------------------
# Tests
# ---------------------------------------------------------------------------------------------------------------------


def set_large_epsilon(config):
    """Replaces a utility that makes comparisons of attention kernels stable by writing seven spellings of epsilon into
    every config: hfclip's configs refuse the misspelt ones."""
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        if hasattr(part, "layer_norm_eps"):
            part.layer_norm_eps = 1.0


common.set_config_for_less_flaky_test = set_large_epsilon


class ConformanceTest(common.ModelTesterMixin):
    # Asks for the test of initialisation, which is optional for models as old as CLIP.
    test_can_init_all_missing_weights_before_2023 = True
    config_options = {}
    config_properties = None

    def test_config(self):
        config_class = type(self.model_tester.get_config())
        has_text = config_class is HFCLIPTextConfig
        config_common.ConfigTester(
            self, config_class, has_text, self.config_properties, **self.config_options
        ).run_common_tests()

    def _outputs(self, config, inputs):
        with torch.no_grad():
            return self.all_model_classes[0](copy.deepcopy(config)).eval()(**inputs)

    def test_model_forward_default_config_values(self):
        # The test runs the models of transformers' own table, which cannot name those of another package.
        names = {model_class.__name__: model_class.__name__ for model_class in self.all_model_classes}
        with mock.patch.dict(common.MODEL_MAPPING_NAMES, names):
            super().test_model_forward_default_config_values()


class ImageInputTest:
    """Images are embedded by a convolution, where the common test expects a table of token embeddings."""

    test_resize_embeddings = False

    def test_model_get_set_embeddings(self):
        config, _ = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            model = model_class(copy.deepcopy(config))
            self.assertIsInstance(model.get_input_embeddings(), nn.Conv2d)
            replacement = nn.Conv2d(3, 16, 4, 4)
            model.set_input_embeddings(replacement)
            self.assertIs(model.get_input_embeddings(), replacement)
            self.assertIsNone(model.get_output_embeddings())


class TowerTest:
    """A tower without a head: the common tests that train need a loss."""

    @unittest.skip(NO_LOSS)
    def test_training(self):
        pass

    @unittest.skip(NO_LOSS)
    def test_training_gradient_checkpointing(self):
        pass

    @unittest.skip(NO_LOSS)
    def test_training_gradient_checkpointing_use_reentrant_false(self):
        pass

    @unittest.skip(NO_LOSS)
    def test_training_gradient_checkpointing_use_reentrant_true(self):
        pass


class VisionTest(TowerTest, ImageInputTest, ConformanceTest, unittest.TestCase):
    all_model_classes = (HFCLIPVisionModel, HFCLIPVisionModelWithProjection)
    config_options = {"hidden_size": 36}

    def setUp(self):
        self.model_tester = VisionTester()


class TextTest(TowerTest, ConformanceTest, unittest.TestCase):
    all_model_classes = (HFCLIPTextModel, HFCLIPTextModelWithProjection)
    config_options = {"hidden_size": 40}

    def setUp(self):
        self.model_tester = TextTester()


class FeatureMapTest:
    """A ResNet's layers are maps (batch, channels, height, width) of five sizes, and it has no attention weights."""

    has_attentions = False
    skip_test_image_features_output_shape = True  # the common test expects (batch, length, hidden)

    def test_hidden_states_output(self):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        expected = [
            (BATCH_SIZE, channels, side, side) for channels, side in zip((4, 16, 32, 64, 128), (16, 16, 8, 4, 2))
        ]
        by_call = self._outputs(config, inputs | {"output_hidden_states": True})
        config.output_hidden_states = True
        self._set_subconfig_attributes(config, "output_hidden_states", True)
        for outputs in (by_call, self._outputs(config, inputs)):
            outputs = getattr(outputs, "vision_model_output", outputs)
            self.assertEqual([tuple(states.shape) for states in outputs.hidden_states], expected)


class ResNetTest(TowerTest, FeatureMapTest, ImageInputTest, ConformanceTest, unittest.TestCase):
    all_model_classes = (HFCLIPResNetModel,)
    config_options = {"stem_width": 32}

    def setUp(self):
        self.model_tester = ResNetTester()


class DualTest(ConformanceTest, unittest.TestCase):
    all_model_classes = (HFCLIPModel,)
    config_properties = ["projection_dim", "logit_scale_init_value"]
    additional_model_inputs = ["pixel_values"]
    test_resize_embeddings = False  # as in transformers' tests of CLIP
    _is_composite = True

    def setUp(self):
        self.model_tester = DualTester(VisionTester())

    @unittest.skip(IN_TOWERS)
    def test_attention_outputs(self):
        pass

    def test_hidden_states_output(self):
        # The common test looks for the hidden states of one model, and this one has two.
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        by_call = self._outputs(config, inputs | {"output_hidden_states": True})
        self._set_subconfig_attributes(config, "output_hidden_states", True)
        for outputs in (by_call, self._outputs(config, inputs)):
            for length, tower in ((7, outputs.text_model_output), (17, outputs.vision_model_output)):
                self.assertEqual(
                    [tuple(states.shape) for states in tower.hidden_states], [(BATCH_SIZE, length, 16)] * 3
                )

    @unittest.skip(IN_TOWERS)
    def test_retain_grad_hidden_states_attentions(self):
        pass


class DualResNetTest(FeatureMapTest, DualTest):
    def setUp(self):
        self.model_tester = DualTester(ResNetTester())


class ClassificationTest(ImageInputTest, ConformanceTest, unittest.TestCase):
    all_model_classes = (HFCLIPForImageClassification,)
    test_all_params_have_gradient = False  # the classifier reads the patches, so the tower's pooled output is unused
    _is_composite = True

    def setUp(self):
        self.model_tester = ClassificationTester(VisionTester())


class ResNetClassificationTest(FeatureMapTest, ClassificationTest):
    def setUp(self):
        self.model_tester = ClassificationTester(ResNetTester())
