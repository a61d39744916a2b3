"""The split critic (ours): what a pair pays now is learnt from its own reward, what it does to the rest of the session from what follows.

A list-sum critic must find a pair's share in one noisy number per list. Here the reward heads rho are supervised on every shown pair, and
the long-term effect f of a pair is how many more lists of the session it brings, times what a list pays on average.

Not the rewards of later lists: they say more about who the user is than about what the list did to them. A user of high scores is
shown high scores and pays well on the next list too, and nothing in the state tells the one from the other; a return of rewards, from a
value network or not, credits the list with it, and more data does not help (docs/paper.md has the numbers).

Two things that follow tell the effect. Whether the user comes back for another list: hardly biased, but rare. And how upstream scores
change from the request before a list to the one after it: an upstream model that sees the session expects less of a user who is annoyed, of
all the next candidates, after every list. Their level is who the user is and their mix is which candidates came; little of either is left
in their change, with the candidates' features held fixed. The list's own request is left out on purpose: its scores chose the list. Scores
are surrogates here as in Athey, Chetty, Imbens and Kang (2019): who stays decides which of them count and how much, and whether they tell
all (`LongTerm`). A difference that users bring into a session and keep through it is not told apart from none: what f says of inputs that
follow the user is too small then.

Not by gradient steps: f is a small difference in a noisy number. A network fits the noise, and even a linear f by Adam loses a fifth of
the correlation with the truth that least squares in closed form has (`python -m benchmarks.credit`). So f is linear in the item's features
and the predicted rewards, and its normal equations are summed up over batches.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import Any, NamedTuple

import torch
from torch import nn

MEMORY = 2000
"""Batches that the sums remember: each batch makes those before it count `1 - 1 / MEMORY` times as much."""
RIDGE = 1e-4
"""Of the solution, on inputs of standard deviation 1; with few lists it is their number of inputs over the number of draws."""
MAX_PRODUCTS = 256
"""Of features with features that are held fixed beside the features; with more there are none."""
CHANCE = 0.01
"""Probability that any score counts where none reacts to the session."""
SWEEPS, SCORE_RIDGE = 40, 0.05
"""Of coordinate descent over the scores, and beside their variance: directions that are nearly the same share what they explain."""


def reward_losses(values: torch.Tensor, rewards: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
    """`(rho_{i,n}(s_j) - r_{i,j})^2`, mean over the shown pairs of the batch.

    Args:
        values: (q, m, B, L) rho.
        rewards: (B, L, q) of pairs.
        shown: (B, L).

    Returns:
        (q, m), one loss for each critic.
    """
    assert values.shape[2:] == shown.shape == rewards.shape[:2] and values.shape[0] == rewards.shape[2]
    errors = values - rewards.permute(2, 0, 1).unsqueeze(1)
    return (errors.square() * shown).sum((-2, -1)) / shown.sum().clamp_min(1.0)


def lists_ahead(known: torch.Tensor, terminated: torch.Tensor, ended: torch.Tensor, leaving: torch.Tensor, *, gamma: float) -> torch.Tensor:
    """Discounted number of lists after this one: `y = sum_{h=1..K} gamma^h + (1 - left) gamma^K rest`.

    K of the next H lists are known. Where the user has not left by then, the rest is what is expected when a share p of users leaves after
    each list: `e = gamma (1 - p) / (1 - gamma (1 - p))` where it is not known whether another list comes (K < H), and `gamma (1 + e)` where
    one does (K = H).

    Args:
        known: (B, H) 1 = that list is there; 1s come first.
        terminated: (B, H) 1 = the user left after it.
        ended: (B,) 1 = the user left after this one.
        leaving: () p.
        gamma: Discount, below 1.

    Returns:
        (B,).
    """
    assert known.shape == terminated.shape and ended.shape == known.shape[:1], (known.shape, terminated.shape, ended.shape)
    num_known = known.sum(-1)
    left = torch.maximum(ended, (known * terminated).amax(-1))
    stays = gamma * (1 - leaving)
    rest = torch.where(num_known < known.shape[1], stays, gamma) / (1 - stays)
    faded = torch.full_like(num_known, gamma).pow(num_known)
    return gamma * (1 - faded) / (1 - gamma) + (1 - left) * faded * rest


def num_held(num_items: int, num_request: int) -> int:
    """W, the width of `held_fixed`."""
    return num_items * (1 + num_request if num_items * num_request <= MAX_PRODUCTS else 1)


def held_fixed(items: torch.Tensor, request: torch.Tensor) -> torch.Tensor:
    """What tells the candidates of two requests apart: their features, and how a user of these features is scored on them.

    Args:
        items: (B, I) change of the candidates' mean features.
        request: (B, U) features of user and context about 0 and 1; far from 0, a product would be the item's feature once more.

    Returns:
        (B, W) items and, up to `MAX_PRODUCTS` of them, their products with request.
    """
    products = (items.unsqueeze(-1) * request.unsqueeze(-2)).flatten(1)
    return torch.cat([items, products], -1) if products.shape[1] <= MAX_PRODUCTS else items


def num_products(num_request: int) -> int:
    """Width of `products`."""
    num = num_request * (num_request + 1) // 2
    return num if num <= MAX_PRODUCTS else 0


def products(request: torch.Tensor) -> torch.Tensor:
    """Each of U features about 0 and 1 with itself and the others (B, U (U + 1) / 2); up to `MAX_PRODUCTS` of them, else none (B, 0)."""
    i, j = torch.triu_indices(request.shape[1], request.shape[1], device=request.device)
    wide = request[:, i] * request[:, j]
    return wide if wide.shape[1] <= MAX_PRODUCTS else wide[:, :0]


class Lists(NamedTuple):
    """Of B lists, what is fitted to who stays."""

    effects: torch.Tensor  # (B, D) psi summed over the shown pairs
    given: torch.Tensor  # (B, C) what was there before the list was chosen, and may tell who stays
    cohort: torch.Tensor  # (B,) one number for lists of one round, arm and kind of means
    ahead: torch.Tensor  # (B, 2) `lists_ahead` with the discount `effect_gamma`, and with `gamma`
    ended: torch.Tensor  # (B,) 1 = the user left after the list
    reward: torch.Tensor  # (B,) of the list


class Between(NamedTuple):
    """Of B lists that stand between two other requests of their session, what is fitted to how scores change. Rows that do not are 0."""

    effects: torch.Tensor  # (B, D) psi summed over the shown pairs
    request: torch.Tensor  # (B, U)
    held: torch.Tensor  # (B, W) `held_fixed`, of the request before the list and the one after it
    scores: torch.Tensor  # (B, k) change of their mean log scores
    known: torch.Tensor  # (B,) 1 = both requests are there


class Sums(NamedTuple):
    """What least squares and the averages need, summed over lists. V = D + C + 1, V' = D + U + W + 1."""

    gram: torch.Tensor  # (V, V) of inputs: effects of the shown pairs, what was given, 1; all but 1 less their mean in the batch's cohort
    moment: torch.Tensor  # (V, 2) inputs times lists ahead, near and far, those less their mean too
    square: torch.Tensor  # (2,) lists ahead squared, as above
    change_gram: torch.Tensor  # (V', V') of inputs: effects, the request, what is held fixed, 1
    change_moment: torch.Tensor  # (V', k) inputs times the change of the scores
    change_square: torch.Tensor  # (k,) that change squared
    ends: torch.Tensor  # () sessions that ended
    reward: torch.Tensor  # ()
    free: torch.Tensor  # () lists less one for each of their cohorts
    pairs: torch.Tensor  # () pairs of lists in the batch
    equal: torch.Tensor  # () of the same list: how many different ones there are to draw from


