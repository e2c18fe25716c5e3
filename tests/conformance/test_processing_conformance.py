"""transformers' common tests of image processors and processors on those of hfclip."""

import unittest

from transformers_mixins import load

from hfclip import HFCLIPImageProcessor, HFCLIPProcessor, HFCLIPTokenizer


image_common = load("test_image_processing_common")
processor_common = load("test_processing_common")

# The common tests tell by a negative rescale factor whether an option arrives, which hfclip refuses. White as the mean
# does the same: pixel values below zero.
processor_common.MODALITY_TEST_SPECS["images"]["init_time_kwargs"] = {"do_normalize": True, "image_mean": [1.0] * 3}

TEXTS = ["lower newer", " upper older longer string", "a photo of a cat", "two dogs on the grass"]


class ImageProcessingTester(image_common.ImageProcessingTester):
    """Small sizes; the common tests make random images."""

    def __init__(self, parent):
        super().__init__(parent, size={"shortest_edge": 20}, crop_size={"height": 18, "width": 18}, do_normalize=True)

    def _get_image_processing_classes(self):
        # The common tester asks for the classes of a folder of transformers. Ours resizes with PIL.
        return {"pil": HFCLIPImageProcessor}


class ImageProcessingTest(image_common.ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = ImageProcessingTester

    @unittest.skip("openai/CLIP knows no images of four arbitrary channels; skipped for transformers' CLIP too")
    def test_call_numpy_4_channels(self):
        pass

    @unittest.skip("its (4, height, width) by itself may be four grey images; in a list it is read as RGBA")
    def test_convert_to_rgb_mixed_input_batch_2(self):
        pass

    @unittest.skip("looks the model up in transformers' list of models older than its torchvision backend")
    def test_new_models_require_torchvision_backend(self):
        pass


class ProcessorTest(processor_common.ProcessorTesterMixin, unittest.TestCase):
    processor_class = HFCLIPProcessor

    @classmethod
    def _setup_tokenizer(cls):
        return HFCLIPTokenizer.train_new_from_iterator(TEXTS, vocab_size=540, show_progress=False)

    @classmethod
    def _setup_image_processor(cls):
        return HFCLIPImageProcessor(size=18)
