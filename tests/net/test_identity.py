"""The identity file: made once, whole, and readable by its owner only."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from edgemoa.core.envelope import board_id
from edgemoa.errors import DiskFullError, ProtocolError, StateError
from edgemoa.net import identity
from edgemoa.net.identity import load_identity, make_certificate, read_certificate


def test_made_once_and_kept(tmp_path: Path) -> None:
    state = tmp_path / "deep" / "state"
    first = load_identity(state)
    again = load_identity(state)
    assert (again.board_id, again.certificate) == (first.board_id, first.certificate)
    assert first.board_id == board_id(first.public_key)
    assert stat.S_IMODE(first.file.stat().st_mode) == 0o600
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    assert [f.name for f in state.iterdir()] == [identity.FILE_NAME]
    assert "PrivateKey" not in repr(first)
    assert "_key=" not in repr(first).replace("public_key=", "")


def test_another_process_was_quicker(tmp_path: Path) -> None:
    first = load_identity(tmp_path)
    identity._write(first.file, identity._pem(Ed25519PrivateKey.generate()), os.link)
    assert load_identity(tmp_path).board_id == first.board_id


def test_the_certificate_is_no_authority_and_needs_no_clock(tmp_path: Path) -> None:
    certificate = x509.load_der_x509_certificate(load_identity(tmp_path).certificate)
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert certificate.not_valid_before_utc.year == 1950
    assert certificate.not_valid_after_utc.year == 9999


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660])
def test_readable_by_others(tmp_path: Path, mode: int) -> None:
    load_identity(tmp_path).file.chmod(mode)
    with pytest.raises(StateError, match="other users") as caught:
        load_identity(tmp_path)
    assert "chmod 600" in caught.value.hint


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_of_another_owner(tmp_path: Path) -> None:
    os.chown(load_identity(tmp_path).file, 12_345, 12_345)
    with pytest.raises(StateError, match="does not belong"):
        load_identity(tmp_path)


def pem(key: object, certificate: x509.Certificate) -> bytes:
    return key.private_bytes(  # type: ignore[attr-defined, no-any-return]
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    ) + certificate.public_bytes(serialization.Encoding.PEM)


def test_damaged(tmp_path: Path) -> None:
    file = load_identity(tmp_path).file
    right = file.read_bytes()
    mine, other = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    for wrong in (
        b"",
        right[: len(right) // 2],
        right.replace(b"M", b"N", 3),
        b"x" * 100_000,
        pem(mine, make_certificate(other)),
        pem(generate_private_key(SECP256R1()), make_certificate(mine)),
    ):
        file.write_bytes(wrong)
        with pytest.raises(StateError) as caught:
            load_identity(tmp_path)
        assert "paired again" in caught.value.hint


def test_no_place_for_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StateError, match="cannot use"):
        load_identity(tmp_path / "file")


def test_no_room_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFullError):
        load_identity(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_certificates_that_must_not_be_pinned() -> None:
    key = Ed25519PrivateKey.generate()
    right = make_certificate(key)

    def made(
        *,
        ca: bool | None = False,
        issuer: Ed25519PrivateKey = key,
        other: bool = False,
        name: x509.Name = right.subject,
        more: x509.ExtensionType | None = None,
    ) -> bytes:
        builder = x509.CertificateBuilder(
            right.issuer,
            name,
            generate_private_key(SECP256R1()).public_key() if other else key.public_key(),
            right.serial_number,
            right.not_valid_before_utc,
            right.not_valid_after_utc,
        )
        if ca is not None:
            builder = builder.add_extension(x509.BasicConstraints(ca, None), critical=True)
        if more is not None:
            builder = builder.add_extension(more, critical=False)
        return builder.sign(issuer, None).public_bytes(serialization.Encoding.DER)

    assert read_certificate(made()) == key.public_key().public_bytes_raw()
    for der in (
        made(ca=True),
        made(ca=None),
        made(issuer=Ed25519PrivateKey.generate()),
        made(other=True),
        made(name=x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "mallory")])),
        # Text that is none: Python's ssl would raise in the event loop after the handshake.
        made(
            more=x509.SubjectAlternativeName(
                [x509.OtherName(x509.ObjectIdentifier("1.3.6.1.5.5.7.8.9"), b"\x0c\2\xff\xfe")]
            )
        ),
        made()[:-1],
        made() + b"\0",
        bytes(100_000),
    ):
        with pytest.raises(ProtocolError):
            read_certificate(der)


@given(st.binary(max_size=400))
def test_any_bytes_are_a_certificate_or_raise(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        read_certificate(data)


@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")
@pytest.mark.filterwarnings("ignore:Attribute's length:UserWarning")
def test_a_changed_certificate_raises() -> None:
    right = make_certificate(Ed25519PrivateKey.from_private_bytes(b"c" * 32)).public_bytes(
        serialization.Encoding.DER
    )
    for at, byte in enumerate(right):
        for flip in (1, 2, 4, 8, 16, 32, 64, 128, 3, 255):
            with pytest.raises(ProtocolError):
                read_certificate(right[:at] + bytes([byte ^ flip]) + right[at + 1 :])
