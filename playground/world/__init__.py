"""Scenes, captions, renderer, verifier and prompt splits. Never imports torch."""
