"""The pictures of the page in the documents: `python -m demos.pictures --out docs/images`.

    live-light, live-dark, live-phone, live-compare (.png), and switch.webp: a prompt that is
    switched, as it came to the browser, enlarged without smoothing.

Needs `pip install -e ".[live,browser]"` and a Chromium, see ``demos.browser``.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from demos.browser import chromium
from streamvid.command_line import run_tool, say

DESK = {"width": 1280, "height": 960}
PHONE = {"width": 390, "height": 844}
PROMPTS = (
    "a large red circle moves up slowly",
    "a small blue square moves to the left slowly",
    "a large green triangle moves to the right slowly",
)
PATIENCE_MS = 120_000
SCALE = 4  # of the frames in switch.webp
BEFORE, AFTER = 24, 40  # frames in it
CAPTION = 34  # pixels of height below them
PAPER, INK = (246, 245, 241), (29, 30, 34)


@contextmanager
def serving(**options: Any) -> Iterator[str]:
    """The address of a server of the shipped student, on a free port, that is warm."""
    import uvicorn

    from streamvid.serving.server import create_app
    from streamvid.students.folder import TINY_STUDENT, load_student

    app = create_app(load_student(TINY_STUDENT), name="streamvid-tiny", **options)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started or not app.state.worker.ready.is_set():
        if not thread.is_alive():
            raise ValueError("the server did not start; run streamvid demo to see why")
        time.sleep(0.02)
    try:
        yield f"http://localhost:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)


def open_page(browser: Any, address: str, size: dict[str, int], theme: str) -> Any:
    """The page with the first prompt on it."""
    context = browser.new_context(
        viewport=size, color_scheme=theme, device_scale_factor=2 if size is PHONE else 1
    )
    page = context.new_page()
    page.goto(f"{address}/?prompt={PROMPTS[0].replace(' ', '+')}&seed=3")
    page.wait_for_selector("canvas[data-started]", timeout=PATIENCE_MS)
    return page


def play(page: Any, chunks: int) -> None:
    """Wait until so many chunks more have been announced."""
    bars = "document.querySelector('#timeline').dataset.chunks"
    wanted = int(page.evaluate(bars)) + chunks
    wait_until(page, f"Number({bars}) >= {wanted}")


def wait_until(page: Any, condition: str) -> None:
    """Poll from outside: the page's own policy forbids it to evaluate texts."""
    deadline = time.monotonic() + PATIENCE_MS / 1000
    while not page.evaluate(condition):
        if time.monotonic() > deadline:
            raise ValueError(f"the page did not come to {condition}; is the machine very busy?")
        page.wait_for_timeout(50)


def show(page: Any, prompt: str, number: int) -> None:
    """Switch the prompt and wait for the first frame of it."""
    page.fill("#prompt", prompt)
    page.keyboard.press("Enter")
    page.wait_for_selector(f"canvas[data-prompt='{number}']", timeout=PATIENCE_MS)
    page.evaluate("document.activeElement.blur()")


def shoot_desk(browser: Any, address: str, theme: str, path: Path) -> None:
    """Three prompts, other steps, and a bookmark, on a wide screen."""
    page = open_page(browser, address, DESK, theme)
    play(page, 5)
    show(page, PROMPTS[1], 1)
    play(page, 3)
    page.keyboard.press("2")
    play(page, 2)
    page.keyboard.press("b")
    show(page, PROMPTS[2], 2)
    play(page, 5)
    page.screenshot(path=path)
    page.context.close()


def shoot_phone(browser: Any, address: str, path: Path) -> None:
    """A phone."""
    page = open_page(browser, address, PHONE, "light")
    play(page, 4)
    show(page, PROMPTS[1], 1)
    play(page, 3)
    page.screenshot(path=path)
    page.context.close()


def shoot_comparison(browser: Any, address: str, path: Path) -> None:
    """Two settings side by side; the teacher, where the server has one."""
    page = open_page(browser, address, DESK, "light")
    page.keyboard.press("c")
    page.wait_for_selector(".view:nth-child(2) canvas[data-started]", timeout=PATIENCE_MS)
    play(page, 6)
    page.screenshot(path=path)
    page.context.close()


def record_switch(browser: Any, address: str, path: Path) -> None:
    """Frames around a switch of the prompt, as the browser received them."""
    from streamvid.serving import protocol

    frames: list[tuple[protocol.FrameHeader, bytes]] = []
    page = browser.new_page(viewport=DESK)
    keep = lambda data: isinstance(data, bytes) and frames.append(protocol.unpack_frame(data))
    page.on("websocket", lambda socket: socket.on("framereceived", keep))
    page.goto(f"{address}/?prompt={PROMPTS[0].replace(' ', '+')}&seed=3")
    page.wait_for_selector("canvas[data-started]", timeout=PATIENCE_MS)
    play(page, 4)
    show(page, PROMPTS[1], 1)
    play(page, AFTER // 12 + 1)
    page.context.close()
    switch = next(i for i, (header, _) in enumerate(frames) if header.prompt_id)
    kept = frames[max(0, switch - BEFORE) : switch + AFTER]
    images = [
        caption(protocol.decode_picture(picture), PROMPTS[header.prompt_id])
        for header, picture in kept
    ]
    later = images[1:]
    images[0].save(path, save_all=True, append_images=later, duration=62, loop=0, quality=92)


def caption(frame: np.ndarray, prompt: str) -> Image.Image:
    """A frame ``[H, W, 3]`` enlarged, pixel by pixel, with its prompt below it."""
    height, width = (SCALE * side for side in frame.shape[:2])
    image = Image.new("RGB", (width, height + CAPTION), PAPER)
    picture = Image.fromarray(frame).resize((width, height), Image.Resampling.NEAREST)
    image.paste(picture)
    font = ImageFont.load_default(11.5)
    draw = ImageDraw.Draw(image)
    draw.text((width / 2, height + CAPTION / 2), prompt, fill=INK, font=font, anchor="mm")
    return image


def make_pictures(out: Path) -> None:
    """All pictures, into a folder."""
    from streamvid.serving.command import world_examples
    from streamvid.serving.models import serve_teacher
    from streamvid.students.folder import TINY_TEACHER, choose_device

    out.mkdir(parents=True, exist_ok=True)
    teacher = serve_teacher("teacher", TINY_TEACHER, 33, choose_device("cpu"))
    options = {"examples": world_examples(), "others": [teacher]}
    with chromium() as browser, serving(**options) as address:
        for theme in ("light", "dark"):
            shoot_desk(browser, address, theme, out / f"live-{theme}.png")
        shoot_phone(browser, address, out / "live-phone.png")
        shoot_comparison(browser, address, out / "live-compare.png")
        record_switch(browser, address, out / "switch.webp")
    for path in sorted([*out.glob("live-*.png"), out / "switch.webp"]):
        say(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def main(argv: list[str] | None = None) -> int:
    """``python -m demos.pictures``."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the pictures")
    args = parser.parse_args(argv)
    return run_tool(lambda: make_pictures(args.out), "stopped")


if __name__ == "__main__":
    sys.exit(main())
