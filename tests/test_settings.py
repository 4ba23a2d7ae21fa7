from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from bdh_batch import cli
from bdh_batch.errors import ConfigError
from bdh_batch.settings import LISTS, load, options

if TYPE_CHECKING:
    from tests.conftest import Cli

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("BDH_"):
            monkeypatch.delenv(name)


def test_the_command_line_wins_over_the_environment_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("server: {host: file, port: 1, drain_seconds: 5}\ngeneration:\n")
    monkeypatch.setenv("BDH_SERVER__HOST", "environment")
    monkeypatch.setenv("BDH_SERVER__PORT", "2")
    resolved = load(config, [("server.port", "3")])
    server = resolved.settings.server
    assert (server.host, server.port, server.drain_seconds) == ("environment", 3, 5)
    assert resolved.origins == {
        "server.host": "environment",
        "server.port": "command line",
        "server.drain_seconds": f"file {config}",
    }


@pytest.mark.parametrize("text", ["a,b", "a, b", '["a", "b"]'])
def test_lists_can_be_said_in_one_string(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("BDH_AUTH__API_KEYS", text)
    keys = load().settings.auth.api_keys
    assert [key.get_secret_value() for key in keys] == ["a", "b"]


@pytest.mark.parametrize(("text", "number"), [("1000", 1000), ("4 GiB", 4 << 30), ("1.5MB", 1_500_000), ("2k", None)])
def test_memory_has_units(text: str, number: int | None) -> None:
    if number is None:
        with pytest.raises(ConfigError, match=r"engine\.state_memory"):
            load(overrides=[("engine.state_memory", text)])
    else:
        assert load(overrides=[("engine.state_memory", text)]).settings.engine.state_memory == number


@pytest.mark.parametrize(
    ("override", "proposed"),
    [
        ("server.prt", "server.port"),
        ("sever.port", "server.port"),
        ("auth.api_key", "auth.api_keys"),
        ("port", "server.port"),
        ("rate_limiting.rpm", "rate_limiting.enabled"),
    ],
)
def test_an_unknown_option_is_refused_with_the_nearest(override: str, proposed: str) -> None:
    with pytest.raises(ConfigError, match=rf"{override}.*command line.*did you mean \S+\.\w+") as error:
        load(overrides=[(override, "1")])
    assert error.value.message.endswith(f"did you mean {proposed}?") or override == "rate_limiting.rpm"


@pytest.mark.parametrize("name", ["BDH_SERVER__PRT", "BDH_SEVER__PORT", "bdh_server__prt", "BDH_SERVER__PORT__X"])
def test_an_unknown_variable_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(ConfigError, match=rf"{name}.*server\.port"):
        load()


OF_KUBERNETES = {  # beside a service called bdh, and one called bdh-server
    "BDH_PORT": "tcp://10.0.0.1:8000",
    "BDH_PORT_8000_TCP": "tcp://10.0.0.1:8000",
    "BDH_PORT_8000_TCP_ADDR": "10.0.0.1",
    "BDH_SERVICE_HOST": "10.0.0.1",
    "BDH_SERVER": "tcp://10.0.0.1:8000",
    "BDH_SERVER_PORT": "tcp://10.0.0.1:8000",
    "BDH_SERVER_SERVICE_PORT": "8000",
}


def test_variables_that_are_no_options_are_reported_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not load().warnings
    for name, value in OF_KUBERNETES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("BDH_SERVER__PORT", "9000")
    resolved = load()
    assert resolved.settings.server.port == 9000
    (warning,) = resolved.warnings
    assert all(f" {name}," in warning or f" {name}." in warning for name in OF_KUBERNETES)
    assert "BDH_SERVER__PORT" in warning
    assert "\n" not in warning


def test_a_whole_section_is_a_json_object_and_an_option_goes_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BDH_SERVER", '{"host": "section", "port": 1, "cors_origins": ["a", "b"]}')
    monkeypatch.setenv("BDH_SERVER__PORT", "2")
    monkeypatch.setenv("BDH_MODEL__LAYERS", "null")
    resolved = load()
    server = resolved.settings.server
    assert (server.host, server.port, server.cors_origins) == ("section", 2, ["a", "b"])
    assert resolved.settings.model.layers is None
    assert not resolved.warnings
    monkeypatch.setenv("BDH_SERVER", '{"prt": 1}')
    with pytest.raises(ConfigError, match=r"unknown option server\.prt \(.*did you mean server\.port"):
        load()


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ("scheduler.weights", "[" * 10_000),
        ("scheduler.weights", "{0123456789abcdef: &a [*a]}"),
        ("auth.api_keys", "[" * 10_000),
        ("server.cors_origins", "[&a b, *a]"),
        ("server.port", "9" * 100_000),
        ("engine.state_memory", "9" * 400 + " GiB"),
        ("engine.state_memory", "9" * 100_000),
        ("model.layers", "9" * 100_000),
    ],
)
@pytest.mark.parametrize("origin", ["command line", "environment"])
def test_a_value_beyond_the_bounds_is_refused_by_option_in_a_short_line(
    monkeypatch: pytest.MonkeyPatch, option: str, text: str, origin: str
) -> None:
    if origin == "environment":
        monkeypatch.setenv(f"BDH_{option.upper().replace('.', '__')}", text)
    with pytest.raises(ConfigError, match=rf"{option} \({origin}\)") as error:
        load(overrides=[(option, text)] if origin == "command line" else [])
    assert len(error.value.message) < 500


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("[" * 100_000, "nested more than 64 deep"),
        ("server: {port: " + "9" * 900_000 + "}", "a number of 900,000 digits"),
        ("server: &a {port: 1}\nmodel: {<<: *a}", "aliases"),
        ("server: {port: 1, port: 2}", "a key is given twice"),
        ("? " + "s" * 100_000 + "\n: {}", "unknown section s"),
        ("server: {" + "s" * 100 + "é: 1}", "unknown option server.s"),
        ('server: {host: "caf\\u0007"}\nport: \x07', "not YAML"),
        ("server: {port: 2001-01-01}", r"server\.port .*2001"),
        ("server: {port: 1_000_000_000_000}", r"server\.port"),
        ('model: {path: "a\\0b"}', r"model\.path .*holds a NUL character"),
        ("{1: 2}", "unknown section 1"),
        ("server: {1: 2}", r"unknown option server\.1"),
        ("server: {host: [a]}", r"server\.host"),
        ("server: {prt: 1}", r"server\.prt .*server\.port"),
        ("sever: {port: 1}", "section sever .*server"),
        ("server: 5", "server .*should hold options"),
        ("[1]", "should hold sections"),
        ("a: b: c", "not YAML"),
        ("server: {port: x}", r"server\.port .*integer.*'x'"),
        ("server: {workers: 65}", r"server\.workers .*64"),
        ("server: {port: 70000}", r"server\.port"),
        ("scheduler: {max_running: 0}", r"scheduler\.max_running"),
        ("generation: {temperature: 3}", r"generation\.temperature"),
    ],
)
def test_a_wrong_file_is_refused_by_option(tmp_path: Path, content: str, named: str) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(content)
    with pytest.raises(ConfigError, match=named) as error:
        load(config)
    assert "\n" not in error.value.message
    assert len(error.value.message) < 500


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *((f"scheduler.{name}", 0) for name in ("max_running", "max_queued_requests", "max_queued_tokens")),
        *((f"scheduler.{name}", 0) for name in ("prefill_tokens", "quantum_steps", "queue_timeout", "request_timeout")),
        *((f"prefix_cache.{name}", 0) for name in ("entries", "host_memory", "min_tokens")),
        *(("health.failed_steps", 0), ("scheduler.target_step_ms", -1), ("scheduler.target_step_ms", ".inf")),
        *(
            ("scheduler.weights", text)
            for text in ("{0123456789abcdef: 0}", "{sk-secret: 2}", "{0123456789abcdef: .nan}")
        ),
    ],
)
def test_a_limit_that_cannot_be_kept_is_refused(option: str, value: object) -> None:
    with pytest.raises(ConfigError, match=option.replace(".", r"\.")):
        load(overrides=[(option, value)])


