"""JSON requests to one HTTP server: several at once, retried where that may help."""

from __future__ import annotations

import os
import random
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from email.utils import parsedate_to_datetime
from json import loads
from typing import Any

import httpx2

from potstill.errors import RefusedError, ServerError, UserError

KEYS = ("POTSTILL_API_KEY", "OPENAI_API_KEY")  # environment variables with a key, unless another is named
FIRST_WAIT_S = 0.5  # before the second attempt; doubled before each further one
MAX_WAIT_S = 60.0  # whatever Retry-After says
MOST_BYTES = 1 << 30  # of an answer: the log-probabilities of 100,000 tokens have a fifth of it


class JsonClient:
    """HTTP client of one server that answers in JSON.

    Connection errors, time-outs, 408, 429, 5xx and broken answers are retried after growing random waits or the
    server's Retry-After. Other 4xx are raised at once, in the server's own words. The options are those of
    `ServerConfig`; the API key goes to the server alone.

    Raises:
        UserError: the url is malformed, or the variable with the key is not set.
    """

    def __init__(
        self,
        url: str,
        *,
        key_variable: str | None = None,
        concurrency: int = 16,
        timeout_s: float = 120.0,
        attempts: int = 6,
    ) -> None:
        self.url, self._key = _base_url(url), _api_key(key_variable)
        self._concurrency, self._attempts = concurrency, attempts
        self._limit = ConcurrencyLimit(concurrency)
        self._http = httpx2.Client(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=httpx2.Timeout(timeout_s, connect=min(timeout_s, 10.0)),
            limits=httpx2.Limits(max_connections=concurrency),
        )
        weakref.finalize(self, self._http.close)

    def post_all(self, path: str, bodies: Sequence[Mapping[str, Any]]) -> list[Any]:
        """POST each body, several at once; answers are in the order of the bodies. Raises as `request`."""
        stop = threading.Event()
        pool = ThreadPoolExecutor(min(self._concurrency, max(len(bodies), 1)), thread_name_prefix="potstill-server")
        try:
            futures = [pool.submit(self.request, "POST", path, body, stop) for body in bodies]
            wait(futures, return_when=FIRST_EXCEPTION)
            for future in futures:
                if future.done() and (error := future.exception()):
                    raise error
            return [future.result() for future in futures]
        finally:
            stop.set()  # ends the waits before further attempts
            pool.shutdown(wait=False, cancel_futures=True)

    def request(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        stop: threading.Event | None = None,
        *,
        json: bool = True,
    ) -> Any:
        """Send one request and return the answer, as text without `json`; no further attempt once `stop` is set.

        Raises:
            RefusedError: the server says that the request is wrong.
            ServerError: no usable answer after all attempts.
        """
        stop = stop or threading.Event()
        for attempt in range(1, self._attempts + 1):
            with self._limit.slot() as epoch:
                try:
                    return self._send(method, path, body, json)
                except _TransientError as error:
                    failure = error
                    if failure.overloaded:
                        self._limit.shrink(epoch)
            pause_s = failure.wait_s
            if pause_s is None:
                pause_s = FIRST_WAIT_S * 2 ** (attempt - 1) * random.uniform(0.5, 1.0)
            if attempt == self._attempts or stop.wait(min(pause_s, MAX_WAIT_S)):
                break
        raise ServerError(
            f"{self.url}{path}: expected an answer, got {failure} ({attempt} attempts). "
            "Check that the server runs and what it logs, then resume."
        )

    def _send(self, method: str, path: str, body: Mapping[str, Any] | None, json: bool) -> Any:
        # `from None`: the exceptions below hold the request and its headers, with the key.
        try:
            with self._http.stream(method, self.url + path, json=body) as response:
                text = self._without_key(_read(response))
        except httpx2.TimeoutException as error:
            raise _TransientError(f"no answer in time ({type(error).__name__})", overloaded=True) from None
        except httpx2.HTTPError as error:
            raise _TransientError(self._redact(f"{type(error).__name__}: {error}")) from None
        status = response.status_code
        if status in (408, 429) or status >= 500:
            message = self._redact(f"status {status}: {_reason(response, text)}")
            raise _TransientError(message, wait_s=_retry_after(response), overloaded=status in (408, 429, 503))
        if not response.is_success:
            hint = f" The API key is taken from {' or '.join(KEYS)}." if status in (401, 403) else ""
            reason = self._redact(_reason(response, text)).removesuffix(".")
            raise RefusedError(f"{self.url}{path}: expected an answer, got status {status}: {reason}.{hint}", status)
        try:
            return loads(text) if json else text
        except (ValueError, RecursionError):
            raise _TransientError(self._redact(f"something that is not JSON: {text[:60]!r}")) from None

    def _without_key(self, text: str) -> str:
        """A text without the key, which a server may repeat."""
        return text.replace(self._key, "***") if self._key else text

    def _redact(self, text: str) -> str:
        """One line without the key."""
        text = " ".join(self._without_key(text).split())
        return text if len(text) <= 500 else text[:500] + "..."


