"""Changes that wait for the chunk that they name, so that a script can be played live, exactly."""

from __future__ import annotations

import time

from streamvid.serving import protocol
from streamvid.serving.limits import Limits
from streamvid.serving.stream import Stream


def take_planned(stream: Stream) -> list[tuple[protocol.Message, float]]:
    """What takes effect with the next chunk, and the time of now, which is when it came.

    Bookmarks are first: they keep the moment before all changes.
    """
    chunk = stream.session.index
    due = [message for message in stream.planned if message.at == chunk]
    stream.planned = [message for message in stream.planned if message.at != chunk]
    due.sort(key=lambda message: not isinstance(message, protocol.SessionBookmark))
    return [(message, time.monotonic()) for message in due]


def plan(stream: Stream, message: protocol.Message, limits: Limits) -> bool:
    """Keep a message for the chunk that it names; False if it takes effect now.

    Raises:
        ValueError: if that chunk is made already, or too much waits.
    """
    if not isinstance(message, protocol.Planned) or message.at is None:
        return False
    chunk = stream.session.index
    if message.at < chunk:
        raise ValueError(
            f"at={message.at}, expected {chunk} or later: the chunks before it are made"
        )
    if message.at == chunk:
        return False
    if len(stream.planned) >= limits.commands:
        raise ValueError(
            f"{limits.commands} changes wait for their chunks already; send this one later"
        )
    stream.planned.append(message)
    return True
