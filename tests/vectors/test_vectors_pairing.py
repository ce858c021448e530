"""The vectors of codes and rosters, against the package and the second implementation."""

from __future__ import annotations

from typing import Any

import decoder
import generate
import msgpack
import pytest
from spake2 import SPAKE2_A, SPAKE2_B
from test_vectors import VECTORS, named

from edgemoa.core import envelope, roster
from edgemoa.core.roster import Roster
from edgemoa.errors import EdgemoaError, ProtocolError
from edgemoa.net import pairing, wire
from edgemoa.net.identity import read_certificate

CODE, ROSTER = VECTORS["code.json"], VECTORS["roster.json"]


def test_pairing_by_code() -> None:
    code = pairing.parse_code(CODE["code"])
    halves = {r: bytes.fromhex(CODE[k]) for r, k in (("J", "joiner_half"), ("M", "member_half"))}
    key, digest = bytes.fromhex(CODE["key"]), bytes.fromhex(CODE["transcript"])
    run = generate.FixedSpake(SPAKE2_B, code, "bob")
    assert run.start() == halves["M"]
    assert decoder.code_key(run._run.finish(halves["J"])) == key
    parts = [bytes.fromhex(CODE[k]) for k in ("member_certificate", "start", "accept")]
    assert pairing._transcript(*parts) == digest == decoder.transcript(*parts)
    start = envelope.decode(pairing._starts, parts[1], "pairing request")
    assert isinstance(start, pairing._CodeStart)
    assert start.spake == halves["J"] == msgpack.unpackb(parts[1])["spake"]
    keys = {"J": bytes.fromhex(CODE["joiner"]), "M": bytes.fromhex(CODE["member"])}
    for vector in CODE["good"] + CODE["bad"]:
        data, role = bytes.fromhex(vector["proof"]), vector["role"]
        proof = envelope.decode(pairing._proofs, data, "pairing proof")
        if "error" not in vector:
            pairing._check_proof(proof, keys[role], key, role.encode(), digest)
            name = decoder.check_proof(data, key, role, digest, keys[role])
            assert name == proof.name == vector["name"]
            continue
        with pytest.raises(EdgemoaError) as caught:
            pairing._check_proof(proof, keys[role], key, role.encode(), digest)
        with pytest.raises(decoder.RefusedError) as refused:
            decoder.check_proof(data, key, role, digest, keys[role])
        assert str(caught.value) == str(refused.value) == vector["error"]


@pytest.mark.parametrize("vector", CODE["bad_halves"], ids=named)
def test_bad_halves_of_spake2(vector: dict[str, str]) -> None:
    run = generate.FixedSpake(SPAKE2_A, pairing.parse_code(CODE["code"]), "ann")
    run.start()
    with pytest.raises(EdgemoaError) as caught:
        run.finish(bytes.fromhex(vector["half"]))
    assert str(caught.value) == vector["error"]


def record_of(data: bytes) -> dict[str, Any]:
    """The package's view of a roster record, in the vectors' form."""
    record = roster.read(data, read_certificate)
    assert record is not None
    if not record.signed_by(bytes.fromhex(ROSTER["signer"])):
        raise ProtocolError("roster record with a wrong signature")
    fields = ("kind", "version", "by", "board", "successor", "name")
    return {f: getattr(record, f) for f in fields}


def record_independently(data: bytes) -> dict[str, Any]:
    return decoder.open_record(data, bytes.fromhex(ROSTER["signer"]))


@pytest.mark.parametrize("view", [record_of, record_independently])
def test_roster_records(view: Any) -> None:
    for vector in ROSTER["good"]:
        expected = {k: v for k, v in vector.items() if k != "record"}
        assert view(bytes.fromhex(vector["record"])) == expected
    for vector in ROSTER["bad"]:
        with pytest.raises((EdgemoaError, decoder.RefusedError)) as caught:
            view(bytes.fromhex(vector["record"]))
        assert str(caught.value) == vector["error"], vector["name"]


def test_roster_packets() -> None:
    records = [bytes.fromhex(r) for r in ROSTER["digest_of"]]
    ann = generate.ANN
    mine = Roster(ann.board_id, ann.public_key, ann.sign, read_certificate, records)
    assert decoder.roster_digest(records).hex() == ROSTER["digest"] == mine.digest.hex()
    packet = bytes.fromhex(ROSTER["packet"])
    news, independently = wire.read_roster(packet), decoder.open_roster_packet(packet)
    assert independently == {
        "digest": news.digest,
        "known": list(news.known),
        "records": list(news.records),
    }
    assert wire.read_bye(bytes.fromhex(ROSTER["bye"])) == "revoked by ann"
