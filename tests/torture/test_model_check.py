"""Uploads, updates, tags, deletes, crashes and restarts, in any order: as a simple model has it."""

import json
import random
import re
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from app.extensions.schemas import AWS, GOOGLE
from tests import pictures
from tests.emulators.receiver import Receiver
from tests.emulators.rekognition import RekognitionEmulator
from tests.emulators.vision import VisionEmulator
from tests.files.support import vendor_environment
from tests.torture.forked import ForkedServer
from tests.torture.harness import new_seed, report, size, wait_for

EXAMPLES = size(25, 200)
STEPS = 30
STEPS_OF_A_LIFE = 5  # at least, since to restart costs more than all other steps
LABELS = {
    GOOGLE: [("Cat", 98.5), ("Animal", 97.25), ("Fur", 60.0)],
    AWS: [("Dog", 99.0), ("Animal", 80.5), ("Grass", 55.25)],
}
CONTENTS = {
    "jpeg": pictures.jpeg(),
    "png": pictures.png(),
    "alpha": pictures.alpha_png(),
    "text": pictures.text(),
}
UNIQUE = re.compile(r"(.*)_[A-Za-z0-9_-]{9}(\..*)")

Json = dict[str, Any]


@dataclass(frozen=True)
class Wanted:
    """What a request asks of one extension."""

    extension: str
    min_confidence: float
    max_tags: int

    def tags(self) -> list[Json]:
        best = [(n, c) for n, c in LABELS[self.extension] if c >= self.min_confidence]
        return [
            {"name": name, "confidence": confidence, "source": self.extension}
            for name, confidence in best[: self.max_tags]
        ]

    def as_json(self) -> Json:
        return {
            "name": self.extension,
            "minConfidence": self.min_confidence,
            "maxTags": self.max_tags,
        }


@dataclass
class Version:
    """pending: extension -> latest run, which a response has called pending, and its request."""

    content: bytes
    is_image: bool
    tags: list[str] | None
    ai_tags: list[Json]
    is_private: bool
    is_published: bool
    description: str | None
    statuses: dict[str, str] = field(default_factory=dict)
    pending: list[tuple[Wanted, int]] = field(default_factory=list)

    def put_tags(self, wanted: Wanted) -> None:
        others = [tag for tag in self.ai_tags if tag["source"] != wanted.extension]
        self.ai_tags = sorted(
            others + wanted.tags(), key=lambda tag: (tag["source"], -tag["confidence"])
        )


@dataclass
class File:
    id: str
    folder: str
    name: str
    number: int
    version: Version

    @property
    def path(self) -> str:
        return f"{self.folder.rstrip('/')}/{self.name}"

    def listed(self) -> Json:
        version = self.version
        return {
            "type": "file",
            "fileId": self.id,
            "name": self.name,
            "filePath": self.path,
            "tags": version.tags,
            "AITags": version.ai_tags or None,
            "version": f"Version {self.number}",
            "isPrivateFile": version.is_private,
            "isPublished": version.is_published,
            "fileType": "image" if version.is_image else "non-image",
            "size": len(version.content),
            "description": version.description,
        }


def seen(details: Json) -> Json:
    """The same, of an answer."""
    keys = ("type", "fileId", "name", "filePath", "fileType", "size", "tags", "AITags")
    return {
        **{key: details[key] for key in (*keys, "isPrivateFile", "isPublished")},
        "version": details["versionInfo"]["name"],
        "description": details.get("description"),
    }


@dataclass(frozen=True)
class Keyed:
    """An upload under an Idempotency-Key, and what it was answered."""

    key: str
    fields: dict[str, str]
    content: bytes
    answer: Json


wanted = st.builds(
    Wanted,
    st.sampled_from([GOOGLE, AWS]),
    st.sampled_from([0, 70, 98]),
    st.sampled_from([1, 2, 30]),
)
extensions = st.lists(wanted, max_size=2, unique_by=lambda each: each.extension)
tags = st.sampled_from([None, ["a"], ["a", "b"], ["ü b"]])
flags = st.booleans()


