"""Small environments and helpers that the tests of every agent share."""
