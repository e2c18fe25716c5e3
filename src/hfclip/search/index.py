"""An index of images: made, brought up to date, and searched."""

import hashlib
import json
import os
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers.utils import logging

from ..data.shards import cache_folder
from ..embeddings.processes import preprocessing_of
from ..errors import UsageError
from ..names import opening
from ..precision import settled_precision
from ..zero_shot import device_of, model_fingerprint
from .filters import select
from .query import CANDIDATES, Query, Term, count_strong, embed_query_image, embed_query_texts, parse_query
from .store import Manifest, Snapshot, Store
from .update import Counts, Progress, is_below, outermost, run_update


KEPT_TEXTS = 1024  # embeddings of texts that are kept
MARGIN = 32  # rows beyond those asked for whose scores are computed in float32: float16 has ties among them


@dataclass(frozen=True)
class Hit:
    """An image of the index.

    Attributes:
        id: stays the same as long as the content of the file does, wherever it is moved.
        score: cosine with the query; None without one.
        z: by how many standard deviations the score is above the mean over all images.
        modified: seconds since 1970.
    """

    id: int
    path: str
    score: float | None
    z: float | None
    width: int
    height: int
    modified: float

    @property
    def folder(self) -> str:
        return os.path.dirname(self.path)


@dataclass(frozen=True)
class Found:
    """Images by falling score.

    Attributes:
        hits: those asked for.
        total: how many images met the conditions.
        strong: how many of all these, the best ones, are strong matches; see `hfclip.search.query.count_strong`.
    """

    hits: list[Hit]
    total: int
    strong: int


