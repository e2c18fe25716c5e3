"""Files of remote stores, looked up and fetched through faults that pass.

A transfer may take as long as it takes; given up is a connection that says nothing for `SILENCE` seconds, and a file of
which several attempts in a row brought no byte more. Over http(s) a transfer goes on where it broke off; the libraries
of other stores (s3fs, huggingface_hub) do that themselves.
"""

import asyncio
import concurrent.futures
import glob
import itertools
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import fsspec
from fsspec.callbacks import Callback, NoOpCallback

from ..errors import UsageError


SILENCE = 60.0  # seconds
ATTEMPTS = 5  # waits of 15 seconds together
FATAL = (FileNotFoundError, PermissionError, InterruptedError, UsageError)  # another attempt would find the same

Result = TypeVar("Result")


class ChangedFile(UsageError):
    """A file has not the size any more that it is known to have."""

    def __init__(self, path: str, found: int, known: int):
        super().__init__(f"{path} has {found} bytes, and had {known} when it was looked up. Run again.")
        self.found = found


class RemoteFile(NamedTuple):
    path: str
    size: int | None
    """None where the store does not tell."""
    version: str
    """What changes with the contents; empty where the store does not tell."""


def open_store(url: str) -> fsspec.AbstractFileSystem:
    """The store of a URL, of this process: connections do not survive a fork."""
    options = {}
    if url.startswith(("http://", "https://")):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE, sock_read=SILENCE)
        options = {"client_kwargs": {"timeout": timeout}}
    return fsspec.url_to_fs(url, **options)[0]


def paths_of(files: fsspec.AbstractFileSystem, url: str) -> list[str]:
    """Where in the store the tars lie that a URL names: one, those of a glob, or of a folder, which may have none.

    Raises:
        FileNotFoundError: if nothing matches a glob.
    """
    path = files._strip_protocol(url + "*.tar" if url.endswith("/") else url)
    if not glob.has_magic(path):
        return [path]
    found = retry(lambda: sorted(files.glob(path)), url)
    if not found and not url.endswith("/"):
        raise FileNotFoundError(f"nothing there matches {url}")
    return found


def look_up(files: fsspec.AbstractFileSystem, path: str) -> RemoteFile:
    """A file as its store describes it now.

    Raises:
        FileNotFoundError, PermissionError: if the store says so.
        OSError: if it says nothing of use, in several attempts.
    """

    def once() -> RemoteFile:
        try:
            info = files.info(path)
        except FileNotFoundError as error:
            raise _as_meant(error) from error
        return RemoteFile(path, info.get("size"), str(info.get("ETag") or info.get("Last-Modified") or ""))

    return retry(once, path)


def _as_meant(error: FileNotFoundError) -> Exception:
    """What fsspec tells as FileNotFoundError whatever happened over http."""
    status = getattr(error.__cause__, "status", None)
    if error.__cause__ is None or status in (404, 410):
        return error
    return PermissionError(str(error.__cause__)) if status in (401, 403) else error.__cause__


def retry(action: Callable[[], Result], path: str) -> Result:
    """The result of `action`, called until it gets through, after longer and longer waits.

    Raises:
        FileNotFoundError, PermissionError, InterruptedError, UsageError: at once.
        OSError: after `ATTEMPTS` attempts.
    """
    for attempt in itertools.count(1):
        try:
            return action()
        except FATAL:
            raise
        except Exception as error:  # each store has errors of its own
            if attempt == ATTEMPTS:
                raise OSError(
                    f"{reason(error)} ({path}, {attempt} attempts). Run again to go on from here."
                ) from error
            time.sleep(2**attempt / 2)


