"""Objectives over images and clips: the student's samples are rollouts, streamed as it will be.

``VideoSetting`` is a ``training.method.Method``: it gives an objective's losses the networks of a
run and, in each turn, a ``VideoStep``. How samples are made is in ``settings.rollouts``.

Images are clips of one latent frame.

Shapes: B batch, C channels, T latent frames of a clip, h w latent size, L D of a prompt embedding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from streamvid.core.fitting import couple
from streamvid.core.guidance import GuidanceSpec
from streamvid.models.discriminators import TrunkHeads
from streamvid.models.step_labels import add_step_labels
from streamvid.objectives.base import Distillation, Objective, parts_of
from streamvid.rollout.schedule import StreamConfig, chunk_times
from streamvid.settings.rollouts import RolloutConfig
from streamvid.settings.video_step import VideoStep
from streamvid.teachers.base import Teacher

COPIES = ("average", "lagged", "start")  # of the student, where an objective needs them
OF_TEACHER = frozenset({"score", "features"})
NOT_ON_CLIPS = {"reward": "a reward", "second": "a second fake score"}
"""What objectives may need and clips do not have."""


class VideoSetting:
    """An objective with the networks of a run.

    Args:
        objective: any.
        student: a causal Wan transformer; bidirectional for objectives that roll nothing out.
        stream: how the student is streamed; its rollouts in training are the same.
        latent_shape: (C, h, w).
        teacher: of objectives that need its score; frozen.
        rollout: how samples are made.
        fake_score: a bidirectional network that ``teachers.base.score_velocity`` takes; None is the
            teacher's ``trainable_copy``.
        discriminator: None makes the objective's own, or ``TrunkHeads`` on the teacher.
        uncond: embedding of the empty prompt ``[L, D]``, where there is no teacher that has it.
        seed: of all random draws.
        as_image: from the latents ``[B, C, t, h, w]`` of a stream so far to that of its last frame
            as an image, ``[B, C, 1, h, w]``, see ``codecs.base.last_frame_as_image``; for rollouts
            longer than the clips that are judged.

    Raises:
        ValueError: if these do not fit together.
    """

    def __init__(
        self,
        objective: Objective,
        student: nn.Module,
        stream: StreamConfig,
        latent_shape: tuple[int, int, int],
        teacher: Teacher | None = None,
        rollout: RolloutConfig | None = None,
        fake_score: nn.Module | None = None,
        discriminator: nn.Module | None = None,
        uncond: Tensor | None = None,
        seed: int = 0,
        as_image: Callable[[Tensor], Tensor] | None = None,
    ):
        self.objective = objective
        self.student = student
        self.stream = stream
        channels, height, width = latent_shape
        self.latent_shape = channels, height, width
        self.teacher = teacher
        self.rollout = RolloutConfig() if rollout is None else rollout
        self.uncond = teacher.uncond if uncond is None and teacher is not None else uncond
        self.seed = seed
        self.as_image = as_image
        self._check()
        longest_rollout = self.rollout.rollout_chunks or self.rollout.num_chunks
        self.num_steps = max(map(len, chunk_times(stream, longest_rollout)))
        self.trained: dict[str, nn.Module] = {"student": student}
        names = objective.networks()
        if "fake_score" in names:
            self.trained["fake_score"] = (
                self._new_fake_score() if fake_score is None else fake_score
            )
        if self.rollout.fake_knows_steps and "fake_score" in self.trained:
            labels = self.num_steps * (self.num_steps + 1) // 2
            add_step_labels(self.trained["fake_score"], labels)
        if discriminator is not None:
            self.trained["discriminator"] = discriminator
        self.trained |= objective.new_networks(self.trained, self.latent_shape, stream, seed)
        if "discriminator" in names and "discriminator" not in self.trained:
            self.trained["discriminator"] = self._new_heads()
        self.copies = {
            name: copy.deepcopy(student).requires_grad_(False).eval()
            for name in COPIES
            if name in objective.needs
        }
        self.progress = 0.0

    # ---- training.method.Method

    @property
    def needs(self) -> frozenset[str]:
        """What the objective asks of its teacher."""
        return self.objective.needs & OF_TEACHER

    def networks(self) -> dict[str, nn.Module]:
        return self.trained

    def frozen(self) -> dict[str, nn.Module]:
        """The networks that are held and not trained."""
        held = {
            "teacher": getattr(self.teacher, "transformer", None),
            "teacher_2": getattr(self.teacher, "transformer_2", None),
        }
        return {**{n: part for n, part in held.items() if part is not None}, **self.copies}

    def turns(self, step: int) -> tuple[str, ...]:
        return self.objective.turns(step)

    def set_progress(self, progress: float) -> None:
        """How far the run is, in [0, 1]."""
        self.progress = progress

    def choices(self, turn: str, step: int) -> Hashable:
        return self.objective.choices(self.step_of(turn, None, step))

    def loss(self, turn: str, batch: dict[str, Any], step: int) -> tuple[Tensor, dict[str, float]]:
        """Batches hold ``cond [B, L, D]`` and ``keys``, and ``latents [B, C, T, h, w]`` or
        ``states [B, n, C, T, h, w]`` with ``times [B, n]`` where the objective needs clips or
        pairs.
        """
        parts, numbers = zip(*self.losses(turn, batch, step))
        return torch.stack(parts).sum() if len(parts) > 1 else parts[0], numbers[-1]

    def losses(
        self, turn: str, batch: dict[str, Any], step: int
    ) -> Iterator[tuple[Tensor, dict[str, float]]]:
        """The loss in parts, the numbers with the last."""
        if turn not in self.trained:
            raise ValueError(f"turn={turn!r}, expected one of {', '.join(self.trained)}")
        context = self.step_of(turn, batch, step)
        make_parts = parts_of(getattr(self.objective, turn)(context))
        made = []
        for make_part in make_parts:
            part = make_part()
            made.append(part.detach())
            last = len(made) == len(make_parts)
            yield part, context.finish(torch.stack(made).sum()) if last else {}

    @torch.no_grad()
    def after_step(self, turn: str, step: int) -> None:
        """The student's copies follow it."""
        if turn != "student":
            return
        decays = {"average": self.objective.average_decay, "lagged": self.objective.lagged_decay}
        for name, decay in decays.items():
            if name in self.copies and self.objective.follows(name, step):
                couple(self.placed(name).parameters(), self.student.parameters(), decay)
        self.objective.after_student(self.step_of(turn, None, step))

    def extra_state(self) -> dict[str, Tensor]:
        """The weights of copies that change."""
        return {
            f"{name}.{key}": value
            for name in self.copies
            if name != "start"
            for key, value in self.placed(name).state_dict().items()
        }

    # ---- parts of a step

    def step_of(self, turn: str, batch: dict[str, Any] | None, step: int) -> VideoStep:
        """The step that a loss gets; without a batch it knows its shared draws alone."""
        return VideoStep(self, turn, batch, step)

    def placed(self, name: str) -> nn.Module:
        """A copy, which the trainer does not know, on the student's device."""
        return self.copies[name].to(next(self.student.parameters()).device)

    @property
    def trunk(self) -> nn.Module:
        """Whose features the discriminator reads."""
        if self.objective.trunk == "fake_score":
            return self._ensure_blocks(self.trained["fake_score"], "fake score")
        return self.teacher_network

    @property
    def teacher_network(self) -> nn.Module:
        """The network whose features are the teacher's."""
        return self._ensure_blocks(getattr(self.teacher, "transformer", None), "teacher")

    def _ensure_blocks(self, network: Any, role: str) -> nn.Module:
        """A ValueError if a network has no blocks that can be read."""
        if isinstance(getattr(network, "blocks", None), nn.ModuleList):
            return network
        raise ValueError(
            f"objective={self.objective.name} reads the blocks of a Wan transformer, but the"
            f" {role} has a {type(network).__name__}; take a Wan teacher, or objective=dmd"
        )

    # ---- construction

    def _check(self) -> None:
        objective, teacher = self.objective, self.teacher
        name = objective.name
        if self.needs and teacher is None:
            raise ValueError(
                f"objective={name} needs a teacher's {' and '.join(sorted(self.needs))}"
            )
        if teacher is not None and "score" in self.needs - teacher.provides:
            raise ValueError(
                f"objective={name} needs a teacher's score, but {type(teacher).__name__} provides"
                f" only {', '.join(sorted(teacher.provides)) or 'nothing'}; choose another teacher"
                " or another objective"
            )
        if "features" in self.needs:
            self._ensure_blocks(getattr(teacher, "transformer", None), "teacher")
        missing = [what for key, what in NOT_ON_CLIPS.items() if key in objective.needs]
        if missing:
            raise ValueError(
                f"objective={name} needs {' and '.join(missing)}, which clips do not have yet;"
                " choose another objective"
            )
        if "group" in objective.needs and self.rollout.group_size < 2:
            raise ValueError(
                f"objective={name} compares samples of one prompt; set rollout.group_size to 2 or"
                " more"
            )
        is_plain = objective.guidance == GuidanceSpec()
        has_uncond = teacher is None or teacher.uncond is not None
        if isinstance(objective, Distillation) and not has_uncond and not is_plain:
            raise ValueError(
                f"guidance_scale={objective.guidance_scale} needs the teacher's uncond; 1 is no"
                " guidance"
            )
        if self.stream.order == "rolling" and self.rollout.exit == "random" and self.needs:
            raise ValueError(
                "order='rolling' denoises chunks of all levels jointly and has no exit; set"
                " rollout.exit='last'"
            )
        if "jumps" in objective.needs and not getattr(self.student, "takes_target", False):
            raise ValueError(
                f"objective={name} trains jumps to more than one time, which this student is not"
                " told; give it models.jump_embedding.add_jump_embedding"
            )
        if objective.sampler == "jump" and self.stream.stepper != "jump":
            raise ValueError(
                f"objective={name} trains jumps from step to step; set stream.stepper=jump"
            )
        if self.rollout.judges_cuts and self.as_image is None:
            raise ValueError(
                "rollout_chunks above num_chunks needs as_image, by which a part's first frame"
                " becomes an image"
            )
        objective.check_stream(self.stream, self.rollout.num_chunks)

    def _new_fake_score(self) -> nn.Module:
        if self.teacher is None or not hasattr(self.teacher, "trainable_copy"):
            raise ValueError(
                f"{type(self.teacher).__name__} has no network to start the fake score from; pass"
                " fake_score"
            )
        return self.teacher.trainable_copy()

    def _new_heads(self) -> nn.Module:
        trunk: Any = self.trunk
        depth = len(trunk.blocks)
        layers = self.objective.feature_layers
        if layers is None:
            layers = sorted({depth // 3, depth // 2, depth - 1})
        num_logits = self.objective.num_logits_for(self.stream.num_steps)
        return TrunkHeads(trunk, layers, num_logits, seed=self.seed)
