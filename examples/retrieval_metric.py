"""The retrieval metric of the example and the benchmarks, as an `evaluate.Metric`."""

from typing import Any

import datasets
import evaluate
import numpy as np
from sklearn.metrics import roc_auc_score

DESCRIPTION = "AUC over all (query, FAQ) pairs, accuracy@1 and mean reciprocal rank over the queries."


class RetrievalMetric(evaluate.Metric):
    """Scores a ranking of FAQs for each query.

    Each query has exactly one right FAQ. Ties count against the ranking: an FAQ with the same score as the right one
    is ranked before it.

    Inputs of `compute`: `predictions` (the score of each pair), `references` (1 for the right FAQ, else 0) and
    `query_ids` (which query a pair belongs to). Results: `auc`, `accuracy_at_1` and `mrr`, fractions of 1.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description="predictions: scores; references: 0 or 1; query_ids: integers",
            features=datasets.Features(
                {
                    "predictions": datasets.Value("float64"),
                    "references": datasets.Value("int64"),
                    "query_ids": datasets.Value("int64"),
                }
            ),
        )

    def _compute(self, predictions: Any, references: Any, query_ids: Any) -> dict[str, float]:
        scores, right, queries = (np.asarray(values) for values in (predictions, references, query_ids))
        ranks = []
        for query in np.unique(queries):
            of_query = queries == query
            if right[of_query].sum() != 1:
                raise ValueError(f"Query {query} has {right[of_query].sum()} right FAQs; it must have exactly one.")
            right_score = scores[of_query & (right == 1)][0]
            ranks.append(1 + np.sum(scores[of_query & (right == 0)] >= right_score))
        ranks = np.array(ranks)
        return {
            "auc": float(roc_auc_score(right, scores)),
            "accuracy_at_1": float(np.mean(ranks == 1)),
            "mrr": float(np.mean(1 / ranks)),
        }
