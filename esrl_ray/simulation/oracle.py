"""Oracles: how far a ranking could get if it knew what only the simulator knows. They are yardsticks, not methods.

`instant` ranks by the true expected reward of a pair, `full` by that plus kappa times the pair's true effect on satisfaction, `observed` by
a network that was fitted to the same truth but sees what a policy sees. Kappa, the reward that a unit of satisfaction is worth in the end,
is found by playing. The network is smooth on purpose: boosted trees recognise single items by their features (R^2 .90 on the items
they were fitted on, .82 on others; the network .88 on both), and a policy that knows items by heart is not what we compare with.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from scipy.special import ndtr
from torch.nn.functional import mse_loss

from esrl_ray.algo.actor import PairNetwork
from esrl_ray.config import Config
from esrl_ray.errors import ConfigError
from esrl_ray.evaluation.frozen import Scorer, play, scores_of
from esrl_ray.expression import evaluate, summands, used
from esrl_ray.normaliser import Normaliser, numeric_input
from esrl_ray.policy.policy import Manifest, Policy, PolicyKind
from esrl_ray.reward import RewardConfig
from esrl_ray.simulation.draws import Doubles
from esrl_ray.simulation.users import BEHAVIOURS, SKIM_S, WATCH_CAP_S, WATCH_SD, Page, Sessions, Truth, World
from esrl_ray.vocabulary import Floats

ORACLES = ("oracle-instant", "oracle-observed", "oracle-full")
KAPPAS = (0.1, 0.15, 0.2, 0.25, 0.3)
SESSIONS = 1000
"""Played for each fit and each kappa. Rewards of 1000 sessions with common draws still differ by +-1 by chance: see `_best_kappa`."""
STEPS = (1500, 6000)
"""Gradient steps on pairs that full knowledge met, then on pairs that the network met as well."""
HIDDEN_SIZES, BATCH_SIZE, LEARNING_RATE, PAIRS_PER_PAGE = (128, 128), 512, 6e-3, 10
_TRAINING = 7_000_003
"""Added to the seed: sessions that neither traffic nor frozen evaluation meets."""


def expected_reward(truth: Truth, config: RewardConfig) -> Doubles:
    """Expectation of Eq. (2) over what the user does with a pair that is looked at, all groups summed.

    Watch is `LogNormal(log_watch, .8)` cut at 240 s after a click, else `LogNormal(log 2, .8)`, of which
    `E min(w, c) = exp(mu + sd^2 / 2) Phi((log c - mu) / sd - sd) + c (1 - Phi((log c - mu) / sd))`.

    Args:
        truth: Of (n, K) pairs.
        config: Expressions and scale.

    Returns:
        (n, K).

    Raises:
        ConfigError: a part of the reward that has no expectation in closed form here.
    """
    chances = {name: getattr(truth, name) for name in BEHAVIOURS if name != "watch_s"}
    total = np.zeros_like(truth.click)
    for g, group in enumerate(config.groups):
        if group.default is not None:
            raise ConfigError("the oracle knows no default reward", f"reward.groups.{g}.default", "leave it out")
        for coefficient, part in summands(config.parsed(g)):
            total += coefficient * _expected(part, truth, chances, f"reward.groups.{g}.expression")
    return total / config.scale


def _expected(part: ast.expr, truth: Truth, chances: Mapping[str, Doubles], where: str) -> Doubles:
    """Expectation of one summand without its coefficient."""
    match part:
        case ast.Constant():
            return np.ones_like(truth.click)
        case ast.Name(id="watch_s"):
            watch = partial(_watch, cap=None, above=None)
        case ast.Call(func=ast.Name(id="min"), args=[ast.Name(id="watch_s"), cap]) if not used(cap):
            watch = partial(_watch, cap=float(evaluate(cap, {})), above=None)
        case ast.Compare(left=ast.Name(id="watch_s"), ops=[ast.Gt()], comparators=[above]) if not used(above):
            watch = partial(_watch, cap=None, above=float(evaluate(above, {})))
        case _ if len(names := used(part)) == 1 and (name := names.pop()) in chances:  # it happens or not
            no, yes = evaluate(part, {name: np.array([0.0, 1.0], np.float32)}).tolist()
            value: Doubles = no + (yes - no) * chances[name]
            return value
        case _:
            fix = "write a sum of parts of one behaviour each, of watch_s as it is, min(watch_s, number) or watch_s > number"
            raise ConfigError(f"the oracle cannot tell what {ast.unparse(part)!r} is worth on average", where, fix)
    clicked, skimmed = watch(truth.log_watch), watch(np.log(np.full((), SKIM_S)))
    return skimmed + (clicked - skimmed) * truth.click


def _watch(mu: Doubles, cap: float | None, above: float | None) -> Doubles:
    """E of min(watch, cap), or P(watch > above)."""
    at = min(WATCH_CAP_S, cap or WATCH_CAP_S) if above is None else above
    if above is not None and not 0 < above < WATCH_CAP_S:
        return np.full_like(mu, above <= 0)
    z = (np.log(at) - mu) / WATCH_SD
    beyond: Doubles = 1 - ndtr(z)
    return beyond if above is not None else np.exp(mu + WATCH_SD**2 / 2) * ndtr(z - WATCH_SD) + at * beyond


@dataclass(frozen=True)
class TrueOracle:
    """Ranks by `E[r] + kappa g`, the truth.

    Attributes:
        config: World and reward.
        kappa: Reward per unit of satisfaction; 0 is the oracle of instant reward.
    """

    config: Config
    kappa: float
    _world: World = field(repr=False)

    @classmethod
    def create(cls, config: Config, *, kappa: float) -> TrueOracle:
        """An oracle of the world of a deployment."""
        return cls(config, kappa, World(config, seed=0))

    def targets(self, page: Page, sessions: Sessions) -> Doubles:
        """(n, N, 2): E[r] if looked at, and g."""
        truth = self._world.truth(sessions, page.items)
        return np.stack([expected_reward(truth, self.config.reward), truth.gain], -1)

    def score(self, page: Page, sessions: Sessions) -> Doubles:
        """(n, N) values."""
        reward, gain = np.moveaxis(self.targets(page, sessions), -1, 0)
        value: Doubles = reward + self.kappa * gain
        return value


def full_oracle(config: Config, *, seed: int, sessions: int = SESSIONS, kappas: Sequence[float] = KAPPAS) -> TrueOracle:
    """Full knowledge, with the kappa that earns most per session.

    Args:
        config: World and reward.
        seed: Of the sessions played here, which frozen evaluation does not meet.
        sessions: Played for each kappa.
        kappas: Tried, ascending.
    """
    known = TrueOracle.create(config, kappa=0.0)
    kappa = _best_kappa(lambda k: replace(known, kappa=k), config, seed=seed, sessions=sessions, kappas=kappas)
    return replace(known, kappa=kappa)


def observed_oracle(
    config: Config, *, seed: int, sessions: int = SESSIONS, steps: Sequence[int] = STEPS, kappas: Sequence[float] = KAPPAS
) -> Policy:
    """A policy that scores each pair by the best guess of `E[r] + kappa g` from what policies see: states and log scores.

    Fitted on pairs that full knowledge meets, then also on those that it meets itself (DAgger, Ross et al. 2011: its lists change what
    users feel and hence their features). The same seed gives the same policy.

    Args:
        config: World and reward.
        seed: Of sessions, parameters and sampling.
        sessions: Played for each fit and each kappa.
        steps: Gradient steps after each time of playing.
        kappas: Tried, ascending.
    """
    known = TrueOracle.create(config, kappa=0.2)
    fit = _Fit(config, seed=seed)
    ranker: Policy | Scorer = known
    for turn, num_steps in enumerate(steps):
        recorder = Recorder(known, ranker, np.random.default_rng((seed, turn)))
        play(recorder, config, seed=seed + _TRAINING + 1 + turn, sessions=sessions)
        fit.add(recorder)
        fit.run(num_steps)
        ranker = fit.policy(known.kappa)
    return fit.policy(_best_kappa(fit.policy, config, seed=seed, sessions=sessions, kappas=kappas))


def create_oracle(name: str, config: Config, *, seed: int) -> Policy | Scorer:
    """One of `ORACLES`.

    Args:
        name: Which.
        config: World and reward.
        seed: Of the sessions that it is tuned on.

    Raises:
        KeyError: there is no such oracle.
    """
    match name:
        case "oracle-instant":
            return TrueOracle.create(config, kappa=0.0)
        case "oracle-observed":
            return observed_oracle(config, seed=seed)
        case "oracle-full":
            return full_oracle(config, seed=seed)
    raise KeyError(f"no oracle {name!r}; there are {', '.join(ORACLES)}")


def _best_kappa(ranker: Callable[[float], Policy | Scorer], config: Config, *, seed: int, sessions: int, kappas: Sequence[float]) -> float:
    """Where the parabola through the rewards of three or more kappas is highest, which is steadier than the largest of them."""
    if len(kappas) == 1:
        return kappas[0]
    earned = [float(play(ranker(k), config, seed=seed + _TRAINING, sessions=sessions)[0].mean()) for k in kappas]
    if len(kappas) > 2:
        bend, slope, _ = np.polyfit(kappas, earned, 2)
        if bend < 0:
            return float(np.clip(-slope / (2 * bend), kappas[0], kappas[-1]))
    return kappas[int(np.argmax(earned))]


class Recorder:
    """Ranks as another does and keeps some pairs of each page with their truth."""

    def __init__(self, known: TrueOracle, ranker: Policy | Scorer, rng: np.random.Generator) -> None:
        self._known, self._ranker, self._rng = known, ranker, rng
        self.inputs: list[Floats] = []  # (pairs, F + k) raw
        self.targets: list[Floats] = []  # (pairs, 2)

    def score(self, page: Page, sessions: Sessions) -> Doubles:
        states = page.states()
        kept = self._rng.permuted(np.broadcast_to(np.arange(page.items.shape[1]), page.items.shape), axis=1)[:, :PAIRS_PER_PAGE, None]
        for store, wide in ((self.inputs, numeric_input(states, page.scores)), (self.targets, self._known.targets(page, sessions))):
            store.append(np.take_along_axis(wide, kept, axis=1).reshape(-1, wide.shape[-1]).astype(np.float32))
        return scores_of(self._ranker, page, sessions)


class _Fit:
    """Least squares of both targets with one network; kappa mixes its two outputs afterwards, so that it costs no fit."""

    def __init__(self, config: Config, *, seed: int) -> None:
        self._spec = config.spec.build()
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            self._network = PairNetwork(self._spec, HIDDEN_SIZES, 0, num_outputs=2)
        self._generator = torch.Generator().manual_seed(seed)
        self._inputs = torch.zeros(0, self._spec.num_features + self._spec.num_scores)
        self._targets = torch.zeros(0, 2)
        self._normaliser = Normaliser.identity(self._spec)
        self._centre, self._scale = torch.zeros(2), torch.ones(2)

    def add(self, recorder: Recorder) -> None:
        """Take pairs; the first ones fix what inputs and targets are standardised by."""
        inputs, targets = np.concatenate(recorder.inputs), torch.from_numpy(np.concatenate(recorder.targets))
        if not len(self._inputs):
            self._normaliser = Normaliser(inputs.mean(0), np.maximum(inputs.std(0), 1e-3))
            self._centre, self._scale = targets.mean(0), targets.std(0)
        standard = torch.from_numpy((inputs - self._normaliser.mean) / self._normaliser.std)
        self._inputs = torch.cat([self._inputs, standard])
        self._targets = torch.cat([self._targets, (targets - self._centre) / self._scale])

    def run(self, num_steps: int) -> None:
        """Adam with one cycle of the learning rate (Smith and Topin 2018)."""
        optimizer = torch.optim.Adam(self._network.parameters(), lr=LEARNING_RATE, fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=num_steps)
        codes = torch.zeros(BATCH_SIZE, 0, dtype=torch.int64)
        for _ in range(num_steps):
            chosen = torch.randint(len(self._inputs), (BATCH_SIZE,), generator=self._generator)
            loss = mse_loss(self._network(self._inputs[chosen], codes), self._targets[chosen])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()

    def policy(self, kappa: float) -> Policy:
        """The network with its last layer mixed: `E[r] + kappa g`."""
        parameters = {name: p.detach().numpy().copy() for name, p in self._network.state_dict().items()}
        last = f"layers.{len(HIDDEN_SIZES)}"
        mix = np.array([1.0, kappa], np.float32)  # (2,)
        weight, bias = parameters[f"{last}.weight"], parameters[f"{last}.bias"]  # (2, hidden), (2,)
        scale, centre = self._scale.numpy(), self._centre.numpy()
        parameters |= {f"{last}.weight": ((mix * scale) @ weight)[None], f"{last}.bias": (mix @ (centre + scale * bias))[None]}
        note = f"oracle on observed features, kappa {kappa:.3f}"
        manifest = Manifest(version=0, digest="", kind=PolicyKind.SCORE, spec=self._spec, hidden_sizes=HIDDEN_SIZES, note=note)
        return Policy.of(manifest, parameters, self._normaliser)
