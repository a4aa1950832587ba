"""Tries hostile input, kills, full disks and the like on the tools, and says what held.

    python -m tests.reliability --out benchmarks/reliability.json
    python -m tests.reliability --only checkpoints --only overrides --jobs 2
    python -m tests.reliability --name lora --list

Held is: exit status 0 with the right work; or 2 with one `error:` line as the last line, without a
traceback, a raw escape sequence, or any code of the input run; in either case within the limits of
time and memory.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

for key, value in {
    "OMP_NUM_THREADS": "1",
    "TQDM_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONWARNINGS": "ignore",
    "COLUMNS": "100",
}.items():
    os.environ[key] = value  # before anything is imported that reads it

from tests.reliability.cases import all_cases  # noqa: E402
from tests.reliability.parts import make_parts  # noqa: E402
from tests.reliability.runner import Case, import_everything, run_all  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.reliability",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only", action="append", metavar="AREA", help="an area, may be repeated; default: all"
    )
    parser.add_argument("--name", help="cases whose name has this text")
    parser.add_argument(
        "--every",
        type=int,
        default=1,
        metavar="N",
        help="of each area the first case and every N-th after it",
    )
    parser.add_argument("--jobs", type=int, default=1, help="cases at once (default 1)")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    parser.add_argument("--out", help="a .json file; the table goes beside it as .md")
    args = parser.parse_args(argv)
    cases, areas = chosen(args), {case.area for case in all_cases()}
    unknown = sorted(set(args.only or ()) - areas)
    if unknown or not cases or args.jobs < 1:
        parser.error(
            f"--only {unknown[0]}: expected one of {', '.join(sorted(areas))}"
            if unknown
            else "there is no such case"
        )
    if args.list:
        print(*(f"{case.area}: {case.name}" for case in cases), sep="\n")
        return 0
    came, seconds = tried(cases, args.jobs)
    table = report(cases, came)
    print(table)
    print(f"{len(cases)} cases in {seconds:.0f} s.")
    if args.out:
        write(Path(args.out), cases, came, table)
    return int(any(came))


def chosen(args: argparse.Namespace) -> list[Case]:
    """The cases that were asked for, in the order of their areas."""
    seen: Counter[str] = Counter()
    cases = []
    for case in all_cases():
        seen[case.area] += 1
        if args.only and case.area not in args.only or args.name and args.name not in case.name:
            continue
        if (seen[case.area] - 1) % args.every == 0:
            cases.append(case)
    return cases


def tried(cases: list[Case], jobs: int) -> tuple[list[str], float]:
    """What came of each case, and the time of all."""
    import_everything()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="reliability-") as folder:
        make_in_a_fork(Path(folder) / "parts")
        came = run_all(cases, Path(folder) / "parts", Path(folder), jobs, tell)
        return [text.replace(folder, "") for text in came], time.monotonic() - began


def make_in_a_fork(parts: Path) -> None:
    """The parent stays as it was imported, without threads of torch, which do not survive a
    fork.
    """
    pid = os.fork()
    if not pid:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 1)
        make_parts(parts)
        os._exit(0)
    if os.waitpid(pid, 0)[1]:
        sys.exit("error: the parts of the cases could not be made")


def tell(index: int, case: Case, came: str, seconds: float) -> None:
    print(
        f"{'NOT' if came else 'ok '} {seconds:6.1f} s  {case.area}: {case.name}  {came}",
        file=sys.stderr,
        flush=True,
    )


def report(cases: list[Case], came: list[str]) -> str:
    """The table of areas and all that did not hold, as Markdown."""
    tried, held = (
        Counter(case.area for case in cases),
        Counter(case.area for case, text in zip(cases, came) if not text),
    )
    rows = [
        f"| {area} | {num} | {held[area]} | {num - held[area]} |" for area, num in tried.items()
    ]
    rows.append(
        f"| **all** | {len(cases)} | {sum(held.values())} | {len(cases) - sum(held.values())} |"
    )
    lines = ["| area | tried | held | not |", "|---|---:|---:|---:|", *rows]
    failures = [
        f"- {case.area}: {case.name}: `{plain(text)}`" for case, text in zip(cases, came) if text
    ]
    return "\n".join([*lines, "", "Not held:" if failures else "All held.", "", *failures]).rstrip()


def plain(text: str) -> str:
    """One line that no backquote or escape breaks out of."""
    return "".join(c if c.isprintable() else " " for c in text.replace("`", "'"))


def write(out: Path, cases: list[Case], came: list[str], table: str) -> None:
    import torch

    machine = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.system(),
    }
    results = [
        {"area": case.area, "name": case.name, "came": text} for case, text in zip(cases, came)
    ]
    out.write_text(json.dumps({**machine, "cases": results}, indent=1, ensure_ascii=True) + "\n")
    head = (
        "# Reliability\n\n`python -m tests.reliability --out benchmarks/reliability.json` on "
        + ", ".join(f"{key} {value}" for key, value in machine.items())
    )
    out.with_suffix(".md").write_text(
        f"{head}.\n\n{__doc__.split(chr(10) * 2)[-1].strip()}\n\n{table}\n", encoding="utf-8"
    )


if __name__ == "__main__":
    sys.exit(main())
