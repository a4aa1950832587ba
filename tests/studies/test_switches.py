"""Measuring prompt switches, against clips that are drawn."""

from __future__ import annotations

from dataclasses import replace

import pytest

from streamvid.data.world import Body, WorldSpec, caption, read_caption, render
from streamvid.studies.switches import (
    KINDS,
    Pair,
    chunks_to_obey,
    make_pair,
    markdown,
    measure_switch,
    summarise,
)

OLD = WorldSpec("move", (Body("red", "circle", 6.0, 16.0, 20.0, 0.6, 0.0),))
BLUE = WorldSpec("move", (replace(OLD.bodies[0], colour="blue"),))
PAIR = Pair("colour", caption(OLD, 0), caption(BLUE, 0), 0)


def chunks(spec, num=4):
    return list(render(spec, 12 * num).split(12))


@pytest.mark.parametrize("kind", KINDS)
def test_a_pair_changes_what_its_kind_says_and_nothing_else(kind):
    for seed in range(20):
        pair = make_pair(kind, seed)
        (old,), (new,) = read_caption(pair.before).bodies, read_caption(pair.after).bodies
        differing = {name for name, value in vars(old).items() if getattr(new, name) != value}
        assert differing == set(KINDS[kind])
        assert read_caption(pair.before).speed == read_caption(pair.after).speed


def test_a_switch_that_obeys_at_once_and_keeps_the_rest():
    measured = measure_switch(PAIR, chunks(OLD)[0], chunks(BLUE)[1:])
    assert chunks_to_obey(measured["changed"]) == 1 and min(measured["changed"]) > 0.9
    assert measured["jump"] < 1 and measured["floor"] < 0.01 and measured["kept"] > 0.9


def test_a_switch_that_obeys_late_or_never_or_jumps():
    late = measure_switch(PAIR, chunks(OLD)[0], [chunks(OLD)[1], *chunks(BLUE)[2:]])
    assert chunks_to_obey(late["changed"]) == 2
    never = measure_switch(PAIR, chunks(OLD)[0], chunks(OLD)[1:])
    assert chunks_to_obey(never["changed"]) is None
    elsewhere = WorldSpec("move", (replace(BLUE.bodies[0], x=40.0, y=50.0),))
    assert measure_switch(PAIR, chunks(OLD)[0], chunks(elsewhere)[1:])["jump"] > 20
    square = WorldSpec("move", (replace(BLUE.bodies[0], shape="square"),))
    assert measure_switch(PAIR, chunks(OLD)[0], chunks(square)[1:])["kept"] < 0.7


def test_a_new_axis_is_obeyed_whatever_its_sign():
    up = WorldSpec("move", (replace(OLD.bodies[0], vx=0.0, vy=-0.6, y=40.0),))
    down = WorldSpec("move", (replace(up.bodies[0], vy=0.6, y=20.0),))
    pair = Pair("direction", caption(OLD, 0), caption(up, 0), 0)
    for spec, obeys in ((up, True), (down, True), (OLD, False)):
        changed = measure_switch(pair, chunks(OLD)[0], chunks(spec)[1:])["changed"]
        assert (chunks_to_obey(changed) == 1) == obeys


def test_the_table_counts_chunks():
    row = {"kind": "colour", "mode": "cut", "jump": 1.0, "floor": 0.0, "kept": 1.0}
    rows = [{**row, "changed": [0.0, 1.0]}, {**row, "changed": [0.0, 0.0], "jump": 9.0}]
    every = summarise(rows)[0]
    assert every["obeyed_by"] == [0, 0.5] and every["median_chunks"] == 2.5
    assert every["stayed"] == 0.5 and every["pairs"] == 2
    report = {
        "table": summarise(rows),
        "student": "a",
        "settings": "b",
        "environment": {"command": "c"},
    }
    assert "| every | cut | 2 | 0.00 | 0.50 | 2.5 |" in markdown(report)
