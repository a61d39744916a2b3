"""What f is fitted to: by least squares, held fixed what it must be, from who stays and from how scores change."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.optimize import nnls

from esrl_ray.algo.split import (
    MAX_PRODUCTS,
    MEMORY,
    SCORE_RIDGE,
    Between,
    Lists,
    LongTerm,
    Sums,
    _equations,
    _nonnegative,
    held_fixed,
    num_held,
    num_products,
    products,
)

Doubles = npt.NDArray[np.float64]


def _lists(effects: Doubles, given: Doubles, ahead: Doubles, cohort: npt.NDArray[np.int64] | None = None) -> Lists:
    """Lists that pay 2 each; far away there are three times as many ahead."""
    n = len(ahead)
    effects_, given_, ahead_ = (torch.from_numpy(x).float() for x in (effects, given, ahead))
    cohorts = torch.zeros(n) if cohort is None else torch.from_numpy(cohort)
    return Lists(effects_, given_, cohorts, torch.stack([ahead_, 3 * ahead_], -1), torch.zeros(n), torch.full((n,), 2.0))


def _between(effects: Doubles, request: Doubles, items: Doubles, scores: Doubles) -> Between:
    a, b, c, d = (torch.from_numpy(x).float() for x in (effects, request, items, scores))
    return Between(a, b, held_fixed(c, b - 100), d, torch.ones(len(effects)))


def _nothing(effects: Doubles, request: Doubles, num_items: int, num_scores: int) -> Between:
    n = len(effects)
    nothing = (torch.zeros(n, width) for width in (effects.shape[1], request.shape[1], num_held(num_items, request.shape[1]), num_scores))
    return Between(*nothing, torch.zeros(n))  # type: ignore[call-arg]  # they are four


def test_it_is_that_of_least_squares_with_user_and_context_held_fixed() -> None:
    rng, n, half = np.random.default_rng(2), 40_000, 25_000
    request = rng.normal(size=(n, 2))
    effects = 100 + 30 * rng.normal(size=(n, 3)) + 20 * request[:, :1]  # not centred, and correlated with the user
    effects[:, 2] = 7.0  # never varies
    ahead = 0.05 * effects[:, 0] - 0.1 * effects[:, 1] + 3 * request[:, 0] + rng.normal(size=n)
    fitted = LongTerm(3, 2, 2, num_held(1, 2), 1)
    for part in (slice(half), slice(half, None)):
        fitted.add(fitted.sums(_lists(effects[part], request[part], ahead[part]), _nothing(effects[part], request[part], 1, 1)))
    fitted.solve()
    weight = np.sqrt(np.where(np.arange(n) < half, 1 - 1 / MEMORY, 1.0))[:, None]  # the first batch is older
    inputs = np.column_stack([effects[:, :2], request, np.ones(n)])
    expected = np.linalg.lstsq(inputs * weight, ahead * weight[:, 0], rcond=None)[0][:2]
    np.testing.assert_allclose(fitted.weights, [*3 * expected, 0], rtol=5e-3)  # far away it is three times as much
    pairs = torch.from_numpy(effects[:5]).float()
    np.testing.assert_allclose(fitted(pairs), pairs.numpy() @ fitted.weights.numpy() * 2, rtol=1e-5)  # a list pays 2


def test_only_lists_of_one_cohort_are_compared() -> None:
    """Cohort 1 is served by a policy that keeps users: its lists have more of everything, and of what keeps users, and more lists ahead."""
    rng, n = np.random.default_rng(5), 20_000
    cohort = rng.integers(0, 2, n)
    effects = rng.normal(size=(n, 2)) + 3 * cohort[:, None]
    ahead = 0.3 * effects[:, 0] + 5 * cohort + rng.normal(size=n)
    given, expected = rng.normal(size=(n, 2)), [3 * 0.3, 0.0]

    def fit(cohort: npt.NDArray[np.int64] | None) -> LongTerm:
        fitted = LongTerm(2, 2, 2, num_held(1, 2), 1)
        for rows in np.array_split(np.arange(n), 100):
            lists = _lists(effects[rows], given[rows], ahead[rows], None if cohort is None else cohort[rows])
            fitted.add(fitted.sums(lists, _nothing(effects[rows], given[rows], 1, 1)))
        fitted.solve()
        return fitted

    np.testing.assert_allclose(fit(cohort).weights, expected, atol=0.1)
    assert fit(None).weights[1] > 1  # all of them together: what the policy did is ascribed to each of its lists
    alone = fit(np.arange(n))  # nothing to compare with
    assert not alone.weights.any() and float(alone.leaving) == 0 and alone.gram[-1, -1] > 0


@pytest.mark.parametrize("num_cohorts", [1, 60])
def test_chance_looks_like_chance_however_many_cohorts_there_are(num_cohorts: int) -> None:
    """chi^2 of a fit to noise is D on average: means that were taken away leave fewer lists."""
    rng, found, d = np.random.default_rng(7), [], 8
    for _ in range(40):
        fitted = LongTerm(d, 2, 2, num_held(1, 2), 1)
        for _ in range(60):
            effects, given, ahead = rng.normal(size=(128, d)), rng.normal(size=(128, 2)), rng.normal(size=128)
            lists = _lists(effects, given, ahead, rng.integers(0, num_cohorts, 128))
            fitted.add(fitted.sums(lists, _nothing(effects, given, 1, 1)))
        stays = _equations(fitted.gram, fitted.moment, fitted.square, d, fitted.free)
        found.append(float(stays.chi_square(torch.linalg.solve(stays.matrix, stays.cross))[0]))
    assert np.mean(found) == pytest.approx(d, rel=0.2)


def test_an_input_that_varies_by_rounding_alone_gets_nothing() -> None:
    rng, n = np.random.default_rng(8), 2_000
    fitted, ahead = LongTerm(2, 2, 2, num_held(1, 2), 1), rng.normal(size=n)
    same = np.float32(0.1) + np.float32(1e-8) * rng.integers(-1, 2, n).astype(np.float32)  # a mean of .1, over many candidates or few
    assert len(set(same.tolist())) > 1
    effects = np.column_stack([same, ahead + rng.normal(size=n)])
    fitted.add(fitted.sums(_lists(effects, rng.normal(size=(n, 2)), ahead), _nothing(effects, effects, 1, 1)))
    fitted.solve()
    assert fitted.weights[0] == 0 and fitted.weights[1] > 1


def test_products_are_of_each_with_each_once() -> None:
    assert products(torch.tensor([[2.0, 3.0, 5.0]])).tolist() == [[4, 6, 10, 9, 15, 25]] and num_products(3) == 6
    most = next(n for n in range(100) if (n + 1) * (n + 2) // 2 > MAX_PRODUCTS)
    assert products(torch.ones(2, most)).shape[1] == num_products(most) > 0
    assert products(torch.ones(2, most + 1)).shape[1] == num_products(most + 1) == 0


def test_before_it_has_seen_anything_it_is_0() -> None:
    fitted = LongTerm(3, 4, 2, 6, 2)
    fitted.solve()
    assert not fitted(torch.ones(4, 3)).any() and fitted.leaving == 0


class _World(NamedTuple):
    """Lists of users whom nothing observed tells apart; what they are shown depends on who they are."""

    truth: Doubles  # (D,) what a unit of each effect does to the user
    effects: Doubles  # (n, D)
    ahead: Doubles  # (n,) noisy
    items: Doubles  # (n, I)
    scores: Doubles  # (n, k) only the first ones may see the session
    request: Doubles  # (n, U)


def _world(seed: int, *, reactions: Sequence[float], num_lists: int = 20_000, blind: int = 1, dims: int = 8) -> _World:
    rng, n = np.random.default_rng(seed), num_lists
    truth = rng.normal(size=dims)
    user = rng.normal(size=n)
    effects = rng.normal(size=(n, dims)) + np.outer(user, rng.normal(size=dims))
    done = effects @ truth
    request = 100 + rng.normal(size=(n, 2))
    items = rng.normal(size=(n, 3)) + np.outer(done, [0.3, 0.0, 0.0])  # which candidates come next goes along with what was shown
    mix = items @ np.array([-3.0, 1.0, 0.5]) + items[:, 1] * (request[:, 0] - 100)
    noise = 0.5 * rng.normal(size=(n, len(reactions) + blind))
    scores = np.column_stack([*(reaction * done + mix for reaction in reactions), *[0 * mix] * blind]) + noise
    ahead = 0.03 * done + 3 * rng.normal(size=n)
    return _World(truth, effects, ahead, items, scores, request)


def _sums(fitted: LongTerm, world: _World, rows: slice | npt.NDArray[np.int64], *, changes: bool = True) -> Sums:
    effects, request = world.effects[rows], world.request[rows]
    if changes:
        between = _between(effects, request, world.items[rows], world.scores[rows])
    else:
        between = _nothing(effects, request, 3, world.scores.shape[1])
    return fitted.sums(_lists(effects, request, world.ahead[rows]), between)


def _fit(world: _World, *, changes: bool) -> Doubles:
    fitted = LongTerm(len(world.truth), 2, 2, num_held(3, 2), world.scores.shape[1])
    fitted.add(_sums(fitted, world, slice(None), changes=changes))
    fitted.solve()
    return np.asarray(fitted.weights, np.float64)


def _agreement(found: Doubles, truth: Doubles) -> float:
    return float(found @ truth / np.linalg.norm(found) / np.linalg.norm(truth))


@pytest.mark.parametrize("seed", range(5))
def test_scores_that_react_to_the_session_tell_what_leaving_hardly_does(seed: int) -> None:
    world = _world(seed, reactions=[0.1])
    assert _agreement(_fit(world, changes=True), world.truth) > 0.98 > _agreement(_fit(world, changes=False), world.truth)


@pytest.mark.parametrize("seed", range(5))
def test_the_mix_of_candidates_is_not_what_a_list_did(seed: int) -> None:
    world = _world(seed, reactions=[0.1])
    wrong = np.linalg.lstsq(world.effects, world.scores[:, 0] - world.scores[:, 0].mean(), rcond=None)[0]
    assert _agreement(np.asarray(wrong, np.float64), world.truth) < 0
    assert _agreement(_fit(world, changes=True), world.truth) > 0.98


@pytest.mark.parametrize(("num_lists", "blind"), [(1500, 5), (1500, 20), (5000, 5), (5000, 20)])
def test_scores_that_do_not_react_leave_it_to_who_stays(num_lists: int, blind: int) -> None:
    worlds = [_world(seed, reactions=[], num_lists=num_lists, blind=blind) for seed in range(30)]
    lost = [_agreement(_fit(world, changes=False), world.truth) - _agreement(_fit(world, changes=True), world.truth) for world in worlds]
    assert np.mean(lost) < 0.01 and np.sum(np.array(lost) > 0.1) <= 1


@pytest.mark.parametrize("seed", range(5))
def test_scores_that_fall_for_users_who_stay_count_nothing(seed: int) -> None:
    world = _world(seed, reactions=[-0.1])
    np.testing.assert_allclose(_fit(world, changes=True), _fit(world, changes=False), rtol=1e-5, atol=1e-7)


def test_the_order_of_the_scores_does_not_matter() -> None:
    world = _world(3, reactions=[0.1, 0.09, 0.11, 0.1], num_lists=5000)
    turned = world._replace(scores=world.scores[:, ::-1].copy())
    np.testing.assert_allclose(_fit(turned, changes=True), _fit(world, changes=True), rtol=0.05, atol=2e-3)  # descent is not at its end


def test_the_length_is_that_of_lists_ahead_at_gamma() -> None:
    worlds = [_world(seed, reactions=[0.1]) for seed in range(20)]
    lengths = [float(_fit(world, changes=True) @ world.truth / (world.truth @ world.truth)) for world in worlds]
    assert np.mean(lengths) == pytest.approx(3 * 0.03, rel=0.1)


def test_a_list_that_was_drawn_often_tells_no_more() -> None:
    """Lists drawn again and again from a small log: trusted about as much as the log once, where draws in a row would tell more."""
    world, rng = _world(2, reactions=[0.1], num_lists=3000), np.random.default_rng(0)

    def fit(batches: Iterable[npt.NDArray[np.int64]]) -> tuple[Doubles, float]:
        fitted = LongTerm(8, 2, 2, num_held(3, 2), 2)
        for rows in batches:
            fitted.add(_sums(fitted, world, rows))
        fitted.solve()
        found = 1 / (1 / fitted.gram[-1, -1] + fitted.equal / fitted.pairs)
        return np.asarray(fitted.weights, np.float64), float(found)

    once, different = fit(np.array_split(rng.permutation(3000), 24))
    often, counted = fit(rng.integers(0, 3000, (190, 128)))
    assert different == pytest.approx(3000, rel=0.02)
    assert counted == pytest.approx(1 / (1 / 3000 + 1 / (190 * 128)), rel=0.15)
    assert _agreement(often, once) > 0.98


def test_products_are_held_fixed_as_far_as_they_are_few() -> None:
    items, request = torch.tensor([[2.0, 3.0]]), torch.tensor([[5.0, 7.0, 11.0]])
    assert held_fixed(items, request).tolist() == [[2, 3, 10, 14, 22, 15, 21, 33]] and num_held(2, 3) == 8
    wide = torch.ones(1, MAX_PRODUCTS // 16 + 1)
    assert torch.equal(held_fixed(wide, torch.ones(1, 16)), wide) and num_held(wide.shape[1], 16) == wide.shape[1]
    assert held_fixed(wide[:, 1:], torch.ones(1, 16)).shape[1] == num_held(wide.shape[1] - 1, 16) == 17 * (wide.shape[1] - 1)


def _with_ridge(a: Doubles, b: Doubles) -> tuple[Doubles, Doubles]:
    ridge = np.diag(np.sqrt(SCORE_RIDGE) * np.linalg.norm(a, axis=0))
    return np.vstack([a, ridge]), np.concatenate([b, np.zeros(len(ridge))])


def test_nonnegative_least_squares_are_those_of_scipy() -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        a, b = rng.normal(size=(40, 5)), rng.normal(size=40)
        found = _nonnegative(torch.from_numpy(a.T @ a), torch.from_numpy(a.T @ b).unsqueeze(-1))
        np.testing.assert_allclose(found[:, 0], nnls(*_with_ridge(a, b))[0], atol=1e-6)
        direction = rng.normal(size=40)
        parallel = direction[:, None] + 0.1 * rng.normal(size=(40, 4))
        found = _nonnegative(torch.from_numpy(parallel.T @ parallel), torch.from_numpy(parallel.T @ b).unsqueeze(-1))
        best = nnls(*_with_ridge(parallel, b))[0]
        np.testing.assert_allclose(found[:, 0], best, atol=0.02)
    assert not _nonnegative(torch.zeros(3, 3).double(), torch.zeros(3, 1).double()).any()


@pytest.mark.parametrize("largest", [0.0, 1.7e9, 20230428.0])
def test_a_large_feature_does_not_make_all_lists_one(largest: float) -> None:
    """A time in seconds beside the others: lists are told apart by what a float32 sum with it has no digits for."""
    rng, fitted = np.random.default_rng(0), LongTerm(3, 2, 2, num_held(1, 2), 1)
    for _ in range(20):
        rows = rng.integers(0, 400, 128)
        effects, given = (np.random.default_rng(7).normal(size=(400, width))[rows] for width in (3, 2))
        given[:, 0] += largest
        nothing = _nothing(effects, given, 1, 1)
        fitted.add(fitted.sums(_lists(effects, given, np.zeros(128)), nothing))
    assert float(fitted.equal / fitted.pairs) == pytest.approx(1 / 400, rel=0.15)
