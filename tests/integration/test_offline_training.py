"""Offline training through RLlib: to the same result after a stop or a kill, on local and remote learners, and as a job on a cluster."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import torch
from click.testing import CliRunner
from ray.job_submission import JobStatus, JobSubmissionClient
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.util.state import list_actors

from esrl_ray.actors import NAMESPACE
from esrl_ray.algo.update import LearnState, prepare, update
from esrl_ray.cli.logged import read_log
from esrl_ray.cli.policy import policy_group
from esrl_ray.cli.train import train
from esrl_ray.config import Config, load_config
from esrl_ray.errors import MethodError
from esrl_ray.learning.algorithm import EnhancedRL, EnhancedRLConfig
from esrl_ray.learning.logged_anchor import logged_anchor
from esrl_ray.learning.offline import OfflineTraining
from esrl_ray.learning.offline_run import OfflineRun, begin, settings_digest
from esrl_ray.learning.rounds import fit_scales
from esrl_ray.learning.steps_feed import StepsFeed
from esrl_ray.methods.catalogue import ENHANCEDRL, WITHOUT_GRADIENTS
from esrl_ray.normaliser import Normaliser
from esrl_ray.policy.policy import Policy, PolicyKind
from esrl_ray.policy.store import PolicyStore
from esrl_ray.ports import free_ports
from esrl_ray.replay.steps import Steps
from esrl_ray.vocabulary import Floats, TransitionBatch
from streaming.steplog import StepLog, WorkerState
from tests.step_tables import simulated_steps, step_table

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")  # Ray's own

ROOT = Path(__file__).resolve().parents[2]
SET = ["learner.batch_size=16", "learner.updates_per_call=4", "learner.hidden_sizes=[16]", "learner.soft_update_every=5"]
EVERY_STEP = "replay.sample_without_next=true"
NUM_GRADIENT_STEPS = 64
WAIT_S = 400.0  # for what takes half a minute on a quiet machine


def deployment(*more: str) -> Config:
    return load_config("configs/demo.yaml", [*SET, *more])


@pytest.fixture(scope="module")
def steps() -> Steps:
    return simulated_steps(deployment(), 300)


@pytest.fixture(scope="module")
def step_log(steps: Steps, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with a step log."""
    folder, spec = tmp_path_factory.mktemp("run"), deployment().spec.build()
    log = StepLog(folder / "log" / spec.digest, "ingest-0", "one", spec)
    log.commit(WorkerState(commit=0, incarnation="one", positions={}, joiners={}, committed_ms=0), step_table(steps))
    return folder


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """The command takes the signals; tests give them back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Clock:
    """Milliseconds that pass by themselves: one second at every look."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        self.now += 1000
        return self.now


def training(steps: Steps, folder: Path, config: Config | None = None, *, until: int = NUM_GRADIENT_STEPS, **more: Any) -> OfflineTraining:
    wanted = EnhancedRLConfig().training(deployment=config or deployment(), seed=5)
    run = OfflineRun("enhancedrl", "made up", len(steps), {"ingest-0": 0}, 5, "")
    return OfflineTraining(
        wanted, run, steps, folder=folder, num_gradient_steps=until, clock_ms=Clock(), say=more.get("say", lambda _: None)
    )


@pytest.fixture(scope="module")
def learnt(steps: Steps, tmp_path_factory: pytest.TempPathFactory) -> Policy:
    """What one local learner learns without interruption."""
    result = training(steps, tmp_path_factory.mktemp("whole")).run(threading.Event())
    assert result.policy is not None and result.gradient_steps == NUM_GRADIENT_STEPS
    return result.policy


def test_a_policy_says_what_it_was_learnt_from(steps: Steps, learnt: Policy) -> None:
    manifest = learnt.manifest
    assert manifest.kind is PolicyKind.PAIR and manifest.gradient_steps == NUM_GRADIENT_STEPS
    assert manifest.lineage == {"ingest-0": 0} and manifest.note == "enhancedrl, offline"
    states, codes, scores = (steps.columns[name][:50] for name in ("states", "categorical", "scores"))
    assert abs(learnt.act(states, codes, scores)).max() > 1e-3  # no longer the control policy


