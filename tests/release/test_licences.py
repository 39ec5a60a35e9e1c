from __future__ import annotations

import pytest

from tests.release.__main__ import forbidden


@pytest.mark.parametrize(
    ("licence", "is_forbidden"),
    [
        ("MIT", False),
        ("MPL-2.0 AND MIT", False),
        ("LGPL-3.0-or-later", False),
        ("GNU Lesser General Public License v3 (LGPLv3)", False),
        ("GPL-3.0-only", True),
        ("AGPL-3.0", True),
        ("GNU General Public License v2 (GPLv2)", True),
        ("GNU Affero General Public License v3", True),
        ("MIT OR GPL-2.0", False),
        ("MIT AND GPL-2.0", True),
    ],
)
def test_forbidden(licence: str, is_forbidden: bool) -> None:
    assert forbidden(licence) is is_forbidden
