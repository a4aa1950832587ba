"""Clips as latents on disk: encoded once with the student's own codec, captioned, embedded, then
only read.

A latent set is one safetensors file: ``latents [N, C, T, h, w]`` (float16), ``embeddings [N, P, L,
D]`` (float16; P paraphrases a clip), and in the file's metadata the captions and the settings,
which say what the set was made of. While a set is made its parts lie in a hidden folder beside it,
and any number of processes may make them together. ``LatentClips`` serves batches that are a pure
function of (seed, step, turn, micro-batch, sample index).
"""

from __future__ import annotations

import glob
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from streamvid.data.parts import WAIT_S, claimed, make_all_parts
from streamvid.data.world import SIZE, caption, render, sample_spec
from streamvid.files import atomic_file
from streamvid.seeding import key_to_seed, keyed_generator
from streamvid.weights import parse_json

log = logging.getLogger(__name__)

PIXELS_AT_ONCE = 2**22  # of all frames of the clips that are encoded together
Clip = tuple[Tensor, list[str]]  # frames [T, 3, H, W] in [0, 1], and captions


@dataclass
class WorldSet:
    """Which clips of the verifiable world a latent set holds."""

    num_clips: int = 12000
    """Clips in the set."""
    num_frames: int = 33
    """Pixel frames per clip, 1 + 4k."""
    paraphrases: int = 2
    """Captions a clip."""
    first_seed: int = 0
    """Seed of the first scene; scene i has seed first_seed + i."""
    held_out: bool = False
    """Take combinations of attributes that training never sees."""


class WorldClips(Sequence):
    """Frames ``[T, 3, 64, 64]`` and captions of each scene of a set, rendered when they are asked
    for.
    """

    def __init__(self, config: WorldSet):
        self.config = config

    def __len__(self) -> int:
        return self.config.num_clips

    def __getitem__(self, index: int) -> Clip:
        if not 0 <= index < len(self):
            raise IndexError(index)
        config, seed = self.config, self.config.first_seed + index
        spec = sample_spec(seed, held_out=config.held_out)
        captions = [
            caption(spec, key_to_seed("paraphrase", seed, k)) for k in range(config.paraphrases)
        ]
        return render(spec, config.num_frames), captions

    @property
    def at_once(self) -> int:
        """Clips to encode together."""
        return clips_at_once(self.config.num_frames, SIZE, SIZE)


def world_clips(config: WorldSet) -> Iterator[Clip]:
    """The clips of ``WorldClips``, one after another."""
    return iter(WorldClips(config))


