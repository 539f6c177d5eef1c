"""A fleet that reports at a steady rate, until its time is over or its parent is gone.

`python -m bench.pressure PORT RATE SECONDS SEED` makes each second's messages as it goes, publishes
them at QoS 1, and says `publishing` with the first. A thousand cars of `bench.load`, with a boot of
their own, so that nothing of it is a repetition of another run.

Devices have processors of their own: where there are too few here, theirs gives way.
"""

from __future__ import annotations

import os
import random
import sys
import time

import mqtt5

from bench.load import DIGEST, Session

DEVICES = 1_000
GIVES_WAY = 5  # niceness


def main() -> None:
    os.nice(GIVES_WAY)
    port, rate, seconds, seed = (float(word) for word in sys.argv[1:5])
    dice, boot = random.Random(seed), f"b{int(time.time())}"
    session = Session(int(port), f"bench-pressure-{int(seed)}")
    print("publishing", flush=True)
    began, number, parent = time.monotonic(), 0, os.getppid()
    while time.monotonic() < began + seconds and os.getppid() == parent:
        some = [_packet(dice, boot, n) for n in range(number, number + max(1, int(rate / 20)))]
        time.sleep(max(0.0, began + number / rate - time.monotonic()))
        session.publish(some)
        number += len(some)


def _packet(dice: random.Random, boot: str, number: int) -> bytes:
    device, seq = f"car-{number % DEVICES:06d}", number // DEVICES
    body = (
        f'{{"v":1,"boot":"{boot}","bootCount":2,"seq":{seq},"components":{{"app":"{DIGEST}"}},'
        f'"t0":{time.time():.2f},"dt":1.0,"columns":{{"cpu_percent":[{dice.uniform(0, 100):.2f}],'
        f'"temperature":[{dice.uniform(20, 90):.2f}]}},"counters":{{"disengagement":0}},'
        f'"exposure":{{"device_hour":0.000278,"km":{dice.uniform(0, 0.03):.4f}}},"dropped":0}}'
    )
    return mqtt5.PublishPacket(
        f"bw/v1/{device}/health",
        body.encode(),
        qos=mqtt5.QoS.AT_LEAST_ONCE,
        packet_id=number % 60_000 + 1,
    ).write()


if __name__ == "__main__":
    main()
