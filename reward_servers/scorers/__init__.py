"""One file a scorer. A scorer turns images (or latents) and prompts into one typed table; see base.py."""
