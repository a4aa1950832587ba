"""Playing scripts: the stream that a script describes, made again bit for bit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from torch import Tensor

from streamvid.students.contexts import digest_frames
from streamvid.students.folder import Student
from streamvid.students.script import Script
from streamvid.students.session import Session, SessionChunk


def play_script(
    student: Student,
    script: Script,
    num_chunks: int | None = None,
    start: Tensor | None = None,
) -> Iterator[SessionChunk]:
    """The chunks of a script's stream, bit for bit, as they are made.

    Args:
        num_chunks: chunks of the stream, counted as the script counts them; None is as many as the
            script says, or an endless stream.
        start: the frames that the stream began from, if the script says that there were any.

    Raises:
        ValueError: one line, if the student can't be streamed so, ``start`` is not what the script
            began from, or a change lies in it.
    """
    digest = None if start is None else digest_frames(start)
    if digest != script.start:
        raise ValueError(
            f"the script began from frames {script.start}, start is {digest}; pass the same frames"
        )
    session = Session(
        student,
        script.prompt,
        seed=script.seed,
        height=script.height,
        width=script.width,
        steps=script.steps,
        start=start,
    )
    if script.changes and script.changes[0].at < session.index:
        raise ValueError(
            f"a change at chunk {script.changes[0].at}, but start has the first {session.index}"
            " chunks; change later ones"
        )
    num_chunks = script.num_chunks if num_chunks is None else num_chunks
    return _played(session, script, num_chunks)


def _played(session: Session, script: Script, num_chunks: int | None) -> Iterator[SessionChunk]:
    changes = {change.at: change for change in script.changes}
    with session:
        indices = itertools.count(session.index)
        for index in itertools.takewhile(lambda i: num_chunks is None or i < num_chunks, indices):
            if index in changes:
                session.steer(changes[index])
            yield session.next_chunk()
