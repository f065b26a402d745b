import asyncio
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

from app.images import ImagePool, ImageUnreadable
from tests import pictures
from tests.images.support import Studio, run_with_pool
from tests.pictures import LABORIOUS, READABLE, RED

T = TypeVar("T")

# Long enough for a machine that does much else.
DEADLINE_SECONDS = 30.0


def children_of(pid: int) -> set[int]:
    return {int(kid) for kid in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}


def own_children() -> set[int]:
    return children_of(os.getpid())


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def wait_until(is_true: Callable[[], bool]) -> bool:
    end = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < end:
        if is_true():
            return True
        time.sleep(0.02)
    return False


# Evaluated among the names of `app.images.child`, so that the child imports no test.
_CHILD_FACTS = """{
    "links": {
        int(name): os.readlink(f"/proc/self/fd/{name}")
        for name in os.listdir("/proc/self/fd") if os.path.islink(f"/proc/self/fd/{name}")
    },
    "modules": sorted(sys.modules),
    "main_module": "__main__" in sys.modules,
    "memory_bytes": resource.getrlimit(resource.RLIMIT_DATA)[0],
    "status": open("/proc/self/status").read(),
    "concurrency": pyvips.vips_lib.vips_concurrency_get(),
    "cached_operations": pyvips.cache_get_size(),
}"""


async def ask_child(pool: ImagePool, function: Callable[..., T], *args: Any) -> T:
    """Anything runs in a child the same way as the pool's own work."""
    return await pool._run(function, *args)


async def child_facts(pool: ImagePool) -> dict[str, Any]:
    facts: dict[str, Any] = await ask_child(pool, eval, _CHILD_FACTS)
    return facts


def test_a_child_that_takes_too_long_is_killed_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "picture"
    path.write_bytes(pictures.png())

    others = own_children()

    async def work(pool: ImagePool) -> None:
        slow = own_children() - others
        assert len(slow) == 1
        with pytest.raises(ImageUnreadable, match="longer than 1 s"):
            await ask_child(pool, time.sleep, 60)
        assert not any(is_running(pid) for pid in slow)
        assert len(own_children() - others) == 1
        assert (await pool.provider_copy(path)).width_px == 240

    run_with_pool(work, timeout_seconds=1)


def test_a_child_that_crashes_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "picture"
    path.write_bytes(pictures.png())
    others = own_children()

    async def work(pool: ImagePool) -> None:
        before = own_children() - others
        with pytest.raises(ImageUnreadable, match="crash"):
            await ask_child(pool, os.abort)
        after = own_children() - others
        assert len(after) == 2
        assert len(after & before) == 1
        assert (await pool.provider_copy(path)).width_px == 240

    run_with_pool(work, processes=2)


def test_a_cancelled_call_kills_its_child_and_the_pool_lives_on(tmp_path: Path) -> None:
    path = tmp_path / "picture"
    path.write_bytes(pictures.png())

    others = own_children()

    async def work(pool: ImagePool) -> None:
        slow = own_children() - others
        assert len(slow) == 1
        task = asyncio.create_task(ask_child(pool, time.sleep, 60))
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not any(is_running(pid) for pid in slow)
        assert (await pool.provider_copy(path)).width_px == 240

    run_with_pool(work)


def test_calls_wait_for_a_free_child_without_using_up_their_time(tmp_path: Path) -> None:
    path = tmp_path / "picture"
    path.write_bytes(pictures.png())

    async def work(pool: ImagePool) -> None:
        slow = asyncio.gather(*(ask_child(pool, time.sleep, 1.2) for _ in range(2)))
        await asyncio.sleep(0)
        assert (await pool.provider_copy(path)).width_px == 240
        await slow

    run_with_pool(work, timeout_seconds=2)


def test_a_closed_pool_has_no_children_and_takes_no_work(tmp_path: Path) -> None:
    async def run() -> set[int]:
        pool = ImagePool(processes=2)
        await pool.start()
        started = own_children()
        await pool.close()
        with pytest.raises(RuntimeError):
            await pool.provider_copy(tmp_path / "picture")
        return started

    before = own_children()
    started = asyncio.run(run()) - before
    assert len(started) == 2
    assert not any(is_running(pid) for pid in started)


def test_a_started_pool_spawns_no_more(tmp_path: Path) -> None:
    path = tmp_path / "picture"
    path.write_bytes(pictures.png())

    async def work(pool: ImagePool) -> None:
        before = own_children()
        await asyncio.gather(*(pool.thumbnail(path) for _ in range(6)))
        assert own_children() == before

    run_with_pool(work, processes=2)


