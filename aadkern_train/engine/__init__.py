"""What runs a run and knows nothing of video: processes, checkpoints, settings, the run's folder, files."""
