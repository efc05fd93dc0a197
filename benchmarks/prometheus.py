"""Reading `/metrics`: what happened between two looks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@dataclass(frozen=True)
class Look:
    """All samples at one time, by name and labels."""

    samples: Mapping[tuple[str, tuple[tuple[str, str], ...]], float]

    @classmethod
    def parse(cls, text: str) -> Look:
        """From the text format."""
        samples: Samples = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                samples[sample.name, tuple(sorted(sample.labels.items()))] = sample.value
        return cls(samples)

    def since(self, earlier: Look) -> Look:
        """The differences; of gauges too, where they mean little."""
        return Look({key: value - earlier.samples.get(key, 0.0) for key, value in self.samples.items()})

    def total(self, name: str, **labels: str) -> float:
        """Sum over all samples of a name with these labels."""
        wanted = set(labels.items())
        return sum(value for (known, has), value in self.samples.items() if known == name and wanted <= set(has))

    def labels(self, name: str, label: str) -> list[str]:
        """The values a label has."""
        return sorted({dict(has)[label] for known, has in self.samples if known == name and label in dict(has)})

    def quantile(self, histogram: str, share: float) -> float:
        """A quantile of a histogram, interpolated in its bucket; the largest finite bound for what lies beyond it."""
        bounds = sorted(
            (float(dict(has)["le"]), count)
            for (name, has), count in self.samples.items()
            if name == f"{histogram}_bucket"
        )
        if not bounds or not bounds[-1][1]:
            return 0.0
        rank, low, below = share * bounds[-1][1], 0.0, 0.0
        for high, count in bounds:
            if count >= rank:
                return low if high == float("inf") else low + (high - low) * (rank - below) / max(1.0, count - below)
            low, below = high, count
        return low
