from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import transport
from transport import BadDescriptor, Region, Transport
from transport.descriptor import Descriptor
from transport.segments import SegmentName

numbers = st.integers(0, 2**64 - 1)


@pytest.fixture(scope="module", params=["ucx", "loopback"])
def owned(request: pytest.FixtureRequest) -> Iterator[tuple[Transport, Region]]:
    with transport.create(request.param) as t, t.allocate(4096) as region:
        yield t, region


segments = st.builds(SegmentName, st.binary(min_size=16, max_size=16), st.integers(1, 2**32 - 1), st.integers(0, 2**20))


@given(
    numbers,
    st.integers(0, 2**63),
    st.integers(1, 2**63),
    st.none() | segments,
    st.binary(max_size=600),
    st.binary(max_size=600),
)
def test_round_trip(
    incarnation: int, base: int, nbytes: int, segment: SegmentName | None, address: bytes, key: bytes
) -> None:
    d = Descriptor("ucx", incarnation, base, nbytes, segment, address, key)
    assert Descriptor.unpack(d.pack(), backend="ucx") == d
    with pytest.raises(BadDescriptor, match="another backend"):
        Descriptor.unpack(d.pack(), backend="loopback")


@pytest.mark.parametrize(("base", "nbytes"), [(0, 0), (2**64 - 1, 2), (2, 2**64 - 1)])
def test_impossible_ranges_are_refused(base: int, nbytes: int) -> None:
    with pytest.raises(BadDescriptor, match="impossible"):
        Descriptor.unpack(Descriptor("ucx", 1, base, nbytes).pack(), backend="ucx")


def test_a_segment_of_no_process_is_refused() -> None:
    with pytest.raises(BadDescriptor, match="no process"):
        Descriptor.unpack(Descriptor("ucx", 1, 0, 1, SegmentName(bytes(16), 0, 7)).pack(), backend="ucx")


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_what_is_garbled_never_reaches_the_library(owned: tuple[Transport, Region], data: st.DataObject) -> None:
    t, region = owned
    good = region.descriptor
    kind = data.draw(st.sampled_from(["random", "cut", "longer", "flipped", "spliced"]))
    i = data.draw(st.integers(0, len(good) - 1))
    match kind:
        case "random":
            bad = data.draw(st.binary(max_size=400))
        case "cut":
            bad = good[:i]
        case "longer":
            bad = good + data.draw(st.binary(min_size=1, max_size=40))
        case "flipped":
            bad = good[:i] + bytes([good[i] ^ data.draw(st.integers(1, 255))]) + good[i + 1 :]
        case _:
            j = data.draw(st.integers(0, len(good) - 1))
            bad = good[:i] + good[j:]
    if bad == good:
        return
    with pytest.raises(BadDescriptor):
        t.open(bad)


def test_the_untouched_descriptor_opens(owned: tuple[Transport, Region]) -> None:
    t, region = owned
    with t.open(region.descriptor) as remote:  # one's own: allowed
        assert (remote.nbytes, remote.incarnation) == (4096, t.incarnation)
