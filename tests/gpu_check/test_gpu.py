"""What only a GPU can show, by the same functions as the check."""

import pytest
import torch

from streamvid.gpu_check.equality import CPU, StudentTurn, compared, tiny_clip
from streamvid.gpu_check.measure import psnr

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def turn():
    return StudentTurn()


@pytest.mark.parametrize("device", [CPU, pytest.param(CUDA, marks=GPU)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_under_autocast_is_that_of_float32(turn, device, checkpointing):
    """The steps before the exit run without gradient over the same weights; what they cast must not
    be used with one.
    """
    facts = compared(turn.on(device, 1, torch.bfloat16, checkpointing), turn.on(device, 1))
    assert facts["cosine"] > 0.9 and facts["norm_ratio"] == pytest.approx(1, abs=0.1)
    assert facts["finite"] and not facts["without_gradient"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gradient_is_the_cpus(turn):
    assert compared(turn.on(CUDA, 0), turn.on(CPU, 0))["cosine"] > 0.99


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_stream_is_the_cpus_and_the_same_again():
    clip = tiny_clip(CUDA)
    assert torch.equal(tiny_clip(CUDA), clip)
    assert psnr(clip, tiny_clip(CPU)) > 40
