"""CLIP's tokenizer: a fast byte-pair tokenizer whose ids equal those of OpenAI's `SimpleTokenizer` on any text.

Texts become ids in `bpe_hfclip`, by a table of words; here they get start and end tokens, are cut, padded and returned
as transformers' tokenizers return them. This is several times faster than sending whole texts through a Rust pipeline.
Whatever needs more than ids (offsets, word ids, overflowing tokens) is built as real `tokenizers.Encoding` objects from
the same words.

`tokenizer.json` holds all that a Rust pipeline can do, for loaders that know nothing of this class. It cannot hold
ftfy, the full list of HTML entities, Python's lower case (final sigma) and the character classes of `regex`.
"""

from __future__ import annotations

import difflib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any, Literal

from tokenizers import AddedToken, Encoding
from tokenizers.models import BPE
from transformers import BatchEncoding, TokenizersBackend
from transformers.processing_utils import TextKwargs
from transformers.tokenization_utils_base import LARGE_INTEGER, TruncationStrategy
from transformers.utils import PaddingStrategy, TensorType, logging

from .batch_hfclip import Layout, LazyBatchEncoding, pad_rows
from .bpe_hfclip import (
    BASE_VOCAB,
    BOS,
    CONTEXT_LENGTH,
    EOS,
    MAX_TOKEN_ID,
    WordIds,
    build_backend,
    clean,
    clean_short,
    read_openai_merges,
    read_vocab,
    train_merges,
    training_texts,
)


logger = logging.get_logger(__name__)

_MAX_CONTEXT_LENGTH = 2**20

# What a call may name, in the order of their declaration; the base class passes on whatever else it is given.
_CALL_OPTIONS = tuple(TextKwargs.__annotations__)


class _ClassOrInstanceMethod:
    """A method that runs on a default instance when it is called on the class."""

    def __init__(self, function: Callable):
        self.function, self.__doc__ = function, function.__doc__

    def __get__(self, instance, owner):
        return MethodType(self.function, owner() if instance is None else instance)


def _check_texts(text, text_pair, is_split_into_words: bool) -> Sequence[str]:
    if text_pair is not None:
        raise ValueError("CLIP reads one text at a time: found text_pair; join the texts or encode them separately.")
    if is_split_into_words:
        raise ValueError('Found is_split_into_words=True: cleaning needs whole texts; pass " ".join(words).')
    if isinstance(text, str):
        return [text]
    if not isinstance(text, (list, tuple)):
        raise TypeError(f"text must be a str or a list of str, found {type(text).__name__}")
    for i, item in enumerate(text):
        if not isinstance(item, str):
            raise TypeError(f"text must be a str or a list of str, found {type(item).__name__} at index {i}")
    return list(text)


def _context_length(value) -> int:
    """`model_max_length`; of folders without a limit, which hold 1e30 or nothing, CLIP's."""
    if value is None or (isinstance(value, (int, float)) and value > LARGE_INTEGER):
        return CONTEXT_LENGTH
    if not isinstance(value, (int, float)) or value != int(value) or not 2 <= value <= _MAX_CONTEXT_LENGTH:
        raise ValueError(f"model_max_length must be a whole number from 2 to {_MAX_CONTEXT_LENGTH}, found {value!r}")
    return int(value)


def _number(tokens: Iterable[str]) -> dict[str, int]:
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}


