"""Second tier of the gate: would the candidate earn more per session than the policy it replaces, by the log of held-out explore users?

The rule is a bound, not a mean: a gate on means promotes what noise prefers. `pass` needs the lower bound of the paired difference above
the tolerance, `block` the upper bound below it, and everything else, also a log with too little support, is `abstain`: more data is needed.
So a candidate that is as good as its anchor passes in a share of 1 - level of the cases, and is blocked as often, as far as the estimate is
right: where the candidate shows what the log rarely shows it is too low (by 1.5 per session on average,
benchmarks/results/estimators.md), and blocks more.

`judge_log` is what the training loop and `esrl policy judge` call: it reads the newest lists of the users whom learning left out.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from esrl_ray.config import Config
from esrl_ray.errors import MethodError, PolicyRejected
from esrl_ray.evaluation.offline import OffPolicy, Settings, Value
from esrl_ray.evaluation.support import Support
from esrl_ray.exploration import HELD_OUT_SALT, is_held_out
from esrl_ray.policy.policy import Policy
from esrl_ray.replay.steps import ARMS, Steps
from esrl_ray.vocabulary import Bools

VERDICT_FILE = "verdict.json"
NUM_LISTS = 60_000
"""Newest lists of held-out users that `judge_log` asks for. In the demo's world, whose rewards vary by 1.1 of their mean per session, a
policy 24 % better passed in 2 of 3 logs of 20,000 lists and one 12 % worse was blocked in 1 of 3; of 60,000 lists all were decided."""

KeepRows = Callable[[pa.Table], Bools]
"""Rows of the step log -> (n,) which of them count."""

ReadNewest = Callable[[int, KeepRows], pa.Table]
"""(number, which) -> about so many of the newest steps whose rows count, one whole row each, in order of event time."""


class Rule(msgspec.Struct, frozen=True):
    """Thresholds of the second tier."""

    level: float = 0.95  # one-sided confidence of either bound
    tolerance: float = 0.0  # reward per session that the difference must exceed; below 0 a small loss is accepted
    held_out_share: float = 0.5  # of explore users
    salt: str = HELD_OUT_SALT
    estimator: Literal["dr", "fqe"] = "dr"
    unseen: bool = True  # learning left these users out; else the candidate was learnt from them, and the verdict flatters it

    @classmethod
    def of(cls, config: Config) -> Rule:
        """The deployment's rule: its held-out users, or every explore user where it holds none out."""
        share = config.policy.held_out_share
        return cls(held_out_share=share) if share else cls(held_out_share=1.0, unseen=False)


class SecondTierVerdict(msgspec.Struct, frozen=True, kw_only=True):
    """What the second tier says, with all that it was said from."""

    outcome: Literal["pass", "block", "abstain"]
    text: str
    candidate: str  # digests of the policies
    anchor: str
    rule: Rule
    settings: Settings
    difference: float | None = None  # reward per session, candidate - anchor
    low: float | None = None  # one-sided bounds of the rule's level
    high: float | None = None
    support: Support | None = None  # of the candidate
    lists: int = 0
    users: int = 0
    first_list: int = 0  # range of the held-out lists in the log that was given
    last_list: int = 0
    rounds: tuple[int, int] = (0, 0)
    times_ms: tuple[int, int] = (0, 0)  # event times of those lists; 0 where they came without
    lists_digest: str = ""
    against: int = 0  # version of the anchor

    @property
    def passed(self) -> bool:
        """Whether it may be promoted."""
        return self.outcome == "pass"


def held_out(steps: Steps, rule: Rule) -> Bools:
    """(n,) lists of the explore users whom a salted hash of their id puts aside."""
    keys = zip(steps.users.tolist(), steps.arms.tolist(), strict=True)
    aside = [is_held_out(steps.user_id(user), ARMS[arm], share=rule.held_out_share, salt=rule.salt) for user, arm in keys]
    return np.array(aside, np.bool_)


def held_out_rows(rows: pa.Table, *, rule: Rule) -> Bools:
    """The same of rows of the step log."""
    keys = zip(rows["user_id"].to_pylist(), rows["arm"].to_pylist(), strict=True)
    return np.array([is_held_out(user, arm, share=rule.held_out_share, salt=rule.salt) for user, arm in keys], np.bool_)


def judge_log(
    candidate: Policy, anchor: Policy, config: Config, read_newest: ReadNewest, *, seed: int, settings: Settings | None = None
) -> SecondTierVerdict:
    """Judge a candidate by the newest lists of the deployment's held-out users; see `judge_second_tier`.

    A session whose beginning is not among them is left out: what it earned before would be missing.

    Args:
        candidate: To be promoted.
        anchor: What it would replace.
        config: Deployment.
        read_newest: Reads the step log.
        seed: Of folds, features and resamples.
        settings: How estimates are made.

    Returns:
        The verdict, with its event times; never raises for a log that says too little.
    """
    rule = Rule.of(config)
    steps, num_candidates, times_ms = _whole_sessions(read_newest(NUM_LISTS, partial(held_out_rows, rule=rule)), config)
    verdict = judge_second_tier(candidate, anchor, steps, config, num_candidates=num_candidates, seed=seed, rule=rule, settings=settings)
    return msgspec.structs.replace(verdict, times_ms=times_ms)


