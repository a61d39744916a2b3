"""What a method is: it says how the next round explores, and it learns a policy from steps. A method is a file, not a framework."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from esrl_ray.errors import MethodError
from esrl_ray.policy.policy import Policy
from esrl_ray.replay.steps import Steps
from esrl_ray.spec import Spec
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


def require(steps: Steps, spec: Spec, method: str) -> None:
    """Refuse steps that a method of this spec cannot learn from; every `fit` begins with it.

    Args:
        steps: Given to `fit`.
        spec: Of the method.
        method: Its name, for the text.

    Raises:
        MethodError: there are no steps, or they are of another width.
    """
    if not len(steps):
        raise MethodError("there are no steps to learn from", method, "give a log with at least one whole session")
    widths = {"states": spec.num_features, "categorical": spec.num_categorical, "scores": spec.num_scores, "actions": spec.num_actions}
    for name, width in widths.items():
        if (found := steps.columns[name].shape[-1]) != width:
            text = f"{name} of the steps are {found} wide, spec {spec.digest} says {width}"
            raise MethodError(text, method, "give steps and configuration of the same deployment")
