"""The page: what it refers to, and, in a browser, what a person does with it."""

import re
import shutil
import threading
import time
from contextlib import contextmanager

import pytest
import uvicorn

from streamvid.frames import clip_frames
from streamvid.serving import protocol
from streamvid.serving.server import PAGE, create_app
from streamvid.students.script import Script

HTML, SCRIPT, STYLE = (
    (PAGE / name).read_text(encoding="utf-8") for name in ("index.html", "app.js", "style.css")
)


def test_nothing_is_loaded_from_elsewhere():
    text = HTML + SCRIPT + STYLE
    assert set(re.findall(r"https?://[\w./]+", text)) <= {"http://www.w3.org/2000/svg"}
    assert "url(" not in STYLE and "@import" not in STYLE
    assert not re.search(r"\sstyle=|\son\w+=", HTML), "the content security policy forbids these"
    assert "innerHTML" not in SCRIPT, "a prompt would run as HTML"


def test_every_part_that_the_script_looks_for_is_on_the_page():
    ids = set(re.findall(r'id="([\w-]+)"', HTML))
    wanted = set(re.findall(r'\$\("([\w-]+)"\)', SCRIPT))
    assert wanted - {"now"} <= ids and len(wanted) > 25


def test_the_page_sends_only_messages_of_the_protocol_and_knows_all_answers():
    sent = {"session.pause", "session.resume"} | set(
        re.findall(r'type: "([a-z_]+\.[a-z_]+)"', SCRIPT)
    )
    types = lambda union: {kind.model_fields["type"].default for kind in union.__args__[0].__args__}
    assert sent <= types(protocol.ViewerMessage) and len(sent) > 9
    silent = {"session.paused", "session.resumed"}
    handled = set(re.findall(r'"?([\w.]+)"?: \(\) => ', SCRIPT))
    assert types(protocol.ServerMessage) - silent <= handled


def test_every_control_has_a_name():
    for tag, inside in re.findall(r"<button([^>]*)>(.*?)</button>", HTML, re.S):
        text = re.sub(r"<[^>]+>|\s", "", inside)
        assert text or "aria-label=" in tag, tag
    for tag in re.findall(r"<(?:input|select)([^>]*)>", HTML):
        name = re.search(r'id="([\w-]+)"', tag)[1]
        wrapped = re.search(rf'<label class="switch"><input[^>]*id="{name}"', HTML)
        assert f'for="{name}"' in HTML or wrapped, name


# ---------------------------------------------------------------- in a browser


@contextmanager
def serving(app):
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://localhost:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="no browser test: pip install 'streamvid[browser]'"
    )
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no browser test: chromium is not installed (apt-get install chromium)")
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


COLOUR = """() => {
  const canvas = document.querySelector('.view canvas');
  const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
  let red = 0, blue = 0;
  for (let i = 0; i < pixels.length; i += 4) {
    red += pixels[i] > 140 && pixels[i + 2] < 110;
    blue += pixels[i + 2] > 140 && pixels[i] < 110;
  }
  return red > 20 && blue < 10 ? 'red' : blue > 20 && red < 10 ? 'blue' : 'neither';
}"""


def await_true(page, condition):
    """Poll from outside: the content security policy forbids the page to evaluate texts."""
    for _ in range(600):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"it never came about: {condition}")


@pytest.mark.slow
def test_a_person_watches_switches_goes_back_records_and_compares(browser, tmp_path):
    from streamvid.students.folder import TINY_STUDENT, load_student

    app = create_app(load_student(TINY_STUDENT), examples=["a small green circle moves up"])
    errors = []
    with serving(app) as address:
        assert app.state.worker.ready.wait(60)  # a browser notes each 503 as an error
        page = browser.new_context(accept_downloads=True).new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda said: said.type == "error" and errors.append(said.text))
        page.goto(f"{address}/?prompt=a+large+red+circle+moves+up+slowly&seed=3")
        page.wait_for_selector("canvas[data-started]", timeout=60_000)
        await_true(page, f"({COLOUR})() === 'red'")

        page.get_by_role("radio", name="New scene").check(force=True)
        page.keyboard.press("v")
        page.wait_for_selector("#record[aria-pressed=true]")
        page.get_by_label("What the stream should show").fill("a large blue square moves up slowly")
        page.keyboard.press("Enter")
        page.wait_for_selector("canvas[data-prompt='1']", timeout=30_000)
        await_true(page, f"({COLOUR})() === 'blue'")
        assert page.inner_text("#switch") != "–"

        page.click("#record")
        with page.expect_download() as download:
            page.get_by_role("button", name="Download").click(timeout=30_000)
        download.value.save_as(tmp_path / "clip.mp4")
        assert sum(1 for _ in clip_frames(tmp_path / "clip.mp4")) >= 12
        with page.expect_download() as download:
            page.get_by_role("button", name="Save the script").click()
        download.value.save_as(tmp_path / "stream.yaml")
        script = Script.load(tmp_path / "stream.yaml")
        assert script.seed == 3 and script.changes[0].mode == "hard"

        page.get_by_role("button", name="Go back to").first.click()
        await_true(page, f"({COLOUR})() === 'red'")

        page.evaluate("document.activeElement.blur()")
        page.keyboard.press(" ")
        page.wait_for_selector("#state[data-state=paused]")
        still = page.get_attribute("canvas[data-started]", "data-sequence")
        page.wait_for_timeout(300)
        assert page.get_attribute("canvas[data-started]", "data-sequence") == still
        page.keyboard.press(" ")
        await_true(
            page, f"document.querySelector('canvas[data-started]').dataset.sequence > {still}"
        )

        page.keyboard.press("c")
        await_true(page, "document.querySelectorAll('canvas[data-started]').length === 2")
        page.close()
    assert errors == []
