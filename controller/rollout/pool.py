"""The devices that a large draw chooses from, as columns: a million are ranked and drawn at once.

Pure. As in `cohort.rank`, a device's rank is a stable, uniform number of 64 bits for seed and
device; here it is mixed from a hash of either, so that a column of them can be computed. Who does
not know the seed (it is the commit's) cannot choose a low one. Decision 0039.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from controller.rollout.cohort import Candidate, Stratum

MANY = 20_000  # candidates: fewer are ranked one by one
_Ranks = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Pool:
    candidates: Sequence[Candidate]
    keys: _Ranks  # a hash of each device, whatever the seed
    strata: Mapping[Stratum, npt.NDArray[np.intp]]  # → places of its devices

    @classmethod
    def of(cls, candidates: Sequence[Candidate], spread: Sequence[str] = ()) -> Pool:
        places: dict[Stratum, list[int]] = {}
        for place, c in enumerate(candidates):
            labels = tuple([c.device.labels.get(label, "") for label in spread])
            places.setdefault((*c.stratum, *labels), []).append(place)
        names = b"".join(
            [blake2b(c.device.id.encode(), digest_size=8).digest() for c in candidates]
        )
        return cls(
            candidates=candidates,
            keys=np.frombuffer(names, dtype="<u8"),
            strata={key: np.array(found, dtype=np.intp) for key, found in places.items()},
        )

    def __len__(self) -> int:
        return len(self.candidates)

    @property
    def sizes(self) -> dict[Stratum, int]:
        return {key: len(places) for key, places in self.strata.items()}

    def ranks(self, seed: str) -> _Ranks:
        one, other = np.frombuffer(blake2b(seed.encode(), digest_size=16).digest(), dtype="<u8")
        return _mixed(_mixed(self.keys ^ one) + other)

    def first(self, quota: Mapping[Stratum, int], seed: str) -> Iterator[Candidate]:
        """So many of each stratum: those of the lowest ranks, in their order."""
        ranks = self.ranks(seed)
        for key in sorted(self.strata, key=repr):
            places, n = self.strata[key], quota[key]
            own = ranks[places]
            if n < len(places):
                chosen = np.argpartition(own, n)[:n]
                places, own = places[chosen], own[chosen]
            for place in places[np.argsort(own, kind="stable")].tolist():
                yield self.candidates[place]


def _mixed(x: _Ranks) -> _Ranks:
    """Each bit of it depends on all of x (SplitMix64's finaliser, Stafford's variant 13)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
