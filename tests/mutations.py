"""Plants one error at a time in a copy of the package, and asks whether a test notices.

    python -m tests.mutations
    python -m tests.mutations --only kv --only guidance
    python -m tests.mutations --list

A test notices by failing; where a file of tests can't be imported, a fixture can't be made or a
name does not exist, the row itself is broken. An error that no test notices survives. The tests
that noticed are run once more at the end, without an error, and have to pass. The exit status is 1
if an error survives or a row is broken, and 2 if the table does not fit the files or a test fails
without an error. The working tree is never changed.

To add an error, add a row to ``MUTANTS``, or for objectives to ``tests/objectives/mutants.py``:
text that occurs once in a file, what to write in its place, and tests that take seconds and should
notice.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.objectives.mutants import MUTANTS as MUTANTS_OF_OBJECTIVES

ROOT = Path(__file__).parents[1]
COPIED = ("streamvid", "tests", "tools", "configs", "pyproject.toml")
LOG = "pytest.log"  # of the last run, in the copy
FAILED = "failed.txt"  # the tests that failed in the last run, a line each, in the copy
ROLLOUTS = "streamvid/settings/rollouts.py"
VIDEO_STEP = "streamvid/settings/video_step.py"
VIDEO_SETTING = "streamvid/settings/video.py"
STARTS = "tests/serving/test_starts.py"


@dataclass(frozen=True)
class Mutant:
    """A planted error."""

    name: str
    file: str  # from the root
    old: str  # occurs once in the file
    new: str
    tests: tuple[str, ...]  # as pytest takes them


def mutants(file: str, *tests: str, **errors: tuple[str, str]) -> list[Mutant]:
    """Errors of one file that the same tests notice, each a name and (old, new)."""
    return [Mutant(name, file, old, new, tests) for name, (old, new) in errors.items()]


MUTANTS: list[Mutant] = [
    *mutants(
        "streamvid/seeding.py",
        "tests/test_seeding.py",
        seed_keeps_its_last_bit=('"little") >> 1', '"little") >> 0'),
        seed_loses_a_bit=('"little") >> 1', '"little") >> 2'),
        seed_of_joined_text=('"/".join', '"".join'),
    ),
    *mutants(
        "streamvid/students/folder.py",
        "tests/students/test_folder.py::test_asked_steps_win_over_a_step_table",
        asked_steps_lose_to_a_table=("table = None if steps is None else ()", "table = None"),
    ),
    *mutants(
        "streamvid/core/times.py",
        "tests/core/test_times.py",
        target_reuses_a_draw=("(1 - shrink * u[1])", "(1 - shrink * u[0])"),
        target_beyond_the_last=("(last - first + 1)).long()", "(last - first)).long()"),
        shift_inverted=(
            "return shift * u / (1 + (shift - 1) * u)",
            "return unshift_time(u, shift)",
        ),
        steps_end_at_zero=("shift_time(1 - i / num_steps", "shift_time(1 - (i + 1) / num_steps"),
        times_clamped_at_zero=("u = 1 - torch.rand(", "u = 0 + 0 * torch.rand("),
        pair_out_of_order=(
            "torch.where(same, later, earlier)",
            "torch.where(same, earlier, later)",
        ),
    ),
    *mutants(
        "streamvid/core/process.py",
        "tests/core/test_process.py",
        "tests/core/test_process_steps.py",
        noise_and_data_exchanged=("return (1 - t) * x0 + t * eps", "return t * x0 + (1 - t) * eps"),
        velocity_sign=("as_work(eps) - as_work(x0)", "as_work(x0) - as_work(eps)"),
        x0_from_v_sign=(
            "return x_t - expand_time(t, x_t) * v",
            "return x_t + expand_time(t, x_t) * v",
        ),
        v_from_x0_sign=("return (x_t - x0) / expand", "return (x0 - x_t) / expand"),
        eps_from_v_without_the_rest=(
            "x_t + (1 - expand_time(t, x_t)) * v",
            "x_t + expand_time(t, x_t) * v",
        ),
        score_sign=("return -eps_from_v", "return eps_from_v"),
        euler_backwards=(
            "return x_t - (expand_time(t, x_t) - expand_time(t_next, x_t)) * v",
            "return x_t + (expand_time(t, x_t) - expand_time(t_next, x_t)) * v",
        ),
        renoise_at_another_level=(
            "return add_noise(x0, eps_new, t_next)",
            "return add_noise(x0, eps_new, 1 - t_next)",
        ),
        eta_step_keeps_all_noise=("_root(s**2 - renewed**2) * eps", "s * eps"),
        transition_adds_too_much=("_root(t**2 - (a * s) ** 2) * noise", "t * noise"),
        v_network_sign=("alpha * x - sigma * out,", "alpha * x + sigma * out,"),
    ),
    *mutants(
        "streamvid/core/guidance.py",
        "tests/core/test_guidance.py",
        guidance_sign=(
            "expand_time(scale, cond) * (cond - uncond)",
            "expand_time(scale, cond) * (uncond - cond)",
        ),
        guidance_counted_twice=("uncond + expand_time(scale", "cond + expand_time(scale"),
    ),
    *mutants(
        "streamvid/core/inject.py",
        "tests/core/test_inject.py",
        "tests/core/test_inject_forms.py",
        dmd_sign=(
            "gradient = as_work(x0_fake) - as_work(x0_real)",
            "gradient = as_work(x0_real) - as_work(x0_fake)",
        ),
        surrogate_sign=("(x - x.detach() + grad).square()", "(x - x.detach() - grad).square()"),
        sid_alpha_sign=("- x - alpha * gap)", "- x + alpha * gap)"),
        reverse_kl_for_kl=('"kl": lambda r: r,', '"kl": lambda r: 1 / r,'),
    ),
    *mutants(
        "streamvid/core/fitting.py",
        "tests/core/test_fitting.py",
        fit_weighs_the_wrong_end=('"x0": lambda t, sd: t**2', '"x0": lambda t, sd: (1 - t) ** 2'),
        couple_keeps_the_other=(
            "torch._foreach_lerp_(destination, followed, 1 - keep)",
            "torch._foreach_lerp_(destination, followed, keep)",
        ),
    ),
    *mutants(
        "streamvid/core/flowmap.py",
        "tests/core/test_flowmap.py",
        tangent_sign=("(as_work(v) - share * span", "(as_work(v) + share * span"),
        secant_sign=("return (x_t - x_s) / (expand", "return (x_s - x_t) / (expand"),
        aim_at_the_start=(
            "aim = euler_step(x_r, target(x_r, r, s), r, s)",
            "aim = euler_step(x_r, target(x_r, r, s), s, r)",
        ),
    ),
    *mutants(
        "streamvid/core/policy.py",
        "tests/core/test_policy.py",
        worse_is_better=(
            "centred = rewards - share @ rewards",
            "centred = share @ rewards - rewards",
        ),
        loser_preferred=(
            "logsigmoid(beta * (winner - loser))",
            "logsigmoid(beta * (loser - winner))",
        ),
        good_and_bad_exchanged=(
            "(weight * good + (1 - weight) * bad)",
            "(weight * bad + (1 - weight) * good)",
        ),
    ),
    *mutants(
        "streamvid/core/moments.py",
        "tests/core/test_moments.py",
        mmd_counts_a_sample_with_itself=("len(gram) - 1))", "len(gram)))"),
        relation_reversed=(
            "features @ features.T / temperature",
            "features @ features.T * temperature",
        ),
    ),
    *mutants(
        "streamvid/rollout/schedule.py",
        "tests/rollout/test_schedule.py",
        tap_one_step_late=(
            "taps.append(step == exit_of(chunk)",
            "taps.append(step == exit_of(chunk) + 1",
        ),
        exit_one_step_late=("elif step < exit_of(chunk):", "elif step < exit_of(chunk) - 1:"),
        table_repeats_the_list_before=(
            "min(chunk, len(step_table) - 1)",
            "min(chunk, len(step_table) - 2)",
        ),
        rolling_newest_first=("(chunk, times, newest - chunk)", "(chunk, times, chunk - first)"),
        last_commit_counted=("0 if commit_last or not nfe", "0 if True or not nfe"),
        first_times_forgotten=(
            "times if first_times is None else first_times, times]",
            "times, times]",
        ),
    ),
    *mutants(
        "streamvid/rollout/loop.py",
        "tests/rollout/test_loop.py",
        "tests/rollout/test_ar1_oracle.py",
        "tests/rollout/test_jump.py",
        gradient_from_step_to_step=("x_t, x0 = x_t.detach(), x0.detach()", "x_t, x0 = x_t, x0"),
        context_at_another_time=(
            "self.timestep((self.context_t,))",
            "self.timestep((1 - self.context_t,))",
        ),
        context_without_its_noise=("if context_t == 0:", "if context_t < 1:"),
        same_noise_again=(
            "partial(self.draw, chunk, state.nfe)",
            "partial(self.draw, chunk, INITIAL_EVENT)",
        ),
        renoise_to_the_old_level=(
            "renoise_step(x0, draw(), t_next)",
            "renoise_step(x0, draw(), t)",
        ),
        prediction_of_the_last_step=("if tap or not state.tapped:", "if True:"),
        timestep_of_the_first_chunk=(
            "fill(level, batch, frames) for level in t]",
            "fill(t[0], batch, frames) for level in t]",
        ),
        told_where_it_is=('"jump": lambda event: event.t_next', '"jump": lambda event: event.t'),
        step_of_no_length=("v_from_x0(x_t, x0, t), t, t_next)", "v_from_x0(x_t, x0, t), t, t)"),
        never_commits=("oldest += len(finished)", "oldest += len(finished); finished = []"),
    ),
    *mutants(
        "streamvid/rollout/passes.py",
        "tests/rollout/test_loop.py",
        gradient_through_reused_keys=("_detached(output.kv)", "output.kv"),
        no_gradient=("torch.is_grad_enabled() and self.gradient", "False"),
    ),
    *mutants(
        "streamvid/models/joined_cache.py",
        "tests/students/test_batch.py::test_old_and_young_sessions_run_as_one_when_their_windows_are_full",
        "tests/students/test_batch.py::test_a_session_that_is_given_up_in_the_middle_leaves_the_others_alone",
        context_before_the_commit=(
            "all(new is old for new, old in",
            "all(len(new) == len(old) for new, old in",
        ),
        own_frames_among_the_seen=("argsort(stable=True)[:seen]", "argsort(stable=True)[-seen:]"),
        texts_of_other_rows=(
            "zip(self.caches, self.conds, self.split_kv(kv))",
            "zip(self.caches, self.conds, self.split_kv(kv)[::-1])",
        ),
    ),
    *mutants(
        "streamvid/models/rope.py",
        "tests/students/test_batch.py::test_old_and_young_sessions_run_as_one_when_their_windows_are_full",
        places_of_the_first_row=("else torch.stack(rows)", "else rows[0]"),
    ),
    *mutants(
        "streamvid/students/batch.py",
        "tests/students/test_batch.py::test_rows_with_fewer_steps_drop_out_of_later_passes",
        "tests/students/test_batch.py::test_where_a_joint_pass_fails_each_runs_by_itself",
        times_of_the_first_row=(
            "torch.cat([one.timestep for one in passes])",
            "torch.cat([first.timestep for one in passes])",
        ),
        joint_pass_tried_again=("self._may_join = False", "self._may_join = True"),
    ),
    *mutants(
        "streamvid/serving/worker.py",
        "tests/serving/test_models.py",
        companions_that_are_not_due=("if due > ready_at or", "if due < ready_at or"),
        companions_of_any_shape=("stream.shape == first.shape and not", "not"),
    ),
    *mutants(
        "streamvid/serving/live.py",
        "tests/serving/test_models.py",
        each_pays_for_the_batch=("num_frames, work_s / size)", "num_frames, work_s)"),
    ),
    *mutants(
        "streamvid/serving/fmp4.py",
        "tests/serving/test_fmp4.py",
        fragment_refers_to_what_was_dropped=("is_key = not follows or", "is_key = False or"),
        time_stands_still_for_frames_left_out=(
            "TICKS_PER_SECOND * lasts / fps",
            "TICKS_PER_SECOND / fps",
        ),
        fragments_all_at_the_beginning=('"make_non_negative"', '"make_zero"'),
        colours_of_another_matrix=("dst_colorspace=BT709", "dst_colorspace=5"),
    ),
    *mutants(
        "streamvid/serving/decoding.py",
        f"{STARTS}::test_what_is_transparent_lies_over_black",
        f"{STARTS}::test_what_is_cut_off_is_cut_off_evenly",
        f"{STARTS}::test_of_a_long_clip_the_last_frames_are_kept",
        f"{STARTS}::test_who_needs_too_much_memory_is_refused",
        f"{STARTS}::test_a_clip_that_is_too_long_is_refused",
        transparency_ignored=("if not image.has_transparency_data:", "if True:"),
        cut_off_on_one_side=("(picture.width - cut_width) / 2", "(picture.width - cut_width)"),
        first_frames_kept=("last_place + 1 - job.max_frames", "last_place + 99"),
        memory_without_bound=("resource.RLIMIT_AS: memory_bytes", "resource.RLIMIT_AS: 2**40"),
        too_long_a_clip=("if seconds > most:", "if seconds > 1000 * most:"),
    ),
    *mutants(
        "streamvid/students/contexts.py",
        f"{STARTS}::test_what_is_shorter_than_the_first_chunk_is_lengthened_in_front",
        start_lengthened_behind=(
            "torch.cat([frames[:1].expand(missing, -1, -1, -1), frames])",
            "torch.cat([frames, frames[:1].expand(missing, -1, -1, -1)])",
        ),
    ),
    *mutants(
        "streamvid/serving/snapshots.py",
        "tests/serving/test_snapshots.py::test_the_oldest_snapshots_make_room_with_their_frames",
        newest_snapshots_make_room=("reverse=True", "reverse=False"),
        snapshot_takes_the_frames_with_it=("self._starts.adopt(file)", "StartFile(file)"),
    ),
    *mutants(
        ROLLOUTS,
        "tests/objectives/test_closed_forms.py",
        drift_upside_down=("rms[-1] / rms[0]", "rms[0] / rms[-1]"),
        motion_with_sign=("- x[:, :, :-1]).abs()", "- x[:, :, :-1])"),
    ),
    *mutants(
        ROLLOUTS,
        "tests/objectives/test_afd.py",
        patches_out_of_order=("(t p) (h q) (w s)", "(t p) (q h) (s w)"),
    ),
    *mutants(
        ROLLOUTS,
        "tests/settings/test_rollouts.py",
        exit_of_the_next_step=("int(place * num_steps)", "int(place * num_steps) + 1"),
        gradient_one_chunk_late=("t and i >= first_chunk", "t and i > first_chunk"),
        context_of_the_exit=(
            "exit_of(chunk) if chunk == last else steps[chunk]",
            "exit_of(chunk)",
        ),
    ),
    *mutants(
        VIDEO_STEP,
        "tests/settings/test_rollouts.py",
        group_prompts_out_of_order=(
            "repeated[name] = value.repeat_interleave(size, dim=0)",
            "repeated[name] = torch.cat([value] * size)",
        ),
        group_keys_out_of_order=(
            "for key in value for member in range(size)",
            "for member in range(size) for key in value",
        ),
        group_of_one_noise=(
            "key_to_seed(key, member) for key in value",
            "key_to_seed(key, 0) for key in value",
        ),
        draws_of_a_turn_alike=("self.counts[kind] += 1", "self.counts[kind] += 0"),
        names_of_draws_forgotten=(
            "if name:\n            return name",
            "if name:\n            return (kind,)",
        ),
        noise_of_another_sample=(
            "keyed_normal(self.shape, self.setting.seed, *label, key)",
            "keyed_normal(self.shape, self.setting.seed, *label, self.keys[0])",
        ),
        times_of_another_turn=('self._label("score_t", name)', '("score_t",)'),
        shared_draws_alike=("if name not in self.shared:", "if True:"),
        passes_share_an_exit=(
            '"decision", self.step, self.turn, self.micro)\n        generator',
            '"decision", self.step, self.turn)\n        generator',
        ),
        samples_of_a_turn_alike=(
            'role = "student" if number == 0 else',
            'role = "student" if True else',
        ),
        exit_index_of_the_step_before=(
            "exit_index=int(exit_place * setting.num_steps)",
            "exit_index=int(exit_place * setting.num_steps) - 1",
        ),
        asked_exit_one_step_late=("(exit_index + 0.5)", "(exit_index + 1.5)"),
        step_time_of_the_step_before=("(*times, 0.0)[min(index,", "(1.0, *times)[min(index,"),
        part_without_its_image=(
            "torch.cat([setting.as_image(so_far), x[:, :, 1:]], dim=2), t",
            "x, t",
        ),
        image_of_the_frame_before=("latents[:, :, :1]]", "latents[:, :, :0]]"),
        window_high_for_all=("and self._decision.first_chunk > 0:", "and True:"),
    ),
    *mutants(
        VIDEO_STEP,
        "tests/settings/test_video_step.py",
        told_where_it_starts=("= TIMESTEPS * s", "= TIMESTEPS * t"),
        clean_context_dropped=(
            'options["clean_context"] = self.clean_clip().to(x)',
            "pass",
        ),
        clean_context_of_the_noisy_clip=("self.clean_clip().to(x)", "x"),
        whole_clip_as_one_chunk=(
            '{"chunk_frames": self.stream.chunk_frames}\n        if x.shape',
            '{"chunk_frames": x.shape[2]}\n        if x.shape',
        ),
        counted_one_chunk_late=(
            "counts[:, : self.stream.chunk_frames] = 0",
            "counts[:, : 2 * self.stream.chunk_frames] = 0",
        ),
        first_frame_alone_not_counted=(
            "counts[:, : self.stream.chunk_frames] = 0",
            "counts[:, :1] = 0",
        ),
        first_chunk_alone_counted=(
            "counts[:, : self.stream.chunk_frames] = 0",
            "counts[:, self.stream.chunk_frames :] = 0",
        ),
        whole_clip_not_counted=("if self._decision.first_chunk == 0:", "if False:"),
        fake_score_keeps_the_other_share=(
            "[own[name] for name in shared], keep)",
            "[own[name] for name in shared], 1 - keep)",
        ),
        teacher_prompt_and_no_prompt_exchanged=(
            "cond = self.cond.to(x_t) if prompted else self._uncond(x_t)\n        return",
            "cond = self._uncond(x_t) if prompted else self.cond.to(x_t)\n        return",
        ),
        fake_prompt_and_no_prompt_exchanged=(
            "cond = self.cond.to(x_t) if prompted else self._uncond(x_t)\n        with",
            "cond = self._uncond(x_t) if prompted else self.cond.to(x_t)\n        with",
        ),
    ),
    *mutants(
        VIDEO_STEP,
        "tests/objectives/test_afd.py",
        afd_prompts_out_of_order=(
            "cond = self.cond.repeat_interleave(group_size, dim=0) if group_size > 1",
            "cond = torch.cat([self.cond] * group_size) if group_size > 1",
        ),
        afd_seeds_out_of_order=(
            "for key in self.keys\n            for member in range(group_size)",
            "for member in range(group_size)\n            for key in self.keys",
        ),
        afd_noising_prompts_out_of_order=(
            "Noising(times, seeds, self.cond.repeat_interleave(group_size, dim=0))",
            "Noising(times, seeds, torch.cat([self.cond] * group_size))",
        ),
        afd_target_upside_down=("velocity(chunks[k], eps)", "velocity(eps, chunks[k])"),
        afd_context_of_predictions=(
            "v.append(v_from_x0(x_t[k], x0, t))\n            return chunks[k]",
            "v.append(v_from_x0(x_t[k], x0, t))\n            return x0",
        ),
        afd_times_of_another_chunk=(
            ".repeat_interleave(len(clips))",
            ".repeat(len(clips))",
        ),
    ),
    *mutants(
        VIDEO_SETTING,
        "tests/settings/test_video_step.py",
        "tests/objectives/test_afd.py",
        average_for_lagged=(
            '{"average": self.objective.average_decay, "lagged": self.objective.lagged_decay}',
            '{"average": self.objective.lagged_decay, "lagged": self.objective.average_decay}',
        ),
        copies_keep_the_other_share=(
            "self.student.parameters(), decay)",
            "self.student.parameters(), 1 - decay)",
        ),
        copies_follow_in_every_turn=('if turn != "student":', "if False:"),
        start_in_checkpoints=('if name != "start"\n', ""),
        parts_of_a_loss_dropped=("torch.stack(made).sum()", "made[-1]"),
        parts_of_a_loss_made_ahead=(
            "for make_part in make_parts:",
            "for make_part in [lambda part=part: part for part in [m() for m in make_parts]]:",
        ),
    ),
    *mutants(
        "streamvid/objectives/dmd.py",
        "tests/objectives/test_dmd.py",
        scores_exchanged=("dmd_gradient(x, fake, real,", "dmd_gradient(x, real, fake,"),
        uncounted_frames_counted=("mask=step.counted_frames(x))", "mask=None)"),
    ),
    *mutants(
        "streamvid/objectives/diagonal.py",
        "tests/objectives/test_closed_forms.py",
        frame_weights_exchanged=(
            "0.7 * accumulated / accumulated.mean(1, keepdim=True) + 0.3 *",
            "0.3 * accumulated / accumulated.mean(1, keepdim=True) + 0.7 *",
        ),
    ),
    *mutants(
        "streamvid/rollout/noise.py",
        "tests/rollout/test_noise.py",
        noise_without_its_chunk=('"rollout", seed, chunk, event)', '"rollout", seed, 0, event)'),
        noise_without_its_sample=(
            "for seed in self.seeds]",
            "for seed in self.seeds[:1] * len(self.seeds)]",
        ),
    ),
    *mutants(
        "streamvid/models/kv_cache.py",
        "tests/models/test_kv_cache.py",
        kv_window_one_too_long=(
            "self.sink_frames - num_frames\n        committed",
            "self.sink_frames - num_frames + 1\n        committed",
        ),
        kv_evicts_the_sink=(
            "*range(committed - stored + self.sink_frames, committed))",
            "*range(committed - stored, committed))",
        ),
        kv_sink_moves=("i if i < self.sink_frames else i - shift", "i - shift"),
        kv_keeps_a_stale_context=(
            "self.window_frames)\n        self._context, self._passed = None, 0",
            "self.window_frames)\n        self._passed = 0",
        ),
        kv_rewinds_with_a_stale_context=(
            "if gap else self.sink_frames\n        self._context, self._passed = None, 0",
            "if gap else self.sink_frames\n        self._passed = 0",
        ),
        kv_text_of_a_changed_prompt=("or self._text[1] != _version(prompt)", "or False"),
    ),
    *mutants(
        "streamvid/models/kv_store.py",
        "tests/models/test_kv_cache.py",
        kv_turns_the_sink_away=("rotary_table((shift,)", "rotary_table((-shift,)"),
        kv_turns_no_sink=("if shift and piece.stop <= num_sink:", "if False:"),
        kv_ring_turns_the_sink_on_and_on=(
            "turned_by(key, shift)\n        self._shift",
            "turned_by(pair[0][:, :num_sink], shift)\n        self._shift",
        ),
        kv_shows_its_own_frames_elsewhere=(
            "[starts[run.place] + i for run",
            "[starts[run.place] for run",
        ),
        kv_copies_share_a_ring=(
            "pair and (pair[0].clone(), pair[1].clone())",
            "pair",
        ),
    ),
    *mutants(
        "streamvid/models/attention.py",
        "tests/models/test_attention.py",
        causal_one_chunk_late=(
            "((0, context_tokens + (c + 1) * chunk_tokens),)",
            "((0, context_tokens + c * chunk_tokens + 1),)",
        ),
        sees_its_own_clean_chunk=("((0, start), own)", "((0, start + chunk_tokens), own)"),
        products_with_scores_unscaled=("q * head_size**-0.5", "q * head_size**0.5"),
        products_see_what_is_hidden=("~mask[heads, some]", "mask[heads, some]"),
    ),
    *mutants(
        "streamvid/models/linear.py",
        "tests/students/test_engine.py",
        packed_weight_of_before=("or self._packed_key != key", "or False"),
        gelu_without_its_tanh=('bias, "gelu", [], "tanh")', 'bias, "none", [], "")'),
    ),
    *mutants(
        "streamvid/codecs/text.py",
        "tests/codecs/test_text.py",
        embeddings_exchanged=("self._pass(texts)):", "self._pass(texts[::-1])):"),
        last_prompts_left_out=("        if missing:\n", "        if not missing:\n"),
    ),
    *mutants(
        "streamvid/models/rope.py",
        "tests/models/test_rope.py",
        rope_turns_too_slowly=("THETA ** -(", "THETA ** -2 ** ("),
        rope_axes_exchanged=(
            "torch.cat([rows, columns], dim=-1)",
            "torch.cat([columns, rows], dim=-1)",
        ),
    ),
    *mutants(
        "streamvid/models/step_labels.py",
        "tests/models/test_step_labels.py",
        label_subtracted=("embedding + network.step_labels", "embedding - network.step_labels"),
    ),
    *mutants(
        "streamvid/training/ema.py",
        "tests/training/test_optimizers_and_ema.py",
        ema_keeps_the_other_share=("weights, 1 - self.decay_at", "weights, self.decay_at"),
        ema_starts_late=("if since_start < 0:", "if since_start <= 0:"),
        ema_warms_up_twice_as_fast=(
            "(1 + since_start) / (10 + since_start)",
            "(1 + 2 * since_start) / (10 + since_start)",
        ),
        ema_counts_no_update=("self.updates += 1", "self.updates += 0"),
        ema_stays_in_place=("self._put(own)", "self._put(self.shadow)"),
    ),
    *mutants(
        "streamvid/training/optimizers.py",
        "tests/training/test_optimizers_and_ema.py",
        warm_up_begins_at_zero=(
            "(update + 1) / config.warmup_steps",
            "update / config.warmup_steps",
        ),
        cosine_without_its_half=("* 0.5 * (1 + math.cos", "* (1 + math.cos"),
        decay_of_vectors=(
            '{"params": vectors, "weight_decay": 0.0}',
            '{"params": vectors, "weight_decay": config.weight_decay}',
        ),
    ),
    *mutants(
        "streamvid/training/metrics.py",
        "tests/training/test_room_and_metrics.py::test_a_damaged_line_of_metrics_is_dropped_alone",
        "tests/training/test_room_and_metrics.py::"
        "test_a_maximum_is_one_over_steps_passes_and_processes_however_they_are_divided",
        least_for_most=("or value > sums[name]", "or value < sums[name]"),
        sum_for_mean=("sums[name] / counts[name] for name in sums", "sums[name] for name in sums"),
        line_of_the_step_trimmed=('line["step"] <= step', 'line["step"] < step'),
        not_a_number_in_json=("value if math.isfinite(value) else None", "value"),
    ),
    *mutants(
        "streamvid/training/trainer.py",
        "tests/training/test_trainer.py::test_accumulation_equals_a_larger_batch",
        "tests/training/test_trainer.py::test_a_turn_leaves_gradients_only_where_it_updates",
        passes_added_and_not_averaged=(
            "loss = loss / learner.config.accumulate",
            "loss = loss / 1",
        ),
        passes_of_the_same_samples=("first = (part * processes +", "first = (0 * processes +"),
        every_turn_moves_every_network=(
            "self._require_gradients_of([turn])",
            "self._require_gradients_of(self.learners)",
        ),
    ),
    *mutants(
        "streamvid/serving/planning.py",
        "tests/serving/test_planned.py",
        planned_change_a_chunk_early=(
            "if message.at == chunk]",
            "if message.at == chunk + 1]",
        ),
        planned_change_forgotten=("    stream.planned.append(message)\n", ""),
        planned_bookmark_after_the_change=("message: not isinstance(", "message: isinstance("),
        change_of_a_chunk_that_is_made=("if message.at < chunk:", "if message.at < chunk - 1:"),
    ),
    *mutants(
        "streamvid/bench/comparators.py",
        "tests/bench/test_comparators.py",
        buffers_roll_by_too_little=(
            "out = in_buffer + tokens - self.capacity",
            "out = in_buffer + tokens - self.capacity - 1",
        ),
        context_as_noisy_as_the_chunk=("level[:, -frames:] = 1000 * t", "level[:] = 1000 * t"),
        keys_at_the_start_of_the_stream=(
            "self.turn(k, start).flatten(1, 2)",
            "self.turn(k, 0).flatten(1, 2)",
        ),
    ),
    *mutants(
        "streamvid/bench/suite.py",
        "tests/bench/test_suite.py",
        ratio_inverted=("median / reference,", "reference / median,"),
    ),
    *mutants(
        "streamvid/metering.py",
        "tests/test_metering.py",
        results_of_other_numbers=("return type(x), x  #", "return x  #"),
    ),
    *mutants(
        "streamvid/serving/worker.py",
        "tests/serving/test_fairness.py",
        first_viewer_first=(
            "min(due, key=lambda stream: stream.deadline(now), default=None)",
            "due[0] if due else None",
        ),
        who_asks_is_served=(
            "most_urgent(self._dues(now), now) is streams[0]",
            "streams[0] in self._dues(now)",
        ),
        commands_before_all=("and not (self._heard_last and first is not None)", ""),
    ),
    *mutants(
        "streamvid/serving/worker.py",
        "tests/serving/test_faults.py::test_a_crowd_that_comes_within_one_chunk_does_not_overflow_the_queue",
        queue_without_end=(
            "len(self._live.active) + len(self._waiting) >= places",
            "len(self._live.active) >= places",
        ),
    ),
    *mutants(
        "streamvid/serving/steering.py",
        "tests/serving/test_faults.py::test_a_recording_that_is_deleted_while_it_runs_leaves_no_file",
        deleted_recording_kept=("if clip.cancelled and not error:", "if False:"),
    ),
    *mutants(
        "streamvid/serving/realtime.py",
        "tests/serving/test_faults.py::test_refusals_without_end_close_the_connection",
        refused_for_ever=("if not self._errors.take():", "if False:"),
    ),
    *mutants(
        "streamvid/serving/server.py",
        "tests/serving/test_faults.py::test_a_slow_viewer_still_learns_that_the_server_stops",
        "tests/serving/test_faults.py::test_connections_of_one_address_are_limited_and_counted_down",
        closed_before_goodbye=("while app.state.streams and", "while False and"),
        connections_stay_counted=("        counter[key] -= 1\n", ""),
    ),
    *mutants(
        "streamvid/serving/guard.py",
        "tests/serving/test_http.py::test_host_origin_and_size",
        "tests/serving/test_http.py::test_what_is_not_the_token_is_refused",
        "tests/serving/test_http.py::test_a_token_does_not_open_the_server_to_pages_of_other_sites",
        origin_of_anyone=("origin is not None and urlsplit_netloc", "False and urlsplit_netloc"),
        any_token=(
            'hmac.compare_digest(given.encode("utf-8", "replace"), self._token.encode())',
            "bool(given)",
        ),
    ),
    *mutants(
        "streamvid/serving/load.py",
        "tests/serving/test_load.py",
        stall_does_not_move_what_follows=("            origin_s += late_s.max()\n", ""),
        late_is_in_time=("(late_s <= 0) &", "(late_s >= 0) &"),
        buffer_of_the_past=("arrivals_s[0] + buffer_s", "arrivals_s[0] - buffer_s"),
    ),
    *mutants(
        "streamvid/serving/pacing.py",
        "tests/serving/test_fairness.py",
        newcomer_waits_for_ever=("return self._waits_since", "return now"),
    ),
    *(Mutant(*row) for row in MUTANTS_OF_OBJECTIVES),
]


def check_row(mutant: Mutant, root: Path = ROOT) -> None:
    """Raise ValueError unless a row fits the files, SyntaxError if its error is one."""
    file = root / mutant.file
    if not file.is_file():
        raise ValueError(f"{mutant.name}: there is no {mutant.file}")
    count = file.read_text().count(mutant.old)
    if count != 1:
        raise ValueError(f"{mutant.name}: {mutant.old!r} occurs {count} times in {mutant.file}")
    compile(file.read_text().replace(mutant.old, mutant.new), mutant.file, "exec")
    for test in files_of(mutant.tests):
        if not (root / test.partition("::")[0]).is_file():
            raise ValueError(f"{mutant.name}: there is no {test}")


def files_of(tests: tuple[str, ...]) -> list[str]:
    """pytest's arguments without ``-k`` and what follows it."""
    return [test for before, test in zip(("", *tests), tests) if "-k" not in (before, test)]


