"""For those who operate a server, or wonder where their tags are: runs, deliveries, usage."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from app.db import Database
from app.errors import BadRequest, JsonResponse
from app.extensions.schemas import EXTENSIONS
from app.files.openapi import identifier
from app.files.routes import KeyedRoute, check_page, read_body
from app.files.service import check_file_id
from app.logs import request_id
from app.operations import openapi
from app.operations.deliveries import (
    check_delivery_id,
    list_deliveries,
    read_delivery,
    replay_dead,
    replay_delivery,
)
from app.operations.runs import check_run_id, list_runs, read_run, retry_run
from app.operations.schemas import (
    DELIVERY_STATUSES,
    RUN_STATUSES,
    DeliveryQuery,
    ReplayRequest,
    RunQuery,
    UsageQuery,
)
from app.operations.usage import account_usage, parse_days


@dataclass(frozen=True, slots=True)
class Operations:
    """on_due_run, on_delivery: wake the loops that take what has just become due."""

    db: Database
    on_due_run: Callable[[], None]
    on_delivery: Callable[[], None]


def _operations(request: Request) -> Operations:
    operations: Operations = request.app.state.operations
    return operations


RunId = Annotated[str, identifier("A run's `id`.")]
DeliveryId = Annotated[str, identifier("A delivery's `id`.", prefix="evt_")]

router = APIRouter(prefix="/v1", route_class=KeyedRoute)
_RUNS = "/extension-runs"
_DELIVERIES = "/webhook-deliveries"


def _check_choice(parameter: str, value: str | None, known: tuple[str, ...]) -> None:
    if value is not None and value not in known:
        raise BadRequest(
            f"Your request contains invalid value for {parameter} parameter. "
            f"Please provide one of the following: {', '.join(known)}."
        )


def _check_run_query(query: RunQuery) -> None:
    check_page(query.skip, query.limit)
    _check_choice("status", query.status, RUN_STATUSES)
    _check_choice("extension", query.extension, EXTENSIONS)
    if query.file_id is not None:
        check_file_id(query.file_id)


@router.get(_RUNS, tags=["Extension runs"], **openapi.LIST_RUNS)
async def list_extension_runs(request: Request, query: Annotated[RunQuery, Query()]) -> Response:
    """Runs of all files, deleted ones among them: an array, newest first."""
    _check_run_query(query)
    return JsonResponse(await _operations(request).db.scan(list_runs, query))


@router.get(f"{_RUNS}/{{run_id}}", tags=["Extension runs"], **openapi.READ_RUN)
async def extension_run(request: Request, run_id: RunId) -> Response:
    """One run, whether or not its file still exists."""
    check_run_id(run_id)
    return JsonResponse(await _operations(request).db.read(read_run, run_id))


@router.post(f"{_RUNS}/{{run_id}}/retry", tags=["Extension runs"], **openapi.RETRY_RUN)
async def retry_extension_run(request: Request, run_id: RunId) -> Response:
    """Starts a new run of the same extension with the same limits and webhook, in the background.

    The old run stands as it is. The new one has a number, a deadline and an event of its own.
    """
    check_run_id(run_id)
    operations = _operations(request)
    run = await operations.db.write(retry_run, run_id, request_id())
    operations.on_due_run()
    return JsonResponse(run, 201)


def _check_delivery_query(query: DeliveryQuery) -> None:
    check_page(query.skip, query.limit)
    _check_choice("status", query.status, DELIVERY_STATUSES)
    if query.host is not None and "\0" in query.host:
        raise BadRequest("Your request contains invalid host parameter.")
    if query.run_id is not None:
        check_run_id(query.run_id)


@router.get(_DELIVERIES, tags=["Webhook deliveries"], **openapi.LIST_DELIVERIES)
async def list_webhook_deliveries(
    request: Request, query: Annotated[DeliveryQuery, Query()]
) -> Response:
    """Deliveries without their bodies: an array, newest first."""
    _check_delivery_query(query)
    return JsonResponse(await _operations(request).db.scan(list_deliveries, query))


@router.get(f"{_DELIVERIES}/{{delivery_id}}", tags=["Webhook deliveries"], **openapi.READ_DELIVERY)
async def webhook_delivery(request: Request, delivery_id: DeliveryId) -> Response:
    """One delivery with its body and every attempt at it."""
    check_delivery_id(delivery_id)
    return JsonResponse(await _operations(request).db.read(read_delivery, delivery_id))


@router.post(
    f"{_DELIVERIES}/{{delivery_id}}/replay", tags=["Webhook deliveries"], **openapi.REPLAY_DELIVERY
)
async def replay_webhook_delivery(request: Request, delivery_id: DeliveryId) -> Response:
    """Sends the same event once more: same id, same body, for up to 24 hours from now."""
    check_delivery_id(delivery_id)
    operations = _operations(request)
    delivery = await operations.db.write(replay_delivery, delivery_id)
    operations.on_delivery()
    return JsonResponse(delivery)


@router.post(f"{_DELIVERIES}/replay", tags=["Webhook deliveries"], **openapi.REPLAY_DEAD)
async def replay_dead_webhook_deliveries(request: Request) -> Response:
    """Sends all dead deliveries again that were created in a range of time."""
    wanted = ReplayRequest.parse(await read_body(request))
    operations = _operations(request)
    replayed, last = 0, ""
    while ids := await operations.db.write(replay_dead, wanted.begin, wanted.end, last):
        replayed, last = replayed + len(ids), ids[-1]
        operations.on_delivery()
    return JsonResponse({"replayed": replayed})


@router.get("/accounts/usage", tags=["Account"], **openapi.USAGE)
async def usage_of_account(request: Request, query: Annotated[UsageQuery, Query()]) -> Response:
    """Calls to providers in some days, and what is stored now."""
    days = parse_days(query.start_date, query.end_date)
    return JsonResponse(await _operations(request).db.scan(account_usage, *days))
