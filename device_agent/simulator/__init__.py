"""Many simulated devices in one process: each runs the agent's own core, over asyncio.

Every device has its own directory (identity, journal, outbox, slots opened on use) and its own MQTT
session; what one leaves behind, `bellwether-agent run` can continue, and the other way round. Only
the machine is simulated: driving, boot and silence (`machine`), and scripted faults. At
most `MOST` devices a process. Nothing here decides about updates: that is `device_agent.agent`.

Faults are a JSON list: {"at": SECONDS, "do": "offline" | "restart" | "clock", "for": SECONDS,
"devices": "car-00*" | "share": 0.1, "by": SECONDS}. `at` counts from the start of the process.
"""
