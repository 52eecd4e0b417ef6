"""What each client's device can do: memory, speed and bandwidth, given, drawn from real devices, or measured."""

import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch

from fedbe.errors import ConfigError, Facts, Problem
from fedbe.seeding import generator

GIB = 2**30


@dataclass(frozen=True)
class Profile:
    """What a client's device can do.

    Attributes:
        memory_bytes: Memory that training may fill.
        flops_per_second: FLOP/s that training sustains, far below what data sheets print.
        upload_bytes_per_second: Bandwidth towards the server.
        download_bytes_per_second: Bandwidth from the server.
        availability: Probability that the client is there in a round, in (0, 1].
    """

    memory_bytes: float
    flops_per_second: float
    upload_bytes_per_second: float
    download_bytes_per_second: float
    availability: float = 1.0

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return the mistakes in these numbers."""
        positive = {name: value for name, value in vars(self).items() if name != "availability"}
        problems = [
            Problem(f"{key}.{name}", value, "give a finite number above 0")
            for name, value in positive.items()
            if not 0 < value < math.inf
        ]
        if not 0 < self.availability <= 1:
            problems.append(Problem(f"{key}.availability", self.availability, "a probability above 0, at most 1"))
        return problems

    def scaled(self, speed: float, upload: float, download: float, memory: float = 1.0) -> "Profile":
        """Return the profile with its numbers multiplied by factors."""
        return replace(
            self,
            memory_bytes=memory * self.memory_bytes,
            flops_per_second=speed * self.flops_per_second,
            upload_bytes_per_second=upload * self.upload_bytes_per_second,
            download_bytes_per_second=download * self.download_bytes_per_second,
        )


def _device(memory_gib: float, peak_flops: float, upload_mbit: float, download_mbit: float) -> Profile:
    # Training keeps a third of the float32 peak busy, on these boards as on larger ones: our assumption.
    return Profile(memory_gib * GIB, peak_flops / 3, upload_mbit * 1e6 / 8, download_mbit * 1e6 / 8)


_WIRED, _WIFI, _MOBILE = (100.0, 100.0), (20.0, 50.0), (5.0, 20.0)
"""Upload and download in Mbit/s, plain assumptions: an office's cable, a home's Wi-Fi, a 4G phone."""

DEVICES: Mapping[str, Profile] = {
    "jetson-agx-orin-64gb": _device(64, 2048 * 2 * 1.3e9, *_WIRED),
    "jetson-agx-xavier-32gb": _device(32, 512 * 2 * 1.377e9, *_WIRED),
    "jetson-orin-nx-16gb": _device(16, 1024 * 2 * 918e6, *_WIFI),
    "jetson-orin-nano-8gb": _device(8, 1024 * 2 * 625e6, *_WIFI),
    "jetson-xavier-nx-8gb": _device(8, 384 * 2 * 1.1e9, *_WIFI),
    "jetson-tx2-8gb": _device(8, 256 * 2 * 1.3e9, *_WIFI),
    "jetson-nano-4gb": _device(4, 128 * 2 * 921e6, *_MOBILE),
    "raspberry-pi-5-8gb": _device(8, 4 * 16 * 2.4e9, *_MOBILE),
    "raspberry-pi-4-4gb": _device(4, 4 * 8 * 1.8e9, *_MOBILE),
}
"""Edge boards by name, in float32.

Memory, CUDA cores and clocks of the Jetsons are those of NVIDIA's data sheets of each module (a core does one fused
multiply-add, 2 FLOPs, a cycle; the Orin Nano's clock is the one before its 2024 update). The AGX Orin comes to the 5.3
TFLOP/s that NVIDIA's technical brief of its series prints. The Raspberry Pis: four Cortex-A76 at 2.4 GHz, two 128-bit
multiply-adds (16 FLOPs) a cycle, and four Cortex-A72 at 1.8 GHz with 8 FLOPs, as in the Raspberry Pi documentation and
Arm's optimisation guides.
"""

FLEETS: Mapping[str, Mapping[str, float]] = {
    "mixed": {"jetson-agx-orin-64gb": 0.3, "jetson-orin-nano-8gb": 0.4, "raspberry-pi-5-8gb": 0.3},
    "jetson": {"jetson-agx-xavier-32gb": 0.3, "jetson-xavier-nx-8gb": 0.4, "jetson-tx2-8gb": 0.3},
    "weak": {"jetson-nano-4gb": 0.3, "raspberry-pi-5-8gb": 0.4, "raspberry-pi-4-4gb": 0.3},
}
"""Shares of devices by the name of a fleet; ``mixed`` is 30 % strong, 40 % medium and 30 % weak."""


class Fleet(ABC):
    """The clients' devices: subclass it in a file of your own and name it by ``class_path`` under ``fleet:``."""

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return the mistakes in this configuration, found before work starts; see `Facts`."""
        return []

    def setup(self, client_ids: Sequence[str], seed: int) -> None:  # noqa: B027
        """Learn who the clients are, and the run's seed; called once, before any profile is asked for.

        Raises:
            ConfigError: A client has no profile.
        """

    @abstractmethod
    def profile(self, client_id: str, round_index: int) -> Profile:
        """Return what a client's device can do in a round, a pure function of its arguments after `setup`."""


