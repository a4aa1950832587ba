"""The application: live streams, clips, checks, figures, and the page."""

from __future__ import annotations

import logging
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI, HTTPException, Request, Response, WebSocket
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel
from starlette.exceptions import HTTPException as StarletteHTTPException

from streamvid import __version__
from streamvid.serving import protocol
from streamvid.serving.clips import clip_routes
from streamvid.serving.decoding import MEDIA_TYPES
from streamvid.serving.fmp4 import has_h264
from streamvid.serving.guard import LOOPBACK, SUBPROTOCOL, Guard, error_body
from streamvid.serving.limits import Limits
from streamvid.serving.metrics import Metrics
from streamvid.serving.models import ServedModel, ServedModels, model_routes
from streamvid.serving.realtime import TRY_LATER, Defaults, Viewer
from streamvid.serving.recording import ClipStore
from streamvid.serving.snapshots import Snapshots
from streamvid.serving.starts import StartStore
from streamvid.serving.uploads import FORM_BYTES, start_routes
from streamvid.serving.worker import Worker
from streamvid.students.batch import run_alone
from streamvid.students.contexts import fill_first_chunk
from streamvid.students.script import DEFAULT_MODE, MODES
from streamvid.students.session import Session
from streamvid.video import from_uint8

log = logging.getLogger(__name__)
PAGE = Path(__file__).parent / "page"
GOODBYE_S = 5.0
"""For viewers that are slow to take the end of their stream, before the server stops."""


class Info(BaseModel):
    """What a client may ask for, and what it gets without asking."""

    model: str
    version: str
    device: str
    height: int
    width: int
    fps: float
    steps: int
    max_steps: int
    chunk_frames: int
    """Frames per chunk of pixels, after the first chunk."""
    prompt_chars: int
    modes: list[str]
    default_mode: str
    formats: list[str]
    start_types: list[str]
    """Media types of the files that ``/v1/starts`` reads."""
    start_bytes: int
    """The largest of them."""
    snapshots: bool
    """Whether streams can be kept."""
    examples: list[str]


class Health(BaseModel):
    """One word."""

    status: str


def create_app(
    student: Any,
    *,
    name: str = "student",
    height: int = 64,
    width: int = 64,
    fps: float = 16.0,
    limits: Limits | None = None,
    token: str | None = None,
    hosts: Collection[str] | None = LOOPBACK,
    folder: str | Path | None = None,
    examples: Sequence[str] = (),
    open_session: Callable[..., Any] | None = None,
    warm_up: bool = True,
    options: Sequence[str] = (),
    others: Sequence[ServedModel] = (),
    batch: int = 1,
    state: str | Path | None = None,
    autosave: int | None = None,
) -> FastAPI:
    """An application that serves a student, and other models.

    Args:
        student: a ``students.folder.Student``.
        name: of the model, as clients see it.
        height, width: of the frames where a client says nothing, in pixels.
        fps: of playback where a client says nothing, in frames per second.
        limits: of what a client may ask for.
        token: demanded of every client; None demands none.
        hosts: names that the server answers to; None is any, which needs a token.
        folder: of clips and recordings; None is a temporary one that is removed at the end.
        examples: prompts that the page offers.
        open_session: makes a session, in place of ``students.session.Session``.
        warm_up: make chunks until the window is full before ``/readyz`` says 200.
        options: of `streamvid sample` that open the same student, for the commands that viewers
            are shown.
        others: models besides the student, which is the default.
        batch: most live streams that advance together.
        state: folder of snapshots of streams, which outlives the server; None keeps none.
        autosave: chunks after which each stream is kept there by itself; None is never.

    Raises:
        ValueError: if two models share an id, any host is allowed without a token, or ``autosave``
            without ``state``.
    """
    if autosave is not None and state is None:
        raise ValueError(f"autosave={autosave} without a folder of snapshots; give state")
    limits = limits or Limits()
    own = serve_student(
        name, student, height, width, open_session=open_session, warm_up=warm_up, options=options
    )
    models = ServedModels([own, *others])
    metrics = Metrics()
    defaults = Defaults(height, width, fps)
    temporary = tempfile.TemporaryDirectory(prefix="streamvid-")
    clips = Path(temporary.name, "clips") if folder is None else Path(folder)
    store = ClipStore(clips, limits.clips_kept)
    starts = StartStore(
        Path(temporary.name, "starts"), limits.starts_kept, limits.start_life_seconds
    )
    snapshots = None
    if state is not None:
        snapshots = Snapshots(Path(state), limits.snapshots_kept, starts, autosave)
    worker = Worker(models, limits, metrics, store, batch, snapshots)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        worker.stop(timeout=60)
        temporary.cleanup()

    app = FastAPI(title="streamvid", version=__version__, lifespan=lifespan)
    app.state.worker = worker
    app.state.metrics = metrics
    app.add_middleware(
        Guard,
        token=token,
        hosts=hosts,
        body_bytes=limits.upload_bytes,
        larger_bodies={"/v1/starts": limits.start_bytes + FORM_BYTES},
    )
    _add_errors(app)
    app.include_router(clip_routes(worker, store, limits, defaults))
    app.include_router(model_routes(models, height, width, fps))
    app.include_router(start_routes(starts, limits, defaults))
    info = Info(
        model=name,
        version=__version__,
        device=str(own.device),
        height=height,
        width=width,
        fps=fps,
        steps=student.stream.num_steps,
        max_steps=limits.max_steps,
        chunk_frames=student.stream.chunk_frames * student.codec.temporal_ratio,
        prompt_chars=limits.prompt_chars,
        modes=list(MODES),
        default_mode=DEFAULT_MODE,
        formats=[name for name in protocol.ENCODINGS if name != "h264" or has_h264()],
        start_types=list(MEDIA_TYPES),
        start_bytes=limits.start_bytes,
        snapshots=snapshots is not None,
        examples=list(examples),
    )
    _add_checks(app, worker, metrics, info)
    _add_live(app, worker, limits, metrics, defaults, starts)
    _add_page(app)
    return app


