"""Bearer JWTs, checked offline, and the login of pages against a real OpenID provider."""

from __future__ import annotations

import base64
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import httpx2
import pytest
from joserfc import jwt
from joserfc.jwk import ECKey, KeySet, OctKey, OKPKey, RSAKey
from sqlalchemy import select, update
from starlette.testclient import TestClient

from controller import rolemap
from controller.bearer import FRESH, Keys, NotBelieved, claims
from controller.http.app import create_app
from controller.settings import Settings, SettingsError, load
from controller.store.tables import audit, logins
from telemetry.store.database import reading, writing

if TYPE_CHECKING:
    from conftest import House

# Tokens are signed here by the old name too, which providers use; the library warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:EdDSA is deprecated")

NOW = 1_800_000_000.0
STRICT = Path(__file__).with_name("strict_provider.py")
ISSUER, AUDIENCE = "https://id.example", "bellwether"
ROLES = """
[[grant]]
claim = "groups"
value = "rm"
role = "release-manager"
fleets = ["eu"]

[[grant]]
claim = "groups"
value = "oncall"
role = "on-call"

[[grant]]
claim = "realm_access.roles"
value = "bw-admin"
role = "admin"
"""


@dataclass
class Signer:
    """An identity provider's keys, and what it signs."""

    file: Path
    keys: dict[str, Any] = field(
        default_factory=lambda: {
            "RS256": RSAKey.generate_key(2048, {"kid": "rsa"}),
            "ES256": ECKey.generate_key("P-256", {"kid": "ec"}),
            "EdDSA": OKPKey.generate_key("Ed25519", {"kid": "ed"}),
        }
    )

    def publish(self, *names: str) -> None:
        chosen = [key for name, key in self.keys.items() if name in (names or self.keys)]
        self.file.write_text(json.dumps(KeySet(chosen).as_dict()))

    def token(self, alg: str = "EdDSA", headers: dict[str, Any] | None = None, **more: Any) -> str:
        key = self.keys[alg]
        said = {
            "iss": ISSUER, "aud": AUDIENCE, "sub": "u-1", "iat": int(NOW) - 5,
            "exp": int(NOW) + 300, "groups": ["rm"], "email": "ann@example.com",
            "email_verified": True, **more,
        }  # fmt: skip
        said = {name: value for name, value in said.items() if value is not None}
        header = {"alg": alg, "kid": key.kid, **(headers or {})}
        return jwt.encode(
            {k: v for k, v in header.items() if v is not None}, said, key, algorithms=[alg]
        )


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    made = Signer(tmp_path_factory.mktemp("idp") / "jwks.json")
    made.publish()
    return made


@pytest.fixture
def client(house: House, signer: Signer, tmp_path: Path) -> TestClient:
    (tmp_path / "roles.toml").write_text(ROLES)
    return house.with_settings(
        auth="required", oidc_issuer=ISSUER, oidc_audience=AUDIENCE,
        oidc_jwks=str(signer.file), oidc_roles=tmp_path / "roles.toml", rate_limit=0.0,
    )  # fmt: skip


