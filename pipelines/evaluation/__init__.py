"""What a model is worth: its scores, computed as Ray tasks."""
