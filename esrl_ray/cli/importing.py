"""`esrl log import`: old decisions and feedback from files into the step log, through worker, join and commit of the live path."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable
from pathlib import Path

from esrl_ray.cli.clock import clock_ms
from esrl_ray.config import Config
from esrl_ray.errors import ConfigError, StreamError
from esrl_ray.vocabulary import Bucket
from streaming.files import FileSource, Rejects
from streaming.partitions import LIVE
from streaming.steplog import StepLog
from streaming.worker import IngestWorker

FOREVER_S = 1e9
NAME = re.compile("[A-Za-z0-9][A-Za-z0-9_.-]*")


def import_files(
    config: Config,
    root: str,
    decisions: Path,
    feedback: Path,
    *,
    worker: str,
    rejects: Path,
    say: Callable[[str], object],
    hashed_users: bool = False,
) -> dict[str, dict[str, int]]:
    """Read files to their end into a worker's table of the step log; what it has already is not read again.

    Args:
        config: Deployment; its join, reward, spec and `serve.user_key` count.
        root: Folder of all workers' tables.
        decisions: File or folder.
        feedback: File or folder.
        worker: Name of the table.
        rejects: File for refused rows.
        say: Told what happened.
        hashed_users: User ids in the files are this deployment's pseudonyms already.

    Returns:
        The ledger, {topic: {bucket: rows}}.

    Raises:
        EsrlError: files that cannot be read, files other than those that this worker has begun with, or too many or all rows refused.
    """
    if worker.startswith(LIVE):
        raise ConfigError(f"{worker!r} is the name of a live worker", "--worker", "take another, e.g. import-0")
    if not NAME.fullmatch(worker):  # it becomes a folder
        raise ConfigError(f"{worker!r} is no name of a table: expected {NAME.pattern}", "--worker", "take another, e.g. import-0")
    one = {"kafka": config.kafka.model_copy(update={"num_partitions": 1}), "serve": config.serve.model_copy(update={"decision_keys": ()})}
    alone = config.model_copy(update=one)  # a single reader, and decisions of another time were signed with other keys
    log = StepLog(root, worker, uuid.uuid4().hex, config.spec.build(), config.log)
    limit, key = config.ingest.max_poll_records, None if hashed_users else config.serve.user_key
    source = FileSource(config.kafka, decisions, feedback, {}, max_poll_records=limit)
    before = log.restore()
    if before is not None and before.topic_ids != source.topic_ids:
        text = f"worker {worker} has begun with other files than these"
        raise StreamError(text, root, "give it the same, or name a new one, e.g. --worker import-1")

    def source_at(positions: dict[str, int]) -> FileSource:
        nonlocal source
        source = FileSource(config.kafka, decisions, feedback, positions, max_poll_records=limit, user_key=key)
        return source

    refused = Rejects(rejects, log.table_id, max_share=config.kafka.max_dead_letter_share)
    reader = IngestWorker(
        alone,
        worker,
        [0],
        log=log,
        source_factory=lambda positions: source_at(dict(positions)),
        dead_letters=refused,
        publish=[],
        clock_ms=clock_ms,
    )
    while not source.finished:
        reader.run_once()
    reader.drain({}, FOREVER_S)
    status = reader.status()
    ledger: dict[str, dict[str, int]] = status["ledger"]
    for topic, name in (("decisions", config.kafka.decisions_topic), ("feedback", config.kafka.feedback_topic)):
        rows, buckets = status["positions"][f"{name}/0"], {bucket: n for bucket, n in ledger[topic].items() if n}
        if rows != sum(buckets.values()):
            raise StreamError(f"{rows} rows of {topic} were read, the ledger counts {sum(buckets.values())}: {buckets}", worker)
        say(f"{topic:14}{rows:>12,} rows: " + (", ".join(f"{n:,} {bucket}" for bucket, n in buckets.items()) or "none"))
    for (topic, code), n in sorted(refused.counts.items()):
        say(f"{'rejects':14}{n:>12,} of {topic}: {code}")
    say(f"{'steps':14}{status['steps_closed']:>12,} in {root}/{worker}, commit {status['commit']}")
    if refused.counts:
        say(f"refused rows are in {rejects}")
    for topic, buckets in ledger.items():
        if 0 < sum(buckets.values()) == buckets[Bucket.DEAD_LETTER]:  # so few that kafka.max_dead_letter_share did not stop it
            fix = "see the reasons there, mend the rows or the deployment, then import them into another table, e.g. --worker import-1"
            raise StreamError(f"all {buckets[Bucket.DEAD_LETTER]} rows of {topic} were refused", str(rejects), fix)
    return ledger
