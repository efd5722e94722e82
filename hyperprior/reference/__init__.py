"""The references that models are compared with: the codecs of Pillow, and published curves."""
