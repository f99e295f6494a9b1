"""Tests of disk.py: what is on the disk before what, whole files or none, and one process at a time."""
import errno
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import disk
from console import InputError
from disk import check_held, check_writable, only_one, rename, sync, sync_tree, write

ROOT = Path(disk.__file__).parent


@pytest.fixture
def done(tmp_path, monkeypatch):
    """What is synced and renamed, in order; paths from tmp_path on."""
    done, real_sync, real_replace = [], os.fsync, os.replace

    def short(path):
        return os.path.relpath(path, tmp_path)

    def fsync(descriptor):
        done.append(f"sync {short(os.readlink(f'/proc/self/fd/{descriptor}'))}")
        real_sync(descriptor)

    def replace(old, new):
        done.append(f"{short(old)} -> {short(new)}")
        real_replace(old, new)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    return done


# What is on the disk before what.

def test_bytes_before_the_name_and_the_name_before_the_return(tmp_path, done):
    """A name that reaches the disk before the bytes that it stands for: after a power cut a file of 0 bytes."""
    write(tmp_path / "a.json", "Thr\u00e9e\n")
    assert done == ["sync a.json.tmp", "a.json.tmp -> a.json", "sync ."]
    assert (tmp_path / "a.json").read_bytes() == "Thr\u00e9e\n".encode()
    write(tmp_path / "a.json", b"\xff")
    assert (tmp_path / "a.json").read_bytes() == b"\xff" and os.listdir(tmp_path) == ["a.json"]


def test_a_folder_is_synced_with_all_that_is_in_it(tmp_path, done):
    """A file in a folder's folder, or the names in it, left in memory."""
    (tmp_path / "step" / "deeper").mkdir(parents=True)
    for name in ("a", "deeper/b"):
        (tmp_path / "step" / name).touch()
    sync_tree(tmp_path / "step")
    assert sorted(done) == ["sync step", "sync step/a", "sync step/deeper", "sync step/deeper/b"]
    done.clear()
    rename(tmp_path / "step", tmp_path / "deeper")
    assert done == ["step -> deeper", "sync ."]


def test_what_cannot_be_synced(tmp_path, monkeypatch):
    """A run that can save nothing on a network share that syncs no folders; a disk's own error taken for that."""
    for code, stops in ((errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True), (errno.ENOSPC, True)):
        def fsync(descriptor):
            raise OSError(code, os.strerror(code))
        monkeypatch.setattr(os, "fsync", fsync)
        if stops:
            with pytest.raises(OSError, match=os.strerror(code)):
                sync(tmp_path)
        else:
            sync(tmp_path)


