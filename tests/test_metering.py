"""A meter is exact where the answer is known."""

import pytest
import torch

from streamvid.metering import Meter, measure, peak_bytes

CPU = torch.device("cpu")
MEGA = 4 * 2**18  # bytes of 2^18 floats


def test_a_meter_counts_what_is_alive():
    before = torch.empty(2000, device="meta")
    with Meter() as meter:
        before.t()  # a view of what was there before
        a = torch.empty(1000, device="meta")
        b = a + 1
        c = a.view(10, 100)  # no storage of its own
        del b
        torch.empty(500, device="meta")
        assert meter.now == 4000 and meter.peak == 8000
        del a, c
        assert meter.now == 0


def test_peak_bytes_of_known_work():
    x = torch.zeros(2**18)

    def two_at_once():
        a = x + 1
        return a + 1

    def one_after_the_other():
        a = x + 1
        del a
        return x + 2

    assert peak_bytes(two_at_once, CPU) == 2 * MEGA
    assert peak_bytes(one_after_the_other, CPU) == MEGA
    assert peak_bytes(lambda: x.view(2, -1)[0], CPU) == 0  # a view is no new memory
    assert peak_bytes(lambda: x.add_(1), CPU) == 0


def test_peak_bytes_see_what_autograd_keeps():
    x = torch.zeros(2**18, requires_grad=True)
    assert peak_bytes(lambda: x.exp().exp().exp(), CPU) >= 3 * MEGA
    with torch.no_grad():
        assert peak_bytes(lambda: x.exp().exp().exp(), CPU) == 2 * MEGA


def test_measuring_needs_a_repeat():
    assert measure({"nothing": lambda: None}, CPU, 1)["nothing"].peak_bytes == 0
    with pytest.raises(ValueError, match="repeats=0"):
        measure({}, CPU, 0)
