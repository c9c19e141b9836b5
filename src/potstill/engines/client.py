"""Many questions to one server over HTTP: several at once, asked again where that may help, told at once where not."""

from __future__ import annotations

import os
import random
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2

from potstill.errors import RefusedError, ServerError, UserError

KEYS = ("POTSTILL_API_KEY", "OPENAI_API_KEY")  # where a key is looked for, unless another variable is named
FIRST_WAIT_S = 0.5  # before the second attempt; doubled before each further one
MOST_WAIT_S = 60.0  # whatever a server's Retry-After says


class JsonClient:
    """Asks one server and gives what its JSON says. No state is kept between questions but how many go well at once.

    What may pass (no connection, time-outs, 408, 429, 5xx, answers that break off) is asked again after growing, random
    waits or the server's own Retry-After; what the server refuses (other 4xx) is told at once, in its own words.

    Args:
        url: such as http://127.0.0.1:8000; /v1 at its end may be left out.
        key_variable: the environment variable that holds the API key; default: POTSTILL_API_KEY, then OPENAI_API_KEY.
            The key goes to the server and nowhere else.
        concurrency: questions under way at once, at most.
        timeout_s: how long the server may be silent.
        attempts: how often one question is asked.

    Raises:
        UserError: the url is not one, or the variable is not set.
    """

    def __init__(
        self, url: str, *, key_variable: str | None, concurrency: int, timeout_s: float, attempts: int
    ) -> None:
        self.url = _root(url)
        self._concurrency, self._attempts = concurrency, attempts
        self._key = _key(key_variable)
        self._window = Window(concurrency)
        self._http = httpx2.Client(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=httpx2.Timeout(timeout_s, connect=min(timeout_s, 10.0)),
            limits=httpx2.Limits(max_connections=concurrency),
        )
        weakref.finalize(self, self._http.close)

    def post_all(self, path: str, bodies: Sequence[Mapping[str, Any]]) -> list[Any]:
        """One POST for each body, several at once; the answers are in the order of the bodies. Raises as `ask`."""
        stop = threading.Event()
        pool = ThreadPoolExecutor(min(self._concurrency, max(len(bodies), 1)), thread_name_prefix="potstill-server")
        try:
            asked = [pool.submit(self.ask, "POST", path, body, stop) for body in bodies]
            wait(asked, return_when=FIRST_EXCEPTION)
            for one in asked:
                if one.done() and (error := one.exception()):
                    raise error
            return [one.result() for one in asked]
        finally:
            stop.set()  # whoever waits for another attempt need not any more
            pool.shutdown(wait=False, cancel_futures=True)

    def ask(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        stop: threading.Event | None = None,
        *,
        json: bool = True,
    ) -> Any:
        """One answer, as its JSON says it.

        Args:
            method: GET or POST.
            path: below the url.
            body: what is sent as JSON.
            stop: no further attempt once it is set.
            json: False gives the answer as text, whatever it is.

        Raises:
            RefusedError: the server says that the question is wrong.
            ServerError: there is no usable answer after all attempts.
        """
        stop = stop or threading.Event()
        attempt = 0
        while True:
            attempt += 1
            with self._window.place() as place:
                try:
                    return self._once(method, path, body, json)
                except _PassingError as found:
                    trouble = found
                    if trouble.overloaded:
                        self._window.shrink(place)
            pause = trouble.wait_s
            if pause is None:
                pause = FIRST_WAIT_S * 2 ** (attempt - 1) * random.uniform(0.5, 1.0)
            if attempt == self._attempts or stop.wait(min(pause, MOST_WAIT_S)):
                break
        raise ServerError(
            f"{self.url}{path}: expected an answer, got {trouble} ({attempt} attempts). "
            "Look whether the server runs and what it logs, then go on."
        )

    def _once(self, method: str, path: str, body: Mapping[str, Any] | None, json: bool) -> Any:
        # Errors are told in words alone: the exceptions behind them hold the request and its headers.
        try:
            response = self._http.request(method, self.url + path, json=body)
        except httpx2.TimeoutException as error:
            raise _PassingError(f"no answer in time ({type(error).__name__})", overloaded=True) from None
        except httpx2.HTTPError as error:
            raise _PassingError(self._clean(f"{type(error).__name__}: {error}")) from None
        status = response.status_code
        if status in (408, 429) or status >= 500:
            told = self._clean(f"status {status}: {_reason(response)}")
            raise _PassingError(told, wait_s=_retry_after(response), overloaded=status in (408, 429, 503))
        if not response.is_success:
            hint = f" The API key is taken from {' or '.join(KEYS)}." if status in (401, 403) else ""
            told = self._clean(_reason(response)).removesuffix(".")
            raise RefusedError(f"{self.url}{path}: expected an answer, got status {status}: {told}.{hint}", status)
        try:
            return response.json() if json else response.text
        except ValueError:
            raise _PassingError(self._clean(f"something that is not JSON: {response.text[:60]!r}")) from None

    def _clean(self, text: str) -> str:
        """One line without the key, which a server may repeat."""
        text = text.replace(self._key, "***") if self._key else text
        text = " ".join(text.split())
        return text if len(text) <= 500 else text[:500] + "..."