class GivenFleet(Fleet):
    """Profiles written down, client by client.

    Args:
        profiles: By the client's name.
        default: Of clients that are not in `profiles`.
    """

    def __init__(self, profiles: dict[str, Profile], default: Profile | None = None) -> None:
        self.profiles = profiles
        self.default = default

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return the mistakes in the profiles."""
        named = {f"profiles.{client}": profile for client, profile in self.profiles.items()}
        if self.default is not None:
            named["default"] = self.default
        return [problem for name, profile in named.items() for problem in profile.check(f"{key}.{name}", facts)]

    def setup(self, client_ids: Sequence[str], seed: int) -> None:
        """Check that each client has a profile, and that each profile has a client.

        Raises:
            ConfigError: One has none.
        """
        unknown = sorted(set(self.profiles) - set(client_ids))
        problems = [Problem(f"profiles.{name}", name, "there is no such client") for name in unknown]
        missing = [client for client in client_ids if client not in self.profiles]
        if missing and self.default is None:
            problems.append(Problem("profiles", missing, "give these clients profiles, or a default"))
        if problems:
            raise ConfigError(*problems)

    def profile(self, client_id: str, round_index: int) -> Profile:
        """Return the client's profile, the same in every round."""
        profile = self.profiles.get(client_id, self.default)
        if profile is None:
            raise KeyError(client_id)
        return profile


class DeviceFleet(Fleet):
    """Devices dealt to clients in given proportions.

    Args:
        shares: The name of a fleet (``mixed``, ``jetson``, ``weak``), or the share of each kind of device; together 1.
        devices: Kinds of device besides those of `DEVICES`, or in their place.
        scale: Factor on memory, FLOP/s and bandwidth, as if the model were 1/scale times as large: with it a tiny
            model stands for a big one.
        memory_scale: Factor on memory in place of `scale`: activations shrink less than weights do.
        jitter: Standard deviation of the logarithm of a factor on FLOP/s and on each bandwidth, drawn anew for each
            client and round; 0 for profiles that stay what they are.
    """

    def __init__(
        self,
        shares: dict[str, float] | str = "mixed",
        devices: dict[str, Profile] | None = None,
        scale: float = 1.0,
        memory_scale: float | None = None,
        jitter: float = 0.0,
    ) -> None:
        self.shares = shares
        self.devices = {**DEVICES, **(devices or {})}
        self.scale = scale
        self.memory_scale = memory_scale
        self.jitter = jitter
        self.seed = 0
        self.kinds: dict[str, str] = {}

    @property
    def proportions(self) -> Mapping[str, float]:
        """The share of each kind of device."""
        return FLEETS[self.shares] if isinstance(self.shares, str) else self.shares

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return the mistakes in shares, devices and factors."""
        problems = []
        for name, value in {"scale": self.scale, "memory_scale": self.memory_scale}.items():
            if value is not None and not 0 < value < math.inf:
                problems.append(Problem(f"{key}.{name}", value, "give a finite number above 0"))
        if not 0 <= self.jitter < math.inf:
            problems.append(Problem(f"{key}.jitter", self.jitter, "give 0 or more"))
        if isinstance(self.shares, str) and self.shares not in FLEETS:
            remedy = f"give the share of each device, or one of {', '.join(FLEETS)}"
            return [*problems, Problem(f"{key}.shares", self.shares, remedy)]
        unknown = [kind for kind in self.proportions if kind not in self.devices]
        if unknown:
            problems.append(Problem(f"{key}.shares", unknown, f"unknown devices; known: {', '.join(self.devices)}"))
        values = self.proportions.values()
        if not all(0 <= share <= 1 for share in values) or not math.isclose(sum(values), 1, abs_tol=1e-6):
            problems.append(Problem(f"{key}.shares", dict(self.proportions), "shares lie in [0, 1] and sum to 1"))
        each = {name: profile.check(f"{key}.devices.{name}", facts) for name, profile in self.devices.items()}
        return problems + [problem for found in each.values() for problem in found]

    def setup(self, client_ids: Sequence[str], seed: int) -> None:
        """Deal the devices out: exact proportions by largest remainder, to clients in an order drawn from the seed."""
        self.seed = seed
        counts = apportion(self.proportions, len(client_ids))
        kinds = [kind for kind, count in counts.items() for _ in range(count)]
        order = torch.randperm(len(client_ids), generator=generator(seed, "fleet")).tolist()
        self.kinds = {client: kinds[place] for client, place in zip(client_ids, order, strict=True)}

    def profile(self, client_id: str, round_index: int) -> Profile:
        """Return the profile of the client's device, as it is in this round."""
        factors = torch.ones(3, dtype=torch.float64)
        if self.jitter:
            drawn = torch.randn(3, generator=generator(self.seed, "fleet jitter", client_id, round_index))
            factors = torch.exp(self.jitter * drawn.double())
        speed, upload, download = (self.scale * factors).tolist()
        memory = self.scale if self.memory_scale is None else self.memory_scale
        return self.devices[self.kinds[client_id]].scaled(speed, upload, download, memory)


