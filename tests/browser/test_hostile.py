"""A thousand lines of hostile names, reasons and notes: every page stays what it is."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from urllib.parse import quote

import httpx2
import pytest
from fastapi.routing import APIRoute
from playwright.sync_api import Browser, expect
from sqlalchemy import insert, select, update

from controller import audit as chain
from controller.http.dashboard import figures, pages
from controller.http.dashboard.rollout import VERBS
from controller.roles import Role
from controller.store import approvals, tables
from controller.store.tables import decisions, devices, holds, members, releases, rollouts, stops
from telemetry.store import tables as heard
from telemetry.store.database import reading, writing
from tests.browser.served import Site, end, log_in, serve, watch

pytestmark = pytest.mark.xdist_group("browser")

LINES = 1_000
SORTS = (
    "<script>window.hacked = 1</script>",
    '"><img src=x onerror="window.hacked = 1">',
    "'onmouseover='window.hacked=1' x='",
    "</title></style></textarea></main><h1>yours</h1>",
    "{{ 7 * 7 }}{% raw %}{{ config }}",
    "javascript:window.hacked=1",
    "\u202egnp.exe\u202c \u200f\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u2066x",
    "nul\0nul",
    "x" * 10_240,
    "a\r\ndata: <b>event</b>\n\nevent: beat\n\n",
    "\ud7ff\ufffe\U0001f47b\u0301" * 20,
    "`unbalanced` code ` and <code>",
    "<!--", "]]>", "&lt;script&gt;&#x3c;", "%00%0d%0a../../etc/passwd", "   ", "\t\x01\x1b[31m",
)  # fmt: skip
# What our own templates are made of; `script` only with a source of ours.
TAGS = frozenset(
    [
        "html",
        "head",
        "meta",
        "title",
        "link",
        "script",
        "body",
        "a",
        "header",
        "svg",
        "path",
        "circle",
        "rect",
        "line",
        "nav",
        "ul",
        "ol",
        "li",
        "div",
        "span",
        "form",
        "input",
        "button",
        "main",
        "footer",
        "p",
        "section",
        "h1",
        "h2",
        "h3",
        "h4",
        "dl",
        "dt",
        "dd",
        "b",
        "strong",
        "code",
        "time",
        "article",
        "table",
        "caption",
        "thead",
        "tbody",
        "tfoot",
        "tr",
        "th",
        "td",
        "details",
        "summary",
        "noscript",
        "label",
        "select",
        "option",
        "textarea",
        "pre",
        "fieldset",
        "legend",
        "br",
    ]
)


def lines() -> Iterator[str]:
    for number in range(LINES):
        yield f"{SORTS[number % len(SORTS)]} {number}"


class Read(HTMLParser):
    """Notes every tag and attribute that is none of ours."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.foreign: list[str] = []
        self.depth = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag not in TAGS:
            self.foreign.append(f"<{tag}>")
        if tag == "script" and not str(given.get("src", "")).startswith("/static/"):
            self.foreign.append("a script of somebody else")
        for name, text in attrs:
            if name.startswith("on") or name == "style":
                self.foreign.append(f"{tag} {name}={text}")
            if name in ("href", "action", "src") and not str(text).startswith(("/", "#")):
                self.foreign.append(f"{tag} {name}={text}")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    served = serve(tmp_path_factory.mktemp("hostile"), devices=1_200, rollouts=60)
    _poison(served)
    yield served
    end(served)


def _poison(site: Site) -> None:
    texts = list(lines())
    now = time.time()
    with writing(site.engine) as conn:
        for place, row in enumerate(conn.execute(select(rollouts.c.id)).all()):
            text = texts[place]
            conn.execute(
                update(rollouts)
                .where(rollouts.c.id == row.id)
                .values(
                    sentence=text, author=text[:256], name=f"n{place} {text}"[:63], commit=text[:64]
                )
            )
        for place, row in enumerate(conn.execute(select(decisions.c.id)).all()):
            text = texts[place % LINES]
            conn.execute(
                update(decisions)
                .where(decisions.c.id == row.id)
                .values(sentence=text, commit=text[:64], verdict=text[:16])
            )
        for place, row in enumerate(
            conn.execute(select(releases.c.name, releases.c.document)).all()
        ):
            text = texts[place % LINES]
            sbom = {"digest": "sha256:" + "0" * 64, "url": text}
            document = {**row.document, "notes": text, "version": text[:64], "sbom": sbom}
            conn.execute(
                update(releases).where(releases.c.name == row.name).values(document=document)
            )
        for place, row in enumerate(conn.execute(select(devices.c.id)).all()[:LINES]):
            text = texts[place]
            conn.execute(
                update(devices)
                .where(devices.c.id == row.id)
                .values(labels={text[:63]: text, "hardware": text})
            )
        conn.execute(update(members).values(reason=texts[0]))
        conn.execute(update(holds).values(reason=texts[8], actor=texts[1][:128]))
        for place, text in enumerate(texts[: len(SORTS)]):
            seen = {"name": text, "release": text, "step": text, "state": text, "to": {text: text}}
            approvals.ask(
                conn, kind="rule" if place % 2 else "start", fleet="", rollout="",
                seen=_plain(seen), proposer=text.replace("\0", "")[:128],
                reason=text.replace("\0", ""), needs=1, now=now,
            )  # fmt: skip
            conn.execute(
                insert(stops).values(
                    id=f"stop-{place}", scope="digest", value=text[:128], reason=text,
                    actor=text[:128], at=now,
                )
            )  # fmt: skip
        for text in texts:
            chain.append(
                conn, at=now, actor=text[:128], action=text[:64], subject=text[:128],
                detail=_detail(text),
            )  # fmt: skip
        conn.execute(
            insert(tables.devices).values(
                id=texts[0][:60], fleet=texts[1][:63], labels={}, status="active", password_issue=1,
                term=0, created_at=now, change=10_000_000,
            )
        )  # fmt: skip
    with writing(site.telemetry) as conn:
        conn.execute(
            update(heard.reports).values(reason=texts[0][:64], log="\n".join(texts)[:65_000])
        )


