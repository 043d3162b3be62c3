"""The counters of the server, in the text format that Prometheus reads."""

import threading
from collections.abc import Callable

_SECONDS = "mmrl_request_seconds"
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
# Name -> type, description. A batch is one run of a tower: inputs / batches is the mean batch size.
_DESCRIBED = {
    "mmrl_requests_total": ("counter", "Requests by path and status."),
    _SECONDS: ("histogram", "Time from a request's arrival to the end of its response, by path."),
    "mmrl_inputs_total": ("counter", "Texts and images encoded."),
    "mmrl_batches_total": ("counter", "Batches encoded."),
    "mmrl_encode_seconds_total": ("counter", "Time spent encoding."),
    "mmrl_waiting_inputs": ("gauge", "Texts and images that wait to be encoded."),
}


class Metrics:
    """Counters with labels. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, dict[str, float]] = {name: {} for name in _DESCRIBED}
        self.waiting: Callable[[], int] = lambda: 0
        """Returns the value of mmrl_waiting_inputs."""

    def add(self, name: str, value: float = 1, suffix: str = "", **labels: str | int) -> None:
        """Adds to a counter. Labels are paths of this application, statuses and modalities: they need no escaping."""
        pairs = ",".join(f'{key}="{label}"' for key, label in labels.items())
        series = f"{name}{suffix}{{{pairs}}}"
        with self._lock:
            self._values[name][series] = self._values[name].get(series, 0) + value

    def add_request(self, path: str, status: int, seconds: float) -> None:
        """Counts a request and its time."""
        self.add("mmrl_requests_total", path=path, status=status)
        for bound in _BUCKETS:
            self.add(_SECONDS, int(seconds <= bound), "_bucket", path=path, le=str(bound))
        self.add(_SECONDS, 1, "_bucket", path=path, le="+Inf")
        self.add(_SECONDS, seconds, "_sum", path=path)
        self.add(_SECONDS, 1, "_count", path=path)

    def text(self) -> str:
        """All counters in Prometheus' text format, version 0.0.4."""
        with self._lock:
            values = {name: dict(series) for name, series in self._values.items()}
        values["mmrl_waiting_inputs"] = {"mmrl_waiting_inputs": self.waiting()}
        lines = []
        for name, (kind, description) in _DESCRIBED.items():
            lines += [f"# HELP {name} {description}", f"# TYPE {name} {kind}"]
            lines += [f"{series} {value:.9g}" for series, value in values[name].items()]
        return "\n".join(lines) + "\n"
