"""What a monitor reads of a run: scraped from the port that a Ray of this test's own shows, and drawn by grafana.json.

Left out: Prometheus and Grafana themselves.
"""

import json
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from raysim.federation.on_ray import metrics
from tests.conftest import ROOT
from tests.small_runs import environment, overrides

PATIENCE_S = 60
RUN_AND_STAY = """
import sys, ray
from raysim.config import load
from raysim.federation.on_ray.metrics import monitored
from raysim.runs.run import run
done = run(load("", sys.argv[1:]), display=False)
(node,) = ray.nodes()
print(node["MetricsExportPort"], flush=True)
with monitored("slow") as tell:
    tell(done.records)
    sys.stdin.read()
"""
"""A run on a Ray of its own, which says where the metrics are; then another one of the same figures, whose next round never comes."""
REPORT_S = 3
"""How often Ray's processes report; what is not said again for twice as long is forgotten."""


def test_a_run_on_ray_shows_its_rounds_speed_epsilon_and_failures_at_the_metrics_port(tmp_path: Path) -> None:
    out, failing = tmp_path / "run", ["clients.dropout=0.3", "server.num_rounds=3", "partition.num_clients=6", "seed=1"]
    settings = overrides("fedit-client", "resources.backend=ray", "resources.num_actors=1", "name=watched", *failing, out=out)
    process = subprocess.Popen(
        [sys.executable, "-c", RUN_AND_STAY, *settings],
        env=environment() | {"RAY_metrics_report_interval_ms": str(1000 * REPORT_S)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        port = int(process.stdout.readline())
        records = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
        found = scraped(port, run="watched", until=lambda values: values.get("ray_raysim_round") == 3)
        scraped(port, run="slow", until=lambda values: values == found)
        time.sleep(2 * REPORT_S + 1)
        assert scraped(port, run="slow", until=lambda values: True) == found, "a round may take its time"
    finally:
        process.stdin.close()
        process.wait(PATIENCE_S)
    last, failed = records[-1], sum(record["num_failed"] for record in records)
    assert failed > 0, "a run in which nobody fails says nothing of failures"
    sent = len(last["cohort"]) - last["num_failed"]
    assert found == pytest.approx(
        {
            "ray_raysim_round": 3,
            "ray_raysim_clients_per_s": sent / last["client_s"],
            "ray_raysim_tokens_per_s": last["tokens_per_s"],
            "ray_raysim_epsilon": last["epsilon"],
            "ray_raysim_failed_clients": failed,
        }
    )


def scraped(port: int, *, run: str, until: Any) -> dict[str, float]:
    """What the metrics port says of a run, once that satisfies `until`."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE_S) as answer:
            families = list(text_string_to_metric_families(answer.read().decode()))
        samples = [sample for family in families for sample in family.samples if sample.name.startswith("ray_raysim")]
        found = {sample.name: sample.value for sample in samples if sample.labels["run"] == run}
        if until(found):
            return found
        assert time.monotonic() < deadline, found
        time.sleep(0.2)


def test_a_run_that_promises_nothing_has_no_epsilon() -> None:
    record = {"round_index": 0, "cohort": [0, 1], "num_failed": 2, "client_s": 0.5, "tokens_per_s": 0.0, "epsilon": None}
    values = {name: value_of([record]) for name, (_, value_of) in metrics.METRICS.items()}
    assert values["raysim_epsilon"] is None
    assert values["raysim_clients_per_s"] == 0
    assert values["raysim_failed_clients"] == 2


def test_the_dashboard_draws_every_metric_and_no_other() -> None:
    dashboard = json.loads((ROOT / "grafana.json").read_text())
    panels = dashboard["panels"]
    drawn = [name for panel in panels for target in panel["targets"] for name in re.findall(r"\bray_(\w+)\{", target["expr"])]
    assert sorted(drawn) == sorted(metrics.METRICS)
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(panels))) <= set(variables)
    assert set(re.findall(r"ray_(raysim\w+)", variables["run"]["query"]["query"])) <= set(metrics.METRICS)
    assert all(panel["title"] and panel["description"] for panel in panels)
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels]
    assert len(set(places)) == len({panel["id"] for panel in panels}) == len(panels)
