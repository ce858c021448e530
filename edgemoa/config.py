"""Settings: defaults, then the board's profile, then a TOML file, then the environment, then flags;
checked as a whole.

Each setting is declared once, with its type, bounds and meaning; the file's reference
(``edgemoa config``), the environment names and the error messages all follow from it.
``EDGEMOA_NET_PORT=7946`` and ``--set net.port=7946`` both mean ``[net] port = 7946``.
"""

from __future__ import annotations

import difflib
import json
import os
import tomllib
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from edgemoa.core import limits
from edgemoa.errors import ConfigError

ENV_PREFIX = "EDGEMOA_"
MAX_FILE_BYTES = 256 * limits.KIB


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The base of every section: nothing unknown is let through."""


class Board(Section, frozen=True):
    """This board and where it keeps things."""

    name: Annotated[
        str,
        Meta(max_length=limits.MAX_NAME_BYTES, description="shown to people; host name if empty"),
    ] = ""
    state_dir: Annotated[
        str, Meta(description="identity, paired boards; made 0700 if missing (default: XDG state)")
    ] = ""
    models_dir: Annotated[str, Meta(description="model folders (default: XDG data)")] = ""
    profile: Annotated[
        str,
        Meta(
            max_length=limits.MAX_NAME_BYTES,
            description="defaults for this kind of board, as `edgemoa board` shows them; auto: as"
            " it is found to be; none: what is built in",
        ),
    ] = "auto"


class Model(Section, frozen=True):
    """The model that this board answers with."""

    name: Annotated[
        str,
        Meta(
            max_length=limits.MAX_NAME_BYTES,
            description="a model from `edgemoa model list` (default: `edgemoa model set-default`)",
        ),
    ] = ""
    threads: Annotated[
        int,
        Meta(
            ge=0,
            le=256,
            description="threads for the model; 0 means what `edgemoa bench --tune` found, or the"
            " first start",
        ),
    ] = 0
    backend: Annotated[
        Literal["auto", "slots", "genai"],
        Meta(
            description="what runs the model: slots (many jobs at a time, imported models only),"
            " genai (one at a time, any model); auto: slots where it can"
        ),
    ] = "auto"
    slots: Annotated[
        int,
        Meta(
            ge=0,
            le=32,
            description="jobs at a time, of slots; 0 means what was found along with the threads,"
            " where memory allows it",
        ),
    ] = 0
    memory_mb: Annotated[
        int,
        Meta(
            ge=0,
            le=1 << 20,
            description="for keys and values, of slots; 0 means half of what is available when the"
            " model is loaded",
        ),
    ] = 0
    provider: Annotated[
        Literal["cpu", "cuda", "migraphx", "nvtensorrtrtx", "openvino", "qnn", "webgpu"],
        Meta(
            description="what computes; any other than cpu is for genai and builds of"
            " onnxruntime-genai that have it, and the CPU stands in where it cannot be used"
        ),
    ] = "cpu"
    end_loops: Annotated[bool, Meta(description="end a text that only repeats itself")] = True


class Moa(Section, frozen=True):
    """The plan of a distributed Mixture-of-Agents, unless a request asks for another."""

    layers: Annotated[
        int, Meta(ge=0, le=limits.MAX_LAYERS, description="M; 0 answers on this board alone")
    ] = 1
    proposers: Annotated[
        int, Meta(ge=0, le=limits.MAX_PROPOSERS, description="k, peers beside the owner per layer")
    ] = 2
    quorum: Annotated[
        int,
        Meta(
            ge=0,
            le=limits.MAX_PROPOSERS + 1,
            description="a layer goes on when so many proposals are there; 0 waits for all",
        ),
    ] = 0
    layer_deadline_s: Annotated[
        int, Meta(ge=1, le=86_400, description="a layer goes on without what is late")
    ] = 120
    aggregator: Annotated[
        Literal["owner", "auto", "strongest"],
        Meta(
            description="who writes the answer: this board, as a stream; auto: a peer where that is"
            " much faster, in one piece; or always the strongest board"
        ),
    ] = "owner"
    promise_s: Annotated[
        int,
        Meta(
            ge=1,
            le=86_400,
            description="a prompt is accepted with a plan that can be expected to be done by then",
        ),
    ] = 300
    deadline_s: Annotated[
        int, Meta(ge=1, le=86_400, description="a prompt is answered or refused within this time")
    ] = 600
    proposal_max_tokens: Annotated[
        int, Meta(ge=1, le=4096, description="a proposal's length at most")
    ] = 256
    proposal_temperature: Annotated[
        float, Meta(ge=0, le=2, description="for peers' proposals; the owner's own is greedy")
    ] = 0.7
    max_tokens: Annotated[
        int,
        Meta(ge=1, le=limits.MAX_COMPLETION_TOKENS, description="an answer's length at most"),
    ] = 512
    aggregation_prompt_file: Annotated[
        str,
        Meta(description="replaces what asks for an aggregation; {request} repeats the request"),
    ] = ""


class Queue(Section, frozen=True):
    """Bounds of this board's queue, beside those that follow from what is measured on it."""

    own_requests: Annotated[
        int | Literal["auto"],
        Meta(description="prompts of its own at a time, at most; auto: `edgemoa status` shows it"),
    ] = "auto"
    peer_jobs: Annotated[
        int | Literal["auto"],
        Meta(
            description="peers' jobs waiting or running, at most; 0: it works for its own user"
            " alone"
        ),
    ] = "auto"
    memory_mb: Annotated[
        int,
        Meta(
            ge=0,
            le=1 << 16,
            description="for prompts and proposals, a third each for its own, for peers', and for"
            " what arrives; 0: an eighth of what is available at the start, 64 at most",
        ),
    ] = 0
    pick: Annotated[
        Literal["shortest", "capacity", "uniform"],
        Meta(
            description="which peers are asked: those that would be done first, of a few; by what"
            " they have to spare; or any"
        ),
    ] = "shortest"
    own_proposal: Annotated[
        Literal["auto", "always"],
        Meta(description="auto: this board leaves proposing to its peers where it is much slower"),
    ] = "auto"


