"""Files in blocks: whatever the pieces and whatever the file system, the bytes are those taken."""

import errno
import fcntl
import os
import random
from io import FileIO
from pathlib import Path

import pytest

from app.storage import blocks
from app.storage.blocks import BLOCK_BYTES, BlockFile

SIZES = [0, 1, 4095, 4096, 4097, 100_000, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 3_000_017]


def fill(file: BlockFile, content: bytes, piece_bytes: int = 65_536) -> None:
    for start in range(0, len(content), piece_bytes):
        rest = memoryview(content)[start : start + piece_bytes]
        while rest:
            rest = rest[file.take(rest) :]
            if file.is_block_full:
                file.write_block()


def store(path: Path, content: bytes, piece_bytes: int = 65_536) -> None:
    file = BlockFile(path)
    fill(file, content, piece_bytes)
    file.complete()
    file.sync()
    file.close()


@pytest.mark.parametrize("piece_bytes", [999, 65_536, 2_000_000])
@pytest.mark.parametrize("size", SIZES)
def test_a_file_holds_the_bytes_that_it_took(tmp_path: Path, size: int, piece_bytes: int) -> None:
    content = random.Random(size).randbytes(size)
    store(tmp_path / "x", content, piece_bytes)
    assert (tmp_path / "x").read_bytes() == content


def test_files_in_turn_do_not_mix_though_they_share_memory(tmp_path: Path) -> None:
    contents = [random.Random(number).randbytes(700_000 - number * 7) for number in range(40)]
    for number, content in enumerate(contents):
        store(tmp_path / str(number), content)
    for number, content in enumerate(contents):
        assert (tmp_path / str(number)).read_bytes() == content


def test_a_small_file_is_not_there_before_it_is_complete(tmp_path: Path) -> None:
    file = BlockFile(tmp_path / "x")
    fill(file, b"some bytes")
    assert file.is_in_memory
    assert bytes(file.block) == b"some bytes"
    assert not file.path.exists()
    file.complete()
    assert not file.is_in_memory
    assert file.path.read_bytes() == b"some bytes"
    file.close()


def test_a_file_system_without_direct_writing_is_written_to_through_its_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux makes the file before it says so."""

    def refuse(path: str, flags: int) -> int:
        os.close(os.open(path, flags))
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(blocks, "_open_direct", refuse)
    store(tmp_path / "x", b"y" * 600_001)
    assert (tmp_path / "x").read_bytes() == b"y" * 600_001


def test_a_file_system_that_wants_more_than_pages_is_written_to_through_its_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = FileIO.write
    refused = []

    def refuse(file: FileIO, view: memoryview) -> int:
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(len(view))
            raise OSError(errno.EINVAL, "Invalid argument")
        return write(file, view)

    monkeypatch.setattr(blocks, "FileIO", type("Choosy", (FileIO,), {"write": refuse}))
    store(tmp_path / "x", b"y" * 600_001)
    assert (tmp_path / "x").read_bytes() == b"y" * 600_001
    assert refused == [BLOCK_BYTES]


def test_short_writes_are_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = FileIO.write

    def write_little(file: FileIO, view: memoryview) -> int:
        return write(file, view[: 8 * 4096])

    monkeypatch.setattr(blocks, "FileIO", type("Slow", (FileIO,), {"write": write_little}))
    content = random.Random(1).randbytes(600_001)
    store(tmp_path / "x", content)
    assert (tmp_path / "x").read_bytes() == content


def test_an_existing_file_is_never_written_over(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"before")
    file = BlockFile(tmp_path / "x")
    fill(file, b"after")
    with pytest.raises(FileExistsError):
        file.complete()
    file.discard()
    assert (tmp_path / "x").read_bytes() == b"before"


@pytest.mark.parametrize("size", [10, 600_000])
def test_a_discarded_file_is_gone_and_one_that_has_moved_stays(tmp_path: Path, size: int) -> None:
    for name in ("gone", "moved"):
        file = BlockFile(tmp_path / name)
        fill(file, bytes(size))
        file.complete()
        if name == "moved":
            file.close()
            file.move(tmp_path / "target")
        file.discard()
        file.discard()
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_what_was_never_written_leaves_nothing(tmp_path: Path) -> None:
    file = BlockFile(tmp_path / "x")
    fill(file, b"some bytes")
    file.discard()
    assert list(tmp_path.iterdir()) == []
