"""The way in over TCP: keys, TLS, and pages from elsewhere. Over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import http.client
import json
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from test_server import ScriptedBoard

from edgemoa import cli
from edgemoa.api import doors, server
from edgemoa.api.doors import Door, Keys
from edgemoa.api.server import Api
from edgemoa.errors import (
    AddressInUseError,
    ConfigError,
    ForbiddenError,
    StateError,
    UnauthorizedError,
    UserError,
)

BODY = json.dumps({"messages": [{"role": "user", "content": "Why?"}]})
NAMES = frozenset({"pi", "pi.local"})


@contextlib.contextmanager
def listening(place: Path, door: Door) -> Iterator[int]:
    """A server in a thread of its own; its TCP port."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def call(coroutine: Any) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, loop).result(10)

    api = Api(ScriptedBoard(), place / "api.sock", 0o660, door=door)
    try:
        call(api.start())
        assert api._tcp is not None
        yield api._tcp.sockets[0].getsockname()[1]
        call(api.stop())
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def ask(port: int, path: str = "/v1/status", **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    with contextlib.closing(connection):
        connection.request(
            "GET", path, headers={k.replace("_", "-"): v for k, v in headers.items()}
        )
        response = connection.getresponse()
        told = response.read()
        code = json.loads(told)["error"]["code"] if response.status >= 400 else ""
        return response.status, code


def test_a_key_opens_and_its_revocation_closes_at_once(tmp_path: Path) -> None:
    keys = Keys(tmp_path / "state")
    key = keys.new("editor")
    with listening(tmp_path, Door("127.0.0.1", 0, keys, NAMES)) as port:
        assert ask(port) == (401, "unauthorized")
        assert ask(port, Authorization="Bearer nonsense") == (401, "unauthorized")
        assert ask(port, Authorization=f"Bearer {key}") == (200, "")
        assert ask(port, X_API_Key=key) == (200, "")
        assert ask(port, "/healthz") == (200, "")
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0)
        told = client.chat.completions.create(
            model="edgemoa", messages=[{"role": "user", "content": "Why?"}]
        )
        assert told.choices[0].message.content == "Because."
        client.close()
        Keys(tmp_path / "state").revoke("editor")  # as another process does
        assert ask(port, Authorization=f"Bearer {key}") == (401, "unauthorized")


def test_pages_from_elsewhere_are_refused(tmp_path: Path) -> None:
    with listening(tmp_path, Door("127.0.0.1", 0, None, NAMES)) as port:
        assert ask(port) == (200, "")
        for host in (f"localhost:{port}", "127.0.0.1", "[::1]:80", "PI.local", "a.localhost"):
            assert ask(port, Host=host)[0] == 200, host
        for host in (
            "evil.example",
            f"evil.example:{port}",
            "pi.evil",
            "localhost.evil",
            "",
            "[::",
        ):
            assert ask(port, Host=host) == (403, "forbidden"), host
        assert ask(port, Origin="http://localhost") == (403, "forbidden")


def test_without_a_key_only_where_the_machine_is_alone(tmp_path: Path) -> None:
    keys = Keys(tmp_path)

    def opened(listen: str, **more: Any) -> Door:
        settings = {"keyless": False, "certificate": "", "private_key": "", "keys": keys}
        return doors.open_door(listen, name="Pi", **{**settings, **more})

    with pytest.raises(ConfigError, match="no API key"):
        opened("127.0.0.1:0")
    assert opened("127.0.0.1:0", keyless=True).keys is None
    keys.new("one")
    assert opened("[::1]:80").keys is keys
    assert opened("[::1]:80").names == NAMES
    for host in ("0.0.0.0:80", "192.168.1.2:80", "[::]:80"):
        with pytest.raises(ConfigError, match="in the clear"):
            opened(host)
    with pytest.raises(ConfigError, match="go together"):
        opened("127.0.0.1:80", certificate="x")
    with pytest.raises(ConfigError, match="cannot be used"):
        opened("0.0.0.0:80", certificate="no.pem", private_key="no.pem")
    certificate, private_key = certify(tmp_path)
    with pytest.raises(ConfigError, match="keyless"):
        opened("0.0.0.0:80", keyless=True, certificate=certificate, private_key=private_key)
    assert opened("0.0.0.0:80", certificate=certificate, private_key=private_key).tls is not None


