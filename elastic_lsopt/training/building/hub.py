"""A name of the Hugging Face hub where there is no network: known at once, instead of after five retries per file."""

from __future__ import annotations

import os
import socket
import threading
from functools import cache
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from elastic_lsopt.config.settings import SettingError

REACH_S = 1.5
"""How long the hub, or the proxy before it, has to take a connection."""
Kind = Literal["models", "datasets"]


def local_only(key: str, name: str, kind: Kind = "models") -> bool:
    """Whether `name` must be read from the local cache alone, because the hub cannot be reached; False for a path.

    Raises SettingError for `key` where it cannot be reached and nothing of that name is in the cache.
    """
    if Path(name).expanduser().exists() or reachable():
        return False
    if not cached(name, kind):
        from huggingface_hub import constants

        raise SettingError(
            key,
            f"{key}={name} is no folder here and not in the local cache, and {constants.ENDPOINT} cannot be reached "
            f"within {REACH_S:g} s; give a folder, or a network.",
        )
    return True


def cached(name: str, kind: Kind = "models") -> bool:
    """Whether the local cache holds anything of that name."""
    from huggingface_hub import constants

    folders = [Path(constants.HF_HUB_CACHE, f"{kind}--{name.replace('/', '--')}")]
    if kind == "datasets":
        own = os.environ.get("HF_DATASETS_CACHE", str(Path(constants.HF_HOME, "datasets")))
        folders.append(Path(own, name.replace("/", "___").lower()))
    return any(folder.exists() for folder in folders)


@cache
def reachable() -> bool:
    """Whether the hub takes a connection, as often as this process asks the same; False where it is told not to ask."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    hub = urlsplit(constants.ENDPOINT)
    proxy = None if proxy_bypass(hub.hostname or "") else getproxies().get(hub.scheme)
    door = urlsplit(proxy) if proxy else hub
    ends: list[bool] = []

    def knock() -> None:
        try:
            port = door.port or (443 if door.scheme == "https" else 80)
            socket.create_connection((door.hostname or "", port), timeout=REACH_S).close()
        except OSError:
            return
        ends.append(True)

    # A thread, because looking up a name has no timeout.
    thread = threading.Thread(target=knock, daemon=True)
    thread.start()
    thread.join(REACH_S)
    return bool(ends)
