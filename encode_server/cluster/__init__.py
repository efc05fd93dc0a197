"""Many servers on a Ray cluster: Ray Serve places them, watches them and scales them; each is one server as it is."""
