"""The quix-streams peer of `benchmarks/ingest.py`; run by it in an environment of its own, prints one JSON line.

Both topics are concatenated and keyed by session, `DictJoin` runs per partition inside `update`. Its state stands in memory, not in the
RocksDB store of quix-streams, and nothing is written: cheaper than what it would need to be exact.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import uuid
from typing import Any

from quixstreams import Application, message_context

from benchmarks.ingest_dicts import DictJoin

logging.disable(logging.WARNING)


def main() -> None:
    """Read both topics to the given number of events."""
    servers, decisions, feedback, count = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
    app = Application(
        broker_address=servers,
        consumer_group=uuid.uuid4().hex,
        auto_offset_reset="earliest",
        loglevel="ERROR",
        commit_interval=2.0,
        consumer_extra_config={"check.crcs": True},
    )
    joins: dict[int, DictJoin] = {}
    seen = steps = 0
    start: list[float] = []

    def take(event: dict[str, Any]) -> None:
        nonlocal seen, steps
        if not start:
            start.extend((time.process_time(), time.perf_counter()))
        join = joins.setdefault(message_context().partition, DictJoin())
        join.push("decisions" if "item_ids" in event else "feedback", event)
        seen += 1
        if seen % 1_000 == 0 or seen == count:
            steps += sum(len(join.advance()) for join in joins.values())
        if seen == count:
            steps += sum(len(join.close()) for join in joins.values())
            app.stop()

    topics = [app.topic(name, value_deserializer="json") for name in (decisions, feedback)]
    app.dataframe(topics[0]).concat(app.dataframe(topics[1])).update(take)
    app.run()
    cpu, wall = time.process_time() - start[0], time.perf_counter() - start[1]
    print(json.dumps({"events": seen, "cpu_s": cpu, "wall_s": wall, "steps": steps}))


main()
