"""Ids have the shapes that others read them by."""

from uuid import RFC_4122, UUID

from app.ids import new_request_id


def test_a_request_id_is_a_random_uuid() -> None:
    ids = {new_request_id() for _ in range(1000)}
    assert len(ids) == 1000
    for each in ids:
        parsed = UUID(each)
        assert (str(parsed), parsed.version, parsed.variant) == (each, 4, RFC_4122)
