"""A stranger's CSV: read as documented, refused with the line that is wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bench.decisions import real
from bench.decisions.history import Unreadable, read
from bench.report import Options

GOOD = """device,time,exposure,events.crash,levels.temp,site
a,2026-03-01T02:00:00Z,1.5,2,50.5,x
b,1772330400,,1,,y
a,2026-03-01T01:00:00+00:00,1,,nan,x
a,2026-03-01T02:00:00Z,9,9,99,again
"""


def written(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "history.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_file_as_documented(tmp_path: Path) -> None:
    found = read(written(tmp_path, GOOD))
    assert found.devices == ("a", "b")
    assert list(found.device) == [0, 0, 1]  # in the order of time, then of device
    assert found.exposure.tolist() == [1.0, 1.5, 0.0]
    assert found.events["events.crash"].tolist() == [0, 2, 1]
    assert np.isnan(found.levels["levels.temp"][[0, 2]]).all()
    assert found.repeated == 1
    assert found.ignored == ("site",)


def test_a_byte_order_mark_windows_lines_and_blank_lines_are_fine(tmp_path: Path) -> None:
    text = "\ufeffDevice,Time,Events\r\n\r\na,1,0\r\nb,2,3\r\n"
    assert read(written(tmp_path, text)).events["events"].tolist() == [0, 3]


HEAD = "device,time,exposure,events,levels\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "line 1: the file is empty"),
        (HEAD, "line 2: no rows"),
        ("time,events\n1,2\n", "line 1: no column 'device'"),
        ("device,time,speed\na,1,2\n", "line 1: no column to judge"),
        ("device,time,events,Events\na,1,2,3\n", "line 1: column 'events' is there twice"),
        (HEAD + "a,1,1,0,5\na,2,1,0\n", "line 3: 4 cells, the header has 5"),
        (HEAD + ",1,1,0,5\n", "line 2: no device"),
        (HEAD + "a,yesterday,1,0,5\n", "line 2: time is 'yesterday'"),
        (HEAD + "a,1e300,1,0,5\n", "line 2: time is '1e300'"),
        (
            HEAD + "a,1700000000000,1,0,5\n",
            "seconds since 1970 are expected (these look like milli",
        ),
        (HEAD + "a,nan,1,0,5\n", "line 2: time is 'nan'"),
        (HEAD + "a,1,-1,0,5\n", "line 2: exposure -1"),
        (HEAD + "a,1,1,-3,5\n", "line 2: events is '-3'"),
        (HEAD + "a,1,1,0.5,5\n", "line 2: events is '0.5'"),
        (HEAD + "a,1,1,inf,5\n", "line 2: events is 'inf'"),
        (HEAD + "a,1,1,1_000,5\n", "line 2: events is '1_000'"),
        (HEAD + "a,1,1,0,1e400\n", "line 2: levels is '1e400'"),
        (HEAD + "a,1,1,0,hot\n", "line 2: levels is 'hot'"),
        (HEAD + "a,1,1,0,=SUM(A1)\n", "line 2: levels is '=SUM"),
        (HEAD + "a,1,1,0," + "9" * 500 + "\n", "line 2: a cell of 500 characters"),
        (HEAD + '"a,1,1,0,5\n', "line 2: unexpected end of data"),
        (HEAD + "x" * 70_000 + ",1,1,0,5\n", "field larger than field limit"),
        (b"device,time,events\n\xff\xfe,1,0\n", "not UTF-8"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(tmp_path: Path, text: str | bytes, says: str) -> None:
    with pytest.raises(Unreadable, match=None) as error:
        read(written(tmp_path, text))
    assert says in str(error.value)


def fleet(tmp_path: Path, devices: int, seed: int) -> Path:
    """Frail devices, bursts, drift, a stuck value, late joiners, repeated rows."""
    chance = np.random.default_rng(seed)
    frail, usual = chance.lognormal(0, 2, devices), chance.normal(50, 10, devices)
    drift = np.zeros(devices)
    lines = ["device,time,exposure,events,levels"]
    for hour in range(0, 240, 4):
        drift = 0.9 * drift + chance.normal(0, 2, devices)
        for i in np.flatnonzero(chance.random(devices) < 0.7):
            if hour < 60 and i % 7 == 0:
                continue
            events = chance.poisson(0.02 * frail[i])
            events += chance.negative_binomial(0.3, 0.05) if events else 0
            level = usual[i] if i == 3 else usual[i] + drift[i] + chance.standard_t(2.5)
            lines.append(f"d{i},{hour * 3600},{chance.uniform(0.5, 4):.2f},{events},{level:.2f}")
            if chance.random() < 0.01:
                lines.append(lines[-1])
    return written(tmp_path, "\n".join(lines))


def test_a_harmless_history_is_seldom_rolled_back_and_harm_is_seen(tmp_path: Path) -> None:
    path = fleet(tmp_path, 130, seed=3)
    rows = real.run(Options(real=path, runs=20, jobs=1, seed=5))
    same = [row for row in rows if row.name.startswith("A/A")]
    harmed = [row for row in rows if row.name.startswith("A/B")]
    assert [row.name.split()[1] for row in same] == ["10", "30"]
    assert all(row.more["rolled_back"] <= 2 for row in same)
    assert harmed[-1].value > same[-1].value
    assert same[0].more["repeated_rows"] > 0


@pytest.mark.parametrize("mark", [";", "\t"])
def test_semicolons_and_tabs_part_cells_as_well(tmp_path: Path, mark: str) -> None:
    found = read(written(tmp_path, GOOD.replace(",", mark)))
    assert found.devices == ("a", "b")
    assert found.events["events.crash"].tolist() == [0, 2, 1]


def table(
    rows: str = "{d},{t},1,{e}", times: int = 30, head: str = "device,time,exposure,events"
) -> str:
    lines = [rows.format(d=f"d{i}", t=1.7e9 + 3600 * t, e=(i * t) % 7 == 1)
             for t in range(times) for i in range(30)]  # fmt: skip
    return head + "\n" + "\n".join(lines).replace("True", "1").replace("False", "0") + "\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (table("{d},{t},0,{e}"), "nothing to judge: every exposure is 0"),
        (table("{d},{t},1,0"), "nothing to judge: .* no event ever happened"),
        (table("{d},{t},1,5", head="device,time,exposure,levels"), "no level varies"),
        (table("{d},{t},1,", head="device,time,exposure,levels"), "no level varies"),
        (table() + "d1,5,1,1\n", "from 1970-01-01 to 2023-11-1.* wrong clocks"),
    ],
)
def test_what_can_tell_nothing_is_said(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(Unreadable, match=says):
        real.prepared(read(written(tmp_path, text)))


def test_days_without_a_time_of_day_are_not_thrown_away_in_silence(tmp_path: Path) -> None:
    with pytest.raises(Unreadable, match=r"870 of 900 rows repeat .* time of day"):
        read(written(tmp_path, table("{d},2026-03-01,1,{e}")))


def test_a_column_without_any_event_is_left_out_beside_one_with_some(tmp_path: Path) -> None:
    text = table("{d},{t},1,{e},0", head="device,time,exposure,events.a,events.b")
    plan = real.prepared(read(written(tmp_path, text)))
    assert [gate.metric for gate in plan.policy.gates] == ["events.a"]


def test_too_few_devices_or_no_time_are_said(tmp_path: Path) -> None:
    few = written(tmp_path, HEAD + "".join(f"d{i},{t},1,0,1\n" for i in range(5) for t in (1, 2)))
    with pytest.raises(Unreadable, match="5 devices; two groups of 10 need 20"):
        real.run(Options(real=few, runs=1, jobs=1))
    still = written(tmp_path, HEAD + "".join(f"d{i},1,1,0,1\n" for i in range(30)))
    with pytest.raises(Unreadable, match="one row only"):
        real.run(Options(real=still, runs=1, jobs=1))
