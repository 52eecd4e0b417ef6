from collections import Counter
from math import log
from statistics import fmean, stdev

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import ArgumentParser

from fedbe.allocation.profiles import (
    DEVICES,
    FLEETS,
    DeviceFleet,
    Fleet,
    GivenFleet,
    MeasuredFleet,
    Profile,
    apportion,
    available,
)
from fedbe.errors import ConfigError, Facts

SMALL = Profile(1e9, 2e9, 3e6, 4e6)
CLIENTS = [f"client-{k}" for k in range(10)]


def fleet(seed=0, clients=CLIENTS, **options):
    made = DeviceFleet(**options)
    made.setup(clients, seed)
    return made


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 50))
def test_shares_are_dealt_out_exactly(weights, total):
    shares = {str(i): weight / sum(weights) for i, weight in enumerate(weights)}
    counts = apportion(shares, total)
    assert sum(counts.values()) == total
    assert all(abs(counts[name] - share * total) < 1 for name, share in shares.items())


def test_remainders_go_to_the_largest():
    assert apportion({"a": 0.5, "b": 0.29, "c": 0.21}, 6) == {"a": 3, "b": 2, "c": 1}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ten_clients_of_the_mixed_fleet_are_three_strong_four_medium_three_weak(seed):
    kinds = Counter(fleet(seed).kinds.values())
    assert kinds == {"jetson-agx-orin-64gb": 3, "jetson-orin-nano-8gb": 4, "raspberry-pi-5-8gb": 3}


def test_who_gets_which_device_follows_from_the_seed():
    assert fleet(3).kinds == fleet(3).kinds
    assert len({tuple(fleet(seed).kinds.items()) for seed in range(5)}) == 5
    assert list(fleet(3).kinds.values()) != sorted(fleet(3).kinds.values())


def test_scale_stands_for_a_smaller_model():
    whole, tenth = (fleet(scale=scale).profile("client-0", 0) for scale in (1.0, 0.1))
    for name in ("memory_bytes", "flops_per_second", "upload_bytes_per_second", "download_bytes_per_second"):
        assert getattr(tenth, name) == pytest.approx(getattr(whole, name) / 10)
    roomy = fleet(scale=0.1, memory_scale=0.5).profile("client-0", 0)
    assert roomy.memory_bytes == pytest.approx(whole.memory_bytes / 2)
    assert roomy.flops_per_second == tenth.flops_per_second


def test_jitter_differs_by_client_and_round_and_is_log_normal():
    shaky = fleet(jitter=0.5, shares={"only": 1.0}, devices={"only": SMALL})
    draws = [shaky.profile(client, r) for client in CLIENTS for r in range(60)]
    logs = [log(profile.flops_per_second / SMALL.flops_per_second) for profile in draws]
    assert len(set(logs)) == len(logs)
    assert abs(fmean(logs)) < 0.08 and stdev(logs) == pytest.approx(0.5, rel=0.15)
    assert shaky.profile("client-1", 4) == fleet(jitter=0.5, shares={"only": 1.0}, devices={"only": SMALL}).profile(
        "client-1", 4
    )
    assert {profile.memory_bytes for profile in draws} == {1e9}
    speed, upload = (draws[0].flops_per_second / 2e9, draws[0].upload_bytes_per_second / 3e6)
    assert speed != upload


def test_without_jitter_rounds_are_alike():
    assert fleet().profile("client-0", 0) == fleet().profile("client-0", 7)


