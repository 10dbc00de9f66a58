"""One file an engine. Engines never import each other; ``attention.py`` alone knows them all."""
