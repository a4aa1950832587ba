"""The flow-matching fit: its minimum, its weights and masks, and where its gradient goes."""

import pytest
import torch

from streamvid.core.fitting import couple, flow_matching_loss, loss_weight
from streamvid.core.process import add_noise, eps_from_v, velocity, x0_from_v


def clips(count):
    return torch.randn(count, 2, 3, 4, 5, 5, dtype=torch.float64).unbind(0)


def test_zero_at_the_target_and_no_gradient_to_the_samples():
    v, x0, eps = (x.clone().requires_grad_() for x in clips(3))
    assert flow_matching_loss(velocity(x0, eps), x0, eps).item() == 0
    flow_matching_loss(v, x0, eps).backward()
    assert v.grad is not None and x0.grad is None and eps.grad is None
    torch.testing.assert_close(v.grad, 2 * (v - velocity(x0, eps)).detach() / v.numel())


def test_mask_and_weight_by_sample_and_frame():
    v, x0, eps = clips(3)
    frames = (v - velocity(x0, eps)).square().mean(dim=(1, 3, 4))  # [B, T]
    mask = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0]])
    torch.testing.assert_close(
        flow_matching_loss(v, x0, eps, mask=mask), frames[mask.bool()].mean()
    )
    full = mask[:, None, :, None, None].expand_as(v).bool()
    torch.testing.assert_close(
        flow_matching_loss(v, x0, eps, mask=full), frames[mask.bool()].mean()
    )
    weight = torch.rand(2, 4, dtype=torch.float64)
    torch.testing.assert_close(
        flow_matching_loss(v, x0, eps, weight=weight), (weight * frames).mean()
    )
    torch.testing.assert_close(
        flow_matching_loss(v, x0, eps, weight=weight[:, 0], mask=mask),
        (weight[:, :1] * frames)[mask.bool()].mean(),
    )


def test_the_best_linear_predictor_is_the_exact_score():
    """Fitted on samples of N(0, s^2), the slope of v in x_t is (t - (1 - t) s^2) / D."""
    s, t = 1.5, 0.4
    generator = torch.Generator().manual_seed(0)
    z, eps = torch.randn(2, 400_000, 1, 1, 1, generator=generator, dtype=torch.float64)
    x0 = s * z
    slope = torch.zeros((), dtype=torch.float64, requires_grad=True)
    x_t = add_noise(x0, eps, t)
    (gradient,) = torch.autograd.grad(flow_matching_loss(slope * x_t, x0, eps), slope)
    fitted = -gradient / (2 * x_t.square().mean())  # one Newton step of a quadratic
    exact = (t - (1 - t) * s**2) / ((1 - t) ** 2 * s**2 + t**2)
    torch.testing.assert_close(fitted, torch.tensor(exact, dtype=torch.float64), rtol=0, atol=5e-3)


def test_weights_turn_the_velocity_error_into_others():
    """Each published loss, written out in its own space, is the weighted error of the velocity."""
    generator = torch.Generator().manual_seed(0)
    x0, eps, v = torch.randn(3, 4, 2, 3, 3, generator=generator, dtype=torch.float64).unbind()
    t, sd = torch.tensor([0.1, 0.4, 0.7, 0.95], dtype=torch.float64), 0.5
    x_t, time = add_noise(x0, eps, t), t[:, None, None, None]
    sigma = time / (1 - time)
    x0_error = (x0_from_v(x_t, v, t) - x0).square()
    eps_error = (eps_from_v(x_t, v, t) - eps).square()
    # of the variance-preserving process at this t
    alpha2 = (1 - time) ** 2 / (time**2 + (1 - time) ** 2)
    expected = {
        "v": (v - velocity(x0, eps)).square(),
        "x0": x0_error,
        "eps": eps_error,
        "edm": (sigma**2 + sd**2) / (sigma * sd) ** 2 * x0_error,
        "dmd2_edm": (sigma**-2 + sd**-2) * x0_error,
        "swiftbrush": alpha2 * eps_error,
    }
    for kind, terms in expected.items():
        ours = flow_matching_loss(v, x0, eps, loss_weight(kind, t, sd))
        torch.testing.assert_close(ours, terms.mean(), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="kind='snr'"):
        loss_weight("snr", t)


def test_coupling_keeps_copies_and_refuses():
    a, b = [torch.ones(3)], [torch.full((3,), 5.0)]
    couple(a, b, keep=1.0)
    assert a[0].tolist() == [1.0] * 3
    couple(a, b, keep=0.75)
    assert a[0].tolist() == [2.0] * 3 and b[0].tolist() == [5.0] * 3
    couple(a, b, keep=0.0)
    assert torch.equal(a[0], b[0])
    with pytest.raises(ValueError, match="keep=1.5"):
        couple(a, b, keep=1.5)
    with pytest.raises(ValueError, match="2 tensors to follow for 1"):
        couple(a, b * 2, keep=0.5)
