"""Events that may be counted late, as they came, until the join has decided about them.

Whether feedback is late is known when it is applied: up to `join.lateness_s` after its poll, and longer when it waits for its decision. So
its record is held until then, with `kafka.late_topics` only. A late decision came behind the watermark, and is decided about in the same
commit. The state holds events and no records: what was waiting when a worker ended is written in our own encoding.
"""

from __future__ import annotations

from collections.abc import Mapping

from esrl_ray.config import KafkaConfig
from streaming.protocols import RefusedRecords
from streaming.records import Record
from streaming.session_state import DECISIONS, FEEDBACK
from streaming.sessions import SessionJoiner
from streaming.wire import Decision


class LateEvents:
    """Holds records for the joins of a worker.

    Args:
        config: Topics, `late_topics`.

    Attributes:
        wanted: Whether late events are written anywhere.
    """

    def __init__(self, config: KafkaConfig) -> None:
        self.wanted = config.late_topics
        self._names = {DECISIONS: config.decisions_topic, FEEDBACK: config.feedback_topic}
        self._held: dict[tuple[int, str, str], Record] = {}  # partition, topic, event id

    def hold(self, record: Record, event_id: str) -> None:
        """Keep a record until its event is decided about; of one that comes again, the first."""
        self._held.setdefault((record.partition, record.topic, event_id), record)

    def hand_over(self, joiners: Mapping[int, SessionJoiner], letters: RefusedRecords) -> None:
        """After the joins have advanced: pass on what they counted late, and forget what is decided."""
        for partition, joiner in joiners.items():
            for event in joiner.take_late():
                kind, event_id = (DECISIONS, event.decision_id) if isinstance(event, Decision) else (FEEDBACK, event.event_id)
                letters.late(self._names[kind], self._held.get((partition, self._names[kind], event_id), event))
        if self._held:
            undecided = ((p, self._names[FEEDBACK], event_id) for p, joiner in joiners.items() for event_id in joiner.undecided())
            self._held = {key: self._held[key] for key in undecided if key in self._held}
