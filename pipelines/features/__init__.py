"""What the vision encoder says of images, encoded once and kept."""
