"""Measure how well a server serves many viewers.

    streamvid load --viewers 1,4,16 --seconds 120 --out benchmarks/live.json
    streamvid load --churn 200 --endurance 3600 --out runs/live.json
    streamvid load --viewers 4 --url https://live.example.org --token-file token.txt --out live.json

Without --url it starts a server of its own, in a process of its own, and ends it. Viewers are
clients over real WebSockets on this machine. Writes JSON and the same as Markdown beside it, also
when it is interrupted: what is complete stays. The exit code is 1 if a viewer had an error or no
frames, or if viewers who left have left something behind.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from streamvid.command_line import Parser, counts, run_tool, tell

MOST_FPS = 1000.0


def parser() -> Parser:
    """The options."""
    options = Parser(__doc__, "load")
    options.add_argument(
        "--viewers", type=counts, default=[], help="who watch together, such as 1,4,16"
    )
    options.add_argument(
        "--seconds", type=float, default=120.0, help="for which they watch (default 120)"
    )
    options.add_argument(
        "--churn", type=int, default=0, metavar="N", help="visits that end at random moments"
    )
    options.add_argument(
        "--endurance", type=float, default=0.0, metavar="SECONDS", help="of one long stream"
    )
    options.add_argument("--url", help="of a running server; by default one is started")
    options.add_argument("--token-file", help="file with the token that the server demands")
    options.add_argument("--port", type=int, default=0, help="of the started server (any free one)")
    options.add_argument("--student", help="of the started server; by default the shipped student")
    options.add_device("of the started server: ")
    options.add_argument(
        "--fps", type=float, default=16.0, help="of playback (default 16), at most 1000"
    )
    options.add_argument(
        "--endurance-fps",
        type=float,
        default=MOST_FPS,
        help="of the long stream; by default more than can be made, so that nothing waits",
    )
    options.add_argument("--steps", type=int, help="per chunk; by default the student's own")
    options.add_argument(
        "--buffer", type=float, default=0.2, help="seconds that a player holds back (default 0.2)"
    )
    options.add_argument(
        "--switch-every",
        type=float,
        default=15.0,
        help="seconds between two prompts of a viewer (default 15); 0 never switches",
    )
    options.add_argument("--out", required=True, help="the report, .json")
    return options


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return run_tool(lambda: load(args), "interrupted; what was complete is in the report")


def load(args: argparse.Namespace) -> int:
    """Measure, and write and print the report; 1 if something went wrong for a viewer."""
    check(args)
    try:
        from streamvid.serving.load import Server, check_url, run_server
    except ImportError as error:
        raise ValueError(
            f"{error.name} is not installed; run: pip install 'streamvid[live]'"
        ) from error
    from streamvid.serving.command import read_token

    if args.url:
        running: Any = nullcontext((Server(check_url(args.url), read_token(args.token_file)), None))
    else:
        running = run_server(server_options(args))
    with running as (server, process):
        return measure(args, server, process)


def check(args: argparse.Namespace) -> None:
    """Refuse what can't be measured.

    Raises:
        ValueError: in one line.
    """
    from streamvid.video import ensure_place

    if not args.out.endswith(".json"):
        raise ValueError(f"--out {args.out}: the report is a .json file")
    if not (args.viewers or args.churn or args.endurance):
        raise ValueError("nothing to measure; give --viewers, --churn or --endurance")
    for name in ("seconds", "fps", "endurance_fps"):
        if getattr(args, name) <= 0:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} {getattr(args, name):g} must be more than 0")
    for name in ("churn", "endurance", "buffer", "switch_every"):
        if getattr(args, name) < 0:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} {getattr(args, name):g} must be at least 0")
    if args.url and (args.student or args.port or args.device != "auto"):
        raise ValueError(
            "--student, --port and --device are of a server that is started; leave"
            " them or --url out"
        )
    if args.token_file and not args.url:
        raise ValueError("--token-file is of a running server; give its --url")
    ensure_place(args.out)


def server_options(args: argparse.Namespace) -> list[str]:
    """Of ``streamvid serve``, with room for all viewers at once."""
    places = max([*args.viewers, 8])
    limits = {
        "sessions": places,
        "sessions_per_address": places + 8,  # of which some are still leaving
        "connections_per_address": places + 8,
        "max_fps": MOST_FPS,
    }
    options = ["--port", str(args.port), "--device", args.device, "--fps", str(args.fps)]
    options += ["--student", args.student] if args.student else []
    for name, value in limits.items():
        options += ["--limit", f"{name}={value}"]
    return options


def measure(args: argparse.Namespace, server: Any, process: Any) -> int:
    """Measure, and write and print the report."""
    import json

    from streamvid.reports import environment, write_report
    from streamvid.serving.command import PLAIN_EXAMPLES
    from streamvid.studies import live

    info = json.loads(server.fetch("/v1/info"))
    load = live.Load(
        prompts=info["examples"] or PLAIN_EXAMPLES,
        fps=args.fps,
        buffer_s=args.buffer,
        switch_every_s=args.switch_every or None,
        settings={"steps": args.steps} if args.steps else {},
    )
    endurance_load = replace(load, fps=args.endurance_fps)
    report: dict[str, Any] = {
        "server": f"{info['model']} on {info['device']}, {info['width']} x {info['height']} pixels,"
        f" {args.steps or info['steps']} steps per chunk of {info['chunk_frames']} frames",
        "load": {"fps": load.fps, "buffer_s": load.buffer_s, "switch_every_s": load.switch_every_s},
    }
    out = Path(args.out)
    try:
        live.measure(
            server,
            load,
            report,
            viewers=args.viewers,
            seconds=args.seconds,
            churn=args.churn,
            endurance=args.endurance,
            endurance_load=endurance_load,
            process=process,
            say=tell,
        )
    finally:
        if any(report.get(name) for name in ("viewers", "churn", "endurance")):
            text = live.write_text(report)
            write_report(out, text, report, environment())
            print(text)
    return 0 if live.went_well(report) else 1


if __name__ == "__main__":
    sys.exit(main())