@pytest.mark.parametrize(
    "listen", ["", "11434", "localhost:80", "127.0.0.1", "127.0.0.1:x", "127.0.0.1:65536", ":80"]
)
def test_where_to_listen_is_an_address_and_a_port(listen: str) -> None:
    with pytest.raises(ConfigError, match="not an address and a port"):
        doors.parse_listen(listen)


def certify(folder: Path) -> tuple[str, str]:
    """A certificate of a key for this machine, in PEM files."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "pi")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    files = folder / "certificate.pem", folder / "key.pem"
    files[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    files[1].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return str(files[0]), str(files[1])


def test_over_tls(tmp_path: Path) -> None:
    certificate, private_key = certify(tmp_path)
    keys = Keys(tmp_path)
    key = keys.new("far")
    door = doors.open_door(
        "127.0.0.1:0",
        keyless=False, certificate=certificate, private_key=private_key, keys=keys, name="pi",
    )  # fmt: skip
    with listening(tmp_path, door) as port:
        context = ssl.create_default_context(cafile=certificate)
        connection = http.client.HTTPSConnection("localhost", port, context=context, timeout=10)
        with contextlib.closing(connection):
            connection.request("GET", "/v1/status", headers={"Authorization": f"Bearer {key}"})
            assert connection.getresponse().status == 200
        with pytest.raises((OSError, http.client.HTTPException)):
            ask(port)


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        door = Door("127.0.0.1", other.getsockname()[1], None, NAMES)

        async def start() -> None:
            api = Api(ScriptedBoard(), tmp_path / "api.sock", 0o660, door=door)
            try:
                await api.start()
            finally:
                await api.stop()

        with pytest.raises(AddressInUseError, match="is in use"):
            asyncio.run(start())
        assert not (tmp_path / "api.sock").exists()


def test_who_says_nothing_makes_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "SILENT_S", 0.4)
    with listening(tmp_path, Door("127.0.0.1", 0, None, NAMES)) as port:
        talks = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        silent = socket.create_connection(("127.0.0.1", port))
        half = socket.create_connection(("127.0.0.1", port))
        half.sendall(b"GET /v1/status HTTP/1.1\r\nHost:")
        with contextlib.closing(talks), silent, half:
            for _ in range(2):
                talks.request("GET", "/v1/status")
                assert talks.getresponse().read()
                time.sleep(0.5)
            for quiet in (silent, half):
                quiet.settimeout(5)
                with contextlib.suppress(ConnectionResetError):
                    assert quiet.recv(100) == b""
            talks.request("GET", "/v1/status")
            assert talks.getresponse().status == 200


def test_the_file_of_keys(tmp_path: Path) -> None:
    keys = Keys(tmp_path)
    assert keys.names() == []
    key = keys.new("a.b-c_1")
    assert key not in keys.file.read_text()
    assert keys.file.stat().st_mode & 0o777 == 0o600
    for name in ("", "a b", "-x", "é", "x" * 65, "a\nb"):
        with pytest.raises(UserError, match="cannot be"):
            keys.new(name)
    with pytest.raises(UserError, match="there is a key"):
        keys.new("a.b-c_1")
    with pytest.raises(UserError, match="there is no key"):
        keys.revoke("other")
    assert Keys(tmp_path).who(key) == "a.b-c_1"
    for wrong in ("", key[:-1], key + "a", "é"):
        with pytest.raises(UnauthorizedError):
            keys.who(wrong)
    keys.file.chmod(0o644)
    with pytest.raises(StateError, match="read by other users"):
        Keys(tmp_path).names()
    keys.file.chmod(0o600)
    keys.file.write_bytes(b"rubbish\n")
    with pytest.raises(StateError, match="damaged"):
        keys.who(key)


def test_the_origin_that_browsers_send() -> None:
    with pytest.raises(ForbiddenError, match="web pages"):
        doors.check_origin("localhost", "null", NAMES)
    doors.check_origin("pi.local.", None, NAMES)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    at = ["--set", f"board.state_dir={tmp_path}"]
    assert cli.main(["api-key", "new", "editor", *at]) == 0
    key = capsys.readouterr().out.strip()
    assert Keys(tmp_path).who(key) == "editor"
    assert cli.main(["api-key", "list", "--json", *at]) == 0
    assert json.loads(capsys.readouterr().out) == {"names": ["editor"]}
    assert cli.main(["api-key", "new", *at]) == 2
    assert cli.main(["api-key", "revoke", "editor", *at]) == 0
    assert Keys(tmp_path).names() == []
