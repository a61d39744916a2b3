"""Features of lists that values are linear in: what a small network learns of pairs, summed over a list, and what describes the request.

Two things matter more than the size of the network. The mean features of the *candidates*, not only of the shown pairs, describe the
request: without them a user whose candidates score high, and who stays anyway, is credited to a policy that picks high scores. And their
mean over the session so far tells more than the K unshown pairs of one list.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from esrl_ray.config import Config
from esrl_ray.evaluation.support import Doubles, Lists
from esrl_ray.normaliser import Normaliser, numeric_input
from esrl_ray.replay.steps import LEFT, Indices, Steps
from esrl_ray.vocabulary import Floats

CLIP = 4.0
"""Normalised inputs beyond this are cut: values are linear in their squares."""
NUM_FEATURES, HIDDEN, EMBEDDING, BATCH, RETURN_GAMMA = 16, 64, 8, 256, 0.9
"""Learnt features of a pair, width of the network, lists in a batch, discount of the return that it learns to tell."""


@dataclass(frozen=True, slots=True)
class ListFeatures:
    """Features of pairs and of requests; of a list, the two together.

    Attributes:
        pairs: (n, G, p).
        requests: (n, c), the same whatever is shown.
    """

    pairs: Floats
    requests: Doubles

    def of(self, masses: npt.ArrayLike) -> Doubles:
        """(n, p + c) of the lists that hold each pair `masses` (n, G) times: the mean over the list, then the request's."""
        m = np.asarray(masses, np.float64)
        mean = np.einsum("ng,ngp->np", m, self.pairs) / np.maximum(m.sum(1), 1e-9)[:, None]
        return np.concatenate([mean, self.requests], axis=1)


class _Telling(nn.Module):
    """A pair's features; heads that tell its reward and, summed over the list beside the request's own part, return and leaving."""

    def __init__(self, config: Config, width: int) -> None:
        super().__init__()
        spec = config.spec.build()
        self.embeddings = nn.ModuleList(nn.Embedding(feature.cardinality, EMBEDDING) for feature in spec.categorical_features)
        inputs = spec.num_features + spec.num_scores + EMBEDDING * spec.num_categorical
        self.pair = nn.Sequential(nn.Linear(inputs, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, NUM_FEATURES), nn.Tanh())
        self.reward = nn.Linear(NUM_FEATURES, config.reward.num_groups)
        self.later = nn.Linear(NUM_FEATURES, 2)
        self.request = nn.Sequential(nn.Linear(width, HIDDEN // 2), nn.ReLU(), nn.Linear(HIDDEN // 2, 2))

    def features(self, numeric: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """(..., NUM_FEATURES) in (-1, 1)."""
        told: torch.Tensor = self.pair(torch.cat([numeric, *(table(codes[..., c]) for c, table in enumerate(self.embeddings))], dim=-1))
        return told


def list_features(lists: Lists, *, train_on: Indices, num_updates: int, seed: int) -> ListFeatures:
    """Learn features from some of the lists, give them for all.

    Args:
        lists: n of them.
        train_on: Lists that the network may learn from; values are then fitted on others.
        num_updates: Gradient steps; 0 takes the normalised item inputs and scores as they are.
        seed: Of parameters and batches.
    """
    steps, spec = lists.steps, lists.config.spec.build()
    columns, valid = steps.columns, steps.columns["valid"] > 0
    normaliser = Normaliser.fit(columns["states"], columns["scores"], valid)
    raw = numeric_input(columns["states"], columns["scores"])
    numeric = np.clip((raw - normaliser.mean) / normaliser.std, -CLIP, CLIP).astype(np.float32) * valid[..., None]
    request = list(spec.request_inputs)
    user = numeric[:, 0][:, request].astype(np.float64)
    one = np.ones((len(steps), 1))
    if num_updates:
        pairs = _learnt(
            lists, numeric, np.concatenate([one, user], axis=1).astype(np.float32), train_on=train_on, num_updates=num_updates, seed=seed
        )
    else:
        pairs = numeric[..., [i for i in range(numeric.shape[2]) if i not in request]]
    offered = np.einsum("ng,ngp->np", lists.masses, pairs) / np.maximum(lists.masses.sum(1), 1e-9)[:, None]
    known = [one, user, user**2, offered, mean_so_far(offered, steps)]
    return ListFeatures(pairs * valid[..., None], np.concatenate(known, axis=1))


def _learnt(lists: Lists, numeric: Floats, user: Floats, *, train_on: Indices, num_updates: int, seed: int) -> Floats:
    steps = lists.steps
    columns, following = steps.columns, steps.following
    longest = int(columns["shown"].sum(1).max())
    seen = np.argsort(-columns["shown"], axis=1, kind="stable")[:, :longest]  # (n, l)

    def of_shown(column: npt.NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(np.take_along_axis(column, seen.reshape(*seen.shape, *[1] * (column.ndim - 2)), axis=1))

    shown, rewards = of_shown(columns["shown"]), of_shown(columns["rewards"])
    inputs, codes = of_shown(numeric), of_shown(columns["categorical"].astype(np.int64))
    later = np.stack([steps.returns(RETURN_GAMMA), following == LEFT], axis=1).astype(np.float32)
    targets = torch.from_numpy((later - later[train_on].mean(0)) / np.maximum(later[train_on].std(0), 1e-3))
    users, scale = torch.from_numpy(user), rewards[torch.from_numpy(train_on)].std((0, 1)).clamp_min(1e-3)
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _Telling(lists.config, user.shape[1])
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=1e-2)
    for _ in range(num_updates):
        b = torch.from_numpy(rng.choice(train_on, BATCH))
        mask = shown[b][..., None]  # (B, l, 1)
        features = network.features(inputs[b], codes[b])  # (B, l, p)
        of_pairs = (((network.reward(features) - rewards[b]) / scale) ** 2 * mask).sum() / mask.sum()
        of_lists = (((network.later(features) * mask).sum(1) + network.request(users[b]) - targets[b]) ** 2).mean()
        optimiser.zero_grad()
        (of_pairs + of_lists).backward()
        optimiser.step()
    with torch.inference_mode():
        return network.features(torch.from_numpy(numeric), torch.from_numpy(columns["categorical"].astype(np.int64))).numpy()


def mean_so_far(values: Doubles, steps: Steps) -> Doubles:
    """Mean of values (n, d) over the lists of the session up to and with each list."""
    total, count = values.copy(), np.ones(len(values))
    for number, after in enumerate(steps.following):  # a step's next one stands behind it
        if after >= 0:
            total[after] += total[number]
            count[after] += count[number]
    return total / count[:, None]
