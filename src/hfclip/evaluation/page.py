"""A report as one page of HTML: no scripts, nothing fetched, light and dark."""

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .plots import Drawing


@dataclass
class Table:
    title: str
    columns: list[str]
    rows: list[list[Any]]

    @classmethod
    def of_rows(cls, title: str, rows: Sequence[Mapping[str, Any]]) -> "Table":
        """A table of mappings from column to cell."""
        columns = list(dict.fromkeys(key for row in rows for key in row))
        return cls(title, columns, [[row.get(column) for column in columns] for row in rows])


@dataclass
class Section:
    """A part of a report; `folded` ones are details of one result."""

    title: str
    text: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    drawings: list[Drawing] = field(default_factory=list)
    folded: bool = False


def show(value: Any) -> str:
    """A number or word of a table."""
    if value is None:
        return ""
    if isinstance(value, float):
        size = abs(value)
        return f"{value:.2f}" if 1 <= size < 1000 else f"{value:.4f}" if 1e-3 <= size < 1 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else words(value)


def words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {part}" for name, part in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
<header><h1>{title}</h1><nav>{links}</nav></header>
<main>
{sections}
</main>
</html>
"""
_STYLE = """
:root { color-scheme: light dark; --ink: light-dark(#1b2430, #e6e9ee); --soft: light-dark(#5d6b7c, #9aa7b6);
  --line: light-dark(#e2e6eb, #2c3542); --paper: light-dark(#ffffff, #12171e); --panel: light-dark(#f6f8fa, #1a212b);
  --accent: light-dark(#0a61a8, #6cb6ff); }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); line-height: 1.55;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
header, main { max-width: 68rem; margin: 0 auto; padding: 0 1.5rem; }
header { padding-top: 3rem; }
h1 { font-size: 1.9rem; line-height: 1.2; letter-spacing: -0.02em; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; letter-spacing: -0.01em; margin: 3rem 0 0.75rem; }
h3 { font-size: 0.95rem; font-weight: 600; margin: 1.5rem 0 0.5rem; color: var(--soft); }
nav { display: flex; flex-wrap: wrap; gap: 0.4rem 1.2rem; padding-bottom: 1rem; border-bottom: 1px solid var(--line); }
a { color: var(--accent); text-decoration: none; } a:hover { text-decoration: underline; }
p { margin: 0.4rem 0; max-width: 46rem; } p.note { color: var(--soft); font-size: 0.9rem; }
.scroll { overflow: auto; max-height: 32rem; border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.42rem 0.8rem; text-align: left; white-space: nowrap; border-bottom: 1px solid var(--line); }
tr:last-child td { border-bottom: 0; }
th { position: sticky; top: 0; background: var(--panel); font-weight: 600; }
td.number, th.number { text-align: right; } td.best { font-weight: 700; } td.long { white-space: normal; min-width: 16rem; }
tbody tr:hover td { background: var(--panel); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr)); gap: 1.5rem; margin-top: 1.5rem; }
figure { margin: 0; padding: 1rem; border: 1px solid var(--line); border-radius: 8px; }
figure svg { width: 100%; max-width: 46rem; height: auto; display: block; color: var(--ink); }
figure svg text { font-family: inherit !important; }
figcaption { display: flex; justify-content: space-between; font-size: 0.85rem; color: var(--soft); margin-top: 0.5rem; }
details { border: 1px solid var(--line); border-radius: 8px; padding: 0 1rem; margin: 0.6rem 0; }
details[open] { padding-bottom: 1rem; }
summary { cursor: pointer; padding: 0.7rem 0; font-weight: 600; overflow-wrap: anywhere; }
main { padding-bottom: 5rem; }
@media print { .scroll { max-height: none; } details { break-inside: avoid; } }
"""


def as_html(title: str, sections: Sequence[Section]) -> str:
    """The page; tables can be scrolled, plots are SVG in it and PNG to be saved."""
    open_ones = [(number, section) for number, section in enumerate(sections) if not section.folded]
    links = "".join(f'<a href="#s{number}">{html.escape(section.title)}</a>' for number, section in open_ones)
    parts, details_begun = [], False
    for number, section in enumerate(sections):
        body = _body(section, number)
        if section.folded:
            parts.append("" if details_begun else "<h2>Details</h2>")
            parts.append(f"<details><summary>{html.escape(section.title)}</summary>{body}</details>")
            details_begun = True
        else:
            parts.append(f'<section id="s{number}"><h2>{html.escape(section.title)}</h2>{body}</section>')
    return _PAGE.format(title=html.escape(title), style=_STYLE, links=links, sections="\n".join(parts))


def _body(section: Section, number: int) -> str:
    parts = [f'<p class="note">{html.escape(sentence)}</p>' for sentence in section.text]
    parts += [_table(table) for table in section.tables]
    figures = []
    for place, drawing in enumerate(section.drawings):
        png = base64.b64encode(drawing.png).decode()
        # Names within an SVG are of the whole page.
        svg = _own_names(drawing.svg, f"s{number}-{place}")
        name = html.escape(drawing.title)
        figures.append(
            f'<figure>{svg}<figcaption>{name}<a download="{name}.png" href="data:image/png;base64,{png}">PNG</a>'
            "</figcaption></figure>"
        )
    return "".join([*parts, f'<div class="plots">{"".join(figures)}</div>' if figures else ""])


def _own_names(svg: str, prefix: str) -> str:
    return (
        svg.replace('id="', f'id="{prefix}-')
        .replace("url(#", f"url(#{prefix}-")
        .replace('href="#', f'href="#{prefix}-')
    )


def _table(table: Table) -> str:
    numeric = [any(_is_number(row[place]) for row in table.rows) for place in range(len(table.columns))]
    classes = [' class="number"' if is_number else "" for is_number in numeric]
    head = "".join(
        f"<th{kind}>{html.escape(str(name))}</th>" for kind, name in zip(classes, table.columns, strict=True)
    )
    rows = []
    for row in table.rows:
        cells = []
        for value, kind in zip(row, classes, strict=True):
            text = show(value)
            kind = ' class="long"' if len(text) > 40 else kind
            cells.append(f"<td{kind}>{html.escape(text)}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    title = f"<h3>{html.escape(table.title)}</h3>" if table.title else ""
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'{title}<div class="scroll"><table>{body}</table></div>'


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
