"""edgemoa: small boards on one network answer a prompt together."""

import os
from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# The official builds of onnxruntime and onnxruntime-genai report usage to their maker's servers
# unless told not to before they are loaded. Nothing leaves a board that its owner did not send.
# (The second name is what some versions of onnxruntime look for.)
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
os.environ["ORT_TELEMETRY_DISABLED"] = "1"
# huggingface_hub asks the hub, once a day, by which names to report the program that uses it.
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

if TYPE_CHECKING:
    from edgemoa.client import Answer, Client, Stream
    from edgemoa.client_async import AsyncClient, AsyncStream

_WHERE = {
    **dict.fromkeys(("Answer", "Client", "Stream"), "edgemoa.client"),
    **dict.fromkeys(("AsyncClient", "AsyncStream"), "edgemoa.client_async"),
}
__all__ = ["Answer", "AsyncClient", "AsyncStream", "Client", "Stream"]


def __getattr__(name: str) -> object:
    """The clients are imported when they are used: a daemon and its command line start without."""
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'edgemoa' has no attribute {name!r}")
