"""The tokenizer against OpenAI's golden ids, a byte-pair encoder in plain Python and transformers' CLIP tokenizer."""

import copy
import gzip
import html
import json
import logging
import os
import pickle
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import ftfy
import numpy as np
import pytest
import regex
import torch
from datasets.fingerprint import Hasher
from tokenizers import AddedToken
from transformers import AutoTokenizer, BatchEncoding, CLIPTokenizer, DataCollatorWithPadding, TokenizersBackend
from transformers.processing_utils import TextKwargs

from hfclip.bpe_hfclip import BASE_VOCAB, BYTE_SYMBOLS
from hfclip.tokenization_hfclip import HFCLIPTokenizer


SENTENCES = [
    "A photo of a cat, sitting on the mat.",
    "two dogs don't play in the snow!",
    "It's the café's naïve façade; 1,024 visitors in 2021",
    "a close-up photograph of the red car & the blue truck",
    "日本語 の テキスト, привет мир, Ελλάδα",
    "they're what we've seen: I'll say he'd, I'm... ok?!",
]
HARD_PIECES = [
    *(
        "&amp;",
        "&amp;lt;",
        "&amp;amp;amp;",
        "&lt;",
        "&#39;",
        "&nbsp;",
        "&#x345;",
        "&#0;",
        "&#x1c;",
        "e&amp;#769;",
        "&",
    ),
    *("'s", "'S", "’s", "'ſ", "'LL", "''s", "!'d", "n't", "“", "”", "…", "–", "™"),
    *("<|startoftext|>", "<|endoftext|>", "<|EndOfText|>", "!!<|endoftext|>", "<|ſtartoftext|>", "</w>", "a</w>"),
    *("İ", "ı", "ß", "ẞ", "ς", "ΣΑΣ", "ﬁ", "ﬅ", "ǅ", "\u212a", "\u0345", "α\u0345", "e\u0301", "\u0301"),
    *("\u200b", "\u200d", "\ufeff", "\u3000", "\x1c", "\x1f", "\x85", "\xa0", "\u2028", "\x0b", "\r\n", "\t", "\x00"),
    *(
        "\x1b[31m",
        "\ud83d\ude00",
        "\ud800",
        "👨‍👩‍👧",
        "❤️",
        "🏳️‍🌈",
        "1️⃣",
        "²",
        "Ⅷ",
        "½",
        "①",
        "٣",
        "五",
        "ＦＵＬＬ",
        "ﾊﾝｶｸ",
    ),
    *(
        "Ã©",
        "â€™",
        "Ã¢â‚¬â„¢",
        "ðŸ˜Š",
        "Ð¿Ñ€Ð¸Ð²ÐµÑ‚",
        "Â£",
        "\x93x\x94",
        "हिन्दी",
        "ไทย",
        "العربية",
        "한국어",
        "𝓗",
        "𐐀",
        "ⓐ",
    ),
    *("cat", "Photo", "DON'T", "1,000", "a_b", "C++", "~!~!", "!", "!!", "?!", ":-)", "#tag", "x" * 70),
]


def hard_texts(number: int, seed: int = 0) -> list[str]:
    """Random strings of what cleaning and splitting can get wrong."""
    rng = random.Random(seed)
    assigned = [c for c in map(chr, range(0x20, 0x30000)) if c.isprintable()]

    def piece() -> str:
        kind = rng.random()
        if kind < 0.6:
            return rng.choice(HARD_PIECES)
        if kind < 0.8:
            return "".join(rng.choices(assigned, k=rng.randint(1, 4)))
        return "".join(map(chr, rng.choices(range(256), k=rng.randint(1, 6))))

    separators = [*[" "] * 4, "", "", "\n", "  ", "-"]
    return ["".join(piece() + rng.choice(separators) for _ in range(rng.randint(1, 8))) for _ in range(number)]


