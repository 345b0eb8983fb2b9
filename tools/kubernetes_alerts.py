"""Write `deploy/kubernetes/alerts.yaml`: the rules of `deploy/monitoring/rules.yml`, for the Prometheus operator.

There is one set of rules. Change `rules.yml`, then run this. `tests/deploy/test_monitoring.py` compares the two files.

    .venv/bin/python tools/kubernetes_alerts.py
"""

from __future__ import annotations

import textwrap
from pathlib import Path

DEPLOY = Path(__file__).resolve().parents[1] / "deploy"
RULES = DEPLOY / "monitoring" / "rules.yml"
ALERTS = DEPLOY / "kubernetes" / "alerts.yaml"

_HEAD = """\
# Made by tools/kubernetes_alerts.py of deploy/monitoring/rules.yml: change that file, not this one.
# Alerts for a Prometheus of the Prometheus operator. docs/operations.md says of each what to do.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: fastgpt2
  # Many installations of the operator look only for rules with a label such as `release: prometheus`; add yours.
  labels: {app.kubernetes.io/name: fastgpt2}
spec:
"""


def alerts(rules: str) -> str:
    """Return the manifest that holds these rules, with their comments."""
    _, groups, text = rules.partition("groups:\n")
    return _HEAD + textwrap.indent(groups + text, "  ", lambda line: line.strip() != "")


if __name__ == "__main__":
    ALERTS.write_text(alerts(RULES.read_text("utf-8")), "utf-8")
