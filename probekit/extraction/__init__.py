"""From (file, prompt) to pooled hidden states on disk: the only step that needs the model."""
