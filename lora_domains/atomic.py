"""Atomic writes: a file or a folder is replaced as a whole, or it stays as it was; locked files
are appended to line by line.

Everything is written beside its final place, flushed to the disk and then renamed. A process killed
at any moment leaves the old content or the new. Permissions follow the umask. The functions raise
OSError; callers turn it into an error that says what could not be written, as ``write_files`` does.
"""

import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

from lora_domains.errors import DomainError, UsageError

PAUSES = (0.05, 0.1, 0.2, 0.4, 0.8)
"""Seconds to wait for a process that reads what is to be replaced, which Windows does not allow."""

NAME = re.compile(r"(?ai)(?!(con|prn|aux|nul|com\d|lpt\d)$)[a-z0-9][a-z0-9_-]{0,63}")
"""A name that is safe as that of a folder, on Windows too."""
IN_CACHE = re.compile(r"models--(.+?)--(.+)/snapshots/[^/]+")
"""The end of the path of a repository's files in the Hub's cache."""


@contextmanager
def new_file(path: Path, *, private: bool = False, overwrite: bool = True) -> Iterator[IO[bytes]]:
    """A binary file to write into; it becomes ``path`` when the block succeeds.

    ``private`` files are readable by their owner only. Without ``overwrite`` a file that exists by
    then is kept and the new content is dropped, so that of several processes the first one wins.
    """
    mode = 0o600 if private else 0o666
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = _beside(path)
    try:
        with open(fresh, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if overwrite:
            _rename(fresh, path)
        else:
            _link(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def write_text(path: Path, text: str, *, private: bool = False, overwrite: bool = True) -> None:
    """Write ``text`` to ``path`` in UTF-8; the options are those of ``new_file``."""
    with new_file(path, private=private, overwrite=overwrite) as file:
        file.write(text.encode("utf-8"))


def write_files(texts: Mapping[Path, str]) -> None:
    """Write each text to its path; raises UsageError where that is impossible."""
    for path, text in texts.items():
        try:
            write_text(path, text)
        except OSError as error:
            raise _unwritable(path, error) from error


def check_writable(path: Path) -> None:
    """Raise UsageError where ``write_files`` cannot write ``path``; its folder is made."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> UsageError:
    return UsageError(
        where=str(path),
        expected="a place that can be written",
        found=error.strerror or str(error),
        hint="Choose another folder, or free some space.",
    )


@contextmanager
def locked(path: Path) -> Iterator[IO[bytes]]:
    """The file ``path`` to read and append to, locked for this process until the block ends."""
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    # A lock on the file itself would keep others from reading it on Windows.
    with FileLock(path.with_name(f"{_hidden(path)}.lock"), mode=0o666), path.open("a+b") as file:
        yield file


def whole_lines(file: IO[bytes]) -> list[str]:
    """Every whole line of a ``locked`` file; half a line that a killed process left is removed."""
    file.seek(0)
    content = file.read()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        file.truncate(whole)
    return content[:whole].decode("utf-8", "replace").splitlines()


def add_line(file: IO[bytes], line: str) -> None:
    """Append ``line`` to a ``locked`` file and flush it to the disk."""
    file.write(line.encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())


def unfinished(path: Path) -> list[Path]:
    """What killed processes left beside ``path`` while they were writing it."""
    return list(path.parent.glob(f"{_hidden(path)}.*"))


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to write into; it becomes ``folder`` when the block succeeds.

    A link stays a link: the folder that it points to is replaced.
    """
    folder = restored(folder.resolve())
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = _beside(folder)
    fresh.mkdir()
    try:
        yield fresh
        mode = fresh.stat().st_mode & 0o666  # safetensors writes files for their owner only
        for path in (path for path in fresh.rglob("*") if path.is_file()):
            path.chmod(mode)
            with path.open("r+b") as file:  # Windows flushes only what can be written
                os.fsync(file.fileno())
        _take_place(fresh, folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def restored(folder: Path) -> Path:
    """``folder``, put back first if a process died between the two renames that replace it."""
    if not folder.exists() and folder.name:
        waiting = folder.with_name(f".{folder.name}.old")
        if waiting.exists():
            os.rename(waiting, folder)
    return folder


def _hidden(path: Path) -> str:
    return f".{path.name.removeprefix('.')}"


def _beside(path: Path) -> Path:
    """A new hidden name in the folder of ``path``."""
    return path.with_name(f"{_hidden(path)}.{os.urandom(4).hex()}")


def _rename(old: Path, new: Path) -> None:
    """Rename ``old`` to ``new``, which a file replaces; on Windows, once nobody reads it."""
    for pause in PAUSES if sys.platform == "win32" else ():
        with suppress(PermissionError):
            os.replace(old, new)
            return
        time.sleep(pause)
    os.replace(old, new)


def _link(fresh: Path, path: Path) -> None:
    try:
        os.link(fresh, path)
    except OSError:  # ``path`` exists, or this file system has no hard links
        if not path.exists():
            os.replace(fresh, path)


def _take_place(fresh: Path, folder: Path) -> None:
    """Rename ``fresh`` to ``folder``; what was there is then in ``fresh``, or removed."""
    if not folder.exists():
        _rename(fresh, folder)
    elif not _exchange(fresh, folder):
        # Without an atomic exchange the old folder waits under a name that `restored` puts back,
        # should the process die between the two renames.
        waiting = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(waiting, ignore_errors=True)
        _rename(folder, waiting)
        try:
            _rename(fresh, folder)
        except OSError:
            restored(folder)
            raise
        shutil.rmtree(waiting, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders atomically: renameat2 on Linux, renamex_np on macOS; False elsewhere."""
    try:
        if sys.platform == "win32":  # which gives no handle of the process itself
            return False
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        a, b = os.fsencode(one), os.fsencode(other)
        if sys.platform == "linux":
            at_cwd, exchange = -100, 2
            return bool(libc.renameat2(at_cwd, a, at_cwd, b, exchange) == 0)
        if sys.platform == "darwin":
            swap = 2
            return bool(libc.renamex_np(a, b, swap) == 0)
    except (OSError, AttributeError):
        return False
    return False


def folders_with(out: Path, file: str) -> list[Path]:
    """The folders in ``out`` that hold ``file``; hidden ones are unfinished or set aside."""
    return sorted(path.parent for path in out.glob(f"[!.]*/{file}"))


def repository_of(folder: Path) -> str | None:
    """OWNER/NAME of a folder in the Hub's cache; None for any other folder.

    Other programs share the cache, so nothing is written there.
    """
    match = IN_CACHE.fullmatch("/".join(folder.resolve().parts[-3:]))
    return f"{match[1]}/{match[2]}" if match else None


def adapter_name(folder: Path) -> str:
    """The name of the adapter in ``folder``: that of the folder, or of its repository."""
    repository = repository_of(folder)
    if repository is None:
        return folder.resolve().name
    return plain_name(repository.split("/")[1]) or "adapter"


def plain_name(text: str) -> str | None:
    """A safe name made from ``text``, as far as it has room; None where nothing is left of it."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-_")[:64].rstrip("-_")
    return plain if NAME.fullmatch(plain) else None


def check_name(name: str) -> str:
    """``name`` if it is safe as the name of a folder; raises DomainError otherwise."""
    if not NAME.fullmatch(name):
        raise DomainError(
            where=f"name {name!r}",
            expected="at most 64 letters, digits, '-' and '_', and no device of Windows (nul, con)",
            found=repr(name),
            hint=f"Use {plain_name(name) or 'my-domain'!r}.",
        )
    return name
