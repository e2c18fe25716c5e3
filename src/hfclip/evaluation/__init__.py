"""Evaluations. One is a file with one task, `task(model, processor, data, **options) -> Result`.

    zero_shot.py    accuracy of a prompt-ensembled classifier on labelled images
    retrieval.py    recall between images and their captions

A task embeds its data by `hfclip.embeddings.embed`: processes share the work, and all return the same. Another one needs no
change elsewhere: whoever shows results asks them for their `headline`.

    def alignment(model, processor, data, **options):
        found = embed(model, processor, data, **options)
        cosines = (found.image_embeds * found.text_embeds[found.offsets[:-1]]).sum(1)
        return Result({"mean_cosine": cosines.mean()}, headline="mean_cosine")
"""

from .task import Result, all_metrics, headlines


__all__ = ["Result", "all_metrics", "headlines"]
