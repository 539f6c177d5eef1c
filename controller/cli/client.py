"""The CLI's HTTP client: JSON in and out, every problem as a sentence and an exit code."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from controller.cli.errors import Failed, Unreachable

DENIED = 6
_LISTS = {
    "devices": "bellwether device list",
    "releases": "bellwether release list",
    "approvals": "bellwether approvals",
    "decisions": "bellwether status ROLLOUT -o json",
}
_NEXT = {
    401: "set BELLWETHER_TOKEN or --token (`bellwether token create NAME --role …` makes one)",
    403: "`bellwether token list` tells on the server who has which role",
    409: "`bellwether status` shows how it stands",
    412: "look (`bellwether status`), then run it again",
    429: "wait some seconds, then run it again",
    500: "its log has the cause; `bellwether doctor` on the server checks its databases",
}


class NotFound(Failed):
    """404: what was named does not exist (yet)."""


class Api:
    def __init__(self, server: str, token: str | None, *, timeout: float = 120.0) -> None:
        import httpx2

        headers = {"User-Agent": "bellwether-cli"}
        if token:
            headers["Authorization"] = f"Bearer {token}"
        self._server = server.rstrip("/")
        self._client = httpx2.Client(base_url=self._server, headers=headers, timeout=timeout)

    def get(self, path: str, **params: Any) -> Any:
        return self._ask("GET", path, params={k: v for k, v in params.items() if v})[0]

    def get_bytes(self, path: str) -> bytes:
        """The body as it came."""
        return bytes(self._request("GET", path).content)

    def get_with_revision(self, path: str) -> tuple[Any, str]:
        body, headers = self._ask("GET", path)
        return body, headers.get("etag", "*")

    def post(
        self, path: str, body: Any, *, if_match: str | None = None, dry_run: bool = False
    ) -> Any:
        headers = {"If-Match": if_match} if if_match else {}
        params = {"dryRun": "true"} if dry_run else {}
        return self._ask("POST", path, json=body, headers=headers, params=params)[0]

    def send(self, path: str, content: bytes, **params: Any) -> Any:
        """POST bytes as they are."""
        headers = {"Content-Type": "application/octet-stream"}
        given = {k: v for k, v in params.items() if v}
        return self._ask("POST", path, content=content, headers=headers, params=given)[0]

    def every(self, path: str, **params: Any) -> Iterator[Any]:
        """All items of a list, page by page."""
        cursor = None
        while True:
            page = self.get(path, cursor=cursor, limit=params.pop("limit", 500), **params)
            yield from page["items"]
            cursor = page.get("next")
            if cursor is None:
                return

    def _ask(self, method: str, path: str, **how: Any) -> tuple[Any, Any]:
        answer = self._request(method, path, **how)
        return (answer.json() if answer.content else None), answer.headers

    def _request(self, method: str, path: str, **how: Any) -> Any:
        import httpx2

        try:
            answer = self._client.request(method, f"/api/v1{path}", **how)
        except (httpx2.TransportError, httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
            raise Unreachable(
                f"{self._server} does not answer ({error}): is `bellwether serve` running? "
                "Name it with --server URL or BELLWETHER_SERVER"
            ) from None
        if answer.is_success:
            return answer
        raise _failed(answer)


def _failed(answer: Any) -> Failed:
    try:
        problem = answer.json()
        detail = str(problem["detail"])
        if detail == "Not Found":  # the router's own: no page of ours is there
            raise KeyError
    except (ValueError, KeyError, TypeError):
        detail = f"HTTP {answer.status_code} of {answer.url}: is this a Bellwether server?"
        if answer.status_code == 404:  # somebody else's: nobody needs to wait for what was named
            return Failed(detail)
    if "`" not in detail and (then := _next(answer)):  # else it says by itself what to run
        detail = f"{detail}; {then}"
    if answer.status_code == 404:
        return NotFound(detail)
    if answer.status_code in (502, 503, 504):
        return Unreachable(detail)
    return Failed(detail, DENIED if answer.status_code in (401, 403) else 1)


def _next(answer: Any) -> str:
    """What to run next, in the words of the command line: the problem's own hint is the API's."""
    if answer.status_code == 404:
        kind = str(answer.url.path).removeprefix("/api/v1/").partition("/")[0]
        return f"`{_LISTS[kind]}` lists them" if kind in _LISTS else ""
    return _NEXT.get(answer.status_code, "")
