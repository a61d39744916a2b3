"""EnhancedRL on RLlib: the same steps as the core, on local and remote learners; checkpoints; batches by reference."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import torch
from ray import tune
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.rl_module.rl_module import RLModule
from ray.rllib.policy.sample_batch import MultiAgentBatch
from ray.tune.schedulers import ASHAScheduler

from esrl_ray.algo.update import LearnState, prepare, update
from esrl_ray.config import Config, load_config
from esrl_ray.errors import ConfigError, LearnersLost, LoopError
from esrl_ray.learning.algorithm import EnhancedRL, EnhancedRLConfig, learner_results
from esrl_ray.learning.checkpoint import (
    PROGRESS_FILE,
    Progress,
    module_folder,
    restore_checkpoint,
    save_checkpoint,
    set_aside_other_reward,
)
from esrl_ray.learning.feed import BatchFeed, to_multi_agent_batch
from esrl_ray.learning.learner import DOUBLES
from esrl_ray.learning.module import EnhancedRLModule
from esrl_ray.vocabulary import Floats, TransitionBatch
from tests.step_tables import simulated_steps, step_table
from tests.transitions import make_transitions

pytestmark = [
    pytest.mark.usefixtures("local_ray"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),  # Ray's own
]

SET = ["learner.batch_size=16", "learner.updates_per_call=8", "learner.hidden_sizes=[16, 16]", "learner.soft_update_every=5"]
CALLS = 7  # of 8 gradient steps


def deployment(num_learners: int = 0, *more: str) -> Config:
    secrets = {"ESRL_KAFKA_PASSWORD": "hush-hush-kafka", "ESRL_BEARER_TOKEN": "hush-hush-token"}
    return load_config("configs/demo.yaml", [*SET, f"learner.num_learners={num_learners}", *more], environment=secrets)


def transitions(config: Config, call: int) -> TransitionBatch:
    return make_transitions(config, config.learner.batch_size * config.learner.updates_per_call, seed=call)


def call(algorithm: EnhancedRL, config: Config, number: int) -> None:
    """One call of one learner."""
    algorithm.learn({"ingest-0": number}, [ray.put(to_multi_agent_batch(transitions(config, number)))])


def call_apart(algorithm: EnhancedRL, config: Config, number: int) -> None:
    """One learner call; every learner gets a batch of its own."""
    count = max(1, algorithm.config.num_learners)
    refs = [ray.put(to_multi_agent_batch(transitions(config, count * number + i))) for i in range(count)]
    algorithm.learn({"ingest-0": number}, refs)


def parameters(algorithm: EnhancedRL) -> list[dict[str, Floats]]:
    """Everything that each learner's networks hold."""
    return algorithm.each_learner(lambda learner: {k: v.cpu().numpy().copy() for k, v in learner.learn_state.networks.state_dict().items()})


def assert_same(a: dict[str, Floats], b: dict[str, Floats], tolerance: float = 0.0) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert abs(value - b[name]).max(initial=0) <= tolerance, name


@pytest.mark.parametrize("num_learners", [0, 1])  # two: test_two_learners.py
def test_rllib_takes_the_same_gradient_steps_as_the_core(num_learners: int) -> None:
    config = deployment(num_learners)
    state = LearnState.create(config, device="cpu")
    torch.set_num_threads(1)
    algorithm = EnhancedRLConfig().training(deployment=deployment(7)).learners(num_learners=num_learners).build_algo()  # learners() wins
    assert isinstance(algorithm, EnhancedRL) and algorithm.config.num_learners == num_learners
    try:
        for number in range(CALLS):
            for part in prepare(state, transitions(config, number)).split(config.learner.updates_per_call):
                update(state, part)
            call(algorithm, config, number)
        core = {k: v.numpy() for k, v in state.networks.state_dict().items()}
        (networks,) = parameters(algorithm)
        assert_same(core, networks, tolerance=1e-6)
        assert algorithm.published()[2] == state.gradient_steps == CALLS * config.learner.updates_per_call >= 50
    finally:
        algorithm.stop()


