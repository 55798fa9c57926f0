"""Contract suites that planners, trace readers and exporters inherit, built-in ones and those of others alike."""
