"""Byte-pair encoding as OpenAI's `SimpleTokenizer` does it: cleaning of texts, words and their ids, merges files.

A text goes through cleaning (ftfy, HTML entities, white space, lower case), splitting into words (OpenAI's pattern, run
by the same `regex` module) and byte-pair encoding of each word (the Rust model of `tokenizers`). Captions repeat their
words, so the ids of a word are looked up in a bounded table and Rust is asked for new words only.
"""

from __future__ import annotations

import gzip
import html
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path

import regex
from tokenizers import (
    AddedToken,
    Encoding,
    PreTokenizedString,
    Regex,
    Token,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
    trainers,
)
from tokenizers.models import BPE


try:
    import ftfy
except ImportError:  # a Hub repository's code may run where hfclip, which requires ftfy, is not installed
    ftfy = None


BOS, EOS = "<|startoftext|>", "<|endoftext|>"
CONTEXT_LENGTH = 77
NUM_OPENAI_MERGES = 49152 - 256 - 2
MAX_TOKEN_ID = 2**24  # the Rust tokenizer takes memory for every id below the largest
_MAX_MERGES_BYTES = 2**26  # OpenAI's file has 3 million, in 1.4 million gzipped
WORD_END = "</w>"
# A contraction, letters, one digit, anything else that is not white space: OpenAI's clip/simple_tokenizer.py
WORD_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"

# Each byte as a visible character: ASCII and Latin-1 stand for themselves and come first, as in GPT-2's vocabulary.
BYTE_SYMBOLS = {byte: chr(byte) for byte in [*range(33, 127), *range(161, 173), *range(174, 256)]}
BYTE_SYMBOLS |= {byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in BYTE_SYMBOLS)}
BASE_VOCAB = [symbol + end for end in ("", WORD_END) for symbol in BYTE_SYMBOLS.values()]

_WHITE_SPACE = regex.compile(r"\s+")
_BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def clean(text: str) -> str:
    """OpenAI's `whitespaceclean(basicclean(text)).lower()`."""
    if ftfy is None:
        raise ImportError(
            f"Cleaning {text[:40]!r} as OpenAI did needs ftfy: run `pip install ftfy`, or load the tokenizer with "
            'clean="none" and accept ids that differ from OpenAI\'s.'
        )
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return _WHITE_SPACE.sub(" ", text).lower()


# ftfy takes about 30 us a text, and the labels of a zero-shot task come again with every image.
clean_short = lru_cache(maxsize=2**13)(clean)


