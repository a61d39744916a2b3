"""Where policies live: one folder of immutable versions and one `current.json` that says which of them serve.

    <folder>/00000007/policy.safetensors, manifest.json     a version; never changed once it is there
    <folder>/00000007/verdict.json                          what the second tier said of it, if it was asked
    <folder>/current.json                                   which version serves, the round, whether it is pinned
    <folder>/history.jsonl                                  each `current.json` that there was, for people and reports

Every change writes the version first and then replaces `current.json` by rename, so that a crash between the two leaves the old one
serving and only skips a number. Numbers only go up: a rollback or a pin publishes the OLD parameters under a NEW number. One process
owns a folder at a time (`store_actor.own`); anyone may read it (`read_snapshot`).
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec

from esrl_ray.config import Config
from esrl_ray.errors import PolicyRejected
from esrl_ray.evaluation.gate import judge
from esrl_ray.evaluation.second_tier import SecondTierVerdict, save_verdict
from esrl_ray.policy.policy import MANIFEST_FILE, Manifest, Policy, PolicyKind
from esrl_ray.vocabulary import Round, TransitionBatch

CURRENT_FILE, HISTORY_FILE = "current.json", "history.jsonl"
ROLLBACK = "rollback to"
"""How the note of a version that a rollback made begins."""

CONTROL_VERSION = 1
"""The control policy is version 1 of every folder and the anchor of round 0."""

_logger = logging.getLogger(__name__)


class PolicySnapshot(msgspec.Struct, frozen=True):
    """All that a replica needs to serve."""

    sequence: int  # goes up at every change of the store, also at those that keep the version
    current: bytes  # `Policy.to_bytes` of the version that serves
    anchor: bytes  # of the round's anchor
    round: Round
    pinned: bool
    published_ms: int  # clock when `current` began to be offered


class Current(msgspec.Struct, frozen=True):
    """Content of `current.json`."""

    sequence: int
    version: int
    round: Round
    pinned: bool
    published_ms: int


def version_folder(folder: Path, version: int) -> Path:
    """Folder of one version."""
    return folder / f"{version:08d}"


def read_snapshot(folder: Path) -> PolicySnapshot:
    """What the files say, for a replica that starts while the store does not answer. Takes no lock.

    Raises:
        PolicyRejected: there is no `current.json`, or a file is damaged.
    """
    current = read_current(folder)
    if current is None:
        raise PolicyRejected("no policy has been published", str(folder / CURRENT_FILE), "start the policy store first")
    return _snapshot(folder, current)


def _snapshot(folder: Path, current: Current) -> PolicySnapshot:
    policy = Policy.load(version_folder(folder, current.version))
    anchor = Policy.load(version_folder(folder, current.round.anchor_version))
    return PolicySnapshot(current.sequence, policy.to_bytes(), anchor.to_bytes(), current.round, current.pinned, current.published_ms)


def read_current(folder: Path) -> Current | None:
    """What `current.json` says; None when there is none.

    Raises:
        PolicyRejected: it is damaged.
    """
    path = folder / CURRENT_FILE
    if not path.exists():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=Current)
    except msgspec.MsgspecError as error:
        raise PolicyRejected(f"not a state of the policy store: {error}", str(path), "restore the file") from error


def read_manifests(folder: Path) -> list[Manifest]:
    """Manifests of all versions in a folder, oldest first; damaged ones are left out. The tensors are not looked at."""
    manifests = []
    for path in sorted(folder.glob(f"[0-9]*/{MANIFEST_FILE}")):
        try:
            manifests.append(msgspec.json.decode(path.read_bytes(), type=Manifest))
        except msgspec.MsgspecError as error:
            _logger.warning("skipping a damaged manifest: %s: %s", path, error)
    return manifests


def _read_history(folder: Path) -> dict[int, int]:
    path = folder / HISTORY_FILE
    published_ms: dict[int, int] = {}
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            entry = msgspec.json.decode(line, type=Current)
        except msgspec.MsgspecError as error:
            _logger.warning("skipping a line of %s that a crash cut: %s", path, error)
            continue
        published_ms.setdefault(entry.version, entry.published_ms)
    return published_ms


class PolicyStore:
    """Numbers, judges and keeps policies; says which one serves.

    Args:
        folder: Of the versions; an empty one gets the control policy as version 1, serving and anchor of round 0.
        config: Spec, bounds, limits of the gate.
        clock_ms: Wall clock, epoch milliseconds.

    Raises:
        PolicyRejected: the folder belongs to another spec, or `current.json` or the anchor is damaged.
    """

    def __init__(self, folder: Path, config: Config, *, clock_ms: Callable[[], int]) -> None:
        self._folder, self._config, self._spec, self._clock_ms = folder, config.policy, config.spec.build(), clock_ms
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".*.*"):  # a crash while a version was being written
            if leftover.is_dir():
                shutil.rmtree(leftover)
        self._newest = max((int(p.name) for p in folder.iterdir() if p.name.isdigit()), default=0)
        self._manifests = {manifest.version: manifest for manifest in read_manifests(folder)}
        self._published_ms = _read_history(folder)
        current = read_current(folder)
        if current is None:
            bounds = config.exploration
            self._current = Current(0, 0, Round(0, self._newest + 1, 0, bounds.low, bounds.high, clock_ms()), pinned=False, published_ms=0)
            self._offer(self._add(Policy.static(self._spec), note="control", verdict="first tier: static, finite, in range"))
        else:
            self._current = current
            if (anchor := self.load(current.round.anchor_version)).spec != self._spec:
                raise PolicyRejected(
                    f"policies are for spec {anchor.spec.digest}, this deployment's is {self._spec.digest}",
                    str(folder),
                    "use another run.dir",
                )
            self._heal()
        self._blobs = _snapshot(folder, self._current)

    def publish(self, blob: bytes, probe: TransitionBatch | None) -> int:
        """Judge a policy, number it, keep it, and let it serve (while pinned: keep it only).

        Args:
            blob: `Policy.to_bytes`; its version number is ignored.
            probe: Recent lists for the gate.

        Returns:
            Its version.

        Raises:
            PolicyRejected: damaged, or refused by the gate; nothing has changed.
        """
        policy = Policy.from_bytes(blob)
        anchor = self.load(self._current.round.anchor_version)
        verdict = judge(policy, spec=self._spec, anchor=anchor, turn=self._current.round, probe=probe, config=self._config)
        if not verdict.passed:
            raise PolicyRejected(verdict.text, f"policy after {policy.manifest.gradient_steps} gradient steps")
        version = self._add(policy, note=policy.manifest.note, verdict=verdict.text)
        if not self._current.pinned:
            self._offer(version)
        return version

    def start_round(self, turn: Round) -> None:
        """Begin the next turn of progressive training; the same round again is ignored.

        Raises:
            PolicyRejected: the number does not go up, or the anchor is not a whole version of this store, or scores pairs by itself.
        """
        if turn == self._current.round:
            return
        if turn.number <= self._current.round.number:
            raise PolicyRejected(
                f"round {turn.number} after round {self._current.round.number}", str(self._folder), "go on from the store's round"
            )
        if self.load(turn.anchor_version).manifest.kind is PolicyKind.SCORE:
            text = f"version {turn.anchor_version} scores pairs by itself and has no actions to explore around"
            raise PolicyRejected(text, str(self._folder), "make another version the anchor")
        self._change(round=turn)
        _logger.info("round started number=%d anchor=%d", turn.number, turn.anchor_version)

    def keep_verdict(self, version: int, verdict: SecondTierVerdict) -> None:
        """Keep what the second tier said beside the version that it said it of; a later verdict replaces an earlier one.

        Raises:
            PolicyRejected: no such whole version, or the verdict is of other parameters.
        """
        if (digest := self.load(version).manifest.digest) != verdict.candidate:
            text = f"a verdict on {verdict.candidate[:12]} for version {version}, which is {digest[:12]}"
            raise PolicyRejected(text, str(self._folder), "judge that version")
        save_verdict(version_folder(self._folder, version), verdict)

    def rollback(self, version: int) -> int:
        """Serve an old version's parameters again, under a new number, until the next publish.

        Returns:
            The new number.

        Raises:
            PolicyRejected: no such whole version, or the store is pinned.
        """
        if self._current.pinned:
            raise PolicyRejected(
                f"version {self._current.version} is pinned", str(self._folder), "unpin first, or pin the version you want"
            )
        new = self._again(version, f"{ROLLBACK} {version}")
        self._offer(new)
        return new

    def pin(self, version: int | Literal["static"]) -> int:
        """Serve one version (or the control policy) to everyone, without exploration, until `unpin`: the kill switch.

        Returns:
            The new number under which it serves.

        Raises:
            PolicyRejected: no such whole version.
        """
        if version == "static":
            new = self._add(Policy.static(self._spec), note="pin static", verdict="pinned by command")
        else:
            new = self._again(version, f"pin {version}")
        self._offer(new, pinned=True)
        return new

    def unpin(self) -> None:
        """End a pin. What was published meanwhile serves now; without any, the pinned version stays until the next publish."""
        if not self._current.pinned:
            return
        if self._newest > self._current.version:
            self._offer(self._newest, pinned=False)
        else:
            self._change(pinned=False)

    def snapshot(self) -> PolicySnapshot:
        """What serves now."""
        return self._blobs

    @property
    def current(self) -> Current:
        """What serves now, without the bytes."""
        return self._current

    def manifests(self) -> list[Manifest]:
        """Manifests of all whole versions, oldest first."""
        return [self._manifests[version] for version in sorted(self._manifests)]

    def published_ms(self) -> dict[int, int]:
        """{version: clock when it began to be offered}; versions that never were are missing."""
        return dict(self._published_ms)

    def load(self, version: int) -> Policy:
        """One version, its sha256 checked.

        Raises:
            PolicyRejected: there is none, or it is damaged.
        """
        return Policy.load(version_folder(self._folder, version))

    def _add(self, policy: Policy, *, note: str, verdict: str, parent: int | None = None) -> int:
        version = self._newest + 1
        now_ms = self._clock_ms()
        changes: dict[str, object] = {"note": note, "verdict": verdict, "published_ms": now_ms}
        if parent is not None or not policy.manifest.created_ms:
            changes |= {"parent": parent or 0, "created_ms": now_ms}
        numbered = policy.numbered(version, **changes)
        numbered.save(version_folder(self._folder, version))
        self._newest, self._manifests[version] = version, numbered.manifest
        return version

    def _again(self, version: int, note: str) -> int:
        policy = self.load(version)
        return self._add(policy, note=note, verdict=policy.manifest.verdict, parent=version)

    def _offer(self, version: int, *, pinned: bool | None = None) -> None:
        self._change(version=version, published_ms=self._clock_ms(), pinned=self._current.pinned if pinned is None else pinned)
        manifest = self._manifests[version]
        _logger.info(
            "policy offered version=%d kind=%s pinned=%s note=%s", version, manifest.kind, self._current.pinned, manifest.note or "-"
        )

    def _change(self, **changes: object) -> None:
        current = msgspec.structs.replace(self._current, sequence=self._current.sequence + 1, **changes)
        blobs = _snapshot(self._folder, current)  # refuses damaged files before anything moves
        temporary = self._folder / f".{CURRENT_FILE}.tmp"
        with temporary.open("wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(current), indent=1))
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(self._folder / CURRENT_FILE)
        directory = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
        with (self._folder / HISTORY_FILE).open("ab") as file:
            file.write(msgspec.json.encode(current) + b"\n")
        self._current, self._blobs = current, blobs
        self._published_ms.setdefault(current.version, current.published_ms)

    def _heal(self) -> None:
        """Serve the newest whole version under a new number when the one that should serve is damaged."""
        try:
            self.load(self._current.version)
        except PolicyRejected as damage:
            for version in sorted(self._manifests, reverse=True):
                if version >= self._current.version:
                    continue
                try:
                    new = self._again(version, f"version {self._current.version} is damaged, this is {version}")
                except PolicyRejected as error:
                    _logger.warning("skipping a damaged policy: %s", error)
                    continue
                _logger.error("the serving policy is damaged, going back to version %d: %s", version, damage)
                self._offer(new)
                return
            raise