def test_a_run_that_was_stopped_goes_on_to_the_same_policy(steps: Steps, learnt: Policy, tmp_path: Path) -> None:
    stop, lines = threading.Event(), list[str]()

    def say(line: str) -> None:
        lines.append(line)
        stop.set()

    first = training(steps, tmp_path, say=say, until=10_000).run(stop)
    assert first.policy is None and 0 < first.gradient_steps < 10_000
    assert lines[0].startswith(f"gradient step {first.gradient_steps} of 10,000") and "critic loss" in lines[0]
    again = training(steps, tmp_path, until=first.gradient_steps + 3).run(threading.Event())  # rounded up to whole calls of 4
    assert again.gradient_steps == first.gradient_steps + 4
    whole = training(steps, tmp_path / "whole", until=first.gradient_steps + 4).run(threading.Event())
    assert again.policy is not None and whole.policy is not None
    assert again.policy.manifest.digest == whole.policy.manifest.digest != learnt.manifest.digest


def test_a_run_goes_on_only_with_what_it_was_started_with(tmp_path: Path) -> None:
    config = deployment()
    run = OfflineRun("enhancedrl", "a log", 300, {}, 0, settings_digest(config))
    begin(tmp_path, run, resume=False)
    begin(tmp_path, run, resume=True)
    with pytest.raises(MethodError, match="go on with --resume"):
        begin(tmp_path, run, resume=False)
    for other, text in [
        (OfflineRun("td3", "a log", 300, {}, 0, run.settings), "started with method enhancedrl, now it is td3"),
        (OfflineRun("enhancedrl", "a log", 301, {}, 0, run.settings), "num_steps 300"),
        (OfflineRun("enhancedrl", "a log", 300, {}, 0, settings_digest(deployment("learner.gamma=0.5"))), "settings"),
    ]:
        with pytest.raises(MethodError, match=text):
            begin(tmp_path, other, resume=True)
    digests = [settings_digest(deployment("learner.gamma=0", *more)) for more in ([], ["serve.num_unshown=1"], [EVERY_STEP])]
    assert len(set(digests)) == 3, "how many pairs of a list are kept, and which lists are sampled"
    assert settings_digest(deployment("learner.num_learners=2", "run.dir=elsewhere")) == run.settings


def test_learning_that_diverges_says_so(steps: Steps, tmp_path: Path) -> None:
    with pytest.raises(MethodError, match=r"diverged at gradient step.*lower learner.critic_lr"):
        training(steps, tmp_path, deployment("learner.critic_lr=1e30"), until=400).run(threading.Event())


