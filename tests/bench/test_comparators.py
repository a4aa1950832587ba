"""What stands beside our stream computes the same where it should: so times can be compared."""

from dataclasses import replace

import pytest
import torch

from streamvid.bench.comparators import COMPARATORS, DiffusersFAR, Recompute, SelfForcingStyle
from tests.bench.tiny import case_of


def chunks(kind, case, count):
    stream = iter(kind(case.network, case.cond, case.config, case.latent_shape))
    return [next(stream) for _ in range(count)]


def ours(case, count):
    stream = case.stream()
    return [next(stream).latents for _ in range(count)]


def close(a, b):
    return all(torch.allclose(x, y, atol=2e-5, rtol=1e-4) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("kind", [SelfForcingStyle, Recompute])
def test_within_the_window_it_is_our_stream(kind):
    case = case_of(window=(12, 0))
    assert close(chunks(kind, case, 4), ours(case, 4))


@pytest.mark.parametrize("sink", [0, 3])
def test_rolling_buffers_are_our_window(sink):
    """Also when they have been moved several times, with and without a sink."""
    case = case_of(window=(9, sink))
    assert close(chunks(SelfForcingStyle, case, 7), ours(case, 7))


def test_without_a_cache_the_window_is_as_long_as_ours():
    """What it computes then differs: its context has forgotten what ours once saw."""
    case = case_of(window=(9, 3))
    stream = Recompute(case.network, case.cond, case.config, case.latent_shape)
    made = [chunk for _, chunk in zip(range(6), stream)]
    assert stream.context.shape[2] == 6
    first, last = made[0], made[5]
    assert torch.equal(stream.context[:, :, :3], first)
    assert torch.equal(stream.context[:, :, 3:], last)


def test_diffusers_streams_chunks_that_are_finite_and_change():
    a, b = chunks(DiffusersFAR, case_of(window=(21, 0)), 2)
    assert a.shape == b.shape == (1, 16, 3, 4, 8)
    assert a.isfinite().all() and not torch.equal(a, b)


@pytest.mark.parametrize("kind", COMPARATORS.values())
def test_the_consumer_keeps_its_grad_mode(kind):
    case = case_of(window=(9, 0), steps=1)
    for _, chunk in zip(range(2), kind(case.network, case.cond, case.config, case.latent_shape)):
        assert torch.is_grad_enabled() and not chunk.requires_grad


def test_a_comparison_needs_a_window():
    case = case_of()
    config = replace(case.config, window_frames=None, sink_frames=0)
    for kind in COMPARATORS.values():
        with pytest.raises(ValueError, match="needs a window"):
            kind(case.network, case.cond, config, case.latent_shape)