def bearing(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@pytest.mark.parametrize("alg", ["RS256", "ES256", "EdDSA"])
def test_a_jwt_does_what_its_claims_grant(
    house: House, client: TestClient, signer: Signer, alg: str
) -> None:
    house.add_rollout()
    house.add_rollout("other", fleet="us")
    headers = {**bearing(signer.token(alg)), "If-Match": "*"}
    seen = client.get("/api/v1/rollouts", headers=headers).json()["items"]
    assert [r["name"] for r in seen] == ["cars"]
    done = client.post("/api/v1/rollouts/cars:promote", json={}, headers=headers)
    assert done.status_code == 202, done.text
    assert client.get("/api/v1/rollouts/other", headers=headers).status_code == 404
    with reading(house.deps.engine) as conn:
        actor = conn.execute(select(audit.c.actor).where(audit.c.action == "promote")).scalar_one()
    assert actor == "ann@example.com"


def test_roles_are_of_their_fleets_alone(house: House, client: TestClient, signer: Signer) -> None:
    """Release manager in eu, on call everywhere: may stop both, and start only one."""
    house.add_rollout()
    house.add_rollout("other", fleet="us")
    headers = {**bearing(signer.token(groups=["rm", "oncall"])), "If-Match": "*"}
    assert len(client.get("/api/v1/rollouts", headers=headers).json()["items"]) == 2
    body = {"reason": "smoke"}
    for name, verb, code in (
        ("cars", "promote", 202), ("other", "promote", 403), ("other", "pause", 202),
    ):  # fmt: skip
        url = f"/api/v1/rollouts/{name}:{verb}"
        assert client.post(url, json=body, headers=headers).status_code == code, (name, verb)


def test_nobody_without_a_grant_gets_in(client: TestClient, signer: Signer) -> None:
    for groups in ([], None, "other", ["RM"], [["rm"]], {"rm": True}, 7, [None]):
        answer = client.get("/api/v1/rollouts", headers=bearing(signer.token(groups=groups)))
        assert answer.status_code == 403, groups


def _b64(data: dict[str, Any] | bytes) -> str:
    raw = data if isinstance(data, bytes) else json.dumps(data).encode()
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def lies(signer: Signer) -> dict[str, str]:
    """Tokens that must open nothing."""
    good = signer.token()
    header, payload, signature = good.split(".")
    stranger = OKPKey.generate_key("Ed25519", {"kid": "ed"})
    own = stranger.as_dict(private=False)
    public = json.dumps(signer.keys["RS256"].as_dict(private=False)).encode()
    body = json.loads(base64.urlsafe_b64decode(payload + "=="))
    hs = jwt.encode(
        {"alg": "HS256", "kid": "rsa"}, body, OctKey.import_key(public), algorithms=["HS256"]
    )
    admin = _b64({**body, "realm_access": {"roles": ["bw-admin"]}})
    return {
        "expired": signer.token(exp=int(NOW) - 60),
        "no expiry": signer.token(exp=None),
        "not yet": signer.token(nbf=int(NOW) + 600),
        "made in the future": signer.token(iat=int(NOW) + 600),
        "no time of making": signer.token(iat=None),
        "nobody": signer.token(sub=None),
        "wrong audience": signer.token(aud="another-service"),
        "no audience": signer.token(aud=None),
        "an audience of numbers": signer.token(aud=[1]),
        "wrong issuer": signer.token(iss="https://evil.example"),
        "issuer with a slash": signer.token(iss=ISSUER + "/"),
        "unknown kid": signer.token(headers={"kid": "other"}),
        "no kid": signer.token(headers={"kid": None}),
        "kid of another key": signer.token(headers={"kid": "rsa"}),
        "a path as kid": signer.token(headers={"kid": "../../etc/passwd"}),
        "self-signed": jwt.encode({"alg": "EdDSA", "kid": "ed"}, body, stranger, ["EdDSA"]),
        "its own key in the header": jwt.encode(
            {"alg": "EdDSA", "kid": "ed", "jwk": own}, body, stranger, ["EdDSA"]
        ),
        "alg none": f"{_b64({'alg': 'none', 'kid': 'ed'})}.{payload}.",
        "alg None": f"{_b64({'alg': 'None', 'kid': 'ed'})}.{payload}.",
        "alg none with a signature": f"{_b64({'alg': 'none', 'kid': 'ed'})}.{payload}.{signature}",
        "signed with the public key": hs,
        "RS512": jwt.encode({"alg": "RS512", "kid": "rsa"}, body, signer.keys["RS256"], ["RS512"]),
        "other claims": f"{header}.{admin}.{signature}",
        "no signature": f"{header}.{payload}.",
        "unknown critical header": signer.token().replace(
            header, _b64({"alg": "EdDSA", "kid": "ed", "crit": ["exp"]}), 1
        ),
        "no JSON": f"{header}.{_b64(b'{')}.{signature}",
        "a list": f"{header}.{_b64(b'[1]')}.{signature}",
        "deep": f"{header}.{_b64(b'[' * 5000)}.{signature}",
        "endless": f"{header}.{'A' * 100_000}.{signature}",
        "dots": "a.b.c",
        "empty parts": "..",
        "not ASCII": f"{header}.{payload}.é",
        "expiry of text": signer.token(exp="tomorrow"),
    }


VERBS = ("rollback", "hold", "pause", "lift", "resume", "promote")


def test_every_dangerous_verb_refuses_every_lie(
    house: House, client: TestClient, signer: Signer
) -> None:
    house.add_rollout()
    house.enrol("car-1")
    urls = [f"/api/v1/rollouts/cars:{verb}" for verb in VERBS]
    urls += ["/api/v1/stop", "/api/v1/devices", "/api/v1/devices/car-1:move",
             "/api/v1/devices/car-1:retire", "/api/v1/devices/car-1:quarantine",
             "/api/v1/devices/car-1:replace"]  # fmt: skip
    with reading(house.deps.engine) as conn:
        before = conn.execute(select(audit.c.seq)).all()
    for name, token in lies(signer).items():
        headers = {**bearing(token), "If-Match": "*"}
        for url in urls:
            try:
                code = client.post(url, json={"reason": "x"}, headers=headers).status_code
            except UnicodeEncodeError:
                continue  # no client can send it
            assert code == 401, (name, url)
    good = {**bearing(signer.token()), "If-Match": "*"}
    assert client.post(urls[2], json={"reason": "x"}, headers=good).status_code == 202
    with reading(house.deps.engine) as conn:
        assert len(conn.execute(select(audit.c.seq)).all()) == len(before) + 1


def test_clocks_may_differ_by_half_a_minute(client: TestClient, signer: Signer) -> None:
    for said in ({"exp": int(NOW) - 20}, {"iat": int(NOW) + 20}, {"nbf": int(NOW) + 20}):
        assert (
            client.get("/api/v1/rollouts", headers=bearing(signer.token(**said))).status_code == 200
        )


def test_a_name_that_a_person_chose_names_nobody() -> None:
    people = rolemap.RoleMap()
    assert people.principal({"sub": "7", "email": "a@x"}, via="jwt").name == "sub:7"
    said = {"sub": "7", "email": "a@x", "email_verified": True}
    assert people.principal(said, via="jwt").name == "a@x"
    assert people.principal({**said, "email": "a\u202e\n"}, via="jwt").name == "sub:7"
    assert people.principal({**said, "email": "local"}, via="jwt").name == "local"


# -- keys -----------------------------------------------------------------------------------------


class Remote:
    """A provider's key set over the network: counts, fails, changes."""

    def __init__(self, signer: Signer) -> None:
        self.signer, self.up, self.asked = signer, True, 0
        self.names: tuple[str, ...] = ("RS256",)

    def __call__(self) -> bytes:
        self.asked += 1
        if not self.up:
            raise OSError("away")
        chosen = [self.signer.keys[name] for name in self.names]
        return json.dumps(KeySet(chosen).as_dict()).encode()


def check(keys: Keys, token: str, now: float = NOW) -> Any:
    return claims(token, keys, issuer=ISSUER, audience=AUDIENCE, now=now)


def test_keys_are_fetched_once_kept_and_fetched_again_for_a_new_one(
    signer: Signer, tmp_path: Path
) -> None:
    now = [NOW]
    remote = Remote(signer)
    keys = Keys(pinned=None, fetch=remote, kept=tmp_path / "kept", clock=lambda: now[0])
    for _ in range(5):
        assert check(keys, signer.token("RS256"))["sub"] == "u-1"
    assert remote.asked == 1
    remote.names = ("RS256", "EdDSA")  # rotated: a kid that we do not know yet
    with pytest.raises(NotBelieved):
        check(keys, signer.token("EdDSA"))  # asked a moment ago: not again for every forgery
    now[0] += 61
    assert check(keys, signer.token("EdDSA"))["sub"] == "u-1"
    assert remote.asked == 2
    remote.up = False
    now[0] += FRESH + 61
    fresh = {"iat": int(now[0]), "exp": int(now[0]) + 60}
    assert check(keys, signer.token("EdDSA", **fresh), now[0])["sub"] == "u-1"
    again = Keys(pinned=None, fetch=remote, kept=tmp_path / "kept", clock=lambda: now[0])
    assert check(again, signer.token("EdDSA", **fresh), now[0])["sub"] == "u-1"


def test_a_provider_that_was_never_heard_lets_nobody_in(signer: Signer, tmp_path: Path) -> None:
    remote = Remote(signer)
    remote.up = False
    keys = Keys(pinned=None, fetch=remote, kept=tmp_path / "kept", clock=lambda: NOW)
    for _ in range(3):
        with pytest.raises(NotBelieved):
            check(keys, signer.token("RS256"))
    assert remote.asked == 1


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'{"keys": 1}', b'{"keys": [1]}', b'{"keys": []}',
             b'{"keys": [{"kty": "oct", "k": "AAAA", "kid": "ed"}]}', b"[" * 50_000],
)  # fmt: skip
def test_a_key_set_that_is_none_lets_nobody_in(signer: Signer, tmp_path: Path, body: bytes) -> None:
    keys = Keys(pinned=None, fetch=lambda: body, kept=tmp_path / "k", clock=lambda: NOW)
    with pytest.raises(NotBelieved):
        check(keys, signer.token())


