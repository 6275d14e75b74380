"""Every flag, variable and key in deploy/ is one that the product has, with a value that it takes."""

import json
import re
from types import SimpleNamespace

import pytest
import yaml
from click.testing import CliRunner

from kvpool.config import COMPONENTS, MasterSettings, NodeSettings, ProxySettings, load, split_address
from kvpool_vllm.settings import read_settings, role_of
from tests.deploy import files

SETTINGS = {"kvpool-master": MasterSettings, "kvpool-node": NodeSettings, "kvpool-proxy": ProxySettings}
EVERYONE = {name for component in COMPONENTS for name in component.__dataclass_fields__}


def settings_of(call):
    """What a daemon would run with; raises what would end its start."""
    cls = SETTINGS[call.argv[0]]
    context = call.command().make_context(call.argv[0], call.argv[1:])
    flags = dict(context.params)
    config = flags.pop("config")
    if config is not None:
        assert config in call.config, f"{call}: {config} is mounted from nowhere"
        config = str(call.config[config])
    env = {
        name: value.replace("$(POD_IP)", "10.0.0.1").replace("$(HOST_NAME)", "one") for name, value in call.env.items()
    }
    return load(cls, flags=flags, config_path=config, environ=env)


@pytest.mark.parametrize("call", [c for c in files.calls() if c.argv[0] in SETTINGS], ids=str)
def test_daemons_would_start(call):
    """Flags, the environment and configuration files pass the checks of the program's own start; nothing is unused."""
    loaded = settings_of(call)
    assert loaded.notes == []


@pytest.mark.parametrize("call", [c for c in files.calls() if c.argv[0] not in SETTINGS], ids=str)
def test_tools_know_their_arguments(call):
    """The tools parse the whole line, subcommands included."""
    result = CliRunner().invoke(call.command(), [*call.argv[1:], "--help"])
    assert result.exit_code == 0, result.output


def test_calls_are_found():
    """The tests above are about something: each daemon stands in manifests, Compose and units."""
    found = {(call.argv[0], call.where.rpartition(".")[2].partition("#")[0]) for call in files.calls()}
    assert {(program, "service") for program in SETTINGS} <= found
    assert {("kvpool-master", "yaml"), ("kvpool-node", "yaml"), ("kvpool-proxy", "yaml")} <= found
    assert ("kvpool-master", "Dockerfile") in {(call.argv[0], call.where.rpartition("/")[2]) for call in files.calls()}


def test_misspelt_settings_are_found():
    """The checks can fail: a flag, a variable and a value that do not exist."""
    good = files.Call("here", ["kvpool-node", "--segment_size", "1GB"])
    settings_of(good)
    for argv, env in (
        (["kvpool-node", "--segment_sise", "1GB"], {}),
        (["kvpool-node", "--segment_size", "1QB"], {}),
        (["kvpool-node"], {"KVPOOL_SEGMENT_SISE": "1GB"}),
    ):
        with pytest.raises(Exception, match=r"(?i)segment_si"):
            settings_of(files.Call("here", argv, env))


VARIABLE = re.compile(r"\bKVPOOL_([A-Z_]+)\b")


@pytest.mark.parametrize(
    "path",
    sorted([*(p for p in files.DEPLOY.rglob("*") if p.is_file()), files.ROOT / "docs/deployment.md"]),
    ids=files.named,
)
def test_variables_are_settings(path):
    """KVPOOL_ and a name in capitals is a setting of some component wherever it stands, comments included."""
    assert {name.lower() for name in VARIABLE.findall(path.read_text())} <= EVERYONE | {"config"}


# ---- kv-transfer-config ----------------------------------------------------------------------------


def transfer_configs():
    """Every kv-transfer-config in deploy/ and docs/deployment.md, with what a shell would put in replaced."""
    for path in sorted([*(p for p in files.DEPLOY.rglob("*") if p.is_file()), files.ROOT / "docs/deployment.md"]):
        lines = (line.partition("#")[2] if path.suffix == ".yaml" and line.lstrip().startswith("#") else line
                 for line in path.read_text().splitlines())  # fmt: skip
        text = re.sub(r"""'"[^"']+"'""", "10.0.0.2:8000", "\n".join(lines))
        for number, match in enumerate(re.finditer(r'\{\s*"kv_connector"', text)):
            yield pytest.param(
                json.JSONDecoder().raw_decode(text, match.start())[0], id=f"{files.named(path)}-{number}"
            )


@pytest.mark.parametrize("config", list(transfer_configs()))
def test_engines_would_start(config):
    """The connector accepts each configuration, finds nothing without effect in it, and does something."""
    known = {"kv_connector", "kv_role", "engine_id", "kv_connector_extra_config", "kv_load_failure_policy"}
    assert config["kv_connector"] == "KVPoolConnector"
    assert config.keys() <= known
    transfer = SimpleNamespace(**{"kv_connector_extra_config": {}, **config})
    role = role_of(config["kv_role"], read_settings(transfer))
    assert role.loads
    if "engine_id" in config:  # by which kvpool-proxy knows it
        assert split_address(re.sub(r"\$\(\w+\)", "one", config["engine_id"]), "engine_id")


def test_transfer_configs_are_found():
    """Manifests, Kthena's scripts, ours, and the engine in Compose's comments."""
    names = " ".join(str(param.id) for param in transfer_configs())
    for where in ("vllm.yaml", "pd.yaml-1", "kthena/scripts.yaml-1", "prefill.sh", "decode.sh", "compose.yaml"):
        assert where in names


def test_the_engine_in_comments_is_whole():
    """Without its comment signs Compose's engine is a service with a configuration that is JSON."""
    engine = files.compose_engine()
    config = json.loads(engine["command"][engine["command"].index("--kv-transfer-config") + 1])
    assert config["kv_connector"] == "KVPoolConnector"
    names = {name.removeprefix("KVPOOL_").lower() for name in engine["environment"]}
    assert names <= EVERYONE
    sockets = yaml.safe_load(files.DEPLOY.joinpath("compose/compose.yaml").read_text())["services"]["node-1"]["command"]
    assert engine["environment"]["KVPOOL_NODE"] in sockets
