"""Media: where they come from (data URIs, base64, http(s), files) and how they are decoded, all of it within limits."""
