"""Flow maps in the loop: they are told where each stepper lands, and an exact one lands exactly."""

from types import SimpleNamespace

import pytest
import torch

from streamvid.core.process import euler_step
from streamvid.rollout.loop import rollout
from streamvid.rollout.noise import KeyedNoise
from streamvid.rollout.schedule import autoregressive, move_tap, rolling, truncate

TIMES = (1.0, 0.75, 0.25)
FRAMES = 2


class ExactMap(torch.nn.Module):
    """The flow map of the flow dx/dt = x, whose velocity is x: x_s = x_t exp(s - t). Its context is
    a list, which it does not read.
    """

    takes_target = True

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(1.0))
        self.told = []  # the target of each forward, per sample; None for none

    def forward(
        self,
        hidden_states,
        timestep,
        cond,
        cache=None,
        target_timestep=None,
        return_kv=False,
    ):
        self.told.append(None if target_timestep is None else target_timestep.tolist())
        span = (timestep - (timestep if target_timestep is None else target_timestep)) / 1000
        # (1 - exp(-span)) / span, which is 1 at 0
        rate = torch.where(span == 0, 1.0, -torch.expm1(-span) / span.clamp(min=1e-9))
        rate = rate.reshape(*rate.shape, *[1] * (2 - rate.ndim))[:, None, :, None, None]
        sample = self.weight * hidden_states * rate
        return SimpleNamespace(sample=sample, kv=hidden_states if return_kv else None)

    def new_cache(self, batch_size, height, width):
        return []

    def commit(self, latents, timestep, cond, cache):
        cache.append(self(latents, timestep, cond, cache=cache, return_kv=True).kv)


def run(student, cond, schedule, **options):
    noise = KeyedNoise([3, 4])
    options = {"latent_shape": (3, 4, 4), "chunk_frames": FRAMES, **options}
    return list(
        rollout(student, cond, schedule, noise, cache=student.new_cache(2, 4, 4), **options)
    )


def begun(cond, chunk):
    return KeyedNoise([3, 4]).draw(chunk, 0, (3, FRAMES, 4, 4), cond.device, torch.float32)


@pytest.mark.parametrize("schedule", [autoregressive, rolling])
@pytest.mark.parametrize("times", [TIMES, (1.0,), (1.0, 0.001)])
def test_an_exact_map_lands_exactly(cond, schedule, times):
    """Whatever the steps, jumps end at exp(-1) of the noise; a sign or a target that is wrong does
    not, and nor do Euler steps.
    """
    for result in run(ExactMap(), cond, schedule(times, 3), stepper="jump"):
        end = begun(cond, result.index) * torch.exp(torch.tensor(-1.0))
        torch.testing.assert_close(result.latents, end, atol=1e-5, rtol=1e-5)
    (result,) = run(ExactMap(), cond, autoregressive(times, 1), stepper="euler")
    assert (result.latents / begun(cond, 0) - torch.exp(torch.tensor(-1.0))).abs().min() > 0.05


def test_euler_steps_follow_the_velocity(cond):
    (result,) = run(ExactMap(), cond, autoregressive(TIMES, 1), stepper="euler")
    x = begun(cond, 0)
    for t, s in zip(TIMES, (*TIMES[1:], 0.0), strict=True):
        x = euler_step(x, x, t, s)
    torch.testing.assert_close(result.latents, x, atol=1e-5, rtol=1e-5)


TARGETS = {"jump": [750.0, 250.0, 0.0], "renoise": [0.0] * 3, "euler": [1000.0, 750.0, 250.0]}


@pytest.mark.parametrize("stepper", TARGETS)
@pytest.mark.parametrize("commit", ["clean", "reuse"])
def test_a_map_is_told_where_the_stepper_lands(cond, stepper, commit):
    """And nothing when it writes context."""
    student = ExactMap()
    run(student, cond, autoregressive(TIMES, 2), stepper=stepper, commit=commit)
    denoised = [[target] * 2 for target in TARGETS[stepper]]
    assert student.told == denoised + ([None] if commit == "clean" else []) + denoised


def test_chunks_of_one_forward_have_targets_of_their_own(cond):
    student = ExactMap()
    run(student, cond, rolling((1.0, 0.5), 2), stepper="jump")
    assert [told[0] for told in student.told if told] == [500.0, [0.0, 0.0, 500.0, 500.0], 0.0]


def test_an_early_exit_jumps_to_data(cond):
    """A truncated chunk ends where its last jump is told to; a moved tap keeps its stepper's
    target, so its prediction is x_t - t u and no data.
    """
    student = ExactMap()
    run(student, cond, truncate(autoregressive(TIMES, 1), 1), stepper="jump")
    assert student.told == [[750.0] * 2, [0.0] * 2]
    (result,) = run(student, cond, move_tap(autoregressive(TIMES, 1), 0), stepper="jump")
    assert result.t == 1.0 and result.prediction.requires_grad
    x_next = euler_step(begun(cond, 0), begun(cond, 0) - result.prediction.detach(), 1.0, 0.75)
    expected = begun(cond, 0) * torch.exp(torch.tensor(-0.25))
    torch.testing.assert_close(x_next, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("commit", ["clean", "reuse"])
def test_a_student_that_is_not_told_takes_euler_steps(student, cond, commit):
    """Bit for bit, and it is called as before: its signature has no target."""
    jumped, stepped = (
        run(student, cond, autoregressive(TIMES, 2), stepper=stepper, commit=commit)
        for stepper in ("jump", "euler")
    )
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(jumped, stepped, strict=True))
