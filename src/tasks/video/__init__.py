"""Tasks on films: alarms, baselines, retrieval, and the formats and scores of TREC."""