class PlainEncoder:
    """OpenAI's algorithm in plain Python, from the paper's description: what ids have to be."""

    def __init__(self, tokenizer: HFCLIPTokenizer):
        model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
        self.vocab = model["vocab"]
        self.ranks = {tuple(pair): rank for rank, pair in enumerate(model["merges"])}
        special = (tokenizer.bos_token, tokenizer.eos_token)
        self.words = {token: [self.vocab[token]] for token in special}
        pattern = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
        self.pattern = regex.compile("|".join([*map(regex.escape, special), pattern]), regex.IGNORECASE)

    def __call__(self, text: str) -> list[int]:
        text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
        text = regex.sub(r"\s+", " ", text).strip().lower()
        return [token_id for word in self.pattern.findall(text) for token_id in self.encode_word(word)]

    def encode_word(self, word: str) -> list[int]:
        if word not in self.words:
            symbols = [BYTE_SYMBOLS[byte] for byte in word.encode("utf-8")]
            symbols[-1] += "</w>"
            while len(symbols) > 1:
                first = min(zip(symbols, symbols[1:], strict=False), key=lambda pair: self.ranks.get(pair, 1e9))
                if first not in self.ranks:
                    break
                i = 0
                while i < len(symbols) - 1:
                    if (symbols[i], symbols[i + 1]) == first:
                        symbols[i : i + 2] = ["".join(first)]
                    i += 1
            self.words[word] = [self.vocab[symbol] for symbol in symbols]
        return self.words[word]


@pytest.fixture(scope="module")
def tokenizer() -> HFCLIPTokenizer:
    return HFCLIPTokenizer.train_new_from_iterator(SENTENCES * 3, vocab_size=640, show_progress=False)


@pytest.fixture(scope="module")
def reference(tokenizer) -> PlainEncoder:
    return PlainEncoder(tokenizer)


@pytest.fixture(scope="module")
def clip_tokenizer(tokenizer) -> CLIPTokenizer:
    """transformers' tokenizer with the same vocabulary."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    return CLIPTokenizer(model["vocab"], [tuple(pair) for pair in model["merges"]], model_max_length=77)


@pytest.fixture(scope="session")
def openai(data_dir) -> HFCLIPTokenizer:
    return HFCLIPTokenizer.from_openai_bpe(data_dir / "bpe_simple_vocab_16e6.txt.gz")


def ids_of(tokenizer, texts, **kwargs):
    return tokenizer(texts, add_special_tokens=False, truncation=False, verbose=False, **kwargs)["input_ids"]


# ---------------------------------------------------------------------------------------------------------- same ids


@pytest.mark.parametrize("kwargs", [{}, {"return_offsets_mapping": True}], ids=["by table", "by Rust encodings"])
def test_ids_equal_openai(openai, data_dir, kwargs):
    lines = (data_dir / "golden" / "openai_tokens.jsonl").read_text(encoding="utf-8").splitlines()
    golden = [json.loads(line) for line in lines]
    found = ids_of(openai, [example["text"] for example in golden], **kwargs)
    wrong = [example["text"] for example, ids in zip(golden, found, strict=True) if ids != example["ids"]]
    assert len(golden) == 2000 and not wrong


def test_openai_merges_give_openai_layout(openai):
    assert (len(openai), openai.bos_token_id, openai.eos_token_id) == (49408, 49406, 49407)
    assert openai("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert (openai.pad_token_id, openai("!").input_ids) == (0, [49406, 256, 49407])


@pytest.mark.parametrize("kwargs", [{}, {"return_offsets_mapping": True}], ids=["by table", "by Rust encodings"])
def test_ids_equal_plain_python_reference_on_hard_texts(tokenizer, reference, kwargs):
    texts = hard_texts(3000) + SENTENCES
    wrong = [text for text, ids in zip(texts, ids_of(tokenizer, texts, **kwargs)) if ids != reference(text)]
    assert not wrong


def test_hard_texts_tell_tokenizers_apart(clip_tokenizer, reference):
    """Guard of the test above: a tokenizer without OpenAI's cleaning fails on many of these texts."""
    texts = [text for text in hard_texts(500) if not any("\ud800" <= c <= "\udfff" for c in text)]
    wrong = [text for text, ids in zip(texts, ids_of(clip_tokenizer, texts)) if ids != reference(text)]
    assert len(wrong) > len(texts) / 4


