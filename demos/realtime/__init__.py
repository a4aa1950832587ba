"""Watch the shipped student and steer it, on this machine: `python -m demos.realtime`."""
