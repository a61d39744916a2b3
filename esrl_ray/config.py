"""One schema for one deployment: frozen, a section per noun, every impossible combination refused at load with its arithmetic."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, Field, SecretStr, ValidationError, model_validator

from esrl_ray.errors import ConfigError
from esrl_ray.reward import RewardConfig
from esrl_ray.secret import ENVIRONMENT, Key, Keys, add_secrets
from esrl_ray.section import Section
from esrl_ray.spec import CategoricalFeature, Spec

Positive = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(ge=0.0)]


def _off(value: Any) -> Any:
    """YAML reads an unquoted `off` as false."""
    return "off" if value is False else value


class RunConfig(Section):
    """Where the run keeps what must survive it."""

    dir: str = Field("runs/demo", description="Folder of the step log, policies, checkpoints and spools; `~` is expanded.")

    @property
    def path(self) -> Path:
        """The folder as an absolute path."""
        return Path(self.dir).expanduser().resolve()


class CategoricalConfig(Section):
    """One categorical feature."""

    name: str = Field(description="Name, as in requests.")
    cardinality: int = Field(gt=0, le=1_000_000, description="Number of codes; codes are 0..cardinality-1.")
    side: Literal["user", "item", "context"] = Field(description="Which part of the request carries it.")


class SpecConfig(Section):
    """What the enhanced state s, the upstream scores and the action a consist of (symbols F, C, k, A)."""

    user_features: tuple[str, ...] = Field((), description="Numeric user features, in order.")
    item_features: tuple[str, ...] = Field((), description="Numeric features of a candidate, in order.")
    context_features: tuple[str, ...] = Field((), description="Numeric features of the request, in order.")
    categorical_features: tuple[CategoricalConfig, ...] = Field((), description="Categorical features, in order.")
    scores: tuple[str, ...] = Field(("click", "watch"), min_length=1, description="Upstream scores of a candidate, in order (k).")
    power_base: tuple[float, ...] = Field((1.0, 1.0), description="power_i at a = 0, one per score: the hand-made control policy.")
    power_span: float = Field(1.2, gt=0, description="power_i = power_base_i + power_span * a_i.")
    bias_base: float = Field(0.55, description="bias_i at a = 0.")
    bias_span: float = Field(0.5, ge=0, description="bias_i = bias_base + bias_span * a_{k+i}.")

    @model_validator(mode="after")
    def _widths(self) -> Self:
        if len(self.power_base) != len(self.scores):
            raise ValueError(f"power_base has {len(self.power_base)} values for {len(self.scores)} scores")
        if self.bias_base - self.bias_span < 0:
            raise ValueError(
                f"bias_base {self.bias_base} - bias_span {self.bias_span} < 0: a score + bias could be negative and has no power"
            )
        names = [*self.user_features, *self.item_features, *self.context_features, *(c.name for c in self.categorical_features)]
        if twice := {n for n in names if names.count(n) > 1}:
            raise ValueError(f"feature names must differ, used twice: {sorted(twice)}")
        return self

    def build(self) -> Spec:
        """The immutable spec that records, policies and the learner carry."""
        return Spec(
            user_features=self.user_features,
            item_features=self.item_features,
            context_features=self.context_features,
            categorical_features=tuple(CategoricalFeature(c.name, c.cardinality, c.side) for c in self.categorical_features),
            scores=self.scores,
            power_base=self.power_base,
            power_span=self.power_span,
            bias_base=self.bias_base,
            bias_span=self.bias_span,
        )


class KafkaConfig(Section):
    """The broker and the two topics, both keyed by session id and with the same number of partitions."""

    bootstrap_servers: str | None = Field(None, description="host:port,...; none: the demo starts its own embedded broker.")
    decisions_topic: str = Field("decisions", description="Topic of `Decision` events.")
    feedback_topic: str = Field("feedback", description="Topic of `Feedback` events.")
    num_partitions: Positive = Field(4, description="Partitions of both topics; created or checked at start.")
    replication_factor: Positive = Field(1, description="Used only when a topic is created.")
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        "PLAINTEXT", description="Kafka's setting of that name."
    )
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] | None = Field(None, description="Kafka's setting of that name.")
    sasl_username: str | None = Field(None, description="Kafka's setting of that name.")
    sasl_password: SecretStr | None = Field(None, description="Secret, from ESRL_KAFKA_PASSWORD.")
    ssl_cafile: str | None = Field(None, description="PEM file with whom to trust as the broker's authority; none: the system's.")
    ssl_certfile: str | None = Field(None, description="PEM file with our certificate, for a broker that asks for one (mTLS).")
    ssl_keyfile: str | None = Field(None, description="PEM file with its private key; none: it is in ssl_certfile.")
    ssl_key_password: SecretStr | None = Field(
        None, description="Secret that the private key is locked with, from ESRL_KAFKA_KEY_PASSWORD."
    )
    ssl_check_hostname: bool = Field(True, description="The broker's certificate must be for the name that we connect to.")
    max_dead_letter_share: float = Field(
        0.2, gt=0, le=1, description="Share of 1,000 records (an import: 100 rows) above which it stops; 20 refused ones never stop it."
    )
    on_gap: Literal["stop", "skip"] = Field(
        "stop", description="When retention deleted records that were not read: stop with an error, or go on and count them as skipped."
    )
    late_topics: bool = Field(False, description="Events counted late are written to `<topic>.late`, before that commit.")

    @model_validator(mode="after")
    def _protocol(self) -> Self:
        logs_in, encrypts = self.security_protocol.startswith("SASL"), self.security_protocol.endswith("SSL")
        for needed, names in ((logs_in, ("sasl_mechanism", "sasl_username")), (encrypts, ("ssl_cafile", "ssl_certfile", "ssl_keyfile"))):
            if not needed and (given := [name for name in names if getattr(self, name) is not None]):
                what = "does not encrypt: SSL or SASL_SSL do" if names[0] == "ssl_cafile" else "logs nobody in: SASL_SSL does"
                raise ValueError(f"{given[0]} is set, but security_protocol {self.security_protocol} {what}")
        if logs_in and (missing := [name for name in ("sasl_mechanism", "sasl_username") if getattr(self, name) is None]):
            raise ValueError(f"security_protocol {self.security_protocol} needs {' and '.join(missing)}")
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise ValueError("ssl_keyfile is set without ssl_certfile")
        return self


class JoinConfig(Section):
    """Event time of the session join. All times are in event time unless they say clock."""

    label_age_s: Seconds = Field(4.0, description="A step closes when the watermark is this far past its decision.")
    lateness_s: Seconds = Field(5.0, description="The watermark follows the newest timestamp of the slower topic at this distance.")
    gap_s: Annotated[float, Field(gt=0)] | None = Field(
        15.0, description="Inactivity that ends a session (terminated); null: sessions end by `leave` only."
    )
    amend_s: Seconds = Field(
        30.0, description="Late feedback amends a closed step for this long while its session is open; later it is counted late."
    )
    dedup_s: Annotated[float, Field(gt=0)] = Field(120.0, description="Event ids are remembered this long; an older event is counted late.")
    max_ahead_s: Annotated[float, Field(gt=0)] = Field(300.0, description="A timestamp further ahead of the clock is a dead letter.")
    require_shown: bool = Field(
        True,
        description="`shown` feedback sets the mask; a decision never shown is counted and dropped. Off: positions >= 0 are shown.",
    )
    max_open_sessions: Positive = Field(50_000, description="Per partition; above it the oldest session is truncated.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.gap_s is not None and self.gap_s < self.label_age_s:
            raise ValueError(f"gap_s {self.gap_s} < label_age_s {self.label_age_s}: sessions would end before their steps close")
        if self.dedup_s < self.lateness_s + self.label_age_s:
            raise ValueError(
                f"dedup_s {self.dedup_s} < lateness_s {self.lateness_s} + label_age_s {self.label_age_s}: duplicates could count twice"
            )
        return self


class IngestConfig(Section):
    """The streaming workers."""

    num_workers: Positive = Field(1, description="Ingest worker actors; partition p belongs to worker p % num_workers.")
    commit_interval_s: Annotated[float, Field(gt=0)] = Field(2.0, description="Clock time between commits of a worker.")
    max_poll_records: Positive = Field(4000, description="Records per poll.")
    max_commit_mb: Annotated[float, Field(gt=0)] = Field(
        128.0, description="Rows of a commit, in memory; more wait for the next. After a pause very many lists are due at once."
    )


class LogConfig(Section):
    """The step log, and its care by the worker that owns each table, between two commits."""

    root: str | None = Field(
        None, description="Folder or URI (`s3://bucket/path`) of the step logs; none: `log` in run.dir. Credentials: the store's variables."
    )
    tidy_every: Positive = Field(100, description="Commits between two rounds of care: merge small files, checkpoint, clean up.")
    keep_hours: int = Field(6, ge=0, description="Files that were merged stay this long for readers.")
    history_minutes: int = Field(
        10, ge=0, description="`esrl log show` lists commits this far back, and a little more; each entry slows commits and restarts."
    )
    retention_days: Positive | None = Field(
        None, description="Whole days of commits older than this are dropped; null keeps all. Replay refills from what is kept."
    )


class ReplayConfig(Section):
    """The replay buffer D, a view of the step log."""

    num_shards: Positive = Field(1, description="Replay shard actors; partition p is in shard p % num_shards.")
    capacity: Positive = Field(200_000, description="Steps per shard; the oldest are dropped.")
    min_size: Positive = Field(1_000, description="Steps that can be sampled before sampling starts.")
    samples_per_insert: Annotated[float, Field(gt=0)] = Field(
        12.8, description="Sampled transitions per new step, at most; bounds sampling, never insertion."
    )
    sample_without_next: bool = Field(
        False, description="Sample every step, also truncated and open ones, which have no next list; needs learner.gamma 0."
    )

    @model_validator(mode="after")
    def _can_start(self) -> Self:
        if self.min_size > self.capacity:
            raise ValueError(f"min_size {self.min_size} exceeds capacity {self.capacity}: sampling would never start")
        return self


class LearnerConfig(Section):
    """EnhancedRL's losses and optimisers (paper symbols in brackets)."""

    gamma: float = Field(0.98, ge=0, lt=1, description="Discount [gamma].")
    critics_per_group: Positive = Field(3, description="Critics in each reward group [m].")
    hidden_sizes: tuple[Positive, ...] = Field((64, 64), min_length=1, description="Widths of actor and critics.")
    embedding_size: Positive = Field(8, description="Width of a categorical feature's embedding.")
    critic: Literal["list_sum", "per_pair", "split"] = Field(
        "split", description="Reward and long-term value apart, TD on the sum over the list (the paper), or per pair (ablation)."
    )
    long_term_weight: float = Field(
        1.0, ge=0, description="Weight of long-term value beside reward in the actor's advantages; critic split."
    )
    effect_gamma: float = Field(
        0.85,
        ge=0,
        lt=1,
        description="Discount of the lists ahead that tell which pairs keep users, about as fast as that effect fades; critic split.",
    )
    score_changes: bool = Field(
        True, description="Long-term value is learnt also from how upstream scores change between requests; critic split, horizon above 1."
    )
    horizon: Positive = Field(10, description="Next lists of the session that are looked at; critic split [H].")
    level: Literal["pair", "request"] = Field(
        "pair", description="One action per pair (EnhancedRL), or one per request from user and context alone (UnifiedRL)."
    )
    actor: Literal["mlp", "ple"] = Field("mlp", description="Shape of the actor: layers, or experts and a tower for each score.")
    actor_loss: Literal["listwise", "printed"] = Field(
        "listwise", description="`printed` is Eq. (4); `listwise` is our default (docs/paper.md)."
    )
    temperature: float = Field(
        0.2, gt=0, description="Softmax temperature of the listwise actor loss; other critics than split were measured with 0.3."
    )
    std_penalty: float = Field(0.2, ge=0, description="Weight of the critics' disagreement [lambda].")
    bound_penalty: float = Field(0.1, ge=0, description="Weight of the bound penalty [eta].")
    penalty_scale: float = Field(0.3, gt=0, description="Steepness of penalty and phi outside the bounds [beta].")
    continuous_penalty: bool = Field(False, description="Subtract 1 outside, so that the penalty does not jump at the bound.")
    phi: bool = Field(False, description="Discount next values of actions outside the bounds [phi]; fragile, watch the critic loss.")
    critic_lr: float = Field(1e-3, gt=0, description="Adam step of the critics.")
    actor_lr: float = Field(1e-3, gt=0, description="Adam step of the actor.")
    grad_clip: float = Field(1.0, gt=0, description="Largest gradient norm of actor and of critics.")
    soft_update: float = Field(0.08, gt=0, le=1, description="Polyak step of the targets [tau].")
    soft_update_every: Positive = Field(
        15, description="Gradient steps between soft updates; with critic split, between two fits of long-term value."
    )
    group_weights: tuple[float, ...] | None = Field(None, description="Weights w_i of the reward groups in the actor loss; default 1 each.")
    batch_size: Positive = Field(128, description="Steps in a batch [B].")
    updates_per_call: Positive = Field(8, description="Gradient steps per learner call.")
    num_learners: int = Field(0, ge=0, description="RLlib learners; 0 = in the training process.")
    device: str = Field(
        "auto",
        pattern="^(auto|cpu|cuda(:[0-9]+)?|meta)$",
        description="`auto` takes a GPU when there is one; else cpu, cuda, cuda:1, ...; meta computes nothing and shows what would wait.",
    )
    compile: bool = Field(False, description="torch.compile of the losses, on a GPU in CUDA graphs: half a minute at the start, needs g++.")
    seed: int = Field(0, ge=0, description="Seed of parameters and sampling.")
    checkpoint_interval_s: Annotated[float, Field(gt=0)] = Field(20.0, description="Clock time between checkpoints.")

    @property
    def num_future(self) -> int:
        """Next lists of the session that a sampled transition carries [H]."""
        return self.horizon if self.critic == "split" else 0

    @model_validator(mode="after")
    def _levels(self) -> Self:
        if self.level == "request" and self.actor_loss == "listwise":
            raise ValueError("level request needs actor_loss printed: one action for a whole list has no pairs to weigh against each other")
        if self.critic == "split" and self.actor_loss == "printed":
            raise ValueError("critic split needs actor_loss listwise: its critics do not see actions, so the printed loss has no gradient")
        return self