def test_many_words_do_not_change_ids(tokenizer, reference, monkeypatch):
    """The table of words is emptied when it is full."""
    fresh = copy.deepcopy(tokenizer)
    fresh("a")
    monkeypatch.setattr(type(fresh.cache), "MAX_ENTRIES", 16)
    texts = hard_texts(200, seed=1)
    assert ids_of(fresh, texts) == [reference(text) for text in texts]
    assert 0 < len(fresh.cache) <= 16


def test_special_tokens_in_a_text_are_found_as_openai_finds_them(tokenizer):
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert ids_of(tokenizer, "<|startoftext|><|EndOfText|>") == [bos, eos]
    # A run of punctuation before it takes its first characters away
    assert bos not in ids_of(tokenizer, "!<|startoftext|>")
    assert eos not in ids_of(tokenizer, "<|endoftext|>", split_special_tokens=True)


def test_clean_none_is_what_tokenizer_json_does(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    plain = TokenizersBackend.from_pretrained(tmp_path)
    unclean = HFCLIPTokenizer.from_pretrained(tmp_path, clean="none")
    texts = [*SENTENCES, "“a” &amp;quot; ’s &lt;b&gt;", "wow!!  a  !", "Ã© ΟΔΟΣ &hellip;"]
    assert unclean(texts)["input_ids"] == plain(texts)["input_ids"]
    assert plain(texts[:-1])["input_ids"] == tokenizer(texts[:-1])["input_ids"]  # what needs no Python
    assert plain(texts[-1])["input_ids"] != tokenizer(texts[-1])["input_ids"]


def test_threads_share_a_tokenizer(tokenizer, reference):
    fresh, texts = copy.deepcopy(tokenizer), hard_texts(400, seed=2)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: ids_of(fresh, texts), range(4)))
    assert all(ids == [reference(text) for text in texts] for ids in results)


# ------------------------------------------------------------------------------------- what calls return, cut, pad


def test_single_text_and_batch(tokenizer):
    one = tokenizer("a photo")
    assert one["attention_mask"] == [1] * len(one["input_ids"])
    assert one["input_ids"][0] == tokenizer.bos_token_id and one["input_ids"][-1] == tokenizer.eos_token_id
    assert tokenizer(["a photo"]) == {name: [row] for name, row in one.items()}
    assert tokenizer(("a photo",)) == tokenizer(["a photo"]) and tokenizer.encode("a photo") == one["input_ids"]
    assert (
        tokenizer("")["input_ids"] == tokenizer(" \n")["input_ids"] == [tokenizer.bos_token_id, tokenizer.eos_token_id]
    )
    assert tokenizer([])["input_ids"] == []
    assert "attention_mask" not in tokenizer("a", return_attention_mask=False)


FEATURES = [
    {"return_special_tokens_mask": True, "return_length": True},
    {"return_offsets_mapping": True, "return_token_type_ids": True},
    {"return_overflowing_tokens": True, "max_length": 8, "stride": 2},
    {"max_length": 5},
    {"truncation": False},
    {"add_special_tokens": False},
    {"padding": "max_length", "max_length": 5, "truncation": False},
    {"padding": True, "padding_side": "left"},
    {"padding": True, "pad_to_multiple_of": 16, "truncation": False, "return_special_tokens_mask": True},
]


@pytest.mark.parametrize("kwargs", FEATURES, ids=lambda kwargs: " ".join(kwargs))
def test_features_equal_transformers(tokenizer, clip_tokenizer, kwargs):
    """On plain text transformers' tokenizer has the same ids; only what it pads with differs."""
    texts = ["a photo of a cat that plays in the snow", "two dogs", "", "the car. " * 40]
    kwargs = {"truncation": True, "padding": False, **kwargs}
    expected = clip_tokenizer(texts, **kwargs)
    if kwargs["padding"]:
        expected["input_ids"] = [
            [token_id if kept else 0 for token_id, kept in zip(ids, mask, strict=True)]
            for ids, mask in zip(expected["input_ids"], expected["attention_mask"], strict=True)
        ]
    assert dict(tokenizer(texts, **kwargs)) == dict(expected)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("padding", [True, "max_length"])
