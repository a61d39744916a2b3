"""Reward expressions: what they compute, how far they can reach, and that nothing else than them is accepted."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esrl_ray.expression import bounds, evaluate, parse, summands
from esrl_ray.reward import BehaviourConfig, RewardConfig, RewardGroup, rewards_of

NAMES = ("click", "watch_s", "like")
VALUES = np.array([[0, 0, 0], [1, 5, 0], [1, 10, 1], [0, 11, 1], [-1, -3, 0.5], [1, 300, 1]], np.float32)
COLUMNS = dict(zip(NAMES, VALUES.T, strict=True))


def slow(text: str, click: float, watch_s: float, like: float) -> float:
    """What Python itself makes of it."""
    scope = {"click": click, "watch_s": watch_s, "like": like, "min": min, "max": max, "log1p": lambda x: math.log1p(max(x, 0))}
    return float(eval(text, {"__builtins__": {}}, scope))


@pytest.mark.parametrize(
    "text",
    [
        "click",
        "0.05 * min(watch_s, 120) + 0.5 * (watch_s > 10) + 5 * like",
        "2*click + log1p(watch_s) + (watch_s > 10)",
        "click * watch_s / 60 - -like",
        "max(click, like, 0.25) * (1 <= watch_s < 11)",
        "(click == 1) * (like != 0) + 3 * (watch_s <= 5) + (like >= 0.5)",
        "1 - (click + 2 * (like - watch_s / 4)) * 3",
    ],
)
def test_an_expression_means_what_python_means_by_it(text: str) -> None:
    node, expected = parse(text, NAMES), [slow(text, *row) for row in VALUES.tolist()]
    assert evaluate(node, COLUMNS).dtype == np.float32
    np.testing.assert_allclose(evaluate(node, COLUMNS), expected, rtol=1e-5, atol=1e-6)
    summed = sum(coefficient * np.asarray(evaluate(part, COLUMNS), np.float64) for coefficient, part in summands(node))
    np.testing.assert_allclose(summed, expected, rtol=1e-5, atol=1e-5)


def test_a_sum_falls_into_its_summands() -> None:
    parts = summands(parse("(watch_s / 4 - 2 * like) * 3 + (watch_s > 10) * like - 1", NAMES))
    assert [coefficient for coefficient, _ in parts] == [0.75, -6.0, 1.0, -1.0]


_NUMBERS = st.sampled_from(["0.5", "2", "-3", "10"])
_EXPRESSIONS = st.recursive(
    _NUMBERS | st.sampled_from(NAMES),
    lambda e: (
        st.tuples(e, st.sampled_from(["+", "-", "*", ">", "<="]), e).map(lambda t: f"({t[0]} {t[1]} {t[2]})")
        | st.tuples(st.sampled_from(["min", "max"]), e, e).map(lambda t: f"{t[0]}({t[1]}, {t[2]})")
        | e.map(lambda t: f"log1p({t})")
        | e.map(lambda t: f"({t} / 4)")
    ),
    max_leaves=8,
)


@given(text=_EXPRESSIONS.map(lambda t: f"{t} + 0 * click"), rows=st.lists(st.tuples(*[st.floats(-9, 9, width=32)] * 3), min_size=1))
def test_no_value_is_beyond_the_bounds_or_not_finite(text: str, rows: list[tuple[float, ...]]) -> None:
    node = parse(text, NAMES)
    low, high = bounds(node, dict.fromkeys(NAMES, (-9.0, 9.0)))
    values = evaluate(node, dict(zip(NAMES, np.array(rows, np.float32).T, strict=True)))
    room = 1e-6 * max(1.0, abs(low), abs(high))  # columns of log1p may differ from single numbers in the last bit
    assert np.isfinite(values).all() and low - room <= values.min() and values.max() <= high + room


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not an expression"),
        ("2 *", "not an expression at column"),
        ("2", "uses no behaviour"),
        ("clik + like", "undeclared behaviour 'clik' at column 1; nearest: click"),
        ("click + log(watch_s)", r"'log\(watch_s\)' at column 9 is not allowed; there are .*log1p"),
        ("log1p(click, like)", "log1p at column 1 has 2 arguments, expected 1"),
        ("min(click)", "min at column 1 has 1 arguments, expected at least 2"),
        ("click / like", "division by 'like'"),
        ("click / (2 - 2)", "divide by a number other than 0"),
        ("click and like", "is a product of comparisons"),
        ("not click", "turn the comparison round"),
        ("1 if click else 0", "multiply by a comparison"),
        ("watch_s ** 2", "write a product"),
        ("'click' * 3", "not allowed"),
        ("click * True", "not allowed"),
        ("1e999 * click", "no number of 32 bits"),
        ("min", "undeclared behaviour 'min'"),
        ("__import__('os').system('true') + click", "not allowed"),
        ("click.real", "not allowed"),
        ("[click][0]", "not allowed"),
        ("(lambda: click)()", "not allowed"),
        ("min(click, *like)", "not allowed"),
        ("min(click, like, key=like)", "not allowed"),
        ("click if (x := 1) else 0", "not allowed"),
        ("click + " * 400 + "click", "characters, at most"),
        ("1" * 401 + " * click", "11111111111111111111 at column 1 is no number of 32 bits"),
        ("-" * 1_500 + "like", "1501 parts inside each other, at most 100"),
        ("+".join(["like"] * 300), "300 parts inside each other"),
        ("(" * 190 + "like" + ")" * 200, "not an expression"),
        ("click\0", "not an expression"),
        ("click / (1 > 0)", "divide by a number other than 0"),
        ("click / (16777217 - 16777216 - 0)", "divide by a number other than 0"),
    ],
)
def test_nothing_else_is_an_expression(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse(text, NAMES)


def reward(expression: str, **more: float) -> RewardConfig:
    """One group over three behaviours."""
    behaviours = tuple(BehaviourConfig(name=name, cap=100.0) for name in NAMES)
    return RewardConfig(behaviours=behaviours, groups=(RewardGroup(name="all", expression=expression),), **more)


@pytest.mark.parametrize(
    "text",
    [
        "0 * (1e30 * click * 1e30)",
        "max(min(1e30 * click * 1e30 - 1e30 * like * 1e30, 1), -1)",
        "min(log1p(click * 1e30 * 1e30), 1)",
        "(click * 1e38 > 1) * like",
        "0 * ((click + 1e9 - 1e9) * 6e36)",  # 40 + 1e9 is 1e9 + 64 in 32 bits
        "click * (1e30 * 1e30) * 0",
        "like / 1e-40 * 1e-40",
    ],
)
def test_a_part_beyond_32_bits_is_refused_though_the_whole_would_be_small(text: str) -> None:
    with pytest.raises(ValueError, match=r"groups\.0\.expression \(all\): .* can exceed 3\.4e\+38"):
        reward(text)


def test_a_long_sum_in_brackets_and_a_deep_one_are_evaluated() -> None:
    for text in ("+".join(["(" + "+".join(["like"] * 20) + ")"] * 15), "-" * 98 + "like"):
        assert reward(text).digest and len(rewards_of(np.ones((1, 3), np.float32), reward(text)))


def test_the_digest_tells_rewards_apart_and_not_how_they_are_written() -> None:
    assert reward("2*click+like").digest == reward("(2 * click) + like").digest
    others = [reward("2*click+like", scale=2.0), reward("2.5*click+like"), RewardConfig()]
    assert len({r.digest for r in [reward("2*click+like"), *others]}) == 4
    again = RewardConfig.model_validate_json(reward("2*click+like").canonical)
    assert again.digest == reward("2*click+like").digest


def test_rewards_keep_the_shape_of_the_pairs() -> None:
    assert rewards_of(np.zeros((3, 4, 3), np.float32), reward("1 + click")).tolist() == [[[1.0]] * 4] * 3