def clips_at_once(num_frames: int, height: int, width: int) -> int:
    """How many clips of a size to encode together, 1 to 16: small ones go faster so, large ones
    fill the memory.
    """
    return max(1, min(16, PIXELS_AT_ONCE // (num_frames * height * width)))


# ---- writing -------------------------------------------------------------------------------------


def write_latents(
    path: str | Path,
    clips: Sequence[Clip],
    encode_frames: Callable[[Tensor], Tensor],
    embed: Callable[[list[str]], Tensor],
    settings: dict[str, Any] | None = None,
    at_once: int = 1,
    share: tuple[int, int] = (0, 1),
    device: torch.device | str = "cpu",
    keep_in: Path | None = None,
    names: Sequence[str] | None = None,
) -> None:
    """Encode clips and captions and write the set; the file appears only when it is complete.

    What is encoded is kept as it comes, so that an interrupted job goes on where it stopped, also
    after a clip that can't be read. All clips are encoded before the first caption is embedded: the
    codec and the text encoder need not be in memory together. Several processes may call this at
    once, and divide the work; all return when the set is there.

    Args:
        clips: each frames ``[T, 3, H, W]`` in [0, 1] and P captions, all of one length, size and P.
        encode_frames: frames ``[B, T, 3, H, W]`` to latents ``[B, C, T', h, w]``.
        embed: prompts to embeddings ``[B, L, D]``.
        settings: what the set is made of, to know it by; plain JSON values.
        at_once: clips that are encoded together and kept together.
        share: this process's number and the number of processes, for the clips that it begins with.
        device: that frames are encoded on.
        keep_in: the folder for the parts, None: one of these settings.
        names: of the clips, each of which is then a part: another set with ``keep_in`` takes over
            what it has in common.

    Raises:
        ValueError: if clips differ in shape, or latents are not finite.
    """
    path, settings = Path(path), json.loads(json.dumps(settings or {}))
    if path.exists():
        ensure_made_of(path, _settings_of(path), settings)
        return
    key = key_to_seed(json.dumps(settings, sort_keys=True), len(clips))
    folder = keep_in or path.with_name(f".{path.name}.parts-{key:016x}")
    at_once = at_once if names is None else 1
    numbers = [
        range(start, min(start + at_once, len(clips))) for start in range(0, len(clips), at_once)
    ]
    names = names or [f"{part:05d}-of-{len(numbers):05d}" for part in range(len(numbers))]
    latents, texts = (
        [folder / kind / f"{name}.safetensors" for name in names]
        for kind in ("latents", "embeddings")
    )
    first = share[0] * len(latents) // share[1]
    done = sum(part.exists() for part in latents)
    if done:
        log.info("%s: %d of %d parts are encoded already", path.name, done, len(latents))

    with tqdm(total=len(clips), initial=done * at_once, desc="encoding clips", unit="clip") as bar:

        def encode(number: int) -> None:
            frames, captions = zip(*(clips[index] for index in numbers[number]))
            encoded = _encoded(
                torch.stack(_of_one_shape(frames, numbers[number])).to(device),
                encode_frames,
                numbers[number],
            )
            _save_part(latents[number], {"latents": encoded}, {"captions": captions})
            bar.update(len(frames))

        make_all_parts(latents, encode, first, path.exists)

    with tqdm(total=len(clips), desc="embedding captions", unit="clip") as bar:

        def embed_part(number: int) -> None:
            captions = _read_captions(latents[number])
            embeddings = torch.stack([embed(texts).half() for texts in captions])
            _save_part(texts[number], {"embeddings": embeddings.contiguous()}, {})
            bar.update(len(captions))

        make_all_parts(texts, embed_part, first, path.exists)
    _join(path, folder, latents, texts, settings)


def _of_one_shape(frames: Sequence[Tensor], numbers: range) -> list[Tensor]:
    shapes = {tuple(clip.shape) for clip in frames}
    if len(shapes) > 1:
        raise ValueError(
            f"clips {numbers[0]} to {numbers[-1]} have the shapes {sorted(shapes)}; expected one"
            " for all"
        )
    return list(frames)


@torch.no_grad()
def _encoded(frames: Tensor, encode_frames: Callable[[Tensor], Tensor], numbers: range) -> Tensor:
    latents = encode_frames(frames).half().cpu().contiguous()
    if not latents.isfinite().all():
        raise ValueError(
            f"the codec's latents of clips {numbers[0]} to {numbers[-1]} are not finite in float16"
        )
    return latents


def _save_part(path: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    with atomic_file(path) as temporary:
        save_file(
            tensors, temporary, metadata={name: json.dumps(value) for name, value in about.items()}
        )


def _read_captions(part: Path) -> list[list[str]]:
    with safe_open(part, "pt") as file:
        return parse_json(file.metadata()["captions"])


def _join(
    path: Path, folder: Path, latents: list[Path], texts: list[Path], settings: dict[str, Any]
) -> None:
    """One process writes the set and removes its parts, the others wait for it."""
    while not path.exists():
        with claimed(path) as own:
            if own and not path.exists():
                tensors = {
                    "latents": _joined("latents", latents),
                    "embeddings": _joined("embeddings", texts),
                }
                captions = [clip for part in latents for clip in _read_captions(part)]
                _save_part(path, tensors, {"captions": captions, "settings": settings})
                shutil.rmtree(folder, ignore_errors=True)
                # of settings that were given up
                for other in path.parent.glob(f".{glob.escape(path.name)}.parts-*"):
                    shutil.rmtree(other, ignore_errors=True)
        if not path.exists():
            time.sleep(WAIT_S)


def _joined(name: str, parts: list[Path]) -> Tensor:
    tensors = []
    for part in parts:
        with safe_open(part, "pt") as file:
            tensors.append(file.get_tensor(name))
        if tensors[-1].shape[1:] != tensors[0].shape[1:]:
            raise ValueError(
                f"{part} has {name} of {tuple(tensors[-1].shape[1:])}, the first part"
                f" {tuple(tensors[0].shape[1:])}; clips must be of one length and size"
            )
    return torch.cat(tensors).contiguous()


# ---- reading -------------------------------------------------------------------------------------


def ensure_made_of(
    path: str | Path, was: dict[str, Any], now: dict[str, Any], only_known: bool = False
) -> None:
    """A ValueError if a set was made of anything else than what is asked for.

    Args:
        path: for the error.
        was: settings of the set.
        now: those that are asked for.
        only_known: compare no more than the set says of itself; sets of older versions say nothing.
    """
    now = json.loads(json.dumps(now))
    if not was and not only_known and now:
        raise ValueError(
            f"{path} does not say what it was made of; delete or rename it, or read it with"
            " data.kind=latents"
        )
    differing = [
        name for name in now if was.get(name) != now[name] and not (only_known and name not in was)
    ]
    if differing:
        name = differing[0]
        raise ValueError(
            f"{path} is another set: {name} was {was.get(name)}, now {now[name]}; delete or rename"
            " it, or set data.path to another place"
        )


def _settings_of(path: str | Path) -> dict[str, Any]:
    try:
        with safe_open(path, "pt") as file:
            return parse_json(file.metadata().get("settings", "{}"))
    except Exception as error:  # safetensors has its own kind
        raise _damaged(path, error) from error


def _damaged(path: str | Path, reason: object) -> ValueError:
    return ValueError(
        f"the latent set {path} is damaged ({' '.join(str(reason).split())[:200]}); make it again"
    )


class LatentClips:
    """Batches of latent clips, stateless: the same arguments always give the same batch.

    Args:
        path: a file of ``write_latents``.
        seed: of the choice of clips.
        latent_frames: frames to cut from each clip; None takes the whole clip.
        window_stride: cuts start at multiples of it; None cuts at the clip's beginning only.
        first_share: with ``window_stride``, the share of cuts that are taken at the beginning.
    """

    def __init__(
        self,
        path: str | Path,
        seed: int,
        latent_frames: int | None = None,
        window_stride: int | None = None,
        first_share: float = 0.5,
    ):
        if not Path(path).is_file():
            raise ValueError(
                f"no latent set at {path}; train once with data.kind=world or clips, which"
                " makes one"
            )
        self.settings = _settings_of(path)
        try:
            with safe_open(path, "pt") as file:
                self.captions: list[list[str]] = parse_json(file.metadata()["captions"])
                self.latents = file.get_tensor("latents")
                self.embeddings = file.get_tensor("embeddings")
        except Exception as error:
            raise _damaged(path, error) from error
        fault = _fault(self.latents, self.embeddings, self.captions)
        if fault is not None:
            raise _damaged(path, fault)
        self.seed = seed
        self.latent_frames = latent_frames or self.latents.shape[2]
        if self.latent_frames > self.latents.shape[2]:
            raise ValueError(
                f"latent_frames={latent_frames}, but the clips of {path} have"
                f" {self.latents.shape[2]} latent frames"
            )
        self.window_stride = window_stride
        self.first_share = first_share

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def latent_channels(self) -> int:
        """Of the codec that made it."""
        return self.latents.shape[1]

    @property
    def text_dim(self) -> int:
        """Width of the embeddings."""
        return self.embeddings.shape[-1]

    @property
    def fingerprint(self) -> str:
        """Changes with the captions, the number and size of the clips, and what encoded them; not
        when files are copied.
        """
        made_by = {name: value for name, value in self.settings.items() if name != "clips"}
        told = json.dumps([made_by, self.captions, list(self.latents.shape)], sort_keys=True)
        return f"{key_to_seed(told):016x}"

    def batch(self, step: int, turn: str, micro: int, indices: range) -> dict:
        """Samples ``indices`` of the joint batch: latents ``[B, C, T, h, w]``, cond ``[B, L, D]``,
        prompts, ``offset [B]`` (latent frame at which the cut starts) and ``keys``, one seed per
        sample.
        """
        rows = [self._sample(step, turn, micro, index) for index in indices]
        clips, paraphrases, offsets, keys = zip(*rows)
        latents = [
            self.latents[clip, :, start : start + self.latent_frames]
            for clip, start in zip(clips, offsets)
        ]
        return {
            "latents": torch.stack(latents).float(),
            "cond": (
                torch.stack(
                    [self.embeddings[clip, k] for clip, k in zip(clips, paraphrases)]
                ).float()
            ),
            "prompts": [self.captions[clip][k] for clip, k in zip(clips, paraphrases)],
            "offset": torch.tensor(offsets),
            "keys": list(keys),
        }

    def _sample(self, step: int, turn: str, micro: int, index: int) -> tuple[int, int, int, int]:
        key = (self.seed, "clip", step, turn, micro, index)
        generator = keyed_generator(*key)
        clip = int(torch.randint(len(self.latents), (), generator=generator))
        paraphrase = int(torch.randint(self.embeddings.shape[1], (), generator=generator))
        return clip, paraphrase, self._start(generator), key_to_seed(*key)

    def _start(self, generator: torch.Generator) -> int:
        if (
            self.window_stride is None
            or float(torch.rand((), generator=generator)) < self.first_share
        ):
            return 0
        places = (self.latents.shape[2] - self.latent_frames) // self.window_stride
        return self.window_stride * int(torch.randint(places + 1, (), generator=generator))


def _fault(latents: Tensor, embeddings: Tensor, captions: Any) -> str | None:
    """What is wrong with the contents of a set, if anything is."""
    for name, tensor, dims in (("latents", latents, 5), ("embeddings", embeddings, 4)):
        if tensor.ndim != dims or not tensor.numel():
            return (
                f"{name} have the shape {tuple(tensor.shape)}, expected {dims} axes and at least"
                " one clip"
            )
        if not tensor.is_floating_point():
            return f"{name} are {tensor.dtype}, expected float16 or float32"
        if not all(clip.isfinite().all() for clip in tensor):
            return f"{name} are not all finite"
    if not isinstance(captions, list):
        return f"captions are {str(captions)[:60]}, expected a list for each clip"
    if len({len(latents), len(embeddings), len(captions)}) != 1:
        return (
            f"{len(latents)} latents, {len(embeddings)} embeddings and {len(captions)} captions,"
            " expected as many of each"
        )
    for texts in captions:
        if (
            not isinstance(texts, list)
            or len(texts) != embeddings.shape[1]
            or not all(isinstance(t, str) for t in texts)
        ):
            return f"a clip has captions {str(texts)[:60]}, expected {embeddings.shape[1]} texts"
    return None