class HFCLIPTokenizer(TokenizersBackend):
    """CLIP's tokenizer: OpenAI's ids between `<|startoftext|>` and `<|endoftext|>`.

    Use it as any tokenizer of transformers. What differs from the base class:

    - Texts of more than `model_max_length` tokens (77) are cut unless `truncation=False`; the end token stays last. A
      call that was not told to cut (`truncation` not given) and had to logs one warning with the number of texts, equal
      ones once a process: an evaluation embeds the same labels again and again.
    - Padding writes `pad_token_id`, 0 as OpenAI does. Id 0 is also the byte symbol "!", hence no special token of the
      Rust backend: "!" in a text stays an ordinary character, and decoding drops id 0 only before start and after end.
    - Offsets and `char_to_token` refer to `clean_text(text)`, which is the text itself where cleaning moves nothing.
    - Added tokens are looked for in the cleaned, hence lower-cased, text.
    - Pairs of texts and texts split into words are refused: CLIP reads one text, and cleaning needs the whole of it.

    A saved folder names `<|endoftext|>` as `pad_token`, because a loader that knows nothing of this class would cut
    every "!" out of the texts otherwise. `pad_token_id`, saved beside it, is what this class goes by.

    Args:
        vocab: Token to id, or the path of a `vocab.json`. Without it: the 512 byte symbols and the special tokens.
        merges: Pairs of tokens in order of merging, or the path of a `merges.txt`.
        pad_token: Token that pads; `None` takes the token whose id is `pad_token_id`.
        clean: "openai" cleans as OpenAI did and needs ftfy for texts beyond plain printable ASCII; "none" does no
            more than `tokenizer.json`.

    Raises:
        ValueError: an argument is out of its range, or vocabulary and merges do not fit together.

    Source: Radford et al. 2021, section 2.4; https://github.com/openai/CLIP/blob/main/clip/simple_tokenizer.py
    """

    vocab_files_names = {"vocab_file": "vocab.json", "merges_file": "merges.txt", "tokenizer_file": "tokenizer.json"}
    model_input_names = ["input_ids", "attention_mask"]
    _auto_class = "AutoTokenizer"  # saved folders carry this code, so that they load where hfclip is not installed
    model = BPE

    def __init__(
        self,
        vocab: str | dict[str, int] | None = None,
        merges: str | list[tuple[str, str]] | None = None,
        bos_token: str | AddedToken = BOS,
        eos_token: str | AddedToken = EOS,
        unk_token: str | AddedToken = EOS,
        pad_token: str | AddedToken | None = None,
        pad_token_id: int = 0,
        clean: Literal["openai", "none"] = "openai",
        model_max_length: int | None = None,
        **kwargs,
    ):
        if clean not in ("openai", "none"):
            raise ValueError(f'clean must be "openai" or "none", found {clean!r}')
        for name, token in (("bos_token", bos_token), ("eos_token", eos_token)):
            if not isinstance(token, (str, AddedToken)) or not str(token):
                raise ValueError(f"{name} must be a token, found {token!r}")
        if type(pad_token_id) is not int or not 0 <= pad_token_id <= MAX_TOKEN_ID:
            raise ValueError(f"pad_token_id must be an id of the vocabulary, found {pad_token_id!r}")
        self.clean = clean
        self.cache: dict = {}  # `WordIds` once needed; `datasets` leaves a `cache` out of its fingerprints
        vocab, merges = read_vocab(vocab, merges)
        if vocab is None:
            vocab = _number([*BASE_VOCAB, str(bos_token), str(eos_token)])
        self._tokenizer = build_backend(vocab, merges or [], str(bos_token), str(eos_token), str(unk_token))
        if pad_token is not None and self._tokenizer.token_to_id(str(pad_token)) is None:
            kwargs["pad_token"] = pad_token  # a token of its own, which the base class adds to the vocabulary
        model_max_length = _context_length(model_max_length)
        super().__init__(
            bos_token=bos_token,
            eos_token=eos_token,
            unk_token=unk_token,
            pad_token_id=pad_token_id,
            clean=clean,
            model_max_length=model_max_length,
            **{**kwargs, "add_bos_token": True, "add_eos_token": True},
        )
        self.init_kwargs["pad_token"] = pad_token
        # Not before: the base class would turn "!" into a special token that splits texts
        if pad_token is None:
            self.pad_token_id = pad_token_id
            if self.pad_token is None:
                raise ValueError(f"pad_token_id must be an id of the vocabulary of {len(self)}, found {pad_token_id}")
        else:
            self.pad_token = pad_token
        missing = sum(self._tokenizer.token_to_id(symbol) is None for symbol in BASE_VOCAB)
        if missing:
            logger.warning(f"{missing} of the 512 byte symbols are not in the vocabulary; they become {unk_token!s}.")

    # -------------------------------------------------------------------------------------------- reading and writing

    @classmethod
    def from_openai_bpe(cls, path: str | os.PathLike, **kwargs) -> HFCLIPTokenizer:
        """OpenAI's 49,408 ids from `bpe_simple_vocab_16e6.txt.gz` (or the same file unpacked).

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not a header and at least 48,894 merges.
        """
        merges = read_openai_merges(Path(path))
        return cls(vocab=_number([*BASE_VOCAB, *map("".join, merges), BOS, EOS]), merges=merges, **kwargs)

    @classmethod
    def convert_to_native_format(cls, **kwargs) -> dict[str, Any]:
        """Arguments of `__init__` from the files of a folder, ours or one of transformers' `CLIPTokenizer`."""
        kwargs.pop("trust_remote_code", None)  # with it, the base class would take the backend as the file has it
        folder, vocab_file = kwargs.get("name_or_path"), kwargs.get("vocab_file")
        try:
            kwargs = super().convert_to_native_format(**kwargs)
        except Exception as error:  # what JSON of any shape meets in transformers and in Rust
            raise ValueError(f"The tokenizer in {folder!r} is damaged ({type(error).__name__}: {error})") from error
        # How it was loaded is no setting to save again; special tokens, truncation and padding are this class's own
        loading = ("is_local", "local_files_only")
        baked_in = ("post_processor", "tokenizer_truncation", "tokenizer_padding", "_json_truncation", "_json_padding")
        kwargs = {name: value for name, value in kwargs.items() if name not in (*loading, *baked_in)}
        if kwargs.get("vocab") is not None and kwargs.get("vocab") == vocab_file:  # not a path that a JSON file names
            kwargs["vocab"], kwargs["merges"] = read_vocab(vocab_file, kwargs.get("merges"))
        elif isinstance(kwargs.get("vocab"), str):
            raise ValueError(f"The tokenizer in {folder!r} is damaged: its vocabulary is {kwargs['vocab']!r}")
        if kwargs.get("vocab") is None:
            raise ValueError(f"No tokenizer in {folder!r}: expected tokenizer.json, or vocab.json and merges.txt")
        # A folder's pad_token counts where it exists for padding alone
        other_uses = {*kwargs["vocab"], *(str(kwargs.get(f"{use}_token")) for use in ("bos", "eos", "unk"))}
        has_own_pad = kwargs.get("pad_token") is not None and str(kwargs["pad_token"]) not in other_uses
        kwargs.pop("pad_token_id" if has_own_pad else "pad_token", None)
        return kwargs

    def _save_pretrained(self, save_directory, file_names, legacy_format=None, filename_prefix=None):
        if self.pad_token not in self.added_tokens_encoder:  # see the class's docstring
            config_file = Path(file_names[0])
            config = json.loads(config_file.read_text(encoding="utf-8")) | {"pad_token": self.eos_token}
            text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
            config_file.write_text(text, encoding="utf-8")
        return super()._save_pretrained(save_directory, file_names, legacy_format, filename_prefix)

    def _add_tokens(self, new_tokens, special_tokens: bool = False) -> int:
        self.cache = {}
        return super()._add_tokens(new_tokens, special_tokens)

    # ------------------------------------------------------------------------------------------------------- training

    @_ClassOrInstanceMethod
    def train_new_from_iterator(
        self,
        text_iterator: Iterable[str | Sequence[str]],
        vocab_size: int,
        length: int | None = None,
        new_special_tokens: Sequence[str | AddedToken] | None = None,
        special_tokens_map: dict[str, str] | None = None,
        **kwargs,
    ) -> HFCLIPTokenizer:
        """Train a tokenizer of this kind on texts, or on batches of texts.

        `HFCLIPTokenizer.train_new_from_iterator(texts, vocab_size)` starts from the defaults; called on a tokenizer,
        the new one keeps its settings and special tokens. Ids follow OpenAI's layout: 512 byte symbols, merges, other
        special tokens, start, end. No text is out of vocabulary.

        Args:
            vocab_size: Number of ids, special tokens included. Texts may have too few pairs to reach it, which is
                logged.
            length: Number of texts, for the progress bar.
            new_special_tokens: Special tokens beside those of this tokenizer.
            special_tokens_map: Old to new names of special tokens, e.g. `{"<|endoftext|>": "</s>"}`.
            kwargs: For `tokenizers.trainers.BpeTrainer`, e.g. `min_frequency` (0), `show_progress` (True).

        Raises:
            ValueError: `vocab_size` has no room for the byte symbols and the special tokens, or there is no text.
            TypeError: `text_iterator` is a single text, or holds something else than texts and batches of texts.
        """
        names = special_tokens_map or {}
        named = {use: names.get(token, token) for use, token in self.special_tokens_map.items()}
        bos, eos = named["bos_token"], named["eos_token"]
        own = [names.get(token.content, token) for token in self.added_tokens_decoder.values() if token.special]
        extra = [token for token in [*own, *(new_special_tokens or ())] if str(token) not in (bos, eos)]
        special_tokens = [*map(str, extra), bos, eos]
        smallest = len(BASE_VOCAB) + len(special_tokens)
        if vocab_size < smallest:
            raise ValueError(
                f"vocab_size must be at least {smallest} (512 byte symbols and {len(special_tokens)} special tokens), "
                f"found {vocab_size}"
            )
        backend = build_backend({}, [], self.bos_token, self.eos_token, None)
        if self.clean == "openai":
            backend.normalizer = None
        texts = map(self.clean_text, training_texts(text_iterator))
        merges = train_merges(backend, texts, vocab_size, length, **kwargs)
        tokens, num_merges = dict.fromkeys(BASE_VOCAB), 0  # two merges can give one token
        while num_merges < len(merges) and len(tokens) + len(special_tokens) < vocab_size:
            tokens["".join(merges[num_merges])] = None
            num_merges += 1
        vocab = _number([*tokens, *special_tokens])
        if len(vocab) < vocab_size:
            logger.warning(f"The texts gave {len(vocab)} of the {vocab_size} tokens asked for: train on more text.")
        if self.pad_token_id == 0:
            del named["pad_token"]
        settings = {"clean": self.clean, "model_max_length": self.model_max_length}
        if extra:
            settings["extra_special_tokens"] = extra
        return type(self)(vocab=vocab, merges=merges[:num_merges], **named, **settings)

    # ------------------------------------------------------------------------------------------------------- encoding

    def clean_text(self, text: str) -> str:
        """The text that is split into tokens and that offsets refer to; with `clean="none"`, the text as it is."""
        if self.clean == "none":
            return text
        if text.isascii() and text.isprintable() and "&" not in text:  # ftfy and html.unescape leave it as it is
            text = text.lower().strip()
            return " ".join(text.split()) if "  " in text else text
        return (clean_short if len(text) <= 256 else clean)(text)

    def _get_padding_truncation_strategies(self, padding=False, truncation=None, pad_to_multiple_of=None, **kwargs):
        if truncation is None:
            # For single texts all strategies are one; "only_first" tells `_encode_plus` that nobody asked to cut. The
            # base class would refuse a `pad_to_multiple_of` that does not divide 77: rows are padded to 77 at most.
            truncation, pad_to_multiple_of = TruncationStrategy.ONLY_FIRST, None
        return super()._get_padding_truncation_strategies(
            padding=padding, truncation=truncation, pad_to_multiple_of=pad_to_multiple_of, **kwargs
        )

    def _encode_plus(
        self,
        text: str | Sequence[str],
        text_pair: None = None,
        add_special_tokens: bool = True,
        padding_strategy: PaddingStrategy = PaddingStrategy.DO_NOT_PAD,
        truncation_strategy: TruncationStrategy = TruncationStrategy.DO_NOT_TRUNCATE,
        max_length: int | None = None,
        stride: int = 0,
        is_split_into_words: bool = False,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | TensorType | None = None,
        return_attention_mask: bool | None = None,
        verbose: bool = True,
        split_special_tokens: bool | None = None,
        **kwargs,
    ) -> BatchEncoding:
        # Takes the place of the base class's way through Rust: same arguments, same results
        texts = _check_texts(text, text_pair, is_split_into_words)
        for name in kwargs:
            if name not in _CALL_OPTIONS:
                near = difflib.get_close_matches(name, _CALL_OPTIONS, n=1, cutoff=0.0)[0]
                raise TypeError(f"{type(self).__name__} has no option {name!r}. The nearest is {near!r}.")
        layout = Layout(
            num_special_tokens=self.num_special_tokens_to_add() if add_special_tokens else 0,
            limit=None if truncation_strategy == TruncationStrategy.DO_NOT_TRUNCATE else max_length,
            stride=stride,
            padding=padding_strategy,
            max_length=max_length,
            multiple=pad_to_multiple_of,
            side=padding_side or self.padding_side,
        )
        if layout.room is not None and layout.room < (stride + 1 if stride else 0):
            raise ValueError(f"max_length={max_length} leaves no room for special tokens and a stride of {stride}")
        if return_attention_mask is None:
            return_attention_mask = "attention_mask" in self.model_input_names
        more = ("token_type_ids", "overflowing_tokens", "special_tokens_mask", "offsets_mapping", "length")
        features = {f"return_{name}": kwargs.get(f"return_{name}", False) for name in more}
        words = self._word_ids(self.split_special_tokens if split_special_tokens is None else split_special_tokens)
        make_encodings = partial(self._make_encodings, texts, words, layout)

        data = encodings = None
        if self.clean == "openai" and self.truncation_side == "right" and not any(features.values()):
            data, num_cut = self._encode_ids(texts, words, layout, return_attention_mask, return_tensors)
        if data is None:
            encodings = make_encodings()
            num_cut = sum(len(encoding.overflowing) > 0 for encoding in encodings)
            data, encodings = self._convert_encodings(encodings, return_attention_mask, features)
        self._report_lengths(data["input_ids"], len(texts), num_cut, truncation_strategy, max_length, verbose)

        if isinstance(text, str) and return_tensors is None and not features["return_overflowing_tokens"]:
            data = {name: value[0] if isinstance(value[0], list) else value for name, value in data.items()}
        if encodings is not None:
            return BatchEncoding(data, encodings, tensor_type=return_tensors)
        batch = LazyBatchEncoding(data, tensor_type=return_tensors, n_sequences=1)
        batch._make_encodings = make_encodings
        return batch

    def _word_ids(self, split_special_tokens: bool) -> WordIds:
        if isinstance(self.cache, WordIds) and not split_special_tokens:
            return self.cache
        special_ids = {self.bos_token: self.bos_token_id, self.eos_token: self.eos_token_id}
        added = {
            self.clean_text(token.content): (token_id, token)
            for token_id, token in self.added_tokens_decoder.items()
            if token.content not in special_ids and not (token.special and split_special_tokens)
        }
        if split_special_tokens:
            return WordIds(self._tokenizer.model, {}, added)
        self.cache = words = WordIds(self._tokenizer.model, special_ids, added)
        return words

    def _encode_ids(
        self, texts: Sequence[str], words: WordIds, layout: Layout, return_attention_mask: bool, return_tensors
    ) -> tuple[dict[str, Any] | None, int]:
        """Ids and attention mask from the table of words, and how many texts were cut.

        `None` if a row is longer than rows are to be padded to, which leaves them ragged.
        """
        head = [self.bos_token_id] if layout.num_special_tokens and self.add_bos_token else []
        tail = [self.eos_token_id] if layout.num_special_tokens and self.add_eos_token else []
        rows, num_cut, room = [], 0, layout.room
        for text in texts:
            ids = words.encode(self.clean_text(text))
            if room is not None and len(ids) > room:
                ids, num_cut = ids[:room], num_cut + 1
            rows.append(head + ids + tail)
        longest = max(map(len, rows), default=0)
        width = layout.width(longest)
        if width is None:
            data = {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
        elif width < longest:
            return None, 0
        else:
            data = pad_rows(rows, width, self.pad_token_id, layout.side)
            tensor_type = None if return_tensors is None else TensorType(return_tensors)
            if tensor_type == TensorType.PYTORCH:  # lists of arrays are stacked without a look at each number
                data = {name: list(array) for name, array in data.items()}
            elif tensor_type != TensorType.NUMPY:
                data = {name: array.tolist() for name, array in data.items()}
        if not return_attention_mask:
            del data["attention_mask"]
        return data, num_cut

    def _make_encodings(self, texts: Sequence[str], words: WordIds, layout: Layout) -> list[Encoding]:
        """One Rust encoding a text, cut and padded; what was cut off is in its `overflowing`."""
        if self.clean == "openai":
            encodings = [words.encode_with_offsets(self.clean_text(text)) for text in texts]
        else:
            self._tokenizer.encode_special_tokens = not words.special_ids
            encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        for i, encoding in enumerate(encodings):
            if layout.room is not None:
                encoding.truncate(layout.room, layout.stride, self.truncation_side)
            encodings[i] = self._tokenizer.post_process(encoding, None, layout.num_special_tokens > 0)
        width = layout.width(max(map(len, encodings), default=0))
        if width is not None:
            pad = {"pad_id": self.pad_token_id, "pad_type_id": self.pad_token_type_id, "pad_token": self.pad_token}
            for encoding in encodings:
                encoding.pad(width, direction=layout.side, **pad)
        return encodings

    def _convert_encodings(
        self, encodings: list[Encoding], return_attention_mask: bool, features: dict[str, bool]
    ) -> tuple[dict[str, list], list[Encoding]]:
        """Rows of all encodings, and with `return_overflowing_tokens` those of what was cut off."""
        data, parts, samples = defaultdict(list), [], []
        for i, encoding in enumerate(encodings):
            rows, encoding_and_overflow = self._convert_encoding(
                encoding, return_attention_mask=return_attention_mask, **features
            )
            for name, values in rows.items():
                data[name] += values
            parts += encoding_and_overflow
            samples += [i] * len(encoding_and_overflow)
        if features["return_overflowing_tokens"]:
            data["overflow_to_sample_mapping"] = samples
        return data, parts

    def _report_lengths(self, rows, num_texts: int, num_cut: int, strategy, max_length: int | None, verbose: bool):
        if strategy == TruncationStrategy.DO_NOT_TRUNCATE:
            self._eventual_warn_about_too_long_sequence(max(rows, key=len, default=()), max_length, verbose)
        elif num_cut and verbose and strategy == TruncationStrategy.ONLY_FIRST:
            logger.warning_once(
                f"{num_cut} of {num_texts} texts had more than {max_length} tokens and were cut, end tokens kept. "
                "truncation=True cuts without this warning, truncation=False keeps all tokens."
            )

    # ------------------------------------------------------------------------------------------------------- decoding

    def convert_ids_to_tokens(self, ids: int | Iterable[int], skip_special_tokens: bool = False) -> str | list[str]:
        if skip_special_tokens and not isinstance(ids, int):
            special_ids = {token_id for token_id, token in self.added_tokens_decoder.items() if token.special}
            ids = [token_id for token_id in self._without_padding(map(int, ids)) if token_id not in special_ids]
        try:
            return super().convert_ids_to_tokens(ids)
        except OverflowError as error:
            raise ValueError(f"token ids must lie in 0..{len(self) - 1}, found {ids}") from error

    def _decode(self, token_ids: int | list[int], skip_special_tokens: bool = False, **kwargs) -> str:
        if skip_special_tokens and isinstance(token_ids, (list, tuple)):
            token_ids = self._without_padding(token_ids)
        try:
            return super()._decode(token_ids, skip_special_tokens=skip_special_tokens, **kwargs)
        except OverflowError as error:
            raise ValueError(f"token ids must lie in 0..{len(self) - 1}, found {token_ids}") from error

    def _without_padding(self, token_ids: Iterable[int]) -> list[int]:
        """Ids without the pad ids before the start and after the end: elsewhere, id 0 is text."""
        ids, pad = list(token_ids), {self.pad_token_id}
        if self.eos_token_id in ids:
            end = len(ids) - ids[::-1].index(self.eos_token_id)
            ids = ids[:end] if set(ids[end:]) == pad else ids
        if self.bos_token_id in ids:
            start = ids.index(self.bos_token_id)
            ids = ids[start:] if set(ids[:start]) == pad else ids
        return ids


__all__ = ["HFCLIPTokenizer"]
