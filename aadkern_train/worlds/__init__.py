"""The worlds to learn in: moving digits and linear-Gaussian video with exact teachers, and folders of real video."""
