"""Vision-language models: how they are loaded, what they are given, how their layers are read."""