def test_a_restored_algorithm_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    config = deployment()
    algorithm = EnhancedRL.of(config)
    try:
        call(algorithm, config, 0)
        before = parameters(algorithm)[0]
        path = save_checkpoint(algorithm, tmp_path, Progress(config.spec.build().digest, config.reward.digest, fitted=True, round=3))
        call(algorithm, config, 1)
        went_on = parameters(algorithm)[0]
        for text in ("hush-hush-kafka", "hush-hush-token"):
            assert not [p for p in path.rglob("*") if p.is_file() and text.encode() in p.read_bytes()]
    finally:
        algorithm.stop()
    other = EnhancedRL.of(deployment(0, "learner.seed=9"))
    try:
        progress = restore_checkpoint(other, tmp_path, config)
        assert progress is not None and progress.round == 3 and progress.fitted
        assert other.lineage == {"ingest-0": 0}
        assert other.published()[2] == 8
        assert_same(parameters(other)[0], before)
        call(other, config, 1)  # the optimisers' moments came along, or this step would differ
        assert_same(parameters(other)[0], went_on, tolerance=1e-6)
    finally:
        other.stop()


@pytest.mark.parametrize("num_learners", [0, 1, 2])
def test_from_checkpoint_goes_on_bit_for_bit_and_replicas_stay_equal(num_learners: int, tmp_path: Path) -> None:
    config = deployment(num_learners)
    algorithm = EnhancedRL.of(config)
    try:
        call_apart(algorithm, config, 0)
        path = algorithm.save_to_path(str(tmp_path / "checkpoint"))
        call_apart(algorithm, config, 1)
        went_on = parameters(algorithm)
    finally:
        algorithm.stop()
    other = Algorithm.from_checkpoint(path)
    assert isinstance(other, EnhancedRL)
    try:
        assert (other.num_calls, other.published()[2], other.lineage) == (1, 8, {"ingest-0": 0})
        call_apart(other, config, 1)
        restored = parameters(other)
    finally:
        other.stop()
    for replica in (*went_on[1:], *restored):
        assert_same(went_on[0], replica)


def test_the_module_of_a_checkpoint_decides_with_the_actor_alone(tmp_path: Path) -> None:
    config = deployment()
    algorithm = EnhancedRL.of(config)
    call(algorithm, config, 0)
    folder = module_folder(save_checkpoint(algorithm, tmp_path, Progress(config.spec.build().digest, config.reward.digest)))
    whole = RLModule.from_checkpoint(str(folder))
    module = RLModule.from_checkpoint(str(folder), inference_only=True)
    assert isinstance(module, EnhancedRLModule) and isinstance(whole, EnhancedRLModule)
    assert {name.split(".")[1] for name in module.state_dict()} == {"actor", "mean", "std"}
    assert {name.split(".")[1] for name in whole.state_dict()} > {"critics", "anchor"}
    t = transitions(config, 9)
    batch = {"states": t["states"], "scores": t["scores"], "categorical": t["categorical"]}
    tensors = {name: torch.from_numpy(np.asarray(column)) for name, column in batch.items()}
    actions = module.forward_inference(tensors)["actions"]
    assert actions.shape == t["actions"].shape and not actions.requires_grad
    assert torch.equal(actions, whole.forward_inference(tensors)["actions"])
    assert torch.equal(actions, algorithm.get_module().forward_inference(tensors)["actions"])
    assert not torch.equal(actions, EnhancedRL.of(config).get_module().forward_inference(tensors)["actions"])
    algorithm.stop()


