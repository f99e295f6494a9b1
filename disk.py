"""Files that outlive a power cut: what takes another's name is on the disk first, and one process at a time writes.

A rename may reach the disk before the bytes of the file that it names. So: write under a temporary name, sync the file,
rename, sync the folder that holds the name.
"""
import errno
import os
import shutil
import socket
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

from console import InputError

from filelock import FileLock, Timeout


def sync(path):
    """Return when the file's bytes, or the folder's names, are on the disk. OSError where they cannot be."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):     # a network share that syncs no folders: it does
            raise                                                # what it can
    finally:
        os.close(descriptor)


def sync_tree(folder):
    """The folder, and everything in it."""
    for where, _, names in os.walk(folder):
        for name in names:
            sync(Path(where) / name)
        sync(where)


def rename(old, new):
    """Give a file, or a folder that is on the disk, its final name. A folder's new name must be free."""
    os.replace(old, new)
    sync(Path(new).parent)


def write(path, content):
    """Write a whole file (str as UTF-8, or bytes), in one step: a reader sees the old one or the new one."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        sync(temporary)
        rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def check_writable(folder):
    """Make the folder, and write a file there and delete it: what cannot be saved is said before the work, not after.

    OSError; console.told names the flag."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from None


@contextmanager
def only_one(folder, flag="--out"):
    """Make the folder, and hold its lock, a file .lock in it, as long as the `with` lasts.

    InputError that names who holds it, OSError where one cannot write. The system lets go of a dead process's lock, so a
    file that was left behind blocks nobody. A folder that was made here and stays empty goes again.
    """
    folder, holder = Path(folder), Path(folder) / ".lock"
    made = not folder.exists()
    check_writable(folder)
    lock = FileLock(holder, timeout=0.2)                         # by then whoever holds it has written its name
    try:
        lock.acquire()
    except Timeout:
        who = " ".join(holder.read_text(errors="replace").split()) if holder.is_file() else ""
        raise InputError(f"{flag} {folder} is being written by {who or 'another process'}: wait for it, or choose "
                         f"another {flag}") from None
    try:
        if type(lock) is FileLock:                               # else filelock's own marker, where there is no flock
            with suppress(OSError):                              # a full disk: the name is a courtesy
                holder.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
        yield
    finally:
        if made and os.listdir(folder) == [".lock"]:
            shutil.rmtree(folder, ignore_errors=True)
        lock.release()
