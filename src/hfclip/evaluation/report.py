"""Results as a report: tables beside published numbers, plots, and what they were made of.

    write_report("results", "report")      # report.md, report.html, results.csv, openclip.csv, plots/*.png, *.svg

records -> sections of text, tables and drawings -> markdown, one page of HTML without links to anywhere. Numbers of files
are those of the records; nothing is computed here but differences.
"""

import csv
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from .page import Section, Table, as_html, show, words
from .paper import fill, templates
from .plots import draw, draw_array, draw_overview
from .records import Record, models_of, read_all, slug
from .registry import compare, published, registered, tell_protocol
from .task import Plot


ROWS_OF_MARKDOWN = 30  # of a table; the page has all


def write_report(results: str | os.PathLike, out: str | os.PathLike) -> Path:
    """Writes the report of all results below a folder, and returns its page.

    Raises:
        UsageError: there are no results, or matplotlib is missing.
    """
    records, out = read_all(results), Path(out).expanduser()
    sections = build_sections(records)
    (out / "plots").mkdir(parents=True, exist_ok=True)
    title = f"Evaluation of {', '.join(models_of(records)) or 'results'}"
    plots = {}
    for number, (section, drawing) in enumerate((s, d) for s in sections for d in s.drawings):
        name = plots[id(drawing)] = f"plots/{number:03d}-{slug(section.title)[:40]}-{slug(drawing.title)[:40]}"
        (out / f"{name}.png").write_bytes(drawing.png)
        (out / f"{name}.svg").write_text(drawing.svg, encoding="utf-8")
    (out / "report.md").write_text(as_markdown(title, sections, plots), encoding="utf-8")
    (out / "report.html").write_text(as_html(title, sections), encoding="utf-8")
    _write_csv(out / "results.csv", *_long_table(records))
    _write_csv(out / "openclip.csv", *_openclip_table(records))
    return out / "report.html"


def build_sections(records: Sequence[Record]) -> list[Section]:
    """The parts of a report: an overview of each task, each result, and what made them."""
    sections = []
    for task, of_task in _grouped(records, lambda record: record.result["task"]):
        sections.append(_overview(task, of_task))
    sections += [section for template in templates() if (section := fill(template, records))]
    sections += [_details(record) for record in records]
    return [*sections, _provenance(records)]


def _overview(task: str, records: list[Record]) -> Section:
    """The headline of each data set by model, beside the paper's numbers; fractions in percent, counts as they are."""
    models = list(dict.fromkeys(record.result["model"].get("name", "results") for record in records))
    architectures = {record.result["model"].get("architecture") for record in records} - {None}
    papers = {f"paper {model}": (model, "paper") for model in sorted(architectures)}
    papers |= {f"released {model}": (model, "released") for model in sorted(architectures)}
    rows, drawn = [], []
    for data, of_data in _grouped(records, _label):
        first = of_data[0].result
        measured = {record.result["model"].get("name", "results"): record.headline for record in of_data}
        known = registered().get(first["data"][0].get("registered"))
        numbers = {}
        for name, (model, kind) in papers.items():
            found = published(task, known.name, model) if known else []
            found = [row.value for row in found if row.kind == kind and row.metric == first["headline"]]
            numbers |= {name: found[0]} if found else {}
        values = {
            name: 100 * value if isinstance(value, float) else value for name, value in (measured | numbers).items()
        }
        cells = [values.get(name) for name in [*models, *papers]]
        rows.append([data, first["headline"], *cells, tell_protocol(first) or ""])
        drawn.append((data, {name: value for name, value in values.items() if isinstance(value, float)}))
    used = [place for place in range(len(rows[0])) if any(row[place] not in (None, "") for row in rows)]
    columns = ["data", "metric", *models, *papers, "protocol"]
    table = Table("", [columns[place] for place in used], [[row[place] for place in used] for row in rows])
    drawings = [draw_overview(drawn, f"{task}, in percent")] if any(values for _, values in drawn) else []
    return Section(task, ["In percent."] if drawings else [], [table], drawings)


def _details(record: Record) -> Section:
    result = record.result
    title = f"{result['task']}: {_label(record)}, {result['model'].get('name', '')}".rstrip(", ")
    text = [*result["notes"], *map(str, compare(result))]
    text += [said for said in [tell_protocol(result)] if said]
    rows = [[name, value] for name, value in record.metrics.items()]
    tables = [
        Table("metrics", ["metric", "value"], rows),
        *(Table.of_rows(name.replace("_", " "), rows) for name, rows in result["tables"].items()),
    ]
    facts = {**result["options"], **result["protocol"], "precision": result.get("precision")}
    told = [[name, words(value)] for name, value in facts.items() if value is not None]
    tables += [Table("protocol and options", ["name", "value"], told)] if told else []
    drawings = [draw(Plot(**plot), result["tables"]) for plot in result["plots"]]
    drawings += [draw_array(name, array) for name, array in record.arrays.items()]
    return Section(title, text, tables, [drawing for drawing in drawings if drawing], folded=True)


