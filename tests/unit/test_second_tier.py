"""The second tier of the gate: an A/A pair passes at its nominal rate, a worse policy is blocked, too little data abstains."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from scipy.stats import binom

from esrl_ray.config import Config
from esrl_ray.errors import PolicyRejected
from esrl_ray.evaluation.offline import Settings
from esrl_ray.evaluation.second_tier import (
    VERDICT_FILE,
    Rule,
    SecondTierVerdict,
    held_out,
    judge_log,
    judge_second_tier,
    load_verdict,
    save_verdict,
)
from esrl_ray.evaluation.support import SupportLimits
from tests.two_items import ALWAYS_A, ALWAYS_B, log_of, table_of, two_items, vector

LIMITS = SupportLimits(min_users=50, min_sessions=50, min_overlap=0.3, min_ess=100.0, min_ess_share=0.1)
FAST = Settings(num_updates=0, resamples=100, num_groups=100, limits=LIMITS)
FAR = Settings(
    num_updates=0, resamples=20, limits=SupportLimits(min_users=1, min_sessions=1, min_overlap=0.99, min_ess=1.0, min_ess_share=0.0)
)
ALL = Rule(held_out_share=1.0)
WORSE, EQUAL = (0.5, 0.05), (0.25, 0.25)
"""Chances to leave after A and B: with reward 1 and .2 always A is worth 2 and always B 4; with equal ones and rewards nothing matters."""


@pytest.fixture(scope="module")
def setting() -> Config:
    return two_items()


def judge(
    setting: Config, *, sessions: int, seed: int, candidate: float, leaves: tuple[float, float], **options: object
) -> SecondTierVerdict:
    """A candidate's power against the other item's, on a log of its own."""
    rewards = (1.0, 0.2) if leaves == WORSE else (1.0, 1.0)
    steps = log_of(setting, rewards, leaves, sessions=sessions, seed=seed, spread=0.5)
    settings, rule = options.get("settings", FAST), options.get("rule", ALL)
    assert isinstance(settings, Settings) and isinstance(rule, Rule)
    return judge_second_tier(
        vector(setting, candidate), vector(setting, -candidate), steps, setting, num_candidates=2, seed=seed, rule=rule, settings=settings
    )


def test_a_worse_policy_is_blocked_and_a_better_one_passes(setting: Config) -> None:
    worse = judge(setting, sessions=800, seed=0, candidate=ALWAYS_A, leaves=WORSE)
    assert worse.outcome == "block" and not worse.passed
    assert worse.difference == pytest.approx(-2.0, abs=0.8)
    assert worse.high is not None and worse.high < 0
    better = judge(setting, sessions=800, seed=1, candidate=ALWAYS_B, leaves=WORSE)
    assert better.outcome == "pass" and better.passed
    assert "lower bound" in better.text


def test_two_policies_of_equal_worth_pass_and_are_blocked_at_the_nominal_rate(setting: Config) -> None:
    # One-sided 80 %: pass and block are each due in a fifth of 60 logs, 12 +- 3.1.
    rule, settings = Rule(held_out_share=1.0, level=0.8), Settings(num_updates=0, resamples=60, num_groups=40, limits=LIMITS)
    outcomes = [
        judge(setting, sessions=150, seed=100 + seed, candidate=ALWAYS_A, leaves=EQUAL, rule=rule, settings=settings).outcome
        for seed in range(60)
    ]
    least, most = binom.ppf([0.0005, 0.9995], len(outcomes), 1 - rule.level)
    assert least <= outcomes.count("pass") <= most
    assert least <= outcomes.count("block") <= most


def test_the_same_policy_twice_differs_by_nothing_and_does_not_pass(setting: Config) -> None:
    steps = log_of(setting, (1.0, 0.2), WORSE, sessions=300, seed=0)
    same = vector(setting, 0.01)
    for tolerance, outcome in ((0.0, "abstain"), (-0.01, "pass")):
        rule = Rule(held_out_share=1.0, tolerance=tolerance)
        verdict = judge_second_tier(same, same.numbered(9), steps, setting, num_candidates=2, seed=0, rule=rule, settings=FAST)
        assert (verdict.outcome, verdict.difference) == (outcome, 0.0)


def test_too_little_data_abstains_with_the_reason(setting: Config) -> None:
    few = judge(setting, sessions=20, seed=0, candidate=ALWAYS_A, leaves=WORSE)
    assert few.outcome == "abstain" and "too little support: users 20, at least 50 needed; sessions 20" in few.text
    apart = judge(setting, sessions=60, seed=0, candidate=ALWAYS_A, leaves=WORSE, settings=FAR)
    assert apart.outcome == "abstain" and "too little support for the candidate: overlap" in apart.text
    no_limits = Settings(num_updates=0, resamples=10, limits=SupportLimits(0, 0, 0.0, 0.0, 0.0, max_width=1e9))
    alone = judge(setting, sessions=1, seed=0, candidate=ALWAYS_A, leaves=WORSE, settings=no_limits)
    assert alone.outcome == "abstain" and "the lists of 1 users do not make two folds" in alone.text
    nobody = judge(setting, sessions=20, seed=0, candidate=ALWAYS_A, leaves=WORSE, rule=Rule(held_out_share=0.0))
    assert (nobody.outcome, nobody.text, nobody.lists) == ("abstain", "second tier: abstain: no held-out explore users", 0)


def test_held_out_users_are_a_stable_share_and_another_salt_takes_others(setting: Config) -> None:
    steps = log_of(setting, (1.0, 1.0), EQUAL, sessions=600, seed=0)
    aside = held_out(steps, Rule())
    assert 0.4 < len(np.unique(steps.users[aside])) / 600 < 0.6
    assert not set(steps.users[aside]) & set(steps.users[~aside])
    assert not np.array_equal(aside, held_out(steps, Rule(salt="other")))


def test_what_is_not_held_out_does_not_change_the_verdict(setting: Config) -> None:
    verdicts = []
    for change in (0.0, 5.0):
        steps = log_of(setting, (1.0, 0.2), WORSE, sessions=600, seed=0)
        steps.columns["rewards"][~held_out(steps, Rule())] += change
        arguments = {"num_candidates": 2, "seed": 0, "rule": Rule(), "settings": FAST}
        verdicts.append(judge_second_tier(vector(setting, ALWAYS_A), vector(setting, ALWAYS_B), steps, setting, **arguments))  # type: ignore[arg-type]
    assert (verdicts[0].difference, verdicts[0].low) == (verdicts[1].difference, verdicts[1].low)


def test_sessions_whose_beginning_is_not_in_the_log_do_not_enter_as_half_ones(setting: Config) -> None:
    table = table_of(log_of(setting, (1.0, 0.2), WORSE, sessions=400, seed=0))
    longer = pc.unique(table.filter(pc.equal(table["index"], 1))["session_id"]).to_pylist()[::2]
    begins_late = pc.is_in(table["session_id"], value_set=pa.array(longer))
    cut = table.filter(pc.invert(pc.and_(begins_late, pc.equal(table["index"], 0))))
    whole = table.filter(pc.invert(begins_late))
    assert len(longer) > 100 and len(cut) == len(table) - len(longer) > len(whole)

    def judged(read: pa.Table) -> SecondTierVerdict:
        return judge_log(vector(setting, ALWAYS_B), vector(setting, ALWAYS_A), setting, lambda number, keep: read, seed=0, settings=FAST)

    verdict = judged(cut)
    assert verdict == judged(whole) and verdict.difference is not None
    assert (verdict.lists, verdict.users) == (len(whole), 400 - len(longer))


def test_the_verdict_comes_back_from_beside_the_policy_with_all_it_was_said_from(setting: Config, tmp_path: Path) -> None:
    verdict = judge(setting, sessions=200, seed=0, candidate=ALWAYS_A, leaves=WORSE)
    folder = tmp_path / "00000007"
    vector(setting, ALWAYS_A).save(folder)
    assert load_verdict(folder) is None
    save_verdict(folder, verdict)
    again = load_verdict(folder)
    assert again == verdict
    assert again is not None and again.rule.level == 0.95 and again.lists_digest and again.last_list > again.first_list
    (folder / VERDICT_FILE).write_text("{")
    with pytest.raises(PolicyRejected, match="not a verdict"):
        load_verdict(folder)
