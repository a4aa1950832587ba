"""A Chromium for the pictures and for the tests of the page: `python -m demos.browser` names it.

    python -m demos.browser --install

installs Debian's where there is none, which needs root and apt-get.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
VARIABLE = "CHROMIUM"
HOW_TO = (
    "install chromium (apt-get install chromium), name one in CHROMIUM, or run:"
    " python -m playwright install chromium"
)


def find_chromium() -> str | None:
    """Path of a Chromium: the one that CHROMIUM names, an installed one, or Playwright's own.

    Raises:
        ValueError: if CHROMIUM names no program, or Playwright is not installed.
    """
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise ValueError(
            "playwright is not installed; run: pip install 'streamvid[browser]'"
        ) from error
    named = os.environ.get(VARIABLE)
    if named:
        path = shutil.which(named)
        if path is None:
            raise ValueError(f"{VARIABLE}={named} is no program; name a Chromium")
        return path
    for name in NAMES:
        path = shutil.which(name)
        if path is not None:
            return path
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
    return own if os.path.exists(own) else None


@contextmanager
def chromium() -> Iterator[Any]:
    """A running Chromium, as Playwright's ``Browser``.

    Raises:
        ValueError: if there is none, in one line that says how to get one.
    """
    path = find_chromium()
    if path is None:
        raise ValueError(f"there is no Chromium; {HOW_TO}")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # root, as in a container, has no sandbox; the page is our own
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=path, args=sandbox)
        yield browser
        browser.close()


def install_chromium() -> None:
    """Install Debian's chromium.

    Raises:
        ValueError: if that is not possible here.
    """
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise ValueError(f"there is no Chromium; {HOW_TO}")
    install = ["apt-get", "install", "-y", "--no-install-recommends", "chromium"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    if subprocess.run(install, env=environment, **quiet).returncode == 0:
        return
    subprocess.run(["apt-get", "update"], env=environment, **quiet)  # there may be no lists yet
    if subprocess.run(install, env=environment, **quiet).returncode:
        raise ValueError(f"apt-get could not install chromium; {HOW_TO}")


def main(argv: list[str] | None = None) -> int:
    """Print the path of a Chromium; 1 if there is none."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--install", action="store_true", help="where there is none")
    args = parser.parse_args(argv)
    try:
        if find_chromium() is None and args.install:
            install_chromium()
        path = find_chromium()
        if path is None:
            raise ValueError(f"there is no Chromium; {HOW_TO}")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
