"""Opaque cursors: a page says where the next one begins; nobody may read meaning into it."""

from __future__ import annotations

import binascii
from base64 import urlsafe_b64decode, urlsafe_b64encode

from controller.http.problems import Problem


def cursor(key: str) -> str:
    return urlsafe_b64encode(f"1:{key}".encode()).decode().rstrip("=")


def key(text: str | None) -> str:
    """What a cursor stands for; empty for none."""
    if not text:
        return ""
    try:
        plain = urlsafe_b64decode(text + "=" * (-len(text) % 4)).decode()
    except (binascii.Error, UnicodeDecodeError, ValueError):
        plain = ""
    if not plain.startswith("1:") or len(plain) > 256 or not plain.isprintable():
        raise Problem(
            400, "cursor: not one of ours; begin again without it", pointer="query/cursor"
        )
    return plain[2:]


def number(text: str | None) -> int | None:
    """The same for a list in the order of its numbers; None for none."""
    plain = key(text)
    if not plain:
        return None
    # Only digits of ASCII: `²` is a digit too, and no number. 15 of them fit into any column.
    if not (plain.isascii() and plain.isdigit() and len(plain) < 16):
        raise Problem(400, "cursor: not one of this list", pointer="query/cursor")
    return int(plain)