class WordIds(dict):
    """The words of cleaned text and their ids: a table of pieces of text without spaces, filled on demand.

    Args:
        model: Rust byte-pair model.
        special_ids: Start and end token to id. As with OpenAI, they are words among others, hence lower-cased.
        added: All other added tokens, as they look in cleaned text; they are cut out before it is split into words.
    """

    MAX_ENTRIES = 2**16
    MAX_LENGTH = 64  # characters; longer pieces hardly come again

    def __init__(self, model: BPE, special_ids: dict[str, int], added: dict[str, tuple[int, AddedToken]]):
        super().__init__()
        self.model, self.special_ids = model, {token.lower(): token_id for token, token_id in special_ids.items()}
        # OpenAI's pattern ignores case although the text is lower-case: that decides on U+017F and U+0345
        self.pattern = regex.compile("|".join([*map(regex.escape, self.special_ids), WORD_PATTERN]), regex.IGNORECASE)
        self.added_ids = {text: token_id for text, (token_id, _) in added.items()}
        self.tokens = {token_id: token for token, token_id in special_ids.items()}
        self.tokens |= {token_id: token.content for token_id, token in added.values()}
        alternatives = [
            rf"(?<!\w){regex.escape(text)}(?!\w)" if added[text][1].single_word else regex.escape(text)
            for text in sorted(filter(None, added), key=len, reverse=True)
        ]
        self.added_pattern = regex.compile(f"({'|'.join(alternatives)})") if alternatives else None

    def __missing__(self, piece: str) -> tuple[int, ...]:
        words = self.pattern.findall(piece)
        if words != [piece]:
            ids = tuple(chain.from_iterable(self[word] for word in words))
        elif piece in self.special_ids:
            ids = (self.special_ids[piece],)
        else:
            symbols = piece.encode("utf-8").decode("latin-1").translate(BYTE_SYMBOLS)
            ids = tuple(token.id for token in self.model.tokenize(symbols))
        if len(piece) <= self.MAX_LENGTH:
            if len(self) >= self.MAX_ENTRIES:
                self.clear()
            self[piece] = ids
        return ids

    def __reduce__(self):
        return dict, ()  # a copied or pickled tokenizer starts anew

    def _parts(self, text: str) -> Iterable[str]:
        """Text between added tokens at even, added tokens at odd positions."""
        return self.added_pattern.split(text) if self.added_pattern else (text,)

    def encode(self, text: str) -> list[int]:
        """Ids of cleaned text, without start and end."""
        ids = []
        for i, part in enumerate(self._parts(text)):
            if i % 2:
                ids.append(self.added_ids[part])
            else:
                for piece in part.split(" "):
                    ids += self[piece]
        return ids

    def encode_with_offsets(self, text: str) -> Encoding:
        """The same ids with the place of each in the cleaned text, as Rust reports it."""
        spans, start = [], 0
        for i, part in enumerate(self._parts(text)):
            if i % 2:
                spans.append((start, start + len(part), self.added_ids[part]))
            else:
                matches = self.pattern.finditer(part)
                spans += [(start + m.start(), start + m.end(), self.special_ids.get(m[0])) for m in matches]
            start += len(part)
        pretokenized = PreTokenizedString(text)
        pretokenized.split(lambda _, whole: [whole[start:end] for start, end, _ in spans])
        _BYTE_LEVEL.pre_tokenize(pretokenized)
        known_ids = iter([token_id for _, _, token_id in spans])

        def tokenize(word: str) -> list[Token]:
            token_id = next(known_ids)
            if token_id is None:
                return self.model.tokenize(word)
            return [Token(token_id, self.tokens[token_id], (0, len(word)))]

        pretokenized.tokenize(tokenize)
        return pretokenized.to_encoding()


def read_vocab(vocab, merges):
    """Vocabulary and merges, read if they are the paths of `vocab.json` and `merges.txt`."""
    if not isinstance(vocab, (str, os.PathLike)):
        return vocab, merges
    if merges is None:
        raise ValueError(f"The vocabulary {str(vocab)!r} comes without its merges.txt")
    try:
        return BPE.read_file(str(vocab), str(merges))
    except Exception as error:  # of no narrower class
        raise ValueError(f"{str(vocab)!r} and {str(merges)!r} are no vocabulary and merges: {error}") from error


def _check_vocab(vocab, merges) -> None:
    if not isinstance(vocab, dict):
        raise ValueError(f"The vocabulary must be a dict of tokens to ids, found {type(vocab).__name__}")
    for token, token_id in vocab.items():
        if not isinstance(token, str) or type(token_id) is not int or not 0 <= token_id <= MAX_TOKEN_ID:
            raise ValueError(
                f"The vocabulary must be of strings with ids 0..{MAX_TOKEN_ID}, found {token!r}: {token_id!r}"
            )
    for merge in merges:
        if len(merge) != 2 or not vocab.keys() >= {*merge} or "".join(merge) not in vocab:
            raise ValueError(f"A merge must be of two tokens of the vocabulary whose union is one, found {merge!r}")


