"""The command line: `serve`, `run`, `config show`, `keys add`, `model add`, `bench serve`, `plan` and so on.

What cannot work ends in one line and exit code 2.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from bdh_batch import __version__, settings
from bdh_batch.bench import options as bench_options
from bdh_batch.deploy import commands as deploy_commands
from bdh_batch.errors import CheckpointError, ConfigError
from bdh_batch.http.auth.keys import KeyFile, new_key
from bdh_batch.launch import (
    CANNOT_START,
    announcement,
    leave,
    reason,
    run_server,
    say_nothing,
    set_up_logs,
    unwritten,
    warn,
)
from bdh_batch.neurons import commands as neurons_commands
from bdh_batch.processes.control import default_pid_file, send_command
from bdh_batch.registry import commands as registry_commands
from bdh_batch.registry.locate import locate
from bdh_batch.shell import commands as shell_commands

SHORTCUTS = {
    "host": "server.host",
    "port": "server.port",
    "model": "model.path",
    "device": "model.device",
    "dtype": "model.dtype",
}

INTERRUPTED = 130  # the exit code
MODEL_PATHS = "model folder, .pt, .bin or .safetensors file, or a name that `model list` shows"
RIGHTS = ("models", "operator", "weight", "requests_per_minute", "tokens_per_minute", "top_priority")
PLANNED = {  # flags of `plan`, with their defaults
    "streams": ("1", "completions under way at once; each is followed by another when it ends"),
    "rate": ("1", "tokens/s that the reader of each of them gets"),
    "prompt-tokens": ("256", "of each prompt; none of it cached"),
    "answer-tokens": ("256", "of each completion"),
    "state-dtype": ("float32", "float32 or bfloat16"),
    "dtype": ("float32", "of the weights: float32, bfloat16 or float16"),
    "window": ("the model's", "tokens that a token can look back on; 0 is no window"),
    "utilization": ("0.8", "the share of the time that a machine may be busy"),
    "active-fraction": ("0.216, the bundled model's", "of the neurons, that fire for a token"),
    "failures-per-day": ("0.1", "times that a replica is lost"),
    "detect-seconds": ("5", "until a lost replica is known to be lost"),
    "restart-seconds": ("60", "until it is there again"),
    "network-gbit": ("25", "Gbit/s of a machine's link, each way"),
    "moved": ("0", "the share of completions whose state another machine goes on from"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    _stand_on_firm_ground()
    options = _parser().parse_args(arguments)
    options.arguments = [*(sys.argv[1:] if arguments is None else arguments)]
    try:
        code = int(options.run(options))
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except (ConfigError, CheckpointError, MemoryError) as error:
        warn(reason(error))
        return CANNOT_START
    except OSError as error:
        return unwritten(error)
    except KeyboardInterrupt:
        return INTERRUPTED


def _stand_on_firm_ground() -> None:
    """Gives the process what libraries take for granted: standard streams, and a working directory.

    Streams that are closed lead nowhere then: else the next socket would be one of them, and be written to. Where the
    directory has been deleted, Intel's MKL ends the process at its first product.
    """
    try:
        os.getcwd()
    except OSError:
        os.chdir("/")
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest that is free


def _options_parser(*flags: str) -> argparse.ArgumentParser:
    """The flags of commands that take options."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--config", type=Path, metavar="FILE", help="a YAML file of options; see config/default.yaml")
    common.add_argument(
        "--set", action="append", default=[], metavar="OPTION=VALUE", help="any option: server.port=9000"
    )
    for flag in flags:
        default, text = settings.options()[SHORTCUTS[flag]]
        common.add_argument(f"--{flag}", help=f"{text} ({SHORTCUTS[flag]}, default {default})")
    return common


