"""The machine a run is on, and the libraries it uses."""