def fetch(
    files: fsspec.AbstractFileSystem,
    path: str,
    size: int | None,
    local: Path,
    callback: Callback | None = None,
    attempts: int | None = None,
) -> None:
    """Puts a file of the store onto the disk. Goes on with what `local` holds of it, and leaves there what has come.

    Args:
        attempts: in a row that bring nothing more; None: as many as usual.

    Raises:
        FileNotFoundError, PermissionError, InterruptedError: at once.
        ChangedFile: if it has another size than `size`.
        OSError: after `ATTEMPTS` attempts.
    """
    local.touch()
    attempts = attempts or ATTEMPTS
    callback, validator, failed, most = callback or NoOpCallback(), {}, 0, local.stat().st_size
    while True:
        try:
            if size is not None and local.stat().st_size == size:  # and its process was killed
                return
            if _is_http(files):
                _wait(_stream(files, path, local, callback, validator), files, callback)
            else:
                files.get_file(path, str(local), callback=callback)
            found = local.stat().st_size
            if size in (None, found):
                return
            if look_up(files, path).size == found:
                raise ChangedFile(path, found, size)
            raise OSError(f"{path} broke off after {found} of {size} bytes")
        except FATAL:
            raise
        except Exception as error:  # each store has errors of its own
            found = local.stat().st_size
            failed, most = (1, found) if found > most else (failed + 1, most)
            if failed >= attempts:
                raise OSError(
                    f"{reason(error)} ({path}, {attempts} attempts). Run again to go on from here."
                ) from error
            callback.absolute_update(found)
            time.sleep(2**failed / 2)


def reason(error: BaseException) -> str:
    """What went wrong in words, also of errors that have none themselves."""
    words = f"{type(error).__name__}: {error}".rstrip(": ")
    if isinstance(error, (TimeoutError, asyncio.TimeoutError)):
        words += f" (no byte for {SILENCE:g} s)"
    elif not str(error) and error.__cause__ is not None:
        words += f" ({reason(error.__cause__)})"
    return words


def _is_http(files: fsspec.AbstractFileSystem) -> bool:
    protocols = (files.protocol,) if isinstance(files.protocol, str) else files.protocol
    return "http" in protocols


def _wait(work, files: fsspec.AbstractFileSystem, callback: Callback) -> None:
    """The result of a coroutine in the store's loop, as long as the callback does not object."""
    future = asyncio.run_coroutine_threadsafe(work, files.loop)
    try:
        while not concurrent.futures.wait([future], timeout=0.5).done:
            callback.call()
    except BaseException:
        future.cancel()
        raise
    future.result()


async def _stream(
    files: fsspec.AbstractFileSystem,
    url: str,
    local: Path,
    callback: Callback,
    validator: dict[str, str],
) -> None:
    """Appends what `local` lacks, where the server gives parts of a file; else writes it anew."""
    done, options = local.stat().st_size, dict(files.kwargs)
    headers = {**options.pop("headers", {}), "Accept-Encoding": "identity"}
    if done:
        headers |= {"Range": f"bytes={done}-", **validator}
    session = await files.set_session()
    async with session.get(files.encode_url(url), headers=headers, **options) as response:
        if response.status in (401, 403):
            raise PermissionError(f"{response.status} {response.reason}: {url}")
        if response.status in (404, 410):
            raise FileNotFoundError(f"{response.status} {response.reason}: {url}")
        if response.status == 416:  # we have more than there is
            local.write_bytes(b"")
        response.raise_for_status()
        part = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
        is_rest = response.status == 206 and part is not None and int(part[1]) == done
        if response.status == 206 and not is_rest:
            local.write_bytes(b"")
            raise OSError(f"{url} sent {response.headers.get('Content-Range')!r} for {headers.get('Range')!r}")
        known = response.headers.get("ETag", ""), response.headers.get("Last-Modified", "")
        validator["If-Range"] = known[0] if known[0] and not known[0].startswith("W/") else known[1]
        if not validator["If-Range"]:
            del validator["If-Range"]
        callback.absolute_update(done if is_rest else 0)
        with open(local, "ab" if is_rest else "wb") as file:
            async for data in response.content.iter_chunked(1 << 20):
                file.write(data)
                callback.relative_update(len(data))
