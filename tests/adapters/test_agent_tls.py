"""A device whose broker speaks TLS: heard when the system trusts the broker, silent when not."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import NameOID
from paho.mqtt import client as mqtt

from controller.keys import DirectorKey
from device_agent.agent import Identity

KEY = DirectorKey(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
PATIENCE = 60.0
MOSQUITTO = shutil.which("mosquitto") or "/usr/sbin/mosquitto"


def test_a_device_speaks_tls_with_a_broker_that_the_system_trusts(
    tmp_path: Path, broker: tuple[int, int]
) -> None:
    plain, secure = broker
    assert _heard(tmp_path, plain, secure, trusted=tmp_path / "broker.pem", patience=PATIENCE)


def test_a_device_says_nothing_to_a_broker_that_nobody_vouches_for(
    tmp_path: Path, broker: tuple[int, int]
) -> None:
    plain, secure = broker
    _certificate(tmp_path / "other")
    trusted = tmp_path / "other" / "broker.pem"
    assert not _heard(tmp_path, plain, secure, trusted=trusted, patience=3.0)


def _heard(root: Path, plain: int, secure: int, *, trusted: Path, patience: float) -> bool:
    """Does the presence of a device behind the TLS port reach the broker?"""
    heard, ready = threading.Event(), threading.Event()
    client: Any = mqtt.Client(
        mqtt.CallbackAPIVersion.VERSION2,  # type: ignore[attr-defined,unused-ignore]
        protocol=mqtt.MQTTv5,
    )
    client.on_message = lambda *_: heard.set()
    client.on_subscribe = lambda *_: ready.set()
    client.connect("127.0.0.1", plain)
    client.loop_start()
    client.subscribe("bw/v1/car-1/presence", 1)
    assert ready.wait(PATIENCE)
    words = [sys.executable, "-m", "device_agent", "run", "--dir", str(_enrolled(root, secure))]
    environment = os.environ | {"SSL_CERT_FILE": str(trusted), "SSL_CERT_DIR": str(root / "none")}
    with subprocess.Popen(words, env=environment, stderr=subprocess.DEVNULL) as agent:
        found = heard.wait(patience)
        agent.terminate()
    client.disconnect()
    client.loop_stop()
    return found


def _enrolled(root: Path, port: int) -> Path:
    directory = root / "car"
    directory.mkdir()
    identity = Identity(
        device="car-1",
        keys=(KEY.public_hex,),
        server="http://127.0.0.1:9",
        broker_url=f"mqtts://127.0.0.1:{port}",
        broker_username="car-1",
        broker_password="secret",
    )
    (directory / "identity.json").write_text(identity.to_json())
    return directory


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[tuple[int, int]]:
    """(plain port, TLS port) of one Mosquitto."""
    ports = []
    for _ in range(2):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            ports.append(int(probe.getsockname()[1]))
    _certificate(tmp_path)
    config = tmp_path / "mosquitto.conf"
    user = "user root\n" if os.getuid() == 0 else ""
    config.write_text(
        f"{user}allow_anonymous true\npersistence false\nlistener {ports[0]} 127.0.0.1\n"
        f"listener {ports[1]} 127.0.0.1\n"
        f"certfile {tmp_path / 'broker.pem'}\nkeyfile {tmp_path / 'broker.key'}\n"
    )
    with subprocess.Popen([MOSQUITTO, "-c", str(config)], stderr=subprocess.DEVNULL) as child:
        for port in ports:
            _listening(port)
        yield ports[0], ports[1]
        child.terminate()


def _listening(port: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise TimeoutError(f"nobody listens on {port}")


def _certificate(folder: Path) -> None:
    """`broker.pem`, which vouches for 127.0.0.1 and for itself, and its key."""
    folder.mkdir(exist_ok=True)
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "broker")])
    address = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(address, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "broker.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    words = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8)
    secret = key.private_bytes(*words, serialization.NoEncryption())
    (folder / "broker.key").write_bytes(secret)