class Library(RuleBasedStateMachine):
    """The server under test beside its model.

    events: what a webhook has to tell, by request and extension.
    """

    template: ClassVar[Path]
    receiver: ClassVar[Receiver]
    vision: ClassVar[VisionEmulator]
    rekognition: ClassVar[RekognitionEmulator]
    counts: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="loupe-model-"))
        shutil.copy(self.template, self.directory / "loupe.db")
        self.files: dict[str, File] = {}
        self.keyed: list[Keyed] = []
        self.events: dict[tuple[int, str], str] = {}
        self.requests = 0
        self.is_held = False
        self.age = 0
        self.first_event = len(self.receiver.requests)
        self.server = ForkedServer(
            self.directory,
            f"sqlite:///{self.directory / 'loupe.db'}",
            **vendor_environment(self.vision, self.rekognition),
            LOUPE_SYNC_BUDGET_SECONDS="0.3",
            LOUPE_PROVIDER_TIMEOUT_SECONDS="120",
        )
        self.counts["examples"] += 1

    @initialize()
    def begin(self) -> None:
        self.server.start()

    # --- what happens ---------------------------------------------------------------------------

    @rule(
        content=st.sampled_from(sorted(CONTENTS)),
        name=st.sampled_from(["a.jpg", "ü.png"]),
        folder=st.sampled_from(["/", "/x", "/x/y"]),
        is_unique=st.sampled_from([False, False, False, True]),
        tags=tags,
        keeps=st.fixed_dictionaries(
            {"overwriteFile": flags, "overwriteTags": flags, "overwriteAITags": flags}
        ),
        shown=st.sampled_from([(False, True)] * 3 + [(True, True), (False, False)]),
        description=st.sampled_from([None, "a picture"]),
        wanted=extensions,
        has_key=flags,
    )
    def upload(
        self,
        content: str,
        name: str,
        folder: str,
        is_unique: bool,
        tags: list[str] | None,
        keeps: dict[str, bool],
        shown: tuple[bool, bool],
        description: str | None,
        wanted: list[Wanted],
        has_key: bool,
    ) -> None:
        is_private, is_published = shown
        version = Version(
            CONTENTS[content],
            content != "text",
            tags,
            [],
            is_private,
            is_published,
            description,
        )
        fields = self._fields(version, name, folder, is_unique, keeps, wanted)
        key = f"key-{self.requests}" if has_key else None
        answer = self._send(fields, version.content, key)
        existing = None if is_unique else self._at(folder, name)
        if existing is not None and not keeps["overwriteFile"]:
            assert answer.status_code == 400, answer.text
        else:
            self._store(answer, version, existing, folder, name, keeps, wanted)
            if key is not None:
                self.keyed.append(Keyed(key, fields, version.content, answer.json()))
        self.compare("upload")

    @precondition(lambda self: self.keyed)
    @rule(data=st.data())
    def repeat_an_upload(self, data: st.DataObject) -> None:
        earlier = data.draw(st.sampled_from(self.keyed))
        again = self._send(earlier.fields, earlier.content, earlier.key)
        assert again.status_code == 200, again.text
        assert again.json() == earlier.answer
        other = self._send(earlier.fields, earlier.content + b"\n", earlier.key)
        assert other.status_code == 400, other.text
        self.compare("repeat")

    @precondition(lambda self: self.files)
    @rule(
        data=st.data(),
        body=st.fixed_dictionaries(
            {},
            optional={
                "tags": tags,
                "description": st.sampled_from([None, "another"]),
                "removeAITags": st.sampled_from(["all", ["Animal"], ["Dog", "Cat"]]),
            },
        ),
        wanted=extensions,
    )
    def update(self, data: st.DataObject, body: Json, wanted: list[Wanted]) -> None:
        file = data.draw(st.sampled_from(sorted(self.files.values(), key=lambda each: each.path)))
        self.requests += 1
        sent = body | {
            "extensions": [each.as_json() for each in wanted],
            "webhookUrl": self.receiver.url_for(f"/{id(self)}/{self.requests}"),
        }
        answer = self.server.client.patch(f"/v1/files/{file.id}/details", json=sent)
        assert answer.status_code == 200, answer.text
        version = file.version
        version.tags = body.get("tags", version.tags)
        version.description = body.get("description", version.description)
        removed = body.get("removeAITags", [])
        version.ai_tags = [
            tag for tag in version.ai_tags if removed != "all" and tag["name"] not in removed
        ]
        self._run(version, wanted, answer.json())
        self.compare("update")

    @precondition(lambda self: self.files)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        file = data.draw(st.sampled_from(sorted(self.files.values(), key=lambda each: each.path)))
        assert self.server.client.delete(f"/v1/files/{file.id}").status_code == 204
        self._end(file.version, "file_deleted")
        del self.files[file.id]
        assert self.server.client.get(f"/v1/files/{file.id}/details").status_code == 404
        self.compare("delete")

    @rule()
    def hold_or_release_a_provider(self) -> None:
        """While it is held, what it is asked stays pending."""
        if self.is_held:
            self._release()
        else:
            self.rekognition.hold()
            self.is_held = True
        self.compare("hold")

    @precondition(lambda self: self.age >= STEPS_OF_A_LIFE)
    @rule()
    def crash_and_restart(self) -> None:
        self.server.kill()
        self._restart()
        self.compare("crash")

    @precondition(lambda self: self.age >= STEPS_OF_A_LIFE)
    @rule(
        name=st.sampled_from(["a.jpg", "ü.png"]),
        content=st.sampled_from(sorted(CONTENTS)),
        after_ms=st.floats(0, 40),
    )
    def crash_in_an_upload_and_repeat_it(self, name: str, content: str, after_ms: float) -> None:
        """Whether or not it had been stored, there is one new version in the end."""
        version = Version(CONTENTS[content], content != "text", None, [], False, True, None)
        keeps = {"overwriteFile": True, "overwriteTags": True, "overwriteAITags": True}
        fields = self._fields(version, name, "/", False, keeps, [])
        key = f"key-{self.requests}"
        killing = threading.Timer(after_ms / 1000, self.server.kill)
        killing.start()
        try:
            self._send(fields, version.content, key)
            self.counts["crashes that came too late"] += 1
        except httpx.TransportError:
            self.counts["uploads cut by a crash"] += 1
        killing.join()
        self._restart()
        answer = self._send(fields, version.content, key)
        self._store(answer, version, self._at("/", name), "/", name, keeps, [])
        self.keyed.append(Keyed(key, fields, version.content, answer.json()))
        self.compare("crash in upload")

    def _restart(self) -> None:
        self.server.start()
        self.age = 0

    def teardown(self) -> None:
        try:
            self._release()
            self._check_events()
        finally:
            self.server.end()
            shutil.rmtree(self.directory)

    # --- the model ------------------------------------------------------------------------------

    def _fields(
        self,
        version: Version,
        name: str,
        folder: str,
        is_unique: bool,
        keeps: dict[str, bool],
        wanted: list[Wanted],
    ) -> dict[str, str]:
        self.requests += 1
        flags = {
            **keeps,
            "useUniqueFileName": is_unique,
            "isPrivateFile": version.is_private,
            "isPublished": version.is_published,
        }
        return {
            "fileName": name,
            "folder": folder,
            "extensions": json.dumps([each.as_json() for each in wanted]),
            "webhookUrl": self.receiver.url_for(f"/{id(self)}/{self.requests}"),
            **({} if version.tags is None else {"tags": ",".join(version.tags)}),
            **({} if version.description is None else {"description": version.description}),
            **{flag: str(value).lower() for flag, value in flags.items()},
        }

    def _send(self, fields: dict[str, str], content: bytes, key: str | None) -> httpx.Response:
        return self.server.client.post(
            "/api/v1/files/upload",
            files={"file": ("a", content)},
            data=fields,
            headers={} if key is None else {"Idempotency-Key": key},
        )

    def _at(self, folder: str, name: str) -> File | None:
        found = [each for each in self.files.values() if (each.folder, each.name) == (folder, name)]
        return found[0] if found else None

    def _store(
        self,
        answer: httpx.Response,
        version: Version,
        existing: File | None,
        folder: str,
        name: str,
        keeps: dict[str, bool],
        wanted: list[Wanted],
    ) -> None:
        assert answer.status_code == 200, answer.text
        said = answer.json()
        if existing is None:
            unique = UNIQUE.fullmatch(said["name"])
            assert said["name"] == name or (unique and unique[1] + unique[2] == name)
            file = File(said["fileId"], folder, said["name"], 1, version)
            assert file.id not in self.files
            self.files[file.id] = file
        else:
            assert said["fileId"] == existing.id
            replaced = existing.version
            self._end(replaced, "file_replaced")
            if version.tags is None and not keeps["overwriteTags"]:
                version.tags = replaced.tags
            if not keeps["overwriteAITags"]:
                version.ai_tags = list(replaced.ai_tags)
            existing.number, existing.version = existing.number + 1, version
        self._run(version, wanted, said)

    def _run(self, version: Version, wanted: list[Wanted], answer: Json) -> None:
        """The response says what was done in time."""
        statuses = answer.get("extensionStatus", {})
        assert set(statuses) == {each.extension for each in wanted}
        for each in wanted:
            status = version.statuses[each.extension] = statuses[each.extension]
            if status == "pending":
                assert version.is_image
                version.pending.append((each, self.requests))
            else:
                assert status == ("success" if version.is_image else "failed")
                assert status == "failed" or not (self.is_held and each.extension == AWS)
            if status == "success":
                version.put_tags(each)

    def _end(self, version: Version, reason: str) -> None:
        for each, request in version.pending:
            self.events[request, each.extension] = reason
        version.pending.clear()

    def _release(self) -> None:
        self.rekognition.release()
        self.is_held = False

    def _settle(self) -> None:
        """What is pending and not held back succeeds, and is told."""
        for file in self.files.values():
            version = file.version
            for each, request in list(version.pending):
                if self.is_held and each.extension == AWS:
                    continue
                self._await(file, each.extension)
                version.statuses[each.extension] = "success"
                version.put_tags(each)
                version.pending.remove((each, request))
                self.events[request, each.extension] = "success"

    def _await(self, file: File, extension: str) -> None:
        """All runs of an extension on the version have ended, superseded ones among them."""

        def have_ended() -> bool:
            query = {"fileId": file.id, "extension": extension, "status": "pending"}
            answer = self.server.client.get("/v1/extension-runs", params=query)
            assert answer.status_code == 200, answer.text
            pending: list[Json] = answer.json()
            return not pending

        wait_for(have_ended, f"{extension} on {file.path}", pause=0.01)

    # --- the comparison -------------------------------------------------------------------------

    def compare(self, step: str) -> None:
        self.counts[step] += 1
        self.counts["steps"] += 1
        self.age += 1
        self._settle()
        client = self.server.client
        listed = client.get("/v1/files").json()
        by_id = {each["fileId"]: seen(each) for each in listed}
        assert len(by_id) == len(listed)
        assert by_id == {file.id: file.listed() for file in self.files.values()}
        for file in self.files.values():
            details = client.get(f"/v1/files/{file.id}/details").json()
            assert seen(details) == file.listed()
            assert details.get("extensionStatus", {}) == file.version.statuses
            self._check_delivery(file, details["url"])

    def _check_delivery(self, file: File, url: str) -> None:
        delivered = self.server.client.get(url)
        if not file.version.is_published:
            assert delivered.status_code == 404
        elif file.version.is_private:
            assert delivered.status_code == 401
        else:
            assert delivered.status_code == 200, delivered.text
            assert delivered.content == file.version.content

    def _check_events(self) -> None:
        """Each run that was announced is told once, and no other."""
        self._settle()

        def is_quiet() -> bool:
            query = {"status": "pending"}
            answer = self.server.client.get("/v1/webhook-deliveries", params=query)
            pending: list[Json] = answer.json()
            return not pending

        wait_for(is_quiet, "webhooks to be delivered")
        told: dict[tuple[int, str], str] = {}
        ids: dict[tuple[int, str], set[str]] = {}
        for request in self.receiver.requests[self.first_event :]:
            body = request.json()
            _, machine, number = request.path.split("/")
            assert machine == str(id(self))
            event = int(number), body["service"]
            told[event] = body["error"]["reason"] if "error" in body else "success"
            ids.setdefault(event, set()).add(request.headers["webhook-id"])
        assert told == self.events
        assert all(len(each) == 1 for each in ids.values())
        self.counts["webhooks"] += len(told)


@pytest.fixture
def stage(
    sqlite_template: Path, vision: VisionEmulator, rekognition: RekognitionEmulator
) -> Iterator[type[Library]]:
    vision.labels, rekognition.labels = LABELS[GOOGLE], LABELS[AWS]
    with Receiver() as receiver:
        Library.template, Library.receiver = sqlite_template, receiver
        Library.vision, Library.rekognition = vision, rekognition
        Library.counts.clear()
        yield Library


def test_server_never_differs_from_its_model(stage: type[Library]) -> None:
    chance: random.Random = new_seed("model check")
    run_state_machine_as_test(
        seed(chance.randrange(2**32))(stage),
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            phases=[Phase.generate],
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    report("model check", divergences=0, **stage.counts)
    assert stage.counts["examples"] >= EXAMPLES
    assert stage.counts["crash"] > 0
    assert stage.counts["webhooks"] > 0
