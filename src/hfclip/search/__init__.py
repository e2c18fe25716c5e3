"""Images in folders, found by words and by images.

    index = ImageIndex.build("~/photos", model="clip-b32")
    for hit in index.search("two parrots + beach - 2:people", top_k=20, where="after=2020").hits:
        print(hit.path, hit.score)

folders -> `scan`: files, and what is no file -> `update`: those that are new by path, size, time and content -> read,
hashed, decoded and embedded by `hfclip.embeddings`, chunk by chunk -> `store`: rows and tables of the next generation.
query -> `query`: weighted unit embeddings of words and images, summed -> one product with all rows, float16 as they are
mapped -> the best, computed anew in float32 -> `index`: hits, and how many of them are strong.

docs/search.md describes the files, and what was measured.
"""

from .index import Found, Hit, ImageIndex
from .query import Query, parse_query
from .update import Counts


__all__ = ["Counts", "Found", "Hit", "ImageIndex", "Query", "parse_query"]
