"""The page: what it refers to, and, in a browser, what a person does with it."""

import json
import re
import time

import numpy as np
import pytest
import torch

from demos.browser import chromium
from demos.browser import main as find_browser
from demos.pictures import SCALE, caption, serving
from streamvid.evaluation.world_score import score
from streamvid.frames import clip_frames
from streamvid.serving import protocol
from streamvid.serving.server import PAGE
from streamvid.students.script import Script
from streamvid.video import VideoWriter

HTML, STYLE = ((PAGE / name).read_text(encoding="utf-8") for name in ("index.html", "style.css"))
MODULES = {path.name: path.read_text(encoding="utf-8") for path in PAGE.glob("*.js")}
SCRIPT = "\n".join(MODULES.values())
RED, BLUE = "a large red circle moves up slowly", "a small blue square moves to the left slowly"
SEED = 3
PATIENCE_S = 120  # of a machine that does something else as well


def test_nothing_is_loaded_from_elsewhere():
    text = HTML + SCRIPT + STYLE
    assert set(re.findall(r"https?://[\w./]+", text)) <= {"http://www.w3.org/2000/svg"}
    assert "url(" not in STYLE and "@import" not in STYLE
    assert not re.search(r"\sstyle=|\son\w+=", HTML), "the content security policy forbids these"
    assert "innerHTML" not in SCRIPT, "a prompt would run as HTML"


def test_modules_import_what_others_export():
    exported = {
        name: set(re.findall(r"^export (?:async )?(?:function|const|class) ([\w$]+)", text, re.M))
        for name, text in MODULES.items()
    }
    for name, text in MODULES.items():
        for names, source in re.findall(r'import \{([^}]+)\} from "\./([\w.]+)"', text):
            wanted = {word.strip() for word in names.split(",") if word.strip()}
            assert wanted <= exported[source], f"{name} imports {wanted - exported[source]}"
            rest = text.replace(names, "", 1)
            unused = {
                word for word in wanted if not re.search(rf"(?<![\w$]){re.escape(word)}\b", rest)
            }
            assert not unused - {"$"}, f"{name} has no use for {unused}"


def test_every_part_that_the_script_looks_for_is_on_the_page():
    ids = set(re.findall(r'id="([\w-]+)"', HTML))
    wanted = set(re.findall(r'\$\("([\w-]+)"\)', SCRIPT))
    assert wanted <= ids and len(wanted) > 25


def test_the_page_sends_only_messages_of_the_protocol_and_knows_all_answers():
    lines = re.findall(r"type(?::| =) .*", SCRIPT)
    sent = {
        verb for line in lines for verb in re.findall(r'"((?:session|record|script)\.\w+)"', line)
    }
    types = lambda union: {kind.model_fields["type"].default for kind in union.__args__[0].__args__}
    assert sent <= types(protocol.ViewerMessage) and len(sent) > 9
    silent = {"session.paused", "session.resumed", "snapshot.made"}  # the page asks for no snapshot
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


