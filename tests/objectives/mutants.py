"""Errors in objectives and the plane, each of which, planted alone, a test must notice.

A row: name, file, text that occurs once in it, what to write in its place, and pytest's arguments
for tests that take seconds. ``python -m tests.mutations`` plants them with all others.
"""

DIRECTIONS = "tests/objectives/test_directions.py"
OBJECTIVES = "tests/objectives/test_objectives.py"
SCORE = "streamvid/objectives/score.py"
FLOWMAP = "streamvid/objectives/flowmap.py"
ADVERSARIAL = "streamvid/objectives/adversarial.py"
PREFERENCES = "streamvid/objectives/preferences.py"
BASE = "streamvid/objectives/base.py"
PLANE = "streamvid/settings/plane.py"


def of(objective: str) -> tuple[str, ...]:
    """The tests of directions of an objective."""
    return DIRECTIONS, "-k", objective


MUTANTS: list[tuple[str, str, str, str, tuple[str, ...]]] = [
    # ---- score differences
    (
        "emd_score_difference_upside_down",
        SCORE,
        "d = a / b**2 * (real - fake)",
        "d = a / b**2 * (fake - real)",
        of("emd"),
    ),
    (
        "emd_regresses_away",
        SCORE,
        "direction = -b / a * led",
        "direction = b / a * led",
        of("emd"),
    ),
    (
        "emd_pulls_z_back",
        SCORE,
        "z = (1 - gamma_z) * z + gamma_z * pull",
        "z = (1 - gamma_z) * z - gamma_z * pull",
        of("emd"),
    ),
    (
        "emd_forgets_the_pull_on_z",
        SCORE,
        "z = (1 - gamma_z) * z + gamma_z * pull",
        "z = (1 - gamma_z) * z",
        of("emd"),
    ),
    (
        "twinflow_rectifies_towards_the_fake_flow",
        SCORE,
        "gap = (u(x_t, -t, -t) - u(x_t, t, t)).clamp(-1, 1)",
        "gap = (u(x_t, t, t) - u(x_t, -t, -t)).clamp(-1, 1)",
        of("twinflow"),
    ),
    (
        "twinflow_fits_the_fake_flow_to_its_negative",
        SCORE,
        "fake = distance(u(add_noise(x, eps, t), -t, -t), velocity(x, eps)).mean()",
        "fake = distance(u(add_noise(x, eps, t), -t, -t), velocity(eps, x)).mean()",
        of("twinflow"),
    ),
    (
        "twinflow_secant_goes_back",
        SCORE,
        "near = euler_step(x_t, v, t, t - short)",
        "near = euler_step(x_t, -v, t, t - short)",
        of("twinflow"),
    ),
    (
        "sida_game_upside_down",
        SCORE,
        "return 0.5 * (identity + self.gan",
        "return 0.5 * (identity - self.gan",
        of("sida"),
    ),
    (
        "gndm_without_groups",
        SCORE,
        'normalizer="group")',
        'normalizer="sample")',
        of("gndm"),
    ),
    (
        "tdm_without_its_interval",
        SCORE,
        "low = max(step.step_time(sample.index + 1), self.low)",
        "low = self.low",
        of("tdm"),
    ),
    (
        "tdm_above_its_step",
        SCORE,
        "high = sample.t.clamp(max=self.high)",
        "high = sample.t.clamp(min=self.high, max=self.high)",
        of("tdm"),
    ),
    (
        "swiftbrush_weight_loses_a_factor",
        SCORE,
        "weight = t * (1 - t) / (t**2 + (1 - t) ** 2)",
        "weight = t**2 / (t**2 + (1 - t) ** 2)",
        of("swiftbrush"),
    ),
    (
        "swiftbrush_weight_negative",
        SCORE,
        "weight = t * (1 - t) / (t**2 + (1 - t) ** 2)",
        "weight = t * (t - 1) / (t**2 + (1 - t) ** 2)",
        of("swiftbrush"),
    ),
    (
        "swiftbrush_fit_unweighted",
        SCORE,
        'return fit_fake_score(step, weight=lambda t: loss_weight("swiftbrush", t))',
        "return fit_fake_score(step)",
        of("swiftbrush"),
    ),
    (
        "swiftbrush_guides_the_teacher_only",
        SCORE,
        "return specs.vsd(self.guidance_scale)",
        "return specs.dmd(self.guidance_scale)",
        of("swiftbrush"),
    ),
    (
        "sid_lsg_fits_an_unguided_score",
        SCORE,
        "return specs.long_short(self.guidance_scale)",
        "return specs.vsd(self.guidance_scale)",
        of("sid_lsg"),
    ),
    (
        "dmd2_game_upside_down",
        SCORE,
        "return dmd_term(step, x) + self.gan * gan_term(step, x)",
        "return dmd_term(step, x) - self.gan * gan_term(step, x)",
        of("dmd2"),
    ),
    (
        "game_told_the_wrong_side",
        SCORE,
        "return discriminator_loss(kind, fake_logits, real_logits)",
        "return discriminator_loss(kind, real_logits, fake_logits)",
        of("dmd2"),
    ),
    (
        "uni_dad_leaves_its_second_teacher",
        SCORE,
        "self.source * to_source + self.target * to_target",
        "self.source * to_source - self.target * to_target",
        of("uni_dad"),
    ),
    (
        "add_residual_upside_down",
        SCORE,
        "return game + self.residual * residual",
        "return game - self.residual * residual",
        of("add"),
    ),
    (
        "msd_warm_up_from_the_wrong_time",
        SCORE,
        "return distance(step.flow_map()(x_t, t, t), v).mean()",
        "return distance(step.flow_map()(x_t, 1 - t, 1 - t), v).mean()",
        of("msd"),
    ),
    # ---- adversaries
    (
        "adm_step_upside_down",
        ADVERSARIAL,
        "real, fake = euler_pair(",
        "fake, real = euler_pair(",
        of("adm"),
    ),
    (
        "adm_student_plays_for_the_other_side",
        ADVERSARIAL,
        'return generator_loss("hinge", step.logits(fake, t))',
        'return -generator_loss("hinge", step.logits(fake, t))',
        of("adm"),
    ),
    (
        "adm_discriminator_told_the_wrong_side",
        ADVERSARIAL,
        'return discriminator_loss("hinge", step.logits(fake, t), step.logits(real, t))',
        'return discriminator_loss("hinge", step.logits(real, t), step.logits(fake, t))',
        of("adm"),
    ),
    (
        "tad_sr_difference_upside_down",
        ADVERSARIAL,
        "teacher_change(step, x, eps, t) - teacher_change(step, real, eps, t)",
        "teacher_change(step, real, eps, t) - teacher_change(step, x, eps, t)",
        of("tad_sr"),
    ),
    (
        "tad_sr_change_upside_down",
        ADVERSARIAL,
        "return x - x0_from_v(x_t, step.real(x_t, t), t)",
        "return x0_from_v(x_t, step.real(x_t, t), t) - x",
        of("tad_sr"),
    ),
    (
        "two_sets_told_apart_the_wrong_way",
        ADVERSARIAL,
        "return discriminator_loss(kind, fake_logits, real_logits)",
        "return discriminator_loss(kind, real_logits, fake_logits)",
        of("ladd"),
    ),
    (
        "asd_student_plays_for_the_other_side",
        "streamvid/objectives/asd.py",
        'adversarial = generator_loss("paired", logits, better_logits)',
        'adversarial = -generator_loss("paired", logits, better_logits)',
        of("asd"),
    ),
    (
        "asd_discriminator_told_the_wrong_side",
        "streamvid/objectives/asd.py",
        'discriminator_loss("paired", logits["worse"], logits["better"])',
        'discriminator_loss("paired", logits["better"], logits["worse"])',
        of("asd"),
    ),
    (
        "afd_advantages_upside_down",
        "streamvid/objectives/afd.py",
        "r = optimality(advantages, self.advantage_clip)",
        "r = optimality(-advantages, self.advantage_clip)",
        of("afd"),
    ),
    (
        "afd_discriminator_told_the_wrong_side",
        "streamvid/objectives/afd.py",
        'adversarial = discriminator_loss("paired", fake_logits, real_logits)',
        'adversarial = discriminator_loss("paired", real_logits, fake_logits)',
        of("afd"),
    ),
    (
        "afd_learns_from_unguided_points",
        PLANE,
        "return self.lab.pairs(self.cond, self.rng)[1]",
        "return self.data()",
        ("tests/settings/test_plane.py::test_afd_learns_from_the_guided_teachers_samples",),
    ),
    (
        "afd_gan_plays_for_the_other_side",
        "streamvid/objectives/afd.py",
        'loss = generator_loss("paired", logits, real_logits)',
        'loss = generator_loss("paired", -logits, -real_logits)',
        of("afd"),
    ),
    (
        "afd_old_policy_on_the_wrong_side",
        "streamvid/objectives/afd.py",
        "nft = nft_loss(chunks.v, v_old, chunks.v_target, weight,",
        "nft = nft_loss(chunks.v, v_old, chunks.v_target, 1 - weight,",
        of("afd"),
    ),
    # ---- flow maps
    (
        "pair_taught_upwards",
        FLOWMAP,
        "return Pair(x_t, t, teacher_steps(step.real, x_t, t, r, num_teacher_steps), r)",
        "return Pair(x_t, t, teacher_steps(step.real, x_t, r, t, num_teacher_steps), r)",
        of("cd"),
    ),
    (
        "pair_target_not_at_its_time",
        FLOWMAP,
        "pair.x_t, pair.t, pair.x_r, pair.r, s\n",
        "pair.x_t, pair.t, pair.x_r, pair.t, s\n",
        of("cd"),
    ),
    (
        "ctm_velocity_upside_down",
        FLOWMAP,
        "trajectory = distance(landed, aim).mean() + self.matching * denoise",
        "trajectory = distance(landed, aim).mean() - self.matching * denoise",
        of("ctm"),
    ),
    (
        "slam_point_at_the_wrong_time",
        FLOWMAP,
        "Pair(between / size, (sigma / size).flatten(), pair.x_r, pair.r)",
        "Pair(between / size, pair.t, pair.x_r, pair.r)",
        of("slam"),
    ),
    (
        "boot_edge_dropped",
        FLOWMAP,
        "return follow + self.boundary * edge",
        "return follow - self.boundary * edge",
        of("boot"),
    ),
    (
        "tangent_along_the_wrong_way",
        FLOWMAP,
        "total_derivative(u, x_t, t, s, v, step.tangent, step.difference)",
        "total_derivative(u, x_t, t, s, -v, step.tangent, step.difference)",
        of("scm"),
    ),
    (
        "arcflow_window_upside_down",
        FLOWMAP,
        "secant_velocity(start, end, a, b)",
        "secant_velocity(end, start, a, b)",
        of("arcflow"),
    ),
    (
        "traflow_middle_at_the_wrong_time",
        FLOWMAP,
        "over = euler_step(middle, u(middle, s, zero), s, zero)",
        "over = euler_step(middle, u(middle, t, zero), s, zero)",
        of("traflow"),
    ),
    (
        "accvideo_game_upside_down",
        FLOWMAP,
        "secant_velocity(x_t, x_s, t, s)).mean() + self.gan * game",
        "secant_velocity(x_t, x_s, t, s)).mean() - self.gan * game",
        of("accvideo"),
    ),
    # ---- preferences
    (
        "pso_prefers_the_worse",
        PREFERENCES,
        "is_better = rewards[0] > rewards[1]",
        "is_better = rewards[0] < rewards[1]",
        of("pso"),
    ),
    (
        "pso_against_the_student",
        PREFERENCES,
        "pairwise(winner, loser,",
        "pairwise(loser, winner,",
        of("pso"),
    ),
    (
        "dpo_winners_and_losers_exchanged",
        PREFERENCES,
        "return winners + flow_matching_loss(step.second_velocity(x_t, t), x, eps, mask=1 - won)",
        "return winners - flow_matching_loss(step.fake_velocity(x_t, t), x, eps, mask=1 - won)",
        of("distillation_dpo"),
    ),
    (
        "rdd_relations_upside_down",
        PREFERENCES,
        "+ self.relation * alike",
        "- self.relation * alike",
        of("rdd"),
    ),
    (
        "embedding_features_upside_down",
        PREFERENCES,
        "total = total + self.weight",
        "total = total - self.weight",
        of("embedding_loss"),
    ),
    # ---- what all use
    (
        "fake_score_fitted_to_its_negative",
        BASE,
        "return flow_matching_loss(v, x, eps,",
        "return flow_matching_loss(-v, x, eps,",
        of("dmd"),
    ),
    (
        "renoised_to_the_level_it_came_from",
        PLANE,
        "x_t = renoise_step(x, self.noise(), self.step_time(index + 1, of))",
        "x_t = renoise_step(x, self.noise(), self.step_time(index, of))",
        (OBJECTIVES, "-k", "renoises"),
    ),
    (
        "steps_begin_one_late",
        PLANE,
        "return 1 - index / count",
        "return 1 - (index + 1) / count",
        (OBJECTIVES, "-k", "backward_simulation"),
    ),
    (
        "fake_score_pulls_the_student",
        PLANE,
        'couple(fake_score.parameters(), self.lab.parameters("student"), keep)',
        'couple(self.lab.parameters("student"), fake_score.parameters(), keep)',
        (OBJECTIVES, "-k", "flash_dmd_pulls"),
    ),
]
