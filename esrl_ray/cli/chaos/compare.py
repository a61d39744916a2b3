"""What must be equal between a run with faults and the one without, and where it is not.

Not compared, because it may differ: the number of a commit, how many revisions a step took, and the clock at which rows were made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from esrl_ray.vocabulary import Ended

NOT_COMPARED = {"commit", "revision", "closed_ms"}
NAMED = 5
"""Steps that a difference names."""


class StepDifference(msgspec.Struct, frozen=True):
    """Steps of a run beside those of the run without faults."""

    steps: int  # of the run without faults
    lost: list[str]  # ids that only the run without faults has
    added: list[str]  # ids that only the run with faults has
    doubled: list[str]  # ids with two first rows, or two rows of one revision
    changed: dict[str, list[str]]  # column -> ids whose values differ

    @property
    def exact(self) -> bool:
        """Nothing differs."""
        return not (self.lost or self.added or self.doubled or self.changed)


def compare_steps(expected: pa.Table, actual: pa.Table, rows: pa.Table) -> StepDifference:
    """Compare merged steps, and look for doubled rows.

    Args:
        expected: Merged steps of the run without faults.
        actual: Merged steps of the run with faults.
        rows: All rows of the latter's logs.
    """
    wanted, found = set(expected["step_id"].to_pylist()), set(actual["step_id"].to_pylist())
    both = pa.array(sorted(wanted & found), pa.string())
    left, right = (table.take(pc.index_in(both, table["step_id"])) for table in (expected, actual))
    changed = {}
    for name in expected.column_names:
        if name not in NOT_COMPARED and not left[name].equals(right[name]):
            pairs = zip(both.to_pylist(), left[name].to_pylist(), right[name].to_pylist(), strict=True)
            changed[name] = [step_id for step_id, a, b in pairs if a != b]
    return StepDifference(len(expected), sorted(wanted - found), sorted(found - wanted), _doubled(rows), changed)


def _doubled(rows: pa.Table) -> list[str]:
    first = rows.filter(rows["item_ids"].is_valid())["step_id"].to_pylist()
    revisions = zip(rows["step_id"].to_pylist(), rows["revision"].to_pylist(), strict=True)
    twice = {step_id for step_id, n in Counter(first).items() if n > 1}
    return sorted(twice | {step_id for (step_id, _), n in Counter(revisions).items() if n > 1})


def ids_of(commits: Iterable[pa.Table]) -> list[str]:
    """Ids of the steps of one worker's log, in the order of their first rows."""
    return list(dict.fromkeys(i for rows in commits for i in rows.filter(rows["item_ids"].is_valid())["step_id"].to_pylist()))


