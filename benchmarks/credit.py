"""From which target, and from which inputs, a log tells what a shown pair does to the user in the long run.

python -m benchmarks.credit [--worlds 0,3,1,2,4] [--lists 60000] [--seed 0] [--adam-steps 6000] [--machine TEXT] [--out FILE]

A fit finds the function f of a pair whose sum over the shown pairs, beside a function of user and context features, is nearest to a target
that the log holds: by least squares, f linear, or by Adam. f is scored by its correlation with the simulator's true effect on satisfaction
within pages of other sessions; nothing but the ceiling is fitted to that truth. Returns of later rewards credit a list with who the user
is: users of high scores are shown high scores, and pay well on the next list too, beyond what user features tell. Whether the user comes
back depends less on who that is. More lists do not help, since it is no noise. Taking each user's mean out of inputs and targets does. So
does the change of upstream scores from the request before a list to the one after it, with the candidates' features held fixed.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import shlex
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import mse_loss

from benchmarks.estimators import make_log
from benchmarks.methods import NUM_STEPS, configure
from benchmarks.rows import RESULTS, commit
from benchmarks.timing import Table
from esrl_ray.algo.split import Between, Lists, LongTerm, held_fixed, lists_ahead, products
from esrl_ray.config import Config, LearnerConfig
from esrl_ray.evaluation.frozen import MAX_PAGES, UNSEEN, play
from esrl_ray.normaliser import Normaliser, numeric_input
from esrl_ray.policy.policy import Policy
from esrl_ray.replay.chains import followers
from esrl_ray.replay.steps import LEFT, Indices
from esrl_ray.simulation.draws import Doubles
from esrl_ray.simulation.oracle import PAIRS_PER_PAGE, Recorder, TrueOracle
from esrl_ray.vocabulary import Floats

WINDOWS, REWARDS, DISCOUNTS, FAR, GAMMA = (1, 3, 6, 12), (1, 6, 12), (0.6, 0.75, 0.85, 0.92), 20, 0.98
"""Lists of the windows of leaving and of reward; discounts of leaving, which is looked for in `FAR` lists; discount of the return."""
INPUTS = ("item features, scores", "item features, predicted rewards")
COLUMNS = (*INPUTS, *(f"{name}; less the user's means" for name in INPUTS))
CHANGE, HELD = "change of the {} score around the list", "{}, the candidates' features held fixed"
SPLIT = {"the split critic, from who stays, without the scores": False, "the split critic": True}
CEILING, BY_ADAM = "the truth itself: the ceiling", ("lists to come, up to 12", "discounted leaving, 0.85")
KINDS: dict[str, tuple[int, ...]] = {"linear": (), "layers 64, 64": (64, 64)}
RIDGE = 1.0  # beside sums of squares of thousands of lists: it only keeps the equations solvable
SESSIONS, REWARD_STEPS, BATCH = 600, 3_000, 500
Loss = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Log:
    """What fits are made from, and the pages that judge them. A pair is its D = F + k + q standardised inputs and predicted rewards."""

    shown: Floats  # (n, l, D)
    users: Indices  # (n,)
    targets: dict[str, Doubles]  # (n,) each
    judged: Floats  # (pairs, D), a page's pairs together
    gains: Doubles  # (pairs,) g, the truth
    request: tuple[int, ...]  # columns of user and context
    inputs: tuple[tuple[int, ...], ...]  # columns of each of `INPUTS`
    means: Floats  # (n, F + k) of the inputs over the candidates of each request, standardised as those of pairs
    changes: Floats  # (n, F + k) of these, from the request before each list to the one after it; NaN without either
    items: tuple[int, ...]  # columns of the item's features
    following: Indices  # (n,)
    learner: LearnerConfig


def look_ahead(following: Indices, rewards: Doubles, horizon: int, *, gamma: float = 1.0) -> tuple[Doubles, Doubles]:
    """K, the lists that follow each until the user leaves (`horizon` for that many or more), and `sum_h gamma^h r_{t+h}` over them.

    `following` is that of `Steps`, `rewards` each list's, (n,) as the results, which are NaN where the log ends before they are known.
    """
    last = np.arange(len(following))
    ahead, total = np.zeros(len(following)), np.zeros(len(following))
    for h in range(1, horizon + 1):
        goes_on = following[last] >= 0
        last = np.where(goes_on, following[last], last)
        ahead += goes_on
        total += goes_on * gamma**h * rewards[last]
    unknown = (ahead < horizon) & (following[last] != LEFT)
    return np.where(unknown, np.nan, ahead), np.where(unknown, np.nan, total)


def targets(following: Indices, rewards: Doubles) -> dict[str, Doubles]:
    """What f is fitted to by name, (n,) each, more is better; NaN where the log ends before it is known."""
    ahead = {horizon: look_ahead(following, rewards, horizon)[0] for horizon in (*WINDOWS, FAR)}
    return {
        **{f"left within {k}": ahead[k] // k - 1 for k in WINDOWS},  # -1 or 0
        "lists to come, up to 12": ahead[12],
        **{f"discounted leaving, {d:g}": np.where(ahead[FAR] == FAR, 0.0, -(d ** ahead[FAR])) for d in DISCOUNTS},
        **{f"reward of the next {k}": look_ahead(following, rewards, k)[1] for k in REWARDS},
        f"return of reward, {GAMMA:g}": look_ahead(following, rewards, MAX_PAGES, gamma=GAMMA)[1],
    }


def make(config: Config, *, lists: int, seed: int, sessions: int, reward_steps: int) -> Log:
    """Log a world around control, every user exploring; predict rewards; look up the truth on other sessions that control serves."""
    spec, control, list_size = config.spec.build(), Policy.static(config.spec.build()), config.serve.list_size
    steps = make_log(config, [control], seed=seed, num_steps=lists)
    recorder = Recorder(TrueOracle.create(config, kappa=0.0), control, np.random.default_rng(seed))
    play(recorder, config, seed=seed + UNSEEN, sessions=sessions)
    states, scores, rewards = (steps.columns[name][:, :list_size] for name in ("states", "scores", "rewards"))  # shown pairs stand first
    scale = Normaliser.fit(states, scores, np.ones(states.shape[:2], np.bool_))
    shown, judged = ((raw - scale.mean) / scale.std for raw in (numeric_input(states, scores), np.concatenate(recorder.inputs)))
    pairs, y = torch.from_numpy(shown).flatten(0, 1), torch.from_numpy((rewards - rewards.mean((0, 1))) / rewards.std((0, 1))).flatten(0, 1)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        net = mlp(shown.shape[-1], 64, 64, y.shape[-1])
        train([net], lambda rows: mse_loss(net(pairs[rows]), y[rows]), len(y), steps=reward_steps, batch=512, rate=3e-3, cycle=True)
    with torch.no_grad():
        shown, judged = (np.concatenate([x, net(torch.from_numpy(x)).numpy()], -1) for x in (shown, judged))
    items = tuple(i for i in range(spec.num_features) if i not in spec.request_inputs)
    wide, width = range(shown.shape[-1]), y.shape[-1]
    inputs = ((*items, *wide[spec.num_features : -width]), (*items, *wide[-width:]))
    found = targets(steps.following, steps.list_rewards.sum(1).astype(np.float64))
    means: Floats = (steps.columns["candidate_means"] - scale.mean) / scale.std
    levels, changes = around(steps.following, means)
    for number, name in enumerate(spec.scores[:2]):
        found[f"{name} score of the next request"] = levels[:, spec.num_features + number].astype(np.float64)
        found[CHANGE.format(name)] = changes[:, spec.num_features + number].astype(np.float64)
    gains = np.concatenate(recorder.targets)[:, 1].astype(np.float64)
    following = steps.following.copy()
    return Log(shown, steps.users, found, judged, gains, spec.request_inputs, inputs, means, changes, items, following, config.learner)


def around(following: Indices, means: Floats) -> tuple[Floats, Floats]:
    """(n, ...) of each list's next request, and its change from the request before the list; NaN where one of them is not there."""
    before = np.full(len(following), -1)
    before[following[following >= 0]] = np.flatnonzero(following >= 0)
    after, earlier = (np.where((at >= 0)[:, None], means[np.maximum(at, 0)], np.nan) for at in (following, before))
    return after, after - earlier


