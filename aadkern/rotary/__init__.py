"""Rotary positions over (frame, row, column): tables of angles, where a clip's tokens stand, and the turning itself."""
