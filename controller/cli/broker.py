"""`broker-config`: the files of a Mosquitto that is not our child, for `serve --broker`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from controller.cli.options import Database

PLUGIN = "/usr/lib/mosquitto_dynamic_security.so"  # where the official image has it


def register(app: typer.Typer) -> None:
    app.command("broker-config")(broker_config)


def broker_config(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write them.")],
    state_dir: Annotated[
        Path, typer.Option("--state-dir", help="The state directory of `serve`: its secret.")
    ],
    plugin: Annotated[str, typer.Option(help="The dynamic-security plugin, there.")] = PLUGIN,
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen on.")] = 1883,
    data: Annotated[str, typer.Option(help="Folder of the broker, there.")] = "/mosquitto/data",
    database: Database = None,
) -> None:
    """Write mosquitto.conf and dynamic-security.json for a broker of your own.

    Run it again at any time: accounts are made from the secret and the registry, a broker that
    forgot them is filled again.
    """
    import json
    import os

    from controller import broker_roles
    from controller.broker_child import load_secret
    from controller.cli.direct import open_engine
    from controller.store import devices as registry
    from telemetry.store.database import reading

    state_dir.mkdir(parents=True, exist_ok=True)
    directory.mkdir(parents=True, exist_ok=True)
    secret = load_secret(state_dir)
    with reading(open_engine(state_dir, database)) as conn:
        devices = [
            (row.id, broker_roles.device_password(secret, row.id, row.password_issue))
            for row in registry.accounts(conn)
        ]
    services = {name: broker_roles.service_password(secret, name) for name in broker_roles.SERVICES}
    rights = directory / "dynamic-security.json"
    with open(os.open(rights, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        json.dump(broker_roles.document(services, devices), file)
    (directory / "mosquitto.conf").write_text(_text(plugin, port, data))
    typer.echo(f"{directory}: mosquitto.conf, dynamic-security.json ({len(devices)} devices)")


def _text(plugin: str, port: int, data: str) -> str:
    return "\n".join(
        [
            # No `per_listener_settings`, and no option of authentication above the first listener:
            # with both, Mosquitto 2.0 also opens 0.0.0.0:1883 without asking anybody.
            "per_listener_settings false",
            "allow_anonymous false",
            f"plugin {plugin}",
            f"plugin_opt_config_file {data}/dynamic-security.json",
            f"listener {port}",
            "max_queued_messages 100000",
            "max_inflight_messages 1000",
            "max_packet_size 262144",
            "persistence true",
            f"persistence_location {data}/",
            "autosave_interval 10",
            "persistent_client_expiration 60d",
            "log_dest stdout",
            "connection_messages false",
            "",
        ]
    )
