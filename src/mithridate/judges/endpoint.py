"""One request to an OpenAI-compatible server: bounded in time and size, telling nobody the key."""

from __future__ import annotations

import contextlib
import email.utils
import functools
import http.client
import ipaddress
import json
import re
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import Any

LARGEST_REPLY = 1 << 20
QUOTED_CHARACTERS = 200

_AGAIN = {408, 409, 425, 429}
_NEVER_AGAIN = {501, 505}
# Fewer characters in common are chance.
_COMMON, _COMMON_WITH_KEY = 12, 6


class RefusedError(Exception):
    """The server refuses a request, and would refuse it again.

    Parameters
    ----------
    reason
        For a reader.
    said
        The server's own words without what it was sent, in lower case; for nobody to read.
    """

    def __init__(self, reason: str, said: str = "") -> None:
        super().__init__(reason)
        self.said = said


class FailedError(Exception):
    """A request failed in a way that may pass; ``after`` is the wait that the server asks for."""

    def __init__(self, reason: str, after: float | None = None) -> None:
        super().__init__(reason)
        self.after = after


class Endpoint:
    """A server, and the key that it knows us by.

    Parameters
    ----------
    base
        Its address, to which paths are appended.
    key
        Sent as a bearer token; no message holds it.
    timeout
        Seconds for one request in all, connecting and reading included.
    """

    def __init__(self, base: str, key: str | None, timeout: float) -> None:
        self.base = base.rstrip("/")
        self._key, self._timeout = key, timeout
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key is not None:
            self._headers["Authorization"] = f"Bearer {key}"
        self._opener = _opener(urllib.parse.urlsplit(base).hostname or "")

    def send(self, path: str, body: Mapping[str, Any] | None, *, private: str = "") -> Any:
        """Return the server's document.

        Parameters
        ----------
        body
            Posted as JSON; ``None`` gets.
        private
            What no message may quote.

        Raises
        ------
        RefusedError, FailedError
            As they say.
        """
        data = None if body is None else json.dumps(body).encode("utf-8")
        request = urllib.request.Request(self.base + path, data=data, headers=self._headers)
        try:
            with _Watch(self._timeout) as watch:
                request.watch = watch  # type: ignore[attr-defined]
                try:
                    with self._opener.open(request, timeout=self._timeout) as response:
                        document = json.loads(_read(response))
                except urllib.error.HTTPError as error:
                    with error:
                        raise self._of_status(error, private) from None
                finally:
                    watch.check()
        except (OSError, http.client.HTTPException, ValueError) as error:
            # URLError and timeouts are OSErrors; half a document is no JSON.
            raise FailedError(self._told(f"{type(error).__name__}: {error}", private)) from None
        except RecursionError:
            raise FailedError("a document nested too deeply") from None
        inside = document.get("error") if isinstance(document, Mapping) else None
        if inside and not document.get("choices"):
            raise self._of_error(inside, private)
        return document

    def _of_status(self, error: urllib.error.HTTPError, private: str) -> RefusedError | FailedError:
        said = _message(error)
        reason = f"HTTP {error.code}: {self._told(said or str(error.reason), private)}"
        if error.code in _AGAIN or (error.code >= 500 and error.code not in _NEVER_AGAIN):
            return FailedError(reason, _seconds(error.headers.get("Retry-After", "")))
        return RefusedError(reason, _without_private(said, private))

    def _of_error(self, error: Any, private: str) -> RefusedError | FailedError:
        """Return what an error inside a document of status 200 means."""
        inner = error if isinstance(error, Mapping) else {}
        said = str(inner.get("message", "")) or ("" if inner else str(error))
        reason = f"an error in place of an answer: {self._told(said, private)}"
        code = re.fullmatch(r"4\d\d", str(inner.get("code", inner.get("status", ""))))
        if code and int(code[0]) not in _AGAIN:
            return RefusedError(reason, _without_private(said, private))
        return FailedError(reason)

    def _told(self, said: str, private: str) -> str:
        """Return a server's words in short, unless they quote what was sent; never the key."""
        if _quotes(said, private) or (self._key and _holds_part(said, self._key)):
            return f"{len(said)} characters, not shown because they quote what was sent"
        shown = "".join(sign if sign.isprintable() else " " for sign in said)
        return shown[:QUOTED_CHARACTERS]


