"""Jobs go to threads in groups, each is answered, and none is lost when the queue is closed."""

import asyncio
import threading
import time
from collections import Counter

import pytest

from app.groups import GroupQueue


def work(queue: GroupQueue[int], sizes: list[int]) -> None:
    for group in queue.groups():
        sizes.append(len(group.jobs))
        time.sleep(0.005)
        group.answer(
            [(None, ValueError(job)) if job % 10 == 3 else (job * 2, None) for job in group.jobs]
        )


@pytest.mark.parametrize(("threads", "largest"), [(1, 1000), (1, 4), (3, 3)])
def test_every_job_is_answered_with_its_own_outcome(threads: int, largest: int) -> None:
    queue: GroupQueue[int] = GroupQueue(largest)
    sizes: list[int] = []
    workers = [threading.Thread(target=work, args=(queue, sizes)) for _ in range(threads)]

    async def submit_all() -> list[object]:
        for worker in workers:
            worker.start()
        waiting = [queue.submit(number) for number in range(100)]
        return list(await asyncio.gather(*waiting, return_exceptions=True))

    answers = asyncio.run(submit_all())
    queue.close()
    for worker in workers:
        worker.join(timeout=10)
        assert not worker.is_alive()
    assert Counter(type(answer) for answer in answers) == {int: 90, ValueError: 10}
    assert [each for each in answers if isinstance(each, int)] == [
        number * 2 for number in range(100) if number % 10 != 3
    ]
    assert sum(sizes) == 100
    assert 1 < max(sizes) <= largest


def test_what_was_submitted_before_the_end_is_done() -> None:
    queue: GroupQueue[int] = GroupQueue()
    done: list[int] = []

    async def submit_and_close() -> None:
        for number in range(20):
            queue.submit(number)
        queue.close()

    asyncio.run(submit_and_close())
    for group in queue.groups():
        done += group.jobs
        group.answer([(None, None)] * len(group.jobs))  # nobody waits any more
    assert done == list(range(20))


def test_a_job_that_is_given_up_does_not_keep_the_others_from_their_answers() -> None:
    queue: GroupQueue[int] = GroupQueue()

    async def give_one_up() -> int:
        given_up, kept = queue.submit(1), queue.submit(2)
        given_up.cancel()
        threading.Thread(target=work, args=(queue, [])).start()
        answer: int = await kept
        queue.close()
        return answer

    assert asyncio.run(give_one_up()) == 4
