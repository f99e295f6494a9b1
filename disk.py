"""Files that outlive a power cut: what takes another's name is on the disk first, and one process at a time writes.

A rename may reach the disk before the bytes of the file that it names. So: write under a temporary name, sync the file,
rename, sync the folder that holds the name.
"""
import errno
import io
import os
import re
import socket
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

from console import InputError

from filelock import FileLock, Timeout


def sync(path):
    """Return when the file's bytes, or the folder's names, are on the disk. OSError, with the path, if not."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):     # a network share that syncs no folders: it does
            raise OSError(error.errno, error.strerror, str(path)) from None                      # what it can
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
    check_held(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        sync(temporary)
        rename(temporary, path)
    except OSError as error:                                     # of a full disk: it names no file
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def write_figure(path, figure):
    """Write a matplotlib figure as PNG, as `write` does, and close it."""
    import matplotlib.pyplot as plt                              # loaded already: it made the figure
    figure.savefig(drawn := io.BytesIO(), dpi=120, format="png")
    plt.close(figure)
    write(path, drawn.getvalue())


def check_file(path):
    """InputError for what `write` could not write later: a folder, a place without permission, a .tmp in the way."""
    temporary = Path(f"{path}.tmp")
    try:
        if Path(path).is_dir():
            raise IsADirectoryError(0, "it is a folder")
        temporary.touch(exist_ok=False)
        temporary.unlink()
    except OSError as error:
        why = {FileExistsError: f"{temporary} is in the way",
               FileNotFoundError: f"there is no folder {Path(path).parent}"}.get(type(error), error.strerror)
        raise InputError(f"{path} cannot be written ({why}): give another file") from None


def check_writable(folder):
    """Make the folder, and write a file there and delete it: what cannot be saved is said before the work, not after.

    OSError; console.told names the flag."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from None


_locks = {}                                                      # folder -> os.stat of the lock that we hold there


def check_held(path):
    """InputError where we held path or a folder above it, and its .lock was deleted: another may have it by now."""
    for folder, mine in _locks.items():
        if Path(path).absolute().is_relative_to(folder):
            with suppress(FileNotFoundError):
                if os.path.samestat(os.stat(folder / ".lock"), mine):
                    continue
            raise InputError(f"{folder} was deleted or taken over while this process worked in it: nothing more is "
                             "written there")


@contextmanager
def only_one(folder, flag="--out"):
    """Make the folder, and hold its lock, a file .lock in it, as long as the `with` lasts.

    InputError that names who holds it, or for a .lock of somebody else's; OSError where one cannot write. The system
    lets go of a dead process's lock, so a file that was left behind blocks nobody. Where no name was added, the lock
    goes again, and a folder that was made here with it.
    """
    folder, holder = Path(folder), Path(folder) / ".lock"
    made = not folder.exists()
    check_writable(folder)
    before = set(os.listdir(folder))
    lock = FileLock(holder, timeout=0.2)                         # by then whoever holds it has written its name
    try:
        lock.acquire()
    except Timeout:
        who = " ".join(holder.read_text(errors="replace").split()) if holder.is_file() else ""
        raise InputError(f"{flag} {folder} is being written by {who or 'another process'}: wait for it, or choose "
                         f"another {flag}") from None
    try:
        if type(lock) is FileLock:                               # else filelock's own marker, where there is no flock
            if not holder.is_file() or not re.fullmatch(r"(process \d+ on .*\n)?", holder.read_text(errors="replace")):
                raise InputError(f"{holder} is not of a run: move it away, or choose another {flag}")
            _locks[folder.absolute()] = os.stat(holder)
            with suppress(OSError):                              # a full disk: the name is a courtesy
                holder.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
        yield
    finally:
        with suppress(InputError, OSError):
            check_held(folder)
            if set(os.listdir(folder)) - before == {".lock"}:
                holder.unlink()
                if made:
                    folder.rmdir()
        _locks.pop(folder.absolute(), None)
        lock.release()
