"""Alerts, dashboard and scaling ask for metrics that exist; the alerts fire when they should and lead to a section."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from encode_server.telemetry.metrics import REFUSING, Metrics

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "deploy/kubernetes/monitoring"
RULES = yaml.safe_load((MONITORING / "prometheusrule.yaml").read_text())["spec"]
ALERTS = [rule for group in RULES["groups"] for rule in group["rules"]]
DASHBOARD = json.loads((MONITORING / "dashboard.json").read_text())
SCALING = yaml.safe_load((MONITORING / "scaledobject.yaml").read_text())["spec"]
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def queries() -> dict[str, str]:
    found = {rule["alert"]: rule["expr"] for rule in ALERTS}
    found |= {f"{p['title']} {t['refId']}": t["expr"] for p in PANELS for t in p["targets"]}
    return found | {f"KEDA {index}": t["metadata"]["query"] for index, t in enumerate(SCALING["triggers"])}


@pytest.fixture(scope="module")
def samples() -> dict[str, set[str]]:
    """The labels of each sample's name that a server exposes."""
    metrics = Metrics()
    metrics.show_ranks(0, [True])
    metrics.show_preparers([True])
    found: dict[str, set[str]] = {"up": set()}
    for family in metrics.registry.collect():
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


@pytest.mark.parametrize("name", queries())
def test_every_query_asks_for_series_that_exist(name, samples):
    query = queries()[name]
    asked = set(re.findall(r"\b((?:encode|process|python)_\w+|up)\b(?=[{\[ )]|$)", query))
    assert asked and asked <= set(samples), query
    known = set().union(*(samples[metric] for metric in asked)) | {"job", "instance"}
    labels = set(re.findall(r"(\w+)(?:=~|!~|!=|=)\"", query))
    grouped = {label.strip() for by in re.findall(r"by \(([^)]*)\)", query) for label in by.split(",")}
    assert labels | grouped <= known, query


def test_a_bound_named_in_an_alert_is_one_that_can_refuse():
    named = {
        b for rule in ALERTS for value in re.findall(r'bound!?[=~]+"([^"]+)"', rule["expr"]) for b in value.split("|")
    }
    assert named and named <= set(REFUSING)


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_every_alert_leads_to_its_section(rule):
    file, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    headings = [line[3:].lower() for line in (ROOT / file).read_text().splitlines() if line.startswith("## ")]
    assert anchor == rule["alert"].lower() and anchor in headings
    assert rule["labels"]["severity"] in ("warning", "critical")


def test_every_section_of_the_runbook_has_its_alert():
    headings = re.findall(r"^## (\w+)$", (ROOT / "docs/runbook.md").read_text(), re.M)
    assert headings == [rule["alert"] for rule in ALERTS]


def test_alerts_fire_on_what_they_are_for_and_on_nothing_else(tmp_path):
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(RULES))
    shutil.copy(Path(__file__).with_name("alerts.yaml"), tmp_path)
    ran = subprocess.run(["promtool", "test", "rules", "alerts.yaml"], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_panels_do_not_overlap_and_have_ids_of_their_own():
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in DASHBOARD["panels"])
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24
