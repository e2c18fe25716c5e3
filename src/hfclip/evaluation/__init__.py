"""Evaluations. One is a file with one task, `task(model, processor, data, **options) -> Result`, and a row of `tasks.TASKS`.

    zero_shot.py    accuracy of a prompt-ensembled classifier on labelled images
    retrieval.py    recall between images and their captions
    linear_probe.py    accuracy of a linear classifier on a model's features
    few_shot.py     the same on a few images per class, beside zero-shot
    robustness.py   one classifier under natural shift, against other models; corruptions.py: under corruptions, and words
    overlap.py      accuracy on images that the training data have, too
    fairness.py     accuracy and denigrating labels by groups of people
    scaling.py      error against compute, of stored results
    video.py        videos by their middle frame or the mean of frames

    task.py         Result: metrics, their headline, and tables, plots, arrays, protocol for a report
    tasks.py        the table of tasks; a task's keyword-only parameters are flags of `hfclip evaluate`
    data.py         data sets by name, their splits, labelled folders
    running.py      a task on a model and data by their names; what is stored is not computed again
    records.py      a result as a file
    shared.py       embeddings that tasks share: images without their labels, sentences that name classes
    logistic.py     logistic regression for many lambdas on the same data
    metrics.py      accuracy, average precision, ROC AUC, calibration ...: pure functions of scores and targets
    registry.py     the data sets that have names, and what was published of them
    report.py       results beside published numbers; page.py and plots.py show them
    paper.py        the paper's tables and figures, filled with results
    adapter.py      models of other libraries; mteb.py is ours as mteb takes it

A task embeds its data by `hfclip.embeddings.embed`: processes share the work, and all return the same. Another one needs no
change elsewhere: whoever shows results asks them for their `headline`.

    def alignment(model, processor, data, **options):
        found = embed(model, processor, data, **options)
        cosines = (found.image_embeds * found.text_embeds[found.offsets[:-1]]).sum(1)
        return Result({"mean_cosine": cosines.mean()}, headline="mean_cosine")
"""

from .data import DataSet
from .task import Plot, Result, all_metrics, headlines
from .tasks import TASKS


__all__ = ["TASKS", "DataSet", "Plot", "Result", "all_metrics", "headlines"]
