"""Eq. (2) of EnhancedRL (v4): r = sum_i w_i v_i per pair, split in q reward groups, each an expression over behaviours."""

from __future__ import annotations

import ast
import hashlib
import json
import keyword
from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from esrl_ray import expression
from esrl_ray.section import Section
from esrl_ray.vocabulary import Floats

MAX_REWARD = 1e9
"""Above it sums over lists and sessions lose what distinguishes them in 32 bits."""


class BehaviourConfig(Section):
    """How repeats of one behaviour on one item of one list combine, and the largest value believed."""

    name: str = Field(description="Name, as in feedback events.")
    combine: Literal["sum", "max", "last"] = Field("max", description="How repeats combine; `last` is by event time.")
    cap: float = Field(1.0, gt=0, allow_inf_nan=False, description="Values beyond +- this are cut to it.")


class RewardGroup(Section):
    """One reward group with its own critics."""

    name: str = Field(description="Name in reports.")
    expression: str = Field(description="Reward of a shown pair, e.g. `0.05 * min(watch_s, 120) + 0.5 * (watch_s > 10)` [sum_i w_i v_i].")
    default: float | None = Field(
        None,
        allow_inf_nan=False,
        description="Reward of a shown pair on which nothing came (all behaviours are 0); null: the expression's value there.",
    )


class RewardConfig(Section):
    """Eq. (2): r = sum_i w_i v_i per pair, split in q groups."""

    behaviours: tuple[BehaviourConfig, ...] = Field((BehaviourConfig(name="click"),), min_length=1, description="Declared behaviours.")
    groups: tuple[RewardGroup, ...] = Field((RewardGroup(name="all", expression="click"),), min_length=1, description="Reward groups (q).")
    scale: float = Field(1.0, ge=1e-20, le=1e20, description="All rewards are divided by this, so that a list's reward is about 1.")

    @model_validator(mode="after")
    def _declared(self) -> Self:
        names = self.names
        if reserved := {"shown", "leave"} & set(names):
            raise ValueError(f"behaviours {sorted(reserved)} are built in and must not be declared")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"behaviours {twice} are declared twice")
        for i, name in enumerate(names):
            if not name.isidentifier() or keyword.iskeyword(name) or name in expression.RESERVED:
                raise ValueError(
                    f"behaviours.{i}.name: {name!r} cannot stand in an expression; take letters, digits and _, no word of Python"
                )
        for g in range(len(self.groups)):
            try:
                low, high = self.bounds(g)
            except ValueError as error:
                raise ValueError(f"groups.{g}.expression ({self.groups[g].name}): {error}") from error
            if not max(abs(low), abs(high)) < MAX_REWARD:
                reach = f"can reach {low:.3g}..{high:.3g} with the caps of the behaviours, expected less than {MAX_REWARD:.0e}"
                raise ValueError(f"groups.{g}.expression ({self.groups[g].name}): {reach}")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """Of the behaviours, in order."""
        return tuple(b.name for b in self.behaviours)

    @property
    def num_groups(self) -> int:
        """q."""
        return len(self.groups)

    def parsed(self, group: int) -> ast.expr:
        """The expression of a group, checked."""
        return expression.parse(self.groups[group].expression, self.names)

    def bounds(self, group: int) -> tuple[float, float]:
        """Smallest and largest reward of a pair in a group, after the scale, that the caps leave."""
        low, high = expression.bounds(self.parsed(group), {b.name: (-b.cap, b.cap) for b in self.behaviours})
        default = self.groups[group].default
        return min(low, low if default is None else default) / self.scale, max(high, high if default is None else default) / self.scale

    @property
    def canonical(self) -> str:
        """This section as JSON; expressions that differ by spaces or brackets only read the same."""
        section = self.model_dump(mode="json")
        for g, group in enumerate(section["groups"]):
            group["expression"] = ast.unparse(self.parsed(g))
        return json.dumps(section, sort_keys=True)

    @property
    def digest(self) -> str:
        """Version of the reward: first 16 hex digits of the sha256 of `canonical`."""
        return digest_of(self.canonical)


def digest_of(canonical: str) -> str:
    """Digest of a stored `RewardConfig.canonical`."""
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def rewards_of(behaviours: Floats, config: RewardConfig) -> Floats:
    """Rewards of shown pairs from their combined behaviours.

    Args:
        behaviours: (..., num_behaviours) combined values in the order of `config.behaviours`.
        config: Expressions, defaults and scale.

    Returns:
        (..., q) float32: the group's expression, or its default where all behaviours are 0, / scale.
    """
    columns = {name: behaviours[..., i] for i, name in enumerate(config.names)}
    rewards = np.zeros((*behaviours.shape[:-1], config.num_groups), np.float32)
    for g, group in enumerate(config.groups):
        rewards[..., g] = expression.evaluate(config.parsed(g), columns)
        if group.default is not None:
            rewards[..., g][~behaviours.any(-1)] = group.default
    rewards /= np.float32(config.scale)
    return rewards
