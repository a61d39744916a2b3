"""A client that survives what happens to an endpoint: reloads of the proxy, killed replicas, restarts."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import aiohttp
import msgspec

from esrl_ray.errors import RequestError
from serve.schemas import FuseReply, FuseRequest, PolicyReply, Refusal

BACKOFF_S = (0.1, 0.5, 1.0)
"""Waits before the second try and after; a proxy needs about 0.3 s to find that a replica is gone."""


class FuseClient:
    """Sends list requests and tries again when there is no 200. Use it as an async context manager.

    A retry carries the same request_id; when both tries were decided, the join drops the decision that is never shown.

    Args:
        url: Of the endpoint, such as `http://127.0.0.1:8000`.
        token: Bearer token.
        tries: A request failed when the client has no 200 after so many.
        timeout_s: Of one try.
    """

    def __init__(self, url: str, *, token: str | None = None, tries: int = 3, timeout_s: float = 5.0) -> None:
        self._url, self._tries = url.rstrip("/"), tries
        self._headers = {"content-type": "application/json", **({"authorization": f"Bearer {token}"} if token else {})}
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._session: aiohttp.ClientSession | None = None
        self._reply = msgspec.json.Decoder(FuseReply)
        self.requests = 0
        self.attempts = 0
        self.failed = 0  # without a 200 after all tries

    async def __aenter__(self) -> Self:
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=30.0)
        self._session = aiohttp.ClientSession(connector=connector, timeout=self._timeout, headers=self._headers)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._session is not None
        await self._session.close()

    async def fuse(self, request: FuseRequest | Mapping[str, Any] | bytes) -> tuple[FuseReply, Mapping[str, str]]:
        """Rank the candidates of one request.

        Args:
            request: The struct, a mapping of the same form, or its JSON.

        Returns:
            The reply and its headers (`x-policy-version`, `x-replica`).

        Raises:
            RequestError: 422; trying again would not help, and it does not count as failed.
            aiohttp.ClientError: no 200 after all tries.
        """
        body = request if isinstance(request, bytes) else msgspec.json.encode(request)
        self.requests += 1
        for attempt in range(1, self._tries + 1):
            self.attempts += 1
            try:
                return await self._once(body)
            except (aiohttp.ClientError, TimeoutError) as error:
                if attempt == self._tries:
                    self.failed += 1
                    if isinstance(error, aiohttp.ClientError):
                        raise
                    raise aiohttp.ServerTimeoutError(f"no reply from {self._url} within {self._timeout.total} s") from error
            await asyncio.sleep(BACKOFF_S[min(attempt, len(BACKOFF_S)) - 1])
        raise AssertionError("tries must be positive")

    async def _once(self, body: bytes) -> tuple[FuseReply, Mapping[str, str]]:
        assert self._session is not None, "use the client as an async context manager"
        async with self._session.post(f"{self._url}/v1/fuse", data=body) as response:
            content = await response.read()
            if response.status == 422:
                refusal = msgspec.json.decode(content, type=Refusal)
                raise RequestError(refusal.error, refusal.field)
            response.raise_for_status()
            return self._reply.decode(content), response.headers

    async def policy(self) -> PolicyReply:
        """What the replica that answers serves.

        Raises:
            aiohttp.ClientError: no 200.
        """
        assert self._session is not None, "use the client as an async context manager"
        async with self._session.get(f"{self._url}/v1/policy") as response:
            response.raise_for_status()
            return msgspec.json.decode(await response.read(), type=PolicyReply)
