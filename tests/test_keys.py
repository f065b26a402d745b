import asyncio
import base64
from collections.abc import Iterator

import pytest

from app.keys import Keys, load_keys, new_webhook_secret
from app.settings import Settings, load_settings
from tests.test_db import Running


@pytest.fixture
def running(database_url: str) -> Iterator[Running]:
    running = Running(database_url)
    yield running
    running.close()


def load(running: Running, **settings: str) -> Keys:
    return running.run(load_keys(running.db, load_settings(Settings, **settings)))


def test_loopback_has_the_development_pair(running: Running) -> None:
    keys = load(running)
    [pair] = keys.pairs
    assert (pair.public, pair.private) == ("public_loupe_development", "private_loupe_development")
    assert running.names() == {"webhook_secret"}


def test_elsewhere_a_pair_is_generated_once_and_kept(running: Running) -> None:
    first, second = (load(running, host="0.0.0.0") for _ in range(2))
    [pair] = first.pairs
    assert pair.public.startswith("public_")
    assert pair.private.startswith("private_")
    assert len(pair.private) >= 40
    assert second == first
    assert "development" not in pair.private


def test_pairs_of_the_settings_are_taken_by_their_positions(running: Running) -> None:
    keys = load(running, private_keys="private_a,private_b", public_keys="public_a,public_b")
    pairs = [(pair.public, pair.private) for pair in keys.pairs]
    assert pairs == [("public_a", "private_a"), ("public_b", "private_b")]
    assert keys.source == "environment"


def test_webhook_secret_is_generated_once_and_kept(running: Running) -> None:
    first, second = load(running), load(running)
    assert first.webhook_secret == second.webhook_secret
    assert first.webhook_secret_source == "generated, kept in the database"


def test_webhook_secret_of_the_settings_wins_and_does_not_replace_the_kept_one(
    running: Running,
) -> None:
    kept = load(running).webhook_secret
    assert load(running, webhook_secret="whsec_0123456789").webhook_secret == "whsec_0123456789"
    assert load(running).webhook_secret == kept


def test_processes_that_start_at_once_agree(running: Running) -> None:
    settings = load_settings(Settings, host="0.0.0.0")

    async def start_all() -> list[Keys]:
        return await asyncio.gather(*[load_keys(running.db, settings) for _ in range(8)])

    found = running.run(start_all())
    assert all(keys == found[0] for keys in found)


def test_generated_secret_is_32_random_bytes_as_receivers_are_given_them() -> None:
    one, another = new_webhook_secret(), new_webhook_secret()
    assert one != another
    assert one.startswith("whsec_")
    assert len(base64.b64decode(one.removeprefix("whsec_"), validate=True)) == 32