class _Watch:
    """Ends a connection when its time is over, however slowly the server drips."""

    def __init__(self, seconds: float) -> None:
        self._over = False
        self._socket: socket.socket | None = None
        self._lock = threading.Lock()
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True

    def __enter__(self) -> _Watch:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        with self._lock:
            if self._socket is not None:
                self._socket.close()

    def over(self, connected: socket.socket) -> None:
        """Watch a connection; a duplicate stays valid while TLS takes the socket over."""
        with self._lock:
            self._socket = connected.dup()
        if self._over:
            self._end()

    def check(self) -> None:
        """Raise `TimeoutError` where the time was over: what was read may be half of it."""
        if self._over:
            raise TimeoutError("the request takes longer than the timeout")

    def _end(self) -> None:
        self._over = True
        with self._lock, contextlib.suppress(OSError):
            if self._socket is not None:
                self._socket.shutdown(socket.SHUT_RDWR)


def _watched(
    kind: type[http.client.HTTPConnection], watch: _Watch, *args: Any, **options: Any
) -> Any:
    """Return a connection that is watched from its first byte on: a proxy's answer and TLS too."""

    def connect(*where: Any) -> socket.socket:
        connected = socket.create_connection(*where)
        watch.over(connected)
        return connected

    connection: Any = kind(*args, **options)
    connection._create_connection = connect
    return connection


class _PlainHandler(urllib.request.HTTPHandler):
    def http_open(self, req: Any) -> Any:
        return self.do_open(functools.partial(_watched, http.client.HTTPConnection, req.watch), req)


class _SecureHandler(urllib.request.HTTPSHandler):
    def https_open(self, req: Any) -> Any:
        return self.do_open(
            functools.partial(_watched, http.client.HTTPSConnection, req.watch), req
        )


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _opener(host: str) -> urllib.request.OpenerDirector:
    """Return an opener that follows no redirect, and no proxy to this machine itself."""
    local = host == "localhost"
    with contextlib.suppress(ValueError):
        local = local or ipaddress.ip_address(host).is_loopback
    proxies = [urllib.request.ProxyHandler({})] if local else []
    return urllib.request.build_opener(_PlainHandler, _SecureHandler, _NoRedirect, *proxies)


def _read(response: Any) -> bytes:
    """Read a body of bounded size."""
    data = bytearray()
    while chunk := response.read1(1 << 16):
        data += chunk
        if len(data) > LARGEST_REPLY:
            raise ValueError("a reply of more than a mebibyte")
    if response.length:
        raise http.client.IncompleteRead(bytes(data), response.length)
    return bytes(data)


def _message(error: urllib.error.HTTPError) -> str:
    """Return the server's own words about a failure, whatever form they have."""
    try:
        document = json.loads(error.read(1 << 16))
        inner = document.get("error", document)
        text = inner.get("message", "") if isinstance(inner, Mapping) else str(inner)
        return str(text or document.get("detail", ""))
    except (OSError, ValueError, AttributeError, RecursionError, http.client.HTTPException):
        return ""


def _plain(text: str) -> str:
    """Return text as it is compared: unescaped, in lower case, with single spaces."""
    text = re.sub(r"\\u([0-9a-fA-F]{4})", lambda found: chr(int(found[1], 16)), text)
    text = re.sub(r"\\[nrt]", " ", urllib.parse.unquote(text)).replace("\\", "")
    return " ".join(text.casefold().split())


def _shared(said: str, private: str) -> list[bool]:
    """Return which characters of ``said`` stand in a stretch that ``private`` holds too."""
    sent = _plain(private)
    parts = {sent[at : at + _COMMON] for at in range(len(sent) - _COMMON + 1)}
    shared = [False] * len(said)
    for at in range(len(said) - _COMMON + 1):
        if said[at : at + _COMMON] in parts:
            shared[at : at + _COMMON] = [True] * _COMMON
    return shared


def _quotes(said: str, private: str) -> bool:
    """Whether ``said`` repeats a stretch of ``private``, or a whole line of it."""
    plain = _plain(said)
    lines = {_plain(line) for line in private.splitlines()}
    return any(_shared(plain, private)) or any(
        len(line) > 3 and line in plain for line in lines if len(line) < _COMMON
    )


def _holds_part(said: str, key: str) -> bool:
    """Whether ``said`` holds the key or part of it, as servers quote keys that they do not know."""
    size = min(_COMMON_WITH_KEY, len(key))
    return any(key[at : at + size] in said for at in range(len(key) - size + 1))


def _without_private(said: str, private: str) -> str:
    plain = _plain(said)
    marks = _shared(plain, private)
    return "".join(" " if mark else sign for sign, mark in zip(plain, marks, strict=True))


def _seconds(retry_after: str) -> float | None:
    """Return the wait that a header asks for, in seconds or until a date; None for none."""
    if re.fullmatch(r"\d{1,9}(?:\.\d+)?", retry_after.strip()):
        return float(retry_after)
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    return None