def test_tensors_hold_the_lists(tokenizer, side, padding):
    texts = [*SENTENCES, "a", ""]
    kwargs = {"padding": padding, "padding_side": side}
    lists = tokenizer(texts, **kwargs)
    for kind, to_list in (("pt", torch.Tensor.tolist), ("np", np.ndarray.tolist)):
        tensors = tokenizer(texts, return_tensors=kind, **kwargs)
        assert {name: to_list(tensor) for name, tensor in tensors.items()} == dict(lists)
    assert tensors["input_ids"].dtype == np.int64
    assert tokenizer("a cat", return_tensors="pt")["input_ids"].tolist() == [tokenizer("a cat")["input_ids"]]
    with pytest.raises(ValueError, match="padding"):
        tokenizer(texts, return_tensors="pt")


def test_cuts_by_default_and_says_so_once(tokenizer, caplog):
    texts = ["the red car " * 40, "a cat", "the snow " * 90]
    with caplog.at_level(logging.WARNING):
        rows = tokenizer(texts)["input_ids"]
    assert [len(rows[0]), len(rows[2])] == [77, 77]
    assert all(row[-1] == tokenizer.eos_token_id for row in rows)
    assert rows[0][:-1] == tokenizer(texts[0], truncation=False)["input_ids"][:76]
    tokenizer(texts)  # the same again
    assert sum("2 of 3 texts" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize("kwargs", [{"truncation": True}, {"verbose": False}])
def test_cuts_silently_when_told(tokenizer, caplog, kwargs):
    with caplog.at_level(logging.WARNING):
        assert len(tokenizer("the red car " * 40, **kwargs)["input_ids"]) == 77
    assert not caplog.records


def test_cuts_from_the_left(tokenizer):
    left = copy.deepcopy(tokenizer)
    left.truncation_side = "left"
    whole = tokenizer("the red car " * 40, truncation=False)["input_ids"]
    assert left("the red car " * 40)["input_ids"] == [whole[0], *whole[-76:]]


def test_rows_padded_to_a_multiple_stay_within_the_context(tokenizer):
    batch = tokenizer(["the red car " * 40, "a"], padding=True, pad_to_multiple_of=8, return_tensors="pt")
    assert batch["input_ids"].shape == (2, 77)
    assert tokenizer(["a"], padding=True, pad_to_multiple_of=8, return_tensors="pt")["input_ids"].shape == (1, 8)


def test_pads_with_zero_and_keeps_exclamation_marks(tokenizer):
    batch = tokenizer(["wow! !", "a"], padding=True)
    assert tokenizer.pad_token_id == 0 and tokenizer.pad_token == "!"
    assert batch["input_ids"][1][3:] == [0] * (len(batch["input_ids"][0]) - 3)
    assert 0 not in batch["input_ids"][0]
    assert batch["input_ids"][0].count(tokenizer.convert_tokens_to_ids("!</w>")) == 2
    rows = [{"input_ids": ids} for ids in tokenizer(["wow! !", "a"])["input_ids"]]
    for padded in (tokenizer.pad(rows, return_tensors="pt"), DataCollatorWithPadding(tokenizer)(rows)):
        assert padded["input_ids"].tolist() == batch["input_ids"]
        assert padded["attention_mask"].tolist() == batch["attention_mask"]


# -------------------------------------------------------------------------------------------- words, offsets, decoding


def test_offsets_refer_to_the_cleaned_text(tokenizer):
    text = "  A caf&eacute;’s <b>  CAT "
    cleaned = tokenizer.clean_text(text)
    assert cleaned == "a café's <b> cat"
    batch = tokenizer(text, return_offsets_mapping=True)
    words = {cleaned[start:end] for start, end in (batch.word_to_chars(i) for i in range(6))}
    assert words == {"a", "café", "'s", "<", "b", ">"}
    assert all(0 <= start <= end <= len(cleaned) for start, end in batch["offset_mapping"])
    assert batch["offset_mapping"][0] == batch["offset_mapping"][-1] == (0, 0)
    assert tokenizer.clean_text("  A  Photo ") == "a photo"
    unmoved = "A Photo of a Cat"
    spans = tokenizer(unmoved, return_offsets_mapping=True)["offset_mapping"][1:-1]
    assert "".join(unmoved[start:end] for start, end in spans) == unmoved.replace(" ", "")


def test_batch_has_words_and_tokens_of_a_fast_tokenizer(tokenizer):
    assert tokenizer.is_fast
    batch = tokenizer(["a dog's photo", "a"], padding=True, return_tensors="pt")
    assert isinstance(batch, BatchEncoding) and batch.is_fast
    assert [batch[i].ids for i in range(2)] == batch["input_ids"].tolist()
    assert sorted(set(batch.word_ids(0)[1:-1])) == [0, 1, 2, 3]
    assert batch.tokens(1)[:3] == ["<|startoftext|>", "a</w>", "<|endoftext|>"]
    assert batch.char_to_token(0, 0) == 1 and batch.n_sequences == 1
    assert tokenizer.tokenize("a photo")[0] == "a</w>"
    again = pickle.loads(pickle.dumps(batch))
    assert type(again) is BatchEncoding and torch.equal(again["input_ids"], batch["input_ids"])


def test_decodes_with_spaces_between_words(tokenizer):
    ids = tokenizer(["a photo of a cat", "日本語!"], padding=True)["input_ids"]
    assert tokenizer.decode(ids[0]) == "<|startoftext|>a photo of a cat <|endoftext|>"
    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == ["a photo of a cat", "日本語 !"]
    assert tokenizer.decode(torch.tensor(ids[0]), skip_special_tokens=True) == "a photo of a cat"
    assert tokenizer.decode([]) == ""


def test_decoding_drops_padding_but_no_text(tokenizer):
    bos, eos, a = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("a</w>")
    for ids in ([bos, 0, a, eos, 0, 0], [0, 0, bos, 0, a, eos], [0, a]):
        assert tokenizer.decode(ids, skip_special_tokens=True) == "!a"
        assert tokenizer.convert_ids_to_tokens(ids, skip_special_tokens=True) == ["!", "a</w>"]
    assert tokenizer.decode([a, bos, a, eos, a, 0], skip_special_tokens=True) == "a a a !"


# ------------------------------------------------------------------------------------------- saving, loading, copying


def saved_files(tokenizer, folder):
    tokenizer.save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_saved_folder_loads_the_same(tokenizer, tmp_path):
    files = saved_files(tokenizer, tmp_path / "first")
    again = HFCLIPTokenizer.from_pretrained(tmp_path / "first")
    again(SENTENCES, padding=True)  # use leaves no trace
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(files)
    assert saved_files(again, tmp_path / "second") == files
    texts = hard_texts(200, seed=3)
    assert again(texts, padding=True) == tokenizer(texts, padding=True)
    assert type(AutoTokenizer.from_pretrained(tmp_path / "first")) is HFCLIPTokenizer


def test_copies_encode_the_same_and_use_leaves_no_trace(tokenizer):
    fresh = HFCLIPTokenizer()
    before = Hasher.hash(fresh)  # `datasets.map` finds its cached results by this
    fresh(SENTENCES, padding=True)
    assert Hasher.hash(fresh) == before != Hasher.hash(tokenizer)
    for again in (pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer)):
        assert not again.cache
        assert again(SENTENCES) == tokenizer(SENTENCES)


