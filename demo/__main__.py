"""Uploads a picture to a Loupe of its own: one extension answers in time, the other by webhook."""

import argparse
import base64
import json
import secrets
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from demo.narration import DemoFailed, say, show, step
from demo.receiver import Webhook, WebhookReceiver
from demo.server import (
    PRIVATE_KEY,
    PROJECT,
    PUBLIC_KEY,
    Loupe,
    environment,
    free_port,
    migrate,
    running,
)

SAMPLE = Path(__file__).with_name("sample.jpg")
FAST, SLOW = "google-auto-tagging", "aws-auto-tagging"
SLOW_SECONDS = 5
WEBHOOK_SECONDS = 30.0
EXTENSIONS = [
    {"name": FAST, "minConfidence": 20, "maxTags": 5},
    {"name": SLOW, "minConfidence": 50, "maxTags": 3},
]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    parser.add_argument("--once", action="store_true", help="end after the webhook")
    once = parser.parse_args().once
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with _data_dir(once) as data_dir:
            _run(data_dir, once)
    except DemoFailed as error:
        sys.exit(f"\nThe demo failed. {error}")
    except KeyboardInterrupt:
        print("\nEnded.")


@contextmanager
def _data_dir(once: bool) -> Iterator[Path]:
    if once:
        with tempfile.TemporaryDirectory(prefix="loupe-demo-") as temporary:
            yield Path(temporary)
        return
    kept = PROJECT / "data" / "demo"
    kept.mkdir(parents=True, exist_ok=True)
    yield kept


def _run(data_dir: Path, once: bool) -> None:
    secret = "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()
    log = data_dir / "server.log"
    env = environment(data_dir, free_port(), _settings(secret))
    step("Starting Loupe, with SQLite and files on disk")
    say(f"data   {data_dir}")
    say(f"log    {log}")
    migrate(env)
    with WebhookReceiver(secret) as receiver, running(env, log) as loupe:
        say(f"ready  {loupe.url}")
        show_tagging(loupe, receiver)
        if not once:
            _stay(loupe, receiver)


def _settings(secret: str) -> dict[str, str]:
    return {
        "LOUPE_GOOGLE_AUTO_TAGGING": "local",
        "LOUPE_AWS_AUTO_TAGGING": "local",
        "LOUPE_LOCAL_DELAY_SECONDS": f"{SLOW}={SLOW_SECONDS}",
        "LOUPE_WEBHOOK_ALLOW_CIDRS": "127.0.0.0/8",
        "LOUPE_WEBHOOK_SECRET": secret,
    }


def show_tagging(loupe: Loupe, receiver: WebhookReceiver) -> None:
    """The demo itself. Raises DemoFailed when anything is not as it should be."""
    step(f"Uploading demo/{SAMPLE.name} with two extensions")
    say(f"Both are answered by the `local` tagger; {SLOW} is made to take {SLOW_SECONDS} s,")
    say("which is longer than a response waits (3 s).")
    uploaded = _upload(loupe, receiver.url)
    show(uploaded)
    _expect("the upload's extensionStatus", uploaded, {FAST: "success", SLOW: "pending"})

    step(f"Waiting for the webhook about {SLOW}")
    webhook = _wait_for_webhook(loupe, receiver)
    _show_webhook(webhook)
    if not webhook.is_genuine:
        raise DemoFailed("The webhook's signature does not hold.")
    _expect_webhook(webhook, uploaded["fileId"])

    step("The file's details now")
    details = _answer(loupe, "GET", f"/v1/files/{uploaded['fileId']}/details")
    show(details)
    _expect("the details' extensionStatus", details, {FAST: "success", SLOW: "success"})
    say("")
    say("All as it should be.")


def _upload(loupe: Loupe, webhook_url: str) -> dict[str, Any]:
    return _answer(
        loupe,
        "POST",
        "/api/v1/files/upload",
        files={"file": (SAMPLE.name, SAMPLE.read_bytes())},
        data={
            "fileName": SAMPLE.name,
            "extensions": json.dumps(EXTENSIONS),
            "webhookUrl": webhook_url,
        },
    )


def _answer(loupe: Loupe, method: str, path: str, **request: Any) -> dict[str, Any]:
    """The JSON of a 200. Raises DemoFailed."""
    try:
        response = loupe.client.request(method, path, **request)
    except httpx.HTTPError as error:
        loupe.check_alive()
        raise DemoFailed(f"{method} {path} got no answer: {error!r}.") from None
    if response.status_code != 200:
        raise DemoFailed(f"{method} {path} was answered {response.status_code}: {response.text}")
    answer: dict[str, Any] = response.json()
    return answer


def _expect(what: str, answer: dict[str, Any], wanted: dict[str, str]) -> None:
    if answer.get("extensionStatus") != wanted:
        raise DemoFailed(f"Expected {what} to be {json.dumps(wanted)}.")


def _wait_for_webhook(loupe: Loupe, receiver: WebhookReceiver) -> Webhook:
    for _ in range(int(WEBHOOK_SECONDS)):
        webhook = receiver.wait(1)
        if webhook is not None:
            return webhook
        loupe.check_alive()
    raise DemoFailed(f"No webhook came within {WEBHOOK_SECONDS:g} s; see {loupe.log}.")


def _show_webhook(webhook: Webhook) -> None:
    say(f"webhook-id {webhook.event_id}")
    say(f"signature  {'valid' if webhook.is_genuine else 'NOT VALID'}")
    show(webhook.body)


def _expect_webhook(webhook: Webhook, file_id: str) -> None:
    body = webhook.body
    told = (body.get("service"), body.get("status"), body.get("fileObject", {}).get("fileId"))
    if told != (SLOW, "SUCCESS", file_id):
        raise DemoFailed(f"Expected the webhook to tell SUCCESS of {SLOW} on {file_id}.")


def _stay(loupe: Loupe, receiver: WebhookReceiver) -> None:
    """Until Ctrl-C; shows each webhook that comes meanwhile."""
    step("The server goes on; Ctrl-C ends it")
    say(f"server       {loupe.url}")
    say(f"API docs     {loupe.url}/docs")
    say(f"private key  {PRIVATE_KEY}   (public: {PUBLIC_KEY})")
    say(f"log          {loupe.log}")
    say("")
    say("Try a picture of your own; its webhook appears here:")
    say(f"curl -u {PRIVATE_KEY}: {loupe.url}/api/v1/files/upload \\")
    say("  -F file=@picture.jpg -F fileName=picture.jpg \\")
    say(f"  -F 'extensions={json.dumps(EXTENSIONS)}' \\")
    say(f"  -F webhookUrl={receiver.url}")
    while True:
        webhook = receiver.wait(1)
        if webhook is not None:
            step(f"A webhook about {webhook.body.get('service')}")
            _show_webhook(webhook)
        loupe.check_alive()


if __name__ == "__main__":
    main()
