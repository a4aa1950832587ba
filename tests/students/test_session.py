"""Live streams: what nobody steers is the sampler's stream, what is steered is what a rollout by
hand gives, and what is kept goes on, all of it bit for bit.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from streamvid.codecs.load import open_codec
from streamvid.codecs.taehv import AutoencoderTAEHV
from streamvid.codecs.text import PromptEncoder
from streamvid.codecs.wan_vae import StreamingAutoencoderKLWan
from streamvid.core.times import step_times
from streamvid.models.causal_wan import CausalWanTransformer3DModel
from streamvid.rollout.loop import rollout
from streamvid.rollout.noise import KeyedNoise
from streamvid.rollout.sampler import new_cache, stream
from streamvid.rollout.schedule import StreamConfig, table
from streamvid.students import session as session_module
from streamvid.students.batch import run_alone
from streamvid.students.contexts import digest_frames
from streamvid.students.folder import TINY_STUDENT, TINY_TEACHER, Student, load_student
from streamvid.students.pipeline import StreamVidPipeline
from streamvid.students.play import play_script
from streamvid.students.rate import RateHolder
from streamvid.students.script import MODES, Change, Script
from streamvid.students.session import Session, SessionClosed
from streamvid.students.stream_state import mix

A, B = "a small red circle moves up quickly", "a large blue square moves left slowly"
SIZE = {"height": 32, "width": 32}
LATENT = (16, 4, 4)
CONFIGS = {
    "sink": StreamConfig(
        num_steps=2, chunk_frames=2, window_frames=6, sink_frames=1, positions="window"
    ),
    "noisy context": StreamConfig(num_steps=2, first_steps=3, chunk_frames=2, context_t=0.1),
    "reuse": StreamConfig(
        step_table=((1.0, 0.9, 0.4), (1.0, 0.4)), chunk_frames=2, window_frames=5, commit="reuse"
    ),
}


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)
    transformer = CausalWanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        ffn_dim=32,
        num_layers=2,
        text_dim=64,
        freq_dim=16,
    )
    for name, parameter in transformer.named_parameters():
        if "attn2" in name and name.endswith("weight") and parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.5)  # so that prompts show
    codec = open_codec(TINY_TEACHER)
    return transformer.eval(), codec, PromptEncoder.from_pretrained(TINY_TEACHER)


@pytest.fixture(params=CONFIGS, ids=str)
def student(request, parts):
    return Student(parts[0], CONFIGS[request.param], *parts[1:])


@pytest.fixture
def plain(parts):
    """The student whose window is full after three chunks."""
    return Student(parts[0], CONFIGS["sink"], *parts[1:])


def begin(student, prompt=A, seed=3, **options):
    return Session(student, prompt, seed=seed, **SIZE, **options)


def make(session, num):
    return [session.next_chunk() for _ in range(num)]


def assert_same(chunks, others):
    assert len(chunks) == len(others)
    for ours, theirs in zip(chunks, others):
        assert torch.equal(ours.latents, theirs.latents)
        assert torch.equal(ours.frames, theirs.frames)


def differs(chunks, others):
    return not any(torch.equal(a.latents, b.latents) for a, b in zip(chunks, others, strict=True))


def times_at(config, chunk):
    if config.step_table:
        return config.step_table[min(chunk, len(config.step_table) - 1)]
    return step_times(config.first_steps or 2 if chunk == 0 else 2, config.shift)


def by_hand(student, passes, cache=None, first=0):
    """Latents of chunks, each made by a rollout of its own: (embedding, seed, times) of each."""
    config = student.stream
    cache = cache or new_cache(student.transformer, config, 1, LATENT)
    latents = []
    for chunk, (cond, seed, times) in enumerate(passes, first):
        events = [replace(event, chunks=(chunk,)) for event in table([times], 1)]
        with torch.no_grad():
            (result,) = rollout(
                student.transformer,
                cond,
                events,
                KeyedNoise([seed]),
                latent_shape=LATENT,
                chunk_frames=config.chunk_frames,
                cache=cache,
                commit=config.commit,
                context_t=config.context_t,
                commit_last=True,
            )
        latents.append(result.latents)
    return latents


def encode(student, *prompts):
    return [student.prompts.encode([prompt]) for prompt in prompts]


def assert_latents(chunks, latents):
    assert [torch.equal(chunk.latents, x) for chunk, x in zip(chunks, latents, strict=True)] == [
        True
    ] * len(chunks)


# ---- unsteered -----------------------------------------------------------------------------------


def test_a_stream_that_nobody_steers_is_the_samplers(student):
    (cond,) = encode(student, A)
    chunks = stream(student.transformer, student.codec, cond, student.stream, seeds=[3], **SIZE)
    ours = make(begin(student), 5)
    assert_same(ours, [chunk for chunk, _ in zip(chunks, range(5))])
    assert [chunk.index for chunk in ours] == [0, 1, 2, 3, 4]
    assert ours[1].images.shape == (8, 32, 32, 3)


def test_the_shipped_student_too():
    student = load_student(TINY_STUDENT)
    (cond,) = encode(student, A)
    size = {"height": 64, "width": 64}
    chunks = stream(student.transformer, student.codec, cond, student.stream, seeds=[7], **size)
    session = Session(student, A, seed=7, **size)
    assert_same(make(session, 5), [chunk for chunk, _ in zip(chunks, range(5))])


def test_a_pipelines_session_is_its_stream(plain):
    encoder = plain.prompts
    pipe = StreamVidPipeline(
        plain.transformer, plain.codec, encoder.text_encoder, encoder.tokenizer, plain.stream
    )
    clips = pipe.stream(A, generator=3, **SIZE, output_type="pt")
    session = pipe.session(A, seed=3, **SIZE)
    for clip, chunk in zip(clips, make(session, 3)):
        assert torch.equal(clip, chunk.frames)
    with pytest.raises(ValueError, match="text encoder"):
        StreamVidPipeline(plain.transformer, plain.codec).session(A, **SIZE)


# ---- what is steered -----------------------------------------------------------------------------


def test_a_cut_gives_later_passes_the_new_prompt_and_nothing_else(student):
    a, b = encode(student, A, B)
    session = begin(student)
    chunks = make(session, 3)
    session.switch_prompt(B, "cut")
    chunks += make(session, 2)
    passes = [(a if k < 3 else b, 3, times_at(student.stream, k)) for k in range(5)]
    assert_latents(chunks, by_hand(student, passes))
    assert [chunk.prompt for chunk in chunks] == [A, A, A, B, B]


@pytest.mark.parametrize("interpolation", ["linear", "spherical"])
def test_a_blend_moves_the_embedding_over_its_chunks(plain, interpolation):
    a, b = encode(plain, A, B)
    session = begin(plain)
    chunks = make(session, 2)
    session.switch_prompt(B, "blend", blend_chunks=3, interpolation=interpolation)
    chunks += make(session, 4)
    way = [a, a, *(mix(a, b, k / 3, interpolation) for k in (1, 2)), b, b]
    passes = [(cond, 3, times_at(plain.stream, 1)) for cond in way]
    assert_latents(chunks, by_hand(plain, passes))


def test_a_blend_of_one_chunk_is_a_cut_and_one_in_a_blend_starts_where_that_is(plain):
    blend, cut = begin(plain), begin(plain)
    make(blend, 1), make(cut, 1)
    blend.switch_prompt(B, "blend", blend_chunks=1)
    cut.switch_prompt(B, "cut")
    assert_same(make(blend, 2), make(cut, 2))
    a, b = encode(plain, A, B)
    session = begin(plain)
    session.switch_prompt(B, "blend", blend_chunks=4)
    chunks = make(session, 1)
    session.switch_prompt(A, "blend", blend_chunks=2)
    chunks += make(session, 2)
    half = mix(a, b, 0.5, "linear")  # where the second chunk would have been
    way = [mix(a, b, 0.25, "linear"), mix(half, a, 0.5, "linear"), a]
    assert_latents(chunks, by_hand(plain, [(x, 3, times_at(plain.stream, 1)) for x in way]))


def test_a_mix_is_straight_or_along_the_arc():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(1, 3, 8, generator=generator) for _ in range(2))
    a[:, 2] = b[:, 2] = 0  # padding
    assert torch.allclose(mix(a, b, 0.25, "linear"), 0.75 * a + 0.25 * b)
    arc = mix(a, b, 0.25, "spherical")
    length = 0.75 * a.norm(dim=-1) + 0.25 * b.norm(dim=-1)
    assert torch.allclose(arc.norm(dim=-1), length, atol=1e-5)
    angle = lambda x, y: torch.acos(torch.cosine_similarity(x, y, dim=-1))[:, :2]
    assert torch.allclose(angle(a, arc), 0.25 * angle(a, b), atol=1e-3)
    assert torch.equal(mix(a, a, 0.3, "spherical"), mix(a, a, 0.3, "linear"))


def test_a_recache_under_the_same_prompt_changes_nothing_while_the_window_holds_all(student):
    """The whole stream is committed again, at its places: a wrong order, position, noise or level
    of the context would show.
    """
    for keep_sink in (True, False):
        session, other = begin(student), begin(student)
        make(session, 2), make(other, 2)
        session.switch_prompt(A, "recache", keep_sink=keep_sink)
        assert_same(make(session, 3), make(other, 3))


def test_a_recache_commits_the_window_again_under_the_new_prompt(plain):
    """Against a cache that had the new prompt from the beginning, over the same latents."""
    a, b = encode(plain, A, B)
    session = begin(plain)
    chunks = make(session, 2)
    session.switch_prompt(B, "recache", keep_sink=False)
    cache = new_cache(plain.transformer, plain.stream, 1, LATENT)
    for chunk in chunks:
        plain.transformer.commit(chunk.latents, torch.zeros(1), b, cache)
    expected = by_hand(plain, [(b, 3, times_at(plain.stream, 2))], cache, first=2)
    assert_latents(make(session, 1), expected)


def layer_names(cache) -> list[str]:
    """Of the keys and values in its state."""
    return [name for name, x in cache.state().items() if x.ndim == 5]


@pytest.mark.parametrize("keep_sink", [True, False])
def test_a_recache_of_a_long_stream_rewrites_what_the_window_sees(plain, keep_sink):
    """The sink is kept or rewritten, the frames between are gone, the recent ones are those that
    passes over them alone give.
    """
    a, b = encode(plain, A, B)
    session = begin(plain)
    first = make(session, 7)[0]
    session._commit_pending()
    before, recent = session._cache, session._state.contexts[1:]
    assert before.stored_frames() == (0, 9, 10, 11, 12, 13) and len(recent) == 3
    session.switch_prompt(B, "recache", keep_sink=keep_sink)
    session._queued = session._queued.with_defaults()
    _, after = run_alone(session._changed(session._state, session._queued))
    assert after.num_committed_frames == 14 and after.stored_frames() == before.stored_frames()
    fresh = new_cache(plain.transformer, plain.stream, 1, LATENT)
    plain.transformer.commit(first.latents, torch.zeros(1), b, fresh)
    tensors, old, new = after.state(), before.state(), fresh.state()
    for name in layer_names(after):
        assert torch.equal(tensors[name][:, :1], (old if keep_sink else new)[name][:, :1])
    # the first layer has not read the prompt yet
    last = layer_names(after)[-1]
    assert not torch.allclose(tensors[last][:, 1:], old[last][:, 1:], atol=1e-3)
    # the same by hand: a gap behind the sink, then the window's chunks in order
    mine = (before if keep_sink else fresh).clone()
    mine.rewind(8, 1)
    for context in recent:
        plain.transformer.commit(context.latents, torch.zeros(1), b, mine)
    for name in layer_names(after):
        assert torch.equal(tensors[name], mine.state()[name])


def test_a_recache_of_a_student_that_reuses_keys_runs_over_what_its_last_pass_saw(parts):
    """Its context is noisy: a commit of the clean chunk would be another context."""
    student = Student(parts[0], CONFIGS["reuse"], *parts[1:])
    session = begin(student)
    make(session, 1)
    session.switch_prompt(A, "recache")
    session.next_chunk()
    session._commit_pending()
    other = begin(student)
    make(other, 2)
    other._commit_pending()
    for name, x in other._cache.state().items():
        assert torch.equal(session._cache.state()[name], x)


def test_a_hard_switch_begins_a_new_scene_and_the_noise_goes_on(student):
    (b,) = encode(student, B)
    session = begin(student)
    make(session, 4)
    session.switch_prompt(B, "hard")
    chunks = make(session, 3)
    passes = [(b, 3, times_at(student.stream, place)) for place in range(3)]
    assert_latents(chunks, by_hand(student, passes, first=4))
    latents = torch.cat([chunk.latents for chunk in chunks], dim=2)
    frames = torch.cat([chunk.frames for chunk in chunks], dim=1)
    assert torch.equal(frames, student.codec.decode_latents(latents))
    assert [chunk.frames.shape[1] for chunk in chunks] == [5, 8, 8]


def test_the_four_ways_are_four(student):
    """A mode that did what another does would show here."""
    base = begin(student)
    make(base, 3)
    futures = {"none": base.branch()}
    for mode in MODES:
        futures[mode] = base.branch()
        futures[mode].switch_prompt(B, mode)
    made = [make(session, 1) for session in futures.values()]
    for i, one in enumerate(made):
        assert all(differs(one, other) for other in made[:i])


def test_steps_times_and_seed_change_between_chunks(plain):
    (a,) = encode(plain, A)
    session = begin(plain)
    chunks = make(session, 1)
    session.set_steps(3)
    chunks += make(session, 1)
    session.set_schedule([1.0, 0.3])
    chunks += make(session, 1)
    session.set_seed(9)
    session.set_schedule(None)
    chunks += make(session, 2)
    own, three = times_at(plain.stream, 1), step_times(3, plain.stream.shift)
    passes = [(a, 3, own), (a, 3, three), (a, 3, (1.0, 0.3)), (a, 9, own), (a, 9, own)]
    assert_latents(chunks, by_hand(plain, passes))
    assert [chunk.steps for chunk in chunks] == [2, 3, 2, 2, 2]
    assert [chunk.seed for chunk in chunks] == [3, 3, 3, 9, 9]


def test_of_two_changes_in_one_chunk_the_later_wins(plain):
    session, other = begin(plain), begin(plain)
    session.switch_prompt("a green triangle falls", "blend", blend_chunks=5)
    session.set_schedule([1.0, 0.2])
    session.set_seed(4)
    for each in (session, other):
        each.switch_prompt(B, "cut")
        each.set_steps(3)
    other.set_seed(4)
    assert_same(make(session, 2), make(other, 2))
    assert session.script == other.script
    assert session.script.changes == (Change(0, B, "cut", seed=4, steps=3),)


# ---- what is kept --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["none", *MODES])
def test_a_restored_session_goes_on_bit_for_bit(student, mode, tmp_path):
    """Also in the middle of a blend, in a new scene, and with a change that is still queued."""
    session = begin(student)
    make(session, 4)
    if mode != "none":
        session.switch_prompt(B, mode)
    session.set_seed(5)
    session.next_chunk()
    session.set_steps(3)
    session.snapshot(tmp_path / "a.safetensors")
    restored = Session.restore(tmp_path / "a.safetensors", student)
    assert restored.script == session.script and restored.index == session.index
    for each in (session, restored):
        make(each, 1)
        each.switch_prompt(A, "recache", keep_sink=False)
    assert_same(make(session, 3), make(restored, 3))
    assert restored.script == session.script


CODECS = {
    "taehv": lambda: AutoencoderTAEHV(has_encoder=False),
    "wan": lambda: StreamingAutoencoderKLWan(base_dim=4, z_dim=16, num_res_blocks=1),
}


@pytest.mark.parametrize("name", CODECS)
def test_every_codec_goes_on_where_it_was(plain, name, tmp_path):
    """A decoder that began anew would give fewer frames, one with wrong features others."""
    torch.manual_seed(0)
    codec = CODECS[name]().requires_grad_(False).eval()
    student = replace(plain, codec=codec)
    session = begin(student)
    session.next_chunk()
    session.snapshot(tmp_path / "a.safetensors")
    restored = Session.restore(tmp_path / "a.safetensors", student)
    assert_same(make(session, 2), make(restored, 2))


def test_what_was_asked_for_is_known_before_the_next_chunk_and_in_a_snapshot(plain, tmp_path):
    """Of a restored stream the steps that were not in effect yet were once lost by a reset."""
    session = begin(plain)
    assert session.asked_steps is None
    session.next_chunk()
    session.set_steps(2)
    session.set_seed(9)
    session.snapshot(tmp_path / "a.safetensors")
    for each in (session, Session.restore(tmp_path / "a.safetensors", plain)):
        assert (each.asked_steps, each.seed, each.steps) == (2, 9, 2)
        each.next_chunk()
        each.set_seed(10)
        assert (each.asked_steps, each.seed) == (2, 10)


def test_a_snapshot_of_another_student_or_a_damaged_one_is_refused(plain, tmp_path):
    path = tmp_path / "a.safetensors"
    session = begin(plain)
    session.next_chunk()
    session.snapshot(path)
    other = replace(plain, transformer=_nudged(plain.transformer))
    with pytest.raises(ValueError, match="of another student"):
        Session.restore(path, other)
    with pytest.raises(ValueError, match="another stream configuration"):
        Session.restore(path, replace(plain, stream=replace(plain.stream, window_frames=8)))
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="checksum"):
        Session.restore(path, plain)
    path.write_bytes(data[:-100])
    with pytest.raises(ValueError, match="damaged"):
        Session.restore(path, plain)
    with pytest.raises(ValueError, match="no snapshot"):
        Session.restore(tmp_path / "none", plain)


def _nudged(transformer):
    """The transformer after a small step."""
    other = CausalWanTransformer3DModel.from_config(transformer.config)
    other.load_state_dict(transformer.state_dict())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 1e-4 * parameter.abs().mean()
    return other.eval()


def test_a_branch_goes_on_by_itself(plain):
    session, twin = begin(plain), begin(plain)
    make(session, 4), make(twin, 4)
    branch = session.branch()
    branch.switch_prompt(B, "cut")  # which goes on in the same cache
    other = make(branch, 3)
    branch.close()
    same = make(twin, 3)
    assert_same(make(session, 3), same)
    assert differs(other, same)
    assert not session.script.changes and len(branch.script.changes) == 1


# ---- scripts -------------------------------------------------------------------------------------


def steered(student):
    """A session with all that a script can say, and its chunks."""
    session = begin(student)
    chunks = make(session, 2)
    for mode in MODES:
        session.switch_prompt(B, mode)
        session.set_steps(1 + len(chunks) % 3)
        chunks += make(session, 1)
        session.set_seed(len(chunks))
        session.switch_prompt(A, mode)
        session.set_schedule((1.0, 0.5))
        chunks += make(session, 1)
    session.set_schedule(None)
    return session, chunks + make(session, 1)


@pytest.mark.parametrize("suffix", [".yaml", ".jsonl"])
def test_a_script_makes_the_same_stream(student, suffix, tmp_path):
    session, chunks = steered(student)
    session.script.save(tmp_path / f"a{suffix}")
    script = Script.load(tmp_path / f"a{suffix}")
    assert script == session.script and script.num_chunks == 11
    assert_same(list(play_script(student, script)), chunks)
    assert_same(list(play_script(student, script, num_chunks=4)), chunks[:4])


@pytest.mark.parametrize("suffix", [".yaml", ".jsonl"])
@pytest.mark.parametrize(
    "text", ["${oc.env:HOME} {x}", 'a "b": c\nd # e', "\u2028 \x85 日本", "1:30"]
)
def test_a_prompt_is_a_text_and_nothing_else(suffix, text, tmp_path):
    script = Script(text, 64, 64, changes=(Change(1, text, "cut"),))
    script.save(tmp_path / f"a{suffix}")
    assert Script.load(tmp_path / f"a{suffix}") == script


def test_json_lines_are_a_beginning_and_a_change_per_line(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [{"prompt": A, "height": 32, "width": 32}, {"at": 2, "steps": 1}, {"at": 3, "seed": 2}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert Script.load(path) == Script(A, 32, 32, changes=(Change(2, steps=1), Change(3, seed=2)))


@pytest.mark.parametrize(
    "text, told",
    [
        ("prompt: a\nheight: 64\nwidth: 64\nchanges: [{at: 3, promt: b}]", "promt"),
        ("prompt: a\nheight: 64\nwidth: 64\nchanges: [{at: 3}, {at: 3}]", "in order"),
        ("prompt: a\nheight: 64\nwidth: 64\nchanges: [{at: -1}]", "at=-1"),
        ("prompt: a\nheight: 64\nwidth: 64\nchanges: [{at: 1, mode: cut}]", "without a prompt"),
        ("prompt: a\nheight: 64\nwidth: 64\nchanges: [{at: 1, prompt: b, mode: jump}]", "mode"),
        ("prompt: a\nheight: 64\nwidth: 64\nchanges: [{at: 1, steps: 0}]", "steps=0"),
        ("prompt: a\nheight: 64\nwidth: 64\nchanges: [{at: 1, times: [0.5, 0.6]}]", "falling"),
        (
            "prompt: a\nheight: 64\nwidth: 64\nchanges: [{at: 1, prompt: b, mode: cut,"
            " blend_chunks: 2}]",
            "is of mode=blend",
        ),
        ("prompt: ''\nheight: 64\nwidth: 64", "prompt"),
        ("prompt: a", "height"),
        ("[1, 2]", "mapping"),
        ("{", "no YAML"),
    ],
)
def test_a_wrong_script_is_one_line_that_names_its_file(text, told, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=told) as error:
        Script.load(path)
    assert "a.yaml" in str(error.value) and "\n" not in str(error.value)


def test_the_shipped_scripts_open():
    folder = TINY_STUDENT.parents[2] / "configs" / "script"
    scripts = {path.stem: Script.load(path) for path in folder.glob("*.yaml")}
    assert len(scripts) >= 2 and all(script.changes for script in scripts.values())


# ---- from frames ---------------------------------------------------------------------------------


@pytest.fixture
def clip():
    return torch.rand(15, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_a_stream_goes_on_from_a_clip(student, clip):
    """Of 15 frames the last 13 make two chunks of two latent frames; the stream is that of a cache
    into which they were committed, and its decoder has seen them.
    """
    config = student.stream
    (a,) = encode(student, A)
    session = begin(student, start=clip)
    assert session.index == 2
    chunks = make(session, 2)
    latents = student.codec.encode_frames(clip[None, 2:])
    cache = new_cache(student.transformer, config, 1, LATENT)
    for k, chunk in enumerate(latents.split(2, dim=2)):
        t = times_at(config, k)[-1] if config.commit == "reuse" else config.context_t
        eps = KeyedNoise([3]).draw(k, -1, tuple(chunk.shape[1:]), "cpu", torch.float32)
        noisy = (1 - t) * chunk + t * eps
        student.transformer.commit(noisy, 1000 * torch.full((1,), t), a, cache)
    passes = [(a, 3, times_at(config, k)) for k in (2, 3)]
    expected = by_hand(student, passes, cache, first=2)
    for chunk, x in zip(chunks, expected, strict=True):
        assert torch.allclose(chunk.latents, x, atol=1e-5)
    whole = student.codec.decode_latents(torch.cat([latents, *(c.latents for c in chunks)], 2))
    assert torch.equal(torch.cat([chunk.frames for chunk in chunks], 1), whole[:, 13:])


def test_a_script_names_the_frames_that_it_began_from(plain, clip, tmp_path):
    session = begin(plain, start=clip)
    session.switch_prompt(B, "recache")
    chunks = make(session, 2)
    assert session.script.start == digest_frames(clip)
    assert_same(list(play_script(plain, session.script, start=clip)), chunks)
    for other in (None, clip + 0.1):
        with pytest.raises(ValueError, match="began from"):
            play_script(plain, session.script, start=other)
    session.snapshot(tmp_path / "a.safetensors")
    assert_same(make(Session.restore(tmp_path / "a.safetensors", plain), 2), make(session, 2))


def test_a_single_image_is_refused_unless_a_chunk_is_one_latent_frame(plain, clip):
    with pytest.raises(ValueError, match=r"has 1 frames.*image.expand\(5"):
        begin(plain, start=clip[:1])
    assert begin(plain, start=clip[:1].expand(5, -1, -1, -1)).index == 1
    one = replace(plain, stream=replace(plain.stream, chunk_frames=1))
    session = begin(one, start=clip[:1])
    assert session.index == 1 and session.next_chunk().frames.shape[1] == 4
    with pytest.raises(ValueError, match="resize"):
        begin(plain, start=clip[..., :16])


# ---- rates ---------------------------------------------------------------------------------------


def test_the_most_steps_that_hold_the_rate_are_chosen():
    rate = RateHolder(10, (4, 2, 1))
    assert rate.choose(8, current=3) == 2  # nothing is measured
    rate.observe(3, denoise_s=0.3, decode_s=0.1)  # 0.1 s per pass
    assert rate.choose(8, current=4) == 4  # 0.6 of 0.8 s
    assert rate.choose(5, current=4) == 2  # 0.6 of 0.5 s
    assert rate.choose(1, current=4) == 1  # nothing fits
    assert rate.choose(6, current=4) == 4 and rate.choose(6, current=2) == 2  # no room to grow
    rate.observe(3, denoise_s=0.9, decode_s=0.1)
    assert rate.pass_s == pytest.approx(0.2)
    with pytest.raises(ValueError, match="fps"):
        RateHolder(0)
    with pytest.raises(ValueError, match="choices"):
        RateHolder(8, (0,))


@pytest.fixture
def slow(plain, monkeypatch):
    """The clock stands still but for 0.1 s per pass."""
    clock = [0.0]
    hook = plain.transformer.register_forward_hook(lambda *_: clock.__setitem__(0, clock[0] + 0.1))
    monkeypatch.setattr(session_module, "now_s", lambda device: clock[0])
    yield plain
    hook.remove()


def test_a_held_rate_is_in_the_script(slow):
    session = begin(slow)
    session.hold_rate(16)  # 8 frames in 0.5 s: a commit and four steps
    chunks = make(session, 3)
    assert [chunk.steps for chunk in chunks] == [2, 3, 3]  # a fifth pass has no room to spare
    session.hold_rate(24)
    chunks += make(session, 1)
    assert chunks[-1].steps == 2  # 0.33 s
    session.hold_rate(None)
    session.set_steps(4)
    chunks += make(session, 1)
    assert chunks[-1].steps == 4
    assert [change.steps for change in session.script.changes] == [3, 2, 4]
    assert_same(list(play_script(slow, session.script)), chunks)


# ---- ends and failures ---------------------------------------------------------------------------


def test_a_closed_session_says_so_and_holds_nothing(plain):
    session = begin(plain)
    session.next_chunk()
    session.close()
    assert session.closed and session._cache is None and session._state is None
    for act in (session.next_chunk, session.branch, lambda: session.set_seed(1)):
        with pytest.raises(SessionClosed):
            act()
    assert session.script.num_chunks == 1


def test_closing_ends_the_chunk_under_way_before_its_next_step(plain):
    session, calls = begin(plain), []

    def close(*_):
        calls.append(1)
        session.close()

    hook = plain.transformer.register_forward_hook(close)
    try:
        with pytest.raises(SessionClosed):
            session.next_chunk()
    finally:
        hook.remove()
    assert len(calls) == 1 and session._cache is None


@pytest.mark.parametrize("mode", MODES)
def test_a_chunk_that_failed_may_be_asked_for_again(plain, mode):
    """What the switch had done to the session is undone: the second try is the first one."""
    session, other = begin(plain), begin(plain)
    make(session, 4), make(other, 4)
    for each in (session, other):
        each._commit_pending()
        each.switch_prompt(B, mode)
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == (5 if mode == "recache" else 2):
            raise MemoryError

    hook = plain.transformer.register_forward_hook(fail)
    with pytest.raises(MemoryError):
        session.next_chunk()
    hook.remove()
    assert session.index == 4 and not session.script.changes
    assert_same(make(session, 2), make(other, 2))
    assert session.script == other.script


def test_a_commit_that_failed_closes_the_session(plain):
    """Going on would leave a hole in the context, in silence."""
    session = begin(plain)
    session.next_chunk()

    def fail(*_):
        raise MemoryError

    hook = plain.transformer.register_forward_hook(fail)
    with pytest.raises(MemoryError):
        session.next_chunk()
    hook.remove()
    assert session.closed


def test_what_a_session_cannot_do_is_one_line(plain):
    session = begin(plain)
    cases = [
        lambda: session.switch_prompt(B, "jump"),
        lambda: session.switch_prompt("  "),
        lambda: session.switch_prompt(B, "blend", blend_chunks=0),
        lambda: session.switch_prompt(B, "blend", interpolation="cubic"),
        lambda: session.set_steps(0),
        lambda: session.set_seed(2**63),
        lambda: session.set_schedule([0.5, 1.0]),
        lambda: session.hold_rate(-1),
        lambda: begin(plain, seed=True),
        lambda: Session(plain, A, height=33, width=32),
        lambda: begin(replace(plain, stream=StreamConfig(order="rolling", num_steps=2))),
        lambda: begin(replace(plain, stream=StreamConfig(commit="none"))),
    ]
    for case in cases:
        with pytest.raises(ValueError) as error:
            case()
        assert "\n" not in str(error.value)
    session.next_chunk()
    assert session.script.changes == ()
