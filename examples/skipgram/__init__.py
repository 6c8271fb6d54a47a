"""Skip-gram with negative sampling, trained once per embedding module on the same batches."""