class LongTerm(nn.Module):
    """f of a pair, `w psi(s)` times the mean reward of a list, from the sums over all batches.

    Three fits by least squares over lists, each `sum_j w psi(s_j) + v u + c ~ y`, u what is held fixed:

    1. y = the change of each score's mean logarithm from the request before the list to the one after it, the candidates' features held
       fixed: k directions. A score counts if the chi^2 of its direction exceeds the quantile that one of k exceeds by chance in
       `CHANCE`; `a` is the largest `1 - quantile / chi^2` of those with a weight above 0 in `w_s`, 0 if there are none.
    2. y = lists ahead with the discount `learner.effect_gamma`, about as fast as the effect of a list fades (what comes after says nothing
       about this list): `w_s` is a combination of the directions with weights >= 0 (of a user who is kept more is expected), `w_l` is free,
       and `w = w_s + (1 - a + a (1 - 4 D / chi^2)_+) (w_l - w_s)`, chi^2 that of `w_l - w_s`. Where no score reacts w is w_l. The factor
       is that of James and Stein (1961), 4 times as strong: lists of a session share one end, and w_l is not quite free of who the user is.
    3. y = lists ahead with the discount `learner.gamma`: the length of w.

    In 1, u is the request. In 2 and 3 it is all that was there before the list was chosen (features of user and context, their products,
    the candidates' mean features and log scores), and only lists of one round and arm are compared: a policy that keeps users keeps them
    in a good mood, in which they would stay for any list, and a list of a later round would be credited with what the lists around it did.

    chi^2 is what a solution explains, over the variance of y, times the number of different lists: replay gives each many times, and the
    more of a batch are equal, the fewer there are.

    All but products is in units of the log, not of the normaliser: neither a new one nor new value scales change f. Products are of
    normalised features: those of two normalisers are mixed in the sums until the older ones have faded.

    Args:
        num_effects: D, width of psi.
        num_given: C.
        num_request: U, numeric inputs of user and context.
        num_held: W.
        num_scores: k.
    """

    gram: torch.Tensor
    moment: torch.Tensor
    square: torch.Tensor
    change_gram: torch.Tensor
    change_moment: torch.Tensor
    change_square: torch.Tensor
    ends: torch.Tensor
    reward: torch.Tensor
    free: torch.Tensor
    pairs: torch.Tensor
    equal: torch.Tensor
    weights: torch.Tensor

    def __init__(self, num_effects: int, num_given: int, num_request: int, num_held: int, num_scores: int) -> None:
        super().__init__()
        # chi^2 with D degrees of freedom (Wilson and Hilferty), for one of k scores
        spread = 2 / (9 * num_effects)
        self._quantile = num_effects * (1 - spread + NormalDist().inv_cdf(1 - CHANCE / num_scores) * spread**0.5) ** 3
        width, wide = num_effects + num_given + 1, num_effects + num_request + num_held + 1
        shapes = {
            "gram": (width, width),
            "moment": (width, 2),
            "square": (2,),
            "change_gram": (wide, wide),
            "change_moment": (wide, num_scores),
            "change_square": (num_scores,),
            "ends": (),
            "reward": (),
            "free": (),
            "pairs": (),
            "equal": (),
        }
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("weights", torch.zeros(num_effects))

    def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *arguments: Any) -> None:
        """Sums of an older version, which have other shapes, are not taken: these start anew, and f with them."""
        if any(state_dict[prefix + name].shape != getattr(self, name).shape for name in Sums._fields if prefix + name in state_dict):
            state_dict.update({prefix + name: torch.zeros_like(getattr(self, name)) for name in Sums._fields})
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    @property
    def leaving(self) -> torch.Tensor:
        """() share of lists after which the user leaves; 0 before there was a list."""
        return (self.ends / self.gram[-1, -1].clamp_min(1.0)).float()

    def forward(self, effects: torch.Tensor) -> torch.Tensor:
        """f of pairs, in units of reward: psi (..., D) -> (...)."""
        return effects @ self.weights * (self.reward / self.gram[-1, -1].clamp_min(1.0)).float()

    def sums(self, lists: Lists, between: Between) -> Sums:
        """The sums of a batch."""
        num_lists, one = len(lists.ended), torch.ones_like(lists.ended).unsqueeze(-1)
        raw = torch.cat([lists.effects, lists.given], -1)
        # Less the batch's mean: beside a feature as large as a time in seconds all else would be rounded away, and all lists be one.
        key = (raw.double() - raw.double().mean(0)).sum(-1).sort().values
        number = _numbered(lists.cohort)
        inputs = torch.cat([_centred(raw, number), one], -1)
        ahead = _centred(lists.ahead, number)
        changed = torch.cat([between.effects, between.request, between.held, one], -1).double() * between.known.unsqueeze(-1)
        scores = between.scores.double()
        return Sums(
            inputs.T @ inputs,
            inputs.T @ ahead,
            ahead.square().sum(0),
            changed.T @ changed,
            changed.T @ scores,
            scores.square().sum(0),
            lists.ended.sum().double(),
            lists.reward.sum().double(),
            (num_lists - 1 - number.max()).double(),
            torch.full_like(self.pairs, num_lists * (num_lists - 1) / 2),
            (key[1:] == key[:-1]).sum().double(),
        )

    def add(self, sums: Sums) -> None:
        """Take the sums of another batch."""
        for name, more in sums._asdict().items():
            getattr(self, name).mul_(1 - 1 / MEMORY).add_(more)

    def solve(self) -> None:
        """Set w. Inputs are standardised first; one that never varies gets 0."""
        d, count = len(self.weights), self.gram[-1, -1]
        different = 1 / (1 + count * self.equal / self.pairs.clamp_min(1.0))  # n = 1 / (1 / draws + 1 / lists to draw from), over draws
        stays = _equations(self.gram, self.moment, self.square, d, self.free)
        moved = _equations(self.change_gram, self.change_moment, self.change_square, d, self.change_gram[-1, -1])
        along = _solve(moved.matrix, moved.cross)  # (D, k)
        trust = (1 - self._quantile / (different * moved.chi_square(along))).clamp_min(0.0)  # (k,)
        along = along * (trust > 0) * (stays.std / moved.std).nan_to_num(0.0, 0.0).unsqueeze(-1)
        near, far = stays.cross[:, :1], stays.cross[:, 1:]
        counts = _nonnegative(along.T @ stays.matrix @ along, along.T @ near)  # (k, 1)
        by_scores = along @ counts
        rest = _solve(stays.matrix, near) - by_scores
        kept = (1 - 4 * d / (different * stays.chi_square(rest)[:1])).clamp_min(0.0)
        trusted = (trust * (counts[:, 0] > 0)).max()
        direction = by_scores + (1 - trusted * (1 - kept)) * rest
        length = (direction.T @ far) / (direction.T @ stays.matrix @ direction).clamp_min(1e-12)
        self.weights.copy_((length.clamp_min(0.0) * direction).squeeze(-1) / stays.std)


