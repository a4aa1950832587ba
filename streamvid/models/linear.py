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
MIN_WEIGHTS = 2**16
"""Smaller layers stay: there the longer call costs more than the kernel saves."""

_packed_product = torch.ops.mkldnn._linear_pointwise.default


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
        self._packed_key: tuple[int, int] | None = None
        self._packed_of: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        if not _can_pack(input, weight):
            return F.linear(input, weight, bias)
        return _packed_product(input, self.packed(weight), bias, "none", [], "")

    def gelu(self, input: Tensor) -> Tensor:
        """The layer, then GELU in its tanh form."""
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        if not _can_pack(input, weight):
            return F.gelu(F.linear(input, weight, bias), approximate="tanh")
        return _packed_product(input, self.packed(weight), bias, "gelu", [], "tanh")

    def packed(self, weight: Tensor) -> Tensor:
        """The weight in oneDNN's layout, as it is now."""
        version = 0 if weight.is_inference() else weight._version
        key = (weight.data_ptr(), version)
        if self._packed is None or self._packed_key != key:
            with torch.no_grad():
                self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
            # the tensor is held, so that no other can come to its address unnoticed
            self._packed_key, self._packed_of = key, weight.detach()
        return self._packed

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

    Small layers stay, and those of other classes, such as those with adapters.

    Raises:
        ValueError: if this torch has no oneDNN.
    """
    if not torch.backends.mkldnn.is_available():
        raise ValueError("prepacked weights need a torch with oneDNN; use another engine option")
    for name, child in module.named_children():
        if type(child) is GELU and child.approximate == "tanh" and _pays(child.proj):
            setattr(module, name, PrepackedGELU(child.proj).train(child.training))
        elif _pays(child):
            setattr(module, name, PrepackedLinear(child))
        else:
            prepack(child)


def _pays(module: nn.Module) -> bool:
    return type(module) is nn.Linear and module.weight.numel() >= MIN_WEIGHTS


def _can_pack(x: Tensor, weight: Tensor) -> bool:
    """Whether the packed product takes these tensors; its result has no gradient."""
    if torch.compiler.is_compiling():  # which cannot read the layout
        return False
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return False
    fits = x.is_cpu and weight.is_cpu and x.dtype == weight.dtype
    return fits and weight.dtype in PACKED_DTYPES


def _copied(parameter: nn.Parameter, memo: dict[int, object]) -> nn.Parameter:
    return copy.deepcopy(parameter, memo)
