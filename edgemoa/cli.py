"""The command line. A command imports what it needs when it runs, so that ``--help`` is quick."""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from edgemoa import __version__, cli_settings
from edgemoa.errors import EdgemoaError, InvalidPromptError, StateError, UserError

if TYPE_CHECKING:
    from edgemoa.config import Config
    from edgemoa.models.library import ModelLibrary

DEFAULT_PROMPT = "Why is the sky blue?"


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    arguments = _parser().parse_args(argv)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _terminated)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character
    try:
        try:
            code: int = arguments.func(arguments)
        except EdgemoaError as error:
            code = _show_error(error, as_json=getattr(arguments, "json", False))
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("edgemoa: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read us has had enough. Keep the interpreter from failing on it once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        return _show_error(
            StateError(f"{error.strerror or 'input or output failed'}{where}", hint=_LOOK)
        )
    return code


_LOOK = "check that path, its permissions and the room on its disk"


def _show_error(error: EdgemoaError, *, as_json: bool = False) -> int:
    if as_json:
        told = {"code": error.code, "message": str(error), "hint": error.hint}
        print(json.dumps({"error": told}), flush=True)
    print(f"edgemoa: {error}", file=sys.stderr)
    if error.hint:
        print(f"  next: {error.hint}", file=sys.stderr)
    return error.exit_code


