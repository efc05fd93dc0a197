"""Images, videos and audio: fetched (data URIs, base64, http(s), files) and decoded, both within limits."""