def test_named_fleets_and_devices_are_sound():
    for name in FLEETS:
        assert DeviceFleet(name).check("clock.fleet.init_args", Facts()) == []
    assert DEVICES["jetson-orin-nano-8gb"].flops_per_second == pytest.approx(1.28e12 / 3)
    strength = [DEVICES[kind].flops_per_second for kind in FLEETS["mixed"]]
    assert strength == sorted(strength, reverse=True)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"shares": "none such"}, "shares"),
        ({"shares": {"raspberry-pi-5-8gb": 0.5}}, "shares"),
        ({"shares": {"toaster": 1.0}}, "shares"),
        ({"shares": {"raspberry-pi-5-8gb": 1.5, "jetson-nano-4gb": -0.5}}, "shares"),
        ({"scale": 0}, "scale"),
        ({"jitter": -1}, "jitter"),
        ({"devices": {"slow": Profile(1, 0, 1, 1)}}, "devices.slow.flops_per_second"),
    ],
)
def test_mistakes_in_a_device_fleet_are_named(options, key):
    assert [problem.key for problem in DeviceFleet(**options).check("clock.fleet.init_args", Facts())] == [
        f"clock.fleet.init_args.{key}"
    ]


def test_mistakes_in_given_profiles_are_named():
    given_fleet = GivenFleet({"a": Profile(1, 1, 1, 1, availability=0)}, Profile(-1, 1, 1, float("inf")))
    assert [problem.key for problem in given_fleet.check("clock.fleet.init_args", Facts())] == [
        "clock.fleet.init_args.profiles.a.availability",
        "clock.fleet.init_args.default.memory_bytes",
        "clock.fleet.init_args.default.download_bytes_per_second",
    ]


def test_every_client_needs_a_profile_and_every_profile_a_client():
    with pytest.raises(ConfigError, match="no such client") as raised:
        GivenFleet({"client-0": SMALL, "nobody": SMALL}).setup(CLIENTS, 0)
    assert len(raised.value.problems) == 2
    filled = GivenFleet({"client-0": SMALL}, default=DEVICES["jetson-nano-4gb"])
    filled.setup(CLIENTS, 0)
    assert filled.profile("client-0", 0) == SMALL and filled.profile("client-9", 3) == DEVICES["jetson-nano-4gb"]


def test_availability_is_drawn_by_client_and_round():
    often = Profile(1, 1, 1, 1, availability=0.7)
    partly = GivenFleet({"client-0": SMALL}, default=often)
    rounds = [available(partly, CLIENTS, index, seed=0) for index in range(100)]
    assert rounds == [available(partly, CLIENTS, index, seed=0) for index in range(100)]
    assert all(there[0] == "client-0" for there in rounds)
    assert all(there == [client for client in CLIENTS if client in there] for there in rounds)
    assert fmean(len(there) - 1 for there in rounds) == pytest.approx(9 * 0.7, rel=0.1)
    # Who else is asked does not matter.
    assert all(("client-4" in there) == bool(available(partly, ["client-4"], r, 0)) for r, there in enumerate(rounds))


def test_a_measured_fleet_is_this_machine():
    machine = MeasuredFleet(1e6, 2e6)
    assert machine.check("clock.fleet.init_args", Facts()) == []
    machine.setup(CLIENTS, 0)
    profile = machine.profile("client-3", 1)
    assert profile.check("profile", Facts()) == []
    assert profile.memory_bytes > 2**28 and 1e7 < profile.flops_per_second < 1e15
    assert (profile.upload_bytes_per_second, profile.download_bytes_per_second) == (1e6, 2e6)
    assert [p.key for p in MeasuredFleet(0, 1).check("clock.fleet.init_args", Facts())] == [
        "clock.fleet.init_args.upload_bytes_per_second"
    ]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("GivenFleet", {"profiles": {"client-0": vars(SMALL)}, "default": vars(SMALL)}),
        ("DeviceFleet", {"shares": {"mine": 1.0}, "devices": {"mine": vars(SMALL)}}),
    ],
)
def test_a_fleet_is_written_in_yaml(name, arguments):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Fleet, "fleet")
    section = {"fleet": {"class_path": f"fedbe.allocation.profiles.{name}", "init_args": arguments}}
    made = parser.instantiate(parser.parse_object(section)).fleet
    assert made.check("clock.fleet.init_args", Facts()) == []
    made.setup(["client-0"], 0)
    assert made.profile("client-0", 0) == SMALL
