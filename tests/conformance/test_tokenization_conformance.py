"""transformers' common tokenizer tests on a small tokenizer of hfclip."""

import functools
import tempfile
import unittest
from unittest import mock

from transformers_mixins import load

from hfclip import HFCLIPTokenizer


common = load("test_tokenization_common")

TEXTS = [
    "a photo of a cat on the grass",
    "two dogs run along the beach in the evening",
    "the quick brown fox jumps over the lazy dog, 1234567890 times!",
    "This is a test of lower newer upper older longer strings and of special tokens",
]
PAIRS = "CLIP reads one text: what follows the first end token would be ignored, so hfclip refuses pairs of texts"


class TokenizerTest(common.TokenizerTesterMixin, unittest.TestCase):
    tokenizer_class = HFCLIPTokenizer
    test_seq2seq = False

    @classmethod
    def setUpClass(cls):
        # In place of a tokenizer from the Hub, and of a text file that the distribution lacks.
        cls.tokenizers_list, cls._data = [], "\n".join(TEXTS)
        cls.tmpdirname = tempfile.mkdtemp()
        tokenizer = HFCLIPTokenizer.train_new_from_iterator(TEXTS, vocab_size=800, show_progress=False)
        tokenizer.model_max_length = 80  # the common tests pad to multiples of 8, which would have to divide it
        tokenizer.save_pretrained(cls.tmpdirname)

    def test_maximum_encoding_length_single_input(self):
        # The common test expects long texts by default, where hfclip cuts them to what the model can read.
        call = functools.partialmethod(HFCLIPTokenizer.__call__, truncation=False)
        with mock.patch.object(HFCLIPTokenizer, "__call__", call):
            super().test_maximum_encoding_length_single_input()

    @unittest.skip(PAIRS)
    def test_call(self):
        pass

    @unittest.skip(PAIRS)
    def test_mask_output(self):
        pass

    @unittest.skip(PAIRS)
    def test_maximum_encoding_length_pair_input(self):
        pass

    @unittest.skip(PAIRS)
    def test_number_of_added_tokens(self):
        pass

    @unittest.skip(PAIRS)
    def test_sequence_ids(self):
        pass

    @unittest.skip(PAIRS)
    def test_special_tokens_mask_input_pairs(self):
        pass
