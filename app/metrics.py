"""What operators watch, in Prometheus' terms. Counted where it happens; this file names it."""

from functools import cache

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

registry = CollectorRegistry()
# What only the database can tell, and nothing when it does not answer: old values would mislead.
database_registry = CollectorRegistry()

requests = Counter(
    "loupe_requests", "Requests answered.", ["kind", "method", "status"], registry=registry
)
request_seconds = Histogram(
    "loupe_request_seconds",
    "Time to answer a request.",
    ["kind"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
    registry=registry,
)
upload_bytes = Counter("loupe_upload_bytes", "Bytes of files stored.", registry=registry)
runs = Counter(
    "loupe_extension_attempts",
    "Attempts at extension runs by how they ended: succeeded, failed, tryagain, notnow.",
    ["extension", "outcome"],
    registry=registry,
)
provider_calls = Histogram(
    "loupe_provider_call_seconds",
    "Time of one call to a provider, by how it ended.",
    ["provider", "outcome"],
    buckets=(0.05, 0.1, 0.25, 0.5, 1, 2, 3, 5, 10),
    registry=registry,
)
reused_answers = Counter(
    "loupe_reused_answers", "Runs that a stored answer served.", ["provider"], registry=registry
)
webhook_attempts = Counter(
    "loupe_webhook_attempts",
    "Attempts to deliver a webhook by outcome: delivered, refused, failed.",
    ["outcome"],
    registry=registry,
)
database_up = Gauge(
    "loupe_database_up", "1 if the database answered this very request.", registry=registry
)
queue_depth = Gauge("loupe_queue_depth", "Pending rows.", ["queue"], registry=database_registry)
oldest_due_seconds = Gauge(
    "loupe_queue_oldest_due_seconds",
    "How long the oldest due row has waited; 0 when none waits.",
    ["queue"],
    registry=database_registry,
)
dead_deliveries = Gauge(
    "loupe_dead_deliveries", "Webhook deliveries that were given up.", registry=database_registry
)
breaker_open = Gauge(
    "loupe_provider_breaker_open",
    "1 while the provider behind an extension is held back.",
    ["extension"],
    registry=database_registry,
)


def exposition(*, is_database_up: bool) -> bytes:
    database_up.set(is_database_up)
    ours = generate_latest(registry)
    return ours + generate_latest(database_registry) if is_database_up else ours


def count_request(kind: str, method: str, status: int, seconds: float) -> None:
    counter, histogram = _of_request(kind, method, status)
    counter.inc()
    histogram.observe(seconds)


@cache  # to look up a metric by its labels takes several times as long as to count
def _of_request(kind: str, method: str, status: int) -> tuple[Counter, Histogram]:
    return requests.labels(kind, method, status), request_seconds.labels(kind)


def kind_of(path: str) -> str:
    """A request's kind: few values, whatever paths are asked for."""
    if path.startswith("/api/"):
        return "upload"
    if path.startswith("/v1/"):
        return "api"
    return "health" if path in ("/healthz", "/readyz", "/metrics") else "delivery"
