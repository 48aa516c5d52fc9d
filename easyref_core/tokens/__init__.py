"""Reference tokens: records, aggregator, combinations, batches, files."""
