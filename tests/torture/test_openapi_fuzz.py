"""Thousands of requests made from the OpenAPI description: each answer is one that it documents."""

import random
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import httpx
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import APIOperation, Case, GenerationMode
from schemathesis.checks import CheckFunction, not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests import pictures
from tests.emulators.receiver import Receiver
from tests.torture.harness import (
    AUTH,
    ServerProcess,
    both_extensions,
    new_seed,
    report,
    running,
    size,
)

CASES = size(250, 5000)  # on each engine
CASES_AT_ONCE = size(8, 50)
MAX_ROUNDS = 20
CHECKS: list[CheckFunction] = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
# What uploads refuse for reasons that a schema cannot tell.
HARD_TO_GUESS = ("tags", "folder", "customCoordinates", "webhookUrl", "description")
Operation = APIOperation[Any, Any, Any, Any]


class Fuzz:
    """Sends cases and judges the answers.

    known: the latest ids that answers have shown, by path parameter: what is there to be found.
    """

    def __init__(self, server: ServerProcess, receiver: Receiver, chance: random.Random) -> None:
        self.statuses: dict[str, Counter[int]] = defaultdict(Counter)
        self.failures: dict[str, str] = {}
        self.known: dict[str, list[str]] = defaultdict(list)
        self._server = server
        self._receiver = receiver
        self._chance = chance
        self._session = requests.Session()
        document = strict(httpx.get(f"{server.url}/openapi.json", timeout=30).json())
        schema = schemathesis.openapi.from_dict(document)
        schema.config.update(base_url=server.url)
        self.operations = [
            found.ok() for found in schema.get_all_operations() if isinstance(found, Ok)
        ]

    @property
    def cases(self) -> int:
        return sum(counts.total() for counts in self.statuses.values())

    def run(self) -> None:
        """`CASES_AT_ONCE` good and as many bad requests to each operation that has a choice."""
        for operation in self.operations:
            if operation.path_parameters:
                self._make_something_to_find()
            has_choice = operation.body or any(operation.iter_parameters())
            for mode in GenerationMode if has_choice else [GenerationMode.POSITIVE]:
                self._run(operation, mode)

    def _make_something_to_find(self) -> None:
        """A file, runs of it that have ended, and the delivery of the slower one."""
        told = len(self._receiver.requests)
        answer = httpx.post(
            f"{self._server.url}/api/v1/files/upload",
            files={"file": ("a.jpg", pictures.dot_png())},
            data={
                "fileName": "a.jpg",
                "extensions": both_extensions(),
                "webhookUrl": self._receiver.url,
            },
            auth=AUTH,
            timeout=60,
        )
        assert answer.status_code == 200, answer.text
        self._receiver.wait_for(told + 1, timeout_seconds=60)
        for path in ("/v1/files", "/v1/extension-runs", "/v1/webhook-deliveries"):
            self._learn(httpx.get(f"{self._server.url}{path}", auth=AUTH, timeout=60).json())

    def _run(self, operation: Operation, mode: GenerationMode) -> None:

        @seed(self._chance.randrange(2**32))
        @settings(
            max_examples=CASES_AT_ONCE,
            phases=[Phase.generate],
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def send(case: Case[Any]) -> None:
            self._send(case)

        send()

    def _send(self, case: Case[Any]) -> None:
        self._lead(case)
        auth = None if self._chance.random() < 0.05 else AUTH
        answer = case.call(session=self._session, auth=auth, timeout=60)
        self.statuses[case.operation.label][answer.status_code] += 1
        try:
            case.validate_response(answer, checks=CHECKS)
        except FailureGroup as group:
            kinds = ", ".join(sorted(type(failure).__name__ for failure in group.exceptions))
            key = f"{case.operation.label} {answer.status_code} {kinds}"
            self.failures.setdefault(key, str(group))
        if answer.status_code in (200, 201) and answer.content.startswith((b"{", b"[")):
            self._learn(answer.json())

    def _lead(self, case: Case[Any]) -> None:
        """To things that exist, and to no address but the receiver's."""
        for name, known in self.known.items():
            if name in case.path_parameters and self._chance.random() < 0.7:
                case.path_parameters = {**case.path_parameters, name: self._chance.choice(known)}
        if "startDate" in case.query and self._chance.random() < 0.5:
            case.query = {"startDate": "2026-10-01", "endDate": "2026-11-01"}
        if isinstance(case.body, dict):
            body = {name: self._at_home(value) for name, value in case.body.items()}
            if "file" in body and self._chance.random() < 0.5:
                body |= {"file": pictures.dot_png(), "fileName": "a.png"}
                for name in HARD_TO_GUESS:
                    body.pop(name, None)
            case.body = body

    def _at_home(self, value: Any) -> Any:
        is_url = isinstance(value, str) and value.strip().lower().startswith("http")
        return self._receiver.url if is_url else value

    def _learn(self, found: Any) -> None:
        for item in reversed(found if isinstance(found, list) else [found]):
            if "runId" in item:
                self._remember("delivery_id", item["id"])
                self._remember("run_id", item["runId"])
            elif "versionId" in item:
                self._remember("run_id", item["id"])
            elif "fileId" in item:
                self._remember("file_id", item["fileId"])

    def _remember(self, name: str, value: str) -> None:
        known = self.known[name]
        if value in known:
            known.remove(value)
        known.append(value)
        del known[:-5]


def strict(document: dict[str, Any]) -> dict[str, Any]:
    """Also a key that is not documented is then a violation."""
    for schema in document["components"]["schemas"].values():
        schema.setdefault("additionalProperties", False)
    return document


def test_every_answer_is_as_openapi_describes_it(tmp_path: Path, database_url: str) -> None:
    chance = new_seed("openapi fuzz")
    server = ServerProcess(
        tmp_path,
        database_url,
        LOUPE_SYNC_BUDGET_SECONDS="0.2",
        LOUPE_LOCAL_DELAY_SECONDS="aws-auto-tagging=0.3",
    )
    with Receiver() as receiver, running(server):
        fuzz = Fuzz(server, receiver, chance)
        for _ in range(MAX_ROUNDS):
            fuzz.run()
            if fuzz.cases >= CASES:
                break
        for name, statuses in fuzz.statuses.items():
            report(f"  {name}", **{str(status): n for status, n in sorted(statuses.items())})
        report(
            "openapi fuzz",
            operations=len(fuzz.statuses),
            cases=fuzz.cases,
            violations=len(fuzz.failures),
        )
        assert not fuzz.failures, "\n\n".join([*fuzz.failures, *list(fuzz.failures.values())[:3]])
        assert fuzz.cases >= CASES
        served = {name for name, seen in fuzz.statuses.items() if seen.keys() & {200, 201, 204}}
        assert served == {operation.label for operation in fuzz.operations}
        assert "unexpected error" not in server.log.read_text()
        assert server.stop() == 0
