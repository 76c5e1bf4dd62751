"""Streaming a finished model into a video file: a run's, or Wan's from its folders."""
