"""Policies of equal worth for the second tier: what makes them equal, and what the report counts."""

from __future__ import annotations

import numpy as np

from benchmarks.equal_policies import LEVELS, NOISE, Hashed, Row, report
from esrl_ray.config import Config
from esrl_ray.policy.policy import Policy


def test_hashed_policies_add_uniform_noise_of_the_pair_and_of_nothing_else_to_control(config: Config) -> None:
    spec, rng = config.spec.build(), np.random.default_rng(0)
    states = rng.standard_normal((400, 5, spec.num_features)).astype(np.float32)
    scores = rng.uniform(0.01, 1, (400, 5, spec.num_scores)).astype(np.float32)
    codes = np.zeros((400, 5, spec.num_categorical), np.int32)
    control = Policy.static(spec).fuse(states, codes, scores)[1]
    noise = [Hashed.of_salt(config, salt).fuse(states, codes, scores)[1] - control for salt in (1, 2)]
    for each in noise:
        assert np.abs(each).max() <= NOISE / 2 + 1e-4
        # 2,000 uniform numbers: the mean within four standard errors of 0, a quarter in each quarter of the range.
        assert abs(each.mean()) < 4 * NOISE / np.sqrt(12 * each.size)
        assert np.allclose(np.histogram(each, 4, (-NOISE / 2, NOISE / 2))[0] / each.size, 0.25, atol=0.04)
    assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 0.1
    turned = Hashed.of_salt(config, 1).fuse(states, codes, scores[:, ::-1].copy())[1]
    assert np.allclose(turned[:, ::-1] - control, noise[0], atol=1e-4), "wherever the pair stands"


def test_the_report_counts_what_was_judged_beside_what_is_due() -> None:
    said = {str(level): "pass" for level in LEVELS}
    rows = [
        Row(0, 0.7, 0.2, said, "c"),
        Row(1, 0.7, -0.1, dict.fromkeys(said, "block"), "c"),
        Row(2, 0.3, None, dict.fromkeys(said, "abstain"), "c"),
    ]
    text = report(rows)
    assert "3 logs" in text and "1 were refused" in text and "| 80% | 0.4 | 1 | 1 | 0 to 2 |" in text