def mlp(*widths: int) -> torch.nn.Sequential:
    """A network of these layers; two widths are a linear function."""
    layers = [layer for narrow, wide in itertools.pairwise(widths) for layer in (torch.nn.Linear(narrow, wide), torch.nn.ReLU())]
    return torch.nn.Sequential(*layers[:-1])


def train(nets: Sequence[torch.nn.Module], loss: Loss, num_rows: int, *, steps: int, batch: int, rate: float, cycle: bool = False) -> None:
    """Adam on random rows, at a constant rate or over one cycle."""
    optimizer = torch.optim.Adam([p for net in nets for p in net.parameters()], lr=rate, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps) if cycle else None
    for _ in range(steps):
        optimizer.zero_grad()
        torch.autograd.backward(loss(torch.randint(num_rows, (batch,))))
        optimizer.step()
        if schedule is not None:
            schedule.step()


def least_squares(log: Log, columns: Sequence[int], y: Doubles, *, within_users: bool, held: Floats | None = None) -> Doubles:
    """f of the judged pairs, in closed form; `held` (n, ...) are further inputs of lists that are held fixed."""
    known = ~np.isnan(y)
    sums, request = log.shown[known][..., columns].sum(1), log.shown[known][:, 0, log.request]
    if held is not None:
        request = np.concatenate([request, held[known]], 1)
    a = np.concatenate([sums, request, np.ones((len(sums), 1)), y[known, None]], 1)  # (lists, d + u + 2)
    if within_users:
        totals = np.zeros((log.users.max() + 1, a.shape[1]))
        np.add.at(totals, log.users[known], a)
        a = a - (totals / np.maximum(np.bincount(log.users[known], minlength=len(totals)), 1)[:, None])[log.users[known]]
    x, target = a[:, :-1], a[:, -1]
    w = np.linalg.solve(x.T @ x + RIDGE * np.eye(x.shape[1]), x.T @ target)
    return np.asarray(log.judged[:, columns] @ w[: len(columns)], np.float64)