class _Equations(NamedTuple):
    """Normal equations of D inputs with others held fixed, all of standard deviation 1."""

    matrix: torch.Tensor  # (D, D)
    cross: torch.Tensor  # (D, t)
    std: torch.Tensor  # (D,) that the inputs had; infinite where one never varies
    num_lists: torch.Tensor  # ()
    variance: torch.Tensor  # (t,) of the targets, less what the others explain

    def chi_square(self, found: torch.Tensor) -> torch.Tensor:
        """(t,) of solutions (D, t), if all lists were different."""
        explained: torch.Tensor = (found * (self.matrix @ found)).sum(0)
        return (self.num_lists * explained / self.variance).clamp_min(1e-12)


def _numbered(cohort: torch.Tensor) -> torch.Tensor:
    """(B,) cohorts as 0, 1, ...; without `unique`, which waits for the device."""
    cohorts, order = cohort.sort()
    number = torch.zeros_like(order)
    number[order[1:]] = (cohorts[1:] != cohorts[:-1]).long().cumsum(0)
    return number


def _centred(x: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    """(B, n) less its mean over the rows of the same number (B,), in float64; what differs by less than a float32 can tell becomes 0."""
    rows = torch.cat([x, torch.ones_like(x[:, :1])], -1).double()
    sums = torch.zeros_like(rows).index_add_(0, number, rows)[number]
    means = sums[:, :-1] / sums[:, -1:]
    left = rows[:, :-1] - means
    return left * (left.abs() > 1e-6 * means.abs())


def _equations(gram: torch.Tensor, moment: torch.Tensor, square: torch.Tensor, num: int, free: torch.Tensor) -> _Equations:
    """Of the first `num` inputs, the others held fixed (Frisch, Waugh and Lovell).

    Args:
        gram: (n, n) of inputs, the last of which is 1.
        moment: (n, t) of inputs and targets.
        square: (t,) of targets.
        num: D.
        free: () rows, less one for each mean that was taken from them.
    """
    count = free.clamp_min(1.0)
    mean, mean_target = gram[-1, :-1] / count, moment[-1] / count
    covariance = gram[:-1, :-1] / count - torch.outer(mean, mean)
    variance = covariance.diagonal()
    std = torch.where((variance > 1e-10 * mean.square()) & (variance > 0), variance.clamp_min(0.0).sqrt(), torch.inf)
    cross = (moment[:-1] / count - torch.outer(mean, mean_target)) / std.unsqueeze(-1)
    ridge = torch.eye(len(std), dtype=std.dtype, device=std.device) * (len(std) / count).clamp_min(RIDGE)
    matrix = covariance / torch.outer(std, std) + ridge
    others, cross_others = matrix[:num, num:], cross[num:]
    by_others = _solve(matrix[num:, num:], torch.cat([others.T, cross_others], -1))
    explained = others @ by_others
    left = square / count - mean_target.square() - (cross_others * by_others[:, num:]).sum(0)
    return _Equations(matrix[:num, :num] - explained[:, :num], cross[:num] - explained[:, num:], std[:num], count, left.clamp_min(1e-12))


def _solve(matrix: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    solution: torch.Tensor = torch.linalg.solve_ex(matrix, right)[0]  # `_ex` does not wait for the device
    return solution


def _nonnegative(matrix: torch.Tensor, cross: torch.Tensor) -> torch.Tensor:
    """argmin over c >= 0 of `c' M c / 2 - c' b` (n, 1), M with `SCORE_RIDGE` of its diagonal more; a direction of length 0 gets 0."""
    scale = matrix.diagonal().clamp_min(1e-300).rsqrt().unsqueeze(-1) * (matrix.diagonal() > 0).unsqueeze(-1)
    unit, target = matrix * scale * scale.T, cross * scale
    c = torch.zeros_like(target)
    for _ in range(SWEEPS):
        for i in range(len(c)):
            c[i] = ((target[i] - unit[i] @ c + c[i]) / (1 + SCORE_RIDGE)).clamp_min(0.0)
    return c * scale
