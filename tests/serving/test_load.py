"""Viewers in numbers: what a player makes of arrivals, and what is measured of a server."""

import asyncio
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamvid.cli import load as command
from streamvid.serving import protocol
from streamvid.serving.load import FIGURES, Server, Switch, Visit, check_url, play
from streamvid.studies import live

FPS = 10.0


def visit_of(*chunks, fps=FPS, asked_s=0.0, ended_s=100.0):
    """A visit whose chunks are (arrival, sequences)."""
    visit = Visit(fps, asked_s=asked_s, ended_s=ended_s)
    for arrival_s, sequences in chunks:
        visit.chunk_starts.append(len(visit.sequences))
        visit.sequences += sequences
        visit.arrivals_s += [arrival_s] * len(sequences)
    return visit


def frames(first, count=10):
    return list(range(first, first + count))


def test_chunks_that_come_in_time_are_played_without_a_stall():
    visit = visit_of((1.0, frames(0)), (1.9, frames(10)), (2.9, frames(20)), ended_s=3.9)
    shown = play(visit, buffer_s=0.1)
    assert (shown.due, shown.in_time, shown.stalls, shown.stall_s) == (29, 29, 0, 0.0)
    assert shown.watched_s == pytest.approx(3.9 - 1.1)


def test_a_late_chunk_is_a_stall_and_moves_what_follows():
    """Frames 10 to 19 were due from 2.0 on and came at 2.35: four of them are late."""
    visit = visit_of((1.0, frames(0)), (2.35, frames(10)), (3.3, frames(20)), ended_s=4.3)
    shown = play(visit, buffer_s=0.0)
    assert shown.stalls == 1 and shown.stall_s == pytest.approx(0.35)
    assert shown.due == 30 and shown.in_time == 26
    assert play(visit, buffer_s=0.4).stalls == 0


def test_frames_that_were_left_out_are_late_but_no_stall():
    visit = visit_of((1.0, frames(0)), (1.5, [10, 12, 14, 16, 18]), (2.9, frames(20)), ended_s=4.0)
    shown = play(visit, buffer_s=0.0)
    assert (shown.stalls, shown.due, shown.in_time) == (0, 30, 25)
    assert visit.dropped == 5


def test_a_stream_that_ends_stands_still_until_the_end():
    shown = play(visit_of((1.0, frames(0)), ended_s=7.0), buffer_s=0.0)
    assert shown.stalls == 1 and shown.stall_s == pytest.approx(5.0)
    assert (shown.due, shown.in_time) == (60, 10)
    nothing = play(visit_of(ended_s=7.0), buffer_s=0.0)
    assert (nothing.in_time, nothing.stalls, nothing.stall_s) == (0, 1, 7.0)


def played_by_hand(arrivals_s, fps, buffer_s, ended_s):
    """A player that looks at its clock once per millisecond; chunks of 10 whole frames."""
    stalls, stall_ms, frame, standing = 0, 0, 0, False
    at_ms = due_ms = round(1000 * (arrivals_s[0] + buffer_s))
    while at_ms < round(1000 * ended_s):
        if at_ms >= due_ms:
            there = frame // 10 < len(arrivals_s) and at_ms >= round(1000 * arrivals_s[frame // 10])
            if there:
                frame, standing = frame + 1, False
                due_ms += round(1000 / fps)
                at_ms += 1
                continue
            stalls += not standing
            standing = True
            stall_ms += 1
            due_ms += 1
        at_ms += 1
    return stalls, stall_ms


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 2500), min_size=1, max_size=6), st.integers(0, 500))
def test_stalls_are_those_of_a_player_that_looks_at_its_clock(gaps_ms, buffer_ms):
    arrivals_s = (np.cumsum([0, *gaps_ms]) / 1000 + 1).tolist()
    chunks = [(at, frames(10 * k)) for k, at in enumerate(arrivals_s)]
    ended_s = arrivals_s[-1] + 2.5
    shown = play(visit_of(*chunks, ended_s=ended_s), buffer_ms / 1000)
    stalls, stall_ms = played_by_hand(arrivals_s, FPS, buffer_ms / 1000, ended_s)
    assert shown.stall_s == pytest.approx(stall_ms / 1000, abs=0.01)
    assert abs(shown.stalls - stalls) <= sum(g in (999, 1000, 1001) for g in gaps_ms) + 1