def test_what_is_lacking_is_said_in_one_line(monkeypatch, capsys):
    monkeypatch.setenv("CHROMIUM", "no-such-program")
    assert find_browser([]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert "CHROMIUM=no-such-program" in said or "pip install 'streamvid[browser]'" in said


def test_a_frame_in_the_moving_picture_is_enlarged_pixel_by_pixel():
    frame = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    image = np.asarray(caption(frame, "words"))[: 4 * SCALE]
    assert (image == frame.repeat(SCALE, 0).repeat(SCALE, 1)).all()


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser():
    pytest.importorskip("playwright.sync_api", reason="no browser test: run make browser")
    try:
        with chromium() as running:
            yield running
    except ValueError as error:
        pytest.skip(f"no browser test: {error}")


@pytest.fixture(scope="module")
def address():
    with serving(fps=48.0, examples=["a small green circle moves up"]) as at:
        yield at


class Socket:
    """What one connection of the page has carried."""

    def __init__(self, socket):
        self.frames, self.heard, self.said = [], [], []
        socket.on("framereceived", self._receive)
        socket.on("framesent", lambda text: self.said.append(json.loads(text)))

    def _receive(self, data):
        if isinstance(data, bytes):
            self.frames.append(protocol.unpack_frame(data))
        else:
            self.heard.append(json.loads(data))

    def of_prompt(self, number):
        return [(head, picture) for head, picture in self.frames if head.prompt_id == number]

    def of_type(self, kind):
        return [message for message in self.heard if message["type"] == kind]


class Watched:
    """A page with a stream on it, and what went wrong there."""

    def __init__(self, browser):
        self.page = browser.new_context(accept_downloads=True).new_page()
        self.sockets, self.errors = [], []
        self.page.on("websocket", lambda socket: self.sockets.append(Socket(socket)))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self._hear)

    def _hear(self, said):
        if said.type == "error" and not said.text.startswith("Failed to load resource"):
            self.errors.append(said.text)  # among them what the content security policy stops

    def open(self, address):
        self.page.goto(f"{address}/?prompt={RED.replace(' ', '+')}&seed={SEED}")
        self.page.wait_for_selector("canvas[data-started]", timeout=1000 * PATIENCE_S)

    def until(self, condition):
        """Wait until something is so, which is asked from outside."""
        deadline = time.monotonic() + PATIENCE_S
        while not (found := condition()):
            assert time.monotonic() < deadline, "it never came about"
            self.page.wait_for_timeout(20)
        return found

    def streaming(self, start, stop):
        """The sockets of these numbers, when all of them have shown a frame: what a page shows may
        be seen before what is told of its sockets.
        """
        wanted = slice(start, stop)
        self.until(
            lambda: len(self.sockets) >= stop and all(each.frames for each in self.sockets[wanted])
        )
        return self.sockets[wanted]

    def switch(self, prompt):
        self.page.get_by_label("What the stream should show").fill(prompt)
        self.page.keyboard.press("Enter")

    def download(self, name, path):
        with self.page.expect_download(timeout=1000 * PATIENCE_S) as download:
            self.page.get_by_role("button", name=name, exact=True).click()
        download.value.save_as(path)
        return path

    @property
    def shown(self):
        return int(self.page.get_attribute("canvas[data-started]", "data-sequence"))


@pytest.fixture
def watched(browser):
    watched = Watched(browser)
    yield watched
    watched.page.context.close()
    assert watched.errors == []


def clip_of(frames):
    """``[T, 3, H, W]`` in [0, 1] of pictures as they came."""
    images = np.stack([protocol.decode_picture(picture) for _, picture in frames])
    return torch.from_numpy(images).permute(0, 3, 1, 2) / 255


def test_a_new_prompt_is_seen_in_what_the_browser_received(watched, address):
    watched.open(address)
    socket = watched.sockets[0]
    before = watched.shown
    watched.until(lambda: watched.shown > before + 12)
    watched.switch(BLUE)
    watched.until(lambda: len(socket.of_prompt(1)) >= 36)
    before, after = clip_of(socket.of_prompt(0)[-24:]), clip_of(socket.of_prompt(1)[:36])
    assert score(before, RED).overall > 0.7 > score(before, BLUE).overall
    assert score(after, BLUE).overall > 0.7 > score(after, RED).overall
    watched.page.wait_for_selector("canvas[data-prompt='1']")
    assert watched.page.inner_text("#switch") != "–"

    page = watched.page
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press(" ")
    page.wait_for_selector("#state[data-state=paused]")
    still = watched.shown
    page.wait_for_timeout(200)
    assert watched.shown == still
    page.keyboard.press(" ")
    watched.until(lambda: watched.shown > still)

    # a click on the film strip, before the switch, goes back to the first prompt
    begun = len(socket.frames)
    switch = socket.of_type("prompt.applied")[0]["chunk"]
    moment = page.locator(".moment").first
    assert int(moment.get_attribute("data-chunk")) < switch
    moment.click(force=True)
    restarted = watched.until(lambda: socket.of_type("session.restarted"))[0]
    assert restarted["prompt"] == RED and restarted["chunk"] < switch
    watched.until(lambda: len(socket.of_prompt(restarted["prompt_id"])) >= 24)
    again = clip_of(socket.of_prompt(restarted["prompt_id"])[:24])
    assert score(again, RED).overall > 0.7 and len(socket.frames) > begun
    watched.until(lambda: page.locator(".mark[data-kind=prompt]").count() == 0)


