"""Linear layers whose weights are laid out once for oneDNN, for inference on a CPU.

torch's float32 product goes to MKL, which takes its AVX2 path on CPUs of other makers; oneDNN's
kernel uses AVX-512 there, at the same accuracy (1e-6). Laid out beforehand, the weights are not
copied at each call either, and the GELU behind a layer is computed within it.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from diffusers.models.activations import GELU
from torch import Tensor, nn

PACKED_DTYPES = (torch.float32, torch.bfloat16)


class PrepackedLinear(nn.Linear):
    """A linear layer with the parameters of another one, and a copy of its weight in oneDNN's
    layout.

    The copy is made at the first call and again whenever the weight has changed. Where it is of no
    use (with a gradient, on another device, in another precision) the layer is as it was.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight = linear.weight
        self.bias = linear.bias
        self.train(linear.training)
        self._packed: Tensor | None = None
        self._packed_key: tuple[int, int, torch.dtype] | None = None

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        if not self._can_pack(input):
            return super().forward(input)
        return _packed_product(input, self.packed(), self.bias, "none", "")

    def gelu(self, input: Tensor) -> Tensor:
        """The layer, then GELU in its tanh form."""
        if not self._can_pack(input):
            return F.gelu(super().forward(input), approximate="tanh")
        return _packed_product(input, self.packed(), self.bias, "gelu", "tanh")

    def packed(self) -> Tensor:
        """The weight in oneDNN's layout, as it is now."""
        weight = self.weight
        version = 0 if weight.is_inference() else weight._version
        key = (weight.data_ptr(), version, weight.dtype)
        if self._packed is None or self._packed_key != key:
            with torch.no_grad():
                self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
            self._packed_key = key
        return self._packed

    def _can_pack(self, input: Tensor) -> bool:
        weight = self.weight
        learns = torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad)
        return (
            not learns
            and input.is_cpu
            and weight.is_cpu
            and input.dtype == weight.dtype
            and weight.dtype in PACKED_DTYPES
        )

    def __deepcopy__(self, memo: dict[int, object]) -> PrepackedLinear:
        """A copy without the packed weight, which cannot be copied."""
        twin = nn.Linear(self.in_features, self.out_features, device="meta")
        twin.weight = _copied(self.weight, memo)
        twin.bias = None if self.bias is None else _copied(self.bias, memo)
        return PrepackedLinear(twin.train(self.training))


class PrepackedGELU(nn.Module):
    """diffusers' ``GELU``, a linear layer and a GELU, as one operator."""

    def __init__(self, proj: nn.Linear) -> None:
        super().__init__()
        self.proj = PrepackedLinear(proj)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.proj.gelu(hidden_states)


def prepack(module: nn.Module) -> None:
    """Replace the linear layers in a module by prepacked ones, with the same parameters and names.

    Layers of other classes, such as those with adapters, stay.

    Raises:
        ValueError: if this torch has no oneDNN.
    """
    if not torch.backends.mkldnn.is_available():
        raise ValueError("prepacked weights need a torch with oneDNN; use another engine option")
    for name, child in module.named_children():
        if type(child) is GELU and child.approximate == "tanh" and type(child.proj) is nn.Linear:
            setattr(module, name, PrepackedGELU(child.proj).train(child.training))
        elif type(child) is nn.Linear:
            setattr(module, name, PrepackedLinear(child))
        else:
            prepack(child)


def _packed_product(x: Tensor, packed: Tensor, bias: Tensor | None, *activation: str) -> Tensor:
    name, algorithm = activation
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, name, [], algorithm)


def _copied(parameter: nn.Parameter, memo: dict[int, object]) -> nn.Parameter:
    return copy.deepcopy(parameter, memo)