class ConcurrencyLimit:
    """Adaptive limit of requests at once: halved when the server is overloaded, then slowly raised again.

    Additive increase, multiplicative decrease: one slot more after as many good answers as there are slots, up to the
    maximum, with which it begins.
    """

    def __init__(self, maximum: int) -> None:
        self.slots = float(maximum)
        self._maximum, self._busy = maximum, 0
        self._epoch = 0  # how often it was halved
        self._free = threading.Condition()

    @contextmanager
    def slot(self) -> Iterator[int]:
        """Wait for a slot and hold it; yields the epoch for `shrink`."""
        with self._free:
            self._free.wait_for(lambda: self._busy < int(self.slots))
            self._busy += 1
            epoch = self._epoch
        try:
            yield epoch
        finally:
            with self._free:
                self._busy -= 1
                if self._epoch == epoch:
                    self.slots = min(self.slots + 1 / self.slots, float(self._maximum))
                self._free.notify_all()

    def shrink(self, epoch: int) -> None:
        """Halve the limit; requests that were sent together halve it once."""
        with self._free:
            if self._epoch == epoch:
                self.slots = max(self.slots / 2, 1.0)
                self._epoch += 1


class _TransientError(Exception):
    """A failure that another attempt may not meet."""

    def __init__(self, message: str, *, wait_s: float | None = None, overloaded: bool = False) -> None:
        super().__init__(message)
        self.wait_s, self.overloaded = wait_s, overloaded


def _base_url(url: str) -> str:
    """The url without /v1 and without a trailing slash."""
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL:
        parsed = httpx2.URL("")
    if parsed.userinfo:
        raise UserError("server: expected a url without user and password, got one with them. Recipes are kept.")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise UserError(f"server: expected a url such as http://127.0.0.1:8000, got {url}.")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def _api_key(variable: str | None) -> str | None:
    if variable is not None and not os.environ.get(variable):
        raise UserError(f"server: expected an API key in the environment variable {variable}, got none. Set it.")
    keys = [os.environ[name] for name in ([variable] if variable else KEYS) if os.environ.get(name)]
    return keys[0].strip() if keys else None


def _read(response: httpx2.Response) -> str:
    """All of an answer, as long as it has an end; a few bytes may decompress to any number."""
    content = bytearray()
    for part in response.iter_bytes():
        content += part
        if len(content) > MOST_BYTES:
            raise _TransientError(f"more than {MOST_BYTES} bytes")
    return content.decode(errors="replace")


def _reason(response: httpx2.Response, text: str) -> str:
    """The error message in the server's JSON, or all of its text."""
    try:
        content = loads(text)
    except (ValueError, RecursionError):
        return text or response.reason_phrase
    error = content.get("error", content) if isinstance(content, dict) else content
    return str(error.get("message", error.get("detail", error)) if isinstance(error, dict) else error)


def _retry_after(response: httpx2.Response) -> float | None:
    """Retry-After in seconds, given as a number or as a date."""
    header = response.headers.get("Retry-After", "")
    with suppress(ValueError):
        return max(float(header), 0.0)
    with suppress(ValueError, TypeError):
        return max(parsedate_to_datetime(header).timestamp() - time.time(), 0.0)
    return None
