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


def test_a_result_made_again_on_meta_is_as_the_first_one():
    """Of the same shapes and numbers; a view, and what writes into what it is given, stay so."""
    x, y = torch.empty(3, 4, device="meta"), torch.empty(3, 4, 2, device="meta")
    works = {
        "sum of integers": lambda: torch.add(x.long(), 1),
        "sum of floats": lambda: torch.add(x.long(), 1.0),
        "transposed": lambda: x.t() @ x,
        "strides": lambda: (y.permute(2, 0, 1) * 2).clone(),
        "half": lambda: x.to(torch.bfloat16),
        "columns": lambda: x.sum(0),
        "rows": lambda: x.sum(1),
        "normed": lambda: torch.nn.functional.layer_norm(x, (4,)),
    }
    for name, work in works.items():
        plain = work()
        for _ in range(2):
            with Meter():
                again = work()
            told = [(r.shape, r.stride(), r.dtype) for r in (plain, again)]
            assert told[0] == told[1], name
    for _ in range(2):
        with Meter() as meter:
            written = x.mul_(2)
            view = x[1:]
            assert written is x and view._is_view() and meter.now == 0
            kept = x + 1
            flat = kept.reshape(12)
            assert meter.now == 48
            del kept, flat


def test_measuring_needs_a_repeat():
    assert measure({"nothing": lambda: None}, CPU, 1)["nothing"].peak_bytes == 0
    with pytest.raises(ValueError, match="repeats=0"):
        measure({}, CPU, 0)
