"""Extension runs through HTTP: listed, read, retried."""

from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta

import httpx
import pytest
from pydantic import TypeAdapter

from app.operations.schemas import RunObject
from tests.conftest import Serve
from tests.emulators.receiver import Receiver
from tests.operations.support import AWS, GOOGLE, PICTURE, UNKNOWN_ID, get, refusal, until, upload
from tests.server import LoupeServer

RUNS = "/v1/extension-runs"


@pytest.fixture
def tagging(serve: Serve) -> LoupeServer:
    """Both extensions by the `local` tagger, which knows no breaker and no cap."""
    return serve(google_auto_tagging="local", aws_auto_tagging="local", sync_budget_seconds=20)


def fail_with(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    monkeypatch.setenv("LOUPE_LOCAL_FAULT", fault)


def test_run_says_everything_about_itself(tagging: LoupeServer) -> None:
    file_id = upload(tagging, webhookUrl="http://127.0.0.1:9999/hook?a=b")["fileId"]
    (listed,) = get(tagging, RUNS)
    run = get(tagging, f"{RUNS}/{listed['id']}")
    assert run == listed
    assert list(run) == list(RunObject.model_json_schema()["properties"])
    TypeAdapter(RunObject).validate_python(run)
    expected = {
        "fileId": file_id,
        "versionId": file_id,
        "extension": GOOGLE,
        "number": 1,
        "status": "success",
        "reason": None,
        "attempts": 1,
        "lastError": None,
        "nextAttemptAt": None,
        "provider": "local",
        "minConfidence": 5,
        "maxTags": 3,
        "webhookUrl": "http://127.0.0.1:9999/hook?a=b",
        "announced": False,
    }
    assert {key: run[key] for key in expected} == expected
    lifetime = datetime.fromisoformat(run["deadline"]) - datetime.fromisoformat(run["createdAt"])
    assert abs(lifetime - timedelta(hours=24)) < timedelta(minutes=1)


def test_pending_run_says_why_and_when_it_is_tried_again(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_with(monkeypatch, "throttled")
    server = serve(google_auto_tagging="local")
    assert upload(server)["extensionStatus"] == {GOOGLE: "pending"}
    (run,) = get(server, RUNS, status="pending")
    assert (run["status"], run["reason"]) == ("pending", "provider_throttled")
    assert run["lastError"]
    assert run["nextAttemptAt"] >= run["createdAt"]
    assert run["finishedAt"] is None
    assert run["announced"]


def test_runs_are_listed_newest_first_in_pages(tagging: LoupeServer) -> None:
    files = [upload(tagging)["fileId"] for _ in range(5)]
    assert [run["fileId"] for run in get(tagging, RUNS)] == files[::-1]
    page = get(tagging, RUNS, limit=2, skip=1)
    assert [run["fileId"] for run in page] == [files[3], files[2]]
    assert get(tagging, RUNS, skip=5) == []


def test_runs_are_filtered_by_status_extension_and_file(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_with(monkeypatch, f"{AWS}=image_rejected")
    server = serve(google_auto_tagging="local", aws_auto_tagging="local", sync_budget_seconds=20)
    first, second = (upload(server, GOOGLE, AWS)["fileId"] for _ in range(2))

    def found(**query: str) -> list[tuple[str, str]]:
        return sorted((run["fileId"], run["extension"]) for run in get(server, RUNS, **query))

    assert found(status="failed") == [(first, AWS), (second, AWS)]
    assert found(extension=GOOGLE) == [(first, GOOGLE), (second, GOOGLE)]
    assert found(fileId=first) == [(first, AWS), (first, GOOGLE)]
    assert found(fileId=first, status="success", extension=GOOGLE) == [(first, GOOGLE)]
    assert found(fileId=first, status="success", extension=AWS) == []
    assert found(fileId=UNKNOWN_ID) == []


WRONG_QUERIES: list[tuple[dict[str, str | int], str]] = [
    ({"limit": 0}, "Minimum value of limit parameter is 1. Value sent is 0."),
    ({"limit": 1001}, "Maximum value of limit parameter is 1000. Value sent is 1001."),
    (
        {"skip": -1},
        "The value of skip parameter should be greater than or equal to 0. Value sent is -1.",
    ),
    (
        {"status": "done"},
        "Your request contains invalid value for status parameter. "
        "Please provide one of the following: pending, success, failed.",
    ),
    (
        {"extension": "remove-bg"},
        "Your request contains invalid value for extension parameter. "
        f"Please provide one of the following: {GOOGLE}, {AWS}.",
    ),
    ({"fileId": "x"}, "Your request contains invalid fileId parameter."),
]


def test_wrong_query_is_refused_by_name(server: LoupeServer) -> None:
    for query, message in WRONG_QUERIES:
        assert refusal(server, RUNS, **query) == (400, message)


def test_unknown_and_malformed_ids_are_told_apart(server: LoupeServer) -> None:
    unknown = (404, "The requested extension run does not exist.")
    malformed = (400, "Your request contains invalid runId parameter.")
    assert refusal(server, f"{RUNS}/{UNKNOWN_ID}") == unknown
    assert refusal(server, f"{RUNS}/{UNKNOWN_ID.replace('0', 'F')}") == malformed
    assert server.client.post(f"{RUNS}/{UNKNOWN_ID}/retry").status_code == 404
    assert server.client.post(f"{RUNS}/x/retry").status_code == 400


def test_nobody_sees_runs_without_the_private_key(server: LoupeServer) -> None:
    for method, path in (
        ("GET", RUNS),
        ("GET", f"{RUNS}/{UNKNOWN_ID}"),
        ("POST", f"{RUNS}/{UNKNOWN_ID}/retry"),
    ):
        assert httpx.request(method, server.url + path).status_code == 401
        wrong = httpx.request(method, server.url + path, auth=("private_wrong", ""))
        assert wrong.status_code == 403


def retry(server: LoupeServer, run_id: str) -> httpx.Response:
    return server.client.post(f"{RUNS}/{run_id}/retry")


def test_retry_is_a_new_run_with_its_own_event_and_the_old_one_stands(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_with(monkeypatch, "image_rejected")
    with Receiver() as receiver:
        failing = serve(google_auto_tagging="local", webhook_on="all", sync_budget_seconds=20)
        uploaded = upload(failing, webhookUrl=receiver.url_for("/hook"))
        assert uploaded["extensionStatus"] == {GOOGLE: "failed"}
        receiver.wait_for(1)
        failing.stop()
        monkeypatch.delenv("LOUPE_LOCAL_FAULT")
        server = serve(google_auto_tagging="local")
        (old,) = get(server, RUNS)
        answer = retry(server, old["id"])
        assert answer.status_code == 201, answer.text
        new = answer.json()
        TypeAdapter(RunObject).validate_python(new)
        copied = ("fileId", "versionId", "extension", "minConfidence", "maxTags", "webhookUrl")
        assert {key: new[key] for key in copied} == {key: old[key] for key in copied}
        assert (new["number"], new["status"], new["attempts"]) == (2, "pending", 0)
        assert new["announced"]
        assert new["requestId"] == answer.headers["x-ik-requestid"] != old["requestId"]
        told = receiver.wait_for(2)
    assert [event.json()["status"] for event in told] == ["FAILURE", "SUCCESS"]
    assert told[0].headers["webhook-id"] != told[1].headers["webhook-id"]
    assert get(server, f"{RUNS}/{old['id']}") == old
    assert get(server, f"{RUNS}/{new['id']}")["status"] == "success"
    assert server.details(uploaded["fileId"])["AITags"]


def test_run_that_succeeded_may_be_run_again(tagging: LoupeServer) -> None:
    upload(tagging)
    (old,) = get(tagging, RUNS)
    new = retry(tagging, old["id"]).json()
    until(lambda: get(tagging, f"{RUNS}/{new['id']}")["status"] == "success")


def test_pending_run_cannot_be_retried(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, "throttled")
    server = serve(google_auto_tagging="local")
    upload(server)
    (run,) = get(server, RUNS)
    answer = retry(server, run["id"])
    assert answer.status_code == 409
    assert answer.headers["x-should-retry"] == "false"
    assert answer.json()["message"] == ("The extension run cannot be retried: it is still pending.")
    assert len(get(server, RUNS)) == 1


def test_run_on_a_version_that_was_replaced_cannot_be_retried(tagging: LoupeServer) -> None:
    for _ in range(2):
        upload(tagging, useUniqueFileName="false")
    newest, oldest = get(tagging, RUNS)
    answer = retry(tagging, oldest["id"])
    assert answer.status_code == 409
    assert answer.headers["x-should-retry"] == "false"
    assert "newer version" in answer.json()["message"]
    assert retry(tagging, newest["id"]).status_code == 201


def test_run_outlives_its_file_but_cannot_be_retried(tagging: LoupeServer) -> None:
    file_id = upload(tagging)["fileId"]
    (run,) = get(tagging, RUNS)
    assert tagging.client.delete(f"/v1/files/{file_id}").status_code == 204
    assert get(tagging, f"{RUNS}/{run['id']}") == run
    assert get(tagging, RUNS, fileId=file_id) == [run]
    answer = retry(tagging, run["id"])
    assert answer.status_code == 409
    assert "deleted" in answer.json()["message"]


def test_retries_at_once_are_numbered_apart(tagging: LoupeServer) -> None:
    upload(tagging)
    (run,) = get(tagging, RUNS)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: retry(tagging, run["id"]), range(8)))
    assert [answer.status_code for answer in answers] == [201] * 8
    assert sorted(answer.json()["number"] for answer in answers) == list(range(2, 10))


def test_upload_after_a_retry_goes_on_counting(tagging: LoupeServer) -> None:
    file_id = upload(tagging)["fileId"]
    (run,) = get(tagging, RUNS)
    retry(tagging, run["id"])
    extensions = [{"name": GOOGLE, "minConfidence": 5, "maxTags": 3}]
    path = f"/v1/files/{file_id}/details"
    assert tagging.client.patch(path, json={"extensions": extensions}).status_code == 200
    assert [run["number"] for run in get(tagging, RUNS)] == [3, 2, 1]


def test_file_without_extensions_has_no_run(server: LoupeServer) -> None:
    assert server.upload(PICTURE).status_code == 200
    assert get(server, RUNS) == []
