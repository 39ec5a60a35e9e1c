"""Which packages a kit takes, without asking any index."""

from __future__ import annotations

from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.tags import compatible_tags, cpython_tags

from tests.gpu_kit.__main__ import roots
from tests.gpu_kit.packages import MODEL, WITH_TORCH, KitError, There, environment_of, lacking, pins_of, platforms

ROOT = Path(__file__).parents[2]
ON_312 = environment_of("3.12")
# What each asks for, as its wheel would say.
ASKED = {
    "server": ["torch>=2.11", "numpy>=2", "codec>=1.2", "old-only; python_version < '3.12'", "x; sys_platform == 'win32'"],
    "codec": ["wire[fast]>=3", "codec-tests; extra == 'test'"],
    "wire": ["speedups; extra == 'fast'", "server"],
    "speedups": ["nvidia-cutlass-dsl>=4"],
}  # fmt: skip
PINS = {"server": "1.0", "codec": "1.3", "wire": "3.1", "speedups": "0.9"}


def requirements_of(name: str, version: str) -> list[str]:
    assert PINS[name] == version
    return ASKED[name]


def test_all_that_is_asked_for_comes_but_what_torch_brings_and_other_kernels_want() -> None:
    assert lacking(["server"], There(), PINS, ON_312, requirements_of) == PINS


def test_what_the_machine_has_stays_away_with_all_that_it_asks_for() -> None:
    assert lacking(["server"], There(["Codec"]), PINS, ON_312, requirements_of) == {"server": "1.0"}


@pytest.mark.parametrize(
    ("frozen", "comes"), [("codec==1.2.7", False), ("codec==1.1", True), ("codec @ file:///x", True)]
)
def test_what_pip_freeze_lists_stays_away_where_its_version_fits(frozen: str, comes: bool) -> None:
    there = There(freeze=f"# made by pip\n-e /src/server\n{frozen}\n")
    assert ("codec" in lacking(["server"], there, PINS, ON_312, requirements_of)) is comes


def test_programs_that_must_be_on_the_path_come_in_any_case() -> None:
    there = There(["ninja"], freeze="ninja==1.13.2")
    assert lacking(["ninja>=1"], there, {"ninja": "1.13.2"}, ON_312, lambda *_: []) == {"ninja": "1.13.2"}


def test_a_package_of_another_python_comes_for_that_python_alone() -> None:
    pins = {**PINS, "old-only": "1"}
    asked = {**ASKED, "old-only": []}
    for python, comes in (("3.11", True), ("3.12", False)):
        found = lacking(["server"], There(), pins, environment_of(python), lambda name, _: asked[name])
        assert ("old-only" in found) is comes


def test_what_is_not_pinned_or_pinned_too_low_is_named() -> None:
    with pytest.raises(KitError, match="does not pin wire"):
        lacking(["server"], There(), {"server": "1.0", "codec": "1.3"}, ON_312, requirements_of)
    with pytest.raises(KitError, match=r"pins codec==1\.1, but codec>=1\.2"):
        lacking(["server"], There(), {**PINS, "codec": "1.1"}, ON_312, requirements_of)


def test_pins_are_those_of_the_machines_python() -> None:
    text = "# exact\nAt_heris==3.0.0; python_version < '3.12'\nat.heris==3.1; python_version >= '3.12'\nx==1  # y\n"
    assert pins_of(text, ON_312) == {"at-heris": "3.1", "x": "1"}
    assert pins_of(text, environment_of("3.11")) == {"at-heris": "3.0.0", "x": "1"}


def test_what_the_kit_begins_with_is_pinned_and_has_the_gpus_and_the_tests_packages() -> None:
    pins = pins_of((ROOT / "constraints.txt").read_text(), ON_312)
    names = {Requirement(root).name.lower() for root in roots()}
    assert names | {MODEL} <= set(pins)
    assert names >= {"flashinfer-python", "libucx-cu13", "torch", "starlette", "pytest"}
    assert set(pins) >= WITH_TORCH, "what torch brings, as constraints.txt knows it"


def test_platforms_are_those_that_a_machine_with_this_glibc_takes() -> None:
    tags = platforms("2.28")
    assert tags[0] == "manylinux_2_28_x86_64"
    assert "manylinux_2_29_x86_64" not in tags
    known = {str(tag) for tag in (*cpython_tags((3, 12), platforms=tags), *compatible_tags((3, 12), "cp312", tags))}
    assert {"cp312-cp312-manylinux_2_17_x86_64", "cp39-abi3-manylinux2014_x86_64", "py3-none-any"} <= known