def header(sequence, prompt_id=0, first=True):
    flags = protocol.FIRST_OF_CHUNK if first else 0
    return protocol.FrameHeader(sequence, sequence // 4, prompt_id, 0, 0, flags=flags)


def test_a_switch_lasts_until_the_first_frame_of_its_prompt():
    visit = Visit(FPS, asked_s=1.0)
    for sequence in range(4):
        visit.note_frame(header(sequence, first=sequence == 0), 2.0 + sequence / 100)
    visit.switches.append(Switch(2.5, old_prompt=0))
    visit.note_frame(header(4), 3.0)
    visit.note_frame(header(8, prompt_id=1), 4.0)
    visit.note_frame(header(12, prompt_id=1), 5.0)
    (switch,) = visit.switches
    assert (switch.seen_s, switch.chunks) == (4.0, 1)
    assert (visit.first_frame_s, visit.first_chunk_s) == (1.0, pytest.approx(1.03))
    assert visit.intervals_s == [1.0, 1.0, 1.0] and visit.dropped == 6


def test_memory_that_grows_is_seen():
    """Not what caches take at first."""
    memory = [1e8, 3e8, 5e8, 5e8, 5.01e8, 5.02e8, 5.03e8, 5.04e8]
    samples = live.Samples([30.0 * k for k in range(8)], [{"memory_bytes": m} for m in memory])
    assert samples.growth_mb == pytest.approx(2.0)
    assert math.isnan(live.Samples([0.0], [{"memory_bytes": 5e8}]).growth_mb)


def test_the_first_tenth_and_the_last():
    assert live.ends(list(range(40))) == ([0, 1, 2, 3], [36, 37, 38, 39])
    assert live.ends([7]) == ([7], [7])


def load_of(**options):
    return live.Load(**{"prompts": ["one", "two"], "fps": 100.0, "switch_every_s": 0.2, **options})


def test_viewers_of_a_server_are_measured(make_app, running):
    with running(make_app()) as url:
        row = asyncio.run(live.measure_viewers(Server(url), load_of(), viewers=3, seconds=1.0))
    assert (row["errors"], row["without_frames"]) == ({}, 0)
    assert row["switches_seen"] >= 1 and 0 < row["fps_least"] <= row["fps_most"]
    assert 0 < row["first_frame_s"]["median"] <= row["first_chunk_s"]["most"]
    text = live.viewer_table([row])
    assert text[0] == ["", "3 viewers"] and all(len(line) == 2 for line in text)


def test_viewers_that_find_no_place_are_told(make_app, running):
    app = make_app(limits={"sessions": 1, "waiting": 1, "sessions_per_address": 9})
    with running(app) as url:
        row = asyncio.run(live.measure_viewers(Server(url), load_of(), viewers=3, seconds=0.5))
    assert row["waited"] == 1 and row["without_frames"] >= 1 and row["errors"]["busy"] == 1
    assert not live.went_well({"viewers": [row]})


@pytest.fixture
def short_visits(monkeypatch):
    monkeypatch.setattr(live, "WARM_VISITS", 2)
    monkeypatch.setattr(live, "LONGEST_VISIT_S", 0.2)


def test_visits_at_random_leave_nothing(make_app, running, short_visits):
    with running(make_app()) as url:
        churn = asyncio.run(live.measure_churn(Server(url), load_of(), visits=12))
    assert churn["errors"] == {} and sum(churn["ends"].values()) == 12
    assert churn["after"]["cache_bytes"] == churn["after"]["sessions"] == 0
    assert live.went_well({"churn": {**churn, "returned": True}})


def test_a_server_that_keeps_a_session_is_found_out(make_app, running, short_visits, monkeypatch):
    monkeypatch.setattr(live, "SETTLE_S", 0.5)
    app = make_app()
    app.state.worker.leave = lambda stream: None  # nobody is ever noticed to be gone
    app.state.worker.limits = app.state.worker.limits.__class__(sessions=100)
    with running(app) as url:
        churn = asyncio.run(live.measure_churn(Server(url), load_of(), visits=2))
    assert not churn["returned"] and churn["after"]["sessions"] > 0
    assert not live.went_well({"churn": churn})


def test_one_stream_is_compared_with_itself(make_app, running):
    result = {}
    with running(make_app()) as url:
        asyncio.run(live.measure_endurance(Server(url), load_of(fps=1000.0), 1.5, result))
    assert result["chunks"] > 20 and result["errors"] == {}
    assert len(result["work_ms"]) == len(result["memory_mb"]) == 2


def test_the_figures_of_a_server_are_there(make_client):
    lines = make_client().get("/metrics").text.splitlines()
    assert set(FIGURES.values()) <= {line.rpartition(" ")[0] for line in lines}


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", "http://x/v1", ""])
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(ValueError, match="--url"):
        check_url(url)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--viewers", "1", "--url", "http://127.0.0.1:9"], "no server answers at"),
        ([], "nothing to measure"),
        (["--viewers", "1", "--seconds", "0"], "--seconds 0 must be more than 0"),
        (["--churn", "-1"], "--churn -1 must be at least 0"),
        (["--churn", "1", "--url", "http://x", "--port", "1"], "leave them or --url out"),
        (["--churn", "1", "--token-file", "t"], "give its --url"),
    ],
)
def test_mistakes_are_told_in_one_line(argv, message, tmp_path, capsys):
    out = tmp_path / "live.json"
    assert command.main([*argv, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not out.exists()


def test_a_report_of_a_running_server(make_app, running, short_visits, tmp_path, capsys):
    out = tmp_path / "live.json"
    options = ["--viewers", "1,2", "--seconds", "0.5", "--churn", "3", "--endurance", "0.5"]
    with running(make_app()) as url:
        command.main([*options, "--fps", "100", "--url", url, "--out", str(out)])
    report = json.loads(out.read_text())
    assert [row["viewers"] for row in report["viewers"]] == [1, 2]
    assert report["churn"]["visits"] == 3 and report["endurance"]["chunks"] > 3
    text = out.with_suffix(".md").read_text()
    assert "2 viewers" in text and "3 visits" in text and "first tenth" in text
    assert "1 viewer," in capsys.readouterr().err


def test_what_was_complete_stays_after_an_interruption(make_app, running, tmp_path, monkeypatch):
    async def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(live, "measure_churn", interrupted)
    out = tmp_path / "live.json"
    with running(make_app()) as url:
        options = ["--viewers", "1", "--seconds", "0.3", "--churn", "3"]
        assert command.main([*options, "--url", url, "--out", str(out)]) == 130
    assert [row["viewers"] for row in json.loads(out.read_text())["viewers"]] == [1]
