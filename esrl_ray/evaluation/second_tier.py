"""Second tier of the gate: would the candidate earn more per session than the policy it replaces, by the log of held-out explore users?

The rule is a bound, not a mean: a gate on means promotes what noise prefers. `pass` needs the lower bound of the paired difference above
the tolerance, `block` the upper bound below it, and everything else, also a log with too little support, is `abstain`: more data is needed.
So a candidate that is as good as its anchor passes in a share of 1 - level of the cases, and is blocked as often.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from esrl_ray.config import Config
from esrl_ray.errors import MethodError, PolicyRejected
from esrl_ray.evaluation.offline import OffPolicy, Settings, Value
from esrl_ray.evaluation.support import Support
from esrl_ray.exploration import hash64
from esrl_ray.policy.policy import Policy
from esrl_ray.replay.steps import ARMS, Steps
from esrl_ray.vocabulary import Arm, Bools

VERDICT_FILE = "verdict.json"


class Rule(msgspec.Struct, frozen=True):
    """Thresholds of the second tier."""

    level: float = 0.95  # one-sided confidence of either bound
    tolerance: float = 0.0  # reward per session that the difference must exceed; below 0 a small loss is accepted
    held_out_share: float = 0.5  # of explore users; learning must leave them out for the verdict to be about new users
    salt: str = "second-tier"
    estimator: Literal["dr", "fqe"] = "dr"


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
    lists_digest: str = ""

    @property
    def passed(self) -> bool:
        """Whether it may be promoted."""
        return self.outcome == "pass"


def held_out(steps: Steps, rule: Rule) -> Bools:
    """(n,) lists of the explore users whom a salted hash of their number puts aside."""
    users, codes = np.unique(steps.users, return_inverse=True)
    aside = np.array([hash64(f"{rule.salt}/{user}") * 2.0**-64 < rule.held_out_share for user in users], np.bool_)
    lists: Bools = aside[codes] & (steps.arms == ARMS.index(Arm.EXPLORE))
    return lists


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
        text="no held-out explore users",
        candidate=candidate.manifest.digest,
        anchor=anchor.manifest.digest,
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
    try:
        log = OffPolicy(steps, config, num_candidates=num_candidates, seed=seed, settings=settings, users=aside)
        values = log.value(candidate, by_density=False), log.value(anchor, by_density=False)
    except MethodError as error:
        return msgspec.structs.replace(facts, text=str(error))
    return _decided(msgspec.structs.replace(facts, support=values[0].support, lists_digest=log.digest), values)


def _decided(facts: SecondTierVerdict, values: tuple[Value, Value]) -> SecondTierVerdict:
    """Apply the rule to the paired difference."""
    rule, name = facts.rule, facts.rule.estimator
    for who, value in zip(("candidate", "anchor"), values, strict=True):
        if name not in value.estimates:
            return msgspec.structs.replace(facts, text=f"too little support for the {who}: {value.refused[name]}")
    difference = values[0].estimates[name].minus(values[1].estimates[name])
    low, high = difference.bound(1 - rule.level), difference.bound(rule.level)
    outcome: Literal["pass", "block", "abstain"] = "pass" if low > rule.tolerance else "block" if high < rule.tolerance else "abstain"
    why = {
        "pass": f"lower bound {low:+.3f} above {rule.tolerance:g}",
        "block": f"upper bound {high:+.3f} below {rule.tolerance:g}",
        "abstain": f"[{low:+.3f}, {high:+.3f}] holds {rule.tolerance:g}: more data is needed",
    }[outcome]
    text = f"second tier: {outcome}: {name} difference {difference.mean:+.3f} per session, {why} ({facts.users} users, {facts.lists} lists)"
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
