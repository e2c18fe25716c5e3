"""Tables and figures of the paper, filled with results beside its own numbers.

`paper.json` has a template each: columns and rows that say which result stands in a cell, and what the paper prints there, in
percent. A cell is what its row and its column say together: the task, the data set, the metric (None: the headline), or a
table of the result with the row and column in it.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .page import Section, Table
from .plots import draw
from .records import Record, models_of, slug
from .registry import published, published_models, registered
from .task import Plot


def templates() -> list[dict[str, Any]]:
    """The tables and figures of which there are templates."""
    return json.loads((Path(__file__).parent / "paper.json").read_text(encoding="utf-8"))


def fill(template: Mapping[str, Any], records: Sequence[Record]) -> Section | None:
    """A table or figure with the paper's rows and those of each model; None if no result belongs in it."""
    if "registry" in template:
        table, measured = _of_registry(template["registry"], records)
    elif "points" in template:
        table, measured = _of_points(template["points"], records)
    else:
        table, measured = _of_cells(template, records)
    if not measured:
        return None
    text = [template["note"]] if "note" in template else []
    text += ["Some of the paper's numbers are known from memory alone."] if template.get("unverified") else []
    drawing = _draw(template, table)
    title = f"{template['name']}: {template['title']}"
    return Section(title, text, [table], [drawing] if drawing else [])


def _of_cells(template: Mapping[str, Any], records: Sequence[Record]) -> tuple[Table, bool]:
    """A row of the paper, and below it one of each model that has a number for it."""
    columns, rows, measured = template["columns"], [], False
    for row in template["rows"]:
        rows.append([row["label"], *row.get("paper", [None] * len(columns))])
        for model in models_of(records) if "task" in row else ():
            values = [_value(_merged(row, column), records, model) for column in columns]
            if any(value is not None for value in values):
                rows.append([f"{row['label']}, {model}", *values])
                measured = True
    return Table("", ["", *(column["label"] for column in columns)], rows), measured


def _of_registry(task: str, records: Sequence[Record]) -> tuple[Table, bool]:
    """A row per data set of the paper, with its numbers of each model, and the results."""
    known, models = [name for name in published_models() if any(_papers(task, name))], models_of(records)
    rows, measured = [], False
    for row in registered().values():
        if row.group == "paper":
            values = [
                _value({"task": task, "data": row.name, "metric": row.metric}, records, model) for model in models
            ]
            rows.append([row.title, *(dict(_papers(task, name)).get(row.name) for name in known), *values])
            measured |= any(value is not None for value in values)
    return Table("", ["", *(f"paper {name}" for name in known), *models], rows), measured


def _papers(task: str, model: str) -> Iterator[tuple[str, float]]:
    for name in registered():
        for row in published(task, name, model):
            if row.kind == "paper":
                yield name, 100 * row.value


def _of_points(points: Mapping[str, str], records: Sequence[Record]) -> tuple[Table, bool]:
    """The rows of a table of all results of a task."""
    rows = []
    for record in records:
        if record.result["task"] == points["task"]:
            about = {"model": record.result["model"].get("name", ""), "data": record.result["data"][0]["name"]}
            rows += [about | row for row in record.result["tables"].get(points["table"], [])]
    return Table.of_rows("", rows), bool(rows)


def _merged(row: Mapping[str, Any], column: Mapping[str, Any]) -> dict[str, Any]:
    """What a cell holds."""
    where = {**column.get("where", {}), **row.get("where", {})}
    return {**column, **row, "task": column.get("tasks", {row["task"]: row["task"]}).get(row["task"]), "where": where}


def _value(cell: Mapping[str, Any], records: Sequence[Record], model: str) -> float | None:
    """The number of a cell, in percent unless its template says otherwise."""
    found = next(filter(None, (_look_up(cell, record) for record in records if _is_of(record, model))), None)
    if found is None:
        return None
    value = found[0] * cell.get("scale", 100)
    if "minus" in cell:
        other = (
            _value({**cell, "minus": None, **cell["minus"]}, records, cell["minus"]["model"]) if cell["minus"] else 0.0
        )
        return None if other is None else value - other
    return value


def _is_of(record: Record, model: str) -> bool:
    return slug(record.result["model"].get("name", "")) == slug(model)


def _look_up(cell: Mapping[str, Any], record: Record) -> tuple[float] | None:
    result = record.result
    names = [part.get("registered", part["name"]) for part in result["data"]]
    names = names[1:] if result["task"] == "frames" else names  # after the reference
    if "table" in cell:
        columns = cell["column"] if isinstance(cell["column"], list) else [cell["column"]]
        for row in result["tables"].get(cell["table"], []) if result["task"] == cell["task"] else ():
            if all(str(row.get(key)).lower() == wanted.lower() for key, wanted in cell["where"].items()):
                return (sum(row[column] for column in columns),)
        return None
    if result["task"] == cell["task"] and names == [cell["data"]]:
        value = result["metrics"].get(cell.get("metric") or result["headline"])
        return None if value is None else (value,)
    if cell["task"] == "zero-shot" and result["task"] == "robustness":
        for row in result["tables"].get("robustness", []):
            if row.get("set") == cell["data"]:
                return (row["top1"],)
    return None


def _draw(template: Mapping[str, Any], table: Table) -> Any:
    """The drawing of a figure."""
    if template.get("plot") == "bar":
        rows = [
            {"set": name, "points": value, "whose": "paper" if place == 0 else row[0]}
            for place, row in enumerate(table.rows)
            for name, value in zip(table.columns[1:], row[1:], strict=True)
        ]
        return draw(Plot("rows", "set", "points", "whose", kind="bar", title=template["title"]), {"rows": rows})
    if "plot" in template:
        rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
        return draw(Plot("rows", title=template["title"], **template["plot"]), {"rows": rows})
    return None
