"""Each row of the table of outcomes, from the request to the webhook, with the vendors' real
client libraries against emulators."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import create_engine, delete, text, update
from sqlalchemy.pool import NullPool

from app import jobs
from app.clock import Clock
from app.db import Tx
from app.extensions import tagger
from app.extensions.models import provider_states, runs
from app.extensions.runs import start_runs
from app.extensions.schemas import AWS, GOOGLE, parse_extensions
from tests import pictures
from tests.conftest import Serve
from tests.emulators.receiver import Receiver
from tests.emulators.rekognition import RekognitionEmulator
from tests.emulators.vision import VisionEmulator
from tests.files.support import (
    ENGINES,
    LONG_SECONDS,
    SHORT_SECONDS,
    SetClock,
    Stand,
    Vendor,
    Way,
    all_deliveries,
    all_runs,
    ask_by,
    asking,
    deliveries_of,
    make_due,
    overwrite,
    patch,
    run_of,
    runs_of,
    set_vendors,
    standing,
    tags,
    upload,
    wait_for_status,
    wait_until,
    wait_until_final,
    wake,
)
from tests.server import LoupeServer
from tests.test_db import on_sqlite

CAT_AND_ANIMAL = [("Cat", 98.5), ("Animal", 97.25)]


@pytest.fixture(scope="module", params=ENGINES)
def module_stand(request: pytest.FixtureRequest) -> Iterator[Stand]:
    with standing(request) as stand:
        yield stand


@pytest.fixture
def stand(module_stand: Stand) -> Iterator[Stand]:
    yield module_stand
    module_stand.reset()


@pytest.fixture(params=[GOOGLE, AWS])
def vendor(request: pytest.FixtureRequest, stand: Stand) -> Vendor:
    return stand.vendor(request.param)


@pytest.fixture
def either(stand: Stand) -> Vendor:
    """Where the vendor does not matter: one on each database."""
    return stand.vendor(GOOGLE if stand.engine == "sqlite" else AWS)


@pytest.fixture(params=["upload", "update"])
def way(request: pytest.FixtureRequest) -> Way:
    chosen: Way = request.param
    return chosen


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as receiver:
        yield receiver


def success(extension: str, details: dict[str, Any]) -> dict[str, Any]:
    return {"service": extension, "status": "SUCCESS", "fileObject": details}


def status_in(answer: dict[str, Any]) -> str:
    """Of the only extension that was asked for."""
    [status] = answer["extensionStatus"].values()
    return str(status)


def assert_failure(body: dict[str, Any], extension: str, file_id: str, reason: str) -> None:
    message = body["error"].pop("message")
    assert body == {
        "service": extension,
        "status": "FAILURE",
        "fileId": file_id,
        "error": {"reason": reason},
    }
    assert message.endswith(".")


# Answered within the budget


def test_answer_within_budget_is_success_with_tags_and_no_webhook(
    stand: Stand, vendor: Vendor, way: Way, receiver: Receiver
) -> None:
    answer = ask_by(way, stand.patient, vendor.extension, webhook_url=receiver.url)
    assert answer["extensionStatus"] == {vendor.extension: "success"}
    assert answer["AITags"] == tags(vendor.extension, *CAT_AND_ANIMAL)
    assert stand.patient.details(answer["fileId"])["AITags"] == answer["AITags"]
    assert len(vendor.emulator.calls) == 1
    assert not deliveries_of(stand.patient, answer["fileId"])


def test_run_is_recorded_with_provider_and_time(stand: Stand, vendor: Vendor) -> None:
    answer = upload(stand.patient, vendor.extension)
    run = run_of(stand.patient, answer["fileId"])
    assert run.provider in vendor.setting.values()
    assert run.elapsed_ms >= 0
    assert (run.status, run.reason, run.attempts, run.lease_until) == ("success", None, 1, None)


def test_no_label_that_passes_is_success_without_tags(
    stand: Stand, vendor: Vendor, receiver: Receiver
) -> None:
    vendor.emulator.labels = []
    answer = upload(stand.patient, vendor.extension, webhook_url=receiver.url)
    assert status_in(answer) == "success"
    assert answer["AITags"] is None
    assert stand.patient.details(answer["fileId"])["AITags"] is None
    assert not deliveries_of(stand.patient, answer["fileId"])


def test_limits_are_each_runs_own(stand: Stand) -> None:
    wanted = [
        {"name": GOOGLE, "minConfidence": 98.5, "maxTags": 30},
        {"name": AWS, "minConfidence": 0, "maxTags": 1},
    ]
    answer = upload(stand.patient, extensions=json.dumps(wanted))
    assert answer["AITags"] == tags(AWS, ("Cat", 98.5)) + tags(GOOGLE, ("Cat", 98.5))


def test_both_extensions_run_side_by_side_on_one_and_the_same_picture(stand: Stand) -> None:
    stand.vision.hold()
    stand.rekognition.hold()
    with ThreadPoolExecutor(1) as thread:
        answer = thread.submit(upload, stand.patient, GOOGLE, AWS)
        stand.vision.wait_for_calls(1)
        stand.rekognition.wait_for_calls(1)
        stand.vision.release()
        stand.rekognition.release()
        assert answer.result(LONG_SECONDS)["extensionStatus"] == {GOOGLE: "success", AWS: "success"}
    assert stand.vision.calls[0].image == stand.rekognition.calls[0].image


@pytest.mark.parametrize("outcome", ["success", "failed"])
def test_with_all_set_a_result_within_the_budget_gets_a_webhook_too(
    stand: Stand, either: Vendor, receiver: Receiver, outcome: str
) -> None:
    server = stand.talkative
    either.emulator.fault = None if outcome == "success" else "image_rejected"
    answer = upload(server, either.extension, webhook_url=receiver.url)
    assert status_in(answer) == outcome
    [told] = receiver.wait_for(1)
    if outcome == "success":
        assert told.json() == success(either.extension, server.details(answer["fileId"]))
    else:
        assert_failure(told.json(), either.extension, answer["fileId"], "image_rejected")
    wait_until_final(server)
    assert len(receiver.requests) == 1


# Still running at the budget's end


def test_straggler_is_pending_then_the_same_call_ends_in_a_webhook_of_success(
    stand: Stand, vendor: Vendor, way: Way, receiver: Receiver
) -> None:
    server = stand.hasty
    vendor.emulator.hold()
    answer = ask_by(way, server, vendor.extension, webhook_url=receiver.url)
    assert answer["extensionStatus"] == {vendor.extension: "pending"}
    assert answer["AITags"] is None
    assert server.details(answer["fileId"])["extensionStatus"] == {vendor.extension: "pending"}
    vendor.emulator.release()
    [told] = receiver.wait_for(1)
    details = server.details(answer["fileId"])
    assert told.json() == success(vendor.extension, details)
    assert details["AITags"] == tags(vendor.extension, *CAT_AND_ANIMAL)
    assert details["extensionStatus"] == {vendor.extension: "success"}
    wait_until_final(server)
    assert len(vendor.emulator.calls) == 1
    assert len(receiver.requests) == 1
    assert len(deliveries_of(server, answer["fileId"])) == 1


def test_straggler_that_fails_ends_in_a_webhook_of_failure(
    stand: Stand, either: Vendor, receiver: Receiver
) -> None:
    server = stand.hasty
    either.emulator.hold()
    either.emulator.fault = "image_rejected"
    answer = upload(server, either.extension, webhook_url=receiver.url)
    assert status_in(answer) == "pending"
    either.emulator.release()
    [told] = receiver.wait_for(1)
    assert_failure(told.json(), either.extension, answer["fileId"], "image_rejected")
    assert server.details(answer["fileId"])["extensionStatus"] == {either.extension: "failed"}
    wait_until_final(server)
    assert (len(either.emulator.calls), len(receiver.requests)) == (1, 1)


def test_straggler_without_a_webhook_url_is_recorded_all_the_same(
    stand: Stand, either: Vendor
) -> None:
    either.emulator.hold()
    answer = upload(stand.hasty, either.extension)
    either.emulator.release()
    details = wait_for_status(stand.hasty, answer["fileId"], either.extension, "success")
    assert details["AITags"] == tags(either.extension, *CAT_AND_ANIMAL)
    assert not deliveries_of(stand.hasty, answer["fileId"])


def test_one_extension_may_be_in_time_and_the_other_late(
    stand: Stand, way: Way, receiver: Receiver
) -> None:
    server = stand.server(sync_budget_seconds=1)  # in which one of the two has to be answered
    stand.rekognition.hold()
    answer = ask_by(way, server, GOOGLE, AWS, webhook_url=receiver.url)
    assert answer["extensionStatus"] == {GOOGLE: "success", AWS: "pending"}
    assert answer["AITags"] == tags(GOOGLE, *CAT_AND_ANIMAL)
    stand.rekognition.release()
    [told] = receiver.wait_for(1)
    assert told.json() == success(AWS, server.details(answer["fileId"]))
    assert told.json()["fileObject"]["AITags"] == (
        tags(AWS, *CAT_AND_ANIMAL) + tags(GOOGLE, *CAT_AND_ANIMAL)
    )


def test_a_client_that_hangs_up_costs_the_file_nothing(stand: Stand, either: Vendor) -> None:
    server = stand.patient
    either.emulator.hold()
    with pytest.raises(httpx.ReadTimeout):
        server.client.post(
            "/api/v1/files/upload",
            files={"file": ("a.jpg", pictures.jpeg())},
            data={
                "fileName": "hung-up.jpg",
                "useUniqueFileName": "false",
                "extensions": asking(either.extension),
            },
            timeout=0.2,
        )
    either.emulator.wait_for_calls(1)
    either.emulator.release()
    [listed] = server.client.get("/v1/files", params={"name": "hung-up.jpg"}).json()
    details = wait_for_status(server, listed["fileId"], either.extension, "success")
    assert details["AITags"] == tags(either.extension, *CAT_AND_ANIMAL)
    assert server.client.delete(f"/v1/files/{listed['fileId']}").status_code == 204


# Failures that pass


TRANSIENT = [
    ("throttle", "provider_throttled"),
    ("unavailable", "provider_unavailable"),
    ("server_error", "provider_unavailable"),
]


@pytest.mark.parametrize(("fault", "reason"), TRANSIENT)
def test_passing_failure_is_pending_then_retried_to_success(
    stand: Stand, vendor: Vendor, receiver: Receiver, fault: str, reason: str
) -> None:
    server = stand.patient
    vendor.emulator.faults.append(fault)
    vendor.emulator.retry_after = 300  # so that it is this test which decides when
    answer = upload(server, vendor.extension, webhook_url=receiver.url)
    assert status_in(answer) == "pending"
    run = run_of(server, answer["fileId"])
    assert (run.reason, run.attempts) == (reason, 1)
    assert run.last_error
    make_due(server)
    [told] = receiver.wait_for(1)
    assert told.json() == success(vendor.extension, server.details(answer["fileId"]))
    wait_until_final(server)
    assert (len(vendor.emulator.calls), len(receiver.requests)) == (2, 1)


def test_passing_failure_of_an_update_is_pending_then_retried_to_success(
    stand: Stand, either: Vendor, receiver: Receiver
) -> None:
    server = stand.patient
    either.emulator.faults.extend(["throttle", "unavailable"])
    answer = ask_by("update", server, either.extension, webhook_url=receiver.url)
    assert status_in(answer) == "pending"
    for calls in (2, 3):
        make_due(server)
        either.emulator.wait_for_calls(calls)
    [told] = receiver.wait_for(1)
    assert told.json() == success(either.extension, server.details(answer["fileId"]))


def test_retry_comes_by_itself_soon(stand: Stand, either: Vendor, receiver: Receiver) -> None:
    either.emulator.faults.append("unavailable")
    answer = upload(stand.patient, either.extension, webhook_url=receiver.url)
    assert status_in(answer) == "pending"
    receiver.wait_for(1)


def test_vendor_says_when_to_come_back(stand: Stand, vendor: Vendor) -> None:
    vendor.emulator.faults.append("throttle")
    vendor.emulator.retry_after = 200
    answer = upload(stand.patient, vendor.extension)
    run = run_of(stand.patient, answer["fileId"])
    assert 190 < (run.due_at - run.created_at).total_seconds() < 260


def test_timeout_is_pending_then_retried_to_success(
    stand: Stand, vendor: Vendor, receiver: Receiver
) -> None:
    server = stand.server(sync_budget_seconds=LONG_SECONDS, provider_timeout_seconds=0.3)
    vendor.emulator.faults.append("hang")
    answer = upload(server, vendor.extension, webhook_url=receiver.url)
    assert status_in(answer) == "pending"
    assert run_of(server, answer["fileId"]).reason == "provider_timeout"
    make_due(server)
    [told] = receiver.wait_for(1)
    assert told.json()["status"] == "SUCCESS"
    assert len(vendor.emulator.calls) == 2


def test_straggler_that_times_out_is_retried_to_success(
    stand: Stand, either: Vendor, receiver: Receiver
) -> None:
    server = stand.server(sync_budget_seconds=0.1, provider_timeout_seconds=0.4)
    either.emulator.faults.append("hang")
    answer = upload(server, either.extension, webhook_url=receiver.url)
    assert status_in(answer) == "pending"
    [told] = receiver.wait_for(1)
    assert told.json() == success(either.extension, server.details(answer["fileId"]))
    assert len(either.emulator.calls) == 2


@pytest.mark.parametrize("extension", [GOOGLE, AWS])
def test_refused_connection_is_pending_then_retried_to_success(
    serve: Serve, receiver: Receiver, monkeypatch: pytest.MonkeyPatch, extension: str
) -> None:
    with VisionEmulator() as vision, RekognitionEmulator() as rekognition:
        set_vendors(monkeypatch, vision, rekognition)
        server = serve(
            sync_budget_seconds=LONG_SECONDS,
            google_auto_tagging="vision",
            aws_auto_tagging="rekognition",
        )
        ports = vision.port, rekognition.port
    answer = upload(server, extension, webhook_url=receiver.url)
    assert status_in(answer) == "pending"
    assert run_of(server, answer["fileId"]).reason == "provider_unavailable"
    with VisionEmulator(port=ports[0]), RekognitionEmulator(port=ports[1]):
        [told] = receiver.wait_for(1)
        assert told.json() == success(extension, server.details(answer["fileId"]))
        wait_until_final(server)


def test_third_unreadable_reply_in_a_row_is_failed(
    stand: Stand, vendor: Vendor, receiver: Receiver
) -> None:
    server = stand.patient
    vendor.emulator.fault = "garbage"
    answer = upload(server, vendor.extension, webhook_url=receiver.url)
    assert status_in(answer) == "pending"
    for calls in (2, 3):
        make_due(server)
        vendor.emulator.wait_for_calls(calls)
        wait_until(lambda: run_of(server, answer["fileId"]).lease_until is None, "given back")
    [told] = receiver.wait_for(1)
    assert_failure(told.json(), vendor.extension, answer["fileId"], "provider_reply")
    wait_until_final(server)
    assert len(vendor.emulator.calls) == 3


def test_unreadable_replies_that_are_not_in_a_row_are_forgiven(
    stand: Stand, either: Vendor, receiver: Receiver
) -> None:
    server = stand.patient
    faults = ["garbage", "garbage", "throttle", "garbage", "garbage"]
    either.emulator.faults.extend(faults)
    upload(server, either.extension, webhook_url=receiver.url)
    for calls in range(2, len(faults) + 2):
        make_due(server)
        either.emulator.wait_for_calls(calls)
        wait_until(lambda: all(r.lease_until is None for r in all_runs(server)), "given back")
    [told] = receiver.wait_for(1)
    assert told.json()["status"] == "SUCCESS"


# Failures that stay


FINAL = [
    (GOOGLE, "image_rejected", "image_rejected"),
    (GOOGLE, "inner_error", "image_rejected"),
    (GOOGLE, "credentials", "provider_credentials"),
    (AWS, "image_rejected", "image_rejected"),
    (AWS, "credentials", "provider_credentials"),
]


@pytest.mark.parametrize(("extension", "fault", "reason"), FINAL)
def test_final_failure_is_failed_at_once_without_webhook(
    stand: Stand, way: Way, receiver: Receiver, extension: str, fault: str, reason: str
) -> None:
    server, vendor = stand.patient, stand.vendor(extension)
    vendor.emulator.fault = fault
    answer = ask_by(way, server, extension, webhook_url=receiver.url)
    assert answer["extensionStatus"] == {extension: "failed"}
    run = run_of(server, answer["fileId"])
    assert (run.status, run.reason, run.attempts) == ("failed", reason, 1)
    assert not deliveries_of(server, answer["fileId"])
    assert len(vendor.emulator.calls) == 1


@on_sqlite
def test_credentials_found_after_the_start_are_those_that_runs_wait_for(
    serve: Serve,
    rekognition: RekognitionEmulator,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    found = tmp_path / "found"
    credentials = '{"Version": 1, "AccessKeyId": "test", "SecretAccessKey": "test"}'
    script = tmp_path / "look-up"
    script.write_text(
        f"#!/bin/sh\nwhile [ ! -e {found} ]; do sleep 0.05; done\necho '{credentials}'\n"
    )
    script.chmod(0o700)
    (tmp_path / "config").write_text(f"[default]\ncredential_process = {script}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setattr(tagger, "OPEN_SECONDS", 0.1)
    server = serve(aws_auto_tagging="rekognition")
    answer = upload(server, AWS)
    assert status_in(answer) == "pending"
    run = run_of(server, answer["fileId"])
    assert (run.status, run.reason) == ("pending", "provider_unavailable")
    found.touch()
    details = wait_for_status(server, answer["fileId"], AWS, "success")
    assert details["AITags"] == tags(AWS, *CAT_AND_ANIMAL)


@pytest.mark.parametrize(("choice", "reason"), [("off", "extension_off"), (None, "not_configured")])
@pytest.mark.parametrize("webhook_on", ["pending", "all"])
def test_extension_without_a_provider_is_failed_at_once(
    serve: Serve, receiver: Receiver, choice: str | None, reason: str, webhook_on: str
) -> None:
    server = serve(
        google_auto_tagging=choice or "vision",
        aws_auto_tagging=choice or "rekognition",
        sync_budget_seconds=LONG_SECONDS,
        webhook_on=webhook_on,
    )
    answers = [ask_by(way, server, GOOGLE, AWS, webhook_url=receiver.url) for way in WAYS]
    for answer in answers:
        assert answer["extensionStatus"] == {GOOGLE: "failed", AWS: "failed"}
        assert {run.reason for run in runs_of(server, answer["fileId"])} == {reason}
    if webhook_on == "pending":
        assert not all_deliveries(server)
        return
    for told in receiver.wait_for(4):
        body = told.json()
        file_id = body["fileId"]
        assert file_id in [answer["fileId"] for answer in answers]
        assert_failure(body, body["service"], file_id, reason)


WAYS: list[Way] = ["upload", "update"]
NOT_TAGGED = [
    pytest.param(pictures.text(), "unsupported_media", id="text"),
    pytest.param(pictures.svg(), "unsupported_media", id="svg"),
    pytest.param(pictures.truncated_jpeg(), "image_unreadable", id="truncated"),
]


@pytest.mark.parametrize(("content", "reason"), NOT_TAGGED)
def test_what_is_no_image_or_broken_is_failed_without_a_call(
    stand: Stand, way: Way, receiver: Receiver, content: bytes, reason: str
) -> None:
    server = stand.patient
    answer = ask_by(way, server, GOOGLE, AWS, content=content, webhook_url=receiver.url)
    assert answer["extensionStatus"] == {GOOGLE: "failed", AWS: "failed"}
    assert answer["AITags"] is None
    assert {run.reason for run in runs_of(server, answer["fileId"])} == {reason}
    assert not deliveries_of(server, answer["fileId"])
    assert not stand.vision.calls
    assert not stand.rekognition.calls


def test_with_all_set_a_file_that_is_no_image_gets_a_webhook(
    stand: Stand, receiver: Receiver
) -> None:
    answer = upload(stand.talkative, GOOGLE, content=b"text", webhook_url=receiver.url)
    [told] = receiver.wait_for(1)
    assert_failure(told.json(), GOOGLE, answer["fileId"], "unsupported_media")


# The file goes away


def test_deleting_the_file_ends_its_pending_run_and_tells(
    stand: Stand, vendor: Vendor, receiver: Receiver
) -> None:
    server = stand.hasty
    vendor.emulator.hold()
    answer = upload(server, vendor.extension, webhook_url=receiver.url)
    assert server.client.delete(f"/v1/files/{answer['fileId']}").status_code == 204
    run = run_of(server, answer["fileId"])
    assert (run.status, run.reason) == ("failed", "file_deleted")
    [told] = receiver.wait_for(1)
    assert_failure(told.json(), vendor.extension, answer["fileId"], "file_deleted")

    vendor.emulator.release()
    vendor.emulator.wait_until_idle()
    assert upload(server, vendor.extension)["fileId"]  # by when the late answer is here too
    wait_until_final(server)
    assert run_of(server, answer["fileId"]) == run
    assert len(receiver.requests) == 1


def test_overwriting_the_file_ends_its_pending_run_tells_and_leaves_the_new_version_alone(
    stand: Stand, vendor: Vendor, receiver: Receiver
) -> None:
    server = stand.hasty
    vendor.emulator.faults.append("hang")
    answer = upload(server, vendor.extension, webhook_url=receiver.url)
    assert status_in(answer) == "pending"
    newer = overwrite(server, answer)
    assert newer["fileId"] == answer["fileId"]
    run = run_of(server, answer["fileId"])
    assert (run.status, run.reason) == ("failed", "file_replaced")
    [told] = receiver.wait_for(1)
    assert_failure(told.json(), vendor.extension, answer["fileId"], "file_replaced")

    vendor.emulator.labels = [("Dog", 90)]
    patch(server, answer["fileId"], vendor.extension)
    details = wait_for_status(server, answer["fileId"], vendor.extension, "success")
    vendor.emulator.labels = [("Late", 99)]
    vendor.emulator.release()
    vendor.emulator.wait_until_idle()
    assert upload(server, vendor.extension)["fileId"]  # by when the late answer is here too
    assert server.details(answer["fileId"]) == details
    assert details["AITags"] == tags(vendor.extension, ("Dog", 90))
    assert len(receiver.requests) == 1


def test_overwriting_a_file_leaves_what_was_told_already(
    stand: Stand, either: Vendor, receiver: Receiver
) -> None:
    answer = upload(stand.patient, either.extension, webhook_url=receiver.url)
    overwrite(stand.patient, answer)
    assert run_of(stand.patient, answer["fileId"]).status == "success"
    assert not deliveries_of(stand.patient, answer["fileId"])


@pytest.mark.parametrize("how", ["delete", "overwrite"])
def test_file_that_goes_away_within_the_budget_is_told_by_the_response(
    stand: Stand, either: Vendor, receiver: Receiver, how: str
) -> None:
    server = stand.patient
    either.emulator.hold()
    earlier = upload(server)
    with ThreadPoolExecutor(1) as thread:
        asked = thread.submit(
            patch, server, earlier["fileId"], either.extension, webhook_url=receiver.url
        )
        either.emulator.wait_for_calls(1)
        if how == "delete":
            assert server.client.delete(f"/v1/files/{earlier['fileId']}").status_code == 204
        else:
            overwrite(server, earlier)
        either.emulator.release()
        answer = asked.result(LONG_SECONDS)
    assert status_in(answer) == "failed"
    assert answer["AITags"] is None
    assert not deliveries_of(server, earlier["fileId"])


# What a run does to the tags


def test_run_replaces_the_tags_of_its_own_source_only(stand: Stand) -> None:
    server = stand.patient
    answer = upload(server, GOOGLE, AWS, tags="mine,yours")
    stand.vision.labels = [("Dog", 80), ("Ant", 80), ("Bee", 90.129)]
    changed = patch(server, answer["fileId"], GOOGLE)
    google = tags(GOOGLE, ("Bee", 90.13), ("Ant", 80), ("Dog", 80))
    assert changed["AITags"] == tags(AWS, *CAT_AND_ANIMAL) + google
    assert changed["tags"] == ["mine", "yours"]


def test_run_without_tags_clears_its_own_source_and_the_last_one_leaves_null(stand: Stand) -> None:
    server = stand.patient
    answer = upload(server, GOOGLE, AWS)
    stand.vision.labels = stand.rekognition.labels = []
    assert patch(server, answer["fileId"], GOOGLE)["AITags"] == tags(AWS, *CAT_AND_ANIMAL)
    assert patch(server, answer["fileId"], AWS)["AITags"] is None


def test_failed_run_leaves_the_tags(stand: Stand, either: Vendor) -> None:
    server = stand.patient
    answer = upload(server, either.extension)
    either.emulator.fault = "image_rejected"
    changed = patch(server, answer["fileId"], either.extension)
    assert status_in(changed) == "failed"
    assert changed["AITags"] == answer["AITags"]


def test_removal_comes_before_the_extensions_of_the_same_update(stand: Stand) -> None:
    server = stand.patient
    answer = upload(server, GOOGLE, AWS)
    changed = patch(server, answer["fileId"], AWS, removeAITags=["Cat", "Animal"])
    assert changed["AITags"] == tags(AWS, *CAT_AND_ANIMAL)


def test_straggler_of_an_update_that_removed_tags_lands_after_the_removal(
    stand: Stand, either: Vendor
) -> None:
    server = stand.hasty
    answer = upload(server)
    either.emulator.hold()
    changed = patch(server, answer["fileId"], either.extension, removeAITags="all")
    assert status_in(changed) == "pending"
    either.emulator.release()
    details = wait_for_status(server, answer["fileId"], either.extension, "success")
    assert details["AITags"] == tags(either.extension, *CAT_AND_ANIMAL)


@pytest.mark.parametrize(("keeps", "kept"), [("true", None), ("false", CAT_AND_ANIMAL)])
def test_overwriting_drops_or_keeps_ai_tags_as_asked(
    stand: Stand, keeps: str, kept: list[tuple[str, float]] | None
) -> None:
    answer = upload(stand.patient, GOOGLE)
    newer = overwrite(stand.patient, answer, overwriteAITags=keeps)
    assert newer["AITags"] == (kept and tags(GOOGLE, *kept))


def test_run_that_lands_after_a_newer_ones_tags_is_told_but_leaves_the_tags(
    stand: Stand, either: Vendor, receiver: Receiver
) -> None:
    server = stand.hasty
    file_id = upload(server)["fileId"]
    either.emulator.faults.append("hang")
    patch(server, file_id, either.extension, webhook_url=receiver.url)
    either.emulator.wait_for_calls(1)
    patch(server, file_id, either.extension)
    details = wait_for_status(server, file_id, either.extension, "success")

    either.emulator.labels = [("Late", 99)]
    either.emulator.release()
    [told] = receiver.wait_for(1)
    assert [run.status for run in runs_of(server, file_id)] == ["success", "success"]
    assert [run.number for run in runs_of(server, file_id)] == [1, 2]
    assert told.json() == success(either.extension, details)
    assert server.details(file_id) == details
    assert details["AITags"] == tags(either.extension, *CAT_AND_ANIMAL)


def test_older_run_may_land_when_the_newer_one_has_failed(
    stand: Stand, either: Vendor, receiver: Receiver
) -> None:
    server = stand.hasty
    file_id = upload(server)["fileId"]
    either.emulator.faults.extend(["hang", "image_rejected"])
    patch(server, file_id, either.extension, webhook_url=receiver.url)
    either.emulator.wait_for_calls(1)
    patch(server, file_id, either.extension)
    wait_for_status(server, file_id, either.extension, "failed")
    either.emulator.release()
    [told] = receiver.wait_for(1)
    assert told.json()["fileObject"]["AITags"] == tags(either.extension, *CAT_AND_ANIMAL)
    assert server.details(file_id)["extensionStatus"] == {either.extension: "failed"}


# Slots


def in_threads(count: int, function: Any, *arguments: Any, **named: Any) -> list[Any]:
    """The results of as many calls at once."""
    with ThreadPoolExecutor(count) as threads:
        asked = [threads.submit(function, *arguments, **named) for _ in range(count)]
        return [each.result(LONG_SECONDS) for each in asked]


def test_run_that_found_no_slot_is_given_back_and_finished_in_the_background(
    stand: Stand, vendor: Vendor, receiver: Receiver
) -> None:
    server = stand.server(sync_budget_seconds=SHORT_SECONDS, provider_concurrency=2)
    vendor.emulator.hold()
    answers = in_threads(6, upload, server, vendor.extension, webhook_url=receiver.url)
    assert {status_in(answer) for answer in answers} == {"pending"}
    assert len(vendor.emulator.calls) == 2
    vendor.emulator.release()
    bodies = [told.json() for told in receiver.wait_for(6)]
    told = sorted(body["fileObject"]["fileId"] for body in bodies)
    assert told == sorted(answer["fileId"] for answer in answers)
    wait_until_final(server)
    assert len(vendor.emulator.calls) == 6
    assert vendor.emulator.max_in_flight == 2
    assert len(receiver.requests) == 6


def test_budget_of_nothing_leaves_all_to_the_background(
    stand: Stand, either: Vendor, receiver: Receiver
) -> None:
    server = stand.server(sync_budget_seconds=0)
    answer = upload(server, either.extension, webhook_url=receiver.url)
    assert status_in(answer) == "pending"
    [told] = receiver.wait_for(1)
    assert told.json()["status"] == "SUCCESS"
    assert len(either.emulator.calls) == 1


def test_background_takes_half_of_the_slots_and_leaves_the_rest_to_requests(
    stand: Stand, either: Vendor
) -> None:
    server = stand.server(sync_budget_seconds=1, provider_concurrency=4)
    either.emulator.fault, either.emulator.retry_after = "throttle", 300
    in_threads(6, upload, server, either.extension)
    either.emulator.fault = None
    throttled = len(either.emulator.calls)
    server.write(lambda tx: tx.execute(delete(provider_states)) and None)  # closes the breaker
    either.emulator.hold()
    either.emulator.max_in_flight = 0
    make_due(server)
    either.emulator.wait_for_calls(throttled + 2)
    with pytest.raises(TimeoutError):
        either.emulator.wait_for_calls(throttled + 3, timeout_seconds=0.3)
    answers = in_threads(3, upload, server, either.extension)
    assert {status_in(answer) for answer in answers} == {"pending"}
    # All four slots are taken: two by requests, whose third found none.
    assert either.emulator.max_in_flight == 4
    assert len(either.emulator.calls) == throttled + 4
    either.emulator.release()
    wait_until_final(server)
    assert len(either.emulator.calls) == throttled + 9
    assert either.emulator.max_in_flight <= 4


def test_one_providers_backlog_does_not_hold_up_the_other(stand: Stand) -> None:
    server = stand.server(sync_budget_seconds=1, provider_concurrency=1)
    stand.vision.hold()
    in_threads(4, upload, server, GOOGLE)
    assert status_in(upload(server, AWS)) == "success"


# No result slips


def test_each_result_around_the_budgets_end_is_told_exactly_once(
    stand: Stand, receiver: Receiver
) -> None:
    budget = 0.2
    server = stand.server(sync_budget_seconds=budget, provider_concurrency=4)
    for emulator in (stand.vision, stand.rekognition):
        emulator.delay_seconds = budget - 0.05
        emulator.faults.extend(["throttle", "image_rejected", "unavailable", "garbage"])
    answers = [
        answer
        for _ in range(6)
        for answer in in_threads(4, upload, server, GOOGLE, AWS, webhook_url=receiver.url)
    ]
    wait_until(lambda: _no_run_is_pending(server), "all runs final")
    wait_until_final(server)
    told = [(_file_of(request.json()), request.json()["service"]) for request in receiver.requests]
    pending = [
        (answer["fileId"], extension)
        for answer in answers
        for extension, status in answer["extensionStatus"].items()
        if status == "pending"
    ]
    assert sorted(told) == sorted(pending)
    for answer in answers:
        _assert_consistent(server, answer)


def _file_of(body: dict[str, Any]) -> str:
    return str(body["fileId"] if body["status"] == "FAILURE" else body["fileObject"]["fileId"])


def _no_run_is_pending(server: LoupeServer) -> bool:
    make_due(server)
    return all(run.status != "pending" for run in all_runs(server))


def _assert_consistent(server: LoupeServer, answer: dict[str, Any]) -> None:
    """What the response called done is in it, and stays; nothing else is in it."""
    tagged = {tag["source"] for tag in answer["AITags"] or []}
    statuses = answer["extensionStatus"]
    assert tagged == {name for name, status in statuses.items() if status == "success"}
    details = server.details(answer["fileId"])
    for name, status in statuses.items():
        assert status in ("pending", details["extensionStatus"][name])


# The deadline


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("fault", ["throttle", "unavailable", "server_error"])
def test_what_is_still_failing_after_24_hours_is_failed(
    serve: Serve, vision: VisionEmulator, receiver: Receiver, fault: str
) -> None:
    clock = SetClock()
    server = serve(clock=clock, google_auto_tagging="vision", sync_budget_seconds=LONG_SECONDS)
    vision.fault = fault
    answer = upload(server, GOOGLE, webhook_url=receiver.url)
    clock.forward(hours=23, minutes=59)
    wake(server)
    vision.wait_for_calls(2)
    wait_until(lambda: run_of(server, answer["fileId"]).lease_until is None, "given back")
    assert run_of(server, answer["fileId"]).status == "pending"
    reason = run_of(server, answer["fileId"]).reason
    clock.forward(minutes=2)
    wake(server)
    [told] = receiver.wait_for(1)
    assert_failure(told.json(), GOOGLE, answer["fileId"], reason)
    assert run_of(server, answer["fileId"]).status == "failed"
    assert len(vision.calls) == 2


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_run_that_nobody_could_take_for_24_hours_is_failed(
    serve: Serve, vision: VisionEmulator, receiver: Receiver
) -> None:
    clock = SetClock()
    server = serve(clock=clock, google_auto_tagging="vision", sync_budget_seconds=LONG_SECONDS)
    answer = upload(server)
    server.write(lambda tx: _insert_stale_run(tx, answer["fileId"], receiver.url))
    clock.forward(hours=25)
    wake(server)
    [told] = receiver.wait_for(1)
    assert_failure(told.json(), GOOGLE, answer["fileId"], "provider_unavailable")
    assert not vision.calls


def _insert_stale_run(tx: Tx, file_id: str, url: str) -> None:
    [run] = start_runs(
        tx,
        parse_extensions(json.loads(asking(GOOGLE))),
        file_id=file_id,
        version_id=file_id,
        webhook_url=url,
        owner="nobody",
        request_id="r",
    )
    values = {"due_at": tx.now(24 * 3600), "lease_until": None, "lease_owner": None}
    tx.execute(update(runs).where(runs.c.id == run.id).values(values))


@pytest.mark.parametrize("retry_after", [100_000, 1e12, 1e300])
def test_vendor_that_says_to_come_back_after_the_deadline_leaves_the_run_pending_until_then(
    stand: Stand, receiver: Receiver, retry_after: float
) -> None:
    stand.rekognition.faults.append("throttle")
    stand.rekognition.retry_after = retry_after
    answer = upload(stand.patient, AWS, webhook_url=receiver.url)
    assert status_in(answer) == "pending"
    run = run_of(stand.patient, answer["fileId"])
    assert run.due_at == run.expires_at
    assert run.reason == "provider_throttled"


# Leases, and a database that fails for a while


@pytest.fixture
def short_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "LEASE_SECONDS", 0.6)
    monkeypatch.setattr(jobs, "RENEW_SECONDS", 0.1)


@pytest.mark.usefixtures("short_leases")
def test_lease_of_a_call_that_goes_on_is_renewed(
    serve: Serve, vision: VisionEmulator, receiver: Receiver
) -> None:
    server = serve(google_auto_tagging="vision", sync_budget_seconds=SHORT_SECONDS)
    vision.hold()
    answer = upload(server, GOOGLE, webhook_url=receiver.url)
    began = run_of(server, answer["fileId"])
    later = began.lease_until + timedelta(seconds=1)
    wait_until(lambda: run_of(server, answer["fileId"]).lease_until > later, "renewed")
    assert run_of(server, answer["fileId"]).attempts == 1
    vision.release()
    receiver.wait_for(1)
    assert len(vision.calls) == 1


@pytest.mark.usefixtures("short_leases")
@pytest.mark.parametrize("whose", ["request", "straggler", "retry"])
def test_result_that_could_not_be_recorded_is_not_lost_for_ever(
    serve: Serve, vision: VisionEmulator, receiver: Receiver, whose: str
) -> None:
    server = serve(
        google_auto_tagging="vision",
        sync_budget_seconds=SHORT_SECONDS if whose == "straggler" else LONG_SECONDS,
    )
    file_id = upload(server)["fileId"]
    if whose == "retry":
        vision.faults.append("throttle")
        assert status_in(patch(server, file_id, GOOGLE, webhook_url=receiver.url)) == "pending"
        wake(server)
    vision.hold()
    with ThreadPoolExecutor(1) as thread:
        asked = thread.submit(patch, server, file_id, GOOGLE, webhook_url=receiver.url)
        vision.wait_for_calls(1 if whose != "retry" else 3)
        if whose == "straggler":
            assert status_in(asked.result(LONG_SECONDS)) == "pending"
        rename(server, "file_versions", "away")
        try:
            vision.release()
            vision.wait_until_idle()
            if whose != "straggler":
                with pytest.raises(AssertionError):  # the answer is 500
                    asked.result(LONG_SECONDS)
        finally:
            rename(server, "away", "file_versions")
    for _ in runs_of(server, file_id):
        receiver.wait_for(1)
    wait_until_final(server)
    assert {run.status for run in runs_of(server, file_id)} == {"success"}


def rename(server: LoupeServer, table: str, to: str) -> None:
    server.write(lambda tx: tx.execute(text(f"ALTER TABLE {table} RENAME TO {to}")) and None)


# Several servers on one database


ON_POSTGRES = pytest.mark.parametrize(
    "database_url", [pytest.param("postgres", marks=pytest.mark.postgres)], indirect=True
)


@ON_POSTGRES
def test_two_servers_take_each_run_and_each_delivery_once(
    serve: Serve, vision: VisionEmulator, receiver: Receiver
) -> None:
    servers = [
        serve(google_auto_tagging="vision", sync_budget_seconds=LONG_SECONDS) for _ in range(2)
    ]
    vision.fault, vision.retry_after = "throttle", 300
    answers = in_threads(16, upload, servers[0], GOOGLE, webhook_url=receiver.url)
    assert {status_in(answer) for answer in answers} == {"pending"}
    vision.fault = None
    vision.delay_seconds = 0.05
    throttled = len(vision.calls)
    make_due(servers[0])
    wake(servers[1])
    told = [request.json()["fileObject"]["fileId"] for request in receiver.wait_for(16)]
    for server in servers:
        wait_until_final(server)
    assert sorted(told) == sorted(answer["fileId"] for answer in answers)
    assert len(receiver.requests) == 16
    assert len(vision.calls) - throttled == 16
    assert sum(run.attempts for run in all_runs(servers[0])) == len(vision.calls)


@ON_POSTGRES
def test_run_of_a_server_that_stands_still_is_taken_over_and_its_late_answer_is_dropped(
    serve: Serve, vision: VisionEmulator, receiver: Receiver
) -> None:
    first, second = (
        serve(google_auto_tagging="vision", sync_budget_seconds=SHORT_SECONDS) for _ in range(2)
    )
    vision.faults.append("hang")
    answer = upload(first, GOOGLE, webhook_url=receiver.url)
    assert status_in(answer) == "pending"

    def let_lease_run_out() -> bool:
        of_first = runs.c.lease_owner == first.resources.tagging.owner
        first.write(
            lambda tx: (
                tx.execute(update(runs).where(of_first).values(lease_until=tx.now(-1))) and None
            )
        )
        wake(second)
        return len(receiver.requests) == 1

    wait_until(let_lease_run_out, "taken over")
    vision.labels = [("Late", 99)]
    vision.release()
    vision.wait_until_idle()
    assert status_in(upload(first, GOOGLE)) in ("success", "pending")
    wait_until_final(first)
    run = run_of(first, answer["fileId"])
    assert (run.status, run.attempts) == ("success", 2)
    assert second.details(answer["fileId"])["AITags"] == tags(GOOGLE, *CAT_AND_ANIMAL)
    assert len(receiver.requests) == 1


def test_what_a_server_holds_is_given_back_when_it_stops(
    serve: Serve, vision: VisionEmulator, receiver: Receiver
) -> None:
    first = serve(google_auto_tagging="vision", sync_budget_seconds=SHORT_SECONDS)
    vision.faults.append("hang")
    answer = upload(first, GOOGLE, webhook_url=receiver.url)
    vision.wait_for_calls(1)
    first.stop()
    second = serve(google_auto_tagging="vision", sync_budget_seconds=SHORT_SECONDS)
    [told] = receiver.wait_for(1, timeout_seconds=5)  # much less than a lease
    assert told.json() == success(GOOGLE, second.details(answer["fileId"]))


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_the_one_process_on_sqlite_clears_all_leases_when_it_starts(
    serve: Serve, vision: VisionEmulator, receiver: Receiver, database_url: str
) -> None:
    first = serve(google_auto_tagging="vision", sync_budget_seconds=LONG_SECONDS)
    vision.faults.append("throttle")
    upload(first, GOOGLE, webhook_url=receiver.url)
    first.stop()
    engine = create_engine(database_url, poolclass=NullPool)
    with engine.begin() as connection:
        in_a_minute = Clock().now() + timedelta(minutes=1)
        held = {"lease_until": in_a_minute, "lease_owner": "killed"}
        connection.execute(update(runs).values(**held))
    serve(google_auto_tagging="vision")
    receiver.wait_for(1, timeout_seconds=5)