def test_a_file_is_read_as_utf8_whatever_the_locale(tmp_path: Path, cli: Cli) -> None:
    config = tmp_path / "c.yaml"
    config.write_bytes("\ufeffmodel: {name: Drache 🐉}".encode())
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "utf-8"}
    ended = cli("config", "show", "--config", config, env=locale, afresh=True)
    assert ended.returncode == 0, ended.stderr
    assert "Drache" in ended.stdout
    config.write_bytes(b"model: {name: \xe9}")
    with pytest.raises(ConfigError, match=r"not UTF-8 \(.* at byte 14\)"):
        load(config)


def test_weights_may_come_from_a_command_line() -> None:
    resolved = load(overrides=[("scheduler.weights", "{0123456789abcdef: 2.5}")])
    assert resolved.settings.scheduler.weights == {"0123456789abcdef": 2.5}


def test_a_network_of_proxies_may_be_written_with_bits_of_a_host() -> None:
    settings = load(overrides=[("server.trusted_proxies", "10.0.0.5/8, 10.0.0.5, fd00::1/64")]).settings
    assert settings.server.trusted_proxies == ["10.0.0.0/8", "10.0.0.5", "fd00::/64"]


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        load(tmp_path / "none.yaml")


def test_every_option_has_help_and_belongs_to_a_section_or_is_a_list() -> None:
    for option, (_, text) in options().items():
        assert option.count(".") == (0 if option in LISTS else 1)
        assert text.endswith("."), option