@pytest.mark.slow
def test_a_mark_is_dragged_and_the_edited_script_is_replayed(watched, address, tmp_path):
    watched.open(address)
    page, first = watched.page, watched.sockets[0]
    watched.until(lambda: len(first.of_type("video.chunk")) >= 8)
    watched.switch(BLUE)
    applied = watched.until(lambda: first.of_type("prompt.applied"))[0]
    watched.until(lambda: len(first.of_prompt(1)) >= 24)
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press(" ")  # the track holds still
    page.wait_for_selector("#state[data-state=paused]")
    assert page.get_attribute("#timeline", "data-edited") == "no"

    mark = page.locator(".mark[data-kind=prompt]")
    assert int(mark.get_attribute("data-at")) == applied["chunk"]
    track, box = page.locator("#track").bounding_box(), mark.bounding_box()
    y = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + 4, y)
    page.mouse.down()
    page.mouse.move(track["x"] + (box["x"] - track["x"]) / 2, y, steps=4)
    page.mouse.up()
    dragged = int(mark.get_attribute("data-at"))
    assert 1 <= dragged < applied["chunk"]
    assert page.get_attribute("#timeline", "data-edited") == "yes"
    mark.press("ArrowRight")
    moved = dragged + 1
    mark.click()
    page.get_by_label("Prompt", exact=True).fill('a "large" green triangle: moves, up')
    page.get_by_role("button", name="Save", exact=True).click()
    script = Script.load(watched.download("Save script", tmp_path / "edited.yaml"))
    assert (script.prompt, script.seed, script.height, script.width) == (RED, SEED, 64, 64)
    told = [(change.at, change.prompt, change.mode) for change in script.changes]
    assert told == [(moved, 'a "large" green triangle: moves, up', "cut")]

    page.get_by_role("button", name="Replay", exact=True).click()
    second = watched.until(lambda: watched.sockets[1:])[0]
    watched.until(lambda: len(second.of_prompt(1)) >= 12)
    assert second.of_prompt(1)[0][0].chunk == moved
    of_chunk = lambda socket: [frame for head, frame in socket.frames if head.chunk < moved]
    assert of_chunk(second) == of_chunk(first)[: len(of_chunk(second))], "the past is the same"
    assert page.get_attribute("#timeline", "data-edited") == "no"
    mark.press("Delete")
    assert page.get_attribute("#timeline", "data-edited") == "yes"
    page.get_by_role("button", name="Undo edits").click()
    assert page.locator(".mark[data-kind=prompt]").count() == 1


@pytest.mark.slow
def test_a_stream_is_recorded_downloaded_and_decoded(watched, address, tmp_path):
    watched.open(address)
    page, socket = watched.page, watched.sockets[0]
    page.get_by_role("radio", name="New scene").check(force=True)
    page.keyboard.press("v")
    page.wait_for_selector("#record[aria-pressed=true]")
    watched.switch(BLUE)
    watched.until(lambda: len(socket.of_prompt(1)) >= 12)
    page.click("#record")
    path = watched.download("Download", tmp_path / "clip.mp4")
    (done,) = socket.of_type("record.done")
    assert sum(1 for _ in clip_frames(path)) == done["frames"] >= 12
    script = Script.load(watched.download("Save script", tmp_path / "stream.yaml"))
    assert script.seed == SEED and script.changes[0].mode == "hard"
    assert script == Script.load(watched.download("Script", tmp_path / "again.yaml")) or (
        script.changes == Script.load(tmp_path / "again.yaml").changes
    )


@pytest.mark.slow
def test_two_settings_and_four_seeds_are_seen_side_by_side(watched, address):
    watched.open(address)
    page = watched.page
    steps_of = lambda socket: {chunk["steps"] for chunk in socket.of_type("video.chunk")}
    page.keyboard.press("c")
    page.wait_for_selector(".view:nth-child(2) canvas[data-started]", timeout=1000 * PATIENCE_S)
    pair = watched.streaming(1, 3)
    watched.until(lambda: all(steps_of(socket) for socket in pair))
    assert [steps_of(socket) for socket in pair] == [{4}, {1}]
    page.get_by_role("radiogroup", name="of the right picture").get_by_label("2").check(force=True)
    watched.until(lambda: steps_of(pair[1]) == {1, 2})
    assert steps_of(pair[0]) == {4}
    watched.switch(BLUE)
    for socket in pair:
        watched.until(lambda: socket.of_type("prompt.applied"))

    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("g")
    page.wait_for_selector(".view:nth-child(4) canvas[data-started]", timeout=1000 * PATIENCE_S)
    four = watched.streaming(3, 7)
    assert [socket.of_type("video.start")[0]["seed"] for socket in four] == [3, 4, 5, 6]
    assert {socket.of_type("video.start")[0]["prompt"] for socket in four} == {BLUE}
    assert len({socket.frames[0][1] for socket in four}) == 4
    page.get_by_role("button", name="Keep seed 5").click()
    single = watched.until(lambda: watched.sockets[7:])[0]
    assert watched.until(lambda: single.of_type("video.start"))[0]["seed"] == 5
    assert page.locator(".view").count() == 1


