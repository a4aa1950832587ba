"""Serve a student: live streams, clips and a page to watch them.

    streamvid demo
    streamvid serve --student runs/tiny_dmd/student --port 8000
    streamvid serve --student STUDENT --size 480x832 --host 0.0.0.0 --token-file token.txt

Only this machine can reach the server, unless --host says otherwise, which demands a token. Ctrl-C
and SIGTERM end streams cleanly and finish recordings.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import sys
import threading
import webbrowser
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from streamvid.command_line import Parser, run_tool, say, sides

TOKEN_VARIABLE = "STREAMVID_TOKEN"
SHORTEST_TOKEN = 16
EXAMPLE_SEEDS = range(100, 124)


def parse_args(argv: list[str] | None, command: str) -> argparse.Namespace:
    """The options of ``streamvid-serve`` and ``streamvid-demo``."""
    parser = Parser(__doc__, command)
    parser.add_argument("--student", help="a student folder; by default the shipped student")
    parser.add_argument(
        "--components",
        help="folder of vae/, text_encoder/ and tokenizer/, if the student's lacks them",
    )
    parser.add_argument("--codec", help="another codec of the same latents")
    parser.add_device()
    parser.add_argument("--dtype", choices=("float32", "bf16"), default="float32")
    parser.add_argument(
        "--size",
        type=sides("HxW"),
        default=(64, 64),
        metavar="HxW",
        help="height and width in pixels (default 64x64)",
    )
    parser.add_argument("--fps", type=float, default=16.0, help="of playback (default 16)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (loopback)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes any free one")
    parser.add_argument(
        "--token-file",
        help=f"file with the token that clients must have; or set {TOKEN_VARIABLE}",
    )
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="name under which the server may be reached, for example behind a proxy",
    )
    parser.add_argument("--folder", help="of clips and recordings; by default a temporary one")
    parser.add_argument("--sessions", type=int, help="live streams that advance together")
    parser.add_argument("--session-seconds", type=float, help="longest life of a stream")
    parser.add_argument(
        "--limit",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="another bound of streamvid.serving.limits, such as sessions_per_address=32",
    )
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """``streamvid-serve``: run the server until it is told to stop."""
    args = parse_args(argv, "serve")
    return run_tool(lambda: serve(args), "stopped")


def demo(argv: list[str] | None = None) -> int:
    """``streamvid-demo``: the server with the page opened in a browser, if there is one."""
    args = parse_args(argv, "demo")
    args.open = True
    return run_tool(lambda: serve(args), "stopped")


def serve(args: argparse.Namespace) -> None:
    """Open the student and serve it.

    Raises:
        ValueError: for options that do not fit, or a public address without a token.
    """
    token = read_token(args.token_file)
    check_address(args.host, token)
    try:
        import uvicorn

        from streamvid.serving.server import create_app
    except ImportError as error:
        raise ValueError(
            f"{error.name} is not installed; run: pip install 'streamvid[live]'"
        ) from error
    import torch

    from streamvid.config import load_config
    from streamvid.serving.guard import LOOPBACK
    from streamvid.serving.limits import Limits
    from streamvid.students.folder import TINY_STUDENT, choose_device, load_student

    device = choose_device(args.device)
    if device.type == "cpu":
        leave_a_core()
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    student = load_student(args.student or TINY_STUDENT, args.components, device, dtype, args.codec)
    given = {"sessions": args.sessions, "session_seconds": args.session_seconds}
    limits = replace(Limits(), **{name: x for name, x in given.items() if x is not None})
    height, width = args.size
    limits = replace(limits, max_pixels=max(limits.max_pixels, height * width))
    limits = load_config(Limits, None, args.limit, default=limits)
    public = not is_loopback(args.host)
    hosts = {*LOOPBACK, *args.allow_host} if args.allow_host or not public else None
    app = create_app(
        student,
        name=Path(args.student).name if args.student else "streamvid-tiny",
        height=height,
        width=width,
        fps=args.fps,
        limits=limits,
        token=token,
        hosts=hosts,
        folder=args.folder,
        examples=world_examples() if args.student is None else PLAIN_EXAMPLES,
        options=sample_options(args, public),
    )
    config = uvicorn.Config(
        app,
        host=args.host,
        port=args.port,
        log_level="critical",
        access_log=False,  # its lines would hold what clients ask for
        ws_max_size=limits.message_bytes,
        ws_ping_interval=10,
        ws_ping_timeout=20,
        ws_per_message_deflate=False,
        proxy_headers=bool(args.allow_host),  # without a proxy nobody may name another address
        timeout_graceful_shutdown=10,
        server_header=False,
    )
    announce(uvicorn, config, args, token)


def sample_options(args: argparse.Namespace, public: bool) -> list[str]:
    """What `streamvid sample` needs to open the same student in the same way.

    Args:
        public: whether others see it, who are told no folders of this machine.
    """
    options = []
    for name in ("student", "components", "codec"):
        path = getattr(args, name)
        if path is not None:
            options += [f"--{name}", Path(path).name if public else path]
    if args.device != "auto":
        options += ["--device", args.device]
    if args.dtype != "float32":
        options += ["--dtype", args.dtype]
    return options


def announce(uvicorn: Any, config: Any, args: argparse.Namespace, token: str | None) -> None:
    """Run the server; say where it is as soon as it listens."""
    from streamvid.serving.server import drain as drain_app

    class Server(uvicorn.Server):
        """Ends streams before it closes connections. One signal is no error: the exit code is 0."""

        draining = False

        async def startup(self, sockets: Any = None) -> None:
            """Listen, then tell the address."""
            await super().startup(sockets)
            if self.servers:
                port = self.servers[0].sockets[0].getsockname()[1]
                say(f"watch it at {page_url(args.host, port)}" + token_hint(token))
                if args.open:
                    threading.Thread(
                        target=webbrowser.open, args=(page_url(args.host, port),), daemon=True
                    ).start()

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            """Drain first; a second signal stops at once."""
            if self.draining:
                super().handle_exit(sig, frame)
                return
            self.draining = True  # uvicorn would raise a signal of its own list again

            def drain() -> None:
                drain_app(config.app, timeout=30)
                self.should_exit = True

            threading.Thread(target=drain, daemon=True).start()

    server = Server(config)
    try:
        server.run()
    except SystemExit as error:  # uvicorn's way to say that it can't listen
        raise ValueError(
            f"can't listen on {args.host}, port {args.port}; if it is in use, name another --port"
        ) from error


def page_url(host: str, port: int) -> str:
    """The address that a browser on this machine opens."""
    shown = "localhost" if is_loopback(host) or host in ("0.0.0.0", "::") else host
    return f"http://{f'[{shown}]' if ':' in shown else shown}:{port}/"


def token_hint(token: str | None) -> str:
    """How a browser gets the token: after the #, which it never sends."""
    return "" if token is None else " (add #token=... with your token)"


