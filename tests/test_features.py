# SPDX-License-Identifier: Apache-2.0

"""The page of features names tests that exist."""

import re
from pathlib import Path

TESTS = Path(__file__).parent


def test_every_test_that_the_page_names_exists():
    rows = [line for line in (TESTS.parent / "docs/features.md").read_text().splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 20
    for row in rows:
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", row.split("|")[3])
        assert named, f"no test: {row}"
        for file, test in named:
            assert f"\ndef {test}(" in (TESTS / file).read_text(), f"{file}::{test}"
