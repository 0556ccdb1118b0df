"""Whether a Prefect server takes what a run will show: asked before the run, with Prefect's own client.

The client has the user's credentials, proxies and certificates, from variables and from the profile. An answer, or the
lack of one, becomes None (all is well) or one line with the likely cause.
"""

from __future__ import annotations

import urllib.request
from contextlib import suppress
from urllib.parse import urlsplit

import httpx
from prefect.client.base import ServerType
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from pipeline.flows.server import without_user

PATIENCE, PATIENCE_FOR_VERSION = 4.0, 2.0
"""Seconds for the answer that the server is well, and for the one that shows whether it knows us. A server that is
well and slow is not refused."""
GATEWAY = (502, 503, 504)
"""Statuses of what stands before a server."""


def complaint() -> str | None:
    """Ask the server that Prefect's settings name whether it is well and knows us. None, or one line."""
    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}), get_client(sync_client=True) as client:
        url = without_user(str(client.api_url)).rstrip("/")
        try:
            health = client._client.get("/health", timeout=PATIENCE)  # pyright: ignore[reportPrivateUsage]
            health.json()  # Prefect's own api_healthcheck does not look at what was answered
            _ask_who_we_are(client)
        except httpx.HTTPStatusError as error:
            return _refused(url, error.response.status_code)
        except ValueError:
            return _line(f"a web page is at {url}", "expected Prefect's API", _with_api(url), by_proxy=url)
        except httpx.TimeoutException:
            return _line(f"no Prefect server answers at {url}", "no answer in time", "start it", by_proxy=url)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            found = str(error) or type(error).__name__
            return _line(f"no Prefect server answers at {url}", found, "start it", by_proxy=url)
    return None


def _ask_who_we_are(client: SyncPrefectClient) -> None:
    """/health is for everybody, this is for those the server knows. Raises HTTPStatusError for others."""
    with suppress(httpx.TimeoutException):
        if client.server_type == ServerType.CLOUD:
            client.read_flows(limit=1)
        else:
            client._client.get("/admin/version", timeout=PATIENCE_FOR_VERSION)  # pyright: ignore[reportPrivateUsage]


def _refused(url: str, status: int) -> str:
    found = f"found status {status}"
    if status == 401:
        fix = "set PREFECT_API_AUTH_STRING to its password, or PREFECT_API_KEY for Prefect Cloud"
        return _line(f"the Prefect server at {url} does not know us", found, fix)
    if status == 403:
        fix = "look at the rights of PREFECT_API_KEY, and at what stands before the server"
        return _line(f"the Prefect server at {url} refuses us", found, fix, by_proxy=url)
    if status in GATEWAY:
        fix = "look whether the server runs"
        return _line(f"a proxy or gateway answers for the Prefect server at {url}", found, fix, by_proxy=url)
    if status == 404:
        return _line(f"no Prefect API is at {url}", found, _with_api(url))
    return _line(f"the Prefect server at {url} is not well", found, "look at its log", by_proxy=url)


def _line(problem: str, found: str, fix: str, by_proxy: str = "") -> str:
    """The problem with its likely cause: the proxy that the environment names for the URL `by_proxy`, else as said."""
    if by_proxy and (variable := _proxy_variable(by_proxy)):
        found = f"{found}; {variable} sends the request to a proxy"
        fix = f"add {urlsplit(by_proxy).hostname} to NO_PROXY"
    return f"{problem} ({found}). Fix: {fix}"


def _with_api(url: str) -> str:
    if url.endswith("/api"):
        return "look whether this is the address of a Prefect server"
    return f"set it to {url}/api"


def _proxy_variable(url: str) -> str | None:
    """The variable that names a proxy for this address."""
    parts = urlsplit(url)
    proxies = urllib.request.getproxies()
    name = next((scheme for scheme in (parts.scheme, "all") if scheme in proxies), None)
    if name is None or urllib.request.proxy_bypass(parts.netloc):
        return None
    return f"{name.upper()}_PROXY"
