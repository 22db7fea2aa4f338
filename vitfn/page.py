"""Pages that need no other file, no network and no script."""

import os
from collections.abc import Iterable
from html import escape
from typing import Any

from vitfn.errors import printable
from vitfn.files import replacing

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5b6470; --line: #d5dae0; --ground: #fff; --panel: #f5f7f9;
  --wrong: #b3400a; --right: #00669e }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ed; --soft: #a2abb6; --line: #3a424c; --ground: #14171b; --panel: #1d2228; --wrong: #ff9a5c;
    --right: #6cc0f5 }
  .picture { filter: invert(1) hue-rotate(180deg) } }
* { box-sizing: border-box }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
main { max-width: 1160px; margin: auto; padding: 1.5rem 1rem 3rem }
h1 { margin: 0; overflow-wrap: anywhere } h2 { margin: 2rem 0 .6rem; font-size: 1.15rem } p { margin: .2rem 0 }
img { display: block; width: 100%; height: auto }
.soft, figcaption, th, dt { color: var(--soft) }
.note { padding: .6rem .8rem; border-left: 4px solid var(--wrong); background: var(--panel) }
.numbers { display: flex; flex-wrap: wrap; gap: .6rem; margin: 1.2rem 0 }
.numbers div { flex: 1 1 9rem; padding: .6rem .8rem; background: var(--panel); border-radius: 6px }
.numbers dd { margin: 0; font-size: 1.5rem; font-variant-numeric: tabular-nums }
.numbers small { display: block; font-size: .85rem }
.pair { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); gap: 0 2rem }
.pair > * { min-width: 0 }
.table { max-height: 27rem; overflow: auto }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .6rem .2rem 0; text-align: right; border-bottom: 1px solid var(--line) }
th { position: sticky; top: 0; background: var(--ground); font-weight: 600 }
td:first-child, .words td { overflow-wrap: anywhere; min-width: 5.2rem }
th:first-child, td:first-child, .words td, .words th { text-align: left }
@media (max-width: 30rem) { table { font-size: .85rem } th, td { padding-right: .4rem } }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: .8rem }
.samples figure { margin: 0; padding: .5rem; border: 1px solid var(--line); border-radius: 6px; break-inside: avoid }
.samples .wrong { border: 2px dashed var(--wrong) } .wrong b { color: var(--wrong) } .right b { color: var(--right) }
.samples img { height: 7.5rem; object-fit: contain }
figcaption { margin-top: .4rem; font-size: .85rem; line-height: 1.35; overflow-wrap: anywhere }
pre { margin: 0; padding: .8rem; background: var(--panel); border-radius: 6px; white-space: pre-wrap;
  overflow-wrap: anywhere; user-select: all }
@media print { body { font-size: 11px } .table { max-height: none; overflow: visible } tr, img { break-inside: avoid }
  h2 { break-after: avoid } .pair { grid-template-columns: 1fr 1fr } }
"""


def write(path: str | os.PathLike, title: str, subtitle: str, notes: Iterable[str], body: str) -> None:
    """The page at `path`, whole or not at all; of `notes` each is shown once, above the body (HTML)."""
    text_of_notes = "".join(f'<p class="note">{text(note)}</p>' for note in dict.fromkeys(notes))
    whole = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{text(title)}</title><style>{_STYLE}</style></head><body><main>
<h1>{text(title)}</h1><p class="soft">{text(subtitle)}</p>
{text_of_notes}
{body}</main></body></html>
"""
    with replacing(path) as file:
        file.write(whole.encode(errors="replace"))


def text(value: Any) -> str:
    """Anything as text of the page: no markup, nothing that cannot be seen."""
    return escape(printable(str(value)))


def table(header: Iterable[str], rows: Iterable[Iterable[Any]], kind: str = "") -> str:
    head = "".join(f"<th>{name}</th>" for name in header)
    body = "".join("<tr>" + "".join(f"<td>{text(value)}</td>" for value in row) + "</tr>" for row in rows)
    return f'<div class="table"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def columns(parts: Iterable[str]) -> str:
    return '<div class="pair">' + "".join(f"<div>{part}</div>" for part in parts if part) + "</div>"