def test_opens_folders_of_transformers_clip_tokenizer(tokenizer, clip_tokenizer, tmp_path):
    other = copy.deepcopy(clip_tokenizer)
    other.model_max_length = int(1e30)
    other("a", padding="max_length", truncation=True, max_length=5)  # which its tokenizer.json keeps
    other.save_pretrained(tmp_path / "clip")
    opened = HFCLIPTokenizer.from_pretrained(tmp_path / "clip")
    texts = [*hard_texts(200, seed=4), "a " * 100]
    assert opened(texts, padding=True) == tokenizer(texts, padding=True)
    assert opened.pad_token_id == 0 and opened.model_max_length == 77
    assert saved_files(opened, tmp_path / "ours") == saved_files(tokenizer, tmp_path / "expected")


def test_opens_vocab_and_merges_files(tokenizer, tmp_path):
    tokenizer.backend_tokenizer.model.save(str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"vocab.json", "merges.txt"}
    assert HFCLIPTokenizer.from_pretrained(tmp_path)(SENTENCES) == tokenizer(SENTENCES)


def test_other_pad_tokens_survive_saving(tokenizer, tmp_path):
    own = copy.deepcopy(tokenizer)
    own.add_special_tokens({"pad_token": "[PAD]"})
    end = copy.deepcopy(tokenizer)
    end.pad_token = end.eos_token
    for name, changed in (("own", own), ("end", end)):
        changed.save_pretrained(tmp_path / name)
        again = HFCLIPTokenizer.from_pretrained(tmp_path / name)
        assert (again.pad_token, again.pad_token_id) == (changed.pad_token, changed.pad_token_id)
        assert again(["a b", "a"], padding=True) == changed(["a b", "a"], padding=True)
    assert own.pad_token_id == len(tokenizer) and end.pad_token_id == tokenizer.eos_token_id


