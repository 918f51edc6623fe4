"""Files of snapshots: whole or not there, whatever interrupts the writing."""

import asyncio
import stat

import pytest

from kvrouter_grpc.snapshots import disk
from kvrouter_grpc.snapshots.disk import SnapshotDirectory


def names(path):
    return [file.name for file in path.iterdir()]


async def pieces(*given, then=None):
    for piece in given:
        yield piece
        await asyncio.sleep(0)
    if then is not None:
        await then()


async def test_what_is_written_is_read(tmp_path):
    directory = SnapshotDirectory(tmp_path / "made" / "for it")
    assert await directory.read("a.b.c") is None
    assert await directory.write("a.b.c", pieces(b"one", b"two")) == 6
    assert await directory.read("a.b.c") == b"onetwo"
    assert await directory.write("a.b.c", pieces(b"three")) == 5
    assert await directory.read("a.b.c") == b"three"
    (file,) = (tmp_path / "made" / "for it").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


async def test_a_name_stays_in_the_directory(tmp_path):
    assert SnapshotDirectory(tmp_path).file("../../etc/x").parent == tmp_path


async def test_a_failure_leaves_the_one_before_and_no_trace(tmp_path):
    directory = SnapshotDirectory(tmp_path)
    await directory.write("a", pieces(b"before"))

    async def fail():
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        await directory.write("a", pieces(b"after", then=fail))
    assert await directory.read("a") == b"before"
    assert len(names(tmp_path)) == 1


@pytest.mark.parametrize("turns", range(12))
async def test_a_cancellation_at_any_step_leaves_no_trace(tmp_path, turns):
    directory = SnapshotDirectory(tmp_path)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(directory.write("a", pieces(b"x" * 100_000, b"y" * 100_000)))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
    assert names(tmp_path) in ([], ["a.kvsnapshot"])
    if names(tmp_path):
        assert await directory.read("a") == b"x" * 100_000 + b"y" * 100_000


async def test_a_file_beyond_any_snapshot_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "MOST_BYTES", 4)
    directory = SnapshotDirectory(tmp_path)
    await directory.write("a", pieces(b"12345"))
    with pytest.raises(OSError, match="larger"):
        await directory.read("a")
