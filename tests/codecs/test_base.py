"""The state of a decoder, taken apart for a file and put together again."""

import json

import pytest
import torch

from streamvid.codecs.base import flatten_state, rebuild_state


def test_a_state_comes_back_as_it_was():
    a, b = torch.zeros(2), torch.ones(3)
    state = (None, (a, "Rep", ()), 3, (b, True))
    layout, tensors = flatten_state(state)
    back = rebuild_state(json.loads(json.dumps(layout)), tensors)
    assert back[1][0] is a and back[3][0] is b
    assert (back[0], back[1][1:], back[2], back[3][1]) == (None, ("Rep", ()), 3, True)


def test_what_a_file_cannot_hold_is_refused():
    with pytest.raises(ValueError, match="holds a list"):
        flatten_state(([1],))
    with pytest.raises(ValueError, match="refers to"):
        rebuild_state([{"tensor": 1}], [torch.zeros(1)])
