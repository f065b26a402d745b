"""What a failed request says."""

from app.outbound.errors import OutboundError, OutboundReason


def test_every_reason_has_a_sentence() -> None:
    for reason in OutboundReason:
        message = OutboundError(reason).message
        assert message[0].isupper()
        assert message.count(".") == 1
        assert message.endswith(".")
