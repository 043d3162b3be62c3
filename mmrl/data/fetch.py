"""An http(s) address -> the bytes that lie there: tried again where that may help, bounded in size and time.

Addresses come from a user's table, so nothing but http and https is opened, after redirects too.
"""

import http.client
import ssl
import time
from functools import cache
from urllib import error, parse, request

from mmrl.version import __version__

MAX_BYTES = 64 * 2**20
SILENCE = 10.0
"""Seconds without a byte after which a try is given up."""
LONGEST = 60.0
"""Seconds after which a try is given up though bytes still trickle in."""
WAITS = (1.0, 4.0)
"""Seconds before the second and the third try."""


class Unfetched(Exception):
    """Nothing came from the address; the message says why."""

    def __init__(self, reason: str, *, may_pass: bool) -> None:
        super().__init__(reason)
        self.may_pass = may_pass


def is_address(text: str) -> bool:
    """Whether this is an address of the kind that is fetched."""
    return text.lower().startswith(("http://", "https://"))


def fetch(address: str) -> bytes:
    """The bytes at the address.

    Raises:
        Unfetched: the last try had no success, or the first one had none and another would not help.
    """
    for wait in WAITS:
        try:
            return _fetched_once(address)
        except Unfetched as failure:
            if not failure.may_pass:
                raise
        time.sleep(wait)
    return _fetched_once(address)


def _fetched_once(address: str) -> bytes:
    try:
        asked = request.Request(_quoted(address), headers={"User-Agent": f"mmrl/{__version__}"})  # noqa: S310
        with opener().open(asked, timeout=SILENCE) as response:
            return _body(response)
    except error.HTTPError as answer:
        answer.close()
        where = ", redirected in a circle or to what is no http address" if 300 <= answer.code < 400 else ""
        may_pass = answer.code >= 500 or answer.code in (408, 425, 429)
        raise Unfetched(f"HTTP {answer.code}{where}", may_pass=may_pass) from None
    except error.URLError as failure:
        may_pass = isinstance(failure.reason, OSError) and not isinstance(failure.reason, ssl.SSLCertVerificationError)
        raise Unfetched(str(failure.reason), may_pass=may_pass) from None
    except (http.client.InvalidURL, UnicodeError) as failure:
        raise Unfetched(f"no valid address: {failure}", may_pass=False) from None
    except (http.client.HTTPException, OSError) as failure:
        raise Unfetched(str(failure) or type(failure).__name__, may_pass=True) from None
    except ValueError as failure:  # urlsplit's, such as a bracket without its other half
        raise Unfetched(f"no valid address: {failure}", may_pass=False) from None


def _body(response: http.client.HTTPResponse) -> bytes:
    announced, started = response.length, time.monotonic()
    data = bytearray()
    while len(data) <= MAX_BYTES and (announced or 0) <= MAX_BYTES:
        if time.monotonic() - started > LONGEST:
            raise Unfetched(f"not all there after {LONGEST:g} s", may_pass=True)
        piece = response.read1(2**16)
        if not piece:
            # http.client tells of a connection that was cut only where it is asked for everything at once.
            if announced is not None and len(data) < announced:
                raise Unfetched(f"cut after {len(data):,} of {announced:,} bytes", may_pass=True)
            return bytes(data)
        data += piece
    raise Unfetched(f"more than {MAX_BYTES // 2**20} MB", may_pass=False)


def _quoted(address: str) -> str:
    """Spaces and letters beyond ASCII as they travel; what is quoted already stays."""
    parts = parse.urlsplit(address)
    host = parts.netloc.encode("idna").decode()
    path, query = (parse.quote(part, safe="/:@!$&'()*+,;=~%?[]") for part in (parts.path, parts.query))
    return parse.urlunsplit((parts.scheme, host, path, query, ""))


@cache
def opener() -> request.OpenerDirector:
    """urllib's own, without its doors to files, ftp and data."""
    opener = request.OpenerDirector()
    for handler in (
        request.ProxyHandler(),
        request.UnknownHandler(),
        request.HTTPHandler(),
        request.HTTPSHandler(context=ssl.create_default_context()),
        request.HTTPRedirectHandler(),
        request.HTTPDefaultErrorHandler(),
        request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener
