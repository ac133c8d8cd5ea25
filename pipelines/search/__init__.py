"""The front without the full grid: races over images, swarms over hyper-parameters."""
