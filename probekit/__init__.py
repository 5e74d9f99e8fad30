"""probekit: what each layer of a vision-language model knows.

Letters for shapes, used in every docstring: n examples, l layers, t tokens, d width, c classes, s seeds, b images,
k suffixes of one image, p problems solved together (of probes) or patches (of image encoders). A tensor whose rank is
not obvious carries them in its name: `hidden_ntd`.
"""

__version__ = "0.1.0"
