"""Coverage-guided fuzzing of both borders: events from Kafka and bodies of HTTP. Needs atheris (Linux), which is not in the lock.

    .venv/bin/pip install atheris; .venv/bin/python -m benchmarks.fuzz -max_total_time=300

The arguments are libFuzzer's. It ends with an error at the first exception that is not the border's own, at 1 GiB of memory or at an
input that takes 5 s, and leaves that input in the current folder.
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import atheris
import msgspec

with atheris.instrument_imports(include=["streaming.wire", "serve.schemas", "serve.explain"]):
    from serve.schemas import parse
    from streaming.wire import JSON, MSGPACK, decode_decision, decode_feedback

from esrl_ray.config import load_config
from esrl_ray.errors import RequestError, WireError
from tests.unit.test_schemas import CONFIG, request
from tests.unit.test_wire import FEEDBACK, decision

DEMO = load_config("configs/demo.yaml")
SPEC, SERVED = DEMO.spec.build(), CONFIG.spec.build()
SEEDS = (FEEDBACK, decision(DEMO), request())


def one(payload: bytes) -> None:
    """Any bytes, at every border."""
    for content_type in (JSON, MSGPACK):
        with suppress(WireError):
            decode_feedback(payload, content_type)
        with suppress(WireError):
            decode_decision(payload, SPEC, content_type)
    with suppress(RequestError):
        parse(payload, SERVED, CONFIG)


def main() -> None:
    """Run libFuzzer, which ends the process."""
    corpus = Path(tempfile.mkdtemp())
    for i, event in enumerate(SEEDS):
        (corpus / f"{i}.json").write_bytes(msgspec.json.encode(event))
        (corpus / f"{i}.msgpack").write_bytes(msgspec.msgpack.encode(event))
    atheris.Setup([sys.argv[0], "-rss_limit_mb=1024", "-timeout=5", "-max_len=20000", *sys.argv[1:], str(corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