class ExplorationConfig(Section):
    """Bounded exploration, arms and rounds [mu_bp, lower, upper]."""

    low: float = Field(-0.3, lt=0, description="Lower bound around the anchor's action.")
    high: float = Field(0.3, gt=0, description="Upper bound around the anchor's action.")
    scope: Literal["pair", "request"] = Field("pair", description="One noise draw per pair or per request.")
    round_steps: Positive = Field(5_000, description="Inserted steps per round of progressive training.")
    warmup_steps: Positive = Field(2_000, description="Steps that the first normaliser is fitted on; control serves until then.")
    explore_share: float = Field(0.5, ge=0, le=1, description="Share of users in the arm `explore`.")
    exploit_share: float = Field(0.3, ge=0, le=1, description="Share of users in the arm `exploit`; the rest is `control`.")
    arm_salt: str = Field("esrl", description="Salt of the users' arms; never change it in a running deployment.")

    @model_validator(mode="after")
    def _shares(self) -> Self:
        if (total := self.explore_share + self.exploit_share) > 1 + 1e-9:
            raise ValueError(f"explore_share {self.explore_share} + exploit_share {self.exploit_share} = {total:.3f} > 1")
        return self


class PolicyConfig(Section):
    """The policy store and its gate."""

    publish_interval_s: Annotated[float, Field(gt=0)] = Field(3.0, description="Clock time between published policies.")
    max_outside_share: float = Field(0.5, gt=0, le=1, description="Gate: largest share of actions outside the bounds.")
    max_drift: float = Field(2.0, gt=0, description="Gate: largest mean |action change| against the anchor, in widths of the bounds.")
    second_tier: Annotated[Literal["off", "block", "require"], BeforeValidator(_off)] = Field(
        "off", description="Which policies may become the anchor: those not shown to be worse than it (block), shown to be better, all."
    )
    held_out_share: float = Field(0.0, ge=0, lt=1, description="Share of explore users that learning leaves out, for the second tier.")


