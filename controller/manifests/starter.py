"""The first manifests of a new fleet repository: what `bellwether init` writes."""

from __future__ import annotations

from collections.abc import Mapping

_FLEET = """\
# yaml-language-server: $schema=schemas/Fleet.json
apiVersion: bellwether.dev/v1
kind: Fleet
metadata: {name: my-fleet}
spec:
  selector: {matchLabels: {model: m1}}   # devices with this label belong here
  healthPolicy: default
  cohorts:                               # first match wins; the last one takes the rest
    - {name: canary, select: {matchLabels: {ring: canary}}, limit: 100}
    - {name: general, rest: true}
"""

_POLICY = """\
# yaml-language-server: $schema=schemas/HealthPolicy.json
apiVersion: bellwether.dev/v1
kind: HealthPolicy
metadata: {name: default}
spec:
  gates:
    - {metric: update_ok, type: proportion}
    - {metric: crash, type: rate, per: device_hour, margin: {ratio: 1.5}, budget: {per_1000h: 20}}
"""

_RELEASE = """\
# yaml-language-server: $schema=schemas/Release.json
# `bellwether release publish FILE --component app --version 1.0.0` prints this document.
apiVersion: bellwether.dev/v1
kind: Release
metadata: {name: app-1.0.0}
spec:
  version: "1.0.0"
  artifacts:
    - component: app
      digest: "sha256:0000000000000000000000000000000000000000000000000000000000000000"
      size: 1
"""

_ROLLOUT = """\
# yaml-language-server: $schema=schemas/Rollout.json
apiVersion: bellwether.dev/v1
kind: Rollout
metadata: {name: my-fleet-app}
spec:
  fleet: my-fleet
  release: app-1.0.0                     # the one line that a release manager edits
  strategy:
    steps:
      - {cohort: canary, soak: 24h, maxSoak: 72h}
      - {cohort: general, percent: 20%, soak: 24h, maxSoak: 72h}
      - {cohort: general, percent: 100%}
"""

FILES: Mapping[str, str] = {
    "fleet.yaml": _FLEET,
    "policy.yaml": _POLICY,
    "releases/app-1.0.0.yaml": _RELEASE,
    "rollout.yaml": _ROLLOUT,
}
