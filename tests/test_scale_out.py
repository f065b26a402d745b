"""What compose.scale.yml describes, run here without a Docker engine: nginx with the configuration
that is shipped, two servers and a worker on PostgreSQL and an S3 server."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
import yaml  # type: ignore[import-untyped]

from app.extensions.schemas import AWS, GOOGLE
from tests import pictures
from tests.emulators.receiver import Receiver, close_early
from tests.emulators.s3 import S3Emulator
from tests.files.helpers import RawConnection
from tests.files.support import asking
from tests.postgres import Postgres, free_port
from tests.torture.harness import AUTH, ROOT, ServerProcess, WorkerProcess, wait_for

pytestmark = [
    pytest.mark.postgres,
    pytest.mark.skipif(
        shutil.which("nginx", path=f"{os.defpath}:/usr/sbin:{os.environ['PATH']}") is None
        and os.environ.get("CI") != "true",
        reason="needs nginx",
    ),
]

SECONDS = 60.0
COMPOSE = yaml.safe_load((ROOT / "compose.scale.yml").read_text())
UPLOAD = "/api/v1/files/upload"


def compose_environment() -> dict[str, str]:
    """What the replicas get, where nobody has set a variable."""
    return {
        name: re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value)
        for name, value in COMPOSE["x-loupe"]["environment"].items()
    }


def shipped_configuration(directory: Path, port: int, upstreams: list[int]) -> Path:
    """deploy/nginx.conf with other addresses, its temporary files elsewhere, and a shorter wait
    for headers."""
    text = (ROOT / "deploy/nginx.conf").read_text()
    changes = {
        "listen 8080;": f"listen 127.0.0.1:{port};",
        "client_header_timeout 10s;": "client_header_timeout 2s;",
        "http {": "http {\n    access_log off;\n"
        + "".join(
            f"    {kind}_temp_path {directory}/{kind};\n"
            for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        ),
        **{f"web-{n}:8000": f"127.0.0.1:{each}" for n, each in enumerate(upstreams, 1)},
    }
    for old, new in changes.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path = directory / "nginx.conf"
    path.write_text(text)
    return path


@contextmanager
def running_nginx(directory: Path, *upstreams: int) -> Iterator[str]:
    """The proxy's URL."""
    directory.mkdir()
    port = free_port()
    configuration = shipped_configuration(directory, port, list(upstreams))
    user = "user root;" if os.geteuid() == 0 else ""
    command = ["nginx", "-c", str(configuration), "-g"]
    command.append(f"daemon off; pid {directory}/pid; error_log stderr; {user}")
    with (directory / "log").open("wb") as log:
        environment = {"PATH": f"{os.environ['PATH']}:/usr/sbin"}
        process = subprocess.Popen(command, env=environment, stderr=log)
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        assert process.poll() is None, (directory / "log").read_text()
        try:
            return httpx.get(f"{url}/metrics").status_code == 403
        except httpx.TransportError:
            return False

    try:
        wait_for(answers, "nginx")
        yield url
    finally:
        process.terminate()
        process.wait(SECONDS)


class Deployment:
    """url: the proxy's. replicas: the servers behind it."""

    def __init__(self, url: str, replicas: list[ServerProcess]) -> None:
        self.url = url
        self.replicas = replicas

    def upload(self, url: str = "", **fields: str) -> dict[str, Any]:
        """By a connection of its own, through the proxy unless it is told otherwise."""
        answer = httpx.post(
            (url or self.url) + UPLOAD,
            auth=AUTH,
            files={"file": ("picture.jpg", pictures.jpeg())},
            data={"fileName": "picture.jpg", **fields},
            timeout=SECONDS,
        )
        assert answer.status_code == 200, answer.text
        uploaded: dict[str, Any] = answer.json()
        return uploaded

    def get(self, path: str, url: str = "", **query: Any) -> Any:
        answer = httpx.get((url or self.url) + path, auth=AUTH, params=query, timeout=SECONDS)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def uploads_of(self, replica: ServerProcess) -> float:
        """How many uploads a replica has answered, as it counts them itself."""
        exposed = httpx.get(f"{replica.url}/metrics", timeout=SECONDS).text
        found = re.search(r'requests_total\{kind="upload",.*status="200"\} (\S+)', exposed)
        return float(found[1]) if found else 0.0


def make_bucket(environment: dict[str, str]) -> None:
    """As the service `bucket` does."""
    [_, *command] = COMPOSE["services"]["bucket"]["command"]
    subprocess.run([sys.executable, *command], env=environment, check=True, timeout=SECONDS)


@pytest.fixture(scope="module")
def deployment(postgres: Postgres, s3_server: S3Emulator) -> Iterator[Deployment]:
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="loupe-scale-")))
        name = f"scale-{uuid4()}"
        database_url = postgres.create(name, template=f"template-{os.getpid()}")
        stack.callback(postgres.drop, name)
        settings = compose_environment() | {
            "LOUPE_HOST": "127.0.0.1",
            "AWS_ENDPOINT_URL_S3": s3_server.url,
            "LOUPE_SYNC_BUDGET_SECONDS": "1",
            "LOUPE_LOCAL_DELAY_SECONDS": f"{GOOGLE}=0,{AWS}=1.5",
        }
        for ours in ("LOUPE_DATA_DIR", "LOUPE_DATABASE_URL", "LOUPE_PUBLIC_URL"):
            del settings[ours]  # the harness has its own, and the proxy's port is not known yet
        make_bucket({"PATH": os.environ["PATH"], **settings})
        make_bucket({"PATH": os.environ["PATH"], **settings})  # a second time changes nothing
        processes: list[ServerProcess] = []
        for number, kind in enumerate((ServerProcess, ServerProcess, WorkerProcess)):
            (directory / str(number)).mkdir()
            process = kind(directory / str(number), database_url, **settings)
            stack.callback(process.end)
            process.start(wait=False)
            processes.append(process)
        for process in processes:
            process.wait_until_ready()
        [*replicas, _] = processes
        ports = [replica.port for replica in replicas]
        url = stack.enter_context(running_nginx(directory / "nginx", *ports))
        yield Deployment(url, replicas)