def by_split(log: Log, columns: Sequence[int], *, changes: bool) -> Doubles:
    """f of the judged pairs as the split critic finds it from all lists at once, with the change of scores or without."""
    learner, num_lists = log.learner, len(log.following)
    chain = followers(log.following, np.arange(num_lists), learner.horizon)
    future = (chain >= 0, (chain >= 0) & (log.following == LEFT)[np.maximum(chain, 0)])
    known, left = (torch.from_numpy(x.astype(np.float32)) for x in future)
    ended = torch.from_numpy((log.following == LEFT).astype(np.float32))
    ahead = [lists_ahead(known, left, ended, ended.mean(), gamma=gamma) for gamma in (learner.effect_gamma, learner.gamma)]
    effects, request = (torch.from_numpy(x) for x in (log.shown[..., columns].sum(1), log.shown[:, 0, log.request]))
    there = torch.from_numpy(~np.isnan(log.changes).any(1) & changes).float()
    moved = torch.from_numpy(np.nan_to_num(log.changes) * there.numpy()[:, None]).float()
    num_scores = len(log.changes[0]) - len(log.request) - len(log.items)
    held, given = held_fixed(moved[:, log.items], request), torch.cat([torch.from_numpy(log.means), products(request)], -1)
    found = LongTerm(len(columns), given.shape[1], len(log.request), held.shape[1], num_scores)
    lists = Lists(effects, given, torch.zeros(num_lists), torch.stack(ahead, -1), ended, torch.ones_like(ended))
    between = Between(effects, request, held, moved[:, -num_scores:], there)
    for part in torch.from_numpy(np.arange(num_lists)).chunk(num_lists // BATCH + 1):
        found.add(found.sums(Lists(*(x[part] for x in lists)), Between(*(x[part] for x in between))))
    found.solve()
    return np.asarray(found(torch.from_numpy(log.judged[:, columns])), np.float64)


def by_adam(log: Log, columns: Sequence[int], y: Doubles, *, hidden: Sequence[int], steps: int, seed: int) -> Doubles:
    """f of the judged pairs by gradient steps; like a critic, it sees user and context as well, and so does a small b(u) beside it."""
    known, seen = ~np.isnan(y), (*columns, *log.request)
    pairs, users = (torch.from_numpy(x) for x in (log.shown[known][..., seen], log.shown[known][:, 0, log.request]))
    target = torch.from_numpy(((y[known] - y[known].mean()) / y[known].std()).astype(np.float32))[:, None]
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        f, b = mlp(len(seen), *hidden, 1), mlp(len(log.request), 32, 1)
        train([f, b], lambda i: mse_loss(f(pairs[i]).sum(1) + b(users[i]), target[i]), len(pairs), steps=steps, batch=128, rate=1e-3)
    with torch.no_grad():
        return np.asarray(f(torch.from_numpy(log.judged[:, seen]))[:, 0], np.float64)


def measure(log: Log, *, adam_steps: int, seed: int) -> dict[str, list[float]]:
    """Of every fit, for each of `COLUMNS` or of `INPUTS` only: correlation of f with the truth within pages; no steps leave Adam out."""
    truth, scores = centred(log.gains), defaultdict[str, list[float]](list)
    for within_users, columns in itertools.product((False, True), log.inputs):
        fits = {name: least_squares(log, columns, y, within_users=within_users) for name, y in log.targets.items()}
        for name in (name for name in log.targets if name.startswith("change")):
            held = log.changes[:, log.items]
            fits[HELD.format(name)] = least_squares(log, columns, log.targets[name], within_users=within_users, held=held)
        if not within_users:
            fits |= {name: by_split(log, columns, changes=changes) for name, changes in SPLIT.items()}
            x = centred(log.judged[:, columns].astype(np.float64))
            fits = {CEILING: x @ np.linalg.lstsq(x, truth, rcond=None)[0]} | fits
            for name, (kind, hidden) in itertools.product(BY_ADAM if adam_steps else (), KINDS.items()):
                f = by_adam(log, columns, log.targets[name], hidden=hidden, steps=adam_steps, seed=seed)
                fits[f"{name}, by Adam, {kind}"] = f
        for name, f in fits.items():
            scores[name].append(float(np.corrcoef(centred(f), truth)[0, 1]) if np.ptp(f) else 0.0)  # the split critic may find nothing
    return scores


def centred(x: Doubles) -> Doubles:
    """(pairs, ...) less the mean of each page."""
    pages = x.reshape(-1, PAIRS_PER_PAGE, *x.shape[1:])
    return np.reshape(pages - pages.mean(1, keepdims=True), x.shape)


def report(scores: Sequence[dict[str, list[float]]]) -> Table:
    """Of one `measure` per world: the mean over worlds, smallest and largest."""
    rows = []
    for name in scores[0]:
        by_inputs = np.array([of[name] for of in scores]).T  # (inputs, worlds)
        cells = [f"{x.mean():.2f} ({x.min():.2f} to {x.max():.2f})" for x in by_inputs]
        rows.append((name, *cells, *["-"] * (len(COLUMNS) - len(cells))))
    return Table("Correlation of f with the true effect, within pages", "none, it is a diagnosis", ("target", *COLUMNS), rows)


def main() -> None:
    """Write benchmarks/results/credit.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", default="0,3,1,2,4", help="world seeds, comma-separated")
    parser.add_argument("--lists", type=int, default=NUM_STEPS, help="of each world's log")
    parser.add_argument("--seed", type=int, default=0, help="of traffic, noise and parameters")
    parser.add_argument("--adam-steps", type=int, default=6_000, help="0 leaves these fits out")
    parser.add_argument("--machine", default="2 cores x86_64, shared")
    parser.add_argument("--out", type=Path, default=RESULTS / "credit.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    code, worlds, scores = commit(), [int(world) for world in options.worlds.split(",")], list[dict[str, list[float]]]()
    for world in worlds:
        log = make(configure("enhancedrl", world), lists=options.lists, seed=options.seed, sessions=SESSIONS, reward_steps=REWARD_STEPS)
        scores.append(measure(log, adam_steps=options.adam_steps, seed=options.seed))
        head = (
            f"Commit {code}, {datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {options.machine}. {options.lists:,} lists around control, "
            f"seed {options.seed}, {SESSIONS} other sessions judge: mean of worlds {worlds[: len(scores)]}, smallest and largest. Made by "
            f"`{shlex.join(['python', '-m', 'benchmarks.credit', *sys.argv[1:]])}`."
        )
        text = ["# What a log tells of long-term effects", head, " ".join(str(__doc__).split("\n\n")[2].split()), report(scores).markdown()]
        options.out.write_text("\n\n".join(text) + "\n")  # an early end leaves whole worlds


if __name__ == "__main__":
    main()
