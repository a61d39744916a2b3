"""An immutable policy: parameters, spec, normaliser, where it came from; and its files (safetensors + JSON manifest with sha256)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Literal, Self

import msgspec
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from esrl_ray.algo.actor import Level, PairNetwork, PleActor, make_actor
from esrl_ray.errors import PolicyRejected
from esrl_ray.fusion import fused_scores
from esrl_ray.normaliser import Normaliser, numeric_input
from esrl_ray.spec import Spec
from esrl_ray.vocabulary import Floats, Ints

TENSORS_FILE, MANIFEST_FILE = "policy.safetensors", "manifest.json"


class PolicyKind(StrEnum):
    """How a policy ranks: one vector of fusion weights for all; a network that gives weights to each request (from user and context) or to
    each pair; or a network that scores each pair by itself, past the fusion formula."""

    STATIC = "static"
    REQUEST = "request"
    PAIR = "pair"
    SCORE = "score"


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """Everything about a policy that is not a tensor."""

    version: int  # monotonic; 0 = not published yet
    digest: str  # sha256 of the tensors' bytes
    kind: PolicyKind
    spec: Spec
    hidden_sizes: tuple[int, ...] = ()
    embedding_size: int = 0
    actor: Literal["mlp", "ple"] = "mlp"  # shape of the network that gives weights
    lineage: dict[str, int] = {}  # {worker: commit} that training could draw from
    parent: int = 0  # version it was trained from or copied from
    round: int = 0
    gradient_steps: int = 0
    config_digest: str = ""
    created_ms: int = 0
    learnt_ms: int = 0  # clock of the last gradient step before it was made
    published_ms: int = 0  # clock when the store accepted it
    verdict: str = ""  # what the gate said
    note: str = ""  # why it exists, when not from training


@dataclass(frozen=True)
class Policy:
    """An immutable policy mu(s). `act` is a pure function of the policy and its arguments.

    Attributes:
        manifest: Version, kind, spec, lineage.
        parameters: The network's parameters by name; {"action": (A,)} for `static`.
        normaliser: Of the network's numeric input.
    """

    manifest: Manifest
    parameters: Mapping[str, Floats]
    normaliser: Normaliser = field(repr=False)

    @classmethod
    def static(cls, spec: Spec, action: Floats | None = None, *, note: str = "control") -> Self:
        """A policy that gives every pair the same action; the default a = 0 is the hand-made control policy."""
        vector = np.zeros(spec.num_actions, np.float32) if action is None else np.asarray(action, np.float32)
        return cls._sealed(
            Manifest(version=0, digest="", kind=PolicyKind.STATIC, spec=spec, note=note), {"action": vector}, Normaliser.identity(spec)
        )

    @classmethod
    def of(cls, manifest: Manifest, parameters: Mapping[str, Floats], normaliser: Normaliser) -> Self:
        """A policy with a network; `manifest.digest` is computed here."""
        return cls._sealed(manifest, parameters, normaliser)

    @classmethod
    def _sealed(cls, manifest: Manifest, parameters: Mapping[str, Floats], normaliser: Normaliser) -> Self:
        policy = cls(manifest, parameters, normaliser)
        return replace(policy, manifest=msgspec.structs.replace(manifest, digest=hashlib.sha256(policy.tensors).hexdigest()))

    @property
    def spec(self) -> Spec:
        """The deployment's spec that this policy was made for."""
        return self.manifest.spec

    @property
    def version(self) -> int:
        """Monotonic number."""
        return self.manifest.version

    def numbered(self, version: int, **changes: object) -> Self:
        """The same parameters under another number (and other manifest fields)."""
        return replace(self, manifest=msgspec.structs.replace(self.manifest, version=version, **changes))

    @cached_property
    def tensors(self) -> bytes:
        """Safetensors bytes of parameters and normaliser."""
        named = {f"parameters.{k}": np.ascontiguousarray(v, np.float32) for k, v in sorted(self.parameters.items())}
        blob: bytes = save_tensors(named | {"normaliser.mean": self.normaliser.mean, "normaliser.std": self.normaliser.std})
        return blob

    @cached_property
    def network(self) -> PairNetwork | PleActor:
        """The network of a policy that has one, in evaluation mode, on the CPU.

        Raises:
            PolicyRejected: names or shapes of the parameters do not fit the manifest.
        """
        shape = self.spec, self.manifest.hidden_sizes, self.manifest.embedding_size
        network: PairNetwork | PleActor
        if self.manifest.kind is PolicyKind.SCORE:
            network = PairNetwork(*shape, num_outputs=1)
        else:
            level: Level = "request" if self.manifest.kind is PolicyKind.REQUEST else "pair"
            network = make_actor(*shape, level=level, shape=self.manifest.actor)
        try:
            network.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in self.parameters.items()})
        except RuntimeError as error:
            raise PolicyRejected(f"parameters do not fit the network: {error}", f"policy {self.version}") from error
        return network.eval().requires_grad_(False)

    def act(self, states: Floats, categorical: Ints, scores: Floats) -> Floats:
        """mu(s) of pairs.

        Args:
            states: (..., F) raw.
            categorical: (..., C) codes.
            scores: (..., k) raw upstream scores.

        Returns:
            (..., A) float32 in [-1, 1]; 0 for a `score` policy, which has no action.
        """
        if self.manifest.kind in (PolicyKind.STATIC, PolicyKind.SCORE):
            action = self.parameters.get("action", np.zeros(self.spec.num_actions, np.float32))
            return np.broadcast_to(action, (*scores.shape[:-1], self.spec.num_actions)).astype(np.float32)
        return self._run(states, categorical, scores)

    def fuse(self, states: Floats, categorical: Ints, scores: Floats) -> tuple[Floats, Floats]:
        """Actions (..., A) and the fused scores (...) that rank; arguments as `act`."""
        actions = self.act(states, categorical, scores)
        if self.manifest.kind is PolicyKind.SCORE:
            return actions, self._run(states, categorical, scores)[..., 0]
        return actions, fused_scores(torch.from_numpy(scores), torch.from_numpy(actions), self.spec).numpy()

    def _run(self, states: Floats, categorical: Ints, scores: Floats) -> Floats:
        numeric = (numeric_input(states, scores) - self.normaliser.mean) / self.normaliser.std
        with torch.inference_mode():
            result: Floats = self.network(torch.from_numpy(numeric), torch.from_numpy(categorical.astype(np.int64))).numpy()
        return result

    def to_bytes(self) -> bytes:
        """One blob: manifest and tensors, as the store and the replicas exchange it."""
        return msgspec.msgpack.encode((msgspec.json.encode(self.manifest), self.tensors))

    @classmethod
    def from_bytes(cls, blob: bytes) -> Self:
        """Inverse of `to_bytes`.

        Raises:
            PolicyRejected: not a policy, or the digest does not match.
        """
        try:
            manifest, tensors = msgspec.msgpack.decode(blob, type=tuple[bytes, bytes])
        except msgspec.MsgspecError as error:
            raise PolicyRejected(f"not a policy: {error}") from error
        return cls._parse(manifest, tensors, "bytes")

    @classmethod
    def _parse(cls, manifest_json: bytes, tensors: bytes, where: str) -> Self:
        try:
            manifest = msgspec.json.decode(manifest_json, type=Manifest)
            if (digest := hashlib.sha256(tensors).hexdigest()) != manifest.digest:
                raise PolicyRejected(
                    f"sha256 of the tensors is {digest}, the manifest says {manifest.digest}", where, "delete this version"
                )
            named = load_tensors(tensors)
            normaliser = Normaliser(named["normaliser.mean"], named["normaliser.std"])
        except (msgspec.MsgspecError, SafetensorError, KeyError) as error:
            raise PolicyRejected(f"not a policy: {error!r}", where, "delete this version") from error
        return cls(manifest, {k.removeprefix("parameters."): v for k, v in named.items() if k.startswith("parameters.")}, normaliser)

    def save(self, folder: Path) -> None:
        """Write both files into a temporary folder beside `folder`, fsync, rename."""
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
        temporary.mkdir(parents=True, exist_ok=True)
        pretty = json.dumps(json.loads(msgspec.json.encode(self.manifest)), indent=1).encode()
        for name, content in ((TENSORS_FILE, self.tensors), (MANIFEST_FILE, pretty)):
            with (temporary / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        temporary.rename(folder)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read a policy's folder and check its sha256.

        Raises:
            PolicyRejected: a file is missing, damaged or does not match.
        """
        try:
            return cls._parse((folder / MANIFEST_FILE).read_bytes(), (folder / TENSORS_FILE).read_bytes(), str(folder))
        except OSError as error:
            raise PolicyRejected(f"cannot read a policy: {error}", str(folder)) from error
