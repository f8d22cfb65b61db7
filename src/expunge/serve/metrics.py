"""Counts for Prometheus, in its text format."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable

BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Seconds."""


class Metrics:
    """Counters, gauges that are read when asked for, and one histogram: seconds to the first piece of an answer."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.tokens: Counter[str] = Counter()
        self.withheld = 0
        self.gone = 0
        self.open = 0
        self.gauges: dict[str, tuple[str, Callable[[], float]]] = {}
        self._first: dict[float, int] = defaultdict(int)
        self._seconds = 0.0
        self._count = 0

    def first(self, seconds: float) -> None:
        """An answer's first piece came after so long."""
        for bound in BUCKETS:
            self._first[bound] += seconds <= bound
        self._seconds += seconds
        self._count += 1

    def text(self) -> str:
        lines: list[str] = []

        def family(name: str, kind: str, help_: str, samples: list[tuple[str, float]]) -> None:
            lines.extend([f"# HELP expunge_{name} {help_}", f"# TYPE expunge_{name} {kind}"])
            lines.extend(f"expunge_{name}{labels} {value:g}" for labels, value in samples)

        counted = [(f'{{route="{r}",status="{s}"}}', float(n)) for (r, s), n in sorted(self.requests.items())]
        family("requests_total", "counter", "Requests by route and status.", counted)
        tokens = [(f'{{kind="{kind}"}}', float(n)) for kind, n in sorted(self.tokens.items())]
        family("tokens_total", "counter", "Tokens read (prompt) and written (completion).", tokens)
        family("withheld_total", "counter", "Answers that a guard cut off.", [("", float(self.withheld))])
        family(
            "clients_gone_total", "counter", "Answers whose client went or read too slowly.", [("", float(self.gone))]
        )
        family("requests_open", "gauge", "Requests being answered.", [("", float(self.open))])
        for name, (help_, value) in self.gauges.items():
            family(name, "gauge", help_, [("", float(value()))])
        name = "first_piece_seconds"
        lines += [f"# HELP expunge_{name} Seconds to the first piece of an answer.", f"# TYPE expunge_{name} histogram"]
        lines += [f'expunge_{name}_bucket{{le="{bound:g}"}} {self._first[bound]}' for bound in BUCKETS]
        lines += [f'expunge_{name}_bucket{{le="+Inf"}} {self._count}']
        lines += [f"expunge_{name}_sum {self._seconds:g}", f"expunge_{name}_count {self._count}"]
        return "\n".join(lines) + "\n"