def _provenance(records: Sequence[Record]) -> Section:
    """What the numbers were made of."""
    about = {
        record.result["model"].get("name"): record.result["model"] for record in records if record.result["model"]
    }
    columns = ["name", "architecture", "parameters", "revision", "fingerprint"]
    models = [
        [words(model.get(column, ""))[:16] if column == "fingerprint" else model.get(column) for column in columns]
        for model in about.values()
    ]
    versions = dict(itertools.chain.from_iterable(record.result["versions"].items() for record in records))
    runs = [
        [record.result["task"], _data_name(record), record.result["model"].get("name"), *map(record.run.get, RUN)]
        for record in records
    ]
    return Section(
        "What made the numbers",
        [", ".join(f"{name} {version}" for name, version in versions.items())],
        [Table("models", columns, models), Table("runs", ["task", "data", "model", *RUN], runs)],
        folded=True,
    )


RUN = ("date", "seconds", "processes", "device")


def as_markdown(title: str, sections: Sequence[Section], plots: dict[int, str]) -> str:
    """The report as markdown; `plots` are names of files by the identity of a drawing."""
    lines = [f"# {title}", ""]
    for section in sections:
        lines += [f"## {section.title}", "", *(f"{sentence}\n" for sentence in section.text)]
        for table in section.tables:
            lines += [f"**{table.title}**\n"] if table.title else []
            lines += [_row(table.columns), _row(["---"] * len(table.columns))]
            lines += [_row(map(show, row)) for row in table.rows[:ROWS_OF_MARKDOWN]]
            left = len(table.rows) - ROWS_OF_MARKDOWN
            lines += ["", f"... and {left} more rows."] if left > 0 else []
            lines.append("")
        lines += [f"![{drawing.title}]({plots[id(drawing)]}.png)\n" for drawing in section.drawings]
    return "\n".join(lines)


def _row(cells: Any) -> str:
    return f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in cells)} |"


def _data_name(record: Record) -> str:
    return " + ".join(part["name"] for part in record.result["data"])


def _label(record: Record) -> str:
    """Its data, and the options that tell it from other results of them."""
    options = record.path.stem.removeprefix(record.result["task"]).strip("-") if record.path else ""
    return f"{_data_name(record)} ({options})" if options else _data_name(record)


def _grouped(records: Sequence[Record], key: Any) -> list[tuple[str, list[Record]]]:
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return list(groups.items())


def _long_table(records: Sequence[Record]) -> tuple[list[str], list[list]]:
    """A row per metric."""
    rows = []
    for record in records:
        about = [record.result["model"].get("name"), record.result["task"], _data_name(record)]
        rows += [[*about, name, value, record.result["identity"]] for name, value in record.metrics.items()]
    return ["model", "task", "dataset", "metric", "value", "identity"], rows


def _openclip_table(records: Sequence[Record]) -> tuple[list[str], list[list]]:
    """A row per model under OpenCLIP's names of columns; their average is over 38 sets, and left empty."""
    columns = [row.openclip_column for row in registered().values() if row.openclip_column]
    rows = []
    for model in models_of(records):
        values = {}
        for record in records:
            data = record.result["data"][0].get("registered") if len(record.result["data"]) == 1 else None
            if data is None or record.result["model"].get("name") != model:
                continue
            column, metrics = registered()[data].openclip_column, record.metrics
            if record.result["task"] == "zero-shot":
                values[column] = metrics.get(registered()[data].metric, record.headline)
            elif record.result["task"] == "retrieval":
                both = [metrics[f"{side}_retrieval_recall@1"] for side in ("text", "image")]
                values[column] = sum(both) / 2
        if values:
            rows.append([model, "", "", *(values.get(column, "") for column in columns)])
    return ["name", "pretrained", "Average perf. on 38 datasets", *columns], rows


def _write_csv(path: Path, columns: list[str], rows: list[list]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)


TASKS_OF_THE_HUB = {
    "retrieval": "zero-shot-retrieval",
    "linear-probe": "image-classification",
    "few-shot": "image-classification",
}


def as_eval_results(records: Sequence[Record]) -> list[EvalResult]:
    """The headlines in the form of model cards, for `model-index`."""
    return [
        EvalResult(
            task_type=TASKS_OF_THE_HUB.get(record.result["task"], "zero-shot-image-classification"),
            dataset_type=record.result["data"][0].get("registered") or _data_name(record),
            dataset_name=f"{_data_name(record)} ({record.result['task']})",
            metric_type=record.result["headline"],
            metric_value=round(record.headline, 4),
        )
        for record in records
    ]
