"""A report as one HTML page that needs nothing else: no network, no script, readable on a phone, light and dark."""

import html
import re
from collections.abc import Mapping, Sequence

from moe3d_deploy.benchmarks.bench.text import Table

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --page: #ffffff; --line: #d0d7de; --soft: #f6f8fa; --bad: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --page: #0d1117; --line: #30363d; --soft: #161b22; --bad: #ff8a80; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; color: var(--ink); background: var(--page);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { background: var(--soft); } tr:last-child td { border-bottom: 0; }
.word { text-align: left; }
.note { font-size: .85rem; opacity: .8; }
.bad { color: var(--bad); font-weight: 600; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
.plots svg { width: 100%; height: auto; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; font-size: .9rem; }
dt { font-weight: 600; } dd { margin: 0; overflow-wrap: anywhere; }
pre { overflow-x: auto; font-size: .75rem; background: var(--soft); padding: 1rem; border-radius: 6px;
  max-height: 30rem; }
"""
_ID = re.compile(r"(id=\"|url\(#|href=\"#)([\w.-]+)")


def page(
    title: str,
    facts: Mapping[str, str],
    warnings: Sequence[str],
    tables: Sequence[Table],
    svgs: Mapping[str, str],
    data: str,
) -> str:
    """The page. `svgs` by name are put in as they are, all other text is escaped; `data` is the report itself."""
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1>",
        *(f'<p class="bad">{html.escape(warning)}</p>' for warning in warnings),
        "<dl>" + "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in facts.items()) + "</dl>",
    ]
    if svgs:
        drawn = (_own_ids(svg, name.partition(".")[0]) for name, svg in svgs.items())
        parts.append('<div class="plots">' + "\n".join(drawn) + "</div>")
    parts += [_table(table) for table in tables]
    parts += [
        "<h2>Data</h2>",
        f'<details><summary>The report, as JSON</summary><pre id="report">{html.escape(data)}</pre></details>',
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _table(table: Table) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        drawn = []
        for i, cell in enumerate(cells):
            word = ' class="word"' if i < table.words else ""
            drawn.append(f"<{tag}{word}>{html.escape(cell)}</{tag}>")
        return "<tr>" + "".join(drawn) + "</tr>"

    rows = "\n".join(row(cells, "td") for cells in table.rows)
    note = f'<p class="note">{_inline(table.note)}</p>' if table.note else ""
    head = row(table.header, "th")
    return (
        f'<h2>{html.escape(table.title)}</h2>\n<div class="scroll"><table>\n<thead>{head}</thead>\n'
        f"<tbody>{rows}</tbody>\n</table></div>\n{note}"
    )


def _inline(text: str) -> str:
    """Escaped, with Markdown's code spans."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


def _own_ids(svg: str, prefix: str) -> str:
    """The SVG with names of its own, as all of a page share one space of names."""
    return _ID.sub(rf"\g<1>{prefix}-\2", svg)
