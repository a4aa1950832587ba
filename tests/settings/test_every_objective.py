"""Every objective trains a causal student on clips, and one on images; the same losses whatever
processes share the batch; and what does not fit is told in one line.
"""

import math

import pytest
import torch

from streamvid.experiment.build import build_method
from streamvid.experiment.config import load_run
from streamvid.objectives import all_objectives, find_objective
from streamvid.rollout.schedule import StreamConfig
from streamvid.seeding import keyed_normal
from tests import fakes
from tests.fakes import ONE_STEP, Ar1Student, ar1_setting, run_turn

CHUNKS, CHUNK_FRAMES = 2, 2


def options_of(name):
    """What an objective asks for beside its defaults."""
    return {"mode": "teacher_forcing", "chunk_frames": 2} if name == "flow_matching" else {}


def stream_of(objective, **options):
    """Of the steps that the objective is published for; two at least, which some compare."""
    stepper = "jump" if objective.sampler == "jump" else "renoise"
    steps = max(2, objective.num_steps)
    return StreamConfig(
        **{
            "num_steps": steps,
            "shift": 1.0,
            "chunk_frames": CHUNK_FRAMES,
            "stepper": stepper,
            **options,
        }
    )


def setting_of(name, num_chunks=CHUNKS, **stream):
    objective = find_objective(name)(**options_of(name))
    rollout = {"num_chunks": num_chunks, "group_size": 2 if "group" in objective.needs else 1}
    setting = fakes.wan_setting(
        name,
        stream_of(objective, **stream),
        rollout,
        jumps="jumps" in objective.needs,
        **options_of(name),
    )
    with torch.no_grad():  # as if trained a little, so that networks differ and nothing cancels
        for number, network in enumerate(setting.networks().values()):
            for parameter in network.parameters():
                parameter += 0.02 * keyed_normal(tuple(parameter.shape), "moved", number)
    return setting


def batch_of(setting, keys=(3, 4)):
    """Prompts, and clips or pairs where the objective needs them."""
    frames = setting.rollout.num_chunks * setting.stream.chunk_frames
    own = lambda shape, name: torch.stack([keyed_normal(shape, name, key) for key in keys])
    batch = {"cond": own((5, 8), "cond"), "keys": list(keys)}
    if "pairs" in setting.objective.needs:
        states = [own((4, frames, 4, 4), f"state {number}") for number in range(5)]
        batch["states"] = torch.stack(states, dim=1)
        batch["times"] = torch.tensor([[1.0, 0.75, 0.5, 0.25, 0.0]] * len(keys))
    elif "clips" in setting.objective.needs:
        batch["latents"] = own((4, frames, 4, 4), "clip")
        batch["offset"] = torch.zeros(len(keys), dtype=torch.long)
    return batch


def test_discriminator_heads_are_made_anew():
    """The same ones in every process, from the seed and the step."""
    made = []
    for _ in range(2):
        setting = setting_of("nitrofusion")
        heads = setting.networks()["discriminator"].heads.heads
        old = [head.register_token.clone() for head in heads]
        setting.objective.refresh = 1.0
        setting.after_step("student", 0)
        made.append([head.register_token.clone() for head in heads])
        assert not any(map(torch.equal, old, made[-1]))
    assert all(map(torch.equal, *made))
    setting.after_step("student", 1)
    assert not any(torch.equal(head.register_token, m) for head, m in zip(heads, made[-1]))
    setting.objective.refresh = 0.0
    kept = [head.register_token.clone() for head in heads]
    setting.after_step("student", 2)
    assert all(torch.equal(head.register_token, k) for head, k in zip(heads, kept))


WITHOUT_REWARD = [name for name, kind in all_objectives().items() if "reward" not in kind().needs]


@pytest.mark.parametrize("name", WITHOUT_REWARD)
def test_each_turn_trains_its_own_network(name):
    """Its loss is finite, its network gets a gradient that is finite, and no other gets any."""
    setting = setting_of(name)
    batch = batch_of(setting)
    for turn in setting.networks():
        moved = False
        for step in range(3):  # whatever exit or branch is drawn
            setting.set_progress(step / 3)
            grads, numbers = run_turn(setting, batch, turn, step)
            assert all(math.isfinite(number) for number in numbers.values()), (turn, numbers)
            own = [grad for grad in grads.pop(turn).values() if grad is not None]
            assert own and all(grad.isfinite().all() for grad in own), turn
            moved = moved or any(bool(grad.any()) for grad in own)
            assert all(grad is None for of in grads.values() for grad in of.values()), turn
            setting.after_step(turn, step)
        assert moved, turn


