"""paho-mqtt without the HTTP client that it drags along.

paho imports `urllib.request`, and with it `http.client` and `email`, to ask for the proxies that it
would use if PySocks were installed: 3 MiB and a third of the start. Without PySocks it never
looks at the module, so an empty one stands in while paho is imported.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any

_NAME = "urllib.request"
_needless = _NAME not in sys.modules and importlib.util.find_spec("socks") is None
if _needless:
    sys.modules[_NAME] = ModuleType(_NAME)
try:
    from paho.mqtt import client
    from paho.mqtt.packettypes import PacketTypes
    from paho.mqtt.properties import Properties
finally:
    if _needless:
        del sys.modules[_NAME]

mqtt: Any = client  # typed by whichever release of its stubs is about: none fits all versions

__all__ = ["PacketTypes", "Properties", "mqtt"]
