"""What `benchmarks/methods.py` compares, and what a finished run leaves behind."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from esrl_ray.normaliser import mean_input
from esrl_ray.replay.steps import Steps

CONTROL = "static"


class Variant(msgspec.Struct, frozen=True):
    """A method with settings."""

    method: str  # in `esrl_ray.methods.catalogue`
    overrides: tuple[str, ...] = ()  # `section.key=value`
    what: str = ""
    forget: Callable[[Steps], None] | None = None  # takes from the steps, in place, what the method is not to know


def other_candidates(steps: Steps) -> None:
    """As an app that writes no `candidate_means`: they are those of the logged pairs."""
    columns = steps.columns
    columns["candidate_means"][:] = mean_input(columns["states"], columns["scores"], columns["valid"])
    columns["told"][:] = 0


def own_round(steps: Steps) -> None:
    """As a log that says round 0 for years."""
    steps.rounds[:] = 0


SHARED = ("exploration.explore_share=0.25", "exploration.exploit_share=0.75")

NARROW = ("exploration.low=-0.15", "exploration.high=0.15")
"""The papers' bounds: what the others were tuned with."""

PUBLISHED = (*NARROW, "learner.gamma=0.9", "learner.critics_per_group=2", "learner.actor_lr=3e-4", "learner.temperature=0.3")
"""Bounds and discount of the papers; two critics of each group, because more change nothing here; rate and temperature that worked."""

PAPER = (
    *PUBLISHED,
    "learner.critics_per_group=10",
    "learner.hidden_sizes=[256,128]",
    "learner.actor=ple",
    "learner.phi=true",
    "learner.batch_size=256",
    "replay.samples_per_insert=6.4",
)
"""What configs/paper.yaml sets, in the demo's deployment; a step takes some .5 s of a core, so there are a quarter of the others' steps."""

METHODS = {
    CONTROL: Variant("static", what="control: hand-made weights"),
    "enhancedrl": Variant("enhancedrl", what="this project's default"),
    "enhancedrl-25%": Variant("enhancedrl", SHARED, what="the default, 25 % of users explore, 75 % exploit; learns from all"),
    "enhancedrl-myopic": Variant("enhancedrl", ("learner.long_term_weight=0",), what="ablation: the default without long-term value"),
    "enhancedrl-lists": Variant(
        "enhancedrl", ("learner.score_changes=false",), what="ablation: long-term value from who stays, without the change of scores"
    ),
    "enhancedrl-logged-means": Variant(
        "enhancedrl", what="ablation: means over the 15 logged candidates, not over all of them", forget=other_candidates
    ),
    "enhancedrl-pooled": Variant("enhancedrl", what="ablation: lists of all rounds are compared with each other", forget=own_round),
    "enhancedrl-narrow": Variant("enhancedrl", NARROW, what="ablation: the default within the papers' bounds of .15"),
    "enhancedrl-request-noise": Variant("enhancedrl", ("exploration.scope=request",), what="ablation: one noise draw per request"),
    "enhancedrl-one-round": Variant(
        "enhancedrl", ("exploration.round_steps=60000",), what="ablation: one round, all lists explore around control"
    ),
    "enhancedrl-temperature": Variant("enhancedrl", ("learner.temperature=0.3",), what="ablation: temperature .3 in place of .2"),
    "enhancedrl-ple": Variant("enhancedrl", ("learner.actor=ple",), what="ablation: PLE-like actor"),
    "enhancedrl-list-sum": Variant("enhancedrl-list-sum", PUBLISHED, what="the paper's loss of critics (2 x 2, no phi), listwise actor"),
    "enhancedrl-continuous": Variant("enhancedrl", ("learner.continuous_penalty=true",), what="ablation: a penalty without its jump"),
    "enhancedrl-phi": Variant("enhancedrl-list-sum", (*PUBLISHED, "learner.phi=true"), what="enhancedrl-list-sum with phi"),
    "enhancedrl-per-pair": Variant("enhancedrl-per-pair", PUBLISHED, what="per-pair TD (2 x 2 critics, no phi), listwise actor"),
    "enhancedrl-printed": Variant("enhancedrl-printed", PUBLISHED, what="both losses as printed (2 x 2 critics, no phi, MLP actor)"),
    "enhancedrl-paper": Variant(
        "enhancedrl-printed",
        PAPER,
        what="configs/paper.yaml: published sizes, losses as printed, phi, PLE-like actor (1,500 gradient steps)",
    ),
    "unifiedrl": Variant("unifiedrl", PUBLISHED, what="one action per request, 2 x 24 critics, no phi"),
    "unifiedrl-wide": Variant("unifiedrl", what="unifiedrl with bounds, discount and rates of the default, no phi"),
    "unifiedrl-phi": Variant("unifiedrl", (*PUBLISHED, "learner.phi=true"), what="unifiedrl with phi"),
    "cem": Variant("cem", what="one global vector, cross-entropy method"),
    "cma-es": Variant("cma-es", what="one global vector, CMA-ES"),
    "optuna": Variant("optuna", what="one global vector, Optuna (TPE)"),
    "supervised": Variant("supervised", NARROW, what="per-item reward predictor, ranks past the formula"),
    "supervised-weights": Variant(
        "supervised-weights", (*NARROW, "learner.temperature=0.3"), what="per-pair weights by a supervised listwise loss"
    ),
    "td3": Variant("td3", NARROW, what="one action per request"),
    "td3-bc": Variant("td3-bc", NARROW, what="TD3 with behaviour cloning"),
    "batchrl-mtf": Variant("batchrl-mtf", NARROW, what="BCQ with a VAE, one action per request; its last round, which is not its best"),
    "batchrl-mtf-satisfaction": Variant("batchrl-mtf-satisfaction", NARROW, what="the same with its own reward, user satisfaction"),
    "sac": Variant("sac", NARROW, what="RLlib's, one action per request, gamma .98"),
    "cql": Variant("cql", NARROW, what="RLlib's, one action per request, gamma .98; half of the gradient steps, because it is slow"),
    "iql": Variant("iql", NARROW, what="RLlib's, one action per request, gamma .98"),
}


class Point(msgspec.Struct, frozen=True):
    """Reward per session of the policy after a round."""

    num_steps: int
    reward: float


class Row(msgspec.Struct, frozen=True):
    """One finished run."""

    method: str
    world: int
    seed: int
    num_steps: int
    reward: float  # per session, frozen, on unseen sessions
    ci_low: float  # 95 % over sessions, clustered by user
    ci_high: float
    pages: float
    watch_s: float
    gradient_steps: int
    seconds: float  # training and the curve's evaluations
    curve: tuple[Point, ...]
    commit: str
    machine: str
    sessions: int = 2000  # played frozen

    def __str__(self) -> str:
        """A line for people."""
        return f"{self.method:24} world {self.world} seed {self.seed}: {self.reward:6.2f} in {self.seconds:.0f} s"