def apportion(shares: Mapping[str, float], total: int) -> dict[str, int]:
    """Return whole numbers in proportion to shares, which sum to `total`: the method of the largest remainder.

    Args:
        shares: At least 0 each, together 1; of equal remainders the first is served first.
        total: What to deal out.
    """
    exact = {name: round(share * total, 9) for name, share in shares.items()}
    counts = {name: math.floor(value) for name, value in exact.items()}
    left = total - sum(counts.values())
    for name in sorted(exact, key=lambda name: counts[name] - exact[name])[:left]:
        counts[name] += 1
    return counts


class MeasuredFleet(Fleet):
    """Every client is this machine: its memory, and the FLOP/s of a large matrix product, measured at `setup`.

    Two measurements differ, so do runs that decide by them: give the numbers to a `GivenFleet` to repeat one exactly.

    Args:
        upload_bytes_per_second: Bandwidth towards the server.
        download_bytes_per_second: Bandwidth from the server.
        device: Where clients train, as PyTorch names it.
    """

    def __init__(self, upload_bytes_per_second: float, download_bytes_per_second: float, device: str = "cpu") -> None:
        self.upload_bytes_per_second = upload_bytes_per_second
        self.download_bytes_per_second = download_bytes_per_second
        self.device = device
        self._profile: Profile | None = None

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return the mistakes in the bandwidths."""
        return Profile(1, 1, self.upload_bytes_per_second, self.download_bytes_per_second).check(key, facts)

    def setup(self, client_ids: Sequence[str], seed: int) -> None:
        """Measure the machine."""
        bandwidths = self.upload_bytes_per_second, self.download_bytes_per_second
        self._profile = Profile(memory_bytes(self.device), measured_flops(self.device), *bandwidths)

    def profile(self, client_id: str, round_index: int) -> Profile:
        """Return this machine's profile."""
        if self._profile is None:
            raise RuntimeError("profiles are known after `setup` has been called")
        return self._profile


def memory_bytes(device: str = "cpu") -> int:
    """Return the memory of this machine, or of its GPU."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def measured_flops(device: str = "cpu", size: int = 512, repeats: int = 9) -> float:
    """Return the FLOP/s of a float32 matrix product, the median of some.

    Args:
        device: Where to measure, as PyTorch names it.
        size: Side of the matrices.
        repeats: Products that are measured, after one that is not.
    """
    matrix = torch.ones(size, size, device=device)
    taken = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        float((matrix @ matrix)[0, 0])  # waits until the product is there
        taken.append(time.perf_counter() - started)
    return 2 * size**3 / median(taken[1:])


def available(fleet: Fleet, client_ids: Sequence[str], round_index: int, seed: int) -> list[str]:
    """Return who is there in a round, in the order of `client_ids`: each by its own availability; maybe nobody.

    Args:
        fleet: After `setup`.
        client_ids: Who is asked.
        round_index: 0-based round.
        seed: The run's seed.
    """
    return [client for client in client_ids if _is_there(fleet.profile(client, round_index), client, round_index, seed)]


def _is_there(profile: Profile, client_id: str, round_index: int, seed: int) -> bool:
    draw = torch.rand((), generator=generator(seed, "availability", client_id, round_index)).item()
    return draw < profile.availability
