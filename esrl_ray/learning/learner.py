"""The RLlib learner: `updates_per_call` gradient steps of `algo.update` per call.

Facts of RLlib 2.60 that this file depends on:
- `_uncompiled_update` is the seam: forward, losses, gradients and optimiser steps in one place. The stock hooks compute all losses
  at the same parameters and step every optimiser at once, which is not critic-then-actor.
- `Learner.set_state` skips the module's weights when the state's `weights_seq_no` is not newer, yet loads the optimisers: a
  rollback in memory would be half done. Setting the own number to 0 first loads both.
- Stock learners wrap modules in DDP, which forbids steps that use only some parameters: here gradients are averaged by one all-reduce
  instead. All learners must get equally many transitions, or that waits for its time-out.
- Optimisers are configured before `build` returns, and on the device: `_make_module` has moved the module already.
- The module's float64 tensors are restored as float32: sums over many batches need their digits, so they travel beside the module.
- A metric logged as `window=1` is averaged over the calls of an iteration by the Algorithm; `max` keeps a counter a counter. The average
  leaves NaN out, so that a call which diverged shows nowhere but here.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.learner.torch.torch_learner import TorchLearner
from ray.rllib.policy.sample_batch import MultiAgentBatch

from esrl_ray.algo.networks import Networks
from esrl_ray.algo.update import LearnState, UpdateResult, make_optimisers, prepare, update
from esrl_ray.config import Config
from esrl_ray.errors import Diverged

ALL_REDUCE_TIMEOUT_S = 60
"""A learner waits this long for the others, then fails, and the training loop rebuilds all of them."""

GRADIENT_STEPS, DOUBLES = "gradient_steps", "float64_buffers"


class EnhancedRLLearner(TorchLearner):  # type: ignore[misc]  # RLlib is untyped
    """EnhancedRL's gradient steps on RLlib's batches and optimisers."""

    learn_state: LearnState

    def build(self) -> None:
        """Build module and optimisers, then the `LearnState` around them."""
        super().build()
        if self._device.type == "cpu":
            torch.set_num_threads(1)  # OpenMP threads that spin on shared cores cost 9x
        actor, critics = (self.get_optimizer(optimizer_name=name) for name in ("actor", "critics"))
        self.learn_state = LearnState.around(self._networks, (actor, critics), self._deployment)
        self._group = dist.new_group(timeout=timedelta(seconds=ALL_REDUCE_TIMEOUT_S)) if self.config.num_learners > 1 else None
        if self._group is not None:
            for tensor in self._networks.state_dict().values():
                dist.broadcast(tensor, 0, group=self._group)

    @property
    def _networks(self) -> Networks:
        networks = self.module[DEFAULT_MODULE_ID].networks
        assert isinstance(networks, Networks)
        return networks

    @property
    def _deployment(self) -> Config:
        deployment: Config = self.config.deployment
        return deployment

    def configure_optimizers_for_module(self, module_id: str, config: Any = None) -> None:
        """Register the core's optimisers, so that RLlib checkpoints them."""
        learner = self._deployment.learner
        actor, critics = make_optimisers(self._networks, learner)
        for name, optimiser, rate in (("actor", actor, learner.actor_lr), ("critics", critics, learner.critic_lr)):
            self.register_optimizer(
                module_id=module_id,
                optimizer_name=name,
                optimizer=optimiser,
                params=list(getattr(self._networks, name).parameters()),
                lr_or_lr_schedule=rate,
            )

    def _make_modules_ddp_if_necessary(self) -> None:
        """No DDP: see the top of the file."""

    def _uncompiled_update(self, batch: dict[str, Any], **kwargs: Any) -> tuple[Any, Any, Any]:
        """`updates_per_call` gradient steps on equal parts of the batch.

        Raises:
            Diverged: a loss or a gradient is not finite, and with it the parameters.
        """
        parts = prepare(self.learn_state, dict(batch[DEFAULT_MODULE_ID])).split(self._deployment.learner.updates_per_call)
        average = self._average if self._group is not None else None
        results = [torch.stack(update(self.learn_state, part, average=average)) for part in parts]
        means = UpdateResult(*torch.stack(results).mean(0).unbind())
        numbers = dict(zip(UpdateResult._fields, torch.stack(means).tolist(), strict=True))  # the only wait for the device
        if not all(map(math.isfinite, numbers.values())):
            text = f"learning diverged at gradient step {self.learn_state.gradient_steps}: {numbers}"
            raise Diverged(text, "EnhancedRLLearner", "lower learner.critic_lr and learner.actor_lr")
        for name, value in numbers.items():
            self.metrics.log_value((DEFAULT_MODULE_ID, name), value, window=1)
        self.metrics.log_value((DEFAULT_MODULE_ID, GRADIENT_STEPS), self.learn_state.gradient_steps, reduce="max")
        return {}, {DEFAULT_MODULE_ID: means.critic_loss + means.actor_loss}, {}

    def _convert_batch_type(self, batch: MultiAgentBatch, *args: Any, **kwargs: Any) -> MultiAgentBatch:
        """Tensors where the columns are: `prepare` moves them, through pinned memory and without a wait."""
        return super()._convert_batch_type(batch, to_device=False)

    def compute_loss_for_module(self, *, module_id: str, config: Any, batch: Any, fwd_out: Any) -> Any:
        """Abstract in RLlib; the fused update has no single loss."""
        raise NotImplementedError("EnhancedRLLearner steps critics and actor one after the other in _uncompiled_update")

    def _average(self, tensors: list[torch.Tensor], *, total: bool = False) -> None:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat, group=self._group)
        if not total:
            flat /= self.config.num_learners
        for tensor, of_all in zip(tensors, torch.split_with_sizes(flat, [t.numel() for t in tensors]), strict=True):
            tensor.copy_(of_all.view_as(tensor))

    def get_state(
        self, components: str | Collection[str] | None = None, *, not_components: str | Collection[str] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """RLlib's state (module, optimisers), the counter of gradient steps, and what RLlib would round."""
        state: dict[str, Any] = super().get_state(components, not_components=not_components, **kwargs)
        doubles = {name: buffer.cpu().numpy().copy() for name, buffer in self._doubles().items()}
        return {**state, GRADIENT_STEPS: self.learn_state.gradient_steps, DOUBLES: doubles}

    def set_state(self, state: dict[str, Any]) -> None:
        """Inverse of `get_state`; also sets an older state."""
        self._weights_seq_no = 0
        super().set_state(state)
        self.learn_state.gradient_steps = state.get(GRADIENT_STEPS, self.learn_state.gradient_steps)
        doubles, saved = self._doubles(), state.get(DOUBLES, {})
        same = all(name in saved and saved[name].shape == buffer.shape for name, buffer in doubles.items())
        for name, buffer in doubles.items():  # sums of an older state lack some of each other, or have other shapes: they start anew
            buffer.copy_(torch.as_tensor(saved[name])) if same else buffer.zero_()

    def _doubles(self) -> dict[str, torch.Tensor]:
        return {name: buffer for name, buffer in self._networks.critics.named_buffers() if buffer.dtype == torch.float64}
