"""SGLang: its frames, its registrations, its endpoints, its bootstrap servers."""
