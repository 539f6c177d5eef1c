"""Commit statuses, the sticky comment and the proposal, told to a server as Gitea speaks."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert, update

from controller.forge import ForgeUnavailable, RepositoryApi, check, open_forge
from controller.statuses import Statuses
from controller.store.database import open_control
from controller.store.tables import rollouts
from telemetry.store.database import writing

SHA = "c" * 40


class Gitea:
    """The few routes that we use, with their rules: a token, a length, pages of fifty."""

    def __init__(self) -> None:
        self.statuses: list[dict[str, Any]] = []
        self.comments: list[dict[str, Any]] = []
        self.pulls: list[dict[str, Any]] = []
        self.down = False
        forge = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None: ...

            def _body(self) -> Any:
                return json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))))

            def _answer(self, code: int, body: Any) -> None:
                raw = json.dumps(body).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def _route(self, method: str) -> None:
                if forge.down:
                    self._answer(503, {"message": "maintenance"})
                elif self.headers.get("Authorization") != "Bearer t0ken":
                    self._answer(401, {})
                else:
                    self._answer(*forge.answer(method, self.path, self))

            def do_GET(self) -> None:
                self._route("GET")

            def do_POST(self) -> None:
                self._route("POST")

            def do_PATCH(self) -> None:
                self._route("PATCH")

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/api/v1/repos/acme/fleet"

    def answer(self, method: str, path: str, request: Any) -> tuple[int, Any]:
        where = path.removeprefix("/api/v1/repos/acme/fleet")
        if method == "POST" and where == f"/statuses/{SHA}":
            body = request._body()
            if len(body["description"]) > 140 or body["state"] not in (
                "pending",
                "success",
                "failure",
                "error",
            ):
                return 422, {}
            self.statuses.append(body)
            return 201, body
        if method == "GET" and where.startswith("/issues/7/comments"):
            page = int(where.split("page=")[1].split("&")[0])
            return 200, self.comments[(page - 1) * 50 : page * 50]
        if method == "POST" and where == "/issues/7/comments":
            made = {"id": len(self.comments) + 1, **request._body(), "html_url": "u"}
            self.comments.append(made)
            return 201, made
        if method == "PATCH" and where.startswith("/issues/comments/"):
            known = self.comments[int(where.rsplit("/", 1)[1]) - 1]
            known.update(request._body())
            return 200, known
        if method == "GET" and where.startswith("/pulls?"):
            return 200, self.pulls
        if method == "POST" and where == "/pulls":
            body = request._body()
            self.pulls.append(
                {"head": {"ref": body["head"]}, "html_url": "p", **{"title": body["title"]}}
            )
            return 201, self.pulls[-1]
        return 404, {}


@pytest.fixture
def gitea() -> Iterator[Gitea]:
    forge = Gitea()
    yield forge
    forge.server.shutdown()
    forge.thread.join()
    forge.server.server_close()


def test_the_sticky_comment_is_replaced_also_on_a_later_page(gitea: Gitea) -> None:
    forge = RepositoryApi(gitea.url, "t0ken")
    for i in range(60):
        forge.comment(7, f"<!-- other-{i} -->\nx")
    forge.comment(7, "<!-- bellwether-plan -->\none")
    forge.comment(7, "<!-- bellwether-plan -->\ntwo")
    ours = [c["body"] for c in gitea.comments if "bellwether-plan" in c["body"]]
    assert ours == ["<!-- bellwether-plan -->\ntwo"]


def test_a_comment_that_is_too_long_is_cut_and_says_so(gitea: Gitea) -> None:
    RepositoryApi(gitea.url, "t0ken").comment(7, "<!-- x -->\n" + "ä" * 100_000)
    assert len(gitea.comments[0]["body"].encode()) < 65_536
    assert gitea.comments[0]["body"].endswith("prints it all")


def test_a_proposal_is_opened_once(gitea: Gitea) -> None:
    forge = RepositoryApi(gitea.url, "t0ken")
    for _ in range(2):
        assert forge.propose("bellwether/holds-x", "main", title="Hold", body="b") == "p"
    assert len(gitea.pulls) == 1


def test_refusals_say_what_to_do(gitea: Gitea) -> None:
    with pytest.raises(ForgeUnavailable, match="token is not accepted"):
        RepositoryApi(gitea.url, "wrong").comment(7, "x")
    with pytest.raises(ForgeUnavailable, match="may the token see it"):
        RepositoryApi(gitea.url, "t0ken").status(
            "d" * 40, context="c", state="success", description=""
        )
    with pytest.raises(ForgeUnavailable, match="does not answer"):
        RepositoryApi("http://127.0.0.1:1/repos/a/b", None).comment(1, "x")
    for url in ("ftp://x/repos/a", "https://github.com/acme/fleet", "x/y", ""):
        with pytest.raises(ValueError, match="write https://api"):
            check(url)


def test_rollouts_become_statuses_and_a_forge_that_was_away_is_told_later(
    gitea: Gitea, tmp_path: Path
) -> None:
    engine = open_control(f"sqlite:///{tmp_path}/control.db")
    with writing(engine) as conn:
        conn.execute(
            insert(rollouts).values(
                id="r" * 26, name="cars", fleet="eu", release="fsd-2", digest="d", artifacts={},
                commit=SHA, author="a", state="Soaking", sentence="SOAKING — 3 of 10", revision=1,
                step=0, opened_at=1, step_at=1, updated_at=1, seed="s", pinned={}, flags={},
            )
        )  # fmt: skip
    statuses = Statuses(engine, open_forge(gitea.url, "t0ken"), "http://bw")
    assert statuses.run_once() == 1
    assert statuses.run_once() == 0
    said = gitea.statuses[-1]
    assert (said["state"], said["context"]) == ("pending", "bellwether/cars")
    assert said["target_url"] == "http://bw/rollouts/cars"
    with writing(engine) as conn:
        conn.execute(
            update(rollouts).values(state="RolledBack", sentence="ROLLED BACK — " + "x" * 300)
        )
    gitea.down = True
    assert statuses.run_once() == 0
    gitea.down = False
    assert statuses.run_once() == 1
    assert gitea.statuses[-1]["state"] == "failure"
    assert gitea.statuses[-1]["description"].startswith("ROLLED BACK — x")
    engine.dispose()


def test_a_plain_file_takes_the_same_words(tmp_path: Path) -> None:
    forge = open_forge((tmp_path / "said.jsonl").as_uri(), None)
    forge.status(
        SHA, context="bellwether/cars", state="success", description="COMPLETED — 10 of 10"
    )
    forge.comment(7, "<!-- bellwether-plan -->\nplan")
    lines = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["status", "comment"]
    with pytest.raises(ForgeUnavailable):
        open_forge("file:///nowhere/at/all", None).comment(1, "x")
