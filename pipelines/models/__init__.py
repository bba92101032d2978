"""Models in storage and in the registry: where one is, and how it is opened."""