class ServeConfig(Section):
    """The endpoint."""

    host: str = Field("127.0.0.1", description="Address of the HTTP endpoint.")
    port: int = Field(0, ge=0, le=65535, description="0 takes a free one.")
    num_replicas: Positive = Field(2, description="Serve replicas.")
    list_size: Positive = Field(5, description="Shown pairs when the request does not say [l].")
    num_unshown: int = Field(10, ge=0, description="Unshown candidates drawn at random into the decision [K]; estimates need some.")
    max_candidates: Positive = Field(500, description="Larger requests are refused.")
    bearer_token: SecretStr | None = Field(None, description="Secret, needed for /v1 when set; from ESRL_BEARER_TOKEN.")
    decision_keys: Keys = Field(
        (), description="Secrets, from ESRL_DECISION_KEYS: the first signs decision_ids, ingestion accepts those signed with any of them."
    )
    user_key: Key | None = Field(
        None,
        description="Secret, from ESRL_USER_KEY: user ids are logged as keyed hashes. It changes who is in which arm; never change it.",
    )


class SimulationConfig(Section):
    """The simulated input."""

    world_seed: int = Field(3, description="Seed of users, items and the upstream model.")
    num_users: Positive = Field(1000, description="Users.")
    num_items: Positive = Field(8000, description="Items.")
    num_candidates: Positive = Field(50, description="Candidates per request [N].")
    frozen_sessions: Positive = Field(2_000, description="Sessions per policy in the frozen evaluation.")
    frozen_policies: Positive = Field(8, description="Policies in the frozen evaluation, at most.")


