"""Images for classifiers: held in memory or read from disk, and the batches a step sees."""
