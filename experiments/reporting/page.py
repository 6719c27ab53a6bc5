"""A report as one HTML page that needs no other file and no network."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from experiments.reporting.tables import Cell, Number, Table

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; margin: 2rem auto; max-width: 1500px;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .82rem; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: left;
  vertical-align: top; white-space: nowrap; }
th { cursor: pointer; background: #f4f4f4; }
th:first-child, td:first-child { position: sticky; left: 0; background: #fff; }
th:first-child { background: #f4f4f4; }
th[aria-sort=ascending]::after { content: " ▲"; } th[aria-sort=descending]::after { content: " ▼"; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
td.missing { color: #a33; } td.long { min-width: 20rem; white-space: normal; }
td.command { font: .75rem ui-monospace, monospace; min-width: 44rem;
  white-space: normal; }
figure { display: inline-block; margin: .6rem; } figcaption { font-size: .8rem; color: #555; }
img { max-width: 660px; width: 100%; }
"""
_SORT = """
for (const head of document.querySelectorAll("th")) head.addEventListener("click", () => {
  const table = head.closest("table"), body = table.tBodies[0], column = head.cellIndex;
  const up = head.getAttribute("aria-sort") !== "ascending";
  for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const key = (row) => {
    const cell = row.cells[column], value = cell.dataset.value;
    return value === undefined ? cell.textContent : value === "" ? NaN : Number(value);
  };
  const compare = (a, b) => {
    if (typeof a === "string" || typeof b === "string")
      return String(up ? a : b).localeCompare(String(up ? b : a), undefined, { numeric: true });
    if (isNaN(a) || isNaN(b)) return isNaN(a) - isNaN(b);
    return up ? a - b : b - a;
  };
  [...body.rows].sort((a, b) => compare(key(a), key(b))).forEach((row) => body.append(row));
});
"""


def page(title: str, listed: Sequence[Table], figures: Sequence[Path], notes: Sequence[str]) -> str:
    """The page.

    Args:
        title: its title.
        listed: the tables, which a reader sorts by a click on a heading.
        figures: PNG files, which become part of the page.
        notes: lines below the tables.
    """
    parts = [f"<h1>{html.escape(title)}</h1>"]
    for table in listed:
        parts += [f"<h2>{html.escape(table.title)}</h2>", _table(table)]
    parts += [f"<p>{html.escape(note)}</p>" for note in notes]
    parts += ["<h2>Figures</h2>", *map(_figure, figures)]
    body = "\n".join(parts)
    return f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style></head>
<body>
{body}
<script>{_SORT}</script>
</body>
</html>
"""


def _table(table: Table) -> str:
    heads = "".join(f"<th>{html.escape(head)}</th>" for head in table.heads)
    rows = "\n".join("<tr>" + "".join(map(_cell, table.heads, row)) + "</tr>" for row in table.rows)
    return (
        f'<div class="scroll"><table><thead><tr>{heads}</tr></thead>\n'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _cell(head: str, cell: Cell) -> str:
    text = html.escape(str(cell))
    if isinstance(cell, Number):
        value = "" if cell.mean is None else repr(float(cell.mean))
        return f'<td class="number" data-value="{value}">{text}</td>'
    if isinstance(cell, int) or text.isdecimal():
        return f'<td class="number" data-value="{text}">{text}</td>'
    long = "long" if len(text) > 40 else "text"
    kind = "command" if head == "command" else "missing" if "missing" in text else long
    return f'<td class="{kind}">{text}</td>'


def _figure(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    name = html.escape(path.stem.replace("_", " "))
    return (
        f'<figure><img alt="{name}" src="data:image/png;base64,{data}">'
        f"<figcaption>{name}</figcaption></figure>"
    )
