"""Serve a student: live streams, clips and a page to watch them.

    streamvid demo
    streamvid serve --student runs/tiny_dmd/student --port 8000
    streamvid serve --student runs/dmd/student --student runs/asd/student --teacher
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
from typing import TYPE_CHECKING, Any

from streamvid.command_line import Parser, run_tool, say, sides
from streamvid.shipped import TINY_STUDENT, TINY_TEACHER

if TYPE_CHECKING:
    import torch

    from streamvid.serving.models import ServedModel
    from streamvid.students.folder import Student

TINY_NAME = "streamvid-tiny"
TOKEN_VARIABLE = "STREAMVID_TOKEN"
SHORTEST_TOKEN = 16
EXAMPLE_SEEDS = range(100, 124)
BATCH = 4
"""Most of what a batch brings, see benchmarks/sessions.md, for a short wait."""


def parse_args(argv: list[str] | None, command: str) -> argparse.Namespace:
    """The options of ``streamvid-serve`` and ``streamvid-demo``."""
    parser = Parser(__doc__, command)
    parser.add_argument(
        "--student",
        action="append",
        default=[],
        help="a student folder; may be repeated, the first is the default; without it the shipped"
        " student",
    )
    parser.add_argument(
        "--teacher",
        nargs="?",
        const=str(TINY_TEACHER),
        metavar="FOLDER",
        help="also serve a teacher's clips: that of FOLDER, or the shipped one",
    )
    parser.add_argument(
        "--teacher-frames",
        type=int,
        default=33,
        metavar="N",
        help="pixel frames of the clips that the teacher was trained on (default 33)",
    )
    parser.add_argument(
        "--components",
        help="folder of vae/, text_encoder/ and tokenizer/, if the student's lacks them",
    )
    parser.add_argument("--codec", help="another codec of the same latents")
    parser.add_device()
    parser.add_argument("--dtype", choices=("float32", "bf16"), default="float32")
    parser.add_engine()
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
    parser.add_argument("--sessions", type=int, help="live streams that have a place")
    parser.add_argument(
        "--batch",
        type=int,
        default=BATCH,
        metavar="N",
        help=f"most live streams that the model advances together (default {BATCH}); with 1 a"
        " recording is exact to the bit whoever else watches",
    )
    parser.add_argument(
        "--state", metavar="DIR", help="keep snapshots of streams there; by default none are kept"
    )
    parser.add_argument(
        "--autosave", type=int, metavar="N", help="keep each stream every N chunks (with --state)"
    )
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
    check_state(args.state, args.autosave)
    if args.batch < 1:
        raise ValueError(f"--batch {args.batch}: expected at least 1, which is one stream alone")
    try:
        import uvicorn

        from streamvid.serving.server import create_app, serve_student
    except ImportError as error:
        raise ValueError(
            f"{error.name} is not installed; run: pip install 'streamvid[live]'"
        ) from error

    from streamvid.config import load_config
    from streamvid.serving.guard import LOOPBACK
    from streamvid.serving.limits import Limits
    from streamvid.students.folder import choose_device

    device = choose_device(args.device)
    if device.type == "cpu":
        leave_a_core()
    public = not is_loopback(args.host)
    (name, student, options), *others = open_students(args, device, public)
    served = [
        serve_student(other, model, *args.size, options=made_by) for other, model, made_by in others
    ]
    served += open_teachers(args, device, [name, *(model.id for model in served)])
    given = {"sessions": args.sessions, "session_seconds": args.session_seconds}
    limits = replace(Limits(), **{name: x for name, x in given.items() if x is not None})
    height, width = args.size
    limits = replace(limits, max_pixels=max(limits.max_pixels, height * width))
    limits = load_config(Limits, None, args.limit, default=limits)
    hosts = {*LOOPBACK, *args.allow_host} if args.allow_host or not public else None
    app = create_app(
        student,
        name=name,
        height=height,
        width=width,
        fps=args.fps,
        limits=limits,
        token=token,
        hosts=hosts,
        folder=args.folder,
        examples=PLAIN_EXAMPLES if args.student else world_examples(),
        options=options,
        others=served,
        batch=args.batch,
        state=args.state,
        autosave=args.autosave,
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


def open_students(
    args: argparse.Namespace, device: torch.device, public: bool
) -> list[tuple[str, Student, list[str]]]:
    """The students, each with its id and the options of `streamvid sample` that open it."""
    from streamvid.serving.models import name_of, unique_names
    from streamvid.students.engine import engine_options, prepare
    from streamvid.students.folder import load_student

    names = unique_names([name_of(path) for path in args.student]) or [TINY_NAME]
    dtype, engine = dtype_of(args), engine_options(args.engine)
    found = []
    for name, path in zip(names, args.student or [None], strict=True):
        folder = path or TINY_STUDENT
        student = load_student(folder, args.components, device, dtype, args.codec)
        found.append((name, prepare(student, engine), sample_options(path, args, public)))
    return found


def open_teachers(
    args: argparse.Namespace, device: torch.device, taken: list[str]
) -> list[ServedModel]:
    """The teacher, if one is asked for.

    Args:
        taken: ids that others have.
    """
    from streamvid.serving.models import name_of, serve_teacher, unique_names

    if args.teacher is None:
        return []
    shipped = Path(args.teacher) == TINY_TEACHER
    name = f"{TINY_NAME}-teacher" if shipped else name_of(args.teacher)
    *_, name = unique_names([*taken, name])
    dtype = dtype_of(args)
    return [serve_teacher(name, args.teacher, args.teacher_frames, device, dtype, args.codec)]


def dtype_of(args: argparse.Namespace) -> torch.dtype:
    """The precision of the transformers."""
    import torch

    return torch.bfloat16 if args.dtype == "bf16" else torch.float32


def sample_options(student: str | None, args: argparse.Namespace, public: bool) -> list[str]:
    """What `streamvid sample` needs to open the same student in the same way.

    Args:
        student: its folder; None is the shipped one.
        public: whether others see it, who are told no folders of this machine.
    """
    options = []
    parts = {"student": student, "components": args.components, "codec": args.codec}
    for name, path in parts.items():
        if path is not None:
            options += [f"--{name}", Path(path).name if public else path]
    if args.device != "auto":
        options += ["--device", args.device]
    if args.dtype != "float32":
        options += ["--dtype", args.dtype]
    if args.engine:
        options += ["--engine", args.engine]
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


def check_state(state: str | None, autosave: int | None) -> None:
    """Refuse to keep streams nowhere, or every chunk of none."""
    if autosave is not None and state is None:
        raise ValueError(f"--autosave {autosave} without --state; name a folder with --state")
    if autosave is not None and autosave < 1:
        raise ValueError(f"--autosave {autosave}: expected a number of chunks, at least 1")


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