def shard_differences(
    contents: Mapping[str, Any], logs: Mapping[str, Sequence[str]], steps: pa.Table, lineage: Mapping[str, int], *, capacity: int
) -> list[str]:
    """What a replay shard holds against what the logs say it should: of each worker the newest, and in all as many as fit.

    Args:
        contents: From `contents_of`, asked for all ids of `logs` in their order.
        logs: Ids of the shard's steps by worker, oldest first.
        steps: Merged steps of the logs.
        lineage: Last commit of each worker.
        capacity: Of the shard.
    """
    problems = []
    if dict(contents["lineage"]) != dict(lineage):
        problems.append(f"it has seen {contents['lineage']}, the logs end at {dict(lineage)}")
    missing, total = set(contents["missing"]), sum(map(len, logs.values()))
    newest = {worker: [i for i in ids if i not in missing] for worker, ids in logs.items()}
    for worker, ids in logs.items():
        if newest[worker] != ids[len(ids) - len(newest[worker]) :]:
            problems.append(f"of {worker} it holds {len(newest[worker])} steps that are not the newest")
    tail = [step_id for ids in newest.values() for step_id in ids]
    if contents["size"] != len(tail) or len(tail) != min(capacity, total):
        problems.append(f"it holds {contents['size']} steps, {len(tail)} of the logs' {total}, at most {capacity}")
        return problems
    ours = steps.take(pc.index_in(pa.array(tail, pa.string()), steps["step_id"]))
    for name in ("states", "scores", "actions", "anchor_actions", "rewards", "shown"):
        column = contents["columns"][name]
        pairs = np.array([len(shown) for shown in ours["shown"].to_pylist()])
        for i, (logged, g) in enumerate(zip(ours[name].to_pylist(), pairs.tolist(), strict=True)):
            if not np.array_equal(np.asarray(logged, np.float32).reshape(-1), column[i][:g].reshape(-1)):
                problems.append(f"{name} of step {tail[i]} is not what the log says")
                break
    for i, means in enumerate(ours["candidate_means"].to_pylist()):
        told, held = contents["columns"]["told"][i], contents["columns"]["candidate_means"][i]
        if told != (means is not None) or (means is not None and not np.array_equal(np.asarray(means, np.float32), held)):
            problems.append(f"candidate_means of step {tail[i]} is not what the log says")
            break
    here = set(tail)
    links = zip(tail, ours["ended"].to_pylist(), ours["next_id"].to_pylist(), strict=True)
    samplable = {i for i, ended, next_id in links if ended == Ended.TERMINATED or (ended == Ended.HAS_NEXT and next_id in here)}
    if wrong := samplable ^ set(contents["samplable"]):
        problems.append(f"{len(wrong)} steps can be drawn and should not, or the other way round: {sorted(wrong)[:NAMED]}")
    return problems


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What a run with faults left behind, beside the run without."""

    seed: int
    seconds: float  # of the load and its faults
    records: dict[str, int]  # by topic and by kind, as planned
    kills: dict[str, int]  # by part and point
    not_reached: list[str]  # faults that found no moment
    recovery_s: dict[str, float]  # part -> longest time from its death to its next commit or answer
    steps: StepDifference
    ledger: dict[str, dict[str, int]]
    ledger_without_faults: dict[str, dict[str, int]]
    dead_letters: dict[str, int]  # sent, unique, copies
    zombies: list[str]  # how each ended
    shards: dict[str, list[str]]  # shard -> what is wrong with it
    problems: list[str]  # everything that must not be; empty: exact

    @property
    def num_kills(self) -> int:
        """All of them."""
        return sum(self.kills.values())


def problems_of(
    *,
    steps: StepDifference,
    ledger: Mapping[str, Mapping[str, int]],
    expected: Mapping[str, Mapping[str, int]],
    planned: Mapping[str, int],
    in_topics: Mapping[str, int],
    refused: set[tuple[str, int, int]],
    letters: Counter[tuple[str, int, int]],
    shards: Mapping[str, Sequence[str]],
    not_reached: Sequence[str],
) -> list[str]:
    """Everything that must not be, one line each.

    Args:
        steps: Compared.
        ledger: Of the run with faults, {topic: {bucket: events}}.
        expected: Of the run without.
        planned: Records by kind, from the load.
        in_topics: Records by topic, as the broker has them.
        refused: (topic, partition, offset) that the run without faults refused.
        letters: (topic, partition, offset) -> copies in the dead-letter topics.
        shards: What is wrong with each.
        not_reached: Faults that found no moment: nothing is shown about them.
    """
    problems = [f"{name} found no moment in the load: give it more --events or --seconds" for name in not_reached]
    for what, ids in (("lost", steps.lost), ("added", steps.added), ("doubled", steps.doubled)):
        if ids:
            problems.append(f"{len(ids)} steps {what}: {ids[:NAMED]}")
    for column, ids in steps.changed.items():
        problems.append(f"{column} of {len(ids)} steps differs: {ids[:NAMED]}")
    for topic, buckets in expected.items():
        for bucket, amount in buckets.items():
            if (found := ledger[topic].get(bucket, 0)) != amount:
                problems.append(f"ledger of {topic}: {found} {bucket}, without faults {amount}")
        if (total := sum(ledger[topic].values())) != in_topics[topic]:
            problems.append(f"ledger of {topic} has {total} events, the topic {in_topics[topic]}")
        if in_topics[topic] != planned[topic]:
            problems.append(f"topic {topic} has {in_topics[topic]} records, {planned[topic]} were planned")
    for bucket, kind in (("duplicate", "duplicate"), ("dead_letter", "poison")):
        if (found := sum(buckets.get(bucket, 0) for buckets in ledger.values())) != planned[kind]:
            problems.append(f"{found} events counted as {bucket}, {planned[kind]} were sent")
    if set(letters) != refused or len(refused) != planned["poison"]:
        problems.append(
            f"{len(letters)} different dead letters, {len(refused)} refused without faults, {planned['poison']} sent; "
            f"unlike: {sorted(set(letters) ^ refused)[:NAMED]}"
        )
    return problems + [f"{shard}: {problem}" for shard, found in shards.items() for problem in found]