def test_learning_that_diverges_in_one_call_of_an_iteration_leaves_no_policy(
    steps: Steps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = StepsFeed._draw

    def spoilt(feed: StepsFeed, learner: int) -> TransitionBatch:
        batch = draw(feed, learner)
        return batch if feed.call < 13 else {**batch, "rewards": batch["rewards"] * np.float32(np.nan)}

    monkeypatch.setattr(StepsFeed, "_draw", spoilt)
    with pytest.raises(MethodError, match=r"diverged at gradient step 56.*lower learner.critic_lr"):  # the 14th of 16 calls
        training(steps, tmp_path).run(threading.Event())


def test_parameters_that_are_not_finite_are_no_policy(steps: Steps, tmp_path: Path) -> None:
    settled = EnhancedRLConfig().training(deployment=deployment())
    broken = {"layers.0.weight": np.full((2, 2), np.nan, np.float32)}
    algorithm = SimpleNamespace(config=settled, published=lambda: (broken, Normaliser.identity(deployment().spec.build()), 64))
    with pytest.raises(MethodError, match=r"parameters at gradient step 64 are not finite.*delete it"):
        training(steps, tmp_path)._policy(cast(EnhancedRL, algorithm))


def test_an_algorithm_over_files_begins_at_the_logged_anchor_as_offline_training_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("esrl_ray.learning.logged_anchor.NUM_STEPS", 50)
    steps = simulated_steps(deployment(), 300)
    steps.columns["anchor_actions"][:] = 0.2
    path = str(tmp_path / "steps.parquet")
    pq.write_table(step_table(steps), path)
    over_files = EnhancedRLConfig().training(deployment=deployment(), seed=5).offline_data(input_=path).build_algo()
    over_steps = training(read_log(path, deployment()).steps, tmp_path)._build()
    try:
        (ours,), (theirs,) = (a.each_learner(lambda learner: learner.learn_state.networks) for a in (over_files, over_steps))
        for (name, value), (_, expected) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
            assert torch.equal(value, expected), name
        assert all(torch.equal(value, ours.anchor.state_dict()[name]) for name, value in ours.actor.state_dict().items())
    finally:
        over_files.stop()
        over_steps.stop()


def test_the_command_learns_and_resumes(step_log: Path, tmp_path: Path) -> None:
    sets = [part for text in SET for part in ("--set", text)]
    arguments = ["--config", "configs/demo.yaml", *sets, "--log", str(step_log), "--out", str(tmp_path), "--seed", "5"]
    result = CliRunner().invoke(train, [*arguments, "--steps", "16"])
    assert result.exit_code == 0, (result.output, result.exception)
    for line in (
        "method          enhancedrl, seed 5",
        "gradient steps  16",
        "losses          critic ",
        f"policy          {tmp_path}/policy",
    ):
        assert line in result.output
    first = Policy.load(tmp_path / "policy")
    assert first.manifest.lineage == {"ingest-0": 0}
    result = CliRunner().invoke(train, [*arguments, "--steps", "24", "--resume"])
    assert result.exit_code == 0, (result.output, result.exception)
    second = Policy.load(tmp_path / "policy")
    assert (first.manifest.gradient_steps, second.manifest.gradient_steps) == (16, 24)
    assert first.manifest.digest != second.manifest.digest
    published = CliRunner().invoke(policy_group, ["publish", str(tmp_path / "policy"), *arguments[:-6], "--set", f"run.dir={tmp_path}"])
    assert "version 2 serves, and is the anchor of round 1" in published.output, published.exception


@pytest.mark.parametrize(("method", "asked", "done"), [("td3", 20, 20), ("supervised", 20, 20), ("cql", 4, 10), ("iql", 20, 20)])
def test_the_number_of_gradient_steps_holds_for_other_methods(method: str, asked: int, done: int, step_log: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(train, [*command_of(step_log, tmp_path), "--method", method, "--steps", str(asked)])
    assert result.exit_code == 0, (result.output, result.exception)
    assert Policy.load(tmp_path / "policy").manifest.gradient_steps == done
    assert f"gradient steps  {done}" in result.output


@pytest.mark.parametrize("method", WITHOUT_GRADIENTS)
def test_a_method_without_gradients_refuses_a_number_of_them(method: str, step_log: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(train, [*command_of(step_log, tmp_path), "--method", method, "--steps", "20"])
    assert isinstance(result.exception, MethodError) and "takes no gradient steps" in str(result.exception)


@pytest.mark.parametrize("method", ENHANCEDRL)
def test_each_kin_of_enhancedrl_learns_through_rllib_and_serves(method: str, step_log: Path, steps: Steps, tmp_path: Path) -> None:
    result = CliRunner().invoke(train, [*command_of(step_log, tmp_path), "--method", method, "--steps", "8"])
    assert result.exit_code == 0, (result.output, result.exception)
    policy = Policy.load(tmp_path / "policy")
    assert policy.manifest.gradient_steps == 8 and policy.manifest.kind is (
        PolicyKind.REQUEST if method == "unifiedrl" else PolicyKind.PAIR
    )
    store = PolicyStore(tmp_path / "store", deployment(), clock_ms=lambda: 1_000)
    assert store.publish(policy.to_bytes(), steps.transitions(np.arange(32))) == 2


def command_of(step_log: Path, out: Path) -> list[str]:
    sets = [part for text in SET for part in ("--set", text)]
    return ["--config", "configs/demo.yaml", *sets, "--log", str(step_log), "--out", str(out)]


def test_a_killed_command_goes_on_to_the_same_policy(steps: Steps, tmp_path: Path) -> None:
    pq.write_table(step_table(steps), tmp_path / "steps.parquet")
    sets = [part for text in [*SET, "learner.checkpoint_interval_s=0.05"] for part in ("--set", text)]
    arguments = ["--config", "configs/demo.yaml", *sets, "--log", str(tmp_path / "steps.parquet"), "--out", str(tmp_path / "out")]
    command = [sys.executable, "-m", "esrl_ray.cli.main", "train", *arguments, "--steps", "100000"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoints, deadline = tmp_path / "out" / "checkpoints", time.monotonic() + WAIT_S
    while not (done := sorted(checkpoints.glob("[0-9]*"))):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    result = CliRunner().invoke(train, [*arguments, "--steps", "1", "--resume"])  # fewer than are done: it only saves the policy
    assert result.exit_code == 0, (result.output, result.exception)
    resumed = Policy.load(tmp_path / "out" / "policy")
    number = resumed.manifest.gradient_steps
    assert done and number >= 4
    whole = [*arguments[:-1], str(tmp_path / "whole"), "--steps", str(number)]
    assert CliRunner().invoke(train, whole).exit_code == 0
    assert Policy.load(tmp_path / "whole" / "policy").manifest.digest == resumed.manifest.digest


@pytest.fixture(scope="module")
def dashboard() -> Iterator[str]:
    """Address for jobs of a local cluster."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # else a local Ray leaves a token file in the home folder
    (port,) = free_ports(1)
    context = ray.init(address="local", namespace=NAMESPACE, num_cpus=2, include_dashboard=True, dashboard_port=port, log_to_driver=False)
    yield f"http://{context.dashboard_url}"
    ray.shutdown()


def with_twice_the_batch(steps: Steps, config: Config, num_calls: int) -> dict[str, Floats]:
    """The actor that one learner of the core learns from what two draw, each batch as long as both together."""
    state, size = LearnState.create(config, device="cpu"), config.learner.batch_size
    feed = StepsFeed(steps, config, 2, by_reference=False)
    state.networks.set_scales(*fit_scales(feed.spread()), fold=False)
    assert logged_anchor(steps, config) is None  # else learning would begin there
    for _ in range(num_calls):
        drawn = feed.next(0.0)
        assert drawn is not None
        one, other = (dict(batch[DEFAULT_MODULE_ID]) for batch in drawn[1])
        assert not np.array_equal(one["states"], other["states"])
        for i in range(config.learner.updates_per_call):
            part = slice(i * size, (i + 1) * size)
            both = {name: np.concatenate([column[part], other[name][part]]) for name, column in one.items()}
            assert len(both["states"]) == 2 * size
            update(state, prepare(state, both))
    return {name: value.numpy() for name, value in state.networks.actor.state_dict().items()}


def test_two_learners_learn_from_twice_the_transitions(steps: Steps, dashboard: str, tmp_path: Path) -> None:
    """With the losses that are means over lists, as one learner does whose batches are theirs together."""
    config = deployment("learner.num_learners=2", "learner.critic=list_sum", "learner.actor_loss=printed", "learner.seed=5")
    result = training(steps, tmp_path, config).run(threading.Event())
    assert result.policy is not None and result.gradient_steps == NUM_GRADIENT_STEPS
    expected = with_twice_the_batch(steps, config, NUM_GRADIENT_STEPS // config.learner.updates_per_call)
    assert expected.keys() == result.policy.parameters.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(result.policy.parameters[name], value, atol=1e-5, err_msg=name)


def test_a_job_survives_kill_9_of_its_learner(step_log: Path, learnt: Policy, dashboard: str, tmp_path: Path) -> None:
    more = ["learner.num_learners=1", "learner.checkpoint_interval_s=0.5"]
    sets = " ".join(f"--set '{text}'" for text in [*SET, *more])
    command = (
        f"{sys.executable} -m esrl_ray.cli.main train --config configs/demo.yaml {sets} --log {step_log} --out {tmp_path} --steps 1000"
    )
    client = JobSubmissionClient(dashboard)
    job = client.submit_job(entrypoint=f"cd {ROOT} && {command}")
    pid = None
    deadline = time.monotonic() + WAIT_S
    while pid is None or not list((tmp_path / "checkpoints").glob("[0-9]*")):
        assert time.monotonic() < deadline and not client.get_job_status(job).is_terminal(), client.get_job_logs(job)
        alive = list_actors(filters=[("state", "=", "ALIVE")])
        found = [actor.pid for actor in alive if actor.class_name.endswith("_WrappedExecutable")]  # a learner, as Ray Train calls it
        pid = found[0] if found else None
        time.sleep(0.2)
    os.kill(pid, signal.SIGKILL)
    while not client.get_job_status(job).is_terminal():
        assert time.monotonic() < deadline, client.get_job_logs(job)
        time.sleep(0.5)
    logs = client.get_job_logs(job)
    assert client.get_job_status(job) is JobStatus.SUCCEEDED, logs
    assert "learners lost, going on from the newest checkpoint" in logs
    assert Policy.load(tmp_path / "policy").manifest.gradient_steps == 1000