def _terminated(number: int, _: object) -> NoReturn:
    raise SystemExit(128 + number)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="edgemoa",
        description="Small boards on one network answer a prompt together: each proposes with its "
        "own model, the board that was asked writes one answer out of the proposals.",
        epilog="`edgemoa COMMAND --help` tells more. Exit codes are in the README.",
    )
    parser.add_argument("--version", action="version", version=f"edgemoa {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    demo = _command(commands, "demo", _demo, "start boards on this machine and ask them something")
    demo.add_argument("prompt", nargs="?", default=DEFAULT_PROMPT, help="default: %(default)s")
    demo.add_argument("--boards", type=_count(1, 16), default=3, help="default: %(default)s")
    demo.add_argument(
        "--layers", "-M", type=_count(0, 8), default=1, help="layers of proposals (default: 1)"
    )
    demo.add_argument(
        "--proposers", "-k", type=_count(0, 16), default=2, help="peers per layer (default: 2)"
    )
    demo.add_argument("--max-tokens", type=_count(1, 32_768), help="length of the answer at most")
    demo.add_argument("--model", help="a model from `edgemoa model list` (default: as configured)")
    demo.add_argument("--json", action="store_true", help="print one JSON object")
    _config_options(demo)

    serve = _command(commands, "serve", _serve, "run this board's daemon")
    serve.add_argument("--state-dir", help="identity and paired boards (board.state_dir)")
    serve.add_argument("--socket", help="the local API's socket (api.socket)")
    serve.add_argument(
        "--wait-for-model",
        action="store_true",
        help="where the model is not there yet, serve all else and wait for it",
    )
    serve.add_argument("--stop-at-eof", action="store_true", help=argparse.SUPPRESS)
    _config_options(serve)

    ask = _command(commands, "ask", _ask, "ask the group, through this board's daemon")
    ask.add_argument("prompt", nargs="?", help="the prompt; read from standard input if left out")
    ask.add_argument("--plan", metavar="PLAN", help="M2k3: two layers of three peers; or alone")
    ask.add_argument("--layers", "-M", type=_count(0, 8), help="layers of proposals")
    ask.add_argument("--proposers", "-k", type=_count(0, 16), help="peers per layer")
    ask.add_argument("--no-peers", action="store_true", help="this board alone")
    ask.add_argument("--max-tokens", type=_count(1, 32_768), help="length of the answer at most")
    ask.add_argument("--temperature", type=float, help="0, the default, is greedy")
    ask.add_argument("--trace", action="store_true", help="then show who did what")
    ask.add_argument("--json", action="store_true", help="print one JSON object")
    _socket_option(ask)

    chat = _command(commands, "chat", _chat, "talk with the group, in a terminal")
    chat.add_argument("--max-tokens", type=_count(1, 32_768), help="length of an answer at most")
    chat.add_argument("--temperature", type=float, help="0, the default, is greedy")
    _socket_option(chat)

    trace = _command(commands, "trace", _trace, "how an answer came about")
    trace.add_argument("id", metavar="ID", help="of the request, as its answer says")
    trace.add_argument("--json", action="store_true", help="print one JSON object")
    _socket_option(trace)

    status = _command(commands, "status", _status, "how this board is doing")
    status.add_argument(
        "--watch",
        "-w",
        nargs="?",
        type=_count(1, 3600),
        const=2,
        metavar="SECONDS",
        help="show it again and again, every 2 s or as often as you say; Ctrl-C ends it",
    )
    status.add_argument("--json", action="store_true", help="print one JSON object")
    _socket_option(status)

    from edgemoa import cli_board, cli_devices

    board = _command(commands, "board", _board, "what kind of board this is, and what suits it")
    cli_board.add_arguments(board)
    _config_options(board)

    doctor = _command(
        commands, "doctor", _doctor, "check this board, and say what to do about what is wrong"
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    _socket_option(doctor)
    _config_options(doctor)

    devices = _command(commands, "devices", _devices, "boards of the group, and others in sight")
    devices.add_argument("--json", action="store_true", help="print one JSON object")
    _socket_option(devices)
    cli_devices.add_devices(devices)

    pair = _command(commands, "pair", _pair, "show a code; a board that is told it joins the group")
    pair.add_argument("--json", action="store_true", help="print a JSON object a line")
    _socket_option(pair)

    join = _command(commands, "join", _join, "join the group of the board that shows this code")
    cli_devices.add_join(join)
    join.add_argument("--json", action="store_true", help="print one JSON object")
    _socket_option(join)

    from edgemoa import cli_bench, cli_model, cli_plan, cli_sim

    bench = _command(commands, "bench", _bench, "measure how fast this board runs its model")
    cli_bench.add_arguments(bench)
    _config_options(bench)

    secret = _command(
        commands, "join-secret", _join_secret, "make a secret; boards that hold it pair themselves"
    )
    cli_devices.add_secret(secret)
    _config_options(secret)

    rotate = _command(
        commands, "rotate-key", _rotate_key, "give this board a new key; its daemon must not run"
    )
    rotate.add_argument("--json", action="store_true", help="print one JSON object")
    _config_options(rotate)

    key = _command(commands, "api-key", _api_key, "keys for applications that ask over TCP")
    key.add_argument("action", choices=("new", "list", "revoke"), help="new: print a fresh one")
    key.add_argument("name", nargs="?", default="", metavar="NAME", help="which application's")
    key.add_argument("--json", action="store_true", help="print one JSON object")
    _config_options(key)

    config = _command(commands, "config", _config, "show every setting, as a configuration file")
    config.add_argument("--check", metavar="FILE", help="only say whether FILE is valid")

    completion = _command(commands, "completion", _completion, "completion for a shell")
    completion.add_argument("shell", choices=("bash", "zsh", "fish"))

    sim = _command(commands, "sim", _sim, "simulate a group of boards on a virtual clock")
    cli_sim.add_arguments(sim)

    plan = _command(commands, "plan", _plan, "what boards can carry, and how fast they answer")
    cli_plan.add_arguments(plan)

    cli_model.add_parser(commands)
    return parser


def _command(commands: Any, name: str, function: Any, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text[0].upper() + text[1:] + "."
    )
    parser.set_defaults(func=function)
    return parser


def _config_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        metavar="FILE",
        help=f"settings (default: the first of {', '.join(cli_settings.CONFIG_FILES)})",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        dest="settings",
        help="one setting; may be repeated, and goes before file and environment",
    )


def _socket_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--socket", help="the daemon's socket (default: $EDGEMOA_API_SOCKET, or its usual place)"
    )


