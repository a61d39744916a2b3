"""The whole exception tree.

EsrlError
├── ConfigError            a setting is unknown, malformed or impossible together with another
├── SpecMismatch           features, widths or score names differ from the deployment's spec
├── WireError              bytes from a topic are not a valid event (becomes a dead letter)
├── StreamError            the stream cannot go on: a gap in offsets, partitions differ, too many dead letters
├── BrokerError            the embedded broker or a named one does not work
│   └── BrokerRefused      it works and refuses our credentials or certificate
├── Fenced                 another incarnation owns this step log: stop
├── LogError               the step log or its state file is damaged or does not fit
├── RequestError           a fuse request is malformed or does not fit the deployment (422)
├── PolicyRejected         the gate or the store refused an artefact; `current` did not move
├── MethodError            a method cannot learn from these steps, or there is no such method
├── InputDataError         a column of a data file is missing or has the wrong type
├── LearnersLost           learners died or diverged: rebuild them from the newest checkpoint
│   └── Diverged           they are there, and their numbers are not finite
└── LoopError              a part of the running loop ended and cannot come back

Every text says what, the actual value, what was expected, where, and what to do. An error crosses Ray by pickling its
`args`, so every constructor argument goes to `super().__init__` and the text is built in `__str__`.
"""

from esrl_ray.vocabulary import Refusal


class EsrlError(Exception):
    """Base of all errors that this project raises on purpose.

    Args:
        what: What is wrong, with the actual value and the expected one.
        where: File key, `topic[partition]@offset`, policy version or similar; empty when `what` already says it.
        fix: What to do about it; empty when there is nothing to do.
    """

    def __init__(self, what: str, where: str = "", fix: str = "") -> None:
        super().__init__(what, where, fix)
        self.what, self.where, self.fix = what, where, fix

    def __str__(self) -> str:
        return "".join([self.what, f" (at {self.where})" if self.where else "", f": {self.fix}" if self.fix else ""])


class ConfigError(EsrlError):
    """A setting is unknown, malformed or impossible together with another."""


class SpecMismatch(EsrlError):
    """Features, widths or score names differ from the deployment's spec."""


class WireError(EsrlError):
    """Bytes from a topic are not a valid event; `code` is the class of the reason."""

    def __init__(self, what: str, code: Refusal) -> None:
        super().__init__(what)
        self.args, self.code = (what, code), code


class StreamError(EsrlError):
    """The stream cannot go on without losing events."""


class BrokerError(EsrlError):
    """The broker does not start, does not answer, or ended."""


class BrokerRefused(BrokerError):
    """The broker refuses our credentials or certificate, or we refuse its."""


class Fenced(EsrlError):
    """Another incarnation has committed to this step log."""


class LogError(EsrlError):
    """The step log or a state file is damaged or does not fit."""


class RequestError(EsrlError):
    """A fuse request is malformed or does not fit the deployment; `where` names the field."""


class PolicyRejected(EsrlError):
    """A policy was refused; the one that serves stays."""


class MethodError(EsrlError):
    """A method cannot learn from these steps, or there is no such method."""


class InputDataError(EsrlError):
    """A data file lacks a column or has another type than needed."""


class LearnersLost(EsrlError):
    """Learners died or diverged; the training loop rebuilds them from the newest checkpoint."""


class Diverged(LearnersLost):
    """Losses or parameters are not finite numbers."""


class LoopError(EsrlError):
    """A part of the running loop ended and cannot come back."""
