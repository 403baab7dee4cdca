"""Experiments: the ``tether`` command and what it is made of."""