def test_added_tokens_are_found_kept_and_saved(tokenizer, reference, tmp_path):
    changed = copy.deepcopy(tokenizer)
    changed("a <cat-toy>")  # the table of words exists before
    assert changed.add_tokens(["<Cat-Toy>", AddedToken("dog", single_word=True)]) == 2
    toy, dog = len(tokenizer), len(tokenizer) + 1
    text = "A photo of <cat-toy>, a dog; not a hotdog!<CAT-TOY>"
    expected = [*reference("a photo of"), toy, *reference(", a"), dog, *reference("; not a hotdog!"), toy]
    changed.save_pretrained(tmp_path)
    for found in (changed, HFCLIPTokenizer.from_pretrained(tmp_path)):
        assert ids_of(found, text) == expected == ids_of(found, text, return_offsets_mapping=True)
        assert found.decode(expected[:5]).startswith("a photo of")
        cut = found("<cat-toy> " * 100, truncation=True)["input_ids"]
        assert cut == [found.bos_token_id, *[toy] * 75, found.eos_token_id]


REMOTE_LOAD = """
import json, sys
sys.modules["ftfy"] = sys.modules["hfclip"] = None
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
try:
    tokenizer("caf\\u00e9")
except ImportError as error:
    message = str(error)
print(json.dumps([type(tokenizer).__module__, tokenizer(["a photo!", "it's"], padding=True)["input_ids"], message]))
"""


def test_travels_as_remote_code_and_names_missing_ftfy(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(HFCLIPTokenizer, "_auto_class", "AutoTokenizer")
    tokenizer.save_pretrained(tmp_path / "folder")
    monkeypatch.undo()
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", REMOTE_LOAD, str(tmp_path / "folder")]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    module, ids, message = json.loads(output.splitlines()[-1])
    assert module.startswith("transformers_modules.")
    assert ids == tokenizer(["a photo!", "it's"], padding=True)["input_ids"]
    assert "pip install ftfy" in message


# ----------------------------------------------------------------------------------------------------------- training


def test_trained_ids_follow_openai_layout(tokenizer):
    vocab = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    assert vocab[:512] == BASE_VOCAB and vocab[:2] == ["!", '"']
    assert vocab[-2:] == ["<|startoftext|>", "<|endoftext|>"] and len(tokenizer) == len(vocab) == 640
    assert len(ids_of(tokenizer, "photo")) == 1  # merges were learned


def test_no_text_is_out_of_vocabulary(tokenizer):
    text = "".join(map(chr, [*range(0x21, 0x7F), *range(0xA1, 0x180), 0x3042, 0x1F600, 0x10FFFF]))
    ids = ids_of(tokenizer, text)
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids).replace(" ", "") == tokenizer.clean_text(text).replace(" ", "")


def test_training_cleans_and_takes_batches_of_texts():
    texts = ["caf&eacute; “x”", "CAFÉ"] * 5
    trained = HFCLIPTokenizer.train_new_from_iterator([texts, texts], vocab_size=517, show_progress=False)
    assert len(trained) == 517 and len(ids_of(trained, "café")) == 2  # of five bytes, after three merges


