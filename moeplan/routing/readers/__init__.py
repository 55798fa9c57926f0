"""One module per trace format, each a plugin; held to one contract in :mod:`moeplan.testing.readers`."""
