"""How a number, a time and a span are written. Pure; the template filters."""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime
from typing import Any

from markupsafe import Markup, escape

MOST = 10_000  # characters of one text that a page shows; the API has the whole


def number(value: float | int | None) -> str:
    """1,840 · 2.74 · 0.00041 · — for what is not known."""
    if value is None or not math.isfinite(value):
        return "—"
    if isinstance(value, int) or value == int(value):
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.3g}"


def percent(share: float | None) -> str:
    if share is None or not math.isfinite(share):
        return "—"
    return f"{share * 100:.3g} %"


def weight(evidence: float | None, most: int = 1_000_000) -> str:
    """Evidence of harm or safety: far beyond every limit its digits tell nothing."""
    if evidence is not None and evidence > most:
        return f"> {most:,}"
    if evidence is not None and 0 < evidence < 0.001:
        return "< 0.001"
    return number(evidence)


def moment(text: str | None) -> str:
    """RFC 3339 → `24 Nov 02:14:05`; all times of the pages are UTC."""
    if not text:
        return "never"
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        return text[:40]
    return f"{at.day} {at:%b %H:%M:%S}"


def seconds(at: float | None) -> str | None:
    """Unix seconds → RFC 3339."""
    if at is None:
        return None
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")[:-6] + "Z"


def span(value: float | None) -> str:
    """Seconds → `38 min`, `2.4 h`, `6 d`."""
    if value is None or not math.isfinite(value):
        return "—"
    for size, unit in ((86_400.0, "d"), (3_600.0, "h"), (60.0, "min")):
        if value >= 1.5 * size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} s"


def count(value: float, noun: str) -> str:
    """`1 device`, `5,412 devices`."""
    return f"{number(value)} {noun}" if value == 1 else f"{number(value)} {noun}s"


def size(value: float) -> str:
    """Bytes → `1.9 TB` (decimal, as downloads are billed)."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:.0f} B"


def short(digest: str) -> str:
    """A digest or commit, as far as a person compares it."""
    return digest.removeprefix("sha256:")[:12]


# NUL is no character of HTML. An override of the direction of writing goes on to the end of its
# paragraph: it would turn around our own words that follow a person's.
UNSHOWN = re.compile("[\0\u202a-\u202e\u2066-\u2069]")


def clip(text: Any) -> str:
    """Text of people and devices, without what no page can show."""
    shown = UNSHOWN.sub("�", str(text))
    return shown if len(shown) <= MOST else shown[:MOST] + " … (cut: the API has all of it)"


# `24 h`, `4 %`, `1.2 ×` stay on one line.
_UNIT = re.compile(r"(\d) (%|×|(?:ms|s|min|h|d)\b)")


def said(text: Any) -> Markup:
    """A sentence of the engine: what stands between backticks is a name, set as code."""
    parts = _UNIT.sub("\\1\u00a0\\2", clip(text)).split("`")
    if len(parts) % 2 == 0:
        return escape("`".join(parts))
    marked = [
        Markup("<code>{}</code>").format(part) if place % 2 else escape(part)
        for place, part in enumerate(parts)
    ]
    return Markup("").join(marked)


def gist(sentence: Any) -> str:
    """The first clause of a sentence of the engine: the state and what decided it."""
    return clip(sentence).partition("; ")[0]


FILTERS = {
    "gist": gist,
    "number": number,
    "percent": percent,
    "weight": weight,
    "moment": moment,
    "span": span,
    "size": size,
    "short": short,
    "clip": clip,
    "said": said,
}
