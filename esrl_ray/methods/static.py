"""One vector of fusion weights for all, given by hand: it learns nothing."""

from __future__ import annotations

import numpy as np

from esrl_ray.config import Config
from esrl_ray.methods.method import Exploration, require
from esrl_ray.policy.policy import Policy
from esrl_ray.replay.steps import Steps
from esrl_ray.vocabulary import Floats


class Static:
    """Serves one action; the default a = 0 is the control policy.

    Args:
        name: As in the catalogue.
        config: Deployment.
        action: (A,) in [-1, 1].
    """

    def __init__(self, name: str, config: Config, *, action: Floats | None = None) -> None:
        self.name, self._policy = name, Policy.static(config.spec.build(), action, note=name)

    def exploration(self) -> Exploration:
        """None: every list is the vector's."""
        nothing = np.zeros(self._policy.spec.num_actions, np.float32)
        return Exploration(self._policy, nothing, nothing)

    def fit(self, steps: Steps) -> Policy:
        """The vector.

        Raises:
            MethodError: there are no steps, or they are of another width.
        """
        require(steps, self._policy.spec, self.name)
        return self._policy
