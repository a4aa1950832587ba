"""Low-rank adapters on frozen weights that several networks share: the student, the fake score and
the teacher.

LoRA, arXiv 2106.09685: a linear layer computes ``W x + alpha / r B A x``, W frozen, A and B
trained, B zero at first. ``adapt`` gives a network of the same class on the same weight tensors,
with adapters of its own (peft's). Modules are separate and only tensors are shared, so no role has
to be switched on for a call, and what activation checkpointing recomputes is what was computed,
whoever was called in between. The network that was adapted is left as it was.

What belongs to an adapted network is its adapter: ``parameters()`` and ``state_dict()`` hold
nothing else, nor do checkpoints and averages, and a deep copy has an adapter of its own on the same
weights. It is moved as a whole, and what shares its weights moves along. ``save_pretrained`` writes
an ordinary folder with the adapter merged in.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor, nn

from streamvid.files import atomic_folder
from streamvid.seeding import key_to_seed
from streamvid.weights import parse_json, read_tensors

Network = TypeVar("Network", bound=nn.Module)
ADAPTER = "default"  # a role has one adapter, and its own modules
PREFIX = "lora_"  # of the parameters of an adapter, in peft
MOST_RANK = 20_000
LORA_FILE = "pytorch_lora_weights.safetensors"  # as diffusers' pipelines look for it
# all linear ones of Wan's blocks
BLOCK_LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")


@dataclass
class LoraConfig:
    """Adapters of a network; rank 0 is none, and all of the network is trained."""

    rank: int = 0  # r; 16 to 256 for a few-step student
    alpha: float | None = None  # the adapter counts alpha / rank; null: the rank, so 1
    targets: tuple[str, ...] = BLOCK_LAYERS  # ends of the names of the linear layers that get one
    dtype: Literal["float32", "bf16"] = "float32"  # of the frozen weights; adapters are float32
    # an adapter to start from, such as runs/NAME/student/lora; null: one that changes nothing yet
    path: str | None = None

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"lora.rank={self.rank}, expected at least 1, or 0 for no adapter")
        if self.rank > MOST_RANK:
            raise ValueError(
                f"lora.rank={self.rank}, expected at most {MOST_RANK:,}; no layer here is so wide"
            )
        if not self.rank and (self.alpha, self.dtype, self.path) != (None, "float32", None):
            raise ValueError(
                "lora.alpha, lora.dtype and lora.path are of an adapter, but lora.rank=0 is none;"
                " set it"
            )
        if self.alpha is not None and self.alpha <= 0:
            raise ValueError(
                f"lora.alpha={self.alpha}, expected a positive number; null is the rank"
            )
        if not self.targets:
            raise ValueError(
                f"lora.targets is empty; name ends of layers, such as {', '.join(BLOCK_LAYERS)}"
            )


class AdapterOnly:
    """What makes a network own its adapter alone; see ``adapt``, which puts it before the network's
    class.
    """

    plain_class: type[nn.Module]

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """The call of Wan's transformers, with latents and text in the precision of the weights."""
        dtype = self.patch_embedding.weight.dtype
        if kwargs.get("cache") is None:  # which knows a text again by its tensor
            encoder_hidden_states = encoder_hidden_states.to(dtype)
        return super().forward(
            hidden_states.to(dtype), timestep, encoder_hidden_states, *args, **kwargs
        )

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The adapter's; ``parameters``, ``requires_grad_`` and ``zero_grad`` follow."""
        return (
            (name, p) for name, p in super().named_parameters(*args, **kwargs) if PREFIX in name
        )

    def state_dict(
        self,
        *,
        destination: dict[str, Any] | None = None,
        prefix: str = "",
        keep_vars: bool = False,
    ) -> dict[str, Any]:
        """The adapter's live tensors, also inside that of a module which this network is part
        of.
        """
        whole = super().state_dict(prefix=prefix, keep_vars=keep_vars)
        adapter = {name: tensor for name, tensor in whole.items() if PREFIX in name}
        if destination is None:
            return adapter
        destination.update(adapter)
        return destination

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Write the network with its adapter merged in, as an ordinary folder of its class."""
        merged(self).save_pretrained(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        return _copy_on(self, type(self), list(base_parameters(self).values()), memo)


def adapt(network: nn.Module, config: LoraConfig, *key: Any) -> nn.Module:
    """A network of the same class on the same weights, with a trainable adapter, which at first
    changes nothing.

    Args:
        network: any whose layers ``config.targets`` names; its weights are frozen, in place.
        config: with a rank of at least 1.
        key: of the first values of A.

    Raises:
        ValueError: if peft is not installed, a target names no linear layer, or ``config.path`` is
            an adapter of something else.
    """
    lora = _import_peft()
    if not hasattr(network, "patch_embedding"):
        raise ValueError(
            f"adapters here are of Wan transformers, but this one is a {type(network).__name__};"
            " train all of it (lora.rank=0, or fake_score.lora_rank=0)"
        )
    _check_targets(network, config.targets)
    network.requires_grad_(False)
    role = _copy_on(network, type(network), list(network.parameters()), {})
    alpha = config.rank if config.alpha is None else config.alpha
    options = lora.LoraConfig(r=config.rank, lora_alpha=alpha, target_modules=list(config.targets))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key_to_seed("lora", *key))
        lora.inject_adapter_in_model(options, role, ADAPTER)
    # peft lists the frozen weights too
    role = _copy_on(role, _adapted_class(type(network)), list(role.parameters()), {})
    for parameter in role.parameters():
        parameter.data = parameter.data.float()  # peft gives adapters the precision of the weights
        parameter.requires_grad_(True)
    if config.path is not None:
        load_adapter(role, config.path)
    return role


def is_adapted(network: nn.Module) -> bool:
    """Whether ``adapt`` made it."""
    return isinstance(network, AdapterOnly)


def base_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """The frozen weights of an adapted network, by their names in an ordinary one; all of an
    ordinary one's.
    """
    everything = nn.Module.named_parameters(network)
    return {name.replace(".base_layer.", "."): p for name, p in everything if PREFIX not in name}


def share_weights(network: nn.Module, source: nn.Module) -> None:
    """Let a frozen network use the frozen weights of another of the same names, in place of its
    own, which are freed.

    Raises:
        ValueError: if names, shapes, precision or values differ.
    """
    theirs = base_parameters(source)
    own = base_parameters(network)
    for name in sorted(own.keys() ^ theirs.keys()):
        raise ValueError(f"these networks cannot share weights: only one of them has {name}")
    for name, parameter in own.items():
        alike = parameter.dtype == theirs[name].dtype and parameter.shape == theirs[name].shape
        if not alike or not (parameter.is_meta or torch.equal(parameter, theirs[name])):
            raise ValueError(f"these networks cannot share weights: {name} differs")
    for name in own:
        holder, _, leaf = name.rpartition(".")
        setattr(network.get_submodule(holder), leaf, theirs[name])


@torch.no_grad()
def merged(network: nn.Module) -> nn.Module:
    """An ordinary network with the adapter added to its weights, in their precision; layers without
    one stay shared.
    """
    shared = [parameter for _, parameter in nn.Module.named_parameters(network)]
    plain = _copy_on(network, network.plain_class, shared, {})
    for name, layer in _adapted_layers(plain).items():
        linear = layer.get_base_layer()
        weight = linear.weight.float() + layer.get_delta_weight(ADAPTER).float()
        linear.weight = nn.Parameter(weight.to(linear.weight.dtype), requires_grad=False)
        plain.set_submodule(name, linear)
    del plain.peft_config
    return plain


# ---- adapters on disk ----------------------------------------------------------------------------


def save_adapter(network: nn.Module, folder: str | Path) -> None:
    """Write ``folder/pytorch_lora_weights.safetensors`` as ``load_lora_weights`` of diffusers' Wan
    pipelines takes it.
    """
    from diffusers.loaders import WanLoraLoaderMixin

    config = network.peft_config[ADAPTER]
    options = {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "target_modules": sorted(config.target_modules),
    }
    options["rank_pattern"] = {}  # no layer has another rank; diffusers before 0.40 asks for it
    tensors = {_file_name(name): p.detach().cpu() for name, p in network.named_parameters()}
    with atomic_folder(folder) as temporary:
        WanLoraLoaderMixin.save_lora_weights(
            temporary, transformer_lora_layers=tensors, transformer_lora_adapter_metadata=options
        )


@torch.no_grad()
def load_adapter(network: nn.Module, path: str | Path) -> None:
    """Put an adapter from a file, or the folder that ``save_adapter`` wrote it into, in place of
    the network's own.

    Raises:
        ValueError: if there is none, or it was made for another network, other layers or another
            rank.
    """
    file = Path(path) / LORA_FILE if Path(path).is_dir() else Path(path)
    tensors = {
        name.removeprefix("transformer."): tensor for name, tensor in read_tensors(file).items()
    }
    own = {_file_name(name): p for name, p in network.named_parameters()}
    _check_alpha(file, network.peft_config[ADAPTER].lora_alpha)
    for name in sorted(own.keys() ^ tensors.keys()):
        has = "lacks" if name in own else "has"
        raise ValueError(
            f"{file} is an adapter of another network, or of other layers than lora.targets: it"
            f" {has} {name}"
        )
    for name, parameter in own.items():
        if tensors[name].shape != parameter.shape:
            raise ValueError(
                f"{file} is an adapter of another network, or of another rank than"
                f" {network.peft_config[ADAPTER].r}: {name} has the shape"
                f" {list(tensors[name].shape)}, expected {list(parameter.shape)}"
            )
    for name, parameter in own.items():
        parameter.copy_(tensors[name])


# ---- parts ---------------------------------------------------------------------------------------


def _import_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ValueError(
            "adapters need peft; `pip install 'streamvid[lora]'`, or set lora.rank=0"
        ) from error
    return peft


@cache
def _adapted_class(cls: type[Network]) -> type[Network]:
    return type(f"Adapted{cls.__name__}", (AdapterOnly, cls), {"plain_class": cls})


def _copy_on(
    network: nn.Module, cls: type[Network], shared: list[Tensor], memo: dict[int, Any]
) -> Network:
    """A copy, as one of ``cls``, with modules of its own on the ``shared`` tensors."""
    twin = cls.__new__(cls)
    memo[id(network)] = twin
    memo.update({id(tensor): tensor for tensor in shared})
    twin.__setstate__(copy.deepcopy(network.__dict__, memo))
    return twin


def _adapted_layers(network: nn.Module) -> dict[str, nn.Module]:
    from peft.tuners.lora import LoraLayer

    return {
        name: module for name, module in network.named_modules() if isinstance(module, LoraLayer)
    }


def _check_targets(network: nn.Module, targets: tuple[str, ...]) -> None:
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            raise ValueError(
                f"lora.targets has {target}, which no linear layer of {type(network).__name__} ends"
                f" in; Wan's are {', '.join(BLOCK_LAYERS)}"
            )


def _file_name(name: str) -> str:
    """A parameter's name without that of the adapter, which files do not have."""
    return name.replace(f".{ADAPTER}.", ".")


def _check_alpha(file: Path, alpha: float) -> None:
    """Without it an adapter would count more or less than in training; files of other tools may not
    tell theirs.
    """
    header = {}
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as opened:
            header = parse_json((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
    saved = header.get("transformer.lora_alpha", alpha)
    if saved != alpha:
        raise ValueError(
            f"{file} was trained with alpha {saved:g}, not {alpha:g}; set lora.alpha={saved:g}"
        )