def _parser() -> argparse.ArgumentParser:
    common = _options_parser(*SHORTCUTS)
    parser = argparse.ArgumentParser(prog="bdh-batch", description="Serves BDH models with an OpenAI-compatible API.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", parents=[common], help="start the server")
    serve.add_argument("--process", help=argparse.SUPPRESS)  # of a child of the supervisor: which one it is
    serve.set_defaults(run=_serve)
    gateway = commands.add_parser(
        "gateway",
        parents=[common],
        help="start the server with upstreams alone, without a model of its own",
    )
    gateway.set_defaults(run=_gateway)
    deploy_commands.add_commands(commands, common, _ray_up)
    shell_commands.add_commands(commands, _options_parser("model", "device", "dtype"), _compute)
    reload = commands.add_parser(
        "reload", parents=[common], help="replace the engines of the server at a port, one by one"
    )
    reload.add_argument(
        "--pid-file", type=Path, metavar="FILE", help="of the server (server.pid_file); else it is found by its port"
    )
    reload.set_defaults(run=_reload)
    config = commands.add_parser("config", help="look at the options")
    actions = config.add_subparsers(required=True, metavar="ACTION")
    show = actions.add_parser("show", parents=[common], help="the resolved options, each with where it came from")
    show.set_defaults(run=_show)
    default = actions.add_parser("default", help="config/default.yaml: all options, defaults and help")
    default.set_defaults(run=_default)
    _add_keys_commands(commands.add_parser("keys", help="make, list and revoke API keys"), common)
    _add_model_commands(commands)
    _add_state_commands(commands.add_parser("state", help="the saved states of a server that runs"))
    _add_bench_commands(commands.add_parser("bench", help="measure a server, this one or another"))
    _add_plan_command(commands)
    return parser


def _add_keys_commands(keys: argparse.ArgumentParser, common: argparse.ArgumentParser) -> None:
    file = argparse.ArgumentParser(add_help=False, parents=[common])
    file.add_argument("--file", type=Path, metavar="FILE", help="the file of keys (auth.api_keys_file)")
    actions = keys.add_subparsers(required=True, metavar="ACTION")
    add = actions.add_parser("add", parents=[file], help="make a key, and print it this once")
    add.add_argument("--name", required=True, help="the owner's name")
    add.add_argument("--models", metavar="A,B", help="the models it may use; else all")
    add.add_argument(
        "--operator", action="store_true", default=None, help="it may load and unload models, and see engine processes"
    )
    add.add_argument("--weight", metavar="NUMBER", help="its share beside other keys; else 1")
    add.add_argument("--requests-per-minute", metavar="N", help="else rate_limiting.requests_per_minute")
    add.add_argument("--tokens-per-minute", metavar="N", help="else rate_limiting.tokens_per_minute")
    add.add_argument(
        "--top-priority", metavar="N", help="the lowest `priority` of its requests; else scheduler.top_priority"
    )
    add.set_defaults(run=_add_key)
    listing = actions.add_parser("list", parents=[file], help="the keys' names and rights")
    listing.set_defaults(run=_list_keys)
    revoke = actions.add_parser("revoke", parents=[file], help="take a key back")
    revoke.add_argument("key", metavar="ID|NAME")
    revoke.set_defaults(run=_revoke_key)


def _add_model_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    model = commands.add_parser("model", help="keep models by name, look at their files, or convert them")
    actions = model.add_subparsers(required=True, metavar="ACTION")
    registry_commands.add_commands(actions)
    neurons_commands.add_command(actions, _options_parser("model", "device", "dtype"), _compute)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("source", type=Path, metavar="SRC", help=MODEL_PATHS)
    common.add_argument("--layers", type=_positive, help="where the file does not say how many")
    common.add_argument(
        "--norm", choices=["every_layer", "final"], help="where the file does not say it, as are these:"
    )
    common.add_argument("--rope-layout", choices=["interleaved", "half"], help="which neurons RoPE turns together")
    common.add_argument("--rope-theta", type=_base, metavar="BASE", help="RoPE's base")
    common.add_argument("--rotary-dim", type=int, metavar="N", help="how many neurons of a head RoPE turns")
    inspect = actions.add_parser("inspect", parents=[common], help="config, sizes, and how many sequences fit")
    inspect.add_argument("--memory", metavar="SIZE", help='also count what fits so much, as in "8 GiB"')
    inspect.add_argument("--json", action="store_true", help="as JSON, sizes in bytes")
    inspect.set_defaults(run=_inspect)
    target = argparse.ArgumentParser(add_help=False, parents=[common])
    target.add_argument("target", type=Path, metavar="DST", help="the folder to write, whole or not at all")
    target.add_argument("--force", action="store_true", help="replace a model that is there")
    convert = actions.add_parser("convert", parents=[target], help="write any checkpoint as a native folder")
    convert.set_defaults(run=_convert, quantized=False)
    quantize = actions.add_parser("quantize", parents=[target], help="the same with weights of int8 (model.dtype)")
    quantize.set_defaults(run=_convert, quantized=True)


