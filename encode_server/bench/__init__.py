"""The load generator: media that are never the same twice, a lean HTTP client, and loops that time what comes back."""
