"""The searched vector: what counts as an explored session, the two objectives, the searchers, and that rounds find what pays."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from esrl_ray.config import Config, SpecConfig
from esrl_ray.errors import MethodError
from esrl_ray.methods.catalogue import SEARCH
from esrl_ray.methods.search import ExploredSessions, RankingQuality, ResponseSurface, SearchSettings, VectorSearch
from esrl_ray.methods.searchers import Cem, Doubles, MakeSearcher, maximise
from esrl_ray.policy.policy import PolicyKind
from esrl_ray.replay.steps import ARMS, LEFT, UNKNOWN, Steps
from esrl_ray.spec import Spec
from esrl_ray.vocabulary import Arm, Floats

CONFIG = Config(spec=SpecConfig(user_features=("act",), item_features=("age",)))
SPEC = CONFIG.spec.build()
A, G = SPEC.num_actions, CONFIG.max_pairs
OPTIMUM = np.array([0.6, -0.4, 0.3, 0.0])
EXPLORE, EXPLOIT = ARMS.index(Arm.EXPLORE), ARMS.index(Arm.EXPLOIT)
each_searcher = pytest.mark.parametrize("name", list(SEARCH))


def worth(vectors: Doubles) -> Doubles:
    """Best at OPTIMUM, where it is 1."""
    value: Doubles = 1 - np.square(vectors - OPTIMUM).sum(-1)
    return value


def add_session(
    steps: Steps,
    vectors: Floats | Doubles,
    *,
    number: int,
    reward: float = 0.0,
    arm: int = EXPLORE,
    turn: npt.ArrayLike = 0,
    ended: bool = True,
) -> None:
    """One session with a vector for each of its steps, (n, A) or (n, G, A); the reward comes with the last step."""
    n = len(vectors)
    wide = np.broadcast_to(vectors if vectors.ndim == 3 else vectors[:, None], (n, G, A)).astype(np.float32)
    shown = np.broadcast_to((np.arange(G) < CONFIG.serve.list_size).astype(np.float32), (n, G))
    rewards = np.zeros((n, G, 1), np.float32)
    rewards[-1, 0] = reward
    columns = {
        "states": np.zeros((n, G, SPEC.num_features), np.float32),
        "categorical": np.zeros((n, G, 0), np.int32),
        "scores": np.ones((n, G, SPEC.num_scores), np.float32),
        "actions": wide,
        "anchor_actions": np.zeros_like(wide),
        "rewards": rewards,
        "behaviours": np.zeros((n, G, 1), np.float32),
        "shown": shown,
        "valid": np.ones_like(shown),
    }
    numbers = steps.add({"sessions": number, "users": number, "rounds": turn, "arms": arm}, columns)
    steps.follow(numbers, np.append(numbers[1:], LEFT if ended else UNKNOWN))


def search(name: str, *, seed: int = 0, settings: SearchSettings | None = None) -> VectorSearch:
    make_searcher, default = SEARCH[name]
    return VectorSearch(name, CONFIG, seed=seed, make_searcher=make_searcher, settings=settings or default)


def play_rounds(method: VectorSearch, *, seed: int, rounds: int = 6, sessions: int = 300) -> Doubles:
    """The vector after rounds of sessions whose reward is exponential with a mean that the vector decides: as noisy as real ones."""
    rng, steps = np.random.default_rng(seed), Steps(CONFIG, 2 * rounds * sessions)
    for turn in range(rounds):
        exploration = method.exploration()
        assert exploration.scope == "session" and exploration.std is not None
        centre = exploration.centre.parameters["action"]
        for n in range(sessions):
            vector = np.clip(centre + exploration.std * rng.standard_normal(A), -1, 1)
            reward = float(10 * np.exp(worth(vector)) * rng.exponential())
            add_session(steps, np.tile(vector, (2, 1)), number=turn * sessions + n, reward=reward, turn=turn)
        policy = method.fit(steps)
    assert policy.manifest.kind is PolicyKind.STATIC and policy.manifest.round == rounds
    vector = policy.parameters["action"].astype(np.float64)
    return vector


@each_searcher
def test_a_searcher_finds_the_maximum_of_a_function(name: str) -> None:
    make_searcher, settings = SEARCH[name]
    found = maximise(worth, make_searcher(np.zeros(A), 0.5, 1), population=settings.population, generations=settings.generations)
    assert worth(found) > 0.97 and (np.abs(found) <= 1).all()


@each_searcher
def test_a_searcher_learns_from_vectors_that_it_was_not_asked_for(name: str) -> None:
    rng, searcher = np.random.default_rng(0), SEARCH[name][0](np.zeros(A), 0.5, 0)
    before = worth(searcher.centre)
    for _ in range(3):
        vectors = np.clip(searcher.centre + 0.5 * rng.standard_normal((100, A)), -1, 1)
        searcher.tell(vectors, worth(vectors))
    assert worth(searcher.centre) > before + 0.2 and (searcher.spread > 0).all()


@each_searcher
def test_a_searcher_leaves_numpys_global_state_alone(name: str) -> None:
    np.random.seed(5)
    before = np.random.random(3)
    np.random.seed(5)
    searcher = SEARCH[name][0](np.zeros(A), 0.5, 0)
    searcher.tell(vectors := searcher.ask(10), worth(vectors))
    np.testing.assert_array_equal(np.random.random(3), before)


def test_cem_moves_to_the_mean_and_spread_of_its_elite() -> None:
    cem = Cem(np.zeros(1), 0.5, 0, elite_share=0.5)
    cem.tell(np.array([[0.1], [0.5], [0.7], [-0.9]]), np.array([0.0, 2.0, 3.0, 1.0]))
    assert cem.centre == pytest.approx(0.6) and cem.spread == pytest.approx(0.1)  # elite .5 and .7


def test_maximise_keeps_the_start_when_nothing_is_better() -> None:
    start = np.full(A, 0.25)
    found = maximise(lambda vectors: -np.abs(vectors - start).sum(-1), Cem(start, 0.5, 0), population=5, generations=2)
    np.testing.assert_array_equal(found, start)


def test_sessions_that_kept_one_vector_to_their_end_are_explored_sessions() -> None:
    steps, one, two = Steps(CONFIG, 20), np.full((2, A), 0.1), np.full((2, A), 0.2)
    add_session(steps, one, number=0, reward=3.0)
    add_session(steps, two, number=1, reward=4.0, turn=1)
    add_session(steps, np.concatenate([one[:1], two[:1]]), number=2, reward=9.0)  # the vector changed
    add_session(steps, two, number=3, reward=9.0, ended=False)
    add_session(steps, two, number=4, reward=9.0, arm=EXPLOIT)
    add_session(steps, one[:1], number=5, reward=5.0)
    add_session(steps, one, number=6, reward=6.0, turn=[0, 1])  # told in the round of its end
    found = ExploredSessions.of(steps, np.ones(1, np.float32))
    assert found is not None
    np.testing.assert_allclose(found.vectors[:, 0], [0.1, 0.2, 0.1, 0.1], atol=1e-6)
    assert found.rewards.tolist() == [3, 4, 5, 6] and found.rounds.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("shape", ["pair", "request", "nothing"])
def test_other_exploration_has_no_explored_sessions(shape: str) -> None:
    rng, steps = np.random.default_rng(0), Steps(CONFIG, 100)
    for number in range(20):
        length = 1 if number < 5 else 3
        wide = {"pair": (length, G, A), "request": (length, 1, A), "nothing": (1, 1, A)}[shape]
        noise = np.zeros(wide) if shape == "nothing" else rng.uniform(-0.1, 0.1, wide)
        add_session(steps, np.broadcast_to(noise, (length, G, A)), number=number)
    assert ExploredSessions.of(steps, np.ones(1, np.float32)) is None


def test_the_response_surface_is_the_ridge_regression_of_a_slow_solve() -> None:
    rng = np.random.default_rng(0)
    vectors, rewards = rng.normal(size=(30, 2)), rng.exponential(size=30)
    names = [(), (0,), (1,), (0, 0), (0, 1), (1, 1)]
    x = np.array([[np.prod([v[i] for i in name]) for name in names] for v in vectors])
    y = (rewards - rewards.mean()) / rewards.std()
    prior, precision = np.array([0, 0, 0, -0.3, 0, -0.3]), np.array([1e-6, 20, 20, 600, 600, 600])
    # minimise |y - x b|^2 + sum precision (b - prior)^2 as one least-squares problem
    b = np.linalg.lstsq(np.concatenate([x, np.diag(precision**0.5)]), np.concatenate([y, precision**0.5 * prior]), rcond=None)[0]
    np.testing.assert_allclose(ResponseSurface(vectors, rewards)(vectors), x @ b, atol=1e-8)


def test_without_evidence_the_response_surface_is_best_at_control() -> None:
    vectors = np.random.default_rng(0).normal(size=(40, A))
    surface = ResponseSurface(vectors, np.ones(40))
    assert maximise(surface, Cem(np.full(A, 0.5), 0.5, 0), population=50, generations=30) == pytest.approx(np.zeros(A), abs=0.1)


def slow_quality(scores: Floats, rewards: Floats, shown: Floats, vector: Doubles, *, spec: Spec) -> float:
    right = total = 0.0
    for s, r, m in zip(scores, rewards, shown, strict=True):
        power = np.array(spec.power_base) + spec.power_span * vector[: spec.num_scores]
        bias = spec.bias_base + spec.bias_span * vector[spec.num_scores :]
        fused = np.prod((s + bias) ** power, axis=1)
        for i in range(len(m)):
            for j in range(i):
                if m[i] and m[j]:
                    right += (r[i] - r[j]) * np.sign(fused[i] - fused[j])
                    total += abs(r[i] - r[j])
    return right / total


def test_ranking_quality_is_the_slow_loop_over_shown_pairs() -> None:
    rng = np.random.default_rng(0)
    scores, rewards = rng.uniform(0.1, 2, (12, 6, 2)).astype(np.float32), rng.exponential(size=(12, 6)).astype(np.float32)
    shown = (rng.random((12, 6)) < 0.6).astype(np.float32)
    vectors = rng.uniform(-1, 1, (3, A))
    expected = [slow_quality(scores, rewards, shown, vector, spec=SPEC) for vector in vectors]
    np.testing.assert_allclose(RankingQuality(scores, rewards, shown, SPEC)(vectors), expected, atol=1e-6)


@each_searcher
def test_rounds_of_noisy_sessions_find_what_pays(name: str) -> None:
    settings = replace(SEARCH[name][1], generations=30)  # enough here, and Optuna is slow
    found = [float(worth(play_rounds(search(name, seed=seed, settings=settings), seed=seed, rounds=4))) for seed in range(2)]
    assert min(found) > 0.75 > worth(np.zeros(A)) + 0.3, found  # control is worth .39


@pytest.mark.parametrize("make_searcher", [Cem])
def test_sessions_can_be_told_to_the_searcher_itself(make_searcher: MakeSearcher) -> None:
    method = VectorSearch("cem", CONFIG, seed=0, make_searcher=make_searcher, settings=SearchSettings(online="sessions"))
    assert worth(play_rounds(method, seed=0)) > 0.7
    assert (method.exploration().std >= np.float32(SearchSettings().min_spread)).all()  # type: ignore[operator]


@pytest.mark.parametrize("online", ["surface", "sessions"])
def test_a_round_with_few_sessions_teaches_nothing_yet(online: str) -> None:
    settings = SearchSettings(online=online)  # type: ignore[arg-type]
    few = play_rounds(search("cem", settings=settings), seed=0, rounds=1, sessions=settings.min_sessions - 1)
    assert not few.any() and play_rounds(search("cem", settings=settings), seed=0, rounds=1, sessions=settings.min_sessions).any()


@each_searcher
def test_a_log_without_explored_sessions_is_searched_by_how_well_lists_are_ordered(name: str) -> None:
    rng, steps = np.random.default_rng(0), Steps(CONFIG, 300)
    for number in range(300):
        add_session(steps, rng.uniform(-0.1, 0.1, (1, G, A)), number=number)
    scores = steps.columns["scores"]
    scores[:] = rng.uniform(0.1, 2, scores.shape)
    steps.columns["rewards"][..., 0] = scores[..., 0] * (scores[..., 1] + 0.5) ** -0.2  # the second score misleads control
    method = search(name)
    vector = method.fit(steps).parameters["action"].astype(np.float64)
    quality = RankingQuality(scores, steps.columns["rewards"][..., 0], steps.columns["shown"], SPEC)
    before, after = quality(np.stack([np.zeros(A), vector]))
    assert after > 0.95 > before + 0.2


def test_a_log_in_which_nothing_pays_is_refused() -> None:
    steps = Steps(CONFIG, 10)
    add_session(steps, np.zeros((3, A)), number=0)
    with pytest.raises(MethodError, match="no two shown pairs of a list differ in reward in 3 steps"):
        search("cem").fit(steps)
