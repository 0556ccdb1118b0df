"""Whether a Prefect server takes what a run will show: asked before the run, with Prefect's own client.

The client has the user's credentials, proxies and certificates, from variables and from the profile. An answer, or the
lack of one, becomes None (all is well) or one line with the likely cause.
"""

from __future__ import annotations

import urllib.request
from urllib.parse import urlsplit

import httpx
from prefect.client.orchestration import get_client

from pipeline.flows.server import without_user

GATEWAY = (502, 503, 504)
"""Statuses of what stands before a server."""


def complaint() -> str | None:
    """Ask the server that Prefect's settings name whether it is well and knows us. None, or one line."""
    with get_client(sync_client=True) as client:
        url = without_user(str(client.api_url))
        try:
            health = client._client.get("/health")  # pyright: ignore[reportPrivateUsage] - api_healthcheck hides the body
            health.json()
            client.api_version()  # /health is for everybody, this is not
        except httpx.HTTPStatusError as error:
            return _refused(url, error.response.status_code)
        except ValueError:
            return f"the server at {url} shows a page (expected Prefect's API). Fix: {_with_api(url)}"
        except httpx.TimeoutException:
            return f"no Prefect server answers at {url} (no answer in time).{_proxy(url)} Fix: start it"
        except httpx.HTTPError as error:
            return f"no Prefect server answers at {url} ({_words(error)}).{_proxy(url)} Fix: start it"
    return None


def _refused(url: str, status: int) -> str:
    if status == 401:
        return (
            f"the Prefect server at {url} does not know us (found status 401). Fix: set PREFECT_API_AUTH_STRING to its "
            "password, or PREFECT_API_KEY for Prefect Cloud"
        )
    if status == 403:
        return (
            f"the Prefect server at {url} refuses us (found status 403).{_proxy(url)} Fix: look at the rights of "
            "PREFECT_API_KEY, and at what stands before the server"
        )
    if status in GATEWAY:
        return (
            f"something before the Prefect server at {url} answers for it (found status {status}).{_proxy(url)} "
            "Fix: look whether the server runs"
        )
    if status == 404:
        return f"no Prefect API is at {url} (found status 404). Fix: {_with_api(url)}"
    return f"the Prefect server at {url} is not well (found status {status}). Fix: look at its log"


def _with_api(url: str) -> str:
    if url.rstrip("/").endswith("/api"):
        return "look whether this is a Prefect server's address"
    return f"set it to {url.rstrip('/')}/api"


def _proxy(url: str) -> str:
    """The proxy's part in it, where the environment names one for this address."""
    parts = urlsplit(url)
    proxies = urllib.request.getproxies()
    name = next((scheme for scheme in (parts.scheme, "all") if scheme in proxies), None)
    if name is None or urllib.request.proxy_bypass(parts.netloc):
        return ""
    return f" {name.upper()}_PROXY sends the request to a proxy: add {parts.hostname} to NO_PROXY."


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__
