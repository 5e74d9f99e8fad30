"""What a run found: figures, sentences, a page, and a widget to look at single examples."""
