"""The processes that share the work, and the fingerprint of what they compute."""

import hashlib
import json
import os
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import nn

from ..zero_shot import model_fingerprint
from .chunks import Chunks


class Processes(NamedTuple):
    rank: int
    size: int
    group: dist.ProcessGroup | None

    @classmethod
    def find(cls, group: dist.ProcessGroup | None, alone: bool) -> "Processes":
        """Those of torch.distributed, started here if a launcher has set them up."""
        if not dist.is_available() or alone:
            return cls(0, 1, None)
        if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            dist.init_process_group("gloo", timeout=timedelta(days=1))  # one may have much more to do than another
        return (
            cls(dist.get_rank(group), dist.get_world_size(group), group) if dist.is_initialized() else cls(0, 1, None)
        )

    def gather(self, value: Any) -> list:
        """The values of all, in the order of ranks; each waits for all others."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group=self.group)
        return values


def fingerprint_of(model: nn.Module, chunks: Chunks, processes: Processes, num_workers: int) -> str:
    """64 hex digits of all that the rows depend on."""
    own = list(range(processes.rank, len(chunks), processes.size))
    found = dict(chunks.load(own, num_workers, "reading", processes.rank == 0))
    content = {number: digest.hex() for part in processes.gather(found) for number, digest in part.items()}
    parts = [preprocessing_of(chunks.processor), chunks.options._asdict(), sorted(content.items())]
    record = [model_fingerprint(model), len(chunks.source), chunks.source.labels, *parts]
    return hashlib.sha256(json.dumps(record, sort_keys=True, default=str).encode()).hexdigest()


def preprocessing_of(processor: Any) -> list:
    """What an image processor and a tokenizer do, without the name and version of what wrote it."""
    images, tokenizer = getattr(processor, "image_processor", None), getattr(processor, "tokenizer", None)
    settings = {} if images is None else images.to_dict()
    settings = {name: value for name, value in settings.items() if not name.startswith("_") and name != "auto_map"}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        words = None if tokenizer is None else tokenizer.get_vocab()
    else:  # what the last call has padded and truncated to is no part of it
        words = {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("padding", "truncation")}
    return [settings, words, getattr(tokenizer, "model_max_length", None)]