def test_training_on_a_tokenizer_keeps_its_settings():
    base = HFCLIPTokenizer(clean="none", model_max_length=32, eos_token="</s>", unk_token="</s>")
    base.add_special_tokens({"pad_token": "[PAD]"})
    trained = base.train_new_from_iterator(
        SENTENCES, 560, new_special_tokens=["<new>"], special_tokens_map={"[PAD]": "<pad>"}, show_progress=False
    )
    assert (trained.clean, trained.model_max_length, trained.pad_token) == ("none", 32, "<pad>")
    assert trained.convert_ids_to_tokens([556, 557, 558, 559]) == ["<pad>", "<new>", "<|startoftext|>", "</s>"]
    assert trained("a<new>")["input_ids"][2] == 557 and len(trained) == 560


def test_says_when_texts_are_too_few(caplog):
    with caplog.at_level(logging.WARNING):
        trained = HFCLIPTokenizer.train_new_from_iterator(["ab ab"], vocab_size=1000, show_progress=False)
    assert f"{len(trained)} of the 1000" in caplog.text and len(trained) == 515


def test_untrained_tokenizer_encodes_bytes():
    bytewise = HFCLIPTokenizer()
    assert len(bytewise) == 514
    assert bytewise.decode(bytewise("hé 日本")["input_ids"], skip_special_tokens=True) == "hé 日本"


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("text", [3, b"a", {"a": 1}, ["a", None], ["a", 3], [["a"]], [("a", "b")], np.array(["a"])])
def test_rejects_what_is_no_text(tokenizer, text):
    with pytest.raises(TypeError, match="must be a str or a list of str, found"):
        tokenizer(text)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"text_pair": "b"}, "one text at a time"),
        ({"is_split_into_words": True}, "whole texts"),
        ({"max_length": 1}, "no room"),
        ({"max_length": 8, "stride": 6, "return_overflowing_tokens": True}, "stride of 6"),
    ],
)
def test_rejects_what_clip_cannot_do(tokenizer, kwargs, message):
    with pytest.raises(ValueError, match=message):
        tokenizer("a", **kwargs)


def test_rejects_unknown_call_options(tokenizer):
    with pytest.raises(TypeError, match="no option 'paddin'. The nearest is 'padding'"):
        tokenizer("a", paddin=True)


def test_takes_every_option_that_processors_of_transformers_pass(tokenizer):
    options = dict.fromkeys(TextKwargs.__annotations__)
    options |= {"add_special_tokens": True, "padding": False, "stride": 0, "is_split_into_words": False}
    assert tokenizer("a cat", **options)["input_ids"] == tokenizer("a cat")["input_ids"]


@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        ("a cat", TypeError, "found one str"),
        ([1], TypeError, "str or lists of str, found int"),
        ([{"text": "a cat"}], TypeError, "found dict"),
        ([], ValueError, "at least one text"),
        (iter([]), ValueError, "at least one text"),
    ],
)
def test_training_rejects_what_is_no_text(texts, error, message):
    with pytest.raises(error, match=message):
        HFCLIPTokenizer.train_new_from_iterator(texts, vocab_size=600, show_progress=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "found 0"),
        (b"#version: 0.2\ni n\n", "line 3"),
        (b"#version: 0.2\n" + b"a b c\n" * 10, "line 2: .*found 'a b c'"),
        (b"#version: 0.2\nab c\n", "line 2"),
        (gzip.compress(b"#version: 0.2\ni n", mtime=0)[:-9], "no merges file"),
        (b"\x1f\x8b garbage", "no merges file"),
        (b"\xff\xfe\x00", "no merges file"),
    ],
)
def test_rejects_garbled_merges(tmp_path, content, message):
    (tmp_path / "merges.txt.gz").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        HFCLIPTokenizer.from_openai_bpe(tmp_path / "merges.txt.gz")