def _add_state_commands(state: argparse.ArgumentParser) -> None:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--base-url", metavar="URL", default="http://127.0.0.1:8000", help="the server")
    key = os.environ.get("OPENAI_API_KEY") or "none"
    common.add_argument("--api-key", metavar="KEY", default=key, help="whose states; else OPENAI_API_KEY")
    common.set_defaults(run=_state)
    actions = state.add_subparsers(required=True, metavar="ACTION", dest="action")
    listing = actions.add_parser("list", parents=[common], help="the key's states, the newest first")
    listing.add_argument("--json", action="store_true", help="each as a line of JSON")
    export = actions.add_parser("export", parents=[common], help="write a state to a file")
    export.add_argument("id", metavar="ID")
    export.add_argument("file", type=Path, metavar="FILE", help="a safetensors file, whole or not at all")
    load = actions.add_parser("import", parents=[common], help="store the state in a file, and print its id")
    load.add_argument("file", type=Path, metavar="FILE")
    load.add_argument("--model", metavar="NAME", help="its model, if not the one that the file names")
    load.add_argument("--ttl", type=float, metavar="SECONDS", help="that it is kept; else store.ttl_seconds")


def _add_bench_commands(bench: argparse.ArgumentParser) -> None:
    actions = bench.add_subparsers(required=True, metavar="ACTION", parser_class=bench_options.Parser)
    serve = actions.add_parser("serve", help="load for a server of the OpenAI API, and what its clients see")
    bench_options.add_arguments(serve)
    serve.set_defaults(run=_bench_serve)


def _add_plan_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    plan = commands.add_parser("plan", help="how many machines a load takes, on paper")
    plan.add_argument("--model", type=Path, required=True, help=MODEL_PATHS)
    plan.add_argument("--gpu", required=True, help="h200, h100, a100, l4, or cpu, which is this machine")
    plan.add_argument("--results", type=Path, help="for cpu: the folder of its kernels-cpu.json and engine-cpu.json")
    for name, (default, text) in PLANNED.items():
        plan.add_argument(f"--{name}", dest=f"planned_{name}", metavar="X", help=f"{text} (default {default})")
    plan.add_argument("--json", action="store_true", help="as JSON, in seconds and bytes")
    plan.set_defaults(run=_plan)


def _positive(text: str) -> int:
    if not text.isdecimal() or len(text) > 9 or not int(text):
        raise argparse.ArgumentTypeError(f"should be a positive integer, not {text!r}")
    return int(text)


def _base(text: str) -> float:
    if not 1 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"should be above 1, not {text!r}")
    return float(text)


def _overrides(options: argparse.Namespace) -> list[tuple[str, object]]:
    """Later ones win: --set over the short flags."""
    pairs: list[tuple[str, object]] = [
        (option, value) for flag, option in SHORTCUTS.items() if (value := getattr(options, flag, None)) is not None
    ]
    for text in options.set:
        option, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set {text}: should be OPTION=VALUE, as in server.port=9000")
        pairs.append((option.strip(), None if value == "null" else value))
    return pairs


def _resolve(options: argparse.Namespace) -> settings.Resolved:
    resolved = _loaded(options)
    for text in resolved.warnings:
        warn(text)
    return resolved


def _loaded(options: argparse.Namespace) -> settings.Resolved:
    return settings.load(options.config, _overrides(options))


