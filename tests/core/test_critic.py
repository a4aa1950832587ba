"""The flow-matching fit: its minimum, its weights and masks, and where its gradient goes."""

import torch

from streamvid.core.critic import flow_matching_loss
from streamvid.core.process import add_noise, velocity


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
    torch.testing.assert_close(flow_matching_loss(v, x0, eps, mask=mask), frames[mask.bool()].mean())
    full = mask[:, None, :, None, None].expand_as(v).bool()
    torch.testing.assert_close(flow_matching_loss(v, x0, eps, mask=full), frames[mask.bool()].mean())
    weight = torch.rand(2, 4, dtype=torch.float64)
    torch.testing.assert_close(flow_matching_loss(v, x0, eps, weight=weight), (weight * frames).mean())
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