def _whole_sessions(table: pa.Table, config: Config) -> tuple[Steps, npt.NDArray[np.int32], tuple[int, int]]:
    """Steps of the sessions whose beginning is here, their numbers of candidates, and first and last event time."""
    begun = table.filter(pc.equal(table["index"], 0))["session_id"]
    table = table.filter(pc.is_in(table["session_id"], value_set=pc.unique(begun)))
    times = table["event_time_ms"].to_numpy()
    ends = (int(times[0]), int(times[-1])) if len(times) else (0, 0)
    return Steps.from_table(table, config), table["num_candidates"].to_numpy(), ends


def judge_second_tier(
    candidate: Policy,
    anchor: Policy,
    steps: Steps,
    config: Config,
    *,
    num_candidates: npt.ArrayLike,
    seed: int,
    rule: Rule | None = None,
    settings: Settings | None = None,
) -> SecondTierVerdict:
    """Judge a candidate against what it would replace.

    Args:
        candidate: To be promoted.
        anchor: What serves as anchor now, or the control policy.
        steps: Whole sessions in order of time.
        config: Deployment.
        num_candidates: (n,) or one number N, candidates of each request.
        seed: Of folds, features and resamples.
        rule: Thresholds.
        settings: How estimates are made, and the least support.

    Returns:
        The verdict; never raises for a log that says too little: that is `abstain`.
    """
    rule, settings = rule or Rule(), settings or Settings()
    aside = held_out(steps, rule)
    numbers = np.flatnonzero(aside)
    facts = SecondTierVerdict(
        outcome="abstain",
        text="second tier: abstain: no held-out explore users",
        candidate=candidate.manifest.digest,
        anchor=anchor.manifest.digest,
        against=anchor.version,
        rule=rule,
        settings=settings,
        lists=len(numbers),
        users=len(np.unique(steps.users[aside])),
    )
    if not len(numbers):
        return facts
    rounds = steps.rounds[numbers]
    facts = msgspec.structs.replace(
        facts, first_list=int(numbers[0]), last_list=int(numbers[-1]), rounds=(int(rounds.min()), int(rounds.max()))
    )
    if few := _too_few(facts, len(np.unique(steps.sessions[aside]))):
        return msgspec.structs.replace(facts, text=f"second tier: abstain: too little support: {few}")
    try:
        log = OffPolicy(steps, config, num_candidates=num_candidates, seed=seed, settings=settings, users=aside)
        values = log.value(candidate, by_density=False), log.value(anchor, by_density=False)
    except MethodError as error:
        return msgspec.structs.replace(facts, text=f"second tier: abstain: {error}")
    return _decided(msgspec.structs.replace(facts, support=values[0].support, lists_digest=log.digest), values)


def _too_few(facts: SecondTierVerdict, sessions: int) -> str:
    """What no estimate could mend, seen before any is made, so that a young log costs next to nothing."""
    limits = facts.settings.limits
    counts = ((facts.users, "users", limits.min_users), (sessions, "sessions", limits.min_sessions), (facts.lists, "lists", limits.min_ess))
    return "; ".join(f"{name} {found}, at least {least:g} needed" for found, name, least in counts if found < least)


def abstained(candidate: Policy, anchor: Policy, why: str, *, rule: Rule) -> SecondTierVerdict:
    """The verdict of a judge that could not finish."""
    return SecondTierVerdict(
        outcome="abstain",
        text=f"second tier: abstain: {why}",
        candidate=candidate.manifest.digest,
        anchor=anchor.manifest.digest,
        against=anchor.version,
        rule=rule,
        settings=Settings(),
    )


def _decided(facts: SecondTierVerdict, values: tuple[Value, Value]) -> SecondTierVerdict:
    """Apply the rule to the paired difference."""
    rule, name = facts.rule, facts.rule.estimator
    for who, value in zip(("candidate", "anchor"), values, strict=True):
        if name not in value.estimates:
            return msgspec.structs.replace(facts, text=f"second tier: abstain: too little support for the {who}: {value.refused[name]}")
    difference = values[0].estimates[name].minus(values[1].estimates[name])
    low, high = difference.bound(1 - rule.level), difference.bound(rule.level)
    outcome: Literal["pass", "block", "abstain"] = "pass" if low > rule.tolerance else "block" if high < rule.tolerance else "abstain"
    why = {
        "pass": f"lower bound {low:+.3f} above {rule.tolerance:g}",
        "block": f"upper bound {high:+.3f} below {rule.tolerance:g}",
        "abstain": f"[{low:+.3f}, {high:+.3f}] holds {rule.tolerance:g}: more data is needed",
    }[outcome]
    users = f"{facts.users} users{'' if rule.unseen else ', whom learning saw'}, {facts.lists} lists"
    text = f"second tier: {outcome}: {name} difference {difference.mean:+.3f} per session, {why} ({users})"
    return msgspec.structs.replace(facts, outcome=outcome, text=text, difference=difference.mean, low=low, high=high)


def save_verdict(folder: Path, verdict: SecondTierVerdict) -> None:
    """Write the verdict beside a policy's files: temporary file, fsync, rename."""
    temporary = folder / f".{VERDICT_FILE}.{os.getpid()}"
    with temporary.open("wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(verdict), indent=1))
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(folder / VERDICT_FILE)


def load_verdict(folder: Path) -> SecondTierVerdict | None:
    """The verdict beside a policy; None where there is none.

    Raises:
        PolicyRejected: the file is damaged.
    """
    path = folder / VERDICT_FILE
    if not path.exists():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=SecondTierVerdict)
    except msgspec.MsgspecError as error:
        raise PolicyRejected(f"not a verdict: {error}", str(path), "judge the policy again") from error
