"""Rollout workers as plain classes: weights in, sample groups out; and the prompt sources. No Ray here."""
