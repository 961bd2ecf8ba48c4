"""Counters of the service, in the text format of Prometheus."""

from collections import defaultdict
from collections.abc import Sequence

HELP = {
    "tenant_requests_total": "Requests of POST /answer by HTTP status.",
    "tenant_request_seconds": "Seconds of a request of POST /answer.",
    "tenant_questions_total": "Questions that the model was asked.",
    "tenant_passes_total": "Forward passes; questions / passes is the mean number of questions that share one.",
    "tenant_loads_total": "Students that were loaded from disk.",
    "tenant_load_failures_total": "Students that could not be loaded.",
    "tenant_evictions_total": "Students that made room for others.",
}
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)  # the buckets of a request's time


class Metrics:
    """Counters of one process. There are no labels of tenants: Prometheus keeps a time series for each label."""

    def __init__(self) -> None:
        self.values: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))

    def add(self, name: str, value: float = 1, labels: str = "") -> None:
        """Add to a counter, for instance with the labels `{status="200"}`."""
        self.values[name][labels] += value

    def observe(self, name: str, value: float, buckets: Sequence[float] = SECONDS) -> None:
        """Add a value to a histogram."""
        for bucket in (*buckets, float("inf")):
            self.add(f"{name}_bucket", value <= bucket, f'{{le="{"+Inf" if bucket == float("inf") else bucket}"}}')
        self.add(f"{name}_sum", value)
        self.add(f"{name}_count")

    def text(self) -> str:
        """Return all values in the text format of Prometheus."""
        lines = []
        for name, text in HELP.items():
            is_histogram = f"{name}_count" in self.values
            names = [f"{name}_{part}" for part in ("bucket", "sum", "count")] if is_histogram else [name]
            if is_histogram or name in self.values:
                lines += [f"# HELP {name} {text}", f"# TYPE {name} {'histogram' if is_histogram else 'counter'}"]
                # The thread of the model may add meanwhile, so a copy is read.
                lines += [f"{of}{labels} {value:g}" for of in names for labels, value in dict(self.values[of]).items()]
        return "\n".join(lines) + "\n"