def test_a_pinned_file_is_read_again_when_it_changes(signer: Signer, tmp_path: Path) -> None:
    mine = Signer(tmp_path / "jwks.json", signer.keys)
    mine.publish("RS256")
    keys = Keys(pinned=mine.file, fetch=None, kept=None, clock=lambda: NOW)
    assert check(keys, signer.token("RS256"))
    with pytest.raises(NotBelieved):
        check(keys, signer.token("ES256"))
    mine.publish("ES256")
    os.utime(mine.file, (1, 1))
    assert check(keys, signer.token("ES256"))


@pytest.mark.parametrize(
    "text",
    ["grant = 1", "[[grant]]", '[[grant]]\nclaim = "g"\nvalue = "v"\nrole = "king"',
     '[[grant]]\nclaim = "g"\nvalue = "v"\nrole = "viewer"\nfleet = "eu"',
     '[[grant]]\nclaim = "g"\nvalue = "v"\nrole = "viewer"\nfleets = []', "colour = 1", "=", "\0"],
)  # fmt: skip
def test_a_role_map_with_a_mistake_gives_nobody_anything(tmp_path: Path, text: str) -> None:
    (tmp_path / "roles.toml").write_text(text)
    with pytest.raises(rolemap.BadRoleMap, match=r"roles\.toml"):
        rolemap.load(tmp_path / "roles.toml")