def read_openai_merges(path: Path) -> list[tuple[str, str]]:
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no merges file {str(path)!r}. OpenAI's is clip/bpe_simple_vocab_16e6.txt.gz in "
            "https://github.com/openai/CLIP."
        )
    with open(path, "rb") as file:
        is_gzipped = file.read(2) == b"\x1f\x8b"
    try:
        with (gzip.open if is_gzipped else open)(path, "rb") as file:
            content = file.read(_MAX_MERGES_BYTES + 1)
        if len(content) > _MAX_MERGES_BYTES:
            raise OSError(f"it holds more than {_MAX_MERGES_BYTES:,} bytes")
        lines = content.decode("utf-8").split("\n")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{str(path)!r} is no merges file, gzipped or not: {error}") from error
    merges = [tuple(line.split()) for line in lines[1 : NUM_OPENAI_MERGES + 1]]  # the first line is a header
    known = set(BASE_VOCAB)
    for i, merge in enumerate(merges):
        if len(merge) != 2 or not known.issuperset(merge):
            raise ValueError(f"{str(path)!r}, line {i + 2}: expected two tokens made before, found {lines[i + 1]!r}")
        known.add("".join(merge))
    if len(merges) < NUM_OPENAI_MERGES:
        raise ValueError(f"{str(path)!r}: expected a header and {NUM_OPENAI_MERGES} merges, found {len(merges)}")
    return merges


def build_backend(vocab: dict[str, int], merges: list, bos: str, eos: str, unk: str | None) -> Tokenizer:
    """The Rust tokenizer that `tokenizer.json` holds: as near to OpenAI's as it gets without Python."""
    _check_vocab(vocab, merges)
    backend = Tokenizer(
        BPE(vocab=vocab, merges=merges, unk_token=unk, continuing_subword_prefix="", end_of_word_suffix=WORD_END)
    )
    replacements = {
        "[\u02bc\u2018-\u201b]": "'",
        "[\u201c-\u201f]": '"',
        "&(amp;)+": "&",  # entities may be escaped twice
        "&lt;": "<",
        "&gt;": ">",
        "&quot;": '"',
        "&#0*39;": "'",
        r"\s+": " ",
    }
    backend.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            *(normalizers.Replace(Regex(pattern), content) for pattern, content in replacements.items()),
            normalizers.Lowercase(),
        ]
    )
    pattern = "|".join([regex.escape(bos.lower()), regex.escape(eos.lower()), WORD_PATTERN])
    split = pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, _BYTE_LEVEL])
    # OpenAI's decode leaves a space after the last word
    last, others = decoders.Replace(Regex(WORD_END + r"\z"), ""), decoders.Replace(WORD_END, " ")
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), last, others])
    return backend


def train_merges(
    backend: Tokenizer, texts: Iterable[str], vocab_size: int, length: int | None, **kwargs
) -> list[tuple[str, str]]:
    """Merges of byte pairs in the order that texts give them; `kwargs` are for `tokenizers.trainers.BpeTrainer`."""
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=list(BYTE_SYMBOLS.values()),
        # Pairs that are equally frequent are merged in the order of their ids, and final symbols would get theirs
        # in the order of a hash table, another one in every process.
        special_tokens=[symbol + WORD_END for symbol in BYTE_SYMBOLS.values()],
        end_of_word_suffix=WORD_END,
        **kwargs,
    )
    backend.train_from_iterator(texts, trainer=trainer, length=length)
    return [tuple(merge) for merge in json.loads(backend.to_str())["model"]["merges"]]


def training_texts(text_iterator: Iterable[str | Sequence[str]]) -> Iterator[str]:
    """The texts of an iterable of texts or of batches of them. Raises TypeError for others, ValueError for none."""
    if isinstance(text_iterator, str):
        raise TypeError("Training needs an iterable of texts, found one str: pass [text].")
    text = None
    for item in text_iterator:
        is_batch = isinstance(item, Iterable) and not isinstance(item, (str, bytes, Mapping))
        for text in item if is_batch else [item]:
            if not isinstance(text, str):
                raise TypeError(f"Training texts must be str or lists of str, found {type(text).__name__}")
            yield text
    if text is None:
        raise ValueError("Training needs at least one text, found none: is `text_iterator` empty or used up?")