class Window:
    """How many questions may be under way: half as many when a server has too much to do, then slowly more again.

    Additive increase, multiplicative decrease: one place more after as many good answers as there are places.

    Args:
        most: places at the beginning, and at most.
    """

    def __init__(self, most: int) -> None:
        self.places = float(most)
        self._most = most
        self._busy = 0
        self._shrunk = 0
        self._free = threading.Condition()

    @contextmanager
    def place(self) -> Iterator[int]:
        """Wait for a place and hold it; gives what `shrink` wants to know."""
        with self._free:
            self._free.wait_for(lambda: self._busy < int(self.places))
            self._busy += 1
            began = self._shrunk
        try:
            yield began
        finally:
            with self._free:
                self._busy -= 1
                if self._shrunk == began:
                    self.places = min(self.places + 1 / self.places, float(self._most))
                self._free.notify_all()

    def shrink(self, began: int) -> None:
        """Halve the window; questions that were under way together halve it once."""
        with self._free:
            if self._shrunk == began:
                self.places = max(self.places / 2, 1.0)
                self._shrunk += 1


class _PassingError(Exception):
    """What may pass by itself."""

    def __init__(self, what: str, *, wait_s: float | None = None, overloaded: bool = False) -> None:
        super().__init__(what)
        self.wait_s, self.overloaded = wait_s, overloaded


def _root(url: str) -> str:
    """The url without /v1 and without a slash at its end."""
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL:
        parsed = httpx2.URL("")
    if parsed.userinfo:
        raise UserError("server: expected a url without user and password, got one with them. Recipes are kept.")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise UserError(f"server: expected a url such as http://127.0.0.1:8000, got {url}.")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def _key(variable: str | None) -> str | None:
    if variable is not None and not os.environ.get(variable):
        raise UserError(f"server: expected an API key in the environment variable {variable}, got none. Set it.")
    found = [os.environ[name] for name in ([variable] if variable else KEYS) if os.environ.get(name)]
    return found[0].strip() if found else None


def _reason(response: httpx2.Response) -> str:
    """Why a server refuses: the message in its JSON, or all of its text."""
    try:
        said = response.json()
    except ValueError:
        return response.text or response.reason_phrase
    error = said.get("error", said) if isinstance(said, dict) else said
    message = error.get("message", error.get("detail", error)) if isinstance(error, dict) else error
    return str(message)


def _retry_after(response: httpx2.Response) -> float | None:
    """Retry-After in seconds, whether it says a number or a date."""
    said = response.headers.get("Retry-After", "")
    try:
        return max(float(said), 0.0)
    except ValueError:
        pass
    try:
        return max(parsedate_to_datetime(said).timestamp() - time.time(), 0.0)
    except (ValueError, TypeError):
        return None
