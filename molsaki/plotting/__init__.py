"""Pictures of maps, runs and studies.

Every function that draws takes numbers and texts, writes ``path`` (png, svg or pdf, by its suffix), and returns it.
``formats`` names further suffixes to write the same picture with, and ``title`` stands above all panels. None needs a
display, a file is either complete or absent, and the same input gives the same bytes (with the same version of
matplotlib). The text of an SVG file stays text; PNG and SVG files carry a title and a description for those who cannot
see them.
"""