class Net(Section, frozen=True):
    """How boards reach each other."""

    listen: Annotated[str, Meta(description='address to listen on, or "" for every interface')] = ""
    port: Annotated[
        int, Meta(ge=0, le=65_535, description="TCP and UDP port; 0 lets the system choose")
    ] = 0
    mdns: Annotated[bool, Meta(description="find boards by mDNS and be found")] = True
    interfaces: Annotated[
        tuple[str, ...],
        Meta(max_length=16, description="mDNS only on these addresses (default: every usual one)"),
    ] = ()
    seeds: Annotated[
        tuple[str, ...],
        Meta(max_length=64, description='boards to try beside mDNS: "host:port"'),
    ] = ()
    join_secret_file: Annotated[
        str, Meta(description="boards that hold the same secret pair by themselves")
    ] = ""


class Api(Section, frozen=True):
    """The local API."""

    socket: Annotated[
        str, Meta(description="path of the Unix socket (default: in the runtime directory)")
    ] = ""
    socket_mode: Annotated[
        int, Meta(ge=0, le=0o777, description="permission bits of the socket, e.g. 0o660")
    ] = 0o660
    listen: Annotated[
        str,
        Meta(
            description='address and port to take requests at over TCP, e.g. "127.0.0.1:11434";'
            " empty: only the socket"
        ),
    ] = ""
    keyless: Annotated[
        bool, Meta(description="on 127.0.0.1 or ::1, need no API key (`edgemoa api-key`)")
    ] = False
    tls_certificate: Annotated[
        str, Meta(description="PEM file, for TCP; needed where others can reach it")
    ] = ""
    tls_key: Annotated[str, Meta(description="PEM file with its private key")] = ""
    keep_answers_h: Annotated[
        int,
        Meta(
            ge=0,
            le=8_760,
            description="for how many hours that the board runs an answer can be fetched again",
        ),
    ] = 24
    keep_answers_mb: Annotated[
        int, Meta(ge=1, le=4_096, description="what these answers may take on the disk, packed")
    ] = 64


