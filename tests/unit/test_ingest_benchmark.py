"""The ingest benchmark's peers join what the session join joins, or their times would mean nothing."""

from __future__ import annotations

import json

import msgspec
import numpy as np

from benchmarks.ingest_dicts import DictJoin
from benchmarks.ingest_events import FEEDBACK_PER_DECISION, arrivals, deployment, plain
from streaming.sessions import SessionJoiner
from streaming.wire import JSON, Feedback, decode_decision, decode_feedback, encode

T0, COUNT = 1_700_000_000_000, 60


def test_the_dict_join_gives_the_steps_of_the_session_join() -> None:
    config = deployment(4)
    spec, joiner, peer = config.spec.build(), SessionJoiner(0, config), DictJoin()
    num_feedback = 0
    for event in arrivals(config, COUNT, T0):
        if isinstance(event, Feedback):
            num_feedback += 1
            joiner.push([], [(0, decode_feedback(plain(event), JSON))])
            peer.push("feedback", json.loads(plain(event)))
        else:
            decoded = decode_decision(plain(event), spec, JSON)
            assert np.allclose(
                decoded.states, np.frombuffer(msgspec.msgpack.decode(encode(event))["states"], "<f4").reshape(15, 4), atol=1e-6
            )
            joiner.push([(0, decoded)], [])
            peer.push("decisions", json.loads(plain(event)))
    assert num_feedback >= COUNT * FEEDBACK_PER_DECISION
    rows = joiner.close(clock_ms=T0)
    theirs = {step["decision_id"]: step for step in peer.close()}
    assert len(rows) == len(theirs) == COUNT
    for row in rows:
        step = theirs[row.step_id]
        assert row.shown.tolist() == step["shown"] and row.next_id == step["next_id"]
        assert np.allclose(row.rewards, step["rewards"])
