"""conformance, pictures: the panels of a failure as HTML and SVG that need no script, no font and no other file.

What is told by colour is told by a shape or a word as well, and every panel has its numbers as a table.
"""

import math
from collections.abc import Sequence
from html import escape
from typing import Any

SIDE, TOP, LOW = 86, 26, 8
"""Room at the left for the names of rows, above the bars and below them, in pixels."""
HEIGHT, LINE = 120, 18
"""Of the bars, and of a row of marks."""
WIDEST, NARROWEST, WHOLE = 46, 15, 620
"""Of a column, and of a panel whose columns have room."""
GAP = 12
"""Between groups."""
CLOSE = 0.5
"""Scores lie close together where they differ by less than this part of the smallest one."""
CLIPPED = 3
"""A bar of the subject ends at so many times the largest one of the reference, and an arrow says so."""


def panels_html(panels: Sequence[dict[str, Any]], subject: str) -> str:
    """The panels of one failure as figures."""
    return "\n".join(FORMS[panel["form"]](panel, subject) for panel in panels)


def number(value: Any) -> float:
    """A number of plain data, in which infinities and NaN are strings."""
    return float(value)


def shown(value: Any, digits: int = 4) -> str:
    """A number for a reader."""
    x = number(value)
    if math.isnan(x):
        return "NaN"
    if math.isinf(x):
        return "∞" if x > 0 else "-∞"
    return f"{x:.{digits}g}"


def _figure(panel: dict[str, Any], drawing: str, legend: str, numbers: str) -> str:
    note = f'<p class="note">{escape(panel["note"])}</p>' if panel.get("note") else ""
    label = escape(panel["title"])
    return (
        f'<figure class="panel"><figcaption>{label}</figcaption>{legend}'
        f'<div class="scroll" tabindex="0" role="group" aria-label="{label}">{drawing}</div>{note}{numbers}</figure>'
    )


# bars


def bars_html(panel: dict[str, Any], subject: str) -> str:
    """Bars of each column, the groups behind them, and a row of marks for each side's choice."""
    choosing, found = panel.get("choosing", False), panel.get("found", [])
    names = ["reference", subject]
    sides = [("wanted", "reference"), ("found", subject)] if found else []
    marks = [("both", "chosen by both"), ("alone", "by this side alone")] if panel.get("chosen_found") else []
    low, high = _range(panel)
    if low > 0 or high < 0:
        panel = panel | {"note": f"{panel.get('note', '')} The axis does not begin at 0.".strip()}
    legend = "".join(f'<span><span class="key {kind}"></span>{escape(name)}</span> ' for kind, name in sides + marks)
    legend = f'<p class="legend">{legend}</p>' if legend else ""
    return _figure(panel, _bars_svg(panel, names, choosing), legend, _bars_table(panel, names, choosing))


def _places(panel: dict[str, Any]) -> tuple[list[float], float, float]:
    """The left edge of each column, the width of one, and the right end."""
    n, groups = len(panel["columns"]), panel.get("groups", [])
    width = min(WIDEST, max(NARROWEST, WHOLE / max(1, n)))
    edges, x = [], float(SIDE)
    for place in range(n):
        if place and groups and groups[place] != groups[place - 1]:
            x += GAP
        edges.append(x)
        x += width
    return edges, width, x


