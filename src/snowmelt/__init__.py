"""Snowmelt turns a folder of images into a generator."""

__version__ = "0.1.0"
