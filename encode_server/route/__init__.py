"""`encode-server route`: a proxy before an engine that has the media of chat requests encoded first."""
