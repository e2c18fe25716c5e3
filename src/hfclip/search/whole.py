"""What is done with all images of an index at once: duplicates, folders by label, exports to other programs."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F

from .index import Hit, ImageIndex


ROWS, COLUMNS = 8192, 1024  # images compared at a time
EXPORTED = 8192  # rows at a time
COLLECTION = "images"  # in Qdrant


def duplicates(index: ImageIndex, threshold: float = 0.98) -> list[list[Hit]]:
    """Groups of images that are alike, the largest image of each first, the largest groups first.

    Two images whose cosine is `threshold` or more are in one group, and so are those that are linked by others. All
    pairs are compared, block by block. The scores are cosines with the first image.
    """
    hits, rows = list(index), index.snapshot().tensor
    numbers = torch.tensor([hit.id for hit in hits])
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    roots = np.arange(len(hits))

    def block(start: int, size: int) -> torch.Tensor:
        return F.normalize(rows[numbers[start : start + size]].to(device).float(), dim=1)

    for top in range(0, len(hits), ROWS):
        some = block(top, ROWS)
        for left in range(top, len(hits), COLUMNS):
            pairs = (some @ block(left, COLUMNS).T >= threshold).nonzero().cpu().numpy()
            roots = _link(roots, pairs + (top, left))
    groups: dict[int, list[Hit]] = {}
    for hit, root in zip(hits, roots.tolist(), strict=True):
        groups.setdefault(root, []).append(hit)
    ordered = [sorted(group, key=lambda hit: -hit.width * hit.height) for group in groups.values() if len(group) > 1]
    return [_scored(rows, group) for group in sorted(ordered, key=len, reverse=True)]


def _link(roots: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Joins the groups of pairs of items; `roots[i]` is the first item of the group of i, before and afterwards."""
    joined = np.unique(roots[pairs], axis=0)
    for first, second in joined[joined[:, 0] != joined[:, 1]].tolist():
        while roots[first] != first:
            first = roots[first]
        while roots[second] != second:
            second = roots[second]
        roots[max(first, second)] = min(first, second)
    while (roots != roots[roots]).any():
        roots = roots[roots]
    return roots


def _scored(rows: torch.Tensor, group: list[Hit]) -> list[Hit]:
    embeds = F.normalize(rows[[hit.id for hit in group]].float(), dim=1)
    scores = (embeds @ embeds[0]).tolist()
    return [Hit(**{**vars(hit), "score": score}) for hit, score in zip(group, scores, strict=True)]


def sort_by_labels(index: ImageIndex, labels: list[str]) -> Iterator[tuple[str, Hit]]:
    """Each image with the label that fits it best; its score is the cosine with the label."""
    of_labels = torch.stack([index.embed(label) for label in labels])
    rows = index.snapshot().tensor
    hits = list(index)
    for start in range(0, len(hits), EXPORTED):
        some = hits[start : start + EXPORTED]
        scores, best = (rows[[hit.id for hit in some]].float() @ of_labels.T).max(dim=1)
        for hit, score, number in zip(some, scores.tolist(), best.tolist(), strict=True):
            yield labels[number], Hit(**{**vars(hit), "score": score})


# ---------------------------------------------------------------------------------------------------------------------
# Exports. Rows of files that are gone are left out.
# ---------------------------------------------------------------------------------------------------------------------


def to_parquet(index: ImageIndex, path: str | os.PathLike) -> None:
    """Writes one table: id, path, width, height, modified (seconds since 1970), embedding (float32)."""
    writer = None
    for hits, rows in _blocks(index):
        embeddings = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])
        table = _table(hits).append_column("embedding", embeddings)
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    writer.close()


def to_npy(index: ImageIndex, folder: str | os.PathLike) -> None:
    """Writes a folder: embeddings.npy (images, dim) float32, and files.parquet with a row for each."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    shape = len(index), index.snapshot().rows.shape[1]
    embeddings = np.lib.format.open_memmap(folder / "embeddings.npy", "w+", np.float32, shape)
    start, tables = 0, []
    for hits, rows in _blocks(index):
        embeddings[start : start + len(rows)] = rows
        tables.append(_table(hits))
        start += len(rows)
    embeddings.flush()
    pq.write_table(pa.concat_tables(tables), folder / "files.parquet")


def to_qdrant(index: ImageIndex, place: str) -> None:
    """Puts the images into a collection "images" of Qdrant: points of their id, with path, size and time as payload.

    Args:
        place: the URL of a server, or a folder for the client's local mode.
    """
    from qdrant_client import QdrantClient
    from qdrant_client.models import Distance, PointStruct, VectorParams

    client = QdrantClient(url=place) if "://" in place else QdrantClient(path=place)
    size = index.snapshot().rows.shape[1]
    client.create_collection(COLLECTION, vectors_config=VectorParams(size=size, distance=Distance.COSINE))
    for hits, rows in _blocks(index):
        payloads = _table(hits).drop_columns("id").to_pylist()
        points = [
            PointStruct(id=hit.id, vector=row.tolist(), payload=payload)
            for hit, row, payload in zip(hits, rows, payloads, strict=True)
        ]
        client.upload_points(COLLECTION, points)
    client.close()


def to_usearch(index: ImageIndex, path: str | os.PathLike) -> None:
    """Writes a graph of usearch, whose keys are ids: approximate search that maps its file."""
    from usearch.index import Index

    graph = Index(ndim=index.snapshot().rows.shape[1], metric="ip", dtype="f16")
    for hits, rows in _blocks(index):
        graph.add(np.array([hit.id for hit in hits]), rows)
    graph.save(os.fspath(path))


EXPORTS: dict[str, Any] = {"npy": to_npy, "parquet": to_parquet, "qdrant": to_qdrant, "usearch": to_usearch}


def _blocks(index: ImageIndex) -> Iterator[tuple[list[Hit], np.ndarray]]:
    """Images, and their rows in float32."""
    hits, rows = list(index), index.snapshot().rows
    for start in range(0, len(hits), EXPORTED):
        some = hits[start : start + EXPORTED]
        yield some, rows[[hit.id for hit in some]].astype(np.float32)


def _table(hits: list[Hit]) -> pa.Table:
    """Names that are no Unicode are written with escapes."""
    columns = {name: [getattr(hit, name) for hit in hits] for name in ("id", "width", "height", "modified")}
    paths = [os.fsencode(hit.path).decode("utf-8", "backslashreplace") for hit in hits]
    return pa.table({"path": paths, **columns})
