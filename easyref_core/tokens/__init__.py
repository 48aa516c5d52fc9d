"""Reference tokens: their records, the aggregator, combinations, batches and files."""