def test_settings_of_identity_are_whole_or_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="oidc_roles"):
        load({"oidc_issuer": ISSUER})
    with pytest.raises(SettingsError, match="oidc_issuer"):
        load({"oidc_audience": "x"})
    with pytest.raises(SettingsError, match="https"):
        load({"oidc_issuer": "http://id.example", "oidc_roles": tmp_path})
    with pytest.raises(SettingsError, match="auth required"):
        load({"listen": "0.0.0.0:1", "oidc_issuer": ISSUER, "oidc_roles": tmp_path})


# -- login at a provider --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def provider() -> Iterator[str]:
    """A standards-conforming OpenID provider that verifies PKCE, as a process of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    people = [
        {"sub": "ann", "email": "ann@example.com", "email_verified": True, "groups": ["oncall"]},
        {"sub": "bob", "email": "bob@example.com", "groups": ["rm"]},
        {"sub": "eve", "email": "ann@example.com", "email_verified": False, "groups": []},
    ]
    args = [arg for person in people for arg in ("--user-claims", json.dumps(person))]
    child = subprocess.Popen(
        [sys.executable, str(STRICT), "--port", str(port), *args],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    until = time.monotonic() + 30
    while True:
        try:
            httpx2.get(f"http://127.0.0.1:{port}/.well-known/openid-configuration")
            break
        except httpx2.TransportError:
            assert time.monotonic() < until
            assert child.poll() is None
            time.sleep(0.1)
    yield f"http://127.0.0.1:{port}"
    child.terminate()
    child.wait(10)


@pytest.fixture
def site(house: House, provider: str, tmp_path: Path) -> TestClient:
    (tmp_path / "roles.toml").write_text(ROLES)
    (tmp_path / "secret").write_text("hush\n")
    settings = house.deps.settings.model_copy(
        update={
            "auth": "required", "oidc_issuer": provider, "oidc_client_id": "bw",
            "oidc_client_secret_file": tmp_path / "secret", "oidc_roles": tmp_path / "roles.toml",
        }
    )  # fmt: skip
    app = create_app(replace(house.deps, settings=settings, clock=time.time))
    return TestClient(
        app, base_url="http://127.0.0.1:8420", client=("127.0.0.1", 1), follow_redirects=False
    )


def at_provider(url: str, person: str) -> str:
    """What the provider sends the browser back with, after the person's click there."""
    answer = httpx2.post(url, data={"sub": person}, follow_redirects=False)
    assert answer.status_code in (302, 303), answer.text
    where = urlsplit(answer.headers["location"])
    assert where.path == "/login/oidc/callback"
    return f"{where.path}?{where.query}"


def begin(site: TestClient, path: str = "/") -> str:
    sent = site.get("/login/oidc", params={"next": path})
    assert sent.status_code == 303, sent.text
    return str(sent.headers["location"])


