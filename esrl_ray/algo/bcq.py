"""BatchRL-MTF's learning (arXiv 2208.04560; BCQ, arXiv 1812.02900): networks that imitate and perturb, and one pure function per equation.

Shapes: B requests, n candidates of each, A action dimensions, Z latent dimensions, m = 2 twin critics.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from esrl_ray.algo.actor import request_inputs
from esrl_ray.spec import Spec


class RequestNetwork(nn.Module):
    """An MLP on what all pairs of a request share (user and context) and on one vector more.

    Args:
        spec: Inputs and codes of user and context.
        num_more: Width of the vector: an action or a latent.
        hidden_sizes: Widths of the hidden layers.
        embedding_size: Width of each categorical feature's embedding.
        num_outputs: Width of the result.
    """

    def __init__(self, spec: Spec, num_more: int, hidden_sizes: Sequence[int], *, embedding_size: int, num_outputs: int) -> None:
        super().__init__()
        self._spec, self._codes = spec, list(spec.request_codes)
        self.embeddings = nn.ModuleList(nn.Embedding(spec.categorical_features[c].cardinality, embedding_size) for c in self._codes)
        widths = [len(spec.request_inputs) + embedding_size * len(self._codes) + num_more, *hidden_sizes, num_outputs]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, numeric: torch.Tensor, categorical: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
        """Results (..., num_outputs) of numeric inputs (..., F + k), codes (..., C) and a vector (..., num_more)."""
        looked_up = [table(categorical[..., c]) for c, table in zip(self._codes, self.embeddings, strict=True)]
        x = torch.cat([request_inputs(numeric, self._spec), *looked_up, more], dim=-1)
        for layer in self.layers[:-1]:
            x = torch.relu(layer(x))
        result: torch.Tensor = self.layers[-1](x)
        return result


class Generator(nn.Module):
    """G(s), the action generative network: a conditional variational autoencoder of logged actions, in standardised units.

    Args:
        spec: Inputs, codes and A.
        hidden_sizes: Widths of encoder and decoder.
        embedding_size: Width of each categorical feature's embedding.
    """

    def __init__(self, spec: Spec, hidden_sizes: Sequence[int], *, embedding_size: int) -> None:
        super().__init__()
        self.num_latent = 2 * spec.num_actions  # as in BCQ
        self.encoder = RequestNetwork(spec, spec.num_actions, hidden_sizes, embedding_size=embedding_size, num_outputs=2 * self.num_latent)
        self.decoder = RequestNetwork(spec, self.num_latent, hidden_sizes, embedding_size=embedding_size, num_outputs=spec.num_actions)

    def encode(self, numeric: torch.Tensor, categorical: torch.Tensor, actions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log standard deviation (B, Z) of z given (s, a)."""
        mean, log_std = self.encoder(numeric, categorical, actions).chunk(2, dim=-1)
        return mean, log_std.clamp(-4.0, 15.0)  # as in BCQ's code

    def decode(self, numeric: torch.Tensor, categorical: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """Actions (..., A) of latents (..., Z)."""
        actions: torch.Tensor = self.decoder(numeric, categorical, latents)
        return actions


def generator_loss(
    reconstructed: torch.Tensor, actions: torch.Tensor, *, mean: torch.Tensor, log_std: torch.Tensor, kl_weight: float
) -> torch.Tensor:
    """Evidence bound of the generator: `mean (a - a_hat)^2 + w mean KL(N(mean, std) || N(0, 1))`; w = .5 in BCQ's code.

    Args:
        reconstructed: (B, A) a_hat.
        actions: (B, A).
        mean: (B, Z).
        log_std: (B, Z).
        kl_weight: w.
    """
    assert reconstructed.shape == actions.shape, (reconstructed.shape, actions.shape)
    kl = -0.5 * (1 + 2 * log_std - mean.square() - (2 * log_std).exp())
    return (reconstructed - actions).square().mean() + kl_weight * kl.mean()


def perturbed_actions(actions: torch.Tensor, outputs: torch.Tensor, *, rho: float) -> torch.Tensor:
    """`clip(a_hat + rho tanh(P(s, a_hat)), -1, 1)`: the perturbation network moves a candidate by rho at most.

    Args:
        actions: (..., A) candidates.
        outputs: (..., A) of the perturbation network, before tanh.
        rho: 0.15 in the paper.
    """
    return (actions + rho * torch.tanh(outputs)).clamp(-1.0, 1.0)


def bcq_target(rewards: torch.Tensor, next_values: torch.Tensor, has_next: torch.Tensor, *, gamma: float) -> torch.Tensor:
    """`y = r + gamma has_next max_i min_n Q'_n(s', a'_i)` over the candidates of the next request.

    Args:
        rewards: (B,).
        next_values: (m, B, n) target values.
        has_next: (B,) 1 = a next list follows, 0 = the user left.
        gamma: Discount.

    Returns:
        (B,) without gradient.
    """
    assert rewards.shape == has_next.shape == next_values.shape[1:2], (rewards.shape, has_next.shape, next_values.shape)
    return (rewards + gamma * has_next * next_values.amin(0).amax(-1)).detach()


def chosen_actions(values: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """`pi(s) = argmax_i Q(s, a_i)`: of candidates (B, n, A) the one with the largest value (B, n), (B, A)."""
    assert values.shape == candidates.shape[:2], (values.shape, candidates.shape)
    return candidates[torch.arange(len(values), device=values.device), values.argmax(1)]


def distillation_loss(actions: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Mean squared distance of a deterministic actor's actions (B, A) to the chosen ones (ours)."""
    assert actions.shape == chosen.shape, (actions.shape, chosen.shape)
    return (actions - chosen.detach()).square().mean()
