"""Training runs as folders on disk: train, resume, fine-tune, load and measure."""