def test_a_person_logs_in_and_out(site: TestClient) -> None:
    assert "Log in with your identity provider" in site.get("/login").text
    back = at_provider(begin(site, "/?fleet=eu"), "ann")
    done = site.get(back)
    assert (done.status_code, done.headers["location"]) == (303, "/?fleet=eu")
    assert site.get("/api/v1/rollouts").status_code == 200
    page = site.get("/")
    assert page.status_code == 200
    csrf = re.search(r'name="csrf" value="([^"]+)"', page.text)
    assert csrf is not None
    assert site.post("/logout", data={"csrf": csrf[1]}).status_code == 303
    assert site.get("/api/v1/rollouts").status_code == 401


def test_the_way_to_the_provider_carries_state_nonce_and_a_challenge(
    house: House, site: TestClient
) -> None:
    asked = {k: v[0] for k, v in parse_qs(urlsplit(begin(site)).query).items()}
    assert asked["response_type"] == "code"
    assert asked["redirect_uri"] == "http://127.0.0.1:8420/login/oidc/callback"
    assert asked["code_challenge_method"] == "S256"
    with reading(house.deps.engine) as conn:
        row = conn.execute(select(logins)).one()
    assert row.state == sha256(asked["state"].encode()).hexdigest()
    assert row.nonce == asked["nonce"]
    assert asked["code_challenge"] == _b64(sha256(row.verifier.encode()).digest())
    assert len(asked["state"]) >= 40


def test_a_return_works_once_and_in_its_own_browser(site: TestClient) -> None:
    back = at_provider(begin(site), "ann")
    other = TestClient(site.app, base_url="http://127.0.0.1:8420", follow_redirects=False)
    assert other.get(back).status_code == 403
    back = at_provider(begin(site), "ann")
    assert site.get(back).status_code == 303
    assert site.get(back).status_code == 403


def test_a_return_that_nobody_began_opens_nothing(site: TestClient) -> None:
    for query in ("", "?code=x", "?state=x&code=x", "?state=%00", "?error=denied"):
        answer = site.get(f"/login/oidc/callback{query}")
        assert answer.status_code in (400, 403), query
        assert (
            "set-cookie" not in answer.headers or "bellwether=" not in answer.headers["set-cookie"]
        )


def test_a_code_of_another_login_is_not_believed(site: TestClient) -> None:
    """Code injection: the victim's code, brought back with the attacker's state."""
    stolen = parse_qs(urlsplit(at_provider(begin(site), "ann")).query)["code"][0]
    mine = parse_qs(urlsplit(begin(site)).query)["state"][0]
    answer = site.get("/login/oidc/callback", params={"state": mine, "code": stolen})
    assert answer.status_code == 403
    assert "not valid" in answer.text


def test_the_provider_takes_a_code_from_whoever_knows_its_verifier_alone(
    house: House, site: TestClient
) -> None:
    """PKCE: the provider itself compares the verifier with the challenge of the beginning."""
    back = at_provider(begin(site), "ann")
    with writing(house.deps.engine) as conn:
        conn.execute(update(logins).values(verifier="x" * 64))
    answer = site.get(back)
    assert answer.status_code == 403, answer.text
    assert site.get("/api/v1/rollouts").status_code == 401
    assert site.get(at_provider(begin(site), "ann")).status_code == 303  # and with its own it does


def test_who_has_no_role_is_told_so(site: TestClient) -> None:
    answer = site.get(at_provider(begin(site), "eve"))
    assert answer.status_code == 403
    assert "sub:eve has no role here" in answer.text
    assert site.get("/api/v1/rollouts").status_code == 401


def test_a_provider_that_is_away_leaves_tokens_working(house: House, tmp_path: Path) -> None:
    (tmp_path / "roles.toml").write_text(ROLES)
    client = house.with_settings(
        auth="required", oidc_issuer="http://127.0.0.1:9", oidc_client_id="bw",
        oidc_audience=AUDIENCE, oidc_roles=tmp_path / "roles.toml",
    )  # fmt: skip
    assert client.get("/login/oidc", follow_redirects=False).status_code == 503
    assert client.get("/api/v1/rollouts", headers=bearing("a.b.c")).status_code == 401
    assert client.get("/api/v1/rollouts", headers=house.token("viewer")).status_code == 200
    assert isinstance(house.deps.settings, Settings)
