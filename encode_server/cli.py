"""The command line: `encode-server serve | demo | demo-model | models | inspect | bench | plan | route |
support-bundle`."""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from encode_server import __version__
from encode_server.bench.arguments import add_arguments as add_bench_arguments
from encode_server.bench.arguments import add_plan_arguments
from encode_server.errors import StartupError
from encode_server.route.options import add_route_options, route_options
from encode_server.runtime.forkserver import Launched, launch
from encode_server.runtime.leaving import leave
from encode_server.settings import (
    PRELOAD,
    RENAMED,
    Settings,
    load_settings,
    option_name,
    preload_argument,
    variable_name,
)


def console() -> NoReturn:
    """The command `encode-server`."""
    leave(main())


def main(argv: list[str] | None = None) -> int:
    """Run a command; the exit status of the process."""
    parser = argparse.ArgumentParser(
        prog="encode-server", description="Vision and audio encoders as a service: media in over HTTP, embeddings out."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="serve a checkpoint")
    serve.add_argument("model", metavar="MODEL", nargs="?", default=argparse.SUPPRESS, help=_help("model"))
    serve.add_argument(
        "--explain-limits", action="store_true", help="print all bounds and the memory they allow for, and exit"
    )
    serve.add_argument(
        "--ray", metavar="REPLICAS", help="serve on a Ray cluster: so many replicas, or from MIN-MAX by their work"
    )
    _add_options(serve, skip="model")

    demo = commands.add_parser("demo", help="serve the demo checkpoint and encode an image, a clip and audio")
    demo.add_argument("--once", action="store_true", help="exit after the table")
    _add_options(demo, skip="model")

    demo_model = commands.add_parser("demo-model", help="write the demo checkpoint (random weights) to a directory")
    demo_model.add_argument("directory", type=Path, metavar="DIR")

    commands.add_parser("models", help="list the model types that can be served, and how each is checked")

    inspect = commands.add_parser(
        "inspect", help="say what serving a checkpoint would take, without loading its weights"
    )
    inspect.add_argument("model", metavar="MODEL", help="a directory, a hub id or `demo`")
    inspect.add_argument("--revision", metavar="REVISION", help="branch, tag or commit of a hub id")
    inspect.add_argument(
        "--image", metavar="WxH", action="append", help="an image size to count the tokens of; repeatable"
    )

    inspect.add_argument(
        "--clip", metavar="WxHxS", action="append", help="size and seconds of a clip to count the tokens of; repeatable"
    )
    inspect.add_argument(
        "--audio", metavar="S", action="append", help="seconds of audio to count the tokens of; repeatable"
    )

    bench = commands.add_parser("bench", help="load a running server with media and say how fast it is")
    add_bench_arguments(bench)

    plan = commands.add_parser("plan", help="say how many servers a load takes, from what a bench measured on one")
    add_plan_arguments(plan)

    bundle = commands.add_parser("support-bundle", help="write what a report of a fault needs to one file")
    bundle.add_argument("url", metavar="URL", help="the server, e.g. http://127.0.0.1:30000")
    bundle.add_argument("--output", type=Path, metavar="FILE", help="[encode-server-DATE.tar.gz]")
    bundle.add_argument("--log", type=Path, metavar="FILE", help="the server's log, of which the end is taken")
    bundle.add_argument("--api-key", metavar="KEY", help="sent as a bearer token")

    route = commands.add_parser("route", help="stand between vLLM or SGLang and encode servers: one address for many")
    add_route_options(route)

    options = vars(parser.parse_args(argv))
    command = options.pop("command")
    try:
        return _run(command, options)
    except StartupError as error:
        print(f"encode-server: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _run(command: str, options: dict[str, Any]) -> int:
    """Run a command. Raises StartupError where the light install lacks a package that the command needs."""
    try:
        return _dispatch(command, options)
    except ModuleNotFoundError as missing:
        package = (missing.name or "").partition(".")[0]
        if package in ("", "encode_server"):
            raise
        extra = "bench" if command == "bench" else "ray" if package == "ray" else "server"
        raise StartupError(
            f"`{command}` needs the package {package}, which is not installed: pip install 'encode-server[{extra}]'"
        ) from None


def _dispatch(command: str, options: dict[str, Any]) -> int:
    if command == "demo-model":
        from encode_server.models.demo import write_demo

        write_demo(options["directory"])
        print(f"wrote the demo checkpoint (its weights are random) to {options['directory']}")
        return 0
    if command == "models":
        from encode_server.models.table import as_text, supported

        print(as_text(supported()))
        return 0
    if command == "inspect":
        from encode_server.models.report import report

        names = {"sizes": "image", "clips": "clip", "audios": "audio"}
        given = {name: tuple(options[option]) for name, option in names.items() if options[option]}
        print(report(options["model"], options["revision"], **given))
        return 0
    if command == "demo":
        once = options.pop("once")
        settings = load_settings({"model": "demo"} | options)
        launched = _launch(settings)
        from encode_server.demo import run_demo

        return run_demo(settings, launched, once=once)
    if command == "bench":
        from encode_server.bench.command import run

        return run(options)
    if command == "plan":
        from encode_server.bench.plan import run as run_plan

        return run_plan(options)
    if command == "support-bundle":
        from encode_server.support import run as write_bundle

        return write_bundle(options)
    if command == "route":
        from encode_server.route.serve import serve_route

        return serve_route(route_options(options))
    explained, replicas = options.pop("explain_limits", False), options.pop("ray", None)
    if replicas is not None:
        from encode_server.cluster.command import serve_on_ray

        return serve_on_ray(options, replicas)
    settings = load_settings(options)
    if explained:
        from encode_server.memory import explain

        print(explain(settings))
        return 0
    launched = _launch(settings)
    from encode_server.serve import serve

    return serve(settings, launched)


def _launch(settings: Settings) -> Launched:
    """Start the forkserver before FastAPI is imported: its imports take longest, and begin now."""
    if find_spec("torch") is None:
        raise ModuleNotFoundError(name="torch")
    return launch(PRELOAD, preload_argument(settings))


def _add_options(parser: argparse.ArgumentParser, skip: str) -> None:
    """One `--option` per setting. Values stay text: `load_settings` judges them, from here and from the environment."""
    config = f"TOML file of these options, below variables and above defaults [none; {variable_name('config')}]"
    parser.add_argument("--config", metavar="FILE", default=argparse.SUPPRESS, help=config)
    for name, field in Settings.model_fields.items():
        if name == skip:
            continue
        if field.annotation is bool:
            parser.add_argument(
                option_name(name), nargs="?", const="true", metavar="true", default=argparse.SUPPRESS, help=_help(name)
            )
            continue
        kind = "A,B,…" if isinstance(field.default, tuple) else name.rsplit("_", 1)[-1].upper()
        parser.add_argument(option_name(name), metavar=kind, default=argparse.SUPPRESS, help=_help(name))
    for name in RENAMED:
        parser.add_argument(option_name(name), default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def _help(name: str) -> str:
    field = Settings.model_fields[name]
    default = ",".join(field.default) or "none" if isinstance(field.default, tuple) else field.default
    return f"{field.description} [{default}; {variable_name(name)}]".replace("%", "%%")


if __name__ == "__main__":
    console()