def test_settings_win_over_the_deployment_in_any_order() -> None:
    config = EnhancedRLConfig().learners(num_learners=1, num_gpus_per_learner=0.5).training(gamma=0.5, critic="per_pair", seed=4)
    config.training(deployment=deployment(2, "learner.gamma=0.8", "learner.actor_lr=0.01"), critics_per_group=3)
    config.validate()
    learner = config.deployment.learner
    assert (learner.gamma, learner.critic, learner.critics_per_group, learner.seed) == (0.5, "per_pair", 3, 4)
    assert (learner.actor_lr, learner.batch_size, learner.num_learners) == (0.01, 16, 1)
    assert (config.num_learners, config.num_gpus_per_learner, config.actor_lr) == (1, 0.5, 0.01)
    assert config.train_batch_size_per_learner == 16 * 8 and config.seed is None
    assert config.deployment.kafka.sasl_password is None and config.deployment.serve.bearer_token is None
    default = EnhancedRLConfig().training(deployment=deployment(2))
    default.validate()
    assert (default.num_learners, default.num_gpus_per_learner) == (2, 0)


def test_one_gpu_may_be_named_in_the_drivers_process_and_not_in_an_actor() -> None:
    config = EnhancedRLConfig().training(deployment=deployment(0, "learner.device=cuda:1"))
    config.copy().validate()
    actor = ray.remote(EnhancedRLConfig).options(num_cpus=0).remote()
    with pytest.raises(ConfigError, match=r"cuda:1 names one GPU.* say cuda; CUDA_VISIBLE_DEVICES"):
        ray.get(actor.training.remote(deployment=config.deployment))
        ray.get(actor.validate.remote())


def test_settings_are_checked_with_the_configurations_own_words() -> None:
    with pytest.raises(ConfigError, match=r"gamma: Input should be less than 1.*EnhancedRLConfig.training"):
        EnhancedRLConfig().training(gamma=1.5)
    with pytest.raises(ConfigError, match="unknown setting 'critic_per_group'; nearest: critics_per_group"):
        EnhancedRLConfig().training(critic_per_group=2)
    with pytest.raises(ConfigError, match="unknown setting 'lr'"):
        EnhancedRLConfig().training(lr=1e-3)
    with pytest.raises(ConfigError, match="level request needs actor_loss printed"):
        EnhancedRLConfig().training(deployment=deployment(), level="request", actor_loss="listwise").validate()
    with pytest.raises(ConfigError, match="learning would never start"):
        EnhancedRLConfig().training(deployment=deployment(), batch_size=1_000_000).validate()


def test_tune_searches_settings_of_the_method_with_a_scheduler(tmp_path: Path) -> None:
    pq.write_table(step_table(simulated_steps(deployment(), 200)), tmp_path / "steps.parquet")
    config = EnhancedRLConfig().training(deployment=deployment(), updates_per_call=2, actor_lr=tune.grid_search([1e-4, 1e-2]))
    config.offline_data(input_=str(tmp_path / "steps.parquet"))
    score = "learners/default_policy/critic_loss"
    tuner = tune.Tuner(
        EnhancedRL,
        param_space=config,
        tune_config=tune.TuneConfig(scheduler=ASHAScheduler(max_t=2, grace_period=1), metric=score, mode="min", max_concurrent_trials=2),
        run_config=tune.RunConfig(name="search", storage_path=str(tmp_path / "tune"), verbose=0),
    )
    results = tuner.fit()
    assert not results.errors and len(results) == 2
    assert sorted(result.config["actor_lr"] for result in results) == [1e-4, 1e-2]
    assert {result.metrics["training_iteration"] for result in results if result.metrics} <= {1, 2}
    assert all(result.metrics and result.metrics["learners"]["default_policy"]["gradient_steps"] >= 8 for result in results)


def test_an_older_state_can_be_set_in_memory() -> None:
    config = deployment()
    algorithm = EnhancedRL.of(config)
    call(algorithm, config, 0)
    state, before = algorithm.get_state(), parameters(algorithm)[0]
    before = {k: v.copy() for k, v in before.items()}
    call(algorithm, config, 1)
    algorithm.set_state(state)
    assert_same(parameters(algorithm)[0], before)
    assert algorithm.published()[2] == 8
    assert algorithm.lineage == {"ingest-0": 0}
    algorithm.stop()


