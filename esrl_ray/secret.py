"""Secrets: where they come from, and the two things that are done with keys, signatures of decision ids and pseudonyms of users."""

from __future__ import annotations

import hmac
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, SecretStr

from esrl_ray.errors import ConfigError

ENVIRONMENT = {
    "ESRL_KAFKA_PASSWORD": "kafka.sasl_password",
    "ESRL_KAFKA_KEY_PASSWORD": "kafka.ssl_key_password",
    "ESRL_BEARER_TOKEN": "serve.bearer_token",
    "ESRL_DECISION_KEYS": "serve.decision_keys",
    "ESRL_USER_KEY": "serve.user_key",
}
"""Environment variables that carry secrets, and the keys that they set; with `_FILE` appended they name a file that holds the secret."""
MASK = "*" * 10
"""How pydantic shows a secret; as a value it needs the secret in the environment: what `esrl config show` prints must not turn one off."""
TAG_DIGITS, PSEUDONYM_DIGITS = 16, 32


def _split(value: Any) -> Any:
    return value.replace(",", " ").split() if isinstance(value, str) else value


Key = Annotated[SecretStr, Field(min_length=16)]
Keys = Annotated[tuple[Key, ...], BeforeValidator(_split)]
"""Several in one text, with commas or white space between them."""


def add_secrets(tree: dict[str, Any], environment: Mapping[str, str]) -> None:
    """Put the environment's secrets into a configuration's sections, before they are validated.

    Raises:
        ConfigError: a secret stands in the tree already (files are shown around, arguments are in every process list) or its mask does and
            there is none, two sources name one, or a source cannot be read or holds nothing.
    """
    for name, key in ENVIRONMENT.items():
        section, field = key.split(".")
        inside = tree.setdefault(section, {})
        if not isinstance(inside, dict):
            continue  # validation will say so
        written = inside.pop(field, None)
        secret = _secret_of(name, key, environment)
        if written == MASK or (isinstance(written, list) and set(map(str, written)) == {MASK}):
            if not secret:
                raise ConfigError(
                    "the secret is masked, without it this would be off", key, f"set {name} or {name}_FILE, or take the key out"
                )
        elif written not in (None, "", []):
            raise ConfigError("a secret must not be written in a file or an argument", key, f"set {name} or {name}_FILE")
        if secret:
            inside[field] = secret


def _secret_of(name: str, key: str, environment: Mapping[str, str]) -> str:
    """The secret of a variable or its file; empty when neither is set."""
    secret, path = environment.get(name, ""), environment.get(f"{name}_FILE")
    if secret and path:
        raise ConfigError(f"{name} and {name}_FILE are both set", key, "unset one")
    if path:
        try:
            secret = Path(path).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{name}_FILE names {path}, which cannot be read: {type(error).__name__}", key) from None
    if (path or secret) and not secret.replace(",", " ").strip():  # a list of keys has commas
        source = f"{name}_FILE names {path}, which" if path else name
        raise ConfigError(f"{source} holds no secret", key, "write it there, or unset the variable to go without")
    return secret


def signed(decision_id: str, session_id: str, keys: Sequence[SecretStr]) -> str:
    """The decision id with a tag that only a holder of the first key can make, for this session; unchanged without keys."""
    return decision_id + _tag(decision_id, session_id, keys[0]) if keys else decision_id


def is_signed(decision_id: str, session_id: str, keys: Sequence[SecretStr]) -> bool:
    """Whether one of the keys signed this id for this session."""
    minted, tag = decision_id[:-TAG_DIGITS], decision_id[-TAG_DIGITS:].encode(errors="surrogatepass")
    return any(hmac.compare_digest(_tag(minted, session_id, key).encode(), tag) for key in keys)


def pseudonym(user_id: str, key: SecretStr | None) -> str:
    """The keyed hash that stands for a user in decisions, log and replay; the id itself without a key."""
    return user_id if key is None else _digest(f"user\0{user_id}", key)[:PSEUDONYM_DIGITS]


def _tag(decision_id: str, session_id: str, key: SecretStr) -> str:
    return _digest(f"decision\0{len(decision_id)}\0{decision_id}{session_id}", key)[:TAG_DIGITS]


def _digest(text: str, key: SecretStr) -> str:
    return hmac.digest(key.get_secret_value().encode(), text.encode(errors="surrogatepass"), "sha256").hex()
