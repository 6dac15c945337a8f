"""What several scorers share: loading, preprocessing, image and text towers. Scorers themselves stand one folder up."""
