"""What came after each list of a batch, as the long-term effect is fitted to it (`algo.split`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch

from esrl_ray.algo.networks import Networks
from esrl_ray.algo.split import held_fixed


@dataclass(frozen=True, slots=True)
class Future:
    """What came after each list, for the split critic."""

    request: torch.Tensor  # (B, U) numeric inputs of user and context at the list itself, as they were logged
    known: torch.Tensor  # (B, H) 1 = the session's next list is there, the one after it, ...
    terminated: torch.Tensor  # (B, H) 1 = the user left after it
    next_request: torch.Tensor  # (B, U) at the next list
    held: torch.Tensor  # (B, W) `held_fixed`, of this request and the second next
    score_change: torch.Tensor  # (B, k) of the logged candidates' mean log scores, from this request to the second next
    change_known: torch.Tensor  # (B,) 1 = the second next request is there

    def split(self, num_parts: int) -> list[Future]:
        """As `Batch.split`."""
        columns = [getattr(self, f.name).split(len(self.known) // num_parts) for f in fields(self)]
        return [Future(*part) for part in zip(*columns, strict=True)]


def future_of(networks: Networks, c: Mapping[str, torch.Tensor], numeric: torch.Tensor, *, score_changes: bool) -> Future:
    """What came after the lists of a batch.

    Args:
        networks: Give normaliser and spec.
        c: Columns of a `TransitionBatch` on the device.
        numeric: (B, P, F + k) their normalised input.
        score_changes: Whether to look at the second next request.
    """
    rows, valid = torch.arange(len(numeric), device=numeric.device), c["valid"].unsqueeze(-1)

    def request(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:  # (B, U) of a real pair: user and context are in all of them
        return networks.request_features(states[rows, mask.argmax(1)])

    before = (numeric * valid).sum(1) / valid.sum(1).clamp_min(1.0)
    after = (c["future_inputs"] - networks.mean) / networks.std
    known = c["future_known"][:, 1] if score_changes and c["future_known"].shape[1] > 1 else torch.zeros_like(c["has_next"])
    items, scores = (known.unsqueeze(-1) * (raw(after) - raw(before)) for raw in (networks.item_features, networks.log_scores))
    following = request(c["next_states"], c["next_shown"])
    mean, std = (networks.request_features(scale) for scale in (networks.mean, networks.std))
    held = held_fixed(items, (following - mean) / std)
    return Future(request(c["states"], c["valid"]), c["future_known"], c["future_terminated"], following, held, scores, known)