def test_config_show_masks_secrets_and_reports_origins(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "show", "--port", "9000", "--set", "auth.api_keys=sesame"]) == 0
    shown = capsys.readouterr().out
    assert "port: 9000  # command line" in shown
    assert "host: 127.0.0.1  # default" in shown
    assert "sesame" not in shown
    assert "models: []  # default" in shown
    assert set(options()) - LISTS <= {
        f"{section}.{line.split(':')[0].strip()}" for section, lines in _sections(shown).items() for line in lines
    }


def _sections(text: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    section = ""
    for line in text.splitlines():
        if line.startswith(" "):
            found[section].append(line)
        else:
            section = line.removesuffix(":")
            found[section] = []
    return found


def test_an_error_does_not_show_a_secret(capsys: pytest.CaptureFixture[str]) -> None:
    for keys in ("[sesame, 5]", '["sesame'):
        assert cli.main(["config", "show", "--set", f"auth.api_keys={keys}"]) == 2
        captured = capsys.readouterr()
        assert "auth.api_keys" in captured.err
        assert "sesame" not in captured.err


@pytest.mark.parametrize("arguments", [["--set", "server.port"], ["--set", "server.prt=1"], ["--port", "x"]])
def test_a_wrong_command_line_ends_in_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert cli.main(["config", "show", *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_command_needs_no_standard_streams(closed: str) -> None:
    command = [sys.executable, "-m", "bdh_batch", "config", "show"]
    script = f'exec "$@" {closed}'
    ended = subprocess.run(["sh", "-c", script, "sh", *command], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0
    assert ended.stderr == ""
    assert bool(ended.stdout) == (">&-" not in closed.replace("2>&-", ""))


def test_where_nothing_can_be_printed_the_server_goes_on() -> None:
    code = 'from bdh_batch import launch; launch._announce(False, True, "http://here", "dragon")'
    with open("/dev/full", "wb") as full:
        ended = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=300
        )
    assert ended.returncode == 0
    assert ended.stderr == "dragon is ready at http://here, which cannot be printed: No space left on device\n"