class Log(Section, frozen=True):
    """What is logged, to standard error. Never a prompt, an answer or a secret."""

    level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="the least that is logged")
    ] = "info"
    format: Annotated[
        Literal["auto", "text", "json"], Meta(description="auto: text on a terminal, else JSON")
    ] = "auto"


class Config(Section, frozen=True):
    """All settings of one board."""

    board: Board = Board()
    model: Model = Model()
    moa: Moa = Moa()
    queue: Queue = Queue()
    net: Net = Net()
    api: Api = Api()
    log: Log = Log()

    def state_dir(self) -> Path:
        """Where identity and paired boards are kept."""
        if self.board.state_dir:
            return Path(self.board.state_dir).expanduser()
        return _xdg("XDG_STATE_HOME", ".local/state") / "edgemoa"

    def socket_path(self) -> Path:
        """Where the local API listens."""
        return Path(self.api.socket).expanduser() if self.api.socket else default_socket_path()


def default_socket_path() -> Path:
    """The local API's socket when nobody says otherwise: the system daemon's if this user may
    reach it or is root, else the user's own."""
    system = Path("/run/edgemoa/api.sock")
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if os.access(system, os.W_OK) or os.geteuid() == 0 or not runtime:
        return system
    return Path(runtime) / "edgemoa" / "api.sock"


def _xdg(variable: str, fallback: str) -> Path:
    value = os.environ.get(variable)
    try:
        return Path(value) if value else Path.home() / fallback
    except RuntimeError:
        raise ConfigError(
            f"neither {variable} nor a home directory is known",
            hint="set HOME, or board.state_dir and board.models_dir",
        ) from None


def sections() -> Iterator[tuple[str, type[Section]]]:
    """Each section's name and type."""
    for field in msgspec.structs.fields(Config):
        yield field.name, field.type


def settings() -> Iterator[tuple[str, str, Any, str]]:
    """Each setting as (section, key, default, meaning)."""
    for section, kind in sections():
        hints = typing.get_type_hints(kind, include_extras=True)
        for field in msgspec.structs.fields(kind):
            meta = next(m for m in hints[field.name].__metadata__ if isinstance(m, Meta))
            yield section, field.name, field.default, meta.description or ""


def load(
    file: Path | None = None,
    *,
    below: Path | None = None,
    environment: Mapping[str, str] | None = None,
    flags: Iterable[str] = (),
    profile: Callable[[str], Mapping[str, Mapping[str, Any]]] = lambda _: {},
) -> Config:
    """Read and check the settings.

    :param file: a TOML file; None for none.
    :param below: another one, for what ``file`` does not say.
    :param profile: settings, by section and key, for what ``board.profile`` says; they are what
        counts where nothing else is set.
    :param environment: by default this process's.
    :param flags: ``section.key=value`` each.
    :raises ConfigError: with the place and the next step; nothing is half applied.
    """
    tree: dict[str, Any] = _read(file) if file else {}
    origin = str(file) if file else "defaults"
    _check_names(tree, origin)
    if below:
        other = _read(below)
        _check_names(other, str(below))
        tree = _over(tree, other)
    environment = os.environ if environment is None else environment
    known = {f"{ENV_PREFIX}{s}_{k}".upper(): (s, k) for s, k, *_ in settings()}
    for variable, value in environment.items():
        if variable in known:
            _put(tree, *known[variable], value)
    for flag in flags:
        path, equals, value = flag.partition("=")
        section, dot, key = path.partition(".")
        if not equals or not dot:
            raise ConfigError(
                f"'{flag}' is not a setting", hint="write section.key=value, e.g. net.port=7946"
            )
        _check_names({section: {key: value}}, "--set")
        _put(tree, section, key, value)
    config = _converted(tree, origin)
    if defaults := profile(config.board.profile):
        which = f"the profile {config.board.profile}"
        _check_names(defaults, which)
        config = _converted(_over(tree, defaults), f"{origin}, {which}")
    _check_relations(config)
    return config


