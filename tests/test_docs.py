"""The documents say what the code does."""

import itertools
import re
from datetime import UTC, datetime, timedelta
from email.message import Message
from pathlib import Path

import pytest
from pydantic_settings import BaseSettings

from app.extensions.provider import Reason
from app.extensions.providers import local
from app.extensions.registry import discover
from app.outbound import OutboundReason
from app.settings import Settings, env_name
from app.webhooks.signing import signature_headers

PROJECT = Path(__file__).resolve().parent.parent
README = (PROJECT / "README.md").read_text()
DOCUMENTS = sorted(
    path.relative_to(PROJECT) for path in [*PROJECT.glob("*.md"), *(PROJECT / "docs").rglob("*.md")]
)


def cells(text: str) -> set[str]:
    """What stands as `code` in the first cell of a table's row."""
    return {
        name
        for line in text.splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`([^`]+)`", line.split(" | ")[0])
    }


def test_the_readme_lists_every_setting_and_no_other() -> None:
    classes: list[type[BaseSettings]] = [
        Settings,
        *(provider.settings_class for provider in discover().values()),
    ]
    known = {env_name(each, field) for each in classes for field in each.model_fields}
    assert {name for name in cells(README) if name.startswith("LOUPE_")} == known


def test_every_reason_is_documented() -> None:
    listed = cells((PROJECT / "docs" / "webhooks.md").read_text())
    assert {reason.value for reason in Reason} <= listed


def test_every_label_of_the_local_tagger_is_documented() -> None:
    assert local.__doc__ is not None
    lines = local.__doc__.splitlines()
    above = [line for line, below in itertools.pairwise(lines) if below.startswith("  ")]
    labels = {label for line in above if line[:1].isalpha() for label in line.split(", ")}
    assert len(labels) >= 20
    section = (PROJECT / "docs" / "extensions.md").read_text().partition("## The local tagger")[2]
    rows = [line.split(" | ")[0].removeprefix("| ") for line in section.splitlines() if line]
    assert labels <= {label for row in rows for label in row.split(", ")}


def test_the_readmes_signature_check_takes_our_webhooks_and_no_others() -> None:
    [snippet] = [code for code in blocks("python") if "def is_genuine" in code]
    names: dict[str, object] = {}
    exec(snippet, names)
    is_genuine = names["is_genuine"]
    assert callable(is_genuine)
    secret, body, now = "whsec_c2VjcmV0", b"{}", datetime.now(UTC)
    headers = Message()
    for name, value in signature_headers(secret, "evt_1", body, now).items():
        headers[name] = value
    assert is_genuine(secret, headers, body)
    assert not is_genuine(secret, headers, b"{} ")
    assert not is_genuine(secret + "x", headers, body)
    old = signature_headers(secret, "evt_1", body, now - timedelta(minutes=6))
    assert not is_genuine(secret, old, body)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_every_link_leads_somewhere(document: Path) -> None:
    text = (PROJECT / document).read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http://", "https://")):
            continue
        path, _, heading = link.partition("#")
        target = (PROJECT / document).parent / path if path else PROJECT / document
        assert target.exists(), link
        if heading:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert heading in {h.lower().replace(" ", "-") for h in headings}, link


def test_a_webhooks_failure_that_the_documents_name_exists() -> None:
    assert f"`{OutboundReason.BLOCKED_ADDRESS}`" in (PROJECT / "docs" / "webhooks.md").read_text()