def test_uploads_land_on_both_replicas_and_each_reads_what_the_other_stored(
    deployment: Deployment,
) -> None:
    uploaded = [deployment.upload() for _ in range(6)]
    assert all(deployment.uploads_of(replica) > 0 for replica in deployment.replicas)
    content = pictures.jpeg()
    for url in [*(replica.url for replica in deployment.replicas), deployment.url]:
        for each in uploaded:
            path = httpx.URL(each["url"]).path
            assert httpx.get(url + path, timeout=SECONDS).content == content
            details = deployment.get(f"/v1/files/{each['fileId']}/details", url)
            assert details["size"] == len(content)


def test_tags_come_in_time_or_by_one_webhook(deployment: Deployment) -> None:
    with Receiver() as receiver:
        for _ in range(6):
            answer = deployment.upload(
                extensions=asking(GOOGLE, AWS, min_confidence=0), webhookUrl=receiver.url
            )
            assert answer["extensionStatus"][AWS] == "pending"

        def all_told() -> bool:
            pending = deployment.get("/v1/webhook-deliveries", status="pending")
            runs = deployment.get("/v1/extension-runs", status="pending")
            return not pending and not runs

        wait_for(all_told, "all is told")
        told = deployment.get("/v1/webhook-deliveries")
        assert {each["status"] for each in told} == {"delivered"}
        events = [request.headers["webhook-id"] for request in receiver.requests]
        assert sorted(events) == sorted(each["id"] for each in told)
        runs = deployment.get("/v1/extension-runs")
        assert [run["status"] for run in runs] == ["success"] * 12
        details = deployment.get(f"/v1/files/{answer['fileId']}/details")
        assert {tag["source"] for tag in details["AITags"]} == {GOOGLE, AWS}


@pytest.mark.parametrize("path", ["/metrics", "//metrics", "/%6detrics"])
def test_metrics_are_not_for_everyone(deployment: Deployment, path: str) -> None:
    with RawConnection(deployment.url) as connection:
        connection.send_head("GET", path)
        assert connection.read_answer().status == 403
    assert "loupe_" in httpx.get(f"{deployment.replicas[0].url}/metrics", timeout=SECONDS).text


def test_header_that_is_too_large_is_refused_by_the_proxy(deployment: Deployment) -> None:
    answer = httpx.get(deployment.url + "/healthz", headers={"x-large": "x" * 20_000})
    assert (answer.status_code, answer.headers["server"]) == (400, "nginx")


def test_body_that_is_too_large_is_refused_before_it_comes(deployment: Deployment) -> None:
    with RawConnection(deployment.url) as connection:
        connection.send_upload_head("Content-Length: 40000000")
        assert connection.read_answer().status == 413


def test_file_of_the_largest_size_passes_as_base64(deployment: Deployment) -> None:
    text = "A" * (4 * 24_990_000 // 3)
    answer = httpx.post(
        deployment.url + UPLOAD,
        auth=AUTH,
        files={"file": (None, text), "fileName": (None, "large.bin")},
        timeout=SECONDS,
    )
    assert answer.status_code == 200, answer.text
    assert answer.json()["size"] == 24_990_000


def test_header_that_does_not_end_is_cut(deployment: Deployment) -> None:
    with RawConnection(deployment.url) as connection:
        connection.send(b"GET /healthz HTTP/1.1\r\nHost: x\r\n")
        assert connection.read_to_end() == b""


def test_proxy_goes_on_when_a_replica_is_killed_and_uses_it_again_when_it_is_back(
    deployment: Deployment,
) -> None:
    lost, left = deployment.replicas
    lost.kill()
    before = deployment.uploads_of(left)
    for _ in range(6):
        deployment.get("/readyz")
        deployment.upload()
    assert deployment.uploads_of(left) == before + 6
    lost.start()
    wait_for(lambda: bool(deployment.upload() and deployment.uploads_of(lost)), "it serves again")


@pytest.fixture
def proxied(tmp_path: Path) -> Iterator[tuple[str, Receiver, Receiver]]:
    """The proxy before two servers that take every request and close without an answer."""
    with Receiver() as first, Receiver() as second:
        first.reply = second.reply = close_early()
        with running_nginx(tmp_path / "nginx", first.port, second.port) as url:
            yield url, first, second


def test_upload_that_may_have_been_stored_is_not_sent_to_another_replica(
    proxied: tuple[str, Receiver, Receiver],
) -> None:
    url, first, second = proxied
    answer = httpx.post(url + UPLOAD, files={"file": b"x"}, timeout=SECONDS)
    assert answer.status_code == 502
    assert len(first.requests) + len(second.requests) == 1


def test_request_that_only_reads_is_sent_to_the_other_replica(
    proxied: tuple[str, Receiver, Receiver],
) -> None:
    url, first, second = proxied
    assert httpx.get(f"{url}/v1/files", timeout=SECONDS).status_code == 502
    assert (len(first.requests), len(second.requests)) == (1, 1)
