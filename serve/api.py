"""The HTTP surface: a FastAPI application around one `Replica`. msgspec decodes the bodies; their schemas are put into /openapi.json."""

from __future__ import annotations

import hmac
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response

from esrl_ray.errors import RequestError
from esrl_ray.telemetry import Telemetry
from serve.replica import Replica
from serve.schemas import MAX_BODY_BYTES, FuseReply, FuseRequest, PolicyReply, Refusal

JSON = "application/json"
MAX_TOLD = 500  # letters of a refusal: names in it are the sender's
_encoder = msgspec.json.Encoder()


class Application(FastAPI):
    """FastAPI whose document names the msgspec types."""

    components: dict[str, Any]

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document."""
        document = super().openapi()
        document.setdefault("components", {}).setdefault("schemas", {}).update(self.components)
        return document


def application(replica: Replica, telemetry: Telemetry | None) -> Application:
    """The application of one replica; its lifespan stops the replica.

    Args:
        replica: Started.
        telemetry: Metrics of this process, or None.
    """
    schemas, components = msgspec.json.schema_components(
        [FuseRequest, FuseReply, PolicyReply, Refusal], ref_template="#/components/schemas/{name}"
    )
    request, reply, policy_reply, refusal = schemas
    token = replica.config.serve.bearer_token
    expected = f"Bearer {token.get_secret_value()}".encode() if token is not None else None

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await replica.stop()

    app = Application(title="esrl-ray", version="1", description=_names(replica), lifespan=lifespan)
    app.components = components

    def refuse(status: int, error: str, field: str) -> Response:
        return answer(Refusal(error[:MAX_TOLD], field[:MAX_TOLD]), status)

    def answer(content: object, status: int = 200) -> Response:
        headers = {"x-policy-version": str(replica.version), "x-replica": replica.name}
        return Response(_encoder.encode(content), status, headers, JSON)

    def allowed(http: Request) -> bool:
        return expected is None or hmac.compare_digest(http.headers.get("authorization", "").encode(), expected)

    @app.post(
        "/v1/fuse",
        summary="Rank the candidates of one list request",
        responses={
            200: _body("The ranking", reply),
            401: _body("No or wrong bearer token", refusal),
            413: _body("Body too large", refusal),
            422: _body("Bad input", refusal),
        },
        openapi_extra={"requestBody": {"required": True, "content": {JSON: {"schema": request}}}},
        response_class=Response,
    )
    async def fuse(http: Request) -> Response:
        start = time.perf_counter()
        if not allowed(http):
            return refuse(401, "a bearer token is needed", "authorization")
        body = await _read(http)
        if body is None:
            return refuse(413, f"more than {MAX_BODY_BYTES} bytes", "body")
        try:
            fused = replica.fuse(body)
        except RequestError as error:
            if telemetry is not None:
                telemetry.count("esrl_request_handled_total", arm="none", status="422")
            return refuse(422, error.what, error.where)
        if telemetry is not None:
            telemetry.count("esrl_request_handled_total", arm=fused.arm, status="200")
            telemetry.observe("esrl_request_latency_seconds", time.perf_counter() - start)
        response = answer(fused)
        response.headers["x-policy-version"] = str(fused.policy_version)  # the one that decided, should a swap have come between
        return response

    @app.get(
        "/v1/policy",
        summary="What this replica serves",
        responses={200: _body("The policy", policy_reply), 401: _body("No or wrong bearer token", refusal)},
        response_class=Response,
    )
    async def policy(http: Request) -> Response:
        return answer(replica.policy()) if allowed(http) else refuse(401, "a bearer token is needed", "authorization")

    @app.get("/healthz", summary="Does this replica serve?", response_class=Response)
    async def healthz() -> Response:
        return answer({"status": "ok"})

    return app


def _body(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {JSON: {"schema": schema}}}


def _names(replica: Replica) -> str:
    """The deployment's names in order, for people who write a request."""
    spec, serve = replica.spec, replica.config.serve
    lines = [
        f"user_features: {', '.join(spec.user_features) or 'none'}",
        f"context_features: {', '.join(spec.context_features) or 'none'}",
        f"candidates[].features: {', '.join(spec.item_features) or 'none'}",
        f"candidates[].scores: {', '.join(spec.scores)}",
        *(f"categorical, {feature.side}: {feature.name} 0..{feature.cardinality - 1}" for feature in spec.categorical_features),
        f"at most {serve.max_candidates} candidates; list_size 1 to {replica.config.max_pairs}, default {serve.list_size}",
    ]
    return "Values of this deployment, in order:\n\n" + "\n".join(f"- {line}" for line in lines)


async def _read(http: Request) -> bytes | None:
    """The body; None when it is too large."""
    chunks, size = [], 0
    async for chunk in http.stream():
        size += len(chunk)
        if size > MAX_BODY_BYTES:
            return None
        chunks.append(chunk)
    return b"".join(chunks)