def test_sums_of_a_state_that_lacks_some_of_them_or_has_other_shapes_start_anew() -> None:
    config = deployment()
    algorithm = EnhancedRL.of(config)
    call(algorithm, config, 0)
    state = algorithm.get_state()
    sums = {name for name in parameters(algorithm)[0] if name.split(".")[-1] in {"gram", "moment", "change_gram", "ends"}}
    assert len(sums) == 4 and all(parameters(algorithm)[0][name].any() for name in sums)
    del state["learner_group"]["learner"][DOUBLES]["long_term.change_gram"]
    algorithm.set_state(state)
    assert not any(parameters(algorithm)[0][name].any() for name in sums)
    call(algorithm, config, 0)
    state = algorithm.get_state()
    module, doubles = state["learner_group"]["learner"]["rl_module"][DEFAULT_MODULE_ID], state["learner_group"]["learner"][DOUBLES]
    (name,) = (name for name in module if name.endswith("long_term.gram"))
    module[name], doubles["long_term.gram"] = module[name][1:, 1:], doubles["long_term.gram"][1:, 1:]  # as before there were more inputs
    algorithm.set_state(state)
    assert not any(parameters(algorithm)[0][name].any() for name in sums)
    algorithm.stop()


def test_checkpoints_that_have_learnt_another_reward_are_moved_aside_each_time_under_a_name_of_its_own(tmp_path: Path) -> None:
    first, second = deployment(), deployment(0, "reward.scale=5.0")
    folder = tmp_path / "checkpoints"

    def save(config: Config) -> None:
        for number, whole in ((1, True), (2, False)):
            (folder / f"{number:08d}").mkdir(parents=True)
            if whole:
                progress = Progress(config.spec.build().digest, config.reward.digest)
                (folder / f"{number:08d}" / PROGRESS_FILE).write_bytes(msgspec.json.encode(progress))

    assert set_aside_other_reward(folder, first) is None
    save(first)
    assert set_aside_other_reward(folder, first) is None
    assert set_aside_other_reward(folder, deployment(0, "spec.bias_span=0.4", "reward.scale=5.0")) is None  # that is refused
    for suffix in ("", "-2", "-3"):
        assert set_aside_other_reward(folder, second) == tmp_path / f"checkpoints-reward-{first.reward.digest}{suffix}"
        assert not folder.exists() and set_aside_other_reward(folder, second) is None
        save(first)
    assert len(list(tmp_path.rglob(PROGRESS_FILE))) == 4


def test_the_newest_whole_checkpoint_is_used_and_two_are_kept(tmp_path: Path) -> None:
    config = deployment()
    algorithm = EnhancedRL.of(config)
    assert restore_checkpoint(algorithm, tmp_path, config) is None
    for number in range(3):
        call(algorithm, config, number)
        save_checkpoint(algorithm, tmp_path, Progress(config.spec.build().digest, config.reward.digest, round=number))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000002", "00000003"]
    (tmp_path / ".00000004.1").mkdir()  # a crash while the next one was being written
    restored = restore_checkpoint(algorithm, tmp_path, config)
    assert restored is not None and restored.round == 2
    for file in (tmp_path / "00000003").rglob("*.pkl"):
        file.write_bytes(b"damaged")
    restored = restore_checkpoint(algorithm, tmp_path, config)
    assert restored is not None and restored.round == 1
    assert algorithm.published()[2] == 16
    with pytest.raises(LoopError, match="is for spec"):
        restore_checkpoint(algorithm, tmp_path, deployment(0, "spec.bias_span=0.4"))
    with pytest.raises(LoopError, match="has learnt the reward"):
        restore_checkpoint(algorithm, tmp_path, deployment(0, "reward.scale=5.0"))
    for file in tmp_path.rglob("*.pkl"):
        file.write_bytes(b"damaged")
    with pytest.raises(LoopError, match="none of 2 checkpoints"):
        restore_checkpoint(algorithm, tmp_path, config)
    algorithm.stop()