class ImageIndex:
    """An index of images in folders, stored in a folder of its own; see `hfclip.search`.

    Example:

        index = ImageIndex.build(["~/photos"], model="clip-b32")     # or, if it is there: ImageIndex.open()
        for hit in index.search("two parrots", top_k=20).hits:
            print(hit.path, hit.score)

    Threads may search at the same time. What another process or thread commits is found by the next search.
    """

    def __init__(self, store: Store, model: nn.Module | str | None = None, processor: Any = None):
        self.store, self._model, self._processor = store, model, processor
        self._lock, self._seen, self._snapshot = threading.RLock(), None, None
        self._checked, self._name = False, None  # whether the model is that of the index; what it was opened by
        self._texts: dict[str, Tensor] = {}
        self.last_update: Counts | None = None

    @classmethod
    def build(
        cls,
        folders: str | os.PathLike | Iterable[str | os.PathLike],
        model: nn.Module | str | None = None,
        processor: Any = None,
        store: str | os.PathLike | None = None,
        *,
        include_hidden: bool = False,
        progress: Progress | None = None,
    ) -> "ImageIndex":
        """Makes an index of folders, or adds them to the one that is there, and embeds what is new.

        Args:
            folders: those below them are searched as well.
            model, processor: a model folder or Hub name, or a `HFCLIPModel` and its processor. None: that of the index.
            store: the index's own folder. None: `search` in hfclip's cache folder.
            include_hidden: whether names that begin with a dot count, and folders of the system.
            progress: is called with the number of files that are done and of those to do.

        Raises:
            UsageError: a folder is not there, none holds an image, the index is of another model.
        """
        index = cls(Store(default_store() if store is None else store), model, processor)
        folders = [folders] if isinstance(folders, (str, os.PathLike)) else folders
        folders = outermost(os.fspath(folder) for folder in folders)
        for folder in folders:
            if not os.path.isdir(folder):
                raise UsageError(f"found no folder {folder!r}, expected one that holds images.")
        index.last_update = index._update(folders, include_hidden, progress)
        return index

    @classmethod
    def open(
        cls, store: str | os.PathLike | None = None, model: nn.Module | str | None = None, processor: Any = None
    ) -> "ImageIndex":
        """Opens an index; its model is opened when it is needed.

        Raises:
            UsageError: there is none, or it is damaged.
        """
        index = cls(Store(default_store() if store is None else store), model, processor)
        index.snapshot()
        return index

    def update(self, progress: Progress | None = None) -> Counts:
        """Brings the index to what its folders hold now. Raises UsageError while another process does."""
        return self._update((), self.snapshot().manifest.include_hidden, progress)

    def _update(self, added: tuple[str, ...], include_hidden: bool, progress: Progress | None) -> Counts:
        is_new = self.store.signature() is None
        if is_new and not added:
            raise UsageError(f"{self.store.folder} holds no index yet: name the folders that hold your images.")
        if is_new and self._model is None:
            raise UsageError(
                "a new index needs a model. Name one: --model MODEL, a folder or one of `hfclip models`; `hfclip train` "
                "makes a small one, runs/quickstart/model, without any data."
            )
        with self.store.locked():
            snapshot = None if self.store.signature() is None else self.store.read()
            manifest = self.new_manifest() if snapshot is None else snapshot.manifest
            folders = outermost([*manifest.folders, *added])
            include_hidden = include_hidden or manifest.include_hidden
            manifest = replace(manifest, folders=folders, include_hidden=include_hidden)
            looked_at = [folder for folder in folders if not added or any(is_below(new, [folder]) for new in added)]
            return run_update(self.store, manifest, snapshot, looked_at, self.open_model, progress)

    # ------------------------------------------------------------------------------------------------------ searching

    def search(self, query: str | Query, top_k: int = 50, where: str | None = None, offset: int = 0) -> Found:
        """The images that match a query best.

        Args:
            query: words, which `parse_query` reads, or a `Query` with images.
            top_k: hits, at most.
            where: conditions, see `hfclip.search.filters.select`.
            offset: how many of the best are left out.

        Raises:
            UsageError: an empty query, a condition that is none, an index of another model.
            LookupError: an id of no image.
        """
        snapshot = self.snapshot()
        vector = self._vector(parse_query(query) if isinstance(query, str) else query)
        scores = (snapshot.tensor @ vector.to(snapshot.tensor.dtype)).float()
        selected = snapshot.alive if where is None else snapshot.alive & select(snapshot, where)
        total = snapshot.num_alive if where is None else int(selected.sum())
        if not total:
            return Found([], 0, 0)
        of_all = scores if snapshot.num_alive == len(scores) else scores[torch.from_numpy(snapshot.alive)]
        mean = of_all.mean().item()
        centred = of_all - mean
        deviation = max(centred.dot(centred).item() / len(centred), 1e-12) ** 0.5  # a quarter of the time of `std`
        if total < len(scores):
            scores.masked_fill_(torch.from_numpy(~selected), -torch.inf)
        best = scores.topk(min(total, max(offset + top_k + MARGIN, CANDIDATES)))
        exact = F.normalize(snapshot.tensor[best.indices[: offset + top_k + MARGIN]].float(), dim=1) @ vector
        values, order = torch.cat([exact, best.values[len(exact) :]]).sort(descending=True, stable=True)
        z = (values - mean) / deviation
        wanted = slice(offset, offset + top_k)
        numbers = best.indices[order[wanted]].tolist()
        rows = zip(numbers, values[wanted].tolist(), z[wanted].tolist(), strict=True)
        hits = [self._hit(snapshot, *row) for row in rows]
        return Found(hits, total, count_strong(values.numpy(), z.numpy(), len(of_all)))

    def latest(self, top_k: int = 50, where: str | None = None, offset: int = 0) -> Found:
        """The images whose files changed last, without scores; otherwise as `search`."""
        snapshot = self.snapshot()
        selected = snapshot.alive if where is None else snapshot.alive & select(snapshot, where)
        numbers = np.flatnonzero(selected)
        order = np.argsort(-snapshot.table["modified"].to_numpy()[numbers], kind="stable")[offset : offset + top_k]
        return Found([self._hit(snapshot, row, None, None) for row in numbers[order].tolist()], len(numbers), 0)

    def get(self, id: int) -> Hit:
        """The image of an id. Raises LookupError if there is none."""
        snapshot = self.snapshot()
        if not (0 <= id < len(snapshot.alive) and snapshot.alive[id]):
            raise LookupError(f"found no image {id}.")
        return self._hit(snapshot, id, None, None)

    def find(self, path: str | os.PathLike) -> int | None:
        """The id of the image at a path, if it is in the index."""
        snapshot = self.snapshot()
        same = pc.equal(snapshot.table["path"], os.fsencode(os.path.abspath(path))).to_numpy()
        return next(iter(np.flatnonzero(same & snapshot.alive).tolist()), None)

    def __len__(self) -> int:
        return self.snapshot().num_alive

    def __iter__(self) -> Iterator[Hit]:
        """All images, by id."""
        snapshot = self.snapshot()
        return (self._hit(snapshot, number, None, None) for number in np.flatnonzero(snapshot.alive).tolist())

    def stats(self) -> dict[str, Any]:
        """What the index holds: images, problems by kind, folders, model, store; and (done, total) while it is indexed."""
        snapshot = self.snapshot()
        return {
            "images": len(self),
            "problems": dict(Counter(problem.kind for problem in snapshot.problems)),
            "folders": list(snapshot.manifest.folders),
            "model": snapshot.manifest.model["name"],
            "store": str(self.store.folder),
            "indexing": self.store.indexing(),
        }

    def snapshot(self) -> Snapshot:
        """The latest generation, which is opened if it is not yet."""
        signature = self.store.signature()
        if self._snapshot is None or signature != self._seen:
            with self._lock:
                if self._snapshot is None or signature != self._seen:
                    self._snapshot, self._seen = self.store.read(), signature
        return self._snapshot

    def _hit(self, snapshot: Snapshot, number: int, score: float | None, z: float | None) -> Hit:
        width, height, modified = (snapshot.column(name).item(number) for name in ("width", "height", "modified"))
        return Hit(number, snapshot.path(number), score, z, width, height, modified / 1e9)

    # ------------------------------------------------------------------------------------------------------ the model

    def open_model(self) -> tuple[nn.Module, Any]:
        """The model and its processor. Raises UsageError if they are not those of the index."""
        with self._lock:
            if self._model is None or isinstance(self._model, str):
                name = self._model or self.snapshot().manifest.model["name"]
                self._model, self._processor = _load(name)
                self._name = name
            if not self._checked and self.store.signature() is not None:
                self._check_model()
            self._checked = True
            return self._model.eval(), self._processor

    def _describe_model(self, model: nn.Module, processor: Any) -> dict[str, Any]:
        name = self._name or model.name_or_path or type(model).__name__
        preprocessing = json.dumps(preprocessing_of(processor), sort_keys=True, default=str)
        return {
            "name": os.path.abspath(os.path.expanduser(name)) if os.path.isdir(os.path.expanduser(name)) else name,
            "fingerprint": model_fingerprint(model),
            "preprocessing": hashlib.sha256(preprocessing.encode()).hexdigest(),
        }

    def new_manifest(self) -> Manifest:
        """The manifest of a new index of this model."""
        model, processor = self.open_model()
        precision = settled_precision("auto", device_of(model))[0]
        return Manifest(
            {**self._describe_model(model, processor), "precision": precision, "dim": model.config.projection_dim}
        )

    def _check_model(self) -> None:
        manifest, found = self.snapshot().manifest, self._describe_model(self._model, self._processor)
        for what in ("fingerprint", "preprocessing"):
            if found[what] != manifest.model[what]:
                folders = " ".join(manifest.folders)
                raise UsageError(
                    f"{self.store.folder} holds embeddings of {manifest.model['name']} ({what} "
                    f"{manifest.model[what][:12]}), found {found['name']} ({found[what][:12]}). Index anew with it: "
                    f"hfclip index {folders} --model {found['name']} --store {self.store.folder}-2"
                )

    def _vector(self, query: Query) -> Tensor:
        """(dim,) the weighted sum of the terms' unit embeddings, of unit length."""
        if not query.terms:
            raise UsageError("query: found no term, expected words or images.")
        total = sum(weight * self.embed(term) for weight, term in query.terms)
        return F.normalize(total, dim=0)

    def embed(self, term: Term) -> Tensor:
        """(dim,) unit embedding of a term of a query."""
        if isinstance(term, str):
            return self.embed_texts([term])[0]
        if isinstance(term, Tensor):
            return F.normalize(term.float(), dim=0)
        if isinstance(term, Image.Image):
            model, processor = self.open_model()
            with self._lock:
                return embed_query_image(model, processor, term)
        self.get(term)
        return self.snapshot().tensor[term].float()

    def embed_texts(self, texts: Sequence[str]) -> list[Tensor]:
        """(dim,) unit embedding of each text of a query; new ones are embedded at once, and the latest are kept."""
        model, processor = self.open_model()
        with self._lock:  # a tokenizer is one thread's at a time
            new = [text for text in dict.fromkeys(texts) if text not in self._texts]
            if new:
                self._texts.update(zip(new, embed_query_texts(model, processor, new), strict=True))
            found = [self._texts[text] for text in texts]
            for text in list(self._texts)[:-KEPT_TEXTS]:
                del self._texts[text]
            return found


def default_store() -> Path:
    """Where an index is if nothing else is said."""
    return cache_folder() / "search"


def _load(name: str) -> tuple[nn.Module, Any]:
    from .. import HFCLIPModel, HFCLIPProcessor

    logging.disable_progress_bar()
    with opening(name, "--model"):
        model = HFCLIPModel.from_pretrained(name).eval()
        processor = HFCLIPProcessor.from_pretrained(name)
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    return model, processor
