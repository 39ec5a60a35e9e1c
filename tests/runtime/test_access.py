"""The table of who may call what."""

from __future__ import annotations

import pytest

from kvferry._roles import CertificateRole as Role
from kvferry.api.directory.v1 import directory_pb2
from kvferry.api.worker.v1 import worker_pb2
from kvferry.errors import PermissionDeniedError
from services.runtime.access import ALLOWED, require, roles_of


def test_every_call_between_services_is_in_the_table() -> None:
    """What is not there nobody may call, which would be noticed late."""
    services = [s for file in (directory_pb2, worker_pb2) for s in file.DESCRIPTOR.services_by_name.values()]
    methods = {f"/{service.full_name}/{method.name}" for service in services for method in service.methods}
    assert methods == {method for method in ALLOWED if method.startswith("/kvferry.")}


def test_a_service_reads_the_names_that_the_command_line_issues() -> None:
    """One by one: a name that was issued is in certificates."""
    names = {role: f"{role.value}.kvferry.internal" for role in Role}
    assert {role.value for role in Role} == {"gateway", "worker", "directory", "operator"}
    for role, name in names.items():
        assert role.dns_name == name
        assert roles_of([name.encode()]) == {role}


def test_only_the_exact_name_makes_a_role() -> None:
    assert roles_of([b"worker.kvferry.internal", b"127.0.0.1"]) == {Role.WORKER}
    for name in (b"*.kvferry.internal", b"worker.kvferry.internal.example.org", b"a.worker.kvferry.internal", b"worker",
                 b"WORKER.kvferry.internal", b""):  # fmt: skip
        assert roles_of([name]) == frozenset()


@pytest.mark.parametrize("method", [*ALLOWED, "/kvferry.api.worker.v1.WorkerService/NoSuch"])
def test_who_has_no_role_may_call_nothing(method: str) -> None:
    with pytest.raises(PermissionDeniedError, match="the caller's certificate names no role"):
        require(method, frozenset())


def test_nobody_may_call_what_is_not_in_the_table() -> None:
    with pytest.raises(PermissionDeniedError, match="is for nobody"):
        require("/kvferry.api.worker.v1.WorkerService/NoSuch", frozenset(Role))
