"""Where a job is kept: a folder on a disk or in an object store, through fsspec.

Object stores cannot append and disks can lose what was not synchronised. Both are met
by the same few operations: a file is created once or replaced as a whole, and on disks
only, lines are appended to a file that one process alone writes.
"""

import contextlib
import errno
import os
import pathlib
import uuid
from collections.abc import Generator
from typing import Any, Protocol

from jllm.errors import ConfigError, JllmError

TEMPORARY = ".tmp"
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
"""How file systems without hard links refuse them."""


class StorageError(JllmError, OSError):
    """A file of the job, or an input, could not be read or written."""


class Writer(Protocol):
    """What a file is written through."""

    def write(self, data: bytes, /) -> Any:
        """Writes more."""
        ...


def open_url(url: str) -> tuple[Any, str]:
    """Finds the file system of a path or URL, and the path in it.

    Raises:
        ConfigError: There is no such file system, or its package is missing.
    """
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{url}: {error}") from error


def is_local(fs: Any) -> bool:
    """Whether the files are on a disk, or look as if they were."""
    protocol = fs.protocol
    return "file" in ((protocol,) if isinstance(protocol, str) else protocol)


class Store:
    """The folder of one job."""

    def __init__(self, url: str) -> None:
        """Finds the folder; makes nothing yet.

        Args:
            url: A path, or a URL that fsspec knows, such as gs://bucket/folder.

        Raises:
            ConfigError: There is no such file system, or its package is missing.
        """
        self.url = url
        self._fs, root = open_url(url)
        self._root = root.rstrip("/")
        self.is_local = is_local(self._fs)

    def path(self, name: str) -> str:
        """Where a file is, in the file system."""
        return f"{self._root}/{name}"

    def read(self, name: str) -> bytes | None:
        """All of a file; None if there is none."""
        with self.errors(name):
            try:
                return self._fs.cat_file(self.path(name))
            except FileNotFoundError:
                return None

    def exists(self, name: str) -> bool:
        """Whether a file is there."""
        return self.read(name) is not None

    def names(self, folder: str) -> list[str]:
        """Names of the files of a folder, in order; none if there is no folder."""
        with self.errors(folder):
            try:
                paths = self._fs.ls(self.path(folder), detail=False, refresh=True)
            except FileNotFoundError:
                return []
        names = (path.rstrip("/").rpartition("/")[2] for path in paths)
        return sorted(name for name in names if name and not name.endswith(TEMPORARY))

    def create(self, name: str, data: bytes) -> bool:
        """Writes a file that must not be there yet; of several callers one does.

        Disks link a complete file to the name, which fails where it is taken; object
        stores are given the condition with the file.

        Returns:
            Whether this call has made it.
        """
        with self.errors(name):
            if self.is_local:
                return self._create_local(self.path(name), data)
            try:
                self._fs.pipe_file(self.path(name), data, mode="create")
            # Each store has an error of its own for a condition that is not met.
            except Exception:
                found = self.read(name)
                if found is None:
                    raise
                # A request that was repeated finds what it has itself made.
                return found == data
            return True

    def replace(self, name: str, data: bytes) -> None:
        """Writes a file as a whole: readers see the old one or the new one."""
        with self.errors(name):
            if not self.is_local:
                self._fs.pipe_file(self.path(name), data)
                return
            with _replaced(self.path(name)) as file:
                file.write(data)

    @contextlib.contextmanager
    def writing(self, name: str) -> Generator[Writer]:
        """Writes a file of any length, which appears, complete, at the end."""
        with self.errors(name):
            if self.is_local:
                with _replaced(self.path(name)) as file:
                    yield file
                return
            file = self._fs.open(self.path(name), "wb", autocommit=False)
            try:
                yield file
                file.close()
                file.commit()
            except BaseException:
                with contextlib.suppress(Exception):
                    file.discard()
                raise

    def append(self, name: str, data: bytes) -> None:
        """Appends to a file on a disk that only the caller writes, and synchronises.

        What was written of data that does not fit is taken back.
        """
        with self.errors(name):
            path = self.path(name)
            is_new = not pathlib.Path(path).exists()
            if is_new:
                _make_folder(path)
            descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                _append(descriptor, data)
            finally:
                os.close(descriptor)
            if is_new:
                _sync_folder(path)

    def remove(self, name: str) -> None:
        """Removes a file, if it is there."""
        with self.errors(name), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self.path(name))

    def remove_folder(self, name: str) -> None:
        """Removes a folder and all that is in it, if it is there."""
        with self.errors(name), contextlib.suppress(FileNotFoundError):
            self._fs.rm(self.path(name), recursive=True)

    def _create_local(self, path: str, data: bytes) -> bool:
        _make_folder(path)
        temporary = f"{path}.{uuid.uuid4().hex}{TEMPORARY}"
        try:
            _write_new(temporary, data)
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            try:
                _write_new(path, data)
            except FileExistsError:
                return False
        finally:
            pathlib.Path(temporary).unlink(missing_ok=True)
        _sync_folder(path)
        return True

    @contextlib.contextmanager
    def errors(self, name: str) -> Generator[None]:
        """Says which file an error is about; stores have errors of many kinds."""
        try:
            yield
        except JllmError:
            raise
        except Exception as error:
            where = f"{self.url.rstrip('/')}/{name}"
            number = getattr(error, "errno", None)
            text = os.strerror(number) if isinstance(number, int) else str(error)
            raise StorageError(f"{where}: {text or type(error).__name__}") from error


def _make_folder(path: str) -> None:
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)


def _sync_folder(path: str) -> None:
    """Makes the name of a new file last."""
    descriptor = os.open(pathlib.Path(path).parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_new(path: str, data: bytes) -> None:
    with pathlib.Path(path).open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _append(descriptor: int, data: bytes) -> None:
    size = os.fstat(descriptor).st_size
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, size)
        raise


@contextlib.contextmanager
def _replaced(path: str) -> Generator[Writer]:
    """A file beside the path, put in its place when it is complete and on the disk."""
    _make_folder(path)
    temporary = pathlib.Path(f"{path}.{uuid.uuid4().hex}{TEMPORARY}")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path)
