"""Networks divided among the processes, so that each holds 1/N of every weight, gradient, moment
and average.

ZeRO-3 (arXiv 1910.02054) as torch's ``fully_shard`` does it (FSDP2): a block's weights are gathered
when it is called and given up after it, and gradients are averaged and divided in the backward
pass, in float32. One call serves all roles, trained or frozen. What a network returns, and so what
a method computes, is the same.

Outside a call a sharded network's parameters are ``DTensor``s: what stands in a file or goes to
people is gathered first (``gather_tensors``, ``whole_network``), what comes from a file is cut
(``cut_like``).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from streamvid.models.lora import is_adapted


def find_networks(method: Any) -> dict[str, nn.Module]:
    """Those that are trained, then all others that a method holds, such as a teacher's and a
    reference; each once.
    """
    networks = dict(method.networks())
    for name, part in vars(method).items():
        if isinstance(part, nn.Module):
            found: dict[str, Any] = {name: part}
        else:
            found = {
                name: getattr(part, "transformer", None),
                f"{name}, expert 2": getattr(part, "transformer_2", None),
            }
        for key, network in found.items():
            known = any(network is other for other in networks.values())
            if isinstance(network, nn.Module) and not known:
                networks[key] = network
    return networks


def check_shardable(
    method: Any, kinds: Mapping[str, str], mixed_precision: str, compiled: bool
) -> None:
    """Refuse what can't be divided, whatever the number of processes.

    Args:
        kinds: of the optimisers, by network.

    Raises:
        ValueError: one line.
    """
    for name, kind in kinds.items():
        if kind != "adamw":
            raise ValueError(
                f"shard=full divides parameters, which optimizers.{name}.kind={kind} needs whole;"
                " set adamw"
            )
    if mixed_precision == "fp16":
        raise ValueError(
            "shard=full does not scale gradients, which mixed_precision=fp16 needs; set bf16"
        )
    if compiled:
        raise ValueError(
            "shard=full gathers weights inside what compile=true would compile; set one of them off"
        )
    if getattr(getattr(method, "teacher", None), "offload", False):
        raise ValueError(
            "shard=full divides both experts of the teacher and puts none away; set"
            " teacher.offload=false"
        )
    owners: dict[int, str] = {}
    for name, network in find_networks(method).items():
        if is_adapted(network):
            what = f"the adapters of {name} do; set lora.rank=0"
            raise ValueError(f"shard=full can't divide weights that networks share, as {what}")
        for _, parameter in nn.Module.named_parameters(network):
            other = owners.setdefault(id(parameter), name)
            if other != name:
                raise ValueError(
                    f"shard=full can't divide weights that networks share, as {other} and {name} do"
                )


def shard_networks(networks: Iterable[nn.Module], device: torch.device) -> None:
    """Divide networks among all processes, in place, with the values of process 0.

    A network is brought to the device a block at a time, so that none has to fit on it as a whole.
    Blocks are the classes that a diffusers model names in ``_no_split_modules``; the rest is
    gathered with the call of the whole.

    The outermost part is given up after its call too, or it would not notice ``requires_grad_``,
    which the trainer calls before each turn: FSDP2 takes that over when it gathers.

    Args:
        device: of this process; the networks may still be on the CPU.
    """
    # nobody writes into it
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for network in networks:
        for part in (*_blocks(network), network):
            _place(part, device)
            fully_shard(part, mesh=mesh, reshard_after_forward=True)


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    return isinstance(tensor, DTensor)


def whole_tensor(tensor: Tensor) -> Tensor:
    """A sharded tensor, whole, on every device; another as it is. All processes must call it."""
    return tensor.full_tensor().detach() if is_sharded(tensor) else tensor


def gather_tensors(tensors: dict[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    """Whole tensors on the CPU in place of sharded ones; the others as they are. All processes must
    call it.

    Args:
        keep: False takes part and returns nothing, for processes that do not write.
    """
    whole = {}
    for name, tensor in tensors.items():
        full = whole_tensor(tensor)
        if keep:
            whole[name] = full.cpu() if is_sharded(tensor) else full
    return whole


def cut_like(whole: Tensor, live: Tensor) -> Tensor:
    """This process's part of a whole tensor, as a sharded tensor like ``live``; as it is, if
    ``live`` is not sharded.
    """
    if not isinstance(live, DTensor):
        return whole
    whole = whole.to(live.device, live.dtype)
    # all have read the same file
    return distribute_tensor(whole, live.device_mesh, live.placements, src_data_rank=None)


def whole_network(network: nn.Module, keep: bool = True) -> nn.Module | None:
    """An ordinary copy of a sharded diffusers model, on the CPU, for ``save_pretrained``; an
    ordinary network as it is.

    All processes must call it; those with ``keep=False`` get None.
    """
    if not isinstance(network, FSDPModule):
        return network
    tensors = gather_tensors(network.state_dict(), keep)
    if not keep:
        return None
    with torch.device("meta"):
        copy = plain_class(network).from_config(network.config)
    copy.load_state_dict(tensors, assign=True)
    return copy


def plain_class(network: nn.Module) -> type[Any]:
    """The class that a network had before it was sharded."""
    return next(cls for cls in type(network).__mro__ if not issubclass(cls, FSDPModule))


def _blocks(network: nn.Module) -> list[nn.Module]:
    names = {
        name
        for module in network.modules()
        for name in getattr(module, "_no_split_modules", None) or ()
    }
    return [module for module in network.modules() if type(module).__name__ in names]


@torch.no_grad()
def _place(part: nn.Module, device: torch.device) -> None:
    """Bring what is not sharded yet to the device, with the values of process 0."""
    for tensor in (*part.parameters(), *part.buffers()):
        if not is_sharded(tensor):
            tensor.data = tensor.data.to(device).contiguous()
            dist.broadcast(tensor.data, src=0)