def _bars_svg(panel: dict[str, Any], names: list[str], choosing: bool) -> str:
    wanted, found = panel["wanted"], panel.get("found", [])
    edges, width, end = _places(panel)
    low, high = _range(panel)
    scale = HEIGHT / (high - low)
    zero = TOP + (high - min(high, max(low, 0.0))) * scale
    bottom = TOP + HEIGHT + LOW
    parts = _groups_svg(panel, edges, width, bottom)
    parts.append(f'<line class="axis" x1="{SIDE}" x2="{end:.1f}" y1="{zero:.1f}" y2="{zero:.1f}"/>')
    parts += [
        f'<text class="tick" x="{SIDE - 6}" y="{TOP + (high - value) * scale + 4:.1f}">{shown(value, 3)}</text>'
        for value in dict.fromkeys((high, min(high, max(low, 0.0)), low))
    ]
    each = (width - 4) / (2 if found else 1)
    for place, edge in enumerate(edges):
        pair = [("wanted", wanted[place])] + ([("found", found[place])] if found else [])
        for side, (kind, value) in enumerate(pair):
            parts.append(_bar(kind, value, panel, place, edge + 2 + side * each, each, zero, scale, (low, high)))
        if place in panel.get("wrong", []):
            parts.append(f'<text class="wrong" x="{edge + width / 2:.1f}" y="{TOP - 3}">≠</text>')
    y = bottom + 13
    parts += [
        f'<text class="column" x="{edge + width / 2:.1f}" y="{y}">{escape(name)}</text>'
        for edge, name in zip(edges, panel["columns"], strict=True)
    ]
    if choosing:
        chosen = [panel.get("chosen", []), panel.get("chosen_found")]
        for name, own, other in zip(names, chosen, reversed(chosen), strict=True):
            if own is not None:
                y += LINE
                parts += _choice_svg(name, own, other, edges, width, y)
    what = f"{panel['title']}: {len(edges)} columns; the table below has the numbers."
    return (
        f'<svg class="bars" role="img" width="{end + 4:.0f}" height="{y + 8:.0f}" '
        f'viewBox="0 0 {end + 4:.0f} {y + 8:.0f}" aria-label="{escape(what)}">{"".join(parts)}</svg>'
    )


def _range(panel: dict[str, Any]) -> tuple[float, float]:
    """What the axis spans. 0 is on it, but for scores whose order is what matters and that lie close together.

    A subject's huge numbers do not make the reference's bars invisible.
    """
    own = [x for x in map(number, panel["wanted"]) if math.isfinite(x)]
    others = [x for x in map(number, panel.get("found", [])) if math.isfinite(x)]
    most = CLIPPED * max((abs(x) for x in own), default=0.0) or math.inf
    both = [*own, *(min(most, max(-most, x)) for x in others)] or [0.0]
    low, high = min(both), max(both)
    if panel.get("choosing") and high > low and high - low < CLOSE * min(abs(low), abs(high)) and low * high > 0:
        room = (high - low) / 4
        return (low - room, high) if low > 0 else (low, high + room)
    low, high = min(low, 0.0), max(high, 0.0)
    return (low, high) if high > low else (0.0, 1.0)


def _bar(
    kind: str, value: Any, panel: dict, place: int, x: float, width: float, zero: float, scale: float,
    span: tuple[float, float],
) -> str:  # fmt: skip
    """One bar with its number as a tooltip; a word where there is no bar to draw."""
    size, name = number(value), f"{panel['columns'][place]}: {shown(value, 6)}"
    if not math.isfinite(size):
        middle = x + width / 2
        return (
            f'<text class="none" x="{middle:.1f}" y="{zero - 3:.1f}">{shown(value)}<title>{escape(name)}</title></text>'
        )
    held, base = min(span[1], max(span[0], size)), min(span[1], max(span[0], 0.0))
    top, height = zero - max(held - base, 0) * scale, max(abs(held - base) * scale, 0.5)
    clipped = "" if held == size else f'<text class="none" x="{x + width / 2:.1f}" y="{top + 10:.1f}">↑</text>'
    marks = " differs" if place in panel.get("wrong", []) else ""
    return (
        f'<rect class="{kind}{marks}" x="{x:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:.1f}">'
        f"<title>{escape(name)}</title></rect>{clipped}"
    )


def _groups_svg(panel: dict[str, Any], edges: list[float], width: float, bottom: float) -> list[str]:
    """A box behind the columns of each group, with a word for who keeps it."""
    parts, groups = [], panel.get("groups", [])
    for group in dict.fromkeys(groups):
        own = [edge for edge, each in zip(edges, groups, strict=True) if each == group]
        left, right = own[0] - 3, own[-1] + width + 3
        word = _kept_word(panel, group)
        kind = "dropped" if word == "dropped" else "kept"
        label = f"group {group}: {word}" if right - left > 92 else f"{group} {'✓' if kind == 'kept' else '✕'}"
        kind += " differs" if "only" in word else ""
        parts.append(
            f'<rect class="group {kind}" x="{left:.1f}" y="12" width="{right - left:.1f}" height="{bottom - 8:.1f}">'
            f"<title>group {group}: {escape(word)}</title></rect>"
            f'<text class="group" x="{(left + right) / 2:.1f}" y="9">{escape(label)}</text>'
        )
    return parts