def leave_a_core() -> None:
    """Leave one core for pictures and connections, unless the user has chosen."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() - 1))


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_address(host: str, token: str | None) -> None:
    """Refuse a public address without a token."""
    if token is None and not is_loopback(host):
        raise ValueError(
            f"--host {host} can be reached by others, which demands a token; give --token-file, or"
            f" set {TOKEN_VARIABLE} to at least {SHORTEST_TOKEN} characters"
        )


def read_token(file: str | None) -> str | None:
    """The token of a file or of the environment; None if there is neither.

    Raises:
        ValueError: if it is too short to be a secret.
    """
    token = (
        Path(file).read_text(encoding="utf-8").strip() if file else os.environ.get(TOKEN_VARIABLE)
    )
    if token is not None and (
        len(token) < SHORTEST_TOKEN or not (token.isascii() and token.isalnum())
    ):
        raise ValueError(
            f"the token has {len(token)} characters, expected at least {SHORTEST_TOKEN} letters and"
            " digits; make one with: python -c 'import secrets; print(secrets.token_hex(24))'"
        )
    return token


PLAIN_EXAMPLES = (
    "a red fox walks through fresh snow at dawn",
    "waves roll onto a black beach, seen from above",
    "a lantern sways in the wind, close up",
)


def world_examples() -> list[str]:
    """Sentences of the verifiable world, which the shipped student was trained on."""
    from streamvid.data.world import caption, sample_spec

    captions = (caption(sample_spec(seed), seed) for seed in EXAMPLE_SEEDS)
    return list(dict.fromkeys(captions))


if __name__ == "__main__":
    sys.exit(main())
