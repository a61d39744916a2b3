"""What a method is: it says how the next round explores, and it learns a policy from steps. A method is a file, not a framework."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from esrl_ray.policy.policy import Policy
from esrl_ray.replay.steps import Steps
from esrl_ray.vocabulary import Floats


@dataclass(frozen=True, slots=True)
class Exploration:
    """What explore traffic does in a round: `clip(centre(s) + noise, -1, 1)`.

    Attributes:
        centre: The anchor policy mu_bp.
        low: (A,) lower ends of uniform noise.
        high: (A,) upper ends.
        std: (A,) of Gaussian noise instead of uniform; None = uniform.
        scope: One draw per pair, per request, or per session.
    """

    centre: Policy
    low: Floats
    high: Floats
    std: Floats | None = None
    scope: Literal["pair", "request", "session"] = "pair"


class Method(Protocol):
    """Learns online, round by round, or offline from a log by one call of `fit`."""

    @property
    def name(self) -> str:
        """As in `catalogue.NAMES`."""

    def exploration(self) -> Exploration:
        """How the next round explores."""

    def fit(self, steps: Steps) -> Policy:
        """Learn from all steps so far; what was learnt from earlier ones is kept. The result serves.

        Raises:
            MethodError: the steps cannot be learnt from (too few, another spec, no exploration).
        """
