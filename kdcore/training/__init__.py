"""Training of one stage: its members on the same batches, each frozen one run once a batch."""