def _over(
    tree: Mapping[str, Mapping[str, Any]], below: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Both, and where both say something the first."""
    return {name: {**below.get(name, {}), **tree.get(name, {})} for name in {*below, *tree}}


def _converted(tree: Mapping[str, Any], origin: str) -> Config:
    try:
        return msgspec.convert(tree, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"configuration ({origin}): {error}", hint="see `edgemoa config` for every setting"
        ) from error


def _check_relations(config: Config) -> None:
    if config.moa.quorum > config.moa.proposers + 1:
        raise ConfigError(
            f"moa.quorum = {config.moa.quorum} can never be met by "
            f"{config.moa.proposers} proposers and the owner",
            hint="lower moa.quorum, or 0 to wait for all",
        )
    for name, most in (
        ("own_requests", limits.MAX_OWN_REQUESTS),
        ("peer_jobs", limits.MAX_PEER_JOBS),
    ):
        bound = getattr(config.queue, name)
        least = 1 if name == "own_requests" else 0
        if bound != "auto" and not least <= bound <= most:
            raise ConfigError(
                f"queue.{name} = {bound} is not possible",
                hint=f'from {least} to {most}, or "auto"',
            )
    if config.moa.layer_deadline_s > config.moa.deadline_s:
        raise ConfigError(
            "moa.layer_deadline_s is longer than moa.deadline_s",
            hint="a layer has to end before the prompt's own deadline",
        )


def _read(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"{file} is too large for a configuration", hint="is it the file?")
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"cannot read {file}: {error.strerror}", hint="check the path and its permissions"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid TOML: {error}", hint="correct that line") from error


def _check_names(tree: Mapping[str, Any], origin: str) -> None:
    kinds = dict(sections())
    for section, table in tree.items():
        if section not in kinds:
            _unknown(section, kinds, f"section [{section}]", origin)
        if not isinstance(table, dict):
            raise ConfigError(f"{origin}: {section} must be a section", hint=f"write [{section}]")
        keys = kinds[section].__struct_fields__
        for key in table:
            if key not in keys:
                _unknown(key, keys, f"setting {section}.{key}", origin)


def _unknown(word: str, known: Iterable[str], what: str, origin: str) -> typing.NoReturn:
    near = difflib.get_close_matches(word, list(known), 1)
    guess = f"did you mean '{near[0]}'?" if near else "see `edgemoa config` for every setting"
    raise ConfigError(f"{origin}: unknown {what}", hint=guess)


def _put(tree: dict[str, Any], section: str, key: str, text: str) -> None:
    """Set one value given as text: TOML where the setting is not a plain string."""
    kind = typing.get_type_hints(dict(sections())[section])[key]
    value: Any = text
    if kind is not str and typing.get_origin(kind) is not Literal:
        try:
            value = tomllib.loads(f"v = {text}")["v"]
        except tomllib.TOMLDecodeError:
            if typing.get_origin(kind) is tuple:
                value = [part for part in text.split(",") if part]
    tree.setdefault(section, {})[key] = value


def reference() -> str:
    """A configuration file with every setting at its default, each with its meaning."""
    return to_toml(Config())


def to_toml(config: Config) -> str:
    """``config`` as a file that :func:`load` reads, each setting with its meaning."""
    lines: list[str] = []
    kinds = dict(sections())
    seen = ""
    for section, key, _, meaning in settings():
        if section != seen:
            seen = section
            lines += ["", f"# {(kinds[section].__doc__ or '').splitlines()[0]}", f"[{section}]"]
        lines.append(f"# {meaning}")
        lines.append(f"{key} = {_toml(key, getattr(getattr(config, section), key))}")
    return "\n".join(lines[1:]) + "\n"


def _toml(key: str, value: Any) -> str:
    match value:
        case bool():
            return str(value).lower()
        case int() if key.endswith("_mode"):
            return f"0o{value:o}"
        case str():
            return quoted(value)
        case tuple():
            return "[" + ", ".join(quoted(v) for v in value) + "]"
        case _:
            return str(value)


def quoted(text: str) -> str:
    """``text`` as a string of TOML."""
    # A JSON string is a TOML basic string, but for DEL, which TOML wants escaped.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007F")