def _plain(value: dict[str, object]) -> dict[str, object]:
    """Without NUL, which no JSON column of a database takes."""
    return dict(json.loads(json.dumps(value).replace("\\u0000", "")))


def _detail(text: str) -> dict[str, object]:
    plain = text.replace("\0", "")
    return {"reason": plain, plain[:60]: [plain[:99]]}


def routes() -> list[str]:
    """Every page that the application serves: a new one is here when it is there."""
    found = [
        str(route.path)
        for router in pages.routers
        for route in router.routes
        if isinstance(route, APIRoute) and "GET" in (route.methods or ())
    ]
    return [path for path in found if not path.startswith(("/live", "/static"))]


def filled(route: str, site: Site) -> list[str]:
    """The route with names of everything that it can be asked for."""
    newest = [ids[-1] for ids in site.estate.rollouts.values()]
    with reading(site.engine) as conn:
        known = {
            "rollout": newest,
            "device": [ids[0] for ids in site.estate.devices.values()],
            "release": list(conn.execute(select(releases.c.name)).scalars()),
            "decision": list(conn.execute(select(decisions.c.id).limit(len(SORTS) * 2)).scalars()),
            "approval": list(conn.execute(select(tables.approvals.c.id)).scalars()),
            "verb": list(VERBS),
        }
    paths = [route]
    for name, values in known.items():
        if f"{{{name}}}" in route:
            paths = [p.replace(f"{{{name}}}", quote(v, safe="")) for p in paths for v in values]
    assert paths
    assert "{" not in paths[0], f"{route}: say above what it can be asked for"
    return paths


def test_every_page_of_every_list_is_what_our_templates_say(hostile: Site) -> None:
    client = _client(hostile)
    wanted = [path for route in routes() for path in filled(route, hostile)]
    seen: set[str] = set()
    while wanted:
        path = wanted.pop()
        seen.add(path)
        answer = client.get(path)
        assert answer.status_code in (200, 409), path  # 409: a verb that the state does not take
        text = answer.text
        read = Read()
        read.feed(text)
        assert read.foreign == [], path
        assert text.count("<main") == text.count("</footer>") == 1, path
        assert not figures.UNSHOWN.search(text), path
        following = text.rpartition('rel="next"')[0].rpartition('href="')[2].partition('"')[0]
        if 'rel="next"' in text and (found := following.replace("&amp;", "&")) not in seen:
            wanted.append(found)
    client.close()
    assert sum(path.startswith("/audit") for path in seen) >= LINES / 100
    assert sum(path.startswith("/devices?") for path in seen) >= LINES / 50 - 1


def test_a_browser_runs_none_of_it_and_nothing_sticks_out(hostile: Site, chromium: Browser) -> None:
    context = chromium.new_context(viewport={"width": 360, "height": 740})
    seen = watch(context, hostile.url)
    log_in(seen.page, hostile, Role.ADMIN, "/")
    rollout = hostile.rollout("model-3-eu")
    device = hostile.estate.devices["lab"][0]
    for path in (
        "/", "/oncall", "/rollouts", f"/rollouts/{rollout}", f"/rollouts/{rollout}/rollback",
        f"/devices/{device}", "/devices", "/decisions", "/audit", "/board", "/releases", "/stop",
    ):  # fmt: skip
        assert seen.page.goto(hostile.url + path).status == 200, path  # type: ignore[union-attr]
        if seen.page.locator("[data-live]").count():
            expect(seen.page.locator("[data-live]")).to_have_text("Live", timeout=20_000)
        assert seen.page.evaluate("window.hacked") is None, path
        wide = seen.page.evaluate("document.scrollingElement.scrollWidth")
        assert wide <= 360, f"{path}: {wide}"
        expect(seen.page.locator("footer")).to_contain_text("All times are UTC")
    assert seen.wrong == []
    context.close()


def _client(site: Site) -> httpx2.Client:
    """Log in as a program would: the form's own fields, back with its cookie."""
    client = httpx2.Client(base_url=site.url, headers={"Accept": "text/html"}, timeout=30)
    csrf = client.get("/login").text.partition('name="csrf" value="')[2].partition('"')[0]
    form = {"csrf": csrf, "next": "/", "token": site.token(Role.ADMIN)}
    assert client.post("/login", data=form).status_code == 303
    return client
