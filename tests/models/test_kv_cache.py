"""Properties of the stream's memory. Legend: B batch, F frames, S tokens a frame, N heads, D head
size.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from streamvid.metering import Meter
from streamvid.models.kv_cache import StreamKVCache
from streamvid.models.rope import rotary_table, rotate

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
    """Frames whose values a pass sees besides its own, read from the tensors."""
    context = cache.context(num_frames)
    if not context:
        return []
    _, values, places = context[-1].room()
    shown = values[0, :, 0, 0, 0].int().tolist()
    return sorted(index for place, index in enumerate(shown) if place not in places.tolist())


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


@pytest.mark.parametrize("options", [{}, dict(window_frames=6, pass_frames=2)])
def test_what_is_committed_in_inference_mode_serves_passes_outside_of_it(options):
    """Tensors of inference_mode would break a backward pass, and could not be written to."""
    cache = make_cache(**options)
    with torch.inference_mode():
        cache.append(frames_of(0, 1))
        seen(cache, 2)
    with torch.no_grad():
        assert seen(cache, 2) == [0, 1]
        cache.append(frames_of(2, 3))
    assert not any(x.is_inference() for x in cache.state().values())


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
        cache.load_state({name: state[name] for name in ("0.key", "first_recent")}, 3)
    with pytest.raises(ValueError, match="stores 3 frames of 2"):
        cache.load_state(state, 2)
    with pytest.raises(ValueError, match="expected keys and values"):
        cut = {name: x[:, :, :1] if x.ndim == 5 else x for name, x in state.items()}
        cache.load_state(cut, 3)


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


# ---- the static cache ----------------------------------------------------------------------------

WINDOWS = [
    dict(window_frames=6),
    dict(window_frames=7, sink_frames=1),
    dict(window_frames=6, sink_frames=2, positions="window"),
    dict(window_frames=5, sink_frames=1, positions="window", max_trained_frames=8),
]


def random_frames(num_frames: int, seed: int) -> tuple[tuple[Tensor, Tensor], ...]:
    """Keys and values of random numbers."""
    generator = torch.Generator().manual_seed(seed)
    shape = (BATCH, num_frames, TOKENS, HEADS, HEAD_SIZE)
    draw = lambda: torch.randn(shape, generator=generator)
    return tuple((draw(), draw()) for _ in range(LAYERS))


def run_pass(cache: StreamKVCache, kv: tuple) -> list[tuple[Tensor, Tensor]]:
    """A pass whose frames have the raw keys and values ``kv``; what attention gets per layer."""
    turns = cache.turns(kv[0][0].shape[1])
    table, context = rotary_table(turns, cache.grid, HEAD_SIZE, kv[0][0].device), None
    context = cache.context(len(turns))
    if not context:
        shown = [(rotate(k, table), v) for k, v in kv]
    else:
        shown = []
        for layer, (k, v) in zip(context, kv, strict=True):
            keys, values, places = layer.room()
            keys.index_copy_(1, places, rotate(k, table)), values.index_copy_(1, places, v)
            shown.append((keys.clone(), values.clone()))
    if cache.static:
        cache.end_static_pass(() if context else kv)
    return shown


@pytest.mark.parametrize("chunk", [1, 2, 3])
@pytest.mark.parametrize("window", WINDOWS)
@torch.no_grad()
def test_a_static_cache_shows_the_same_numbers_in_the_same_order(window, chunk):
    """Against pieces, bit for bit, while the window fills, when it is full and long after."""
    caches = make_cache(**window), make_cache(**window, pass_frames=chunk)
    for step in range(12):
        for kv in (random_frames(chunk, 100 + step), random_frames(chunk, step)):
            shown = [run_pass(cache, kv) for cache in caches]
            for expected, came in zip(*shown, strict=True):
                assert all(map(torch.equal, expected, came))
        caches[0].append(kv)
        caches[1].append(())
        assert caches[0].frame_positions(chunk) == caches[1].frame_positions(chunk)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("window", WINDOWS)
@torch.no_grad()
def test_attention_sees_the_distances_of_the_positions(window, static):
    """Scores of keys and queries that all have the same content, against those of keys turned to
    ``frame_positions``: the sink of a long stream is where it was trained.
    """
    cache = make_cache(**window, pass_frames=2 if static else None)
    same = random_frames(1, 0)[0][0]
    kv = tuple((same.expand(-1, 2, -1, -1, -1).contiguous(),) * 2 for _ in range(LAYERS))
    for _ in range(15):
        context, own = cache.frame_positions(2)
        turned = lambda positions: rotate(
            same.expand(-1, len(positions), -1, -1, -1),
            rotary_table(positions, cache.grid, HEAD_SIZE, same.device),
        ).flatten(1, 2)
        scores = lambda q, k: torch.einsum("bqnd,bknd->bqk", q, k)
        expected = scores(turned(own), turned(context + own))
        keys = run_pass(cache, kv)[-1][0].flatten(1, 2)
        query = rotate(kv[0][0], rotary_table(cache.turns(2), cache.grid, HEAD_SIZE, same.device))
        # the order of places is not that of time
        came = scores(query.flatten(1, 2), keys).sort(dim=-1).values
        torch.testing.assert_close(came, expected.sort(dim=-1).values, atol=2e-5, rtol=0)
        cache.append(() if static else kv)


@torch.no_grad()
def test_a_static_pass_that_failed_may_be_run_again():
    """It has taken places of frames that no pass sees; nothing is committed by it."""
    caches = [make_cache(window_frames=5, sink_frames=1, pass_frames=2) for _ in range(2)]
    for step in range(6):
        kv = random_frames(2, step)
        if step in (0, 4):
            layer = next(iter(caches[1].context(2)), None)
            if layer is not None:
                keys, values, places = layer.room()
                keys.index_fill_(1, places, 7.0), values.index_fill_(1, places, 7.0)
            with pytest.raises(ValueError, match="no frames to commit"):
                caches[1].append(())
        shown = [run_pass(cache, kv) for cache in caches]
        assert all(torch.equal(x, y) for a, b in zip(*shown) for x, y in zip(a, b))
        for cache in caches:
            cache.append(())


@pytest.mark.parametrize("window", WINDOWS)
@torch.no_grad()
def test_copies_and_states_of_a_static_cache_go_on_by_themselves(window):
    """A clone and a restored state get the same passes, bit for bit, while the original goes
    elsewhere.
    """
    options = dict(**window, pass_frames=2)
    cache = make_cache(**options)
    for step in range(7):
        run_pass(cache, random_frames(2, step))
        cache.append(())
    twin, restored = cache.clone(), make_cache(**options)
    state = {name: x.clone() for name, x in cache.state().items()}
    restored.load_state(state, cache.num_committed_frames)
    for step in range(7, 9):
        run_pass(cache, random_frames(2, 100 + step))
        cache.append(())
    for step in range(7, 13):
        shown = [run_pass(each, random_frames(2, step)) for each in (twin, restored)]
        assert all(torch.equal(x, y) for a, b in zip(*shown) for x, y in zip(a, b))
        for each in (twin, restored):
            each.append(())


@pytest.mark.parametrize("keep", [0, 1])
@torch.no_grad()
def test_a_static_cache_is_rewound_as_another(keep):
    """Behind a gap, and after a sink that was turned on, both show the same."""
    options = dict(window_frames=6, sink_frames=1, positions="window")
    caches = make_cache(**options), make_cache(**options, pass_frames=2)
    steps = [*range(8), None, *range(6, 12)]
    for step in steps:
        if step is None:
            for cache in caches:
                cache.rewind(12 if keep else 0, keep)
            continue
        shown = [run_pass(cache, random_frames(2, step)) for cache in caches]
        assert all(torch.equal(x, y) for a, b in zip(*shown) for x, y in zip(a, b))
        caches[0].append(random_frames(2, step))
        caches[1].append(())


def test_what_a_static_cache_cannot_do_is_refused():
    cache = make_cache(window_frames=6, sink_frames=1, pass_frames=2)
    with pytest.raises(ValueError, match="for passes over 2 frames; this one is over 3"):
        cache.check_pass(1, 3, 4, 4)
    with pytest.raises(ValueError, match="torch.no_grad"):
        cache.context(2)
    with torch.no_grad(), pytest.raises(ValueError, match="one after the other"):
        cache.context(2, chunkwise=True)
    with pytest.raises(ValueError, match="needs window_frames"):
        make_cache(pass_frames=2)
    with pytest.raises(ValueError, match="expected 1 to 5"):
        make_cache(window_frames=6, sink_frames=1, pass_frames=6)


@pytest.mark.parametrize("positions, most", [("absolute", 1.0), ("window", 1.1)])
@torch.no_grad()
def test_a_static_cache_allocates_nothing_but_its_window(positions, most):
    """Bytes that are alive, against those of a window's keys and values: the buffers, once, and of
    "window" positions a copy of the sink's keys.
    """
    window, chunk = 12, 2
    cache = make_cache(window_frames=window, sink_frames=2, positions=positions, pass_frames=chunk)
    kv = random_frames(chunk, 0)
    whole = sum(x.nbytes for pair in kv for x in pair) * window // chunk
    addresses = set()
    for step in range(20):
        with Meter() as meter:
            context = cache.context(chunk)
            for layer, (k, v) in zip(context, kv):
                keys, values, places = layer.room()
                keys.index_copy_(1, places, k), values.index_copy_(1, places, v)
            cache.end_static_pass(() if context else kv)
            cache.append(())
        if step > window // chunk:
            # a chunk makes the sink, turned, layer by layer, and two indices
            assert meter.peak < 0.1 * whole
            addresses.add((keys.data_ptr(), values.data_ptr()))
    assert len(addresses) == 1
    assert whole <= cache.memory_bytes() <= most * whole


@torch.no_grad()
def test_pieces_take_what_is_stored_and_a_commit_makes_only_its_own_frames():
    """Steadily 1.0 of the window's keys and values, and while a chunk is committed its own
    besides. They were 1.8 and 4.2 when the window was joined and turned anew by each commit.
    """
    window, chunk = 12, 2
    cache = make_cache(window_frames=window, sink_frames=2, positions="window")
    kv = random_frames(chunk, 0)
    own = sum(x.nbytes for pair in kv for x in pair)
    for step in range(20):
        with Meter() as meter:
            cache.append(random_frames(chunk, step))
            cache.context(chunk)
        assert meter.peak <= 2.5 * own  # drawn, stored, the sink turned
    assert cache.memory_bytes() == own * window // chunk
