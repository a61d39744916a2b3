"""The supervised peers: what their losses count, what a step may change, and that they find what pays."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from esrl_ray.config import CategoricalConfig, Config, LearnerConfig, ReplayConfig, SpecConfig
from esrl_ray.errors import MethodError
from esrl_ray.methods.supervised import ListRounds, Supervised, SupervisedWeights, reward_loss
from esrl_ray.policy.policy import Policy, PolicyKind
from esrl_ray.replay.steps import LEFT, Steps
from esrl_ray.reward import RewardConfig
from tests.transitions import make_transitions

CONFIG = Config(
    spec=SpecConfig(
        user_features=("act",),
        item_features=("age", "length"),
        categorical_features=(CategoricalConfig(name="tab", cardinality=3, side="context"),),
    ),
    learner=LearnerConfig(hidden_sizes=(16,), batch_size=32, device="cpu"),
    replay=ReplayConfig(samples_per_insert=16.0),
)
NAMES = ("states", "categorical", "scores", "actions", "anchor_actions", "rewards", "shown", "valid")


def make_steps(*, seed: int = 0, num_steps: int = 200, pays: str | None = None) -> Steps:
    """Lists of different length in shuffled places with garbage in padding; `pays` makes that item feature the reward."""
    batch = make_transitions(CONFIG, num_steps, seed=seed)
    columns = {name: batch[name].copy() for name in NAMES}  # type: ignore[literal-required]
    if pays is not None:
        feature = columns["states"][..., 1 + CONFIG.spec.item_features.index(pays)]
        columns["rewards"] = (feature * columns["shown"])[..., None].astype(np.float32)
    steps = Steps(CONFIG, num_steps)
    behaviours = np.zeros((num_steps, CONFIG.max_pairs, 1), np.float32)
    numbers = steps.add({"sessions": np.arange(num_steps), "users": 0, "rounds": 0, "arms": 0}, {**columns, "behaviours": behaviours})
    steps.follow(numbers, LEFT)
    return steps


def ranking(policy: Policy, steps: Steps, feature: str) -> float:
    """Mean correlation of fused scores with a feature over the real pairs of a list."""
    c = steps.columns
    _, fused = policy.fuse(c["states"], c["categorical"], c["scores"])
    column = c["states"][..., 1 + CONFIG.spec.item_features.index(feature)]
    return float(np.mean([np.corrcoef(f[v], x[v])[0, 1] for f, x, v in zip(fused, column, c["valid"] > 0, strict=True) if v.sum() > 2]))


def test_the_reward_loss_is_the_mean_square_over_shown_pairs() -> None:
    predicted, rewards = torch.tensor([[1.0, 2.0, 9.0], [0.0, 9.0, 9.0]]), torch.tensor([[0.0, 4.0, 5.0], [3.0, 5.0, 5.0]])
    shown = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    assert reward_loss(predicted, rewards, shown).item() == pytest.approx((1 + 4 + 9) / 3)
    assert reward_loss(predicted, rewards, torch.zeros_like(shown)).item() == 0
    with pytest.raises(AssertionError):
        reward_loss(predicted[..., None], rewards, shown)  # would broadcast to (2, 3, 3)


def test_a_drawn_batch_holds_the_shown_pairs_of_its_lists_and_no_others() -> None:
    steps, rounds = make_steps(), ListRounds("peer", CONFIG, seed=0)
    lists, num_updates = rounds.begin(steps)
    batch = rounds.draw(steps, lists)
    assert num_updates == 100 and batch.shown.shape[1] <= CONFIG.serve.list_size and (batch.shown.sum(1) > 0).all()
    shown_scores = {tuple(pair) for pair in steps.columns["scores"][steps.columns["shown"] > 0].tolist()}
    assert {tuple(pair) for pair in batch.scores[batch.shown > 0].tolist()} <= shown_scores
    assert rounds.begin(steps)[1] == 0, "no new steps, no gradient steps"


def test_rewards_of_the_groups_are_summed_with_their_weights() -> None:
    groups = CONFIG.reward.groups
    two = RewardConfig(groups=(groups[0], groups[0].model_copy(update={"name": "again"})))
    config = CONFIG.model_copy(update={"reward": two, "learner": CONFIG.learner.model_copy(update={"group_weights": (1.0, 0.0)})})
    batch = make_transitions(config, 50, seed=0)
    batch["rewards"][..., 1] = 1e6  # weighs nothing
    steps = Steps(config, 50)
    behaviours = np.zeros((50, config.max_pairs, 1), np.float32)
    columns = {name: batch[name] for name in NAMES}  # type: ignore[literal-required]
    steps.add({"sessions": 0, "users": 0, "rounds": 0, "arms": 0}, {**columns, "behaviours": behaviours})
    rounds = ListRounds("peer", config, seed=0)
    drawn = rounds.draw(steps, rounds.begin(steps)[0])
    assert drawn.rewards[drawn.shown > 0].abs().max() < 20


@pytest.mark.parametrize("make", [Supervised, SupervisedWeights])
def test_unshown_and_padded_pairs_teach_nothing(make: type[Supervised | SupervisedWeights]) -> None:
    clean, garbage = make_steps(), make_steps()
    hidden = garbage.columns["shown"] == 0
    garbage.columns["rewards"][hidden] = 1e6
    for name in ("states", "scores"):
        garbage.columns[name][garbage.columns["valid"] == 0] = 7.0
    digests = [make("peer", CONFIG, seed=0).fit(steps).manifest.digest for steps in (clean, garbage)]
    assert digests[0] == digests[1]


@pytest.mark.parametrize(("make", "kind"), [(Supervised, PolicyKind.SCORE), (SupervisedWeights, PolicyKind.PAIR)])
def test_it_finds_the_feature_that_pays(make: type[Supervised | SupervisedWeights], kind: PolicyKind) -> None:
    for seed in range(2):
        method = make("peer", CONFIG, seed=seed)
        policy = method.fit(make_steps(seed=seed, num_steps=400, pays="age"))
        unseen = make_steps(seed=9)
        assert policy.manifest.kind is kind and policy.manifest.gradient_steps == 200
        assert ranking(policy, unseen, "age") > 0.2 > abs(ranking(policy, unseen, "length"))


def test_the_reward_predictor_explores_around_control_and_the_weights_around_themselves() -> None:
    steps = make_steps(pays="age")
    predictor, weights = Supervised("supervised", CONFIG, seed=0), SupervisedWeights("supervised-weights", CONFIG, seed=0)
    predictor.fit(steps)
    learnt = weights.fit(steps)
    assert predictor.exploration().centre.manifest.kind is PolicyKind.STATIC and weights.exploration().centre is learnt
    assert (weights.exploration().low == CONFIG.exploration.low).all() and weights.exploration().scope == CONFIG.exploration.scope


def test_the_bound_penalty_holds_the_weights_near_their_anchor() -> None:
    steps, far = make_steps(pays="age"), []
    for eta in (0.0, 10.0):
        config = CONFIG.model_copy(update={"learner": CONFIG.learner.model_copy(update={"bound_penalty": eta})})
        policy = SupervisedWeights("peer", config, seed=0).fit(steps)
        c = steps.columns
        actions = policy.act(c["states"], c["categorical"], c["scores"])[c["valid"] > 0]
        far.append(float((np.abs(actions) > CONFIG.exploration.high).mean()))
    assert far[1] < 0.5 * far[0]


def test_steps_without_a_shown_pair_are_refused() -> None:
    steps = make_steps()
    steps.columns["shown"][:] = 0
    with pytest.raises(MethodError, match="none of 200 steps has a shown pair"):
        Supervised("supervised", CONFIG, seed=0).fit(steps)
