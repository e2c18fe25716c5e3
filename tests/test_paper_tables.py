"""The paper's tables and figures, filled by small results."""

import pytest

from hfclip.evaluation import Result
from hfclip.evaluation.fairness import _word as word_of
from hfclip.evaluation.page import as_html
from hfclip.evaluation.paper import fill, templates
from hfclip.evaluation.records import Record, record_of


TEMPLATES = {template["name"]: template for template in templates()}


def result(task: str, data: str, metrics: dict | None = None, model: str = "tiny", **tables) -> Record:
    metrics = metrics or {"top1": 0.125}
    about = {"task": task, "model": {"name": model}, "data": [{"name": data}], "options": {}, "identity": "0"}
    return record_of(Result(metrics, next(iter(metrics)), tables), about)


def rows_of(name: str, *records: Record) -> dict[str, list]:
    section = fill(TEMPLATES[name], records)
    (table,) = section.tables
    return {"columns": table.columns, **{row[0]: row[1:] for row in table.rows}}


def test_the_papers_tables_and_figures_have_templates():
    tables = {f"Table {number}" for number in (1, 3, 4, 5, 6, 7, 10, 11, 13, 14, 15, 16)}
    assert TEMPLATES.keys() == tables | {f"Figure {number}" for number in (5, 6, 7, 9)}
    for template in TEMPLATES.values():
        for row in template.get("rows", ()):
            assert len(row.get("paper", template["columns"])) == len(template["columns"]), template["name"]
        assert fill(template, [result("other", "other")]) is None  # nothing of it was measured


def test_tables_of_data_sets_have_the_papers_rows_and_ours():
    found = rows_of("Table 1", result("zero-shot", "imagenet1k"), result("zero-shot", "imagenet1k", model="b"))
    assert found["Visual N-Grams"] == [72.4, 11.5, 23.0] and found["CLIP"] == [98.4, 76.2, 58.5]
    assert found["CLIP, tiny"] == [None, 12.5, None] == found["CLIP, b"]
    found = rows_of("Table 11", result("zero-shot", "fgvc_aircraft", {"top1": 0.5, "mean_per_class_recall": 0.25}))
    assert len(found) == 1 + 27 and found["columns"][-1] == "tiny"
    aircraft = dict(zip(found["columns"][1:], found["FGVC Aircraft"], strict=True))
    assert aircraft["tiny"] == 25 and aircraft["paper ViT-L/14@336px"] == pytest.approx(37.2)
    found = rows_of("Table 10", result("linear-probe", "food101"))
    assert found["Food-101"][0] == pytest.approx(95.9) and found["Food-101"][-1] == 12.5


def test_retrieval_and_robustness_take_their_own_metrics():
    recalls = {"text_retrieval_recall@1": 0.5, "image_retrieval_recall@1": 0.25}
    assert rows_of("Table 13", result("retrieval", "flickr30k", recalls))["CLIP, tiny"] == [50, 25, None, None]
    shifts = [{"set": "imagenetv2", "top1": 0.75}, {"set": "imagenet-a", "top1": 0.5}]
    several = result("robustness", "imagenet1k", {"shifted_top1": 0.6}, robustness=shifts)
    videos = result("frames", "imagenet-vid", {"pmk": 0.1, "pm0": 0.2})
    videos.result["data"].insert(0, {"name": "imagenet1k"})  # the reference comes first
    found = rows_of("Table 16", result("zero-shot", "imagenet1k"), several, videos)
    assert len(found["columns"]) == 11 and found["Linear-probe CLIP"][0] == 85.4
    assert found["Zero-shot CLIP, tiny"] == [12.5, 75, 50, None, None, None, 20, 10, None, None]


def test_tables_of_people_are_cells_of_a_results_tables():
    accuracy = [{"predicted": "gender", "group": "race", "value": "black", "accuracy": 0.5}]
    accuracy.append({"predicted": "race", "group": "white or not", "value": "white", "accuracy": 0.25})
    by_race = [{"labels": "default", "group": "race", "value": "black", "crime": 0.125, "non_human": 0.5}]
    by_age = [{"labels": "with child", "group": "age", "value": "0-2", "crime": 0.125, "non_human": 0.5}]
    tables = {"accuracy": accuracy, "labels_by_race": by_race, "labels_by_age": by_age}
    people = result("fairness", "fairface", {"race_accuracy": 0.5}, **tables)
    assert rows_of("Table 3", people)["Zero-shot CLIP, tiny"] == [25, None, None]
    assert rows_of("Table 5", people)["Zero-shot CLIP, tiny"][0] == 50
    found = rows_of("Table 6", people)
    assert found["crime, tiny"][0] == 12.5 and found["not human, tiny"][0] == 50 and found["not human"][0] == 14.4
    assert rows_of("Table 7", people)['with "child", tiny'][0] == 62.5


def test_columns_of_races_are_named_as_the_task_names_them():
    races = ("Black", "White", "Indian", "Latino_Hispanic", "Middle Eastern", "Southeast Asian", "East Asian")
    for name in ("Table 5", "Table 6"):
        columns = TEMPLATES[name]["columns"]
        assert {column["where"]["value"] for column in columns} == {word_of(race) for race in races}


def test_figures_are_drawn_from_the_same_numbers():
    probe = result("linear-probe", "cars", {"top1": 0.5}, model="ResNet-50")
    figure = fill(TEMPLATES["Figure 5"], [result("zero-shot", "cars", {"top1": 0.75}), probe])
    (paper, ours) = figure.tables[0].rows
    assert paper[1] == 28.9 and ours[:2] == ["zero-shot - probe, tiny", 25]
    curve = [{"shots": 1, "top1": 0.25}, {"shots": 4, "top1": 0.5}]
    shots = result("few-shot", "flowers", {"top1@4": 0.5, "shots_to_match_zero_shot": 2.5}, curve=curve)
    assert rows_of("Figure 7", shots)["images per class, tiny"][2] == 2.5
    scaling = result(
        "scaling", "results", {"r2": 0.9}, scaling=[{"compute": 1.0, "error": 0.5}, {"compute": 9.0, "error": 0.3}]
    )
    sections = [figure, fill(TEMPLATES["Figure 6"], [shots]), fill(TEMPLATES["Figure 9"], [scaling])]
    assert all(len(section.drawings) == 1 for section in sections)
    assert as_html("Tiny", sections).count("<svg") == 3
