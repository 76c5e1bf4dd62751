"""What is trained and what teaches: the denoiser, the discriminator, the teacher, and a rollout through the cache."""
