"""Weights of the teachers for a task."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

# Teachers with random weights are below it; see the benchmark of the docs.
MINIMAL_GAIN = 0.05


def weight_of_none(weights: Iterable[float]) -> float:
    """Return what the weights of the teachers lack to 1, which is the null teacher's, that adds no update."""
    return max(0.0, 1 - sum(weights))


class TeacherWeights(NamedTuple):
    """Weights of the teachers for a task, as they were learned from its labels.

    Args:
        by_place: The weight of each teacher at each place of the model, `{place: {teacher: weight}}`. What the weights
            of a place lack to 1 belongs to the null teacher, which adds no update. They may sum to more than 1: the
            sum of the teachers' updates is then longer than their mean.
        gain: The share of the task loss without teachers that the weighted teachers take away, on held-out labels;
            negative where they do harm.
    """

    by_place: dict[str, dict[str, float]]
    gain: float

    @property
    def help(self) -> bool:
        """Whether the gain is more than noise; else the student starts as a new adapter, and is not distilled."""
        return self.gain >= MINIMAL_GAIN

    @property
    def strength(self) -> float:
        """How much the distillation counts by default: the gain if it is more than noise, else 0."""
        return self.gain if self.help else 0.0

    def mean(self) -> dict[str, float]:
        """Return the mean weight of each teacher over the places."""
        names = next(iter(self.by_place.values()))
        return {name: sum(row[name] for row in self.by_place.values()) / len(self.by_place) for name in names}

    def heavy(self) -> list[str]:
        """Return the teachers with at least half of an even share, or the heaviest one."""
        mean = self.mean()
        least = 0.5 * max(1.0, sum(mean.values())) / (len(mean) + 1)
        return [name for name, weight in mean.items() if weight >= least] or self.heaviest(1)

    def heaviest(self, number: int) -> list[str]:
        """Return so many teachers, the heaviest first."""
        mean = self.mean()
        return sorted(mean, key=lambda name: -mean[name])[:number]

    def shares(self, kept: Sequence[str]) -> list[float]:
        """Return the mean weights of some teachers, as shares that sum to 1."""
        mean = self.mean()
        total = max(sum(mean[name] for name in kept), 1e-12)
        return [mean[name] / total for name in kept]

    def at(self, place: str, kept: Sequence[str]) -> dict[str, float]:
        """Return the weights of some teachers at a place, or in a module there; they share what all teachers have.

        The mean weights where the teachers were not weighed, as in a silent layer, or outside the layers.
        """
        row = next((row for name, row in self.by_place.items() if f"{place}.".startswith(f"{name}.")), self.mean())
        share = sum(row.values()) / max(sum(row[name] for name in kept), 1e-12)
        return {name: row[name] * share for name in kept}
