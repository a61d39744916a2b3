"""Signatures of decision ids and pseudonyms of users."""

from __future__ import annotations

import asyncio
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from esrl_ray.exploration import arm_of
from esrl_ray.secret import PSEUDONYM_DIGITS, TAG_DIGITS, is_signed, pseudonym, signed
from tests.unit.test_replica import BODY, deployment, replica_of, store_of
from tests.unit.test_sessions import decision, feedback
from tests.unit.worker_world import CONFIG, World

NEW, OLD, OTHER = (SecretStr(letter * 16) for letter in "abc")


@given(st.text(min_size=1, max_size=40), st.text(max_size=40))
def test_what_one_of_the_keys_signed_is_accepted_and_nothing_else(minted: str, session: str) -> None:
    decision_id = signed(minted, session, [OLD])
    assert len(decision_id) == len(minted) + TAG_DIGITS and decision_id.startswith(minted)
    assert is_signed(decision_id, session, [NEW, OLD])
    for forged, where in (
        (decision_id, session + "x"),
        (minted, session),
        (signed(minted, session, [OTHER]), session),
        (minted + "x" + decision_id[len(minted) :], session),
        (decision_id[:-1] + ("0" if decision_id[-1] != "0" else "1"), session),
        ("", session),
        ("ü" * 20, session),
    ):
        assert not is_signed(forged, where, [NEW, OLD])


def test_an_id_and_its_session_cannot_trade_letters() -> None:
    tag = signed("ab", "c", [NEW])[2:]
    assert not is_signed("a" + tag, "bc", [NEW])


def test_the_first_key_signs_and_without_keys_nothing_changes() -> None:
    assert signed("d", "s", [NEW, OLD]) == signed("d", "s", [NEW]) != signed("d", "s", [OLD])
    assert signed("d", "s", []) == "d"


def test_a_pseudonym_is_stable_and_needs_the_key() -> None:
    assert pseudonym("u", NEW) == pseudonym("u", NEW) != pseudonym("v", NEW)
    assert pseudonym("u", NEW) != pseudonym("u", OLD)
    assert len(pseudonym("u", NEW)) == PSEUDONYM_DIGITS and pseudonym("u", None) == "u"


def test_serving_signs_what_it_mints_and_logs_the_pseudonym_and_its_arm(tmp_path: Path) -> None:
    config = deployment(tmp_path)
    config = config.model_copy(update={"serve": config.serve.model_copy(update={"decision_keys": (NEW, OLD), "user_key": OTHER})})

    async def scenario() -> None:
        replica, producer = replica_of(config, store_of(config))
        await replica.start()
        reply = replica.fuse(BODY)
        (sent,) = producer.sent
        assert sent.decision_id == reply.decision_id and is_signed(reply.decision_id, sent.session_id, [NEW])
        assert sent.user_id == pseudonym("u", OTHER) and sent.arm == reply.arm == arm_of(sent.user_id, config.exploration).value
        await replica.stop()

    asyncio.run(scenario())


def test_with_a_key_what_serving_did_not_sign_for_this_session_is_a_dead_letter() -> None:
    keyed = CONFIG.model_copy(update={"serve": CONFIG.serve.model_copy(update={"decision_keys": (NEW, OLD)})})
    world, ours = World(), signed("d", "s", [OLD])
    world.write(decision(ours, 0))
    world.write(feedback(ours, "shown", 0.1))
    world.write(feedback(ours, "click", 0.2, item="i0"))
    world.write(feedback("d", "click", 0.2, item="i0"))  # without a tag
    world.write(feedback(ours, "click", 0.2, item="i0", session="other"))  # of somebody else's session
    world.write(decision(signed("forged", "s", [OTHER]), 0))
    worker = world.worker(config=keyed)
    assert worker.drain(world.ends, 60.0)
    status = worker.status()
    assert status["refusals"] == {"decisions": {"not-signed": 1}, "feedback": {"not-signed": 2}}
    assert status["steps_closed"] == 1 and status["ledger"]["feedback"]["joined"] == 2
    assert all("is not signed for session" in reason and NEW.get_secret_value() not in reason for reason in world.dead.values())