class DemoConfig(Section):
    """The traffic of `esrl demo`."""

    seconds: Annotated[float, Field(gt=0)] = Field(300.0, description="Length, from the first served decision.")
    requests_per_s: Annotated[float, Field(gt=0)] = Field(120.0, description="List requests per second, at most.")
    think_time_s: tuple[float, float] = Field((1.0, 3.0), description="Time a user spends on a page, uniform.")
    feedback_delay_s: Seconds = Field(2.0, description="Feedback is sent up to this much later, uniform.")
    late_share: float = Field(0.01, ge=0, le=1, description="Share of feedback that is sent `late_s` later.")
    late_s: Seconds = Field(20.0, description="Delay of late feedback.")
    duplicate_share: float = Field(0.01, ge=0, le=1, description="Share of feedback sent twice.")
    vanish_share: float = Field(0.05, ge=0, le=1, description="Share of sessions that end without `leave`.")
    seed: int = Field(0, ge=0, description="Seed of the traffic.")


class Config(Section):
    """One deployment of esrl-ray."""

    run: RunConfig = RunConfig()
    spec: SpecConfig = SpecConfig()
    reward: RewardConfig = RewardConfig()
    kafka: KafkaConfig = KafkaConfig()
    join: JoinConfig = JoinConfig()
    ingest: IngestConfig = IngestConfig()
    log: LogConfig = LogConfig()
    replay: ReplayConfig = ReplayConfig()
    learner: LearnerConfig = LearnerConfig()
    exploration: ExplorationConfig = ExplorationConfig()
    policy: PolicyConfig = PolicyConfig()
    serve: ServeConfig = ServeConfig()
    simulation: SimulationConfig = SimulationConfig()
    demo: DemoConfig = DemoConfig()

    @model_validator(mode="after")
    def _possible(self) -> Self:
        learner, replay = self.learner, self.replay
        rows = learner.batch_size * learner.updates_per_call * max(1, learner.num_learners)
        if (budget := replay.capacity * replay.num_shards * replay.samples_per_insert) < rows:
            raise ValueError(
                f"one learner call draws {learner.batch_size} x {learner.updates_per_call} x {max(1, learner.num_learners)} = {rows} "
                f"transitions, but replay.samples_per_insert {replay.samples_per_insert} over capacity {replay.capacity} allows "
                f"{budget:.0f}: learning would never start"
            )
        if replay.sample_without_next and learner.gamma > 0:
            raise ValueError(f"replay.sample_without_next needs learner.gamma 0, it is {learner.gamma}: nothing to bootstrap from")
        if self.max_pairs == 1 and learner.actor_loss == "listwise":
            raise ValueError(
                f"serve.list_size {self.serve.list_size} + num_unshown {self.serve.num_unshown} = 1 pair a list, which learner.actor_loss "
                "listwise has nothing to weigh against: its gradient is 0; raise num_unshown, or set critic list_sum, actor_loss printed"
            )
        if self.ingest.num_workers > self.kafka.num_partitions:
            raise ValueError(
                f"ingest.num_workers {self.ingest.num_workers} > kafka.num_partitions {self.kafka.num_partitions}: "
                "some would have nothing to read"
            )
        if replay.num_shards > self.kafka.num_partitions:
            raise ValueError(
                f"replay.num_shards {replay.num_shards} > kafka.num_partitions {self.kafka.num_partitions}: "
                "a shard without a partition stays empty"
            )
        if learner.group_weights is not None and len(learner.group_weights) != self.reward.num_groups:
            raise ValueError(f"learner.group_weights has {len(learner.group_weights)} values for {self.reward.num_groups} reward groups")
        if self.policy.second_tier != "off" and not (self.exploration.explore_share and self.serve.num_unshown):
            needs = f"exploration.explore_share {self.exploration.explore_share} and serve.num_unshown {self.serve.num_unshown} above 0"
            raise ValueError(f"policy.second_tier {self.policy.second_tier} needs {needs}: the log could not tell policies apart")
        aside = self.exploration.explore_share * self.policy.held_out_share
        if (left := replay.capacity * (1 - aside)) < replay.min_size:
            raise ValueError(f"policy.held_out_share leaves {left:.0f} steps to sample, replay.min_size is {replay.min_size}: never enough")
        if self.serve.list_size > self.serve.max_candidates:
            raise ValueError(f"serve.list_size {self.serve.list_size} > serve.max_candidates {self.serve.max_candidates}")
        if self.exploration.warmup_steps > self.exploration.round_steps:
            raise ValueError(
                f"exploration.warmup_steps {self.exploration.warmup_steps} > round_steps {self.exploration.round_steps}: "
                "round 0 would end before it has a normaliser"
            )
        return self

    @property
    def max_pairs(self) -> int:
        """G = l + K, the largest number of pairs in a step that serving makes by default."""
        return self.serve.list_size + self.serve.num_unshown

    @property
    def max_commit_rows(self) -> int:
        """Lists in a commit: as many as `ingest.max_commit_mb` holds of the arrays of G pairs."""
        spec = self.spec.build()
        floats = spec.num_features + spec.num_categorical + spec.num_scores + 2 * spec.num_actions + len(self.reward.behaviours) + 1
        return max(1, int(self.ingest.max_commit_mb * 1e6 / (4 * floats * self.max_pairs)))

    @property
    def log_root(self) -> str:
        """Folder or URI of the step logs of this deployment's spec."""
        root = str(self.run.path / "log") if self.log.root is None else self.log.root
        if "://" not in root:
            root = str(Path(root).expanduser().resolve())
        return f"{root.rstrip('/')}/{self.spec.build().digest}"

    def shown(self) -> dict[str, Any]:
        """Effective values for people; secrets read `**********`."""
        shown: dict[str, Any] = json.loads(self.model_dump_json())
        return shown

    def without_secrets(self) -> Config:
        """The same, fit to be written down."""
        gone: dict[str, dict[str, Any]] = {}
        for section, name in (key.split(".") for key in ENVIRONMENT.values()):
            gone.setdefault(section, {})[name] = type(getattr(self, section)).model_fields[name].default
        return self.model_copy(update={section: getattr(self, section).model_copy(update=values) for section, values in gone.items()})


