"""The settings of `bellwether serve`: flags > environment (BELLWETHER_*) > a TOML file > defaults.

Rules: listening beyond loopback needs `auth: required`; an unknown key of the TOML file is an
error; what may be secret is named by file, never by value, so `--show-settings` shows everything.
"""

from __future__ import annotations

import ipaddress
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from controller.forge import check as check_forge

PREFIX = "BELLWETHER_"
Role = Literal["all", "api", "ingest", "controller"]


class SettingsError(ValueError):
    """A setting that cannot be used; the message names it and says what to write."""


class Settings(BaseSettings):
    """Everything that `serve` can be told."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True)

    repo: str = Field("", description="URL or path of the fleet repository")
    branch: str = Field("main", description="branch that is followed")
    path: str = Field("", description="folder of the manifests in the repository")
    state_dir: Path = Field(Path("bellwether-state"), description="where all state is kept")
    database: str | None = Field(None, description="postgresql+psycopg://… or sqlite:///FILE")
    broker: str | None = Field(None, description="mqtt(s)://… of a broker; none: our own child")
    listen: str = Field("127.0.0.1:8420", description="address and port of the HTTP service")
    public_url: str = Field("", description="how devices reach the HTTP service; none: from listen")
    role: Role = Field("all", description="all | api | ingest | controller")
    auth: Literal["loopback", "required"] = Field(
        "loopback", description="loopback: who reaches it without a token is the local admin"
    )
    oidc_issuer: str = Field("", description="identity provider: its issuer URL; none: tokens only")
    oidc_audience: str = Field("", description="`aud` of bearer JWTs for the API; none: no JWTs")
    oidc_client_id: str = Field("", description="our client at the provider; none: no page login")
    oidc_client_secret_file: Path | None = Field(None, description="file with the client's secret")
    oidc_jwks: str = Field("", description="file or URL of its keys; none: by discovery")
    oidc_roles: Path | None = Field(None, description="TOML file: which claims give which roles")
    notify: Path | None = Field(None, description="TOML file: who is told of what")
    webhook_secret_file: Path | None = Field(None, description="file with the Git webhook's secret")
    allowed_signers: Path | None = Field(None, description="ssh allowed-signers file for commits")
    release_signers: Path | None = Field(
        None, description="TOML file: whose signatures a release needs, and how many"
    )
    forge: str | None = Field(
        None, description="API URL of the repository at GitHub or Gitea, or file:///PATH: statuses"
    )
    forge_token_file: Path | None = Field(None, description="file with the forge's token")
    poll_interval: float = Field(15.0, gt=0, description="seconds between looks at the repository")
    tick_interval: float = Field(0.5, gt=0, description="seconds between turns of the loop")
    lease: float = Field(
        10.0, ge=1, description="seconds of silence after which another controller takes over"
    )
    audit_anchor: float = Field(
        86400.0, ge=0, description="seconds between commits that anchor the audit; 0: none alone"
    )
    rate_limit: float = Field(
        50.0,
        ge=0,
        description="requests a second of one caller, five seconds' worth at once; 0: any",
    )
    retention: float = Field(14 * 86400.0, gt=0, description="seconds that raw health is kept")

    @field_validator("public_url")
    @classmethod
    def _an_url(cls, value: str) -> str:
        if value and urlsplit(value).scheme not in ("http", "https"):
            raise ValueError("write http://HOST:PORT or https://HOST")
        return value.rstrip("/")

    @field_validator("oidc_issuer")
    @classmethod
    def _an_issuer(cls, value: str) -> str:
        parts = urlsplit(value)
        if value and parts.scheme != "https" and not is_loopback(parts.hostname or ""):
            raise ValueError("write https://ISSUER: plain http is for a provider on this machine")
        return value

    @field_validator("broker")
    @classmethod
    def _a_broker(cls, value: str | None) -> str | None:
        if value is not None and urlsplit(value).scheme not in ("mqtt", "mqtts"):
            raise ValueError("write mqtt://HOST:PORT or mqtts://HOST:PORT")
        return value

    @field_validator("forge")
    @classmethod
    def _a_forge(cls, value: str | None) -> str | None:
        if value is not None:
            check_forge(value)
        return value

    @field_validator("state_dir")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return value.expanduser().resolve()

    @model_validator(mode="before")
    @classmethod
    def _default_public_url(cls, values: Any) -> Any:
        if isinstance(values, dict) and not values.get("public_url"):
            host, port = split_address(str(values.get("listen", "127.0.0.1:8420")))
            shown = f"[{host}]" if ":" in host else host
            values["public_url"] = f"http://{shown}:{port}"
        return values

    @model_validator(mode="after")
    def _identity_is_whole(self) -> Settings:
        if self.oidc_issuer and self.oidc_roles is None:
            raise ValueError("oidc_roles: name a TOML file: without it nobody gets a role")
        if not self.oidc_issuer and (self.oidc_audience or self.oidc_client_id):
            raise ValueError("oidc_issuer: name the provider, as in https://id.example.com")
        return self

    @model_validator(mode="after")
    def _closed_beyond_loopback(self) -> Settings:
        if self.auth == "loopback" and not is_loopback(self.address[0]):
            raise ValueError(
                f"listen: {self.listen} can be reached by others: add --auth required, and make "
                "a token with `bellwether token create NAME --role admin --state-dir DIR`"
            )
        return self

    @property
    def address(self) -> tuple[str, int]:
        """(host, port) to listen on."""
        return split_address(self.listen)

    @property
    def control_url(self) -> str:
        return self.database or f"sqlite:///{self.state_dir / 'control.db'}"

    @property
    def telemetry_url(self) -> str:
        """PostgreSQL holds both; SQLite uses two files, each with its own writer."""
        if self.database is None:
            return f"sqlite:///{self.state_dir / 'telemetry.db'}"
        if not self.database.startswith("sqlite"):
            return self.database
        file = Path(self.database.removeprefix("sqlite:///"))
        return f"sqlite:///{file.with_name(file.stem + '-telemetry.db')}"

    def environment(self) -> dict[str, str]:
        """The same settings as environment variables, for a child process."""
        return {
            f"{PREFIX}{name.upper()}": str(value)
            for name in type(self).model_fields
            if (value := getattr(self, name)) is not None
        }

    def shown(self) -> dict[str, Any]:
        """For `--show-settings`; passwords inside URLs are covered."""
        table = self.model_dump(mode="json")
        for key in ("database", "broker", "repo"):
            if table[key]:
                table[key] = _covered(table[key])
        return table

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        given = init_settings.init_kwargs if isinstance(init_settings, InitSettingsSource) else {}
        table = dict(given.pop("config_table", {}))
        return init_settings, env_settings, InitSettingsSource(settings_cls, table)


def load(flags: Mapping[str, Any], config: Path | None = None) -> Settings:
    """The settings in force; raises SettingsError. A flag that is None was not given."""
    file = config or (Path(named) if (named := os.environ.get(f"{PREFIX}CONFIG")) else None)
    table = _toml(file) if file is not None else {}
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        return Settings(config_table=table, **given)  # type: ignore[call-arg]
    except ValidationError as error:
        raise SettingsError("; ".join(_say(fault) for fault in error.errors())) from None


def split_address(listen: str) -> tuple[str, int]:
    host, _, port = listen.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"listen: {listen!r}: write ADDRESS:PORT, as in 127.0.0.1:8420")
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _toml(file: Path) -> dict[str, Any]:
    try:
        table = tomllib.loads(file.read_text())
    except OSError as error:
        raise SettingsError(
            f"{file}: {error.strerror}; leave --config out, or name a file"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{file}: {error}") from None
    return {key.replace("-", "_"): value for key, value in table.items()}


def _say(fault: Any) -> str:
    where = ".".join(str(part) for part in fault["loc"])
    message = str(fault["msg"]).removeprefix("Value error, ")
    if fault["type"] == "extra_forbidden":
        known = ", ".join(sorted(Settings.model_fields))
        message = f"unknown setting; known: {known}"
    return f"{where}: {message}" if where else message


def _covered(url: str) -> str:
    parts = urlsplit(url)
    if not parts.password:
        return url
    return url.replace(f":{parts.password}@", ":***@", 1)
