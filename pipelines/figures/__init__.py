"""Pictures: grids of images and the figures of the paper."""