def _count(low: int, high: int) -> Any:
    def count(text: str) -> int:
        number = int(text)
        if not low <= number <= high:
            raise argparse.ArgumentTypeError(f"must be {low} to {high}")
        return number

    return count


def _load(arguments: argparse.Namespace, *, to_change: bool = False) -> Config:
    """The settings.

    :param to_change: whether the command changes what the board keeps.
    """
    config = cli_settings.load(arguments.config, arguments.settings)
    if to_change:
        cli_settings.as_owner(config.state_dir())
    return config


def _with_model(config: Config, library: ModelLibrary) -> Config:
    """The settings with the name of the model that is used where they name none."""
    from msgspec.structs import replace

    from edgemoa.models.catalog import default_model

    name = config.model.name or default_model(library)
    return replace(config, model=replace(config.model, name=name))


# --- commands


def _demo(arguments: argparse.Namespace) -> int:
    from edgemoa import show
    from edgemoa.demo import demo

    config = _load(arguments)
    library = cli_settings.library(config)
    config = _with_model(config, library)
    terminal = show.Terminal(out=sys.stderr if arguments.json else None)
    answered = demo(
        prompt=_prompt(arguments.prompt),
        boards=arguments.boards,
        layers=arguments.layers,
        proposers=arguments.proposers,
        max_tokens=arguments.max_tokens,
        library=library,
        config=config,
        model=arguments.model or config.model.name,
        terminal=terminal,
    )
    if arguments.json:
        print(json.dumps(show.report(answered)))
    else:
        print(f"\n{show.summary(answered)}")
    return 0


def _serve(arguments: argparse.Namespace) -> int:
    from edgemoa import log

    for flag, setting in (
        (arguments.state_dir, "board.state_dir"),
        (arguments.socket, "api.socket"),
    ):
        if flag is not None:
            arguments.settings.append(f"{setting}={flag}")
    config = _load(arguments, to_change=True)
    log.set_up(config.log.level, config.log.format)

    from edgemoa.daemon import serve

    library = cli_settings.library(config)
    return serve(
        _with_model(config, library),
        library,
        stop_at_eof=arguments.stop_at_eof,
        wait_for_model=arguments.wait_for_model,
    )


def _ask(arguments: argparse.Namespace) -> int:
    from edgemoa import show
    from edgemoa.client import ALONE, plan_of

    text = _prompt(_standard_input() if arguments.prompt is None else arguments.prompt)
    extra: dict[str, Any] = {"events": True}
    if arguments.no_peers or arguments.plan:
        extra |= plan_of(ALONE if arguments.no_peers else arguments.plan)
    for key in ("layers", "proposers"):
        if getattr(arguments, key) is not None:
            extra[key] = getattr(arguments, key)
    body: dict[str, Any] = {"messages": [{"role": "user", "content": text}], "edgemoa": extra}
    for key in ("max_tokens", "temperature"):
        if getattr(arguments, key) is not None:
            body[key] = getattr(arguments, key)
    quiet = arguments.json or not (arguments.trace or sys.stderr.isatty())
    terminal = None if arguments.json else show.Terminal(err=io.StringIO() if quiet else None)
    answered = show.follow(_client(arguments).chat(body), terminal)
    if arguments.json:
        print(json.dumps(show.report(answered)))
    elif arguments.trace:
        print(f"\n{show.summary(answered)}", file=sys.stderr)
    return 0


def _chat(arguments: argparse.Namespace) -> int:
    from edgemoa import cli_chat, show

    wishes = ("max_tokens", "temperature")
    body = {key: getattr(arguments, key) for key in wishes if getattr(arguments, key) is not None}
    return cli_chat.Chat(_client(arguments), show.Terminal(), body).run()


