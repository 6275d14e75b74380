"""What every test shares: hypothesis prints how to replay a failure, and no setting leaks in from outside.

Files of tests run side by side (``make test``), the tests of one file one after the other.
"""

import os
from collections.abc import Iterator

import hypothesis
import pytest

from tests.faultfs.mount import faulty_mount, faulty_mounts, small_disk  # noqa: F401 - fixtures

# Examples stay random from run to run; a failure prints the blob that replays it. No deadline: the
# machine is shared, and a slow example is no wrong one.
hypothesis.settings.register_profile("ci", derandomize=False, print_blob=True, deadline=None)
hypothesis.settings.load_profile("ci")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where tests run side by side, begin with files that take long: then nobody waits for one of them at the end."""
    if hasattr(config, "workerinput"):
        long = {item.path for item in items if item.get_closest_marker("slow") or "simulation" in item.path.parts}
        items.sort(key=lambda item: (item.path not in long, "integration" not in item.path.parts))


@pytest.fixture(scope="session", autouse=True)
def no_settings_from_outside() -> Iterator[None]:
    """Tests, and the processes they start, see only the settings that they make themselves."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [*os.environ]:
            if name == "MOONCAKE_CONFIG_PATH" or (name.startswith("KVPOOL_") and not name.startswith("KVPOOL_TEST_")):
                patch.delenv(name)
        yield