def _serve(options: argparse.Namespace) -> int:
    resolved = _loaded(options)
    announce = announcement(resolved.settings) if options.process is None else say_nothing

    async def serve() -> None:
        from bdh_batch import server  # only this command pays for importing torch

        await server.run(resolved.settings, options.arguments, options.process, announce)

    return run_server(resolved, serve, (options.process or "").partition(":")[0])


def _gateway(options: argparse.Namespace) -> int:
    resolved = _loaded(options)

    async def serve() -> None:
        from bdh_batch import server

        await server.run_gateway(resolved.settings, announcement(resolved.settings))

    return run_server(resolved, serve)


def _ray_up(options: argparse.Namespace) -> int:
    resolved = _loaded(options)
    set_up_logs(resolved)
    deploy_commands.up(resolved.settings, announcement(resolved.settings))
    return leave(0)


def _compute(options: argparse.Namespace) -> int:
    chosen = _resolve(options).settings
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    return leave(options.compute(chosen, options))


def _reload(options: argparse.Namespace) -> int:
    chosen = _resolve(options).settings.server
    send_command(options.pid_file or chosen.pid_file or default_pid_file(chosen.port, chosen.uds), "reload")
    print("the engines have been replaced")
    return 0


def _show(options: argparse.Namespace) -> int:
    print(_resolve(options).show())
    return 0


def _key_file(options: argparse.Namespace) -> KeyFile:
    path = options.file or _resolve(options).settings.auth.api_keys_file
    if path is None:
        raise ConfigError("auth.api_keys_file: not set; say by --file where the keys are")
    return KeyFile(path)


def _add_key(options: argparse.Namespace) -> int:
    given = {name: getattr(options, name) for name in RIGHTS if getattr(options, name) is not None}
    if options.models is not None:
        given["models"] = [model.strip() for model in options.models.split(",") if model.strip()]
    secret = _key_file(options).add(partial(new_key, name=options.name, rights=given))
    print(f"The key of {options.name}; it is stored nowhere and cannot be shown again:", file=sys.stderr)
    print(secret)
    return 0


def _list_keys(options: argparse.Namespace) -> int:
    for key in _key_file(options).read():
        rights = key.model_dump(mode="json", exclude={"sha256", "name"}, exclude_none=True)
        print("  ".join([key.id, key.name or "(a plain key)", *(f"{name}={value}" for name, value in rights.items())]))
    return 0


def _revoke_key(options: argparse.Namespace) -> int:
    key = _key_file(options).revoke(options.key)
    print(f"revoked {key.id} {key.name}".rstrip())
    return 0


def _default(options: argparse.Namespace) -> int:
    print(settings.default_yaml(), end="")
    return 0


def _inspect(options: argparse.Namespace) -> int:
    memory = None if options.memory is None else settings.bytes_of(options.memory, "--memory")
    from bdh_batch.plan.offline import given_by, inspect

    found = inspect(locate(options.source).path, given_by(options), memory)
    print(found.as_json() if options.json else found.as_text())
    return 0


def _convert(options: argparse.Namespace) -> int:
    from bdh_batch.plan.offline import convert, given_by

    source = locate(options.source).path
    checkpoint = convert(source, options.target, given_by(options), options.force, options.quantized)
    command = f"bdh-batch serve --model {options.target}" + " --dtype int8" * options.quantized
    print(f"{checkpoint.file} is written to {options.target}; serve it: {command}")
    return 0


def _state(options: argparse.Namespace) -> int:
    try:
        from bdh_batch.client import commands
    except ImportError as error:
        raise ConfigError(f"the client is not installed ({error}): pip install 'bdh-batch[client]'") from error
    return commands.run(options)


def _bench_serve(options: argparse.Namespace) -> int:
    wanted = bench_options.options_of(options)
    from bdh_batch.bench.serve import serve

    return serve(wanted)


def _plan(options: argparse.Namespace) -> int:
    from bdh_batch.plan.sizing import plan

    flags = {name.replace("-", "_"): getattr(options, f"planned_{name}") for name in PLANNED}
    given = {name: text for name, text in flags.items() if text is not None}
    found = plan(locate(options.model).path, options.gpu, options.results, given)
    print(found.as_json() if options.json else found.as_text())
    return 0