def _trace(arguments: argparse.Namespace) -> int:
    import shutil
    from urllib.parse import quote

    from edgemoa import show

    told = _client(arguments).get(f"/v1/requests/{quote(arguments.id, safe='')}/trace")
    if arguments.json:
        print(json.dumps(told))
    elif told["state"] == "answered":
        columns = min(shutil.get_terminal_size().columns, 100)
        print(f"{show.summary(told['trace'])}\n\n{show.timeline(told['trace'], columns)}")
    else:
        place = f", {told['position']} before it" if told.get("position") else ""
        why = f": {told['error']['message']}" if "error" in told else place
        print(f"{told['state']}{why}")
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from edgemoa import cli_status

    return cli_status.run(_client(arguments), arguments.watch, as_json=arguments.json)


def _board(arguments: argparse.Namespace) -> int:
    from edgemoa import cli_board

    return cli_board.run(arguments, lambda: _load(arguments))


def _doctor(arguments: argparse.Namespace) -> int:
    from edgemoa import cli_doctor

    return cli_doctor.run(arguments, lambda: _load(arguments))


def _completion(arguments: argparse.Namespace) -> int:
    from edgemoa import completion

    print(completion.script(_parser(), arguments.shell), end="")
    return 0


def _devices(arguments: argparse.Namespace) -> int:
    from edgemoa import cli_devices

    return cli_devices.devices(_client(arguments), arguments)


def _pair(arguments: argparse.Namespace) -> int:
    from edgemoa import cli_devices

    return cli_devices.pair(_client(arguments), as_json=arguments.json)


def _join(arguments: argparse.Namespace) -> int:
    from edgemoa import cli_devices

    return cli_devices.join(
        _client(arguments), arguments.code, arguments.address, as_json=arguments.json
    )


def _rotate_key(arguments: argparse.Namespace) -> int:
    from edgemoa import cli_devices

    return cli_devices.rotate_key(_load(arguments, to_change=True), as_json=arguments.json)


def _bench(arguments: argparse.Namespace) -> int:
    from edgemoa import cli_bench

    if arguments.model:
        arguments.settings.append(f"model.name={arguments.model}")
    config = _load(arguments, to_change=True)
    library = cli_settings.library(config)
    return cli_bench.run(arguments, _with_model(config, library), library)


def _join_secret(arguments: argparse.Namespace) -> int:
    from edgemoa import cli_devices

    return cli_devices.secret(arguments.action, _load(arguments))


def _api_key(arguments: argparse.Namespace) -> int:
    from edgemoa.api.doors import Keys

    keys, name = Keys(_load(arguments, to_change=True).state_dir()), arguments.name
    told: dict[str, Any] = {"name": name}
    if arguments.action == "list":
        told = {"names": keys.names()}
        text = "\n".join(told["names"]) or "there are none"
    elif not name:
        raise UserError("whose key?", hint=f"edgemoa api-key {arguments.action} NAME")
    elif arguments.action == "new":
        text = told["key"] = keys.new(name)
    else:
        keys.revoke(name)
        text = f"the key '{name}' opens nothing any longer"
    print(json.dumps(told) if arguments.json else text)
    return 0


def _config(arguments: argparse.Namespace) -> int:
    from edgemoa import config

    if arguments.check:
        config.load(Path(arguments.check), environment={})
        print(f"{arguments.check} is valid")
    else:
        print(config.reference(), end="")
    return 0


def _sim(arguments: argparse.Namespace) -> int:
    from edgemoa import cli_sim

    return cli_sim.run(arguments)


def _plan(arguments: argparse.Namespace) -> int:
    from edgemoa import cli_plan

    return cli_plan.run(arguments)


def _prompt(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidPromptError(
            "the prompt is not valid UTF-8", hint="encode it as UTF-8"
        ) from None
    if not text.strip():
        raise InvalidPromptError("the prompt is empty", hint="say something, in quotes")
    return text


def _standard_input() -> str:
    if sys.stdin is None:
        return ""
    if sys.stdin.isatty():
        print("the prompt, then Ctrl-D:", file=sys.stderr)
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise InvalidPromptError(
            f"standard input is not valid UTF-8 (byte {error.start})", hint="encode it as UTF-8"
        ) from None


def _client(arguments: argparse.Namespace) -> Any:
    from edgemoa.client import Client

    return Client(arguments.socket)
