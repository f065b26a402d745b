from collections.abc import Iterator

import pytest
from anyio.from_thread import start_blocking_portal

from app.images import ImagePool
from tests.images.support import Studio


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    # Not an asyncio.Runner: anyio ends its children with the first task that is run to its end.
    with start_blocking_portal() as portal:
        pool = ImagePool(processes=1)
        portal.call(pool.start)
        yield Studio(tmp_path_factory.mktemp("pictures"), portal, pool)
        portal.call(pool.close)
