"""What a model uses: what becomes of its answers when a layer loses something."""