def serve_student(
    name: str,
    student: Any,
    height: int,
    width: int,
    *,
    open_session: Callable[..., Any] | None = None,
    warm_up: bool = True,
    options: Sequence[str] = (),
) -> ServedModel:
    """A student to be served; the arguments of ``create_app``."""
    if open_session is None:
        open_session = partial(open_stream, student)
    return ServedModel(
        name,
        open_session,
        steps=student.stream.num_steps,
        device=device_of(student),
        options=options,
        restore=partial(Session.restore, student=student),
        warm_up=partial(fill_window, open_session, student, height, width) if warm_up else None,
    )


def open_stream(student: Any, prompt: str, *, start: Any = None, **options: Any) -> Session:
    """A session of a student; see ``Session``.

    Args:
        start: bytes ``[T, H, W, 3]`` that the stream goes on from, see ``fill_first_chunk``; None
            begins from noise.
    """
    frames = None if start is None else fill_first_chunk(from_uint8(start), student)
    return Session(student, prompt, start=frames, **options)


def fill_window(open_session: Callable[..., Any], student: Any, height: int, width: int) -> None:
    """Make chunks until the window is full, and one more: every shape that a stream has."""
    stream = student.stream
    session = open_session("warm up", seed=0, height=height, width=width)
    for _ in range((stream.window_frames or 0) // stream.chunk_frames + 2):
        run_alone(session.chunk_passes())
    session.close()


def device_of(student: Any) -> torch.device:
    """The device of a student's weights."""
    parameter = next(student.transformer.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def _add_errors(app: FastAPI) -> None:
    """Every error is one line of JSON, without a trace of the code."""

    @app.exception_handler(StarletteHTTPException)
    async def refused(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(
            error_body(error.status_code, str(error.detail)), error.status_code, error.headers
        )

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return JSONResponse(error_body(400, f"{first['loc'][-1]}: {first['msg']}"), 400)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        log.error("a request has failed", exc_info=error)
        return JSONResponse(error_body(500, "the server failed on this request"), 500)


def _add_checks(app: FastAPI, worker: Worker, metrics: Metrics, info: Info) -> None:
    @app.get("/healthz", tags=["checks"], response_model=Health)
    async def health() -> JSONResponse:
        """Whether the process should live: 500 when the worker has ended by itself."""
        if worker.failure is not None:
            return JSONResponse({"status": "the worker has failed"}, 500)
        return JSONResponse({"status": "ok"})

    @app.get("/readyz", tags=["checks"], response_model=Health)
    async def ready() -> JSONResponse:
        """Whether streams can be begun: 503 while the model warms up and when the server stops."""
        if worker.ready.is_set() and worker.alive:
            return JSONResponse({"status": "ready"})
        status = "warming up" if worker.alive else "stopping"
        return JSONResponse({"status": status}, 503, {"retry-after": "1"})

    @app.get("/metrics", tags=["checks"], response_class=Response)
    async def figures() -> Response:
        """Figures for Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/info", tags=["live"], response_model=Info)
    async def describe() -> Info:
        """The model, its defaults and the limits."""
        return info


def _add_live(
    app: FastAPI,
    worker: Worker,
    limits: Limits,
    metrics: Metrics,
    defaults: Defaults,
    starts: StartStore,
) -> None:
    connections: Counter[str] = Counter()
    streams: Counter[str] = Counter()
    app.state.streams = streams

    @app.websocket("/v1/realtime/video")
    async def live(socket: WebSocket) -> None:
        address = socket.client.host if socket.client else "unknown"
        if connections[address] >= limits.connections_per_address:
            await socket.close(TRY_LATER, "too many connections of one address")
            return
        with counted(connections, address):
            offered = socket.scope.get("subprotocols", [])
            await socket.accept(SUBPROTOCOL if SUBPROTOCOL in offered else None)
            await Viewer(socket, worker, limits, metrics, defaults, streams, starts).run()


@contextmanager
def counted(counter: Counter[str], key: str) -> Iterator[None]:
    """Inside, the counter has one more of a key; a key of which there is none is not kept."""
    counter[key] += 1
    try:
        yield
    finally:
        counter[key] -= 1
        if not counter[key]:
            del counter[key]


def drain(app: FastAPI, timeout: float) -> None:
    """End all streams, and wait until their viewers have been told; from any thread."""
    app.state.worker.stop(timeout)
    patience_s = time.monotonic() + GOODBYE_S
    while app.state.streams and time.monotonic() < patience_s:
        time.sleep(0.02)


def _add_page(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html")

    app.mount("/page", StaticFiles(directory=PAGE), name="page")
