"""Tables as JSON and CSV: the rows of the page, and nothing that a spreadsheet would run."""

from __future__ import annotations

import csv
import io
import json

from controller.http.dashboard.sheets import sheet

HOSTILE = (
    '=HYPERLINK("http://evil")',
    "+1+1",
    "-2+3",
    "@SUM(A1)",
    "\tx",
    'a"b,c\r\nd',
    "\0",
    "<b>",
)


def rows() -> list[dict[str, object]]:
    return [
        {"seq": n, "at": "2026-11-25T00:00:00.000Z", "actor": text, "action": "x", "subject": text,
         "detail": {"reason": text}, "previous": "", "hash": "h"}
        for n, text in enumerate(HOSTILE)
    ]  # fmt: skip


def test_csv_keeps_every_text_and_runs_none() -> None:
    read = list(csv.DictReader(io.StringIO(sheet("audit", rows(), "csv").decode(), newline="")))
    assert [int(row["seq"]) for row in read] == list(range(len(HOSTILE)))
    for row, text in zip(read, HOSTILE, strict=True):
        assert row["subject"].removeprefix("'") == text.replace("\0", "\ufffd")
        assert not row["subject"].startswith(("=", "+", "-", "@", "\t"))
        assert json.loads(row["detail"]) == {"reason": text}


def test_json_is_exact_and_numbers_stay_numbers() -> None:
    items = json.loads(sheet("audit", rows(), "json"))["items"]
    assert [item["subject"] for item in items] == list(HOSTILE)
    device = {"one": {"id": "car-1", "score": {"value": -3.5}, "membership": None}, "runs": "a"}
    (row,) = csv.DictReader(io.StringIO(sheet("devices", [device], "csv").decode(), newline=""))
    assert (row["score"], row["member"], row["fleet"]) == ("-3.5", "", "")
