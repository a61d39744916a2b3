"""The session join with a limit on the rows of one call."""

from __future__ import annotations

from streaming.sessions import SessionJoiner
from tests.unit.test_sessions import T0, configure, decision, feedback


def test_with_a_limit_the_watermark_stops_between_two_lists_that_are_due() -> None:
    def pushed() -> SessionJoiner:
        join = SessionJoiner(0, configure(gap_s=None))
        names = [("a", 0.0), ("b", 0.0), ("c", 0.001), ("d", 3.0)]
        join.push([(i, decision(*name)) for i, name in enumerate(names)], [(i, feedback(n, "shown", 3)) for i, (n, _) in enumerate(names)])
        return join

    def advance(join: SessionJoiner, limit: float) -> tuple[list[str], float, bool]:
        rows = join.advance(clock_ms=T0 + 60_000, decisions_at_end=True, feedback_at_end=True, limit=limit)
        return [row.step_id for row in rows], (join.watermark_ms - T0) / 1000, join.is_behind

    join = pushed()  # label age 4 s: two are due at 4, one at 4.001, one at 7
    assert advance(join, 1) == (["a", "b"], 4.0, True)
    assert advance(join, 1) == (["c"], 4.001, True)
    assert advance(join, 1) == (["d"], 7.0, True)
    assert advance(join, 1) == ([], 55.0, False)
    assert advance(pushed(), 3) == (["a", "b", "c"], 4.001, True)
    assert advance(pushed(), 5) == (["a", "b", "c", "d"], 55.0, False)