def test_a_child_inherits_no_socket_and_no_file(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, (tmp_path / "lock").open("w") as lock:
        os.set_inheritable(server.fileno(), True)
        os.set_inheritable(lock.fileno(), True)
        facts = run_with_pool(child_facts)
    # Beside its three streams only what it opened itself.
    assert facts["links"].pop(2) == "/dev/null"
    assert {0, 1} <= facts["links"].keys()
    others = [link for number, link in facts["links"].items() if number > 2]
    assert {link for link in others if Path(link).exists()} <= {"/dev/null"}


def test_a_child_loads_little_and_is_bounded() -> None:
    facts = run_with_pool(child_facts)
    loaded = set(facts["modules"])
    assert not loaded & {"pydantic", "sqlalchemy", "fastapi", "grpc", "boto3", "pytest"}
    assert not facts["main_module"]
    assert facts["memory_bytes"] == 2 * 1024**3
    assert (facts["concurrency"], facts["cached_operations"]) == (1, 0)


def test_the_main_modules_file_is_back_after_each_call(studio: Studio) -> None:
    before = sys.modules["__main__"].__dict__.get("__file__")
    studio.copy(pictures.png())
    assert sys.modules["__main__"].__dict__.get("__file__") == before


_PARENT = """
import asyncio, sys, time
from pathlib import Path
from app.images import ImagePool

async def main():
    pool = ImagePool(processes=2)
    await pool.start()
    asyncio.create_task(pool._run(time.sleep, 600))
    await asyncio.sleep(0.5)
    print("ready", flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


def test_busy_and_idle_children_end_when_their_parent_is_killed() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", _PARENT],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    with parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"ready\n"
        kids = children_of(parent.pid)
        assert len(kids) == 2
        assert all(is_running(pid) for pid in kids)
        parent.send_signal(signal.SIGKILL)
    assert wait_until(lambda: not any(is_running(pid) for pid in kids))


def peak_memory_kib(work: Callable[[ImagePool], Awaitable[Any]], **options: Any) -> int:
    async def measured(pool: ImagePool) -> int:
        await work(pool)
        status = (await child_facts(pool))["status"]
        return int(status.partition("VmHWM:")[2].split()[0])

    return run_with_pool(measured, **options)


@pytest.mark.parametrize("name", list(LABORIOUS))
def test_laborious_files_are_read_in_bounded_memory(name: str, tmp_path: Path) -> None:
    path = tmp_path / "picture"
    path.write_bytes(LABORIOUS[name]())

    async def work(pool: ImagePool) -> None:
        await pool.provider_copy(path)

    assert peak_memory_kib(work) < 400 * 1024


def test_a_wide_jpeg_is_cheap(tmp_path: Path) -> None:
    path = tmp_path / "picture"
    path.write_bytes(READABLE["jpeg-12000-wide"]())

    async def work(pool: ImagePool) -> None:
        await pool.provider_copy(path)

    # Its pixels would be 72 MB.
    assert peak_memory_kib(work) < 64 * 1024


def test_a_picture_that_needs_more_memory_than_there_is_is_unreadable(tmp_path: Path) -> None:
    path = tmp_path / "picture"
    image = pictures.plain(6_000, 6_000, RED).bandjoin(200).copy(interpretation="srgb")
    path.write_bytes(pictures.as_png(image, interlace=True))
    small = tmp_path / "small"
    small.write_bytes(pictures.png())

    async def work(pool: ImagePool) -> None:
        with pytest.raises(ImageUnreadable):
            await pool.provider_copy(path)
        assert (await pool.provider_copy(small)).width_px == 240

    run_with_pool(work, memory_bytes=100 * 1024 * 1024)


def test_what_crosses_between_processes_can_be_pickled() -> None:
    error = pickle.loads(pickle.dumps(ImageUnreadable("why")))
    assert isinstance(error, ImageUnreadable)
    assert str(error) == "why"


def test_children_write_no_file(tmp_path: Path) -> None:
    target = tmp_path / "written"

    async def work(pool: ImagePool) -> None:
        with pytest.raises(OSError, match="too large"):
            await ask_child(pool, target.write_text, "something")

    run_with_pool(work)
    assert target.read_text() == ""


def test_uvloop_runs_the_pool_as_well(tmp_path: Path) -> None:
    uvloop = pytest.importorskip("uvloop")
    path = tmp_path / "picture"
    path.write_bytes(pictures.png())

    async def run() -> int:
        pool = ImagePool(processes=1, timeout_seconds=1)
        await pool.start()
        with pytest.raises(ImageUnreadable):
            await ask_child(pool, time.sleep, 60)
        width = (await pool.provider_copy(path)).width_px
        await pool.close()
        return width

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(run()) == 240
