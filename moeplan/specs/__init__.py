"""What people write: models, clusters, workloads, objectives and scenarios, frozen, with units in their values."""
