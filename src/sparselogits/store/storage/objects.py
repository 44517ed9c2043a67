"""Store a cache in an object store, as write-once objects under a prefix.

fsspec provides the drivers, such as s3fs for `s3://`. A conditional put creates an object only if
it does not exist. It is atomic, so temporary objects are not required, and exactly one of several
concurrent writers succeeds. Drivers without a conditional put, such as `hf://`, check for the name
before the put, so use only one writer at a time with them. With drivers whose puts may not be
atomic, such as `sftp://`, an object is written under a temporary name, its size is compared, and it
is renamed (if the driver can rename).

An S3 server validates a checksum of each put before it creates the object (botocore adds a CRC32),
so objects are not read back, and the driver retries failed requests with increasing pauses. A put
whose response was lost may report that the object already exists when it is retried; the object is
then complete.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from sparselogits.errors import (
    CacheError,
    InvalidArgumentError,
    MissingDependencyError,
    StorageError,
)
from sparselogits.files import TEMPORARY_PREFIX, is_leftover, temporary_name

T = TypeVar("T")

_ATTEMPTS = 8

_TAKEN = {"PreconditionFailed", "412"}
"""Error codes of a put that fails because the object already exists."""

_CONFLICT = {"ConditionalRequestConflict", "OperationAborted", "409"}
"""Error codes of a put that fails because another writer is putting the same object."""

_BEYOND_END = {"InvalidRange", "416"}
"""Error codes of a read that starts after the end of the object."""

_ATOMIC = {
    *("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "oss", "r2", "hf", "memory")
}
"""URL schemes whose puts are atomic, so that an existing object is complete."""


class ObjectStorage:
    """Storage in an object store, whose objects share a prefix; see `Storage`.

    The numbers of requests that methods state are those of S3.

    Credentials, region and endpoint of S3 come from botocore's usual sources (AWS_ACCESS_KEY_ID,
    AWS_SECRET_ACCESS_KEY, AWS_PROFILE, AWS_REGION, AWS_ENDPOINT_URL, the role of an instance, ...).
    AWS_RETRY_MODE and AWS_MAX_ATTEMPTS are respected.

    Forked and spawned processes may share an `ObjectStorage`, because each opens new connections.

    Args:
        url: URL of the prefix, such as `s3://bucket/prefix`.
        options: options of the driver.

    Raises:
        InvalidArgumentError: fsspec has no driver for the scheme of the URL, or AWS_MAX_ATTEMPTS is
            not a number.
        MissingDependencyError: the driver of the URL is not installed.
    """

    def __init__(self, url: str, **options: Any) -> None:
        self.url = url.rstrip("/")
        self._options = options
        self._opened: tuple[int, Any, str] | None = None
        self._honours_conditions = False
        self._open()

    @property
    def location(self) -> str:
        """URL of the prefix."""
        return self.url

    def names(self, folder: str) -> list[str]:
        """Return the sorted names of a folder's objects; sends one request per 1000 objects."""
        return [name for name in self._listed(folder) if not name.startswith(TEMPORARY_PREFIX)]

    def size(self, name: str) -> int:
        """Return the size of an object in bytes; sends one request."""
        return int(self._ask("find", name, lambda files, path: files.info(path))["size"])

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Return the bytes [start, stop) of an object; sends one request."""
        if stop is not None and stop <= start:
            return b""

        def get(files: Any, path: str) -> bytes:
            try:
                return bytes(files.cat_file(path, start=start, end=stop))
            except OSError as error:
                if _code(error) in _BEYOND_END:
                    return b""
                raise

        return self._ask("read", name, get)

    def tail(self, name: str, length: int) -> tuple[int, bytes]:
        """Return an object's size in bytes and its last `length` bytes; sends two requests."""
        size = self.size(name)
        return size, self.read(name, max(0, size - length), size)

    def create(self, name: str, data: bytes) -> bool:
        """Create an object; return False if it already exists.

        Sends one request, or several for more than 100 MB. The first successful put is repeated: a
        server that accepts the second put ignores the condition.

        Raises:
            StorageError: the object cannot be created, or the server ignores the condition.
        """
        created = self._create(name, data)
        if created and not self._honours_conditions:
            if self._create(name, data):
                raise StorageError(
                    f"the server of {self.url} ignores If-None-Match ({name} was put twice), so "
                    "one writer could overwrite another. Use a server that supports conditional "
                    "puts"
                )
            self._honours_conditions = True
        return created

    def _create(self, name: str, data: bytes) -> bool:
        """Create an object without testing the server; return False if it already exists."""

        def put(files: Any, path: str) -> bool:
            for attempt in range(_ATTEMPTS):
                try:
                    if self._puts_are_atomic:
                        files.pipe_file(path, data, mode="create")
                    else:
                        _put_whole(files, path, data)
                    return True
                except FileExistsError:
                    return False
                except OSError as error:
                    if _code(error) in _TAKEN:
                        return False
                    if _code(error) not in _CONFLICT:
                        raise
                    time.sleep(0.05 * 2**attempt)
            raise OSError(f"{_ATTEMPTS} consecutive puts conflicted with another writer")

        try:
            return self._ask("write", name, put)
        except FileNotFoundError as error:
            raise StorageError(
                f"cannot write {self.url}/{name}: the bucket or repository does not exist "
                f"({error}); create it, then start the same command again"
            ) from error

    def replace(self, name: str, data: bytes) -> None:
        """Put an object, replacing an existing one; used only for the dataset card."""

        def put(files: Any, path: str) -> None:
            if self._puts_are_atomic:
                files.pipe_file(path, data)
            else:
                _put_whole(files, path, data, replace=True)

        self._ask("write", name, put)

    def move(self, name: str, to: str) -> None:
        """Rename an object by reading, putting and deleting it.

        Raises:
            FileNotFoundError: the object does not exist.
            CacheError: the new name already exists.
        """
        if not self.create(to, self.read(name)):
            raise CacheError(
                f"cannot rename {self.url}/{name}: {self.url}/{to} already exists; move it away, "
                "then try again"
            )
        self._ask("remove", name, lambda files, path: files.rm_file(path))

    def clean(self, folder: str) -> list[str]:
        """Remove temporary objects of this machine's dead processes; return their names."""
        if self._puts_are_atomic:
            return []
        removed = [name for name in self._listed(folder) if is_leftover(name)]
        for name in removed:
            with suppress(FileNotFoundError):
                self._ask("remove", f"{folder}/{name}", lambda files, path: files.rm_file(path))
        return removed

    def _listed(self, folder: str) -> list[str]:
        """Return the sorted names of all objects in a folder."""
        try:
            found = self._ask("list", folder, lambda files, path: files.ls(path, detail=True))
        except FileNotFoundError:
            return []
        path = f"{self._open()[1]}/{folder}".rstrip("/")
        names = (entry["name"].rstrip("/") for entry in found if entry["type"] == "file")
        return sorted(name.rpartition("/")[2] for name in names if name != path)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without connections, because a spawned process must open new ones."""
        return self.__dict__ | {"_opened": None}

    @property
    def _puts_are_atomic(self) -> bool:
        """Whether the puts of the URL's scheme are atomic; see `_ATOMIC`."""
        return self.url.partition("://")[0] in _ATOMIC

    def _open(self) -> tuple[Any, str]:
        """Return this process's fsspec file system, and the path of the prefix in it."""
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), *_driver(self.url, self._options))
        return self._opened[1:]

    def _ask(self, verb: str, name: str, request: Callable[[Any, str], T]) -> T:
        """Return the result of a request, which receives the file system and an object's path.

        All errors except FileNotFoundError are raised as StorageError.
        """
        files, root = self._open()
        try:
            return request(files, f"{root}/{name.lstrip('/')}".rstrip("/"))
        except FileNotFoundError:
            raise
        except Exception as error:  # drivers raise errors of their client libraries and sockets
            raise StorageError(
                f"cannot {verb} {self.url}/{name}: {type(error).__name__}: {error}. This does not "
                "mean that the data is damaged: check network, credentials (AWS_*) and endpoint, "
                "then start the same command again"
            ) from error