class Failures:
    """A plugin of pytest that keeps the names of tests that failed.

    A file that can't be imported, a fixture that can't be made and a name that does not exist are
    no failures of a test.
    """

    def __init__(self) -> None:
        self.tests: list[str] = []

    def pytest_exception_interact(self, node: Any, call: Any, report: Any) -> None:
        """Called with a failed test, fixture or import."""
        is_test = getattr(report, "when", "collect") == "call"
        if is_test and not call.excinfo.errisinstance(NameError):
            self.tests.append(node.nodeid)


def import_libraries() -> None:
    """What takes longest to import, so that a forked process need not; nothing of the package."""
    import hypothesis  # noqa: F401
    import omegaconf  # noqa: F401
    import pytest  # noqa: F401
    import torch
    from diffusers import AutoencoderKLWan, WanTransformer3DModel  # noqa: F401

    torch.set_num_threads(1)


def run_tests(copy: Path, *arguments: str) -> tuple[int, list[str]]:
    """pytest's exit status in the copy, in a forked process, and the tests that failed."""
    failed = copy / FAILED
    failed.unlink(missing_ok=True)
    child = os.fork()
    if child:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return status, failed.read_text().splitlines() if failed.exists() else []
    status = 3  # pytest's own for an internal error
    try:
        log = os.open(copy / LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for descriptor in (1, 2):
            os.dup2(log, descriptor)
        os.chdir(copy)
        sys.path.insert(0, str(copy))
        for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
            del sys.modules[name]  # the copy's stands in for it
        os.environ["PYTHONPATH"] = str(copy)  # of processes that tests start
        # a mutant of the same size and second would be taken for what it replaces
        sys.dont_write_bytecode = True
        import pytest

        failures = Failures()
        options = ("-q", "-p", "no:cacheprovider")
        status = pytest.main([*options, *arguments], plugins=[failures])
        failed.write_text("\n".join(failures.tests))
    finally:
        os._exit(status)


def plant(copy: Path, mutant: Mutant) -> tuple[str, str]:
    """The verdict on an error, planted in the copy, which is put right again; and the test."""
    file = copy / mutant.file
    text = file.read_text()
    try:
        file.write_text(text.replace(mutant.old, mutant.new))
        status, failed = run_tests(copy, "-x", *mutant.tests)
    finally:
        file.write_text(text)
    if failed:
        return "killed", failed[0]
    return ("survived" if status == 0 else "broken"), ""


def copy_package(folder: Path) -> None:
    """Copy to ``folder`` what the tests need."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder / name)


def plant_all(chosen: list[Mutant]) -> Counter[str]:
    """Plant each error, print what came of it, and count: killed, survived, or broken.

    Raises:
        ValueError: if a row does not fit the files, or a test that noticed fails without an error.
    """
    for mutant in chosen:
        check_row(mutant)
    import_libraries()
    verdicts: Counter[str] = Counter()
    noticed: set[str] = set()  # by which tests
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name)
        copy_package(copy)
        for mutant in chosen:
            began = time.monotonic()
            verdict, test = plant(copy, mutant)
            seconds = time.monotonic() - began
            print(f"{verdict:9s} {seconds:5.1f} s  {mutant.name}  {test}", flush=True)
            if verdict == "broken":
                print(f"{mutant.name}:\n{(copy / LOG).read_text()[-3000:]}", file=sys.stderr)
            verdicts[verdict] += 1
            noticed |= {test} - {""}
        status, failed = run_tests(copy, *sorted(noticed)) if noticed else (0, [])
        if status != 0:
            raise ValueError(
                f"{failed} fail without an error:\n" + (copy / LOG).read_text()[-3000:]
            )
    return verdicts


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutations",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", action="append", metavar="NAME", help="part of a name or a file")
    parser.add_argument("--list", action="store_true", help="print the names, and stop")
    args = parser.parse_args(argv)
    chosen = [
        mutant
        for mutant in MUTANTS
        if not args.only or any(part in f"{mutant.file} {mutant.name}" for part in args.only)
    ]
    if not chosen:
        parser.error(f"--only {args.only}: no such name; see --list")
    if args.list:
        print("\n".join(f"{mutant.file}  {mutant.name}" for mutant in chosen))
        return 0
    try:
        verdicts = plant_all(chosen)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(", ".join(f"{count} {verdict}" for verdict, count in verdicts.items()))
    return 0 if set(verdicts) == {"killed"} else 1


if __name__ == "__main__":
    sys.exit(main())
