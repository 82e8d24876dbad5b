"""conformance, running: the badge, a static SVG such as "moe-conformance 224/224"."""

from html import escape
from typing import Any

from conformance.run.report import FAILING, counts, tally

LABEL = "moe-conformance"
GOOD, KNOWN, BAD, PARTIAL = "#1a7f37", "#8a5a00", "#b3261e", "#59626d"
CHARACTER, MARGIN = 6.6, 12
"""Widths in pixels, of the 11 pixel font that a badge has."""


def badge(report: dict[str, Any]) -> str:
    """Requirements that hold, of those judged, over all subjects of the report; red where a MUST fails.

    A run that is not complete says so: its badge is grey, unless something fails.
    """
    records = report["requirements"]
    holds, judged = tally(records)
    found = counts(records)
    text = f"{holds}/{judged}" + ("" if report["complete"] else " partial")
    colour = KNOWN if found["known"] else GOOD
    colour = colour if report["complete"] else PARTIAL
    colour = BAD if any(found[status] for status in FAILING) else colour
    left, right = (round(len(each) * CHARACTER + MARGIN) for each in (LABEL, text))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + right}" height="20" role="img" '
        f'aria-label="{escape(f"{LABEL}: {text}")}"><title>{escape(f"{LABEL}: {text}")}</title>'
        f'<clipPath id="r"><rect width="{left + right}" height="20" rx="3"/></clipPath><g clip-path="url(#r)">'
        f'<rect width="{left}" height="20" fill="#3d444d"/>'
        f'<rect x="{left}" width="{right}" height="20" fill="{colour}"/></g>'
        '<g fill="#fff" text-anchor="middle" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11">'
        f'<text x="{left / 2:g}" y="14" textLength="{left - MARGIN}">{LABEL}</text>'
        f'<text x="{left + right / 2:g}" y="14" textLength="{right - MARGIN}">{escape(text)}</text></g></svg>\n'
    )