def _put_whole(files: Any, path: str, data: bytes, *, replace: bool = False) -> None:
    """Put an object under a temporary name and rename it, if the driver supports renaming.

    After an error, such as a FileExistsError without `replace`, a partial object is removed.
    """
    from fsspec import AbstractFileSystem

    folder = path.rpartition("/")[0]
    renames = type(files).mv not in (AbstractFileSystem.mv, None)
    temporary = f"{folder}/{temporary_name(Path('object')).name}" if renames else path
    if not replace and files.exists(path):
        raise FileExistsError(path)
    files.makedirs(folder, exist_ok=True)
    try:
        files.pipe_file(temporary, data)
        files.invalidate_cache()
        size = files.info(temporary)["size"]
        if size != len(data):
            raise OSError(f"only {size} of {len(data)} bytes were written")
        if renames and not replace and files.exists(path):
            raise FileExistsError(path)
        if renames:
            files.mv(temporary, path)
    except BaseException:
        with suppress(Exception):
            files.rm_file(temporary)
        raise


def _driver(url: str, options: dict[str, Any]) -> tuple[Any, str]:
    """Return the fsspec file system of a URL, and the path of the URL in it."""
    import fsspec

    scheme = url.partition("://")[0]
    defaults: dict[str, Any] = {}
    if scheme in ("s3", "s3a"):
        attempts = os.environ.get("AWS_MAX_ATTEMPTS", str(_ATTEMPTS)).strip()
        if not attempts.isdecimal():
            raise InvalidArgumentError(
                f"AWS_MAX_ATTEMPTS={attempts!r} is not a number of attempts; give an integer, such "
                f"as {_ATTEMPTS}, or remove the variable"
            )
        retries = {
            "mode": os.environ.get("AWS_RETRY_MODE", "standard"),
            "max_attempts": int(attempts),
        }
        # fsspec shares one driver among equal options, so the endpoint must be an option
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        defaults = {
            "use_listings_cache": False,
            "config_kwargs": {"retries": retries},
            "endpoint_url": endpoint,
        }
    try:
        files, root = fsspec.url_to_fs(url, **defaults | options)
    except ImportError as error:
        raise MissingDependencyError(
            f"{url}: {error}. For S3: pip install 'sparselogits[s3]'"
        ) from error
    except ValueError as error:
        raise InvalidArgumentError(
            f"no installed fsspec driver opens {url}: {error}. Correct the URL"
        ) from error
    return files, str(root).rstrip("/")


def _code(error: BaseException) -> str:
    """Return the error code in an S3 server's response; "" for other errors."""
    response = getattr(error.__cause__, "response", None) or getattr(error, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))