def _kept_word(panel: dict[str, Any], group: int) -> str:
    own, other = group in panel.get("kept", []), panel.get("kept_found")
    if other is None or (group in other) == own:
        return "kept" if own else "dropped"
    return "kept by the reference only" if own else "kept by the subject only"


def _choice_svg(
    name: str, own: Sequence[int], other: Sequence[int] | None, edges: list[float], width: float, y: float
) -> list[str]:
    """A row of marks under the columns that one side chooses; a square where the other side does not."""
    parts = [f'<text class="row" x="{SIDE - 6}" y="{y + 4}">{escape(name[:12])}</text>']
    for place in own:
        x = edges[place] + width / 2
        if other is None or place in other:
            parts.append(f'<circle class="chosen" cx="{x:.1f}" cy="{y}" r="5"><title>chosen</title></circle>')
        else:
            parts.append(
                f'<rect class="chosen alone" x="{x - 6:.1f}" y="{y - 6}" width="12" height="12">'
                "<title>chosen by this side alone</title></rect>"
            )
    return parts


def _bars_table(panel: dict[str, Any], names: list[str], choosing: bool) -> str:
    found, groups = panel.get("found", []), panel.get("groups", [])
    head = ["column", *(["group"] if groups else []), "reference", *([names[1]] if found else [])]
    head += ["chosen by"] if choosing else []
    rows = []
    for place, name in enumerate(panel["columns"]):
        cells = [f"{groups[place]}, {_kept_word(panel, groups[place])}"] if groups else []
        cells.append(shown(panel["wanted"][place], 7))
        if found:
            cells.append(shown(found[place], 7) + (" ≠" if place in panel.get("wrong", []) else ""))
        if choosing:
            who = [
                n for n, key in zip(names, ("chosen", "chosen_found"), strict=True) if place in (panel.get(key) or [])
            ]
            cells.append(", ".join(who))
        rows.append((name, cells))
    return _numbers(head, rows)


def _numbers(head: list[str], rows: list[tuple[str, list[str]]]) -> str:
    """A table behind a word that opens it."""
    first = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>'
        for name, cells in rows
    )
    return (
        '<details class="numbers"><summary>Numbers</summary><div class="scroll" tabindex="0" role="group" '
        f'aria-label="Numbers"><table><thead><tr>{first}</tr></thead><tbody>{body}</tbody></table></div></details>'
    )


# grids


def grid_html(panel: dict[str, Any], subject: str) -> str:
    """A table of numbers, the larger the darker; a wrong cell has a frame, and says what it is in the reference."""
    found, wrong = panel.get("found", []), {tuple(place) for place in panel.get("wrong", [])}
    values = found or panel["wanted"]
    sizes = [x for row in values for x in map(number, row) if math.isfinite(x)]
    largest = max(map(abs, sizes), default=0.0) or 1.0
    corner = " \\ ".join(filter(None, (panel.get("of_rows"), panel.get("of_columns"))))
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in panel["columns"])
    body = []
    for r, (name, row) in enumerate(zip(panel["rows"], values, strict=True)):
        cells = []
        for c, value in enumerate(row):
            x = number(value)
            part = min(1.0, abs(x) / largest) if math.isfinite(x) else 1.0 if math.isinf(x) else 0.0
            text = "" if math.isnan(x) and not wrong & {(r, c)} else shown(value)
            kind = ""
            if (r, c) in wrong:
                kind, text = ' class="wrong"', f"{text} <small>≠ {shown(panel['wanted'][r][c])}</small>"
            cells.append(f'<td{kind} style="--part:{part:.2f}">{text}</td>')
        body.append(f'<tr><th scope="row">{escape(name)}</th>{"".join(cells)}</tr>')
    table = (
        f'<table class="grid"><thead><tr><th scope="col">{escape(corner)}</th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table>"
    )
    who = f"of {subject}; ≠: what the reference has there" if found else "of the reference"
    return _figure(panel, table, f'<p class="legend">{escape(who)}</p>', "")


FORMS = {"bars": bars_html, "grid": grid_html}
"""How each form of panel is drawn."""
