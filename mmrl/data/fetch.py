"""Download one http(s) URL into memory, with retries and limits on size and time.

URLs come from a user's table, so only http and https are opened, also after redirects.
"""

import http.client
import ssl
import time
from functools import cache
from urllib import error, parse, request

from mmrl.version import __version__

MAX_BYTES = 64 * 2**20
READ_TIMEOUT = 10.0
"""Seconds without a byte after which an attempt fails."""
TOTAL_TIMEOUT = 60.0
"""Seconds after which an attempt fails although bytes still arrive."""
RETRIED_STATUS = (408, 425, 429)
"""HTTP errors that are the client's, but pass."""
RETRY_DELAYS = (1.0, 4.0)
"""Seconds before the second and the third attempt."""


class FetchError(Exception):
    """A URL could not be downloaded; the message is the reason."""

    def __init__(self, reason: str, *, retryable: bool) -> None:
        super().__init__(reason)
        self.retryable = retryable


def is_http(location: str) -> bool:
    """Whether this is an http or https URL."""
    return location.lower().startswith(("http://", "https://"))


def fetch(url: str) -> bytes:
    """Download a URL.

    Raises:
        FetchError: the last attempt failed, or an earlier one failed for good, e.g. with HTTP 404.
    """
    for delay in RETRY_DELAYS:
        try:
            return _fetch_once(url)
        except FetchError as failure:
            if not failure.retryable:
                raise
        time.sleep(delay)
    return _fetch_once(url)


def _fetch_once(url: str) -> bytes:
    try:
        call = request.Request(_quote(url), headers={"User-Agent": f"mmrl/{__version__}"})  # noqa: S310
        with http_opener().open(call, timeout=READ_TIMEOUT) as response:
            return _read_body(response)
    except error.HTTPError as response:
        response.close()
        note = ", a redirect loop or a redirect to another scheme" if 300 <= response.code < 400 else ""
        retryable = response.code >= 500 or response.code in RETRIED_STATUS
        raise FetchError(f"HTTP {response.code}{note}", retryable=retryable) from None
    except error.URLError as failure:
        retryable = isinstance(failure.reason, OSError) and not isinstance(failure.reason, ssl.SSLCertVerificationError)
        raise FetchError(str(failure.reason), retryable=retryable) from None
    except (http.client.InvalidURL, UnicodeError) as failure:
        raise FetchError(f"invalid URL: {failure}", retryable=False) from None
    except (http.client.HTTPException, OSError) as failure:
        raise FetchError(str(failure) or type(failure).__name__, retryable=True) from None
    except ValueError as failure:  # of urlsplit, e.g. for an unmatched bracket
        raise FetchError(f"invalid URL: {failure}", retryable=False) from None


def _read_body(response: http.client.HTTPResponse) -> bytes:
    announced, started = response.length, time.monotonic()
    data = bytearray()
    while len(data) <= MAX_BYTES and (announced or 0) <= MAX_BYTES:
        if time.monotonic() - started > TOTAL_TIMEOUT:
            raise FetchError(f"incomplete after {TOTAL_TIMEOUT:g} s", retryable=True)
        chunk = response.read1(2**16)
        if not chunk:
            # read1, unlike read(), raises no IncompleteRead when the connection is cut.
            if announced is not None and len(data) < announced:
                raise FetchError(f"connection cut after {len(data):,} of {announced:,} bytes", retryable=True)
            return bytes(data)
        data += chunk
    raise FetchError(f"more than {MAX_BYTES // 2**20} MiB", retryable=False)


def _quote(url: str) -> str:
    """Percent-encode spaces and non-ASCII letters, and IDNA-encode the host; what is quoted already stays."""
    parts = parse.urlsplit(url)
    host = parts.netloc.encode("idna").decode()
    path, query = (parse.quote(part, safe="/:@!$&'()*+,;=~%?[]") for part in (parts.path, parts.query))
    return parse.urlunsplit((parts.scheme, host, path, query, ""))


@cache
def http_opener() -> request.OpenerDirector:
    """A urllib opener for http and https only: without the default handlers of file:, ftp: and data: URLs."""
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
