"""Tells the place where people review commits: statuses, one comment a pull request, a proposal.

One adapter for the API that GitHub and Gitea (and Forgejo) share; its root is the repository's own
URL: `https://api.github.com/repos/acme/fleet`, `https://gitea.example/api/v1/repos/acme/fleet`.
`file:///PATH` appends the same words to a file, one JSON object a line, for everything else.
Nothing here is needed for a rollout or a rollback: what cannot be told now is told later.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

MOST_DESCRIPTION = 140  # GitHub refuses more
MOST_COMMENT = 60_000  # bytes; GitHub refuses more than 65,536
MOST_PAGES = 30  # of 50 comments, when the sticky one is looked for
STATES = ("pending", "success", "failure", "error")


class ForgeUnavailable(RuntimeError):
    """It did not answer, or refused; the message says which and what to do."""


class Forge(Protocol):
    def status(
        self, commit: str, *, context: str, state: str, description: str, url: str = ""
    ) -> None:
        """Say how a commit fares; the last word of a context counts."""
        ...

    def comment(self, pull_request: int, body: str) -> str:
        """Write or replace the comment that begins with the same first line; its URL."""
        ...

    def propose(self, branch: str, base: str, *, title: str, body: str) -> str:
        """Open a pull request of a branch, or find the open one; its URL."""
        ...


def check(url: str) -> str:
    """The scheme of a forge's URL; raises ValueError for what is none."""
    parts = urlsplit(url)
    if parts.scheme == "file" or (parts.scheme in ("http", "https") and "/repos/" in parts.path):
        return parts.scheme
    raise ValueError(
        f"{url!r}: write https://api.github.com/repos/OWNER/NAME, "
        "https://HOST/api/v1/repos/OWNER/NAME (Gitea) or file:///PATH"
    )


def open_forge(url: str, token: str | None) -> Forge:
    """The adapter of a URL; raises ValueError for what is none."""
    if check(url) == "file":
        return StatusFile(Path(unquote(urlsplit(url).path)))
    return RepositoryApi(url, token)


class RepositoryApi:
    """GitHub's REST API as Gitea speaks it too; one repository."""

    def __init__(self, url: str, token: str | None, *, timeout: float = 15.0) -> None:
        import httpx2

        headers = {"Accept": "application/json", "User-Agent": "bellwether"}
        if token:
            headers["Authorization"] = f"Bearer {token}"
        self._root = url.rstrip("/")
        self._client = httpx2.Client(headers=headers, timeout=timeout)

    def status(
        self, commit: str, *, context: str, state: str, description: str, url: str = ""
    ) -> None:
        body = {"context": context, "state": state, "description": short(description)}
        if url:
            body["target_url"] = url
        self._ask("POST", f"/statuses/{commit}", body)

    def comment(self, pull_request: int, body: str) -> str:
        marker = body.partition("\n")[0]
        for known in self._comments(pull_request):
            if str(known.get("body", "")).startswith(marker):
                text = {"body": fitting(body)}
                found = self._ask("PATCH", f"/issues/comments/{int(known['id'])}", text)
                return str(found.get("html_url", ""))
        made = self._ask("POST", f"/issues/{pull_request}/comments", {"body": fitting(body)})
        return str(made.get("html_url", ""))

    def propose(self, branch: str, base: str, *, title: str, body: str) -> str:
        for known in self._ask("GET", f"/pulls?state=open&head={branch}&limit=50&per_page=50"):
            if known.get("head", {}).get("ref") == branch:
                return str(known.get("html_url", ""))
        wanted = {"head": branch, "base": base, "title": title[:250], "body": fitting(body)}
        return str(self._ask("POST", "/pulls", wanted).get("html_url", ""))

    def _comments(self, pull_request: int) -> Iterator[dict[str, Any]]:
        for number in range(1, MOST_PAGES + 1):
            query = f"page={number}&limit=50&per_page=50"  # Gitea says limit, GitHub per_page
            listed = self._ask("GET", f"/issues/{pull_request}/comments?{query}")
            yield from listed
            if len(listed) < 50:
                return

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        import httpx2

        try:
            answer = self._client.request(method, self._root + path, json=body)
        except (httpx2.TransportError, httpx2.InvalidURL) as error:
            raise ForgeUnavailable(f"{self._root} does not answer: {error}") from None
        if answer.is_success:
            try:
                return answer.json() if answer.content else {}
            except ValueError:
                raise ForgeUnavailable(f"{self._root} answers no JSON: is the URL right?") from None
        hint = {
            401: "the token is not accepted",
            403: "the token may not do this: it needs to write statuses and pull requests",
            404: "not found: is it the repository's own API URL, and may the token see it?",
        }.get(answer.status_code, answer.text[:200])
        raise ForgeUnavailable(f"{method} {self._root}{path}: {answer.status_code}, {hint}")


class StatusFile:
    """The same words, one JSON object a line."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def status(
        self, commit: str, *, context: str, state: str, description: str, url: str = ""
    ) -> None:
        self._append(
            kind="status", commit=commit, context=context, state=state,
            description=short(description), url=url,
        )  # fmt: skip

    def comment(self, pull_request: int, body: str) -> str:
        self._append(kind="comment", pull_request=pull_request, body=body)
        return self._file.as_uri()

    def propose(self, branch: str, base: str, *, title: str, body: str) -> str:
        self._append(kind="propose", branch=branch, base=base, title=title, body=body)
        return self._file.as_uri()

    def _append(self, **entry: Any) -> None:
        try:
            with self._file.open("a", encoding="utf-8") as out:
                out.write(json.dumps(entry, ensure_ascii=False) + "\n")
        except OSError as error:
            raise ForgeUnavailable(f"{self._file}: {error.strerror}") from None


def short(text: str) -> str:
    """One line that fits a status."""
    line = " ".join(text.split())
    return line if len(line) <= MOST_DESCRIPTION else line[: MOST_DESCRIPTION - 1] + "…"


def fitting(body: str) -> str:
    """A comment that fits, cut with a word about it."""
    raw = body.encode()
    if len(raw) <= MOST_COMMENT:
        return body
    return raw[:MOST_COMMENT].decode(errors="ignore") + "\n\n… cut: `bellwether plan` prints it all"
