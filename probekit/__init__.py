"""probekit: what each layer of a vision-language model knows.

Letters for shapes, used in every docstring: n examples, l layers, t tokens, d width, c classes, p problems solved
together, s seeds, k suffixes of one image. A tensor whose rank is not obvious carries them in its name: `hidden_ntd`.
"""

__version__ = "0.1.0"
