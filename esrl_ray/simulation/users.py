"""Users with a known truth who get lists, watch, click, like, comment, dislike, and leave.

The world is that of our experiments: taste (8 latent dimensions), quality that pleases, bait that is clicked and regretted, fatigue of
categories, and satisfaction that decides whether the user stays. What the user leaves for is not what a click predicts, so a fusion that
looks at the whole session wins over one that does not. Every draw is keyed by (seed, session, page, item, purpose): see `draws`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from esrl_ray.config import Config
from esrl_ray.errors import ConfigError
from esrl_ray.simulation.draws import Doubles, coarse_normals, key, normal, normal_from, uniform
from esrl_ray.simulation.upstream import SCORES, SHRINK, Upstream
from esrl_ray.vocabulary import Floats

Indices = npt.NDArray[np.int64]

USER_FEATURES = ("act", "pat", "nov", "soc", "ema_click", "ema_watch", "ema_valid", "ema_skip", "ema_bait", "ema_social")
CONTEXT_FEATURES = ("step", "first")
ITEM_FEATURES = ("duration", "age", "pop", "quality_proxy", "bait_proxy", "fatigue")
BEHAVIOURS = ("click", "watch_s", "like", "comment", "forward", "dislike")
NUM_CATEGORIES, LATENT, POOL = 12, 8, 200
POOL_FROM, EMA, VALID_S, WATCH_CAP_S = 1500, 0.7, 10.0, 240.0
WATCH_SD, SKIM_S = 0.8, 2.0
"""Of log-watch; and the median of the seconds that are watched without a click."""
_POOL, _CANDIDATE, _SCORE, _EXAMINE, _CLICK, _WATCH, _SKIP, _LIKE, _COMMENT, _FORWARD, _DISLIKE, _LEAVE, _MOOD = range(13)
_OUTCOMES = np.arange(_EXAMINE, _DISLIKE + 1)


def sigmoid(x: Doubles) -> Doubles:
    """1 / (1 + exp(-x))."""
    return 1 / (1 + np.exp(-x))


def _mood(fatigue: Doubles, satisfaction: Doubles) -> Doubles:
    """What the logits of click and valid move by as the session goes on."""
    return 0.25 * satisfaction - 0.6 * fatigue


@dataclass
class Sessions:
    """State of n running sessions; rows can be taken and put back."""

    ids: Indices  # (n,) keys of the draws
    users: Indices  # (n,)
    page: Indices  # (n,) pages seen
    satisfaction: Doubles  # (n,) s
    fatigue: Doubles  # (n, 12) exposure of each category
    emas: Doubles  # (n, 6) of click, watch, valid, skip, bait proxy, likes + comments

    def take(self, rows: npt.NDArray[np.int64] | slice) -> Sessions:
        """These sessions, as copies."""
        return Sessions(*(np.copy(getattr(self, name)[rows]) for name in self.__dataclass_fields__))

    def extend(self, more: Sessions) -> Sessions:
        """These sessions and more of them."""
        return Sessions(*(np.concatenate([getattr(self, name), getattr(more, name)]) for name in self.__dataclass_fields__))

    def put(self, rows: npt.NDArray[np.int64], part: Sessions) -> None:
        """Write these sessions back."""
        for name in self.__dataclass_fields__:
            getattr(self, name)[rows] = getattr(part, name)


@dataclass(frozen=True, slots=True)
class Page:
    """What n sessions ask to have ranked."""

    items: Indices  # (n, N)
    user_features: Floats  # (n, 10)
    context_features: Floats  # (n, 2)
    item_features: Floats  # (n, N, 6)
    scores: Floats  # (n, N, 5)

    def states(self) -> Floats:
        """(n, N, F): user | item | context, as the spec orders them."""
        n, num = self.items.shape
        user = np.broadcast_to(self.user_features[:, None], (n, num, len(USER_FEATURES)))
        context = np.broadcast_to(self.context_features[:, None], (n, num, len(CONTEXT_FEATURES)))
        return np.concatenate([user, self.item_features, context], -1)


@dataclass(frozen=True, slots=True)
class Truth:
    """What (n, K) pairs would bring, if the user looked at them."""

    click: Doubles  # probability, as all but two
    log_watch: Doubles  # mean of the log of the seconds watched after a click
    like: Doubles
    comment: Doubles
    forward: Doubles
    dislike: Doubles
    gain: Doubles  # g, the effect on satisfaction: s <- .85 s + .3 mean g


class World:
    """Users, items, and what happens between them.

    Args:
        config: Sizes and the seed of the world; its spec and behaviours must be the simulator's.
        seed: Of the sessions' draws.

    Raises:
        ConfigError: the configuration names other features, scores or behaviours.
    """

    def __init__(self, config: Config, *, seed: int) -> None:
        _check(config)
        self._seed, self._num_candidates = seed, config.simulation.num_candidates
        rng = np.random.default_rng(config.simulation.world_seed)
        u, m = config.simulation.num_users, config.simulation.num_items
        self.num_users = u
        self._u, self._v = rng.standard_normal((u, LATENT)), rng.standard_normal((m, LATENT))
        self._profile = rng.standard_normal((u, 4))  # act, pat, nov, soc
        self._item = rng.standard_normal((m, 5))  # d, age, pop, q, b
        self._quality_proxy = self._item[:, 3] + 0.8 * rng.standard_normal(m)
        self._bait_proxy = self._item[:, 4] + 0.5 * rng.standard_normal(m)
        self._category = rng.integers(0, NUM_CATEGORIES, m)
        self._pools = self._draw_pools(rng)
        self._upstream = Upstream(rng)
        self._calibrate(rng)
        self._features = np.column_stack([self._item[:, :3], self._quality_proxy, self._bait_proxy]).astype(np.float32)  # (M, 5)
        self._means, self._deviations = self._fixed_scores()

    def _draw_pools(self, rng: np.random.Generator) -> Indices:
        """(U, 200) items that a user's candidates come from: the recommender's retrieval, which is not blind."""
        pools = np.empty((len(self._u), POOL), np.int64)
        for user in range(len(self._u)):
            liking = (
                self._v @ self._u[user] / np.sqrt(LATENT)
                + 0.3 * self._item[:, 3]
                + 0.3 * self._item[:, 4]
                + rng.standard_normal(len(self._v))
            )
            top = np.argpartition(-liking, min(POOL_FROM, len(liking) - 1))[:POOL_FROM]
            pools[user] = rng.choice(top, POOL, replace=len(top) < POOL)
        return pools

    def _calibrate(self, rng: np.random.Generator) -> None:
        users = rng.integers(0, len(self._u), 20_000)
        items = self._pools[users, rng.integers(0, POOL, 20_000)]
        nothing = np.zeros((len(users), 1))
        truth = self._truth(self._pref(users[:, None], items[:, None]), users[:, None], items[:, None], nothing, nothing)
        self._upstream.calibrate(truth, self._item[items][:, None], self._user_terms(users[:, None]), rng.standard_normal(truth.shape))

    def _fixed_scores(self) -> tuple[Floats, Floats]:
        """What of a pool's upstream scores never changes: their means at fatigue and satisfaction 0, their deviations, (U 200, 5) each."""
        nothing, means, deviations = np.zeros((1, 1)), [], []
        for users in np.array_split(np.arange(len(self._u))[:, None], 1 + len(self._u) // 1000):
            items, terms = self._pools[users[:, 0]], self._user_terms(users)
            truth = self._truth(self._pref(users, items), users, items, nothing, nothing)
            means.append(self._upstream.means(truth, self._item[items], terms).reshape(-1, len(SCORES)).astype(np.float32))
            deviations.append(self._upstream.deviations(self._item[items], terms).reshape(-1, len(SCORES)).astype(np.float32))
        return np.concatenate(means), np.concatenate(deviations)

    def _user_terms(self, users: Indices) -> Doubles:
        return np.concatenate([np.ones((*users.shape, 1)), self._profile[users][..., :3]], -1)

    def _pref(self, users: Indices, items: Indices) -> Doubles:
        z = (self._v[items] @ self._u[users[:, 0]][..., None])[..., 0] / np.sqrt(LATENT)
        d, age, q = self._item[items][..., 0], self._item[items][..., 1], self._item[items][..., 3]
        profile = self._profile[users]
        pref: Doubles = 0.9 * z + 0.5 * q + 0.35 * profile[..., 1] * d - 0.25 * profile[..., 2] * age
        return pref

    def _truth(self, pref: Doubles, users: Indices, items: Indices, fatigue: Doubles, satisfaction: Doubles) -> Doubles:
        """(n, K, 5) true click, valid, log-watch, like, comment on the logit (log seconds) scale."""
        item, profile = self._item[items], self._profile[users]
        d, b = item[..., 0], item[..., 4]
        click = -1.85 + 0.9 * pref + 0.6 * b + 0.25 * profile[..., 0] + _mood(fatigue, satisfaction)
        log_watch = 2.7 + 0.35 * d + 0.3 * pref + 0.15 * b
        valid = click + (log_watch - np.log(VALID_S)) / 0.8
        like = -5.9 + 0.8 * pref + 0.6 * profile[..., 3] - 0.3 * b
        comment = -4.3 + 0.5 * pref + 0.4 * b + 0.4 * profile[..., 3]
        return np.stack(np.broadcast_arrays(click, valid, log_watch, like, comment), -1)

    def start(self, ids: Indices, users: Indices) -> Sessions:
        """New sessions.

        Args:
            ids: (n,) keys of their draws; different ones for different sessions.
            users: (n,) 0..num_users-1.
        """
        n = len(ids)
        mood = 0.4 * normal(self._seed, ids, 0, 0, _MOOD)
        return Sessions(ids, users, np.zeros(n, np.int64), mood, np.zeros((n, NUM_CATEGORIES)), np.zeros((n, 6)))

    def candidates(self, sessions: Sessions) -> Page:
        """The next request of each session: N candidates of its user's pool with features and upstream scores."""
        ids, page = sessions.ids[:, None], sessions.page[:, None]
        places = self._places(ids, page) + POOL * sessions.users[:, None]  # (n, N) of (user, place in the pool)
        items = self._pools.reshape(-1).take(places)
        fatigue = self._fatigue(sessions, items)
        y = coarse_normals(key(self._seed, ids, page, items, _SCORE), len(SCORES))  # (n, N, 5)
        y *= self._deviations.take(places, axis=0)
        y += self._means.take(places, axis=0)
        moved = SHRINK * _mood(fatigue, sessions.satisfaction[:, None])
        for score in (0, 1):  # column by column: numpy is slow on short last axes
            y[..., score] += moved
        features = np.empty((*items.shape, len(ITEM_FEATURES)), np.float32)
        features[..., :-1], features[..., -1] = self._features.take(items, axis=0), fatigue
        return Page(
            items,
            np.concatenate([self._profile[sessions.users], sessions.emas], -1).astype(np.float32),
            np.stack([np.minimum(sessions.page, 50) / 10, sessions.page == 0], -1).astype(np.float32),
            features,
            self._upstream.scores(y),
        )

    def _places(self, ids: Indices, page: Indices) -> Indices:
        """(n, N) places 0..199 in the pool, ascending: those with the smallest draws of 24 bits, which carry their place in 8 bits more."""
        draws = key(self._seed, ids, page, np.arange(POOL // 2)[None], _CANDIDATE).astype("<u8", copy=False).view("<u4")  # (n, 200)
        draws = (draws & np.uint32(0xFFFFFF00)) | np.arange(POOL, dtype=np.uint32)
        count = min(self._num_candidates, POOL)
        largest = np.partition(draws, count - 1, axis=1)[:, count - 1 : count]
        return np.flatnonzero(draws <= largest).reshape(len(draws), count) - POOL * np.arange(len(draws))[:, None]

    def _fatigue(self, sessions: Sessions, items: Indices) -> Doubles:
        """(n, K) of the items' categories."""
        at = self._category.take(items) + NUM_CATEGORIES * np.arange(len(items))[:, None]
        return np.ascontiguousarray(sessions.fatigue).reshape(-1).take(at)

    def truth(self, sessions: Sessions, items: Indices) -> Truth:
        """What the next page's pairs of n sessions would bring. Nothing is drawn.

        Args:
            sessions: n of them.
            items: (n, K).
        """
        fatigue, users = self._fatigue(sessions, items), sessions.users[:, None]
        pref, q, b = self._pref(users, items), self._item[items, 3], self._item[items, 4]
        logits = self._truth(pref, users, items, fatigue, sessions.satisfaction[:, None])
        return Truth(
            sigmoid(logits[..., 0]),
            logits[..., 2],
            sigmoid(logits[..., 3]),
            sigmoid(logits[..., 4]),
            sigmoid(-9.2 + 0.8 * pref + 0.5 * q),
            sigmoid(-6.9 + 0.9 * b - 0.6 * pref),
            0.35 * (pref - 1) + 0.3 * q - 0.75 * b - 0.5 * fatigue,
        )

    def respond(self, sessions: Sessions, shown: Indices) -> tuple[Floats, npt.NDArray[np.bool_]]:
        """What users do with the lists they are shown; their sessions move on by one page.

        Args:
            sessions: n of them; changed in place.
            shown: (n, l) items in order.

        Returns:
            (n, l, 6) behaviours in the order of `BEHAVIOURS`, (n,) whether the user leaves after this page.
        """
        ids, page = sessions.ids[:, None], sessions.page[:, None]
        truth = self.truth(sessions, shown)
        chances = np.moveaxis(uniform(self._seed, ids[..., None], page[..., None], shown[..., None], _OUTCOMES), -1, 0)
        look, tap, longer, glance, liking, saying, passing, disliking = chances  # (n, l) each
        examined = look < 1 - 0.06 * np.arange(shown.shape[1])
        click = examined & (tap < truth.click)
        watch = np.exp(truth.log_watch + WATCH_SD * normal_from(longer))
        skim = SKIM_S * np.exp(WATCH_SD * normal_from(glance))
        watch = np.minimum(np.where(click, watch, np.where(examined, skim, 0.0)), WATCH_CAP_S)
        like = examined & (liking < truth.like)
        comment = examined & (saying < truth.comment)
        forward = examined & (passing < truth.forward)
        dislike = examined & (disliking < truth.dislike)
        sessions.satisfaction = np.clip(0.85 * sessions.satisfaction + 0.3 * truth.gain.mean(1), -3, 3)
        at = self._category[shown] + NUM_CATEGORIES * np.arange(len(shown))[:, None]
        exposed = np.bincount(at.ravel(), minlength=sessions.fatigue.size).reshape(sessions.fatigue.shape)
        sessions.fatigue = EMA * sessions.fatigue + (1 - EMA) * exposed
        valid = watch > VALID_S
        seen = np.stack([click, np.log1p(watch) / 3, valid, watch < 3, self._bait_proxy[shown], like | comment], -1).mean(1)
        sessions.emas = EMA * sessions.emas + (1 - EMA) * seen
        sessions.page = sessions.page + 1
        left = uniform(self._seed, sessions.ids, sessions.page, 0, _LEAVE) < sigmoid(-2.75 - 0.45 * sessions.satisfaction)
        behaviours = np.stack([click, watch, like, comment, forward, dislike], -1)
        return behaviours.astype(np.float32), left


def _check(config: Config) -> None:
    found = {
        "spec.user_features": (config.spec.user_features, USER_FEATURES),
        "spec.item_features": (config.spec.item_features, ITEM_FEATURES),
        "spec.context_features": (config.spec.context_features, CONTEXT_FEATURES),
        "spec.scores": (config.spec.scores, SCORES),
        "reward.behaviours": (tuple(b.name for b in config.reward.behaviours), BEHAVIOURS),
    }
    for where, (got, expected) in found.items():
        if got != expected:
            raise ConfigError(
                f"the simulator needs {list(expected)}, found {list(got)}", where, "use configs/demo.yaml for simulated input"
            )
