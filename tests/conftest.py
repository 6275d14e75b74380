"""What every test shares: hypothesis prints how to replay a failure, and no setting leaks in from outside."""

import os
from collections.abc import Iterator

import hypothesis
import pytest

from tests.faultfs.mount import faulty_mount, faulty_mounts, small_disk  # noqa: F401 - fixtures

# Examples stay random from run to run; a failure prints the blob that replays it. No deadline: the
# machine is shared, and a slow example is no wrong one.
hypothesis.settings.register_profile("ci", derandomize=False, print_blob=True, deadline=None)
hypothesis.settings.load_profile("ci")


@pytest.fixture(scope="session", autouse=True)
def no_settings_from_outside() -> Iterator[None]:
    """Tests, and the processes they start, see only the settings that they make themselves."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [*os.environ]:
            if name == "MOONCAKE_CONFIG_PATH" or (name.startswith("KVPOOL_") and not name.startswith("KVPOOL_TEST_")):
                patch.delenv(name)
        yield