def _keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every legal key; those of list items without their index."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        for inner in (field.annotation, *get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, Section):
                keys += _keys(inner, f"{prefix}{name}.")
    return keys


def _nearest(key: str, legal: Sequence[str]) -> str:
    """The legal key that looks most alike, by its whole path or else by its last part."""
    by_name = {k.rsplit(".", 1)[-1]: k for k in reversed(legal)}
    if near := difflib.get_close_matches(key, legal, 1):
        return near[0]
    alike = difflib.get_close_matches(key.rsplit(".", 1)[-1], list(by_name), 1)
    return by_name[alike[0]] if alike else "none"


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for part in path:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"--set {key}: {part!r} is a value, not a section")
    tree[last] = value


def load_config(path: str | Path | None, overrides: Sequence[str] = (), *, environment: Mapping[str, str] | None = None) -> Config:
    """Read one deployment's configuration.

    Args:
        path: YAML file; None means defaults only.
        overrides: `section.key=value` texts, applied in order; values are YAML.
        environment: Variables that may carry secrets (`esrl_ray.secret.ENVIRONMENT`).

    Returns:
        The validated, frozen configuration.

    Raises:
        ConfigError: the file cannot be read, a key is unknown (names the nearest legal one), or values do not go together.
    """
    where = str(path) if path is not None else "defaults"
    tree: Any = {}
    if path is not None:
        try:
            tree = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except OSError as error:
            raise ConfigError(f"cannot read the configuration: {error.strerror}", where, "name an existing file with --config") from error
        except yaml.YAMLError as error:
            raise ConfigError(f"not valid YAML: {error}", where) from error
        if not isinstance(tree, dict):
            raise ConfigError(f"expected sections, found {type(tree).__name__}", where)
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"override {text!r} is not of the form section.key=value", "--set")
        try:
            _set(tree, key.strip(), yaml.safe_load(value))
        except yaml.YAMLError as error:
            raise ConfigError(f"the value of {key.strip()} is not valid YAML", "--set") from error
        where += f" + --set {key.strip()}"
    add_secrets(tree, environment or {})
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        legal = _keys(Config)
        lines = []
        for problem in error.errors(include_url=False, include_input=False):
            key = ".".join(str(part) for part in problem["loc"])
            if problem["type"] == "extra_forbidden":
                near = _nearest(".".join(part for part in problem["loc"] if isinstance(part, str)), legal)
                lines.append(f"unknown key {key!r}; nearest legal key: {near}")
            else:
                lines.append(f"{key or 'configuration'}: {problem['msg'].removeprefix('Value error, ')}")
        raise ConfigError("; ".join(lines), where) from error
