"""Files that outlive a power cut: what takes another's name is on the disk first, and one process at a time writes.

A rename may reach the disk before the bytes of the file that it names. So: write under a temporary name, sync the file,
rename, sync the folder that holds the name.
"""
import os
import socket
import tempfile
from contextlib import contextmanager
from pathlib import Path

from console import InputError

from filelock import FileLock, Timeout


def sync(path):
    """Return when the file's bytes, or the folder's names, are on the disk. OSError where they cannot be."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
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
    """Hold the folder's lock, a file .lock in it, as long as the `with` lasts. InputError that names who holds it.

    The system lets go of a dead process's lock, so a file that was left behind blocks nobody."""
    lock, holder = FileLock(Path(folder) / ".lock", timeout=0), Path(folder) / ".lock"
    try:
        lock.acquire()
    except Timeout:
        who = holder.read_text(errors="replace").strip() or "another process"
        raise InputError(f"{flag} {folder} is being written by {who}: wait for it, or choose another {flag}") from None
    try:
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
        yield
    finally:
        lock.release()
