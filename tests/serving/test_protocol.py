"""Messages and frames."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamvid.serving import protocol

FEW = settings(max_examples=60, deadline=None)
u32 = st.integers(0, 2**32 - 1)


@FEW
@given(
    u32,
    u32,
    u32,
    u32,
    st.integers(0, 2**64 - 1),
    st.sampled_from(["jpeg", "webp"]),
    st.integers(0, 3),
    st.binary(max_size=50),
)
def test_a_frame_survives_the_way(sequence, chunk, prompt, us, captured, encoding, flags, picture):
    header = protocol.FrameHeader(sequence, chunk, prompt, us, captured, encoding, flags)
    message = protocol.pack_frame(header, picture)
    assert len(message) == 32 + len(picture)
    assert protocol.unpack_frame(message) == (header, picture)


def test_the_header_is_what_the_page_reads():
    """app.js reads the encoding at byte 5, the sequence at 8 and the prompt at 16."""
    header = protocol.FrameHeader(0x01020304, 7, 0x0A0B0C0D, 0, 0, "webp")
    message = protocol.pack_frame(header, b"")
    assert message[:4] == b"SVF1" and message[5] == 2
    assert message[8:12] == bytes([4, 3, 2, 1])
    assert message[16:20] == bytes([0x0D, 0x0C, 0x0B, 0x0A])


@pytest.mark.parametrize(
    "message", [b"", b"SVF1", b"JUNK" + bytes(40), b"SVF1\x09\x01" + bytes(40)]
)
def test_what_is_no_frame_is_refused(message):
    with pytest.raises(ValueError):
        protocol.unpack_frame(message)


@pytest.mark.parametrize("encoding", ["jpeg", "webp"])
def test_a_picture_looks_the_same_after_the_way(encoding):
    image = np.zeros((32, 48, 3), np.uint8)
    image[:, 16:, 0] = 220  # red would lose its edge in halved colour
    back = protocol.decode_picture(protocol.encode_picture(image, encoding, 95))
    assert back.shape == image.shape
    assert np.abs(back.astype(int) - image)[:, [4, 30, 44]].max() < 12


def test_fields_have_defaults_and_vllms_name_for_steps():
    start = protocol.parse_viewer_message(
        '{"type": "session.start", "prompt": " a ball ", "num_inference_steps": 2}'
    )
    assert (start.prompt, start.steps, start.seed, start.acks) == ("a ball", 2, 0, False)


@pytest.mark.parametrize(
    "fields, word",
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": "   "}, "prompt"),
        ({"prompt": "a\nb"}, "control characters"),
        ({"prompt": "a\x1b[2J"}, "control characters"),
        ({"prompt": 7}, "prompt"),
        ({"prompt": "a", "sed": 1}, "sed"),
        ({"prompt": "a", "seed": -1}, "seed"),
        ({"prompt": "a", "seed": 2**53}, "seed"),
        ({"prompt": "a", "seed": 1.5}, "seed"),
        ({"prompt": "a", "seed": True}, "seed"),
        ({"prompt": "a", "steps": 0}, "steps"),
        ({"prompt": "a", "fps": 0}, "fps"),
        ({"prompt": "a", "format": "png"}, "format"),
        ({"prompt": "a", "width": 10**6}, "width"),
    ],
)
def test_a_wrong_field_is_named(fields, word):
    with pytest.raises(ValueError, match=word) as error:
        protocol.parse_viewer_message(json.dumps({"type": "session.start", **fields}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "7",
        "{}",
        '{"type": 3}',
        '{"type": "video.start"}',
        '{"type": "ack"',
        '{"type": "session.start", "prompt": "\\ud800"}',
        '{"type": "session.start", "fps": NaN}',
    ],
)
def test_what_is_no_message_is_refused(text):
    with pytest.raises(ValueError):
        protocol.parse_viewer_message(text)


def test_an_error_does_not_repeat_what_was_sent():
    with pytest.raises(ValueError) as error:
        protocol.parse_viewer_message('{"type": "session.start", "prompt": "secret\\nmore"}')
    assert "secret" not in str(error.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3)
    ),
    max_leaves=6,
)
types = st.sampled_from(
    [
        "session.start",
        "session.prompt_update",
        "session.update",
        "ack",
        "session.branch",
        "nonsense",
    ]
)
names = st.sampled_from(["prompt", "seed", "steps", "fps", "mode", "sequence", "bookmark", "width"])


@FEW
@given(
    st.text(max_size=60)
    | st.builds(
        lambda kind, fields: json.dumps({"type": kind, **fields}),
        types,
        st.dictionaries(names, json_values, max_size=4),
    )
)
def test_any_text_gives_a_message_or_a_value_error(text):
    try:
        message = protocol.parse_viewer_message(text)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert protocol.parse_viewer_message(message.model_dump_json()) == message
