"""The one physics: seconds and bytes of a placement under a load, from measured tables where there are any."""
