"""How fast a run is on the devices that are here, part by part.

`mixer-jax benchmark` measures the programs that a run uses: nothing is rebuilt for the
measurement.
"""
