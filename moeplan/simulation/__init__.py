"""Predict what serving or training with a plan will do: a discrete-event simulator over the one cost model."""