@pytest.mark.parametrize("name", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, name, error):
    """Half a file in the place of a good one; a temporary file that fills the disk."""
    write(tmp_path / "a.json", "old")

    def fail(*_):
        raise error
    monkeypatch.setattr(os, name, fail)
    with pytest.raises(type(error)):
        write(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "old" and os.listdir(tmp_path) == ["a.json"]


def test_a_full_disk_is_told_with_its_file(tmp_path, monkeypatch):
    """"No space left on device", and no word of where: neither write(2) nor fsync(2) names a file."""
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    for owner, name in ((Path, "write_bytes"), (os, "fsync")):
        with monkeypatch.context() as m:
            m.setattr(owner, name, full)
            with pytest.raises(OSError) as error:
                write(tmp_path / "a.json", "new")
            assert error.value.errno == errno.ENOSPC and error.value.filename == str(tmp_path / "a.json")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as error:
        sync(tmp_path)
    assert error.value.filename == str(tmp_path)


# Where one can write.

def test_check_writable(tmp_path):
    """A folder that turns out to be read-only after the work; a test file that stays; a folder that is not made."""
    check_writable(tmp_path / "a" / "b")
    assert os.listdir(tmp_path / "a" / "b") == []
    (tmp_path / "file").touch()
    for place in ("/proc", tmp_path / "file", tmp_path / "file" / "run"):        # root may write anywhere else
        with pytest.raises(OSError) as error:
            check_writable(place)
        assert str(place) == str(error.value.filename)


# One at a time.

HOLD = """
import sys; sys.path.insert(0, {root!r})
from disk import only_one
with only_one({folder!r}):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(folder):
    """A process that holds the folder until its standard input ends."""
    process = subprocess.Popen([sys.executable, "-c", HOLD.format(root=str(ROOT), folder=str(folder))], text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_folder_that_another_has_taken_over(tmp_path):
    """A folder deleted under a live process and held by the next one: deleted again, with the lock and all, when the
    first one ends; files of the one in the folder of the other."""
    for place, lose in (("a", shutil.rmtree), ("b", lambda folder: (folder / ".lock").unlink())):
        folder = tmp_path / place
        with only_one(folder):
            check_held(folder / "step" / "file")
            lose(folder)
            process = holder(folder)
            for path in (folder, folder / "step" / "file"):
                with pytest.raises(InputError, match=f"^{folder} was deleted or taken over while"):
                    check_held(path)
            with pytest.raises(InputError, match="taken over"):
                write(folder / "eval.json", "")
            check_held(tmp_path)
            check_held(tmp_path / "ab")
        assert (folder / ".lock").read_text().startswith(f"process {process.pid} on ")
        assert os.listdir(folder) == [".lock"]
        process.communicate()
        check_held(folder)                                       # ours no more


@pytest.mark.parametrize("make", [
    lambda lock: lock.write_text("my own"), lambda lock: lock.write_text("process 1 on a\nprocess 2 on b\n"), os.mkfifo,
    os.mkdir, lambda lock: lock.symlink_to(lock.with_name("file"))])
def test_a_lock_of_somebody_else(tmp_path, make):
    """A file of the user's that happens to have this name, overwritten; a pipe that is waited for."""
    (tmp_path / "file").write_text("my own")
    make(tmp_path / ".lock")
    was = (tmp_path / ".lock").lstat()
    with pytest.raises((InputError, OSError)) as error:
        with only_one(tmp_path):
            pytest.fail("held")
    assert str(tmp_path / ".lock") in str(error.value) and (tmp_path / ".lock").lstat().st_ino == was.st_ino
    assert (tmp_path / ".lock").lstat().st_mtime_ns == was.st_mtime_ns
    assert (tmp_path / "file").read_text() == "my own"


def test_one_holds_and_the_other_is_refused(tmp_path):
    """Two processes in one folder; a refusal that does not say by whom; a lock that outlives the work, or an error."""
    process = holder(tmp_path)
    who = f"--out {tmp_path} is being written by process {process.pid} on "
    for flag in ("--out", "--json"):
        with pytest.raises(InputError) as error:
            with only_one(tmp_path, flag):
                pytest.fail("both hold it")
        assert str(error.value).startswith(who.replace("--out", flag)) and "\n" not in str(error.value)
        assert str(error.value).endswith(f": wait for it, or choose another {flag}")
    process.communicate()
    for _ in range(2):                                           # the second time after an error
        with pytest.raises(ZeroDivisionError):
            with only_one(tmp_path):
                assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
                with pytest.raises(InputError, match=f"by process {os.getpid()} on"):
                    with only_one(tmp_path):                     # nor by itself
                        pytest.fail("both hold it")
                raise ZeroDivisionError


def test_a_dead_process_blocks_nobody(tmp_path):
    """A lock file left by a kill, that has to be found and deleted by hand."""
    process = holder(tmp_path)
    process.kill()
    process.communicate()
    assert (tmp_path / ".lock").read_text().startswith(f"process {process.pid} on ")
    with only_one(tmp_path):
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")


def test_a_full_disk_can_be_locked(tmp_path):
    """A run that cannot be resumed, and so not cleaned, where there is no room for a name in the lock."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    (tmp_path / ".lock").touch()
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with only_one(tmp_path):
            with pytest.raises(InputError, match="by another process"):
                with only_one(tmp_path):
                    pytest.fail("both hold it")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_folder_that_was_made_for_nothing_goes_again(tmp_path):
    """Folders left behind by mistyped commands; the user's own empty folder deleted; what was written, deleted."""
    with only_one(tmp_path / "new"):
        assert (tmp_path / "new" / ".lock").exists()
    assert not (tmp_path / "new").exists()
    with only_one(tmp_path / "used"):
        (tmp_path / "used" / "file").touch()
    (tmp_path / "own").mkdir()
    with only_one(tmp_path / "own"):
        pass
    assert sorted(os.listdir(tmp_path)) == ["own", "used"] and os.listdir(tmp_path / "own") == []
    assert sorted(os.listdir(tmp_path / "used")) == [".lock", "file"]
