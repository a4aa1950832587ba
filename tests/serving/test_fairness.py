"""Many viewers and too little time, with a clock that the test moves: who gets the next chunk."""

from itertools import count
from types import SimpleNamespace

import pytest

from streamvid.serving import live, protocol, steering, stream, worker
from streamvid.serving.limits import Limits
from streamvid.serving.metrics import Metrics
from streamvid.serving.models import ServedModel, ServedModels
from streamvid.serving.recording import ClipStore
from streamvid.serving.stream import Stream

CHUNK_FRAMES = 4  # of the fake session
FPS = 8.0  # a chunk plays for half a second


class Simulation:
    """A worker without its thread, whose chunks take ``work_s`` of a clock that nothing else
    moves.
    """

    def __init__(self, make_session, folder, work_s, limits):
        self.now, self.made = 1000.0, []  # (when, stream)
        self.model = ServedModel("fake", make_session, steps=4)
        store = ClipStore(folder, 10)
        models = ServedModels([self.model])
        self.worker = worker.Worker(models, Limits(**limits), Metrics(), store, batch=1)
        self.worker._condition.wait = self._wait
        advance = self.worker._live.advance

        def timed(streams):
            self.now += work_s
            self.made += [(self.now, stream) for stream in streams]
            advance(streams)

        self.worker._live.advance = timed

    def _wait(self, seconds):
        self.now += 0.05 if seconds is None else max(seconds, 1e-3)

    def join(self, prompt="one", fps=FPS):
        """A viewer, who takes all that comes at once."""
        start = protocol.SessionStart(prompt=prompt)
        new = Stream(start, 16, 16, fps, lambda: None, self.model)
        self.worker._waiting.append(new)
        return new

    def run(self, seconds, before_each=lambda: None):
        """Returns the chunks that were made, as (when, stream)."""
        end, begin = self.now + seconds, len(self.made)
        for turn in count():
            if self.now >= end:
                break
            assert turn < 20_000, "viewers are heard without end, and no chunk is made"
            before_each()
            self.worker._advance()
            for viewer in self.worker._live.active:
                while viewer.outbox.take() is not None:
                    pass
        return self.made[begin:]


@pytest.fixture
def simulate(make_session, tmp_path, monkeypatch):
    """``simulate(work_s)``: a simulation."""

    def make(work_s, **limits):
        sim = Simulation(make_session, tmp_path, work_s, {"sessions": 32, **limits})
        clock = SimpleNamespace(monotonic=lambda: sim.now, time=lambda: 0.0, time_ns=lambda: 0)
        for module in (worker, live, steering, stream):
            monkeypatch.setattr(module, "time", clock)
        return sim

    return make


def of(chunks, viewer):
    return [when for when, stream in chunks if stream is viewer]


def gaps(times):
    return [after - before for before, after in zip(times, times[1:])]


def test_sixteen_viewers_share_too_little_time_evenly(simulate):
    """Each would need 2 chunks per second; the model makes 10 for all: nobody waits for longer
    than a round, and the rounds do not grow.
    """
    sim = simulate(work_s=0.1)
    viewers = [sim.join() for _ in range(16)]
    chunks = sim.run(40)
    counts = [len(of(chunks, viewer)) for viewer in viewers]
    assert len(chunks) == pytest.approx(400, abs=2)  # no time was wasted
    assert max(counts) - min(counts) <= 2
    assert all(max(gaps(of(chunks, viewer))) <= 2 * 1.6 for viewer in viewers)
    late = [max(gaps(of(chunks, viewer))[-5:]) for viewer in viewers]
    assert max(late) <= 1.6 + 0.11


def test_first_chunks_come_one_after_the_other(simulate):
    """A viewer that had nothing once waited until all others had filled their lead."""
    sim = simulate(work_s=0.1)
    viewers = [sim.join() for _ in range(16)]
    sim.run(1.55)
    assert [viewer.chunks for viewer in viewers] == [1] * 16


def test_a_newcomer_is_served_within_a_round_of_those_who_are_late(simulate):
    """Its chunk was due just now for ever, and those of others, which were late, came before."""
    sim = simulate(work_s=0.1)
    for _ in range(15):
        sim.join()
    sim.run(10)
    new, asked = sim.join(), sim.now
    times = of(sim.run(10), new)
    assert times[0] - asked <= 1.7 and len(times) >= 5


def test_one_that_starts_over_is_served_within_a_round(simulate):
    sim = simulate(work_s=0.1)
    viewers = [sim.join() for _ in range(16)]
    sim.run(10)
    asked = sim.now
    viewers[3].commands.append((protocol.SessionReset(), asked))
    times = of(sim.run(10), viewers[3])
    assert times[0] - asked <= 1.8 and len(times) >= 5


def test_who_asks_for_changes_without_end_gets_no_more_than_others(simulate):
    """Its chunk once came before those that had waited for longer."""
    sim = simulate(work_s=0.1)
    viewers = [sim.join() for _ in range(16)]
    sim.run(5)

    def ask():
        if not viewers[0].commands:
            viewers[0].commands.append((protocol.PromptUpdate(prompt="again"), sim.now))

    chunks = sim.run(30, before_each=ask)
    counts = [len(of(chunks, viewer)) for viewer in viewers]
    assert counts[0] <= min(counts[1:]) + 2


def test_viewers_of_different_rates_all_go_on(simulate):
    sim = simulate(work_s=0.1)
    viewers = [sim.join(fps=fps) for fps in (4.0, 8.0, 16.0, 60.0) * 4]
    chunks = sim.run(40)
    assert all(max(gaps(of(chunks, viewer))) <= 4.0 for viewer in viewers)


def test_with_time_enough_every_chunk_is_just_in_time(simulate):
    sim = simulate(work_s=0.05)
    viewers = [sim.join() for _ in range(4)]
    chunks = sim.run(20)
    for viewer in viewers:
        times = of(chunks, viewer)
        assert viewer.level.late == 0
        assert len(times) == pytest.approx(20 * FPS / CHUNK_FRAMES, abs=2)  # no faster than played