def test_rejects_a_gzip_bomb_without_unpacking_it(tmp_path):
    """A gigabyte of zeros in a megabyte, in a process that has room for neither it nor its lines."""
    path = tmp_path / "merges.txt.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(2**10):
            file.write(bytes(2**20))
    program = f"""
import resource, sys
from hfclip.bpe_hfclip import read_openai_merges
from pathlib import Path
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, used + 2**29))
try:
    read_openai_merges(Path({str(path)!r}))
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "is no merges file, gzipped or not: it holds more than 67,108,864 bytes" in done.stdout, done.stderr


def test_rejects_missing_files(tmp_path, tokenizer):
    with pytest.raises(FileNotFoundError, match="no merges file"):
        HFCLIPTokenizer.from_openai_bpe(tmp_path / "nothing.gz")
    with pytest.raises(ValueError, match="No tokenizer in"):
        HFCLIPTokenizer.from_pretrained(tmp_path)
    tokenizer.backend_tokenizer.model.save(str(tmp_path))
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(ValueError, match="without its merges.txt"):
        HFCLIPTokenizer.from_pretrained(tmp_path)


def test_rejects_a_vocabulary_too_small_and_unknown_cleaning():
    with pytest.raises(ValueError, match="at least 514"):
        HFCLIPTokenizer.train_new_from_iterator(SENTENCES, vocab_size=513)
    with pytest.raises(ValueError, match="openai"):
        HFCLIPTokenizer(clean="yes")


@pytest.mark.parametrize("token_id", [2**31, 2**32, -1, 1.5, "3", True, None])
def test_rejects_ids_that_are_none(tokenizer, tmp_path, token_id):
    """In a saved folder, too; id 2**31 would take gigabytes when the tokenizer is saved again."""
    with pytest.raises(ValueError, match=r"strings with ids 0..16777216, found '<new>'"):
        HFCLIPTokenizer(vocab={**tokenizer.get_vocab(), "<new>": token_id})
    tokenizer.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    saved["model"]["vocab"]["<new>"] = token_id
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=r"strings with ids 0..16777216, found '<new>'"):
        HFCLIPTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab": "/etc/passwd"}, "is damaged: its vocabulary is '/etc/passwd'"),  # a path to no file of the folder
        ({"vocab": [["a", 0.5]]}, "A merge must be of two tokens of the vocabulary"),
        ({"merges": [["a", "zzz"]]}, r"A merge must be of two tokens .* found \('a', 'zzz'\)"),
        ({"merges": [[1, 2]]}, "A merge must be"),
        ({"type": "WordPiece"}, "is damaged"),
    ],
)
def test_rejects_a_damaged_tokenizer_file(tokenizer, tmp_path, change, message):
    tokenizer.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    saved["model"] |= change
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=message):
        HFCLIPTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("model_max_length", value) for value in (10**9, 2**63, -5, 0, 1, 7.5, "77", True, [77])],
        *[("pad_token_id", value) for value in (2**31, 2**32, 10**6, -1, "0", None)],
        *[("eos_token", value) for value in ("", 5)],
    ],
)
def test_rejects_settings_out_of_range_in_a_saved_folder(tokenizer, tmp_path, name, value):
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {name: value}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"{name} must be .*found"):
        HFCLIPTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("token_id", [-1, -100, 2**32, 2**63])
def test_rejects_decoding_of_ids_that_are_none(tokenizer, token_id):
    for decode in (tokenizer.decode, tokenizer.convert_ids_to_tokens):
        for skip_special_tokens in (False, True):
            with pytest.raises(ValueError, match=rf"token ids must lie in 0..\d+, found .*{token_id}"):
                decode([0, token_id], skip_special_tokens=skip_special_tokens)
    assert tokenizer.decode([2**31]) == ""  # as any tokenizer of transformers leaves ids out that it does not have


def test_says_that_byte_symbols_are_missing(caplog):
    with caplog.at_level(logging.WARNING):
        HFCLIPTokenizer(vocab={"a": 0, "a</w>": 1, "<|startoftext|>": 2, "<|endoftext|>": 3})
    assert "510 of the 512 byte symbols" in caplog.text


@pytest.mark.slow
def test_training_gives_the_same_tokenizer_in_every_process():
    """Ties between equally frequent pairs must not be settled by the order of a hash table."""
    code = (
        "from hfclip import HFCLIPTokenizer\n"
        "words = [a + b for a in 'abcdefgh' for b in 'ijklmnop']\n"
        "tokenizer = HFCLIPTokenizer.train_new_from_iterator(words, 540, show_progress=False)\n"
        "print(tokenizer(words)['input_ids'])"
    )
    outputs = {subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout for _ in range(3)}
    assert len(outputs) == 1
