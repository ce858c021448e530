"""The vectors, against the package and against the second implementation in ``decoder.py``."""

from __future__ import annotations

import json
import typing
from pathlib import Path
from typing import Any

import decoder
import generate
import msgspec
import pytest

from edgemoa.core import envelope
from edgemoa.core.messages import HOP_MESSAGES, BoardId, ChatMessage, Message, Sampling
from edgemoa.errors import ConfigError, EdgemoaError
from edgemoa.models.library import ModelFile, content_id
from edgemoa.net import copies, pairing, sealed, wire
from edgemoa.net.identity import read_certificate

VECTORS: dict[str, Any] = {
    name: json.loads((Path(__file__).parent / name).read_text()) for name in generate.FILES
}
IDENTITY, ENVELOPE = VECTORS["identity.json"], VECTORS["envelope.json"]
DATAGRAM, PAIRING = VECTORS["datagram.json"], VECTORS["pairing.json"]
COPIES, HOP = VECTORS["copies.json"], VECTORS["hop.json"]


def named(vector: dict[str, Any]) -> str:
    return str(vector.get("name", ""))


@pytest.mark.parametrize("file", VECTORS)
def test_the_files_are_what_the_package_makes(file: str) -> None:
    assert (Path(__file__).parent / file).read_text() == generate.rendered(file)


@pytest.mark.parametrize("vector", IDENTITY["good"], ids=named)
def test_identities(vector: dict[str, str]) -> None:
    public_key = bytes.fromhex(vector["public_key"])
    assert vector["board_id"] == envelope.board_id(public_key) == decoder.board_id(public_key)
    key_id = envelope.key_id(public_key)
    assert bytes.fromhex(vector["key_id"]) == key_id == decoder.key_id(public_key)
    board = BoardId(vector["board_id"])
    assert envelope.short_id(board) == decoder.short_id(board) == bytes.fromhex(vector["short_id"])
    assert envelope.check_board_id(vector["board_id"]) == vector["board_id"]
    assert decoder.check_board_id(vector["board_id"]) == vector["board_id"]
    assert read_certificate(bytes.fromhex(vector["certificate"])) == public_key


@pytest.mark.parametrize("vector", IDENTITY["bad"], ids=named)
def test_bad_identities(vector: dict[str, str]) -> None:
    for check in (envelope.check_board_id, decoder.check_board_id):
        with pytest.raises((EdgemoaError, decoder.RefusedError), match=vector["error"]):
            check(vector["board_id"])


def opened(data: bytes) -> dict[str, Any]:
    """The package's view of an envelope, in the vectors' form."""
    authors = [envelope.Author.from_key(bytes.fromhex(k)) for k in ENVELOPE["authors"]]
    result = envelope.verify(
        data,
        {envelope.key_id(a.key.public_bytes_raw()): a for a in authors},
        to=ENVELOPE["to"],
        to_boot=ENVELOPE["to_boot"],
    )
    message = json.loads(msgspec.json.encode(result.message))
    kind = message.pop("type")
    return {"boot": result.boot, "sequence": result.sequence, "type": kind, "message": message}


def opened_independently(data: bytes) -> dict[str, Any]:
    authors = [bytes.fromhex(k) for k in ENVELOPE["authors"]]
    return decoder.open_envelope(data, authors, ENVELOPE["to"], ENVELOPE["to_boot"])


@pytest.mark.parametrize("vector", ENVELOPE["good"], ids=named)
@pytest.mark.parametrize("view", [opened, opened_independently])
def test_envelopes(view: Any, vector: dict[str, Any]) -> None:
    expected = {k: v for k, v in vector.items() if k not in ("name", "envelope")}
    assert view(bytes.fromhex(vector["envelope"])) == expected


@pytest.mark.parametrize("vector", ENVELOPE["bad"], ids=named)
@pytest.mark.parametrize("view", [opened, opened_independently])
def test_bad_envelopes(view: Any, vector: dict[str, Any]) -> None:
    with pytest.raises((EdgemoaError, decoder.RefusedError)) as caught:
        view(bytes.fromhex(vector["envelope"]))
    assert str(caught.value) == vector["error"]


def hop(data: bytes) -> dict[str, Any]:
    """The package's view of a hop message, in the vectors' form."""
    message = envelope.decode_hop(data)
    told = {k: msgspec.to_builtins(getattr(message, k)) for k in message.__struct_fields__}
    return {"type": message.__struct_config__.tag, "message": json.loads(json.dumps(told))}


@pytest.mark.parametrize("view", [hop, decoder.open_hop])
def test_hop_messages(view: Any) -> None:
    kinds = set()
    for vector in HOP["good"]:
        told = view(bytes.fromhex(vector["body"]))
        assert told == {k: vector[k] for k in ("type", "message")}
        kinds.add(told["type"])
    assert kinds == {str(kind.__struct_config__.tag) for kind in HOP_MESSAGES}
    for vector in HOP["bad"]:
        with pytest.raises((EdgemoaError, decoder.RefusedError)) as caught:
            view(bytes.fromhex(vector["body"]))
        assert str(caught.value) == vector["error"], vector["name"]


