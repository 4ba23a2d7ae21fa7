"""The dashboard and the alert rules, with a real Prometheus that scrapes a real server."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import yaml

from tests.conftest import CONFORMANCE, HANG_SECONDS, ROOT, eventually, free_port, wait_until_ready

if TYPE_CHECKING:
    from tests.conftest import ServeFactory, Server

RULES = ROOT / "deploy" / "prometheus" / "rules.yml"
DASHBOARD = ROOT / "deploy" / "grafana" / "bdh-batch.json"
UNIT_TESTS = Path(__file__).parent / "rules_test.yml"
needs_prometheus = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")),
    reason="Prometheus is not installed: apt-get install prometheus",
)
METRIC = re.compile(r"\b(?:bdh|process)[:_][\w:]+")
SUFFIX = re.compile(r"_(bucket|sum|count|total)$")
SCRAPES = "200ms"
CONFIG = """
global: {{scrape_interval: {scrapes}, evaluation_interval: {scrapes}}}
rule_files: [{rules}]
scrape_configs: [{{job_name: bdh-batch, static_configs: [{{targets: ["127.0.0.1:{port}"]}}]}}]
"""


def panels() -> Iterator[tuple[str, str]]:
    """The title of each panel, with each of its queries."""
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def without_variables(query: str) -> str:
    """As Grafana asks it, with everything chosen."""
    return query.replace("$__rate_interval", "30s").replace("$job", ".*").replace("$model", ".*")


class Prometheus:
    """A Prometheus that runs."""

    def __init__(self, port: int) -> None:
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=HANG_SECONDS)

    def get(self, path: str, **params: str) -> Any:
        answer = self.http.get(f"/api/v1/{path}", params=params).json()
        assert answer["status"] == "success", f"{params}: {answer}"
        return answer["data"]

    def query(self, query: str) -> list[Any]:
        found: list[Any] = self.get("query", query=query)["result"]
        return found

    def is_ready(self) -> bool:
        try:
            return self.http.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False


@pytest.fixture(scope="module")
def served(serve: ServeFactory) -> Iterator[Server]:
    """With an engine process of its own, so that all kinds of processes are scraped. It need not be ready yet."""
    options = ("engine.replicas=1", "engine.threads=1", "response_cache.enabled=true")
    with serve(*options, model=CONFORMANCE / "tiny", wait=False) as server:
        yield server


@pytest.fixture(scope="module")
def prometheus(served: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Scrapes the server, which is ready. It takes some seconds to find what to scrape: they start together."""
    folder, port = tmp_path_factory.mktemp("prometheus"), free_port()
    config, log = folder / "config.yml", folder / "log"
    config.write_text(CONFIG.format(scrapes=SCRAPES, rules=RULES, port=served.port))
    address = f"--web.listen-address=127.0.0.1:{port}"
    command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder}/data", address]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    found = Prometheus(port)
    try:
        eventually(found.is_ready, what=log.read_text)
        wait_until_ready(served)
        yield found
    finally:
        found.http.close()
        process.terminate()
        process.wait(HANG_SECONDS)


def ask_for_something(server: Server) -> None:
    """Requests of several kinds, and some that are refused."""
    server.events(prompt="Once upon a time", max_tokens=8, seed=1)
    server.complete(prompt="Once upon a time", max_tokens=4, seed=1)
    server.http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "a"}], "max_tokens": 2})
    server.refusal({"prompt": 5})
    server.refusal({"prompt": "a", "model": "other"}, status=404)


@needs_prometheus
def test_every_panel_has_data_of_what_a_server_reports(served: Server, prometheus: Prometheus) -> None:
    asked = {query: without_variables(query) for _, query in panels()}
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    missing: set[str] = set(asked)

    def all_there() -> bool:
        ask_for_something(served)
        names = {name.partition("{")[0] for name in served.metrics()} | recorded
        missing.clear()
        for query, plain in asked.items():
            if not prometheus.query(plain) and names.issuperset(METRIC.findall(query)):
                missing.add(query)
        return not missing

    eventually(all_there, what=lambda: missing)
    assert all(prometheus.query(plain) for query, plain in asked.items() if "upstream" not in query and no_fault(query))


def no_fault(query: str) -> bool:
    """Whether a server has what is asked for also where nothing goes wrong."""
    return not re.search(r"bdh_(store_failures|admission_rejections)", query)


@needs_prometheus
def test_every_rule_can_be_evaluated_and_a_server_that_is_well_raises_no_alert(
    served: Server, prometheus: Prometheus
) -> None:
    ask_for_something(served)

    def loaded() -> list[dict[str, Any]]:
        return [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]

    eventually(lambda: all(rule["health"] != "unknown" for rule in loaded()), what=loaded)
    assert [rule for rule in loaded() if rule["health"] != "ok"] == []
    assert len(loaded()) == len(rules())
    assert [rule["name"] for rule in loaded() if rule.get("state") == "firing"] == []


@needs_prometheus
@pytest.mark.parametrize("what", [("check", "rules", RULES), ("test", "rules", UNIT_TESTS)], ids=lambda words: words[0])
def test_promtool_finds_the_rules_right(what: tuple[object, ...]) -> None:
    done = subprocess.run(["promtool", *map(str, what)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tested_and_explained() -> None:
    page, tests = (ROOT / "docs" / "operations.md").read_text(), UNIT_TESTS.read_text()
    alerts = [rule["alert"] for rule in rules() if "alert" in rule]
    assert len(alerts) == len(set(alerts))
    assert [alert for alert in alerts if f"| `{alert}` |" not in page] == []
    assert [alert for alert in alerts if f'alertname="{alert}"' not in tests] == []
    for rule in rules():
        if "alert" in rule:
            assert rule["labels"]["severity"] in ("critical", "warning")
            assert rule["annotations"].keys() == {"summary", "description"}


def test_what_is_asked_for_are_metrics_of_this_server() -> None:
    pages = "".join((ROOT / "docs" / f"{name}.md").read_text() for name in ("operations", "gateway", "processes"))
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    queries = [query for _, query in panels()] + [rule["expr"] for rule in rules()]
    for name in {name for query in queries for name in METRIC.findall(query)}:
        if name.startswith("bdh:"):
            assert name in recorded
        elif name.startswith("bdh_"):
            assert f"`{SUFFIX.sub('', name)}`" in pages or f"`{name}`" in pages, name


def test_a_dashboard_can_be_imported_by_any_grafana() -> None:
    board = json.loads(DASHBOARD.read_text())
    variables = {variable["name"] for variable in board["templating"]["list"]}
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))
    for panel in board["panels"]:
        spot = panel["gridPos"]
        assert spot["x"] + spot["w"] <= 24
        for target in panel.get("targets", ()):
            assert target["datasource"]["uid"] == "${datasource}"
            assert set(re.findall(r"\$(\w+)", target["expr"])) <= variables | {"__rate_interval"}