def test_a_checkpoint_without_the_learner_is_neither_written_nor_read(tmp_path: Path) -> None:
    config = deployment(1)
    algorithm = EnhancedRL.of(config)
    progress = Progress(config.spec.build().digest, config.reward.digest)
    for number in range(2):
        call_apart(algorithm, config, number)
        save_checkpoint(algorithm, tmp_path, progress)
    (tmp_path / "00000002" / "learner_group" / "learner" / "state.pkl").unlink()
    assert restore_checkpoint(algorithm, tmp_path, config) is not None and algorithm.published()[2] == 8
    (pid,) = algorithm.each_learner(lambda _: os.getpid())
    os.kill(pid, signal.SIGKILL)
    with pytest.raises((LearnersLost, RayError)):
        save_checkpoint(algorithm, tmp_path, progress)
    assert sorted(p.name for p in tmp_path.glob("0*")) == ["00000001", "00000002"]
    algorithm.stop()


class Shard:
    """Says wait at every third draw."""

    def __init__(self, config: Config, name: str) -> None:
        self._config, self._name, self._draws = config, name, 0

    def draw(self, num_rows: int) -> tuple[dict[str, int] | None, MultiAgentBatch | None]:
        self._draws += 1
        if self._draws % 3 == 2:
            return None, None
        return {self._name: self._draws}, to_multi_agent_batch(make_transitions(self._config, num_rows, seed=self._draws))


def shards(config: Config, *names: str, max_restarts: int = 0) -> list[ActorHandle]:
    made = [ray.remote(Shard).options(num_cpus=0, max_restarts=max_restarts).remote(config, name) for name in names]
    ray.get([shard.draw.options(num_returns=2).remote(1)[0] for shard in made])
    return made


def test_train_learns_from_all_shards_in_turn_and_returns_results() -> None:
    config = deployment()
    algorithm = EnhancedRL.of(config)
    with pytest.raises(LoopError, match="draw_from"):
        algorithm.train()
    algorithm.draw_from(shards(config, "ingest-0", "ingest-1"))
    results: dict[str, Any] = {}
    for _ in range(4):
        results = algorithm.train()
    numbers = learner_results(results)
    assert numbers["gradient_steps"] == algorithm.published()[2] >= 32
    assert 0 < numbers["critic_loss"] < 100
    assert set(algorithm.lineage) == {"ingest-0", "ingest-1"}
    algorithm.stop()


def test_a_feed_gives_every_learner_a_batch_or_none() -> None:
    config = deployment()
    feed = BatchFeed(shards(config, "ingest-0"), 16, 3)
    lineage, refs = cast(tuple[dict[str, int], list[Any]], feed.next(10.0))
    assert len(refs) == 3 == len(set(refs))
    assert set(lineage) == {"ingest-0"}
    assert all(len(ray.get(ref)) == 16 for ref in refs)


def test_a_feed_survives_the_death_of_a_shard() -> None:
    config = deployment()
    (shard,) = shards(config, "ingest-0", max_restarts=-1)
    feed = BatchFeed([shard], 16, 1)
    assert feed.next(10.0) is not None
    ray.kill(shard, no_restart=False)
    deadline = time.monotonic() + 120  # a new process imports torch and RLlib first
    while (drawn := feed.next(2.0)) is None and time.monotonic() < deadline:
        pass
    assert drawn is not None


def test_a_feed_gives_up_in_time_when_nothing_may_be_sampled() -> None:
    class Empty:
        def draw(self, num_rows: int) -> tuple[None, None]:
            return None, None

    feed = BatchFeed([ray.remote(Empty).options(num_cpus=0).remote()], 16, 1)
    assert feed.next(0.3) is None
