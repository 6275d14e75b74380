"""Units, by systemd's own check where it is installed."""

import shutil
import subprocess
from pathlib import Path

import pytest

from kvpool.server.node import EXIT_SUPERSEDED
from tests.deploy import files

UNITS = sorted((files.DEPLOY / "systemd").glob("*.service"))
ANALYZE, SYSUSERS = shutil.which("systemd-analyze"), shutil.which("systemd-sysusers")


def verify(*paths):
    return subprocess.run(
        [str(ANALYZE), "verify", "--man=no", *map(str, paths)], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.skipif(ANALYZE is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize("path", UNITS, ids=files.named)
def test_systemd_takes_the_unit(path):
    """No unknown section, key or value, and nothing that cannot be started."""
    result = verify(path)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.skipif(ANALYZE is None, reason="systemd-analyze is not installed")
def test_systemds_check_finds_misspelt_keys(tmp_path):
    """The check above can fail."""
    path = tmp_path / "kvpool-broken.service"
    path.write_text(UNITS[0].read_text().replace("Restart=", "Restrat="))
    assert "Restrat" in verify(path).stderr


@pytest.mark.skipif(SYSUSERS is None, reason="systemd-sysusers is not installed")
def test_systemd_takes_the_user():
    """The nodes' user is declared in words that systemd-sysusers knows, and the unit runs as that one."""
    path = files.DEPLOY / "systemd/kvpool.sysusers"
    command = [str(SYSUSERS), "--dry-run", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    assert "User=kvpool\n" in Path(files.DEPLOY / "systemd/kvpool-node.service").read_text()


def test_a_node_whose_name_was_taken_is_not_started_again():
    """It would take the name back, and so on for ever."""
    text = (files.DEPLOY / "systemd/kvpool-node.service").read_text()
    assert f"RestartPreventExitStatus={EXIT_SUPERSEDED}\n" in text


def test_there_is_a_unit_for_each_daemon():
    """Master, node and proxy, each with a configuration file to begin with."""
    assert [path.stem for path in UNITS] == ["kvpool-master", "kvpool-node", "kvpool-proxy"]
    for path in UNITS:
        assert (path.parent / f"{path.stem.removeprefix('kvpool-')}.yaml").is_file()
