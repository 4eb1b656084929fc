"""What becomes of a trained model: loaded again from its file, and exported for other programs."""