def test_nearly_all_objectives_need_no_reward():
    assert len(WITHOUT_REWARD) > 40 and {"dmd", "sid", "meanflow", "afd"} <= set(WITHOUT_REWARD)


def test_sid_trains_on_images():
    """Images are clips of one latent frame."""
    setting = setting_of("sid", num_chunks=1, chunk_frames=1)
    batch = batch_of(setting)
    for turn in setting.turns(1):
        grads, numbers = run_turn(setting, batch, turn)
        assert math.isfinite(numbers["loss"])
        assert any(grad.any() for grad in grads[turn].values() if grad is not None)
    assert setting.step_of("student", batch, 0).sample().x.shape == (2, 4, 1, 4, 4)


# of scores, with a game, of clips alone, on a flow map, a start
KINDS = ["dmd", "dmd2", "gdd", "cd", "sid", "trajectory"]


@pytest.mark.parametrize("name", KINDS)
def test_two_processes_have_the_losses_of_one(name):
    """Draws are keyed by sample, so that a batch of four is two of two: the mean of their losses
    is its loss, and the gradients' mean its gradient.
    """
    setting = setting_of(name)
    for turn in setting.networks():
        losses, gradients = [], []
        for keys in ((3, 4, 5, 6), (3, 4), (5, 6)):
            grads, numbers = run_turn(setting, batch_of(setting, keys), turn, 1)
            losses.append(numbers["loss"])
            own = [grad.flatten() for grad in grads[turn].values() if grad is not None]
            gradients.append(torch.cat(own))
        whole, *halves = losses
        assert whole == pytest.approx(sum(halves) / 2, rel=1e-5, abs=1e-6)
        assert abs(halves[0] - halves[1]) > 1e-5 * abs(whole)  # other clips
        goal = (gradients[1] + gradients[2]) / 2
        assert (gradients[0] - goal).norm() < 1e-4 * goal.norm()


# ---- errors


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    "overrides, said",
    [
        (["objective=sidd"], "did you mean sid?"),
        (["method=dmd"], "method is objective now; rename it"),
        (["options.num_chunks=3"], "options.num_chunks is rollout.num_chunks now; rename it"),
        (["options.exit=last"], "options.exit is rollout.exit now; rename it"),
        (["options.motion=learned"], "options.motion is options.motion_feature now; rename it"),
    ],
)
def test_an_unknown_objective_or_an_old_key_is_one_line(overrides, said):
    with pytest.raises(ValueError) as error:
        load_run(None, ["train.name=x", *overrides])
    assert said in one_line(error)


def test_a_missing_need_is_one_line():
    for name in ("trajectory", "accvideo"):
        config = load_run(None, ["train.name=x", f"objective={name}", "data.kind=prompts"])
        with pytest.raises(ValueError) as error:
            build_method(config, setting_of(name).student, torch.zeros(5, 8))
        assert "data.kind=trajectories" in one_line(error)

    setting = setting_of("accvideo")
    batch = batch_of(setting)
    del batch["states"]
    with pytest.raises(ValueError) as error:
        setting.loss("student", batch, 0)
    assert "data.kind=trajectories" in one_line(error)

    setting = setting_of("dmd2")
    batch = batch_of(setting)
    del batch["latents"]
    with pytest.raises(ValueError) as error:
        setting.loss("discriminator", batch, 0)
    assert "dmd2 needs clips" in one_line(error)

    with pytest.raises(ValueError) as error:
        setting_of("meanflow", stepper="renoise")
    assert "set stream.stepper=jump" in one_line(error)

    objective = find_objective("meanflow")()
    with pytest.raises(ValueError) as error:
        fakes.wan_setting("meanflow", stream_of(objective))
    assert "give it models.jump_embedding.add_jump_embedding" in one_line(error)

    with pytest.raises(ValueError) as error:
        ar1_setting("gndm", Ar1Student(), stream=ONE_STEP)
    assert "rollout.group_size" in one_line(error)

    with pytest.raises(ValueError) as error:
        ar1_setting("pso", Ar1Student(), stream=ONE_STEP)
    assert "needs a reward" in one_line(error)

    with pytest.raises(ValueError) as error:
        ar1_setting("dmd2", Ar1Student(), stream=ONE_STEP)
    assert "take a Wan teacher" in one_line(error)