MODELS = [
    {"id": "streamvid-tiny", "kind": "student", "live": True, "steps": 4, "num_frames": None},
    {"id": "the-teacher", "kind": "teacher", "live": False, "steps": 50, "num_frames": 5},
]
SIZES = {"height": 64, "width": 64, "fps": 16.0}


@pytest.mark.slow
def test_a_teacher_plays_its_clip_beside_the_student(watched, address, tmp_path):
    asked = []
    with VideoWriter(tmp_path / "clip.webm", 16) as writer:
        for level in (0, 60, 120, 180, 240):
            writer.append(torch.full((1, 3, 64, 64), level / 255))

    def serve_clip(route):
        if route.request.method == "POST":
            asked.append(route.request.post_data_json)
        done = len(asked) and route.request.method == "GET"
        status = "completed" if done else "queued"
        route.fulfill(json={"id": "one", "status": status, "progress": 0, "seconds": "0.3125"})

    page = watched.page
    models = [{**model, **SIZES} for model in MODELS]
    page.route("**/v1/models", lambda route: route.fulfill(json={"data": models}))
    page.route("**/v1/videos", serve_clip)
    page.route("**/v1/videos/one", serve_clip)
    page.route("**/v1/videos/one/content", lambda route: route.fulfill(path=tmp_path / "clip.webm"))
    watched.open(address)
    page.keyboard.press("c")
    page.wait_for_selector(".view:nth-child(2) canvas[data-started]", timeout=1000 * PATIENCE_S)
    assert asked[0] == {"model": "the-teacher", "prompt": RED, "seed": SEED, "format": "webm"}
    level = lambda: page.evaluate(
        "document.querySelectorAll('canvas[data-started]')[1].getContext('2d')"
        ".getImageData(32, 32, 1, 1).data[0]"
    )
    seen = set()
    watched.until(lambda: seen.add(round(level() / 60)) or seen == {0, 1, 2, 3, 4})
    watched.switch(BLUE)
    watched.until(lambda: len(asked) == 2 and asked[1]["prompt"] == BLUE)


DROP = """(name) => {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 64;
  const context = canvas.getContext("2d");
  context.fillStyle = "#1c1c20";
  context.fillRect(0, 0, 64, 64);
  context.fillStyle = "#e02828";
  context.fillRect(20, 20, 24, 24);
  canvas.toBlob((blob) => {
    const data = new DataTransfer();
    data.items.add(new File([blob], name, { type: "image/png" }));
    document.body.dispatchEvent(new DragEvent("drop", { bubbles: true, dataTransfer: data }));
  });
}"""


@pytest.mark.slow
def test_a_server_that_can_not_begin_from_a_picture_says_so(watched, address):
    watched.page.route("**/v1/starts", lambda route: route.fulfill(status=404, json={}))
    watched.open(address)
    watched.page.evaluate(DROP, "square.png")
    watched.page.get_by_text("This server can't begin from a picture or a clip.").wait_for()
    assert len(watched.sockets) == 1, "the stream goes on"


@pytest.mark.slow
def test_a_picture_that_is_dropped_is_what_the_stream_begins_from(watched, address):
    watched.open(address)
    page = watched.page
    page.evaluate(DROP, "square.png")
    socket = watched.until(lambda: watched.sockets[1:])[0]
    watched.until(lambda: len(socket.frames) >= 12)
    assert socket.said[0]["start"]
    page.get_by_text("square.png").wait_for()
    middle = protocol.decode_picture(socket.frames[0][1])[32, 32]
    assert middle[0] > 140 > middle[2], "the square is where it was"
    page.get_by_role("button", name="Remove").click()
    plain = watched.until(lambda: watched.sockets[2:])[0]
    watched.until(lambda: plain.frames)
    assert "start" not in plain.said[0]
