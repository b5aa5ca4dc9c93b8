"""Pieces of an HTML page: escaped text, tables, sections, the frame with its style sheet.

Knows HTML and CSS; nothing of what the page says. The page loads nothing from anywhere and runs no
script; its Content-Security-Policy has browsers enforce that.
"""

import html
import re
from collections.abc import Iterable, Sequence

DASH = "\u2013"
"""Stands where a table has no value."""

_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def escape(value: str) -> str:
    """Text for an element or a quoted attribute; what no page may hold becomes U+FFFD."""
    return html.escape(_UNPRINTABLE.sub("\ufffd", value), quote=True)


def shorten(value: str, longest: int) -> str:
    """At most `longest` characters, with an ellipsis where something was cut off."""
    return value if len(value) <= longest else value[: longest - 1].rstrip() + "\u2026"


def percent(share: float) -> str:
    """A share of 0 to 1 with one decimal place."""
    return f"{100 * share:.1f} %"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numeric: Sequence[int] = ()) -> str:
    """A table whose first column names the rows. Cells are HTML; `numeric` columns are aligned."""
    names = "".join(
        f'<th scope="col"{_number(number, numeric)}>{cell}</th>' for number, cell in enumerate(head)
    )
    lines = []
    for first, *rest in rows:
        cells = "".join(
            f"<td{_number(number, numeric)}>{cell}</td>" for number, cell in enumerate(rest, 1)
        )
        lines.append(f'<tr><th scope="row"{_number(0, numeric)}>{first}</th>{cells}</tr>')
    return (
        f'<div class="scroll"><table><thead><tr>{names}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _number(column: int, numeric: Sequence[int]) -> str:
    return ' class="n"' if column in numeric else ""


def section(title: str, *body: str) -> str:
    """A part of the page under its heading. `title` is text, `body` HTML."""
    return f"<section><h2>{escape(title)}</h2>{''.join(body)}</section>"


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of plain text."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def figure(title: str, note: str, chart: str) -> str:
    """A chart (HTML) with its title and a note (text) on how to read it."""
    return (
        f"<figure><figcaption><b>{escape(title)}</b> <span>{escape(note)}</span></figcaption>"
        f"{chart}</figure>"
    )


def side_by_side(*parts: str) -> str:
    """Parts (HTML) beside each other where there is room, else below each other."""
    return f'<div class="pair">{"".join(f"<div>{part}</div>" for part in parts)}</div>'


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Names with their values, both text. Pairs without a value are left out."""
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in pairs
        if value
    )
    return f"<dl>{items}</dl>"


def page(title: str, body: str) -> str:
    """The whole document around a body (HTML)."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title>"
        f"<style>{_LIGHT}{_DARK}{_STYLE}{_CHARTS}{_NARROW}{_PRINT}</style></head>\n<body><main>{body}</main></body></html>\n"
    )


# Series colours are Okabe and Ito's, which colour-blind readers can tell apart, darker where they
# would be faint on white; charts add a marker of its own shape to each.
_LIGHT = """
:root { color-scheme: light dark;
  --page: #f4f6f8; --card: #fff; --ink: #1b1f24; --muted: #57606a; --line: #d5dae0;
  --none: #e8ebef; --right: #0067b0; --wrong: #c8500a; --inside: #fff;
  --c0: #0072b2; --c1: #d55e00; --c2: #00845f; --c3: #b0578d; --c4: #444b53; --c5: #a87700; }
"""
_DARK = """
@media screen and (prefers-color-scheme: dark) { :root {
  --page: #0f1318; --card: #181d24; --ink: #e6e9ed; --muted: #a0a9b4; --line: #343c46;
  --none: #262d36; --right: #5cb8f0; --wrong: #ff9a5c; --inside: #0f1318;
  --c0: #5cb8f0; --c1: #ff8a4c; --c2: #2fc79b; --c3: #e79fca; --c4: #c3cad2; --c5: #e6c229; } }
"""
_STYLE = """
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 24px 16px 48px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0 0 12px; }
h3 { font-size: .95rem; margin: 16px 0 8px; }
p { margin: 0 0 12px; max-width: 75ch; overflow-wrap: anywhere; }
p.lead { color: var(--muted); }
p.verdict { font-size: 1.08rem; max-width: 95ch; }
p.note, figcaption span { color: var(--muted); font-size: .88rem; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 18px 20px; margin-top: 16px; }
section > :last-child, .pair > div > :last-child { margin-bottom: 0; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr));
  gap: 10px 24px; margin: 0; }
dt { color: var(--muted); font-size: .82rem; }
dd { margin: 0; overflow-wrap: anywhere; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr));
  gap: 20px 32px; align-items: start; }
.pair > div { min-width: 0; }
.scroll { overflow-x: auto; margin-bottom: 12px; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: 5px 14px 5px 0;
  border-bottom: 1px solid var(--line); }
thead th { color: var(--muted); font-weight: 600; vertical-align: bottom; }
tbody th { font-weight: 500; }
.n { text-align: right; }
tbody .n { white-space: nowrap; }
.text { display: block; min-width: 16em; max-width: 46em; overflow-wrap: anywhere; }
.text + .text { margin-top: 4px; padding-top: 4px; border-top: 1px dotted var(--line); }
span.name { display: inline-block; min-width: 7em; overflow-wrap: anywhere; }
small { color: var(--muted); font-size: .85em; }
ol { columns: 17em; column-gap: 36px; margin: 0; padding-left: 2.6em; font-size: .85rem; }
ol li { overflow-wrap: anywhere; }
"""
_CHARTS = """
figure { margin: 0 0 12px; }
figcaption { margin-bottom: 6px; }
figcaption span { display: block; }
svg { display: block; width: 100%; max-width: 620px; height: auto; }
svg text { font-size: 13px; fill: var(--ink); unicode-bidi: isolate; }
svg .quiet { fill: var(--muted); }
svg .inside { fill: var(--inside); }
svg .axis { stroke: var(--line); stroke-width: 1; }
svg .reference { stroke: var(--ink); stroke-width: 1.5; stroke-dasharray: 6 4; }
svg .path { fill: none; stroke-width: 2; stroke-linejoin: round; }
svg .whisker { stroke-width: 2.5; stroke-linecap: round; }
svg .cell { shape-rendering: crispEdges; }
svg .none { fill: var(--none); }
svg .right { fill: var(--right); }
svg .wrong { fill: var(--wrong); }
""" + "".join(
    f"svg .c{number} {{ color: var(--c{number}); stroke: currentColor; fill: currentColor; }}\n"
    for number in range(6)
)
_NARROW = """
@media (max-width: 480px) { main { padding: 16px 10px 32px; } section { padding: 14px 12px; }
  table { font-size: .84rem; } th, td { padding-right: 8px; }
  span.name { min-width: 6em; } svg text { font-size: 14px; } }
"""
_PRINT = """
@media print { body { background: #fff; font-size: 10pt; } main { max-width: none; padding: 0; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  section { border: 0; border-top: 1px solid var(--line); border-radius: 0; padding: 10px 0; }
  .pair { grid-template-columns: 1fr 1fr; gap: 10px 24px; } th, td { padding-right: 8px; }
  .scroll { overflow: visible; } figure, tr { break-inside: avoid; }
  h2 { break-after: avoid; } }
"""
