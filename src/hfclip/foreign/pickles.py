"""The pickles in torch's archives, interpreted as descriptions of tensors: no code is looked up, let alone run.

A pickle is a program for a machine that can call anything. The machine here (`interpret`) knows the 32 instructions
that torch writes, and the functions it can call are the few of this file: they return containers, numbers, texts and
places in the file.

    bytes of data.pkl -> `interpret` -> nested containers of `Entry`, numbers, texts -> `flatten` -> by dotted name
"""

import math
import pickletools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import torch

from ..errors import UsageError


# Far above any CLIP (ViT-bigG with its optimizer: 4,000 tensors, a pickle of 1 MB), far below what exhausts a machine.
MAX_TENSORS = 200_000
MAX_OPCODES = 5_000_000
MAX_NODES = 1_000_000  # containers, tensors and values, counted where they are reached
MAX_DEPTH = 64
MAX_NAME = 512  # characters
MAX_EXPANDED = 2**20  # elements that a tensor with repeated elements may have beyond those of its storage
STORAGE_DTYPES = {
    **{"DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16},
    **{"BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32},
    **{"ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool},
    **{"ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128},
}


class CheckpointError(UsageError):
    """A file that cannot be read as a checkpoint: what was found, what was expected, what to do."""


@dataclass(frozen=True)
class Span:
    """A run of bytes of a file; `crc` is the CRC-32 that the file states for it, None where its format has none."""

    path: Path
    start: int
    size: int
    crc: int | None = None


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: `offset` and `stride` count elements of `dtype` within `span`."""

    span: Span
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int = 0

    def __post_init__(self) -> None:
        # Nothing of a tuple is shown before it is known to be short and of numbers: a forged one may be endless.
        if len(self.shape) != len(self.stride) or len(self.shape) > MAX_DEPTH:
            raise CheckpointError(
                f"a tensor has {len(self.shape)} sizes and {len(self.stride)} strides; it is forged."
            )
        numbers = (*self.shape, *self.stride, self.offset)
        if any(type(number) is not int or not 0 <= number < 2**63 for number in numbers):
            raise CheckpointError(
                "a tensor's shape, strides and offset are not all whole numbers from 0; it is forged."
            )
        available = self.span.size // self.dtype.itemsize
        if self.offset + self.extent > available:
            raise CheckpointError(
                f"a tensor of shape {self.shape}, strides {self.stride}, offset {self.offset} reaches beyond its "
                f"storage of {available} elements of {self.dtype}; the file is damaged or forged."
            )
        # Lengths of 0 count as 1 here: torch cannot hold every empty shape either.
        if math.prod(max(size, 1) for size in self.shape) > available + MAX_EXPANDED:
            raise CheckpointError(
                f"a tensor of shape {self.shape} repeats the {available} elements of its storage; save a copy of it "
                "(`tensor.clone()`) if that is meant."
            )

    @property
    def extent(self) -> int:
        """Number of elements from the first to the last that the tensor touches."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.stride))


@dataclass(frozen=True)
class Dtype:
    """A dtype or the storage type of that dtype; None for the untyped storage."""

    dtype: torch.dtype | None


@dataclass(frozen=True)
class Storage:
    span: Span
    dtype: torch.dtype | None


@dataclass(frozen=True)
class NumpyDtype:
    """A NumPy dtype by its code, "f8"."""

    code: str


class Record:
    """A TorchScript module, or a Namespace."""

    def __init__(self) -> None:
        self.attributes: dict[str, Any] = {}


def interpret(data: bytes, load_storage: Callable[[Any], Storage]) -> Any:
    """What a pickle describes: nested containers of `Entry`, `Record`, numbers, texts ...; `GLOBALS` has all that it
    can name. pickletools decodes the instructions."""
    machine = Machine(load_storage)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if count > MAX_OPCODES:
                raise CheckpointError(f"its pickle has more than {MAX_OPCODES} instructions; the file is forged.")
            machine.step(opcode.name, argument)
        (root,) = machine.stack
        return root
    except CheckpointError:
        raise
    except Exception as error:  # a damaged program can fail in any way: an empty stack, missing arguments ...
        raise CheckpointError(f"its pickle is damaged ({type(error).__name__}: {str(error)[:200]}).") from error


class Machine:
    """The part of pickle's protocol 2 that torch.save and torch.jit.save use, on plain containers.

    Whatever it makes is compared or hashed only if it is a text or a number, and never printed: containers can be
    nested or shared so often that either would not end.
    """

    def __init__(self, load_storage: Callable[[Any], Storage]) -> None:
        self.stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._load_storage = load_storage

    def step(self, opcode: str, argument: Any) -> None:
        stack = self.stack
        match opcode:
            case "PROTO" | "STOP":
                pass
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE":
                stack.append(argument)
            case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT":
                stack.append({"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}[opcode]())
            case "MARK":
                self._marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(self._pop_marked()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self._pop(int(opcode[-1]))))
            case "APPEND" | "APPENDS":
                items = self._pop(1) if opcode == "APPEND" else self._pop_marked()
                self._top(list).extend(items)
            case "SETITEM" | "SETITEMS":
                items = self._pop(2) if opcode == "SETITEM" else self._pop_marked()
                self._set_items(items[::2], items[1::2])
            case "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self._memo[argument])
            case "GLOBAL":
                stack.append(find_global(argument))
            case "NEWOBJ" | "REDUCE":
                stack.append(self._call(opcode, *self._pop(2)))
            case "BUILD":
                self._build(*self._pop(1))
            case "BINPERSID":
                stack.append(self._load_storage(stack.pop()))
            case _:
                raise CheckpointError(
                    f"its pickle uses {opcode}, which torch.save and torch.jit.save do not write; nothing was run. "
                    "Save it again with torch.save and its default pickle_protocol."
                )

    def _pop(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise CheckpointError("its pickle takes more than it has; the file is damaged or forged.")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def _pop_marked(self) -> list[Any]:
        start = self._marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def _top(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            raise CheckpointError(f"its pickle takes a {type(self.stack[-1]).__name__} for a {kind.__name__}.")
        return self.stack[-1]

    def _set_items(self, keys: list[Any], items: list[Any]) -> None:
        wrong = [type(key).__name__ for key in keys if type(key) not in (str, int, float, bool)]
        if wrong:
            raise CheckpointError(f"a dictionary has a key of type {wrong[0]}; expected strings or numbers.")
        self._top(dict).update(zip(keys, items))

    def _call(self, opcode: str, function: Any, arguments: Any) -> Any:
        # Functions are on the stack only where GLOBALS put them; a Record is made without arguments.
        if opcode == "REDUCE" and isinstance(function, FunctionType) and type(arguments) is tuple:
            return function(*arguments)
        if opcode == "NEWOBJ" and function is Record and type(arguments) is tuple and not arguments:
            return Record()
        raise CheckpointError(f"its pickle calls something that is no function ({opcode}); the file is forged.")

    def _build(self, state: Any) -> None:
        target = self.stack[-1]
        if type(target) is Record:
            if type(state) is not dict:
                raise CheckpointError(
                    "a module stores something other than its attributes (packed or quantised weights, or its own "
                    "__getstate__); expected float weights as they are."
                )
            target.attributes = state
        elif type(target) is NumpyDtype:
            if type(state) is not tuple or len(state) < 2 or state[1] not in ("<", "|", "="):
                raise CheckpointError("a NumPy value of unusual byte order; save it as a Python number.")
        elif type(target) is not dict:  # a state dict's `_metadata` is not needed
            raise CheckpointError(f"its pickle gives a state to a {type(target).__name__}; the file is forged.")


def find_global(name: str) -> Any:
    """What stands for a global, "<module> <name>"."""
    if name.startswith(("__torch__ ", "__torch__.")):
        return Record
    if name not in GLOBALS:
        raise CheckpointError(
            f"its pickle asks for {name.replace(' ', '.')[:200]!r}, which tensors do not need; nothing was run. Save "
            "the weights alone, torch.save(model.state_dict(), path), in the program that made the file."
        )
    return GLOBALS[name]


def rebuild_tensor(
    storage: Any, offset: Any, shape: Any, stride: Any, _grad: Any = None, _hooks: Any = None, metadata: Any = None
) -> Entry:
    """The arguments of torch._utils._rebuild_tensor_v2. `metadata` marks lazy conjugates and negatives."""
    if not isinstance(storage, Storage) or storage.dtype is None:
        raise CheckpointError("a tensor without a typed storage; the file is forged.")
    if type(shape) is not tuple or type(stride) is not tuple or metadata:
        raise CheckpointError("a tensor of unusual form (lazy conjugate, no sizes); save a copy (`tensor.clone()`).")
    return Entry(storage.span, storage.dtype, shape, stride, offset)


def rebuild_untyped(
    storage: Any, offset: Any, shape: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, metadata: Any = None
) -> Entry:
    """The arguments of torch._utils._rebuild_tensor_v3, which torch uses for its newer dtypes."""
    if not isinstance(storage, Storage) or not isinstance(dtype, Dtype):
        raise CheckpointError("a tensor without a storage or a dtype; the file is forged.")
    return rebuild_tensor(Storage(storage.span, dtype.dtype), offset, shape, stride, metadata=metadata)


def first_argument(value: Any, *_: Any) -> Any:
    return value


def ordered_dict() -> dict:
    return {}


def encode_bytes(text: Any, _: Any) -> bytes | None:
    """How protocol 2 writes bytes. Only those of one number are read."""
    return text.encode("latin-1") if type(text) is str and len(text) <= 8 else None


def numpy_dtype(code: Any, *_: Any) -> NumpyDtype:
    if type(code) is not str or not re.fullmatch(r"b1|f[248]|[iu][1248]", code):
        raise CheckpointError("a NumPy value that is no number; save it as Python numbers or a tensor.")
    return NumpyDtype(code)


def numpy_scalar(dtype: Any, data: Any) -> bool | int | float:
    if type(dtype) is not NumpyDtype or type(data) is not bytes or len(data) != int(dtype.code[1]):
        raise CheckpointError("a NumPy value whose bytes do not fit its dtype; the file is forged.")
    return np.frombuffer(data, dtype=f"<{dtype.code}")[0].item()


# All that a pickle can name, "<module> <name>", and what it gets instead.
GLOBALS: dict[str, Any] = {
    "torch._utils _rebuild_tensor": rebuild_tensor,
    "torch._utils _rebuild_tensor_v2": rebuild_tensor,
    "torch._utils _rebuild_tensor_v3": rebuild_untyped,
    # Wrappers whose first argument is the value: parameters, TorchScript's typed lists, sizes, devices, counters.
    "torch._utils _rebuild_parameter": first_argument,
    "torch._utils _rebuild_parameter_with_state": first_argument,
    "torch.jit._pickle build_intlist": first_argument,
    "torch.jit._pickle build_tensorlist": first_argument,
    "torch.jit._pickle build_doublelist": first_argument,
    "torch.jit._pickle build_boollist": first_argument,
    "torch.jit._pickle restore_type_tag": first_argument,
    "torch Size": first_argument,
    "torch device": first_argument,
    "collections Counter": first_argument,
    "collections OrderedDict": ordered_dict,
    "argparse Namespace": Record,
    "_codecs encode": encode_bytes,
    "numpy dtype": numpy_dtype,
    "numpy.core.multiarray scalar": numpy_scalar,
    "numpy._core.multiarray scalar": numpy_scalar,
    "torch.storage UntypedStorage": Dtype(None),
    "torch.storage _UntypedStorage": Dtype(None),
    **{f"torch {name}": Dtype(dtype) for name, dtype in STORAGE_DTYPES.items()},
    **{f"torch {name}": Dtype(dtype) for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype)},
}


def flatten(root: Any) -> tuple[dict[str, Entry], dict[str, Any]]:
    """Tensors and values of nested containers by dotted name, in order. Containers may be shared; a loop, or sharing
    that multiplies without end, is refused."""
    entries: dict[str, Entry] = {}
    values: dict[str, Any] = {}
    waiting = [("", root, 0)]
    nodes = 0
    while waiting:
        name, node, depth = waiting.pop()
        if isinstance(node, (Entry, bool, int, float, str)):
            if name in entries or name in values:
                raise CheckpointError(f"two things in the file are named {name!r}; expected one.")
            (entries if isinstance(node, Entry) else values)[name] = node
            continue
        if isinstance(node, Record):
            node = node.attributes
        elif isinstance(node, (list, tuple)):
            node = dict(enumerate(node))
        if not isinstance(node, dict):
            continue  # None, a dtype: nothing that a conversion reads
        nodes += len(node)
        if nodes > MAX_NODES or depth > MAX_DEPTH or len(entries) > MAX_TENSORS:
            raise CheckpointError(
                f"more than {MAX_NODES} things, {MAX_TENSORS} tensors or {MAX_DEPTH} levels; the file is forged, or "
                "holds much more than weights."
            )
        if any(len(name) + len(str(key)) >= MAX_NAME for key in node):
            raise CheckpointError(f"a name of more than {MAX_NAME} characters; the file is forged.")
        prefix = f"{name}." if name else ""
        waiting.extend((f"{prefix}{key}", child, depth + 1) for key, child in reversed(node.items()))
    if not entries or "" in entries:
        raise CheckpointError("no named tensors in it; expected a state dict, or containers with one.")
    return entries, values
