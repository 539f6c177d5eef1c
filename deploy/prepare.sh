#!/bin/sh
# Before the first start, and harmless at every later one: the broker's accounts, a token for the
# simulated fleet, and a fleet repository with the example cars.
set -eu
bellwether broker-config /broker --state-dir /state --database "$BELLWETHER_DATABASE"
chmod 0644 /broker/dynamic-security.json # the volume is shared with the broker alone
if [ ! -s /state/simulator.token ]; then
  umask 077
  bellwether token create simulator --role admin --state-dir /state \
    --database "$BELLWETHER_DATABASE" --output json |
    python3 -c 'import json, sys; print(json.load(sys.stdin)["token"])' >/state/simulator.token
fi
if [ ! -e /repo/fleet.git/HEAD ]; then
  git init --quiet --bare --initial-branch=main /repo/fleet.git
  work=$(mktemp -d)
  git clone --quiet /repo/fleet.git "$work" 2>/dev/null
  cp -r /app/fleets/cars "$work/fleets"
  cd "$work"
  git checkout --quiet -B main
  git add -A
  git -c user.name=Bellwether -c user.email=bellwether@localhost commit --quiet -m "Example fleet"
  git push --quiet origin main
fi
