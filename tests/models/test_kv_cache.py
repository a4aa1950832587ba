"""Properties of the stream's memory. Legend: B batch, F frames, S tokens a frame, N heads, D head
size.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from streamvid.models.kv_cache import StreamKVCache

LAYERS, BATCH, TOKENS, HEADS, HEAD_SIZE = 2, 1, 4, 1, 12


def make_cache(**options) -> StreamKVCache:
    """Two layers, one stream, four tokens a frame."""
    return StreamKVCache(LAYERS, BATCH, height=4, width=4, patch_size=(2, 2), **options)


def frames_of(*indices: int) -> tuple[tuple[Tensor, Tensor], ...]:
    """Keys and values of frames, each filled with its index in the stream."""
    values = torch.tensor(indices, dtype=torch.float32).view(1, -1, 1, 1, 1)
    x = values.expand(BATCH, -1, TOKENS, HEADS, HEAD_SIZE).contiguous()
    return tuple((x.clone(), x.clone()) for _ in range(LAYERS))


def seen(cache: StreamKVCache, num_frames: int) -> list[int]:
    """Frames whose values a pass sees, read from the tensors."""
    context = cache.context(num_frames)
    return context[-1][1][0, ::TOKENS, 0, 0].int().tolist() if context else []


@pytest.mark.parametrize("chunk", [1, 2, 3, 5])
@pytest.mark.parametrize("window, sink", [(None, 0), (6, 0), (6, 1), (7, 2)])
def test_a_pass_sees_the_sink_and_the_most_recent_frames(chunk, window, sink):
    """The window counts the chunk; what the tensors hold is what ``visible_frames`` says, at every
    chunk.
    """
    cache = make_cache(window_frames=window, sink_frames=sink)
    for start in range(0, 8 * chunk, chunk):
        everything = list(range(start))
        fits = window is None or start + chunk <= window
        expected = (
            everything
            if fits
            else everything[:sink] + everything[start - (window - sink - chunk) :]
        )
        assert seen(cache, chunk) == list(cache.visible_frames(chunk)) == expected
        cache.append(frames_of(*range(start, start + chunk)))
        assert cache.num_committed_frames == start + chunk
        assert cache.num_frames == start + chunk if window is None else cache.num_frames <= window


def test_chunks_of_different_sizes_share_a_window():
    """A short chunk after long ones sees more context: nothing was dropped too early."""
    cache = make_cache(window_frames=6, sink_frames=1)
    cache.append(frames_of(*range(9)))
    assert seen(cache, 4) == [0, 8]
    assert seen(cache, 1) == [0, 5, 6, 7, 8]


def test_window_positions_are_absolute_within_the_trained_length():
    """Until the stream is as long as the training clips, both policies agree."""
    options = dict(window_frames=6, sink_frames=1, max_trained_frames=12)
    caches = [make_cache(**options, positions=policy) for policy in ("absolute", "window")]
    for start in range(0, 12, 3):
        assert caches[0].frame_positions(3) == caches[1].frame_positions(3)
        for cache in caches:
            cache.append(frames_of(*range(start, start + 3)))


@pytest.mark.parametrize("max_trained", [6, 12])
def test_window_positions_of_a_long_stream(max_trained):
    """Recent distances are true, the sink is as far as was ever trained, nothing leaves the trained
    range.
    """
    cache = make_cache(
        window_frames=6, sink_frames=1, positions="window", max_trained_frames=max_trained
    )
    cache.append(frames_of(*range(300)))
    context, chunk = cache.frame_positions(3)
    assert (*context[1:], *chunk) == tuple(range(max_trained - 5, max_trained))
    assert context[0] == 0


def test_clone_and_original_go_on_separately():
    """A clone shares tensors, not the stream."""
    cache = make_cache(window_frames=6)
    cache.append(frames_of(0, 1))
    clone = cache.clone()
    clone.append(frames_of(7))
    assert (seen(cache, 1), seen(clone, 1)) == ([0, 1], [0, 1, 7])


def test_reset_forgets_everything():
    """After ``reset`` a cache is as new: no frames, no text, no bytes."""
    cache = make_cache()
    cache.append(frames_of(0, 1))
    cache.keep_text(torch.zeros(1), frames_of(0))
    cache.reset()
    assert (cache.num_frames, cache.num_committed_frames, cache.memory_bytes(), seen(cache, 1)) == (
        0,
        0,
        0,
        [],
    )


def test_text_is_found_by_identity():
    """Another prompt, an equal copy of it, or a prompt written to in place is not the kept
    prompt.
    """
    cache, prompt = make_cache(), torch.zeros(1, 2, 3)
    cache.keep_text(prompt, frames_of(0))
    assert cache.text_kv(prompt)
    assert not cache.text_kv(prompt.clone())
    prompt.add_(1)
    assert not cache.text_kv(prompt)


def test_context_made_in_inference_mode_serves_training():
    """The turned context is kept between passes; one made under inference_mode would break a
    backward pass.
    """
    cache = make_cache()
    cache.append(frames_of(0))
    with torch.inference_mode():
        cache.context(1)
    assert not any(x.is_inference() for pair in cache.context(1) for x in pair)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(positions="relative"), "positions='relative'"),
        (dict(sink_frames=-1), "negative"),
        (dict(sink_frames=1), "needs a window"),
        (dict(positions="window"), "needs window_frames"),
        (dict(window_frames=3, sink_frames=3), "no room beside"),
        (
            dict(window_frames=9, positions="window", max_trained_frames=6),
            "more than the model was trained on",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    """A wrong cache fails where it is made."""
    with pytest.raises(ValueError, match=message):
        make_cache(**options)


def test_passes_and_commits_that_do_not_fit_are_refused():
    """Batch, size, window, trained length and layers are checked, with the numbers in the
    message.
    """
    cache = make_cache(window_frames=4, sink_frames=2, max_trained_frames=5)
    cases = [
        ((2, 1, 4, 4), "holds 1 streams"),
        ((1, 1, 4, 6), "4 x 4"),
        ((1, 3, 4, 4), "use at least 5"),
    ]
    for sizes, message in cases:
        with pytest.raises(ValueError, match=message):
            cache.check_pass(*sizes)
    with pytest.raises(ValueError, match="layers"):
        cache.append(frames_of(0)[:1])
    with pytest.raises(ValueError, match="expected keys and values"):
        cache.append(tuple((k[:, :, 1:], v) for k, v in frames_of(0)))
    cache.append(frames_of(*range(4)))
    with pytest.raises(ValueError, match="positions='window'"):
        cache.check_pass(1, 2, 4, 4)
    with pytest.raises(ValueError, match="multiple of the patch"):
        StreamKVCache(1, 1, height=5, width=4, patch_size=(2, 2))


def test_a_state_goes_on_where_it_was():
    """Stored frames, their number in the stream and what later passes see are the same."""
    cache = make_cache(window_frames=6, sink_frames=1)
    for start in range(0, 12, 3):
        cache.append(frames_of(*range(start, start + 3)))
    other = make_cache(window_frames=6, sink_frames=1)
    other.load_state(cache.state(), cache.num_committed_frames)
    for each in (cache, other):
        each.append(frames_of(12, 13))
    assert seen(cache, 2) == seen(other, 2) == [0, 11, 12, 13]
    assert other.frame_positions(2) == cache.frame_positions(2)
    empty = make_cache(window_frames=6)
    other.load_state(empty.state(), 0)
    assert other.num_frames == 0


def test_a_state_of_another_cache_is_refused():
    cache = make_cache(window_frames=6, sink_frames=1)
    cache.append(frames_of(0, 1, 2))
    state = cache.state()
    with pytest.raises(ValueError, match="layers"):
        cache.load_state({"0.key": state["0.key"]}, 3)
    with pytest.raises(ValueError, match="stores 3 frames of 2"):
        cache.load_state(state, 2)
    with pytest.raises(ValueError, match="expected keys and values"):
        cache.load_state({name: x[:, :, :1] for name, x in state.items()}, 3)


def test_frames_are_committed_again_at_their_places():
    """Behind the sink may be a gap, which no pass sees; the rest of the window fills up again."""
    cache = make_cache(window_frames=6, sink_frames=1, positions="window", max_trained_frames=9)
    cache.append(frames_of(*range(12)))
    before = cache.clone()
    assert seen(cache, 2) == [0, 9, 10, 11]
    cache.rewind(8, 1)
    assert cache.stored_frames() == (0,) and seen(cache, 2) == [0]
    assert cache.frame_positions(2) == ((0,), (7, 8))  # frame 10 would be the last one
    cache.append(frames_of(8, 9))
    assert seen(cache, 2) == list(cache.visible_frames(2)) == [0, 8, 9]
    cache.append(frames_of(10, 11))
    assert cache.stored_frames() == (0, 8, 9, 10, 11)
    assert seen(cache, 2) == seen(before, 2) == [0, 9, 10, 11]
    assert cache.frame_positions(2) == before.frame_positions(2)


def test_a_gap_is_behind_the_sink_only():
    cache = make_cache(window_frames=6, sink_frames=1)
    cache.append(frames_of(*range(4)))
    with pytest.raises(ValueError, match="behind the sink"):
        cache.rewind(3, 2)
    with pytest.raises(ValueError, match="at most the 4 stored"):
        cache.rewind(9, 5)
    cache.rewind(2, 2)
    assert cache.stored_frames() == (0, 1)
    cache.rewind(0)
    assert cache.num_frames == 0 and cache.num_committed_frames == 0
