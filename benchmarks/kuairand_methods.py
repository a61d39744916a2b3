"""What `benchmarks/kuairand.py` compares on the same bench, and how two rankings are compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import msgspec
import numpy as np
import torch
from scipy.stats import rankdata

from esrl_ray.algo.actor import Actor
from esrl_ray.config import Config
from esrl_ray.evaluation.metrics import LabelledPairs, bootstrap, group_auc, policy_scores
from esrl_ray.fusion import EPS, fused_scores
from esrl_ray.normaliser import Normaliser
from esrl_ray.policy.policy import Manifest, Policy, PolicyKind
from esrl_ray.simulation.kuairand_bench import Bench
from esrl_ray.vocabulary import Floats

Scorer = Callable[[LabelledPairs], Floats]
WIDTH = 0.15
"""Half the width of the bounds: of exploration, and of the supervised weights that the RL methods are measured by."""

SETTINGS = (
    "learner.gamma=0",
    "learner.level=pair",
    "learner.actor=mlp",
    "learner.critic=list_sum",
    "learner.actor_loss=listwise",
    "learner.critics_per_group=2",
    "learner.hidden_sizes=[64,64]",
    "learner.embedding_size=8",
    "learner.critic_lr=0.001",
    "learner.actor_lr=0.001",
    "learner.temperature=0.3",
    "learner.std_penalty=0.2",
    "learner.bound_penalty=0.1",
    "learner.penalty_scale=0.3",
    "learner.continuous_penalty=false",
    "learner.batch_size=128",
    "learner.updates_per_call=10",
    "exploration.scope=pair",
    f"exploration.low={-WIDTH}",
    f"exploration.high={WIDTH}",
)
"""The setting of our first experiments, in full, so that a default that changes elsewhere changes nothing here."""
RL: dict[str, tuple[str, ...]] = {
    "enhancedrl-list-sum": (),
    "enhancedrl-split": ("learner.critic=split", "learner.critics_per_group=3", "learner.horizon=1"),
    "enhancedrl-printed": ("learner.actor_loss=printed",),
    "enhancedrl-per-pair": ("learner.critic=per_pair", "learner.actor_lr=0.0003", "learner.temperature=1", "learner.bound_penalty=1"),
}
"""Settings beyond `SETTINGS`; the last is what `configs/kuairand.yaml` served when it was measured."""
PERMUTED_REWARDS, PERMUTED_ACTIONS = "/permuted-rewards", "/permuted-actions"
"""Ends of the names of placebos: rewards of random other exposures; logged actions of random other pairs."""


class Gain(msgspec.Struct, frozen=True):
    """A GAUC, or a paired difference of two, with its 95 % interval over users."""

    mean: float
    low: float
    high: float


def compare(scores: Floats, control: Floats, pairs: LabelledPairs, *, grouping: str = "user_block") -> tuple[Gain, Gain]:
    """GAUC of a ranking, and its paired difference from a control ranking, on the same resamples of users.

    Args:
        scores: (n,) of the exposures.
        control: (n,).
        pairs: Exposures; its groups name the grouping.
        grouping: `user_block` or `user_tab`.
    """
    parts = [group_auc(s, pairs.labels, pairs.weights, pairs.groups[grouping], pairs.user) for s in (scores, control)]
    draws = bootstrap(parts, num_users=int(pairs.user.max()) + 1, seed=0)
    pair = (parts[0].mean, draws[0]), (parts[0].mean - parts[1].mean, draws[0] - draws[1])
    own, difference = (Gain(mean, *(float(q) for q in np.quantile(d, (0.025, 0.975)))) for mean, d in pair)
    return own, difference


def mean_gain(gains: Sequence[Gain]) -> Gain:
    """Mean over seeds. Its interval adds the variance over users, which the seeds share, and that of the mean over seeds."""
    mean, low, high = (float(np.mean([getattr(g, name) for g in gains])) for name in ("mean", "low", "high"))
    spread = 1.96 * float(np.std([g.mean for g in gains], ddof=1)) / math.sqrt(len(gains)) if len(gains) > 1 else 0.0
    return Gain(mean, mean - math.hypot(mean - low, spread), mean + math.hypot(high - mean, spread))


def fixed(name: str, bench: Bench) -> Scorer:
    """A ranking that learns nothing or next to nothing: `control`, an upstream score, `rank-sum-7`, `rank-sum-4`, `tab`, `user-only`."""
    spec = bench.config.spec.build()
    if name == "control":
        return lambda pairs: policy_scores(Policy.static(spec), pairs)
    if name.startswith("rank-sum"):
        chosen = [i for i, s in enumerate(spec.scores) if name.endswith("7") or s in ("click", "long_view", "play", "finish")]
        return lambda pairs: rankdata(pairs.scores[:, chosen], axis=0).sum(1).astype(np.float32)
    if name == "tab":
        column = [c.name for c in spec.categorical_features].index("tab")
        codes = bench.train.categorical[:, column]
        means = np.bincount(codes, bench.train.labels, 16) / np.maximum(np.bincount(codes, minlength=16), 1)
        return lambda pairs: means[pairs.categorical[:, column]].astype(np.float32)
    if name == "user-only":
        columns = list(spec.request_inputs)[: len(spec.user_features)]
        x, centre = bench.train.states[:, columns].astype(np.float64), bench.train.states[:, columns].mean(0)
        weights = np.linalg.lstsq(x - centre, bench.train.labels - bench.train.labels.mean(), rcond=None)[0]
        return lambda pairs: ((pairs.states[:, columns] - centre) @ weights).astype(np.float32)
    return lambda pairs: pairs.scores[:, spec.scores.index(name)]


def cem(bench: Bench, *, seed: int, rounds: int = 10, population: int = 30, elite: int = 6) -> Floats:
    """Cross-entropy search of one vector of powers for the largest GAUC of `train`.

    Args:
        bench: Its configuration gives centre and span of the powers.
        seed: Of the draws.
        rounds: Of drawing, ranking and refitting a Gaussian.
        population: Vectors drawn each round.
        elite: Vectors that the next Gaussian is fitted to.

    Returns:
        (k,) powers.
    """
    spec, train, rng = bench.config.spec.build(), bench.train, np.random.default_rng(seed)
    logs = np.log(np.maximum(train.scores + spec.bias_base, EPS))
    mean, std = np.zeros(spec.num_scores), np.full(spec.num_scores, 0.5)

    def powers(action: np.ndarray) -> np.ndarray:
        return np.asarray(spec.power_base) + spec.power_span * action

    for _ in range(rounds):
        drawn = np.clip(mean + std * rng.standard_normal((population, spec.num_scores)), -1, 1)
        gaucs = [group_auc(logs @ powers(a), train.labels, train.weights, train.groups["user_block"], train.user).mean for a in drawn]
        best = drawn[np.argsort(gaucs)[-elite:]]
        mean, std = best.mean(0), best.std(0) + 0.02
    return powers(mean).astype(np.float32)


def narrowed(config: Config, width: float) -> Config:
    """The deployment whose actions in [-1, 1] reach `width` of the fusion weights' ranges around its control."""
    spec = config.spec
    spans = {"power_span": spec.power_span * width, "bias_span": spec.bias_span * width}
    return config.model_copy(update={"spec": spec.model_copy(update=spans)})


