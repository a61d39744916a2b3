"""What came after each list of a batch, as the long-term effect is fitted to it (`algo.split`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch

from esrl_ray.algo.networks import Networks
from esrl_ray.algo.split import held_fixed, products


@dataclass(frozen=True, slots=True)
class Future:
    """What came after each list, for the split critic."""

    given: torch.Tensor  # (B, F + k + products) what was there before the list itself was chosen: means over its candidates, `products`
    cohort: torch.Tensor  # (B,) one number for lists of one round, arm and kind of means
    known: torch.Tensor  # (B, H) 1 = the session's next list is there, the one after it, ...
    terminated: torch.Tensor  # (B, H) 1 = the user left after it
    next_request: torch.Tensor  # (B, U) at the next list
    held: torch.Tensor  # (B, W) `held_fixed`, of this request and the second next
    score_change: torch.Tensor  # (B, k) of the candidates' mean log scores, from this request to the second next
    change_known: torch.Tensor  # (B,) 1 = the second next request is there

    def split(self, num_parts: int) -> list[Future]:
        """As `Batch.split`."""
        columns = [getattr(self, f.name).split(len(self.known) // num_parts) for f in fields(self)]
        return [Future(*part) for part in zip(*columns, strict=True)]


def future_of(networks: Networks, c: Mapping[str, torch.Tensor], *, score_changes: bool) -> Future:
    """What came after the lists of a batch.

    Args:
        networks: Give normaliser and spec.
        c: Columns of a `TransitionBatch` on the device.
        score_changes: Whether to look at the second next request.
    """
    spec, change = networks.spec, c["future_change"]
    known = c["future_change_known"] * score_changes
    users, items = len(spec.user_features), len(spec.item_features)
    change = known.unsqueeze(-1) * change
    rows, any_shown = torch.arange(len(change), device=change.device), c["next_shown"].argmax(1)
    following = networks.request_features(c["next_states"][rows, any_shown])  # user and context are in all pairs
    mean, std = (networks.request_features(scale) for scale in (networks.mean, networks.std))
    held = held_fixed(change[:, users : users + items], (following - mean) / std)
    scaled = networks.request_features((c["candidate_means"] - networks.mean) / networks.std)
    given = torch.cat([c["candidate_means"], products(scaled)], -1)
    return Future(given, c["cohort"], c["future_known"], c["future_terminated"], following, held, change[:, spec.num_features :], known)