def test_datagrams() -> None:
    names = (DATAGRAM["sender"], DATAGRAM["receiver"])
    mine, theirs = (bytes.fromhex(DATAGRAM[k]) for k in ("sender_secret", "receiver_secret"))
    key = bytes.fromhex(DATAGRAM["key"])
    assert key == sealed.direction_key(*names, mine, theirs)
    assert key == decoder.direction_key(*names, mine, theirs)
    back = bytes.fromhex(DATAGRAM["key_back"])
    assert back == sealed.direction_key(*names[::-1], theirs, mine)
    assert back == decoder.direction_key(*names[::-1], theirs, mine)
    opener = sealed.Opener(key)
    for vector in DATAGRAM["bad"]:
        for open_ in (opener.open, lambda d: decoder.open_datagram(key, d)):
            with pytest.raises((EdgemoaError, decoder.RefusedError)) as caught:
                open_(bytes.fromhex(vector["datagram"]))
            assert str(caught.value) == vector["error"], vector["name"]
    for vector in DATAGRAM["good"]:
        plaintext, datagram = (bytes.fromhex(vector[k]) for k in ("plaintext", "datagram"))
        assert datagram[:8].hex() == DATAGRAM["receiver_key_id"]
        assert decoder.open_datagram(key, datagram) == plaintext
        assert opener.open(datagram) == plaintext  # what was forged before did not move the window


def test_pairing() -> None:
    secret = pairing.parse_join_secret(PAIRING["join_secret"])
    key = bytes.fromhex(PAIRING["key"])
    assert secret.key == key == decoder.join_key(PAIRING["join_secret"])
    parts = [bytes.fromhex(PAIRING[k]) for k in ("member_certificate", "start", "accept")]
    digest = bytes.fromhex(PAIRING["transcript"])
    assert pairing._transcript(*parts) == digest == decoder.transcript(*parts)
    keys = {"J": bytes.fromhex(PAIRING["joiner"]), "M": bytes.fromhex(PAIRING["member"])}

    def check(proof: bytes, role: str) -> str:
        decoded = envelope.decode(pairing._proofs, proof, "pairing proof")
        pairing._check_proof(decoded, keys[role], secret.key, role.encode(), digest)
        return decoded.name

    def check_independently(proof: bytes, role: str) -> str:
        return decoder.check_proof(proof, key, role, digest, keys[role])

    for view in (check, check_independently):
        for vector in PAIRING["good"]:
            assert view(bytes.fromhex(vector["proof"]), vector["role"]) == vector["name"]
        for vector in PAIRING["bad"]:
            with pytest.raises((EdgemoaError, decoder.RefusedError)) as caught:
                view(bytes.fromhex(vector["proof"]), vector["role"])
            assert str(caught.value) == vector["error"], vector["name"]


@pytest.mark.parametrize("vector", PAIRING["bad_secrets"], ids=named)
def test_bad_join_secrets(vector: dict[str, str]) -> None:
    with pytest.raises(ConfigError) as caught:
        pairing.parse_join_secret(vector["join_secret"])
    assert "edgemoa join-secret new" in caught.value.hint
    if vector["join_secret"]:
        assert vector["join_secret"] not in str(caught.value)


def test_a_new_join_secret_is_one() -> None:
    texts = {pairing.new_join_secret() for _ in range(20)}
    assert len({pairing.parse_join_secret(t).key for t in texts}) == 20
    text = texts.pop()
    assert pairing.parse_join_secret(f" {text.upper()}\n") == pairing.parse_join_secret(text)
    assert "key" not in repr(pairing.parse_join_secret(text))


def copying(packet: bytes, side: str) -> Any:
    """The package's view of a question or an answer, in the vectors' form."""
    kinds = {"question": copies._asks, "answer": copies._answers}
    decoded: Any = envelope.decode(kinds[side], packet, side)  # type: ignore[arg-type]
    return generate.fields(decoded)


def copying_independently(packet: bytes, side: str) -> Any:
    told = decoder.copying(packet, side)
    return {k: v.hex() if isinstance(v, bytes) else v for k, v in told.items()}


@pytest.mark.parametrize("view", [copying, copying_independently])
def test_copies_of_models(view: Any) -> None:
    for vector in COPIES["good"]:
        assert view(bytes.fromhex(vector["packet"]), vector["side"]) == vector["fields"]
    for vector in COPIES["bad"]:
        with pytest.raises((EdgemoaError, decoder.RefusedError)) as caught:
            view(bytes.fromhex(vector["packet"]), vector["side"])
        assert str(caught.value) == vector["error"], vector["name"]


def test_the_id_of_a_model() -> None:
    files = tuple(ModelFile(f["name"], 1, f["sha256"]) for f in COPIES["files"])
    assert content_id(files) == COPIES["model_id"] == decoder.model_id(COPIES["files"])


def test_the_specification_names_every_field_and_error() -> None:
    page = (Path(__file__).parents[2] / "edgemoa" / "PROTOCOL.md").read_text()
    structures = (*typing.get_args(Message), ChatMessage, Sampling, wire.Hello)
    structures += (copies.Offer, *typing.get_args(copies.Ask), *typing.get_args(copies.Answer))
    structures += (wire.RosterNews, wire.Bye, pairing._CodeStart, pairing.News)
    for structure in (*structures, pairing._Start, pairing._Accept, pairing._Proof, pairing._Done):
        for name in structure.__struct_fields__:
            assert f"`{name}`" in page, (structure, name)
    vectors = [v for file in VECTORS.values() for v in file["bad"]]
    for vector in vectors:
        error = vector["error"]
        if error.endswith(" message"):
            error = "not a valid TYPE message"
        assert f"`{error}`" in page