def supervised(bench: Bench, *, level: PolicyKind, width: float, seed: int, steps: int, checks: int = 6) -> Policy:
    """Per-pair (or per-user) weights by a supervised loss: logistic on each pair of a list with different labels, weighted as GAUC is.

    `sum_{i pos, j neg} w_i w_j softplus(-(score_i - score_j) / .3)`, through the fusion formula; every logged exposure counts, shown or
    not. The check with the largest GAUC on dev is kept, the start among them.

    Args:
        bench: Its control is the start.
        level: PAIR or REQUEST.
        width: Actions are within +- this around the start.
        seed: Of parameters and batches.
        steps: Gradient steps.
        checks: How often dev is looked at.
    """
    config, train = narrowed(bench.config, width), bench.train
    spec, rng = config.spec.build(), np.random.default_rng(seed)
    valid = bench.lists >= 0
    normaliser = Normaliser.fit(train.states[bench.lists], train.scores[bench.lists], valid)
    sizes = config.learner.hidden_sizes, config.learner.embedding_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        actor = Actor(spec, *sizes, level="request" if level is PolicyKind.REQUEST else "pair")
    optimiser = torch.optim.Adam(actor.parameters(), lr=1e-3)
    manifest = Manifest(version=0, digest="", kind=level, spec=spec, hidden_sizes=sizes[0], embedding_size=sizes[1])
    best, best_gauc = Policy.static(spec), -np.inf
    for step in range(steps + 1):
        if step % max(1, steps // checks) == 0:
            policy = Policy.of(manifest, {k: v.numpy().copy() for k, v in actor.state_dict().items()}, normaliser)
            scores = policy_scores(policy, bench.dev)
            gauc = group_auc(scores, bench.dev.labels, bench.dev.weights, bench.dev.groups["user_block"], bench.dev.user).mean
            if gauc > best_gauc:
                best, best_gauc = policy, gauc
        rows = bench.lists[rng.integers(0, len(bench.lists), 256)]  # (B, G)
        real = torch.from_numpy(rows >= 0)
        numeric = np.concatenate([train.states[rows], np.log(np.maximum(train.scores[rows], EPS))], -1)
        inputs = torch.from_numpy((numeric - normaliser.mean) / normaliser.std), torch.from_numpy(train.categorical[rows]).long()
        fused = fused_scores(torch.from_numpy(train.scores[rows]), actor(*inputs), spec)  # (B, G)
        label, weight = torch.from_numpy(train.labels[rows]), torch.from_numpy(train.weights[rows]) * real
        counts = (weight * label).unsqueeze(2) * (weight * (1 - label)).unsqueeze(1)  # (B, G, G)
        losses = torch.nn.functional.softplus(-(fused.unsqueeze(2) - fused.unsqueeze(1)) / 0.3)
        loss = (counts * losses).sum() / counts.sum().clamp_min(1e-6)
        for parameter, gradient in zip(actor.parameters(), torch.autograd.grad(loss, list(actor.parameters())), strict=True):
            parameter.grad = gradient
        optimiser.step()
    return best
